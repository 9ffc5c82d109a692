//! The one owner of libnrt in a process, and every call into it.
//!
//! Each function here is safe to call with anything: what the library asks of its callers is checked, or held by the types, right
//! where the call is made, here or in a file below. The library's rules, from its headers and developer guide, and what keeps them:
//!
//! * **One owner.** [`Runtime::init`] succeeds once for a library until its runtime is closed ([`OWNERS`]).
//! * **No handle outlives the runtime.** Every handle holds an `Arc` of [`Inner`]; `nrt_close` is called by `Inner`'s drop only.
//! * **No tensor leaves before a set that names it.** A [`SetHandle`] holds its members and is destroyed before they are dropped.
//! * **Each handle is freed once**, by the drop of the only value that owns it.
//! * **Not in a forked child.** [`Inner::enter`] compares process ids first, before it touches a lock that another thread may
//!   have held when the fork happened. Drops leak there.
//! * **Not after the device was lost.** A status of class [`StatusClass::Poison`] is remembered; calls fail and drops leak.
//! * **Several threads** may execute, read and write at once (documented). Nothing is promised for two calls on one tensor:
//!   they take the lock of its storage. Nothing is said about loading, allocating and freeing at once: they take
//!   [`Inner::manage`]. A set is changed through `&mut` only and is not `Sync`.
#![allow(unsafe_code)] // the calls

mod model;
mod set;
mod tensor;

pub(super) use model::ModelHandle;
pub(super) use set::SetHandle;
pub(super) use tensor::{TensorHandle, read_batch, write_batch};

use super::api::Api;
use super::error::{NeuronError, Result};
use super::io::lossy;
use super::load::Library;
use super::{Status, StatusClass, Version, sys};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// libnrt reads this when it is initialised.
const ASYNC_VARIABLE: &str = "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS";

/// What became of a library's runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    Live,
    Closed,
    /// The device is lost: never closed.
    Lost,
}

/// Every library that was initialised in this process, with what became of it.
static OWNERS: Mutex<Vec<(Library, Life)>> = Mutex::new(Vec::new());
/// The process that first initialised a library; 0 if none did.
static OWNER_PID: AtomicU32 = AtomicU32::new(0);

/// A lock whose data is whole whatever panicked elsewhere.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether this process was forked from one that had initialised a library.
pub(super) fn is_forked_child() -> bool {
    let owner = OWNER_PID.load(Ordering::Acquire);
    owner != 0 && owner != process::id()
}

/// Remembers what became of a library.
fn becomes(owners: &mut [(Library, Life)], library: Library, life: Life) {
    owners.iter_mut().filter(|(l, _)| *l == library).for_each(|(_, l)| *l = life);
}

/// Success, or which call answered what.
fn check(op: &'static str, status: u32) -> Result<()> {
    let status = Status(status);
    if status.is_success() { Ok(()) } else { Err(NeuronError::Call { op, status }) }
}

/// What may be asked of a library before it is initialised.
impl Library {
    /// Whether the device was lost to this process through this library.
    pub(super) fn is_lost(self) -> bool {
        !is_forked_child() && lock(&OWNERS).contains(&(self, Life::Lost))
    }

    /// The runtime's version, as numbers and with the text behind them. Initialises nothing.
    ///
    /// # Errors
    /// [`NeuronError::ForkedChild`], [`NeuronError::Call`].
    pub fn version(self) -> Result<(Version, String)> {
        if is_forked_child() {
            return Err(NeuronError::ForkedChild);
        }
        let zero = (0, 0, 0, 0, [0; 128], [0; 64]);
        let (rt_major, rt_minor, rt_patch, rt_maintenance, rt_detail, git_hash) = zero;
        let mut v = sys::Version { rt_major, rt_minor, rt_patch, rt_maintenance, rt_detail, git_hash };
        // SAFETY: legal before `nrt_init`; the pointer is to a whole `nrt_version_t` of the size that is passed beside it.
        let status = unsafe { (self.api().nrt_get_version)(&mut v, size_of::<sys::Version>()) };
        check("nrt_get_version", status)?;
        let version =
            Version { major: v.rt_major, minor: v.rt_minor, patch: v.rt_patch, maintenance: v.rt_maintenance };
        Ok((version, lossy(&v.rt_detail)))
    }

    /// Logical cores of the instance, and those that this process may use. Initialises and reserves nothing.
    ///
    /// # Errors
    /// [`NeuronError::ForkedChild`], [`NeuronError::Call`].
    pub fn core_counts(self) -> Result<(u32, u32)> {
        if is_forked_child() {
            return Err(NeuronError::ForkedChild);
        }
        let (mut total, mut visible) = (0, 0);
        // SAFETY: legal before `nrt_init` by the header; the pointer is to a u32 of our own.
        let status = unsafe { (self.api().nrt_get_total_nc_count)(&mut total) };
        check("nrt_get_total_nc_count", status)?;
        // SAFETY: as above.
        let status = unsafe { (self.api().nrt_get_visible_nc_count)(&mut visible) };
        check("nrt_get_visible_nc_count", status)?;
        Ok((total, visible))
    }
}

/// How to take the device.
#[derive(Debug, Clone, Copy, Default)]
pub struct RuntimeOptions {
    /// Take it although another copy of libnrt is initialised in this process. Two copies of the true library fight over the
    /// cores; this is for tests with several emulated ones.
    pub beside_other_libraries: bool,
    /// Called when a drop had something to report: the function and its answer. A panic in it is caught.
    pub on_drop_failure: Option<fn(&'static str, Status)>,
}

/// Bytes moved between host and device, and models run, since [`Runtime::init`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Bytes written to tensors.
    pub to_device: u64,
    /// Bytes read from tensors.
    pub from_device: u64,
    /// Successful executions.
    pub calls: u64,
}

/// Device memory of one core.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Bytes in use.
    pub used: u64,
    /// Bytes there are.
    pub limit: u64,
}

/// The instance the process runs on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// Family number (5: Trn2, 14: Trn3...).
    pub family: u32,
    /// Size number.
    pub size: u32,
    /// Architecture, empty before SDK 2.28.
    pub architecture: String,
}

/// The process's Neuron runtime: holds the cores until it and everything made from it are dropped. Clones are the same runtime.
#[derive(Clone, Debug)]
pub struct Runtime {
    pub(super) inner: Arc<Inner>,
}

/// One initialised library.
#[derive(Debug)]
pub(super) struct Inner {
    library: Library,
    pub(super) version: Version,
    cores: u32,
    pid: u32,
    options: RuntimeOptions,
    /// The status that lost the device, or 0.
    poison: AtomicU32,
    /// Whether any execution failed so far: only then are storages asked what they hold.
    failed_before: AtomicBool,
    manage: Mutex<()>,
    to_device: AtomicU64,
    from_device: AtomicU64,
    calls: AtomicU64,
}

impl Inner {
    fn api(&self) -> &'static Api {
        self.library.api()
    }

    /// Asks that the library may be called at all.
    pub(super) fn enter(&self) -> Result<()> {
        if process::id() != self.pid {
            return Err(NeuronError::ForkedChild);
        }
        match self.poison.load(Ordering::Acquire) {
            0 => Ok(()),
            status => Err(NeuronError::Poisoned { status: Status(status) }),
        }
    }

    /// As [`check`], and remembers a status that loses the device.
    fn check(&self, op: &'static str, status: u32) -> Result<()> {
        if Status(status).class() == StatusClass::Poison {
            self.poison.store(status, Ordering::Release);
            becomes(&mut lock(&OWNERS), self.library, Life::Lost);
        }
        check(op, status)
    }

    /// For drops, which have nobody to answer to.
    fn report(&self, op: &'static str, status: u32) {
        if let (Err(_), Some(hook)) = (self.check(op, status), self.options.on_drop_failure) {
            // A panic in a drop may abort: the hook's panic has been shown, and ends here.
            let _shown = catch_unwind(AssertUnwindSafe(|| hook(op, Status(status))));
        }
    }

    fn core(&self, core: u32) -> Result<i32> {
        let outside = NeuronError::NoSuchCore { core, visible: self.cores };
        if core >= self.cores { Err(outside) } else { i32::try_from(core).map_err(|_| outside) }
    }

    /// A pointer that the library gave with success must not be null.
    fn given<T>(op: &'static str, pointer: *mut T) -> Result<NonNull<T>> {
        NonNull::new(pointer).ok_or_else(|| NeuronError::Answer { op, problem: "the handle is null".into() })
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.enter().is_err() {
            return; // forked, or lost: never closed
        }
        let mut owners = lock(&OWNERS);
        // SAFETY: initialised by the `init` that made this value, closed here only. Every handle holds an `Arc` of this value, so
        // none is left; nothing else can call the library now, as `Runtime::init` waits for `OWNERS`.
        unsafe { (self.api().nrt_close)() };
        becomes(&mut owners, self.library, Life::Closed);
    }
}

impl Runtime {
    /// Initialises the library and reserves the cores that the environment names (`NEURON_RT_VISIBLE_CORES`; by default **every
    /// core of the instance**) for this process, until the last holder is dropped. Takes seconds. Start threads and do not fork
    /// after it.
    ///
    /// # Errors
    /// [`NeuronError::AlreadyInitialized`], [`NeuronError::AnotherLibrary`], [`NeuronError::ForkedChild`],
    /// [`NeuronError::AsyncExecution`] before anything is called; [`NeuronError::ProcessMustRestart`] when the library was
    /// closed in this process before and does not come back; [`NeuronError::Call`]. After an error of `nrt_init` the library
    /// is as before, and may be tried again.
    pub fn init(library: &Library, options: &RuntimeOptions) -> Result<Runtime> {
        if is_forked_child() {
            return Err(NeuronError::ForkedChild);
        }
        if let Some(value) = asynchronous(std::env::var_os(ASYNC_VARIABLE).as_deref()) {
            return Err(NeuronError::AsyncExecution { value });
        }
        let mut owners = lock(&OWNERS);
        let before = owners.iter().find(|(l, _)| l == library).map(|(_, life)| *life);
        match before {
            Some(Life::Live) => return Err(NeuronError::AlreadyInitialized),
            Some(Life::Lost) => return Err(NeuronError::ProcessMustRestart),
            Some(Life::Closed) | None => {}
        }
        if let Some((other, _)) = owners.iter().find(|(_, life)| *life != Life::Closed)
            && !options.beside_other_libraries
        {
            return Err(NeuronError::AnotherLibrary { path: other.path().into() });
        }
        let (version, _) = library.version()?;
        // SAFETY: no runtime of this library is live, and none can come to be while `owners` is locked; both strings end with a
        // NUL and live for ever.
        let status = unsafe { (library.api().nrt_init)(sys::FRAMEWORK_NONE, c"".as_ptr(), c"".as_ptr()) };
        if before.is_some() && Status(status) == Status::CLOSED {
            return Err(NeuronError::ProcessMustRestart);
        }
        check("nrt_init", status)?;
        OWNER_PID.store(process::id(), Ordering::Release);
        owners.retain(|(l, _)| l != library);
        owners.push((*library, Life::Live));
        drop(owners); // `inner` may be dropped below, and its drop locks
        let mut inner = Inner {
            library: *library,
            version,
            cores: 0,
            pid: process::id(),
            options: *options,
            poison: AtomicU32::new(0),
            failed_before: AtomicBool::new(false),
            manage: Mutex::new(()),
            to_device: AtomicU64::new(0),
            from_device: AtomicU64::new(0),
            calls: AtomicU64::new(0),
        };
        inner.cores = library.core_counts()?.1;
        Ok(Runtime { inner: Arc::new(inner) })
    }

    /// Closes the device now, if this is the last holder, and lets its cores go.
    ///
    /// # Errors
    /// [`NeuronError::InUse`] if models, tensors, sets or clones are left (the last of them closes it);
    /// [`NeuronError::ForkedChild`] and [`NeuronError::Poisoned`] if it cannot be closed at all.
    pub fn close(self) -> Result<()> {
        self.inner.enter()?;
        // Of several holders that do this at once, exactly one gets the value.
        Arc::into_inner(self.inner).map(drop).ok_or(NeuronError::InUse)
    }

    /// The library.
    pub fn library(&self) -> Library {
        self.inner.library
    }

    /// The runtime's version.
    pub fn version(&self) -> Version {
        self.inner.version
    }

    /// Logical cores of this process, numbered from 0 whatever their numbers on the instance.
    pub fn cores(&self) -> u32 {
        self.inner.cores
    }

    pub(super) fn check_core(&self, core: u32) -> Result<()> {
        self.inner.core(core).map(|_| ())
    }

    /// Asks that the library may still be called: that this is the process that initialised it and the device is not lost.
    ///
    /// # Errors
    /// [`NeuronError::ForkedChild`], [`NeuronError::Poisoned`].
    pub fn usable(&self) -> Result<()> {
        self.inner.enter()
    }

    /// What has been moved and run so far.
    pub fn traffic(&self) -> Traffic {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Inner { to_device, from_device, calls, .. } = &*self.inner;
        Traffic { to_device: of(to_device), from_device: of(from_device), calls: of(calls) }
    }

    /// The instance, if the library tells (not before SDK 2.23 or so).
    ///
    /// # Errors
    /// [`NeuronError::Call`] and what [`Runtime::usable`] says.
    pub fn instance(&self) -> Result<Option<Instance>> {
        self.inner.enter()?;
        let op = "nrt_get_instance_info";
        let Some(call) = self.inner.api().nrt_get_instance_info else { return Ok(None) };
        let mut info = sys::InstanceInfo::default();
        // SAFETY: the pointer is to a whole `nrt_instance_info_t` of the size that is passed beside it.
        let mut status = unsafe { call(&mut info, size_of::<sys::InstanceInfo>()) };
        if Status(status) == Status::INVALID {
            // SAFETY: a library that knows the first 8 bytes only writes only those, as the size says.
            status = unsafe { call(&mut info, sys::INSTANCE_INFO_SHORT) };
        }
        self.inner.check(op, status)?;
        Ok(Some(Instance { family: info.family, size: info.size, architecture: lossy(&info.arch_name) }))
    }

    /// Device memory of a core, if the library tells (from 2.27.23).
    ///
    /// # Errors
    /// [`NeuronError::NoSuchCore`], [`NeuronError::Call`] and what [`Runtime::usable`] says.
    pub fn memory(&self, core: u32) -> Result<Option<DeviceMemory>> {
        self.inner.enter()?;
        self.inner.core(core)?;
        let Some(call) = self.inner.api().nrt_get_vnc_memory_stats else { return Ok(None) };
        let (mut stats, mut written) = (sys::MemoryStats::default(), 0);
        // SAFETY: the pointers are to a whole `nrt_vnc_memory_stats_t` of the size that is passed, and to a size of our own.
        let status = unsafe { call(core, &mut stats, size_of::<sys::MemoryStats>(), &mut written) };
        self.inner.check("nrt_get_vnc_memory_stats", status)?;
        let whole = written >= size_of::<sys::MemoryStats>();
        Ok(whole.then_some(DeviceMemory { used: stats.bytes_used as u64, limit: stats.bytes_limit as u64 }))
    }
}

/// The value of the variable that makes execution asynchronous, if it does.
fn asynchronous(value: Option<&std::ffi::OsStr>) -> Option<String> {
    let value = value?.to_string_lossy().into_owned();
    (!matches!(value.trim(), "" | "0")).then_some(value)
}
