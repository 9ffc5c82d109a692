//! Tensor sets.

use super::lifecycle::silent;
use crate::abi::status;
use crate::caller::{get, name, put};
use crate::calls::{refuse, violate};
use crate::entry::{Inject, Needs, status_of, world};
use crate::handle::Kind;
use crate::world::Set;
use std::ffi::{c_char, c_void};

/// `NRT_STATUS nrt_allocate_tensor_set(nrt_tensor_set_t **result)`
///
/// # Safety
/// `result` is null or valid for a write.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nrt_allocate_tensor_set(result: *mut *mut c_void) -> u32 {
    status_of("nrt_allocate_tensor_set", Needs::Open, Inject::Instead, |_| {
        let mut world = world();
        let handle = world.handle(Kind::Set)?;
        // SAFETY: null or valid for a write by this function's contract.
        unsafe { put(result, handle.pointer(), "result") }?;
        world.sets.insert(handle, Set::new());
        Ok(())
    })
}

/// `void nrt_destroy_tensor_set(nrt_tensor_set_t **tensor_set)`
///
/// # Safety
/// `tensor_set` is null or valid for a read and a write.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nrt_destroy_tensor_set(tensor_set: *mut *mut c_void) {
    silent("nrt_destroy_tensor_set", || {
        // SAFETY: null or valid for a read by this function's contract.
        let set = unsafe { get(tensor_set, "tensor_set") }?;
        let mut world = world();
        let handle = world.set(set)?.0;
        world.must_rest("nrt_destroy_tensor_set", handle, "the set is destroyed");
        world.sets.remove(&handle);
        // SAFETY: null or valid for a write by this function's contract.
        unsafe { put(tensor_set, std::ptr::null_mut(), "tensor_set") }
    });
}

/// `NRT_STATUS nrt_add_tensor_to_tensor_set(nrt_tensor_set_t *, const char *tensor_name, nrt_tensor_t *tensor)`
///
/// # Safety
/// `tensor_name` is null or NUL-terminated.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nrt_add_tensor_to_tensor_set(
    tensor_set: *mut c_void,
    tensor_name: *const c_char,
    tensor: *mut c_void,
) -> u32 {
    status_of("nrt_add_tensor_to_tensor_set", Needs::Open, Inject::Instead, |_| {
        // SAFETY: null or NUL-terminated by this function's contract.
        let name = unsafe { name(tensor_name, "tensor_name") }?;
        if name.is_empty() {
            return violate(status::INVALID, "tensor_name is empty");
        }
        let mut world = world();
        let tensor = world.tensor(tensor)?.0;
        let handle = world.set(tensor_set)?.0;
        world.must_rest("nrt_add_tensor_to_tensor_set", handle, "the set is changed");
        world.set(tensor_set)?.1.insert(name, tensor);
        Ok(())
    })
}

/// `NRT_STATUS nrt_get_tensor_from_tensor_set(nrt_tensor_set_t *, const char *tensor_name, nrt_tensor_t **tensor)`
///
/// # Safety
/// `tensor_name` is null or NUL-terminated; `tensor` is null or valid for a write.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nrt_get_tensor_from_tensor_set(
    tensor_set: *mut c_void,
    tensor_name: *const c_char,
    tensor: *mut *mut c_void,
) -> u32 {
    status_of("nrt_get_tensor_from_tensor_set", Needs::Open, Inject::Instead, |_| {
        // SAFETY: null or NUL-terminated by this function's contract.
        let name = unsafe { name(tensor_name, "tensor_name") }?;
        let Some(member) = world().set(tensor_set)?.1.get(&name).copied() else {
            return refuse(status::FAILURE, format!("no tensor {:?} in the set", String::from_utf8_lossy(&name)));
        };
        // SAFETY: null or valid for a write by this function's contract.
        unsafe { put(tensor, member.pointer(), "tensor") }
    })
}
