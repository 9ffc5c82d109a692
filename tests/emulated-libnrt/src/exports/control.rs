//! Control calls: what a test sets and asks. They never fail and take no part in the log.

use super::{OPTIONAL, REQUIRED};
use crate::abi::status;
use crate::caller::{copy_out, name};
use crate::entry::{admit, child_calls, own};
use crate::world::World;
use std::ffi::{c_char, c_void};

/// Version of the control calls.
const ABI_VERSION: u32 = 1;

/// Does something to the world; a forked child has none.
fn with<T>(forked: T, body: impl FnOnce(&mut World) -> T) -> T {
    admit().map_or(forked, |mut world| body(&mut world))
}

/// Copies text to the caller, NUL-terminated and cut to fit; returns its whole length.
///
/// # Safety
/// `buffer` is null or valid for writing `len` bytes.
unsafe fn give(text: &str, buffer: *mut c_char, len: usize) -> usize {
    if let (false, Some(room)) = (buffer.is_null(), len.checked_sub(1)) {
        let mut bytes = text.as_bytes()[..text.len().min(room)].to_vec();
        bytes.push(0);
        // SAFETY: at most `len` bytes, for which `buffer` is valid by this function's contract. It is not null, so no refusal.
        let _ = unsafe { copy_out(&bytes, buffer.cast::<c_void>(), "buffer") };
    }
    text.len()
}

/// `uint32_t emunrt_abi_version(void)`: 1.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn emunrt_abi_version() -> u32 {
    ABI_VERSION
}

/// `void emunrt_reset(void)`: everything as after loading, settings from the environment; old handles stay stale.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn emunrt_reset() {
    with((), |world| {
        world.reset();
        own(false);
    });
}

/// `void emunrt_set_version(uint64_t major, uint64_t minor, uint64_t patch, uint64_t maintenance)`
#[unsafe(no_mangle)]
pub(crate) extern "C" fn emunrt_set_version(major: u64, minor: u64, patch: u64, maintenance: u64) {
    with((), |world| world.settings.version = [major, minor, patch, maintenance]);
}

/// `void emunrt_set_cores(uint32_t total, uint32_t visible)`
#[unsafe(no_mangle)]
pub(crate) extern "C" fn emunrt_set_cores(total: u32, visible: u32) {
    with((), |world| (world.settings.total, world.settings.visible) = (total, visible));
}

/// `void emunrt_set_flags(uint32_t flags)`: all of them at once.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn emunrt_set_flags(flags: u32) {
    with((), |world| world.settings.flags = flags);
}

/// `void emunrt_set_chip(uint32_t generation)`: 2 or 3 refuses programs for other chips, 0 takes all.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn emunrt_set_chip(generation: u32) {
    with((), |world| world.settings.chip = generation);
}

/// `void emunrt_set_memory(uint64_t bytes)`: device memory of each core.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn emunrt_set_memory(bytes: u64) {
    with((), |world| world.settings.memory = bytes);
}

/// `void emunrt_set_delay_ms(uint64_t milliseconds)`: of each execution under SLOW_EXEC.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn emunrt_set_delay_ms(milliseconds: u64) {
    with((), |world| world.settings.delay = milliseconds);
}

/// The library's own spelling of a function's name.
///
/// # Safety
/// `function` is null or NUL-terminated.
unsafe fn known(function: *const c_char) -> Option<&'static str> {
    // SAFETY: same contract.
    let function = unsafe { name(function, "function") }.ok()?;
    REQUIRED.into_iter().chain(OPTIONAL).find(|n| n.as_bytes() == function)
}

/// `uint32_t emunrt_inject(const char *function, uint32_t status, uint32_t skip, uint32_t times)`: after `skip` more calls,
/// the next `times` (UINT32_MAX: all) give `status`; 0 times takes orders back. Gives 2 for an unknown function.
///
/// # Safety
/// `function` is null or NUL-terminated.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn emunrt_inject(function: *const c_char, status: u32, skip: u32, times: u32) -> u32 {
    // SAFETY: same contract.
    let Some(function) = (unsafe { known(function) }) else { return status::INVALID };
    with(status::FAILURE, |world| {
        world.calls.inject(function, status, skip, times);
        status::SUCCESS
    })
}

/// `uint64_t emunrt_live(uint32_t kind)`: 1 models, 2 tensors, 3 sets, 4 tensor info arrays, 5 executions under
/// way, 0 all.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn emunrt_live(kind: u32) -> u64 {
    with(0, |world| {
        let counts =
            [world.models.len(), world.tensors.len(), world.sets.len(), world.arrays.live(), world.flights.len()];
        let wanted = |i: &usize| kind == 0 || kind as usize == i + 1;
        (0..counts.len()).filter(wanted).map(|i| counts[i] as u64).sum()
    })
}

/// `uint64_t emunrt_calls(const char *function)`: calls of a function since the last reset.
///
/// # Safety
/// `function` is null or NUL-terminated.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn emunrt_calls(function: *const c_char) -> u64 {
    // SAFETY: same contract.
    let Some(function) = (unsafe { known(function) }) else { return 0 };
    with(0, |world| world.calls.count(function))
}

/// `uint64_t emunrt_violation_count(void)`: in a forked child, its own calls.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn emunrt_violation_count() -> u64 {
    with(child_calls(), |world| world.calls.violations.len() as u64)
}

/// `size_t emunrt_violation_text(uint64_t i, char *buffer, size_t len)`: as `snprintf`; 0 if there is no such violation.
///
/// # Safety
/// `buffer` is null or valid for writing `len` bytes.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn emunrt_violation_text(i: u64, buffer: *mut c_char, len: usize) -> usize {
    let text = with(String::new(), |world| {
        let found = usize::try_from(i).ok().and_then(|i| world.calls.violations.get(i));
        found.cloned().unwrap_or_default()
    });
    // SAFETY: same contract.
    unsafe { give(&text, buffer, len) }
}

/// `size_t emunrt_call_log(char *buffer, size_t len)`: a line `function status` for each call; as `snprintf`.
///
/// # Safety
/// `buffer` is null or valid for writing `len` bytes.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn emunrt_call_log(buffer: *mut c_char, len: usize) -> usize {
    let text = with(String::new(), |world| world.calls.text());
    // SAFETY: same contract.
    unsafe { give(&text, buffer, len) }
}

/// `size_t emunrt_last_reason(char *buffer, size_t len)`: why the last refused call was refused; as `snprintf`.
///
/// # Safety
/// `buffer` is null or valid for writing `len` bytes.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn emunrt_last_reason(buffer: *mut c_char, len: usize) -> usize {
    let text = with(String::new(), |world| world.calls.last_reason.clone());
    // SAFETY: same contract.
    unsafe { give(&text, buffer, len) }
}

/// `size_t emunrt_symbols(char *buffer, size_t len)`: a line `required NAME` or `optional NAME` for each function of the
/// runtime that is exported; as `snprintf`.
///
/// # Safety
/// `buffer` is null or valid for writing `len` bytes.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn emunrt_symbols(buffer: *mut c_char, len: usize) -> usize {
    let lines = |word: &'static str, names: &'static [&'static str]| names.iter().map(move |n| format!("{word} {n}\n"));
    let text: String = lines("required", &REQUIRED).chain(lines("optional", &OPTIONAL)).collect();
    // SAFETY: same contract.
    unsafe { give(&text, buffer, len) }
}
