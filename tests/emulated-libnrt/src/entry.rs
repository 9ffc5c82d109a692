//! The way into every call: who may enter (not a forked child, not before `nrt_init`), what was injected, and what is noted.
#![forbid(unsafe_code)]

use crate::abi::status;
use crate::calls::{Outcome, Refusal, open_trace, refuse, trace, violate};
use crate::world::{State, World};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::Duration;

static WORLD: OnceLock<Mutex<World>> = OnceLock::new();
/// Process that entered first; its locks are whole.
static FIRST: AtomicU32 = AtomicU32::new(0);
/// Process that called `nrt_init`; 0 while closed.
static OWNER: AtomicU32 = AtomicU32::new(0);
/// Calls from children of the owner. They cannot be noted in the world: its lock may be held for ever in a child.
static CHILD_CALLS: AtomicU64 = AtomicU64::new(0);

/// How long a child born before `nrt_init` waits for a lock that may never come.
const CHILD_PATIENCE: Duration = Duration::from_millis(200);

/// The world, for those who have been let in.
pub(crate) fn world() -> MutexGuard<'static, World> {
    WORLD.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

/// The world, unless this process was forked from the one that uses the library.
pub(crate) fn admit() -> Option<MutexGuard<'static, World>> {
    open_trace();
    let me = process::id();
    let owner = OWNER.load(Ordering::Acquire);
    if owner != 0 && owner != me {
        return None;
    }
    let first = FIRST.compare_exchange(0, me, Ordering::AcqRel, Ordering::Acquire).unwrap_or_else(|pid| pid);
    if first == 0 || first == me {
        return Some(world());
    }
    // A child that may call nrt_init itself. A lock held at the fork is held for ever, so wait with a limit.
    for _ in 0..CHILD_PATIENCE.as_millis() {
        let world = match WORLD.get().map(Mutex::try_lock) {
            Some(Ok(world)) => world,
            Some(Err(TryLockError::Poisoned(poisoned))) => poisoned.into_inner(),
            Some(Err(TryLockError::WouldBlock)) | None => {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
        };
        FIRST.store(me, Ordering::Release);
        return Some(world);
    }
    None
}

/// [`admit`] for a call of the runtime, which a forked child must not make.
fn enter(function: &str) -> Option<MutexGuard<'static, World>> {
    let world = admit();
    if world.is_none() {
        CHILD_CALLS.fetch_add(1, Ordering::Relaxed);
        trace(|| format!("violation {function}: called from a forked child"));
    }
    world
}

/// Calls that this process made as a forked child.
pub(crate) fn child_calls() -> u64 {
    CHILD_CALLS.load(Ordering::Relaxed)
}

/// Notes which process owns the runtime; `false` for none.
pub(crate) fn own(owned: bool) {
    OWNER.store(if owned { process::id() } else { 0 }, Ordering::Release);
}

/// When a call is legal.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Needs {
    /// Always.
    Nothing,
    /// Between `nrt_init` and `nrt_close`.
    Open,
}

/// What an injected status does.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Inject {
    /// The call does nothing and gives it.
    Instead,
    /// The body is told.
    Told,
}

/// Makes a call: `Err` is the status to give. Nothing unwinds into C.
pub(crate) fn call<T>(
    function: &'static str,
    needs: Needs,
    inject: Inject,
    body: impl FnOnce(Option<u32>) -> Outcome<T>,
) -> Result<T, u32> {
    let whole = || {
        let admitted = {
            let Some(mut world) = enter(function) else { return Err(status::FAILURE) };
            world.admits(needs).map(|()| world.calls.injected(function))
        };
        let outcome = match admitted {
            Ok(Some(status)) if inject == Inject::Instead => refuse(status, "injected"),
            Ok(injected) => guarded(|| body(injected)),
            Err(refusal) => Err(refusal),
        };
        world().calls.note(function, outcome.as_ref().err());
        outcome.map_err(|refusal| refusal.status)
    };
    catch_unwind(AssertUnwindSafe(whole)).unwrap_or(Err(status::FAILURE))
}

/// As [`call`], for functions that return the status.
pub(crate) fn status_of(
    function: &'static str,
    needs: Needs,
    inject: Inject,
    body: impl FnOnce(Option<u32>) -> Outcome<()>,
) -> u32 {
    call(function, needs, inject, body).err().unwrap_or(status::SUCCESS)
}

fn guarded<T>(body: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    // What a panic leaves half done is in the world, which every call checks as if a client had done it.
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| violate(status::FAILURE, "the emulated library panicked"))
}

impl World {
    /// Whether a call is legal now.
    fn admits(&self, needs: Needs) -> Result<(), Refusal> {
        match (needs, self.state) {
            (Needs::Nothing, _) | (Needs::Open, State::Open) => Ok(()),
            (Needs::Open, State::Fresh) => violate(status::UNINITIALIZED, "called before nrt_init"),
            (Needs::Open, State::Closed) => violate(status::CLOSED, "called after nrt_close"),
        }
    }
}
