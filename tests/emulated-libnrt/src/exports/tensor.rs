//! Tensors.

use super::lifecycle::silent;
use crate::abi::status;
use crate::caller::{bytes, copy_out, get, name, put};
use crate::calls::{Outcome, refuse, violate};
use crate::entry::{Inject, Needs, call, status_of, world};
use crate::handle::Kind;
use crate::storage::{Span, Storage};
use crate::world::Tensor;
use std::ffi::{c_char, c_void};

/// Placements: device memory, host memory (deprecated), host memory of the caller (gone since 2.32.31).
const DEVICE: u32 = 0;
const HOST: u32 = 1;
/// Host tensors must be smaller.
const HOST_LIMIT: usize = 4 << 20;

/// `NRT_STATUS nrt_tensor_allocate(nrt_tensor_placement_t, int vnc, size_t size, const char *name, nrt_tensor_t **tensor)`
///
/// # Safety
/// `tensor_name` is null or NUL-terminated; `tensor` is null or valid for a write.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nrt_tensor_allocate(
    placement: u32,
    vnc: i32,
    size: usize,
    tensor_name: *const c_char,
    tensor: *mut *mut c_void,
) -> u32 {
    status_of("nrt_tensor_allocate", Needs::Open, Inject::Instead, |_| {
        if tensor.is_null() {
            return violate(status::INVALID, "tensor is null");
        }
        // SAFETY: null or NUL-terminated by this function's contract.
        let name = unsafe { optional_name(tensor_name) }?;
        match placement {
            DEVICE => {}
            HOST if size < HOST_LIMIT => {}
            HOST => return refuse(status::INVALID, format!("{size} bytes in host memory, the limit is {HOST_LIMIT}")),
            other => return refuse(status::INVALID, format!("placement {other} is not served")),
        }
        if size == 0 {
            return violate(status::INVALID, "a tensor without bytes");
        }
        let mut world = world();
        let core = world.core(vnc)?;
        // Before 2.30.50 the size went through 32 bits.
        let size = if world.settings.truncates_sizes() { size & 0xFFFF_FFFF } else { size };
        let (id, meter, limit) = (world.next(), world.meter(core), world.settings.memory);
        let Some(storage) = Storage::new(id, size, &meter, limit) else {
            return refuse(status::RESOURCE, format!("{size} bytes on core {core}, which has {limit}"));
        };
        let handle = world.handle(Kind::Tensor)?;
        // SAFETY: null or valid for a write by this function's contract.
        unsafe { put(tensor, handle.pointer(), "tensor") }?;
        world.tensors.insert(handle, Tensor { span: Span { storage, offset: 0, size }, core, name });
        Ok(())
    })
}

/// A tensor's own name, which may be missing.
///
/// # Safety
/// `from` is null or NUL-terminated.
unsafe fn optional_name(from: *const c_char) -> Outcome<String> {
    if from.is_null() {
        return Ok(String::new());
    }
    // SAFETY: not null, so NUL-terminated by this function's contract.
    let name = unsafe { name(from, "name") }?;
    Ok(String::from_utf8_lossy(&name).into_owned())
}

/// `NRT_STATUS nrt_tensor_allocate_slice(const nrt_tensor_t *, size_t offset, size_t size, const char *name, nrt_tensor_t **)`
///
/// # Safety
/// `tensor_name` is null or NUL-terminated; `slice` is null or valid for a write.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nrt_tensor_allocate_slice(
    source: *const c_void,
    offset: usize,
    size: usize,
    tensor_name: *const c_char,
    slice: *mut *mut c_void,
) -> u32 {
    status_of("nrt_tensor_allocate_slice", Needs::Open, Inject::Instead, |_| {
        if slice.is_null() {
            return violate(status::INVALID, "tensor_slice is null");
        }
        // SAFETY: null or NUL-terminated by this function's contract.
        let name = unsafe { optional_name(tensor_name) }?;
        if size == 0 {
            return violate(status::INVALID, "a slice without bytes");
        }
        let mut world = world();
        let (_, source) = world.tensor(source)?;
        let (span, core) = (part(source, offset as u64, size as u64)?, source.core);
        let handle = world.handle(Kind::Tensor)?;
        // SAFETY: null or valid for a write by this function's contract.
        unsafe { put(slice, handle.pointer(), "tensor_slice") }?;
        world.tensors.insert(handle, Tensor { span, core, name });
        Ok(())
    })
}

/// Bytes of a tensor, if it has them.
fn part(tensor: &Tensor, offset: u64, size: u64) -> Outcome<Span> {
    match tensor.span.part(offset, size) {
        Some(span) => Ok(span),
        None => {
            let (name, has) = (&tensor.name, tensor.span.size);
            refuse(status::INVALID, format!("{size} bytes at {offset} of tensor {name:?}, which has {has}"))
        }
    }
}

/// Bytes of a tensor, by pointer.
pub(super) fn span(tensor: *const c_void, offset: u64, size: u64) -> Outcome<Span> {
    part(world().tensor(tensor)?.1, offset, size)
}

/// `void nrt_tensor_free(nrt_tensor_t **tensor)`
///
/// # Safety
/// `tensor` is null or valid for a read and a write.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nrt_tensor_free(tensor: *mut *mut c_void) {
    silent("nrt_tensor_free", || {
        // SAFETY: null or valid for a read by this function's contract.
        let pointer = unsafe { get(tensor, "tensor") }?;
        let mut world = world();
        let handle = world.tensor(pointer)?.0;
        world.must_rest("nrt_tensor_free", handle, "the tensor is freed");
        if world.sets.values().any(|s| s.values().any(|&member| member == handle)) {
            world.calls.violation("nrt_tensor_free", "the tensor is freed before a set that holds it");
        }
        world.tensors.remove(&handle);
        // SAFETY: null or valid for a write by this function's contract.
        unsafe { put(tensor, std::ptr::null_mut(), "tensor") }
    });
}

/// Copies from a tensor to the caller.
///
/// # Safety
/// `buffer` is null or valid for writing `size` bytes.
pub(super) unsafe fn read(tensor: *const c_void, buffer: *mut c_void, offset: u64, size: u64) -> Outcome<()> {
    let span = span(tensor, offset, size)?;
    let device = span.storage.read();
    // SAFETY: the range has `size` bytes, for which `buffer` is valid or null; device memory is this library's alone.
    unsafe { copy_out(&device[span.range()], buffer, "buf") }
}

/// Copies from the caller to a tensor.
///
/// # Safety
/// `buffer` is null or valid for reading `size` bytes, which nobody changes during the call.
pub(super) unsafe fn write(tensor: *const c_void, buffer: *const c_void, offset: u64, size: u64) -> Outcome<()> {
    let span = span(tensor, offset, size)?;
    // SAFETY: `size` is the span's, so it fits usize; null or readable by this function's contract.
    let host = unsafe { bytes(buffer, span.size, "buf") }?;
    span.storage.write()[span.range()].copy_from_slice(host);
    Ok(())
}

/// `NRT_STATUS nrt_tensor_read(const nrt_tensor_t *tensor, void *buf, size_t offset, size_t size)`
///
/// # Safety
/// `buffer` is null or valid for writing `size` bytes.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nrt_tensor_read(
    tensor: *const c_void,
    buffer: *mut c_void,
    offset: usize,
    size: usize,
) -> u32 {
    status_of("nrt_tensor_read", Needs::Open, Inject::Instead, |_| {
        // SAFETY: same contract.
        unsafe { read(tensor, buffer, offset as u64, size as u64) }
    })
}

/// `NRT_STATUS nrt_tensor_write(nrt_tensor_t *tensor, const void *buf, size_t offset, size_t size)`
///
/// # Safety
/// `buffer` is null or valid for reading `size` bytes, which nobody changes during the call.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nrt_tensor_write(
    tensor: *mut c_void,
    buffer: *const c_void,
    offset: usize,
    size: usize,
) -> u32 {
    status_of("nrt_tensor_write", Needs::Open, Inject::Instead, |_| {
        // SAFETY: same contract.
        unsafe { write(tensor, buffer, offset as u64, size as u64) }
    })
}

/// `NRT_STATUS nrt_tensor_copy(const nrt_tensor_t *src, size_t, nrt_tensor_t *dst, size_t, size_t size)`
#[unsafe(no_mangle)]
pub(crate) extern "C" fn nrt_tensor_copy(
    source: *const c_void,
    source_offset: usize,
    destination: *mut c_void,
    destination_offset: usize,
    size: usize,
) -> u32 {
    status_of("nrt_tensor_copy", Needs::Open, Inject::Instead, |_| {
        let (from, to) = {
            let mut world = world();
            let (from, from_core) = {
                let (_, tensor) = world.tensor(source)?;
                (part(tensor, source_offset as u64, size as u64)?, tensor.core)
            };
            let (_, tensor) = world.tensor(destination)?;
            if from_core != tensor.core {
                return refuse(status::INVALID, format!("a copy from core {from_core} to core {}", tensor.core));
            }
            (from, part(tensor, destination_offset as u64, size as u64)?)
        };
        from.copy_to(&to);
        Ok(())
    })
}

/// `NRT_STATUS nrt_tensor_memset(nrt_tensor_t *tensor, uint64_t offset, int value, size_t size)`
#[unsafe(no_mangle)]
pub(crate) extern "C" fn nrt_tensor_memset(tensor: *mut c_void, offset: u64, value: i32, size: usize) -> u32 {
    status_of("nrt_tensor_memset", Needs::Open, Inject::Instead, |_| {
        let span = span(tensor, offset, size as u64)?;
        // As C's memset: the value as an unsigned char.
        span.storage.write()[span.range()].fill(value as u8);
        Ok(())
    })
}

/// `size_t nrt_tensor_get_size(const nrt_tensor_t *tensor)`; 0 on failure.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn nrt_tensor_get_size(tensor: *const c_void) -> usize {
    call("nrt_tensor_get_size", Needs::Open, Inject::Instead, |_| Ok(world().tensor(tensor)?.1.span.size)).unwrap_or(0)
}

/// `void *nrt_tensor_get_va(const nrt_tensor_t *tensor)`; null on failure. Not to be followed: the address is not canonical.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn nrt_tensor_get_va(tensor: *const c_void) -> *mut c_void {
    let address = call("nrt_tensor_get_va", Needs::Open, Inject::Instead, |_| {
        let mut world = world();
        let span = &world.tensor(tensor)?.1.span;
        // 2^40 bytes of address space to a storage, of which there are below 2^16 in any one test.
        Ok(0x5B << 56 | (span.storage.id as usize & 0xFFFF) << 40 | span.offset)
    });
    std::ptr::without_provenance_mut(address.unwrap_or(0))
}
