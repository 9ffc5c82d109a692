//! Start, end, versions and counts.

use crate::abi::{status, version};
use crate::caller::{copy_out, name, put};
use crate::calls::{Outcome, refuse, violate};
use crate::entry::{Inject, Needs, call, own, status_of, world};
use crate::settings::flag;
use crate::world::State;
use std::ffi::{c_char, c_void};

/// `NRT_STATUS nrt_init(nrt_framework_type_t, const char *fw_version, const char *fal_version)`
///
/// # Safety
/// The strings are null or NUL-terminated.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nrt_init(framework: u32, fw_version: *const c_char, fal_version: *const c_char) -> u32 {
    status_of("nrt_init", Needs::Nothing, Inject::Instead, |_| {
        for (string, what) in [(fw_version, "fw_version"), (fal_version, "fal_version")] {
            // SAFETY: null or NUL-terminated by this function's contract.
            unsafe { name(string, what) }?;
        }
        if framework > 5 {
            return violate(status::INVALID, format!("framework {framework} is not known"));
        }
        let mut world = world();
        match world.state {
            State::Open => {
                world.calls.violation("nrt_init", "called while initialised; it changes nothing");
                return Ok(());
            }
            State::Closed if world.settings.has(flag::REINIT_AFTER_CLOSE_FAILS) => {
                return refuse(status::CLOSED, "closed for good: this runtime does not start twice in a process");
            }
            State::Closed | State::Fresh => {}
        }
        if world.settings.visible == 0 {
            return refuse(status::FAILURE, "NeuronCore(s) not available - Available:0");
        }
        world.state = State::Open;
        own(true);
        Ok(())
    })
}

/// `void nrt_close()`
#[unsafe(no_mangle)]
pub(crate) extern "C" fn nrt_close() {
    // The header's function has no result to give, so there is nothing to do with the status.
    let _ = status_of("nrt_close", Needs::Open, Inject::Told, |injected| {
        let mut world = world();
        let leftovers = world.leftovers();
        if !leftovers.is_empty() {
            world.calls.violation("nrt_close", &format!("called with {leftovers} alive"));
            if world.settings.double_frees_failed_models() && world.models.values().any(|m| m.failed) {
                world
                    .calls
                    .violation("nrt_close", "a failed model was not unloaded: before 2.31.24 this is a double free");
            }
        }
        world.clear();
        world.state = State::Closed;
        own(false);
        injected.map_or(Ok(()), |status| refuse(status, "injected"))
    });
}

/// `NRT_STATUS nrt_get_version(nrt_version_t *ver, size_t size)`
///
/// # Safety
/// `ver` is null or valid for writing `size` bytes.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nrt_get_version(ver: *mut c_void, size: usize) -> u32 {
    status_of("nrt_get_version", Needs::Nothing, Inject::Instead, |_| {
        if size == 0 {
            return violate(status::INVALID, "size is 0");
        }
        let mut bytes = [0u8; version::BYTES];
        {
            let settings = &world().settings;
            for (i, number) in settings.version.iter().enumerate() {
                bytes[i * 8..i * 8 + 8].copy_from_slice(&number.to_ne_bytes());
            }
            if settings.has(flag::VERSION_UNTERMINATED) {
                bytes[version::DETAIL].fill(b'd');
                bytes[version::GIT_HASH].fill(b'g');
            } else {
                let detail = b"emulated: no NeuronCore here";
                bytes[version::DETAIL][..detail.len()].copy_from_slice(detail);
            }
        }
        // SAFETY: `ver` is null or valid for `size` bytes by this function's contract; no more are written.
        unsafe { copy_out(&bytes[..size.min(version::BYTES)], ver, "ver") }
    })
}

/// What all four counting functions do.
///
/// # Safety
/// `count` is null or valid for writing a u32.
unsafe fn count_cores(function: &'static str, visible: bool, count: *mut u32) -> u32 {
    status_of(function, Needs::Nothing, Inject::Instead, |_| {
        let cores = {
            let settings = &world().settings;
            if visible { settings.visible } else { settings.total }
        };
        // SAFETY: null or valid for a write by this function's contract.
        unsafe { put(count, cores, "the count's place") }
    })
}

/// `NRT_STATUS nrt_get_total_nc_count(uint32_t *nc_count)`
///
/// # Safety
/// `count` is null or valid for writing a u32.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nrt_get_total_nc_count(count: *mut u32) -> u32 {
    // SAFETY: same contract.
    unsafe { count_cores("nrt_get_total_nc_count", false, count) }
}

/// `NRT_STATUS nrt_get_visible_nc_count(uint32_t *nc_count)`
///
/// # Safety
/// `count` is null or valid for writing a u32.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nrt_get_visible_nc_count(count: *mut u32) -> u32 {
    // SAFETY: same contract.
    unsafe { count_cores("nrt_get_visible_nc_count", true, count) }
}

/// `NRT_STATUS nrt_get_total_vnc_count(uint32_t *vnc_count)`
///
/// # Safety
/// `count` is null or valid for writing a u32.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nrt_get_total_vnc_count(count: *mut u32) -> u32 {
    // SAFETY: same contract.
    unsafe { count_cores("nrt_get_total_vnc_count", false, count) }
}

/// `NRT_STATUS nrt_get_visible_vnc_count(uint32_t *vnc_count)`
///
/// # Safety
/// `count` is null or valid for writing a u32.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nrt_get_visible_vnc_count(count: *mut u32) -> u32 {
    // SAFETY: same contract.
    unsafe { count_cores("nrt_get_visible_vnc_count", true, count) }
}

/// A call that returns nothing: the refusal is noted, nobody gets it.
pub(crate) fn silent(function: &'static str, body: impl FnOnce() -> Outcome<()>) {
    let _ = call(function, Needs::Open, Inject::Told, |_| body());
}
