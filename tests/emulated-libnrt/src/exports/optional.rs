//! Functions that not every runtime has.

use super::tensor::{read, write};
use crate::abi::{Batch, BatchOp, MEMORY_STATS_BYTES, MODEL_INFO_BYTES, instance, status, status_name};
use crate::caller::{copy_out, get, put};
use crate::calls::{Outcome, refuse, violate};
use crate::entry::{Inject, Needs, status_of, world};
use std::ffi::{c_char, c_void};
use std::sync::atomic::Ordering;

/// `const char *nrt_get_status_as_str(NRT_STATUS status)`
#[unsafe(no_mangle)]
pub(crate) extern "C" fn nrt_get_status_as_str(status: u32) -> *const c_char {
    status_name(status).as_ptr()
}

/// `NRT_STATUS nrt_get_instance_info(nrt_instance_info_t *info, size_t instance_info_len)`
///
/// # Safety
/// `info` is null or valid for writing `len` bytes.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nrt_get_instance_info(info: *mut c_void, len: usize) -> u32 {
    status_of("nrt_get_instance_info", Needs::Nothing, Inject::Instead, |_| {
        let mut bytes = [0u8; instance::BYTES];
        let known = {
            let settings = &world().settings;
            // (family, size) as numbered at SDK 2.28: TRN2 and TRN3 on 48XL; unknown otherwise.
            let (family, size, name): (u32, u32, &[u8]) = match settings.chip {
                2 => (5, 7, b"emulated-trn2"),
                3 => (14, 7, b"emulated-trn3"),
                _ => (0, 9, b"emulated"),
            };
            bytes[..4].copy_from_slice(&family.to_ne_bytes());
            bytes[4..8].copy_from_slice(&size.to_ne_bytes());
            bytes[instance::ARCH_NAME][..name.len()].copy_from_slice(name);
            bytes[instance::REVISION][..1].copy_from_slice(b"0");
            if settings.has_arch_name() { instance::BYTES } else { instance::OLD_BYTES }
        };
        if !(instance::OLD_BYTES..=known).contains(&len) {
            return refuse(status::INVALID, format!("instance_info_len is {len}, this runtime knows {known}"));
        }
        // SAFETY: null or valid for `len` bytes by this function's contract; no more are written.
        unsafe { copy_out(&bytes[..len], info, "info") }
    })
}

/// Writes a structure that grows at its end: as much as both sides know, and how much that was.
///
/// # Safety
/// `to` is null or valid for writing `size` bytes; `written` is null or valid for a write.
unsafe fn give(from: &[u8], to: *mut c_void, size: usize, written: *mut usize) -> Outcome<()> {
    let n = from.len().min(size);
    if n == 0 {
        return violate(status::INVALID, "size is 0");
    }
    // SAFETY: null or valid for `size` bytes by this function's contract; no more are written.
    unsafe { copy_out(&from[..n], to, "the structure") }?;
    // SAFETY: null or valid for a write by this function's contract.
    unsafe { put(written, n, "the written size") }
}

/// `NRT_STATUS nrt_get_model_info(const nrt_model_t *, nrt_model_info_t *info, size_t size_in, size_t *size_out)`
///
/// # Safety
/// `info` is null or valid for writing `size_in` bytes; `size_out` is null or valid for a write.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nrt_get_model_info(
    model: *const c_void,
    info: *mut c_void,
    size_in: usize,
    size_out: *mut usize,
) -> u32 {
    status_of("nrt_get_model_info", Needs::Open, Inject::Instead, |_| {
        let bytes: [u8; MODEL_INFO_BYTES] = world().model(model)?.1.core.to_ne_bytes();
        // SAFETY: same contract.
        unsafe { give(&bytes, info, size_in, size_out) }
    })
}

/// `NRT_STATUS nrt_get_vnc_memory_stats(uint32_t vnc, nrt_vnc_memory_stats_t *, size_t size_in, size_t *size_out)`
///
/// # Safety
/// `stats` is null or valid for writing `size_in` bytes; `size_out` is null or valid for a write.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nrt_get_vnc_memory_stats(
    vnc: u32,
    stats: *mut c_void,
    size_in: usize,
    size_out: *mut usize,
) -> u32 {
    status_of("nrt_get_vnc_memory_stats", Needs::Open, Inject::Instead, |_| {
        let mut bytes = [0u8; MEMORY_STATS_BYTES];
        {
            let mut world = world();
            let core = world.core(i32::try_from(vnc).unwrap_or(-1))?;
            let used = world.meter(core).load(Ordering::Relaxed);
            bytes[..8].copy_from_slice(&used.to_ne_bytes());
            bytes[8..].copy_from_slice(&world.settings.memory.to_ne_bytes());
        }
        // SAFETY: same contract.
        unsafe { give(&bytes, stats, size_in, size_out) }
    })
}

/// What both counts of a model are: one.
///
/// # Safety
/// `count` is null or valid for a write.
unsafe fn one(function: &'static str, model: *const c_void, count: *mut u32) -> u32 {
    status_of(function, Needs::Open, Inject::Instead, |_| {
        world().model(model)?;
        // SAFETY: null or valid for a write by this function's contract.
        unsafe { put(count, 1, "the count's place") }
    })
}

/// `NRT_STATUS nrt_get_model_nc_count(const nrt_model_t *model, uint32_t *nc_count)`
///
/// # Safety
/// `count` is null or valid for a write.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nrt_get_model_nc_count(model: *const c_void, count: *mut u32) -> u32 {
    // SAFETY: same contract.
    unsafe { one("nrt_get_model_nc_count", model, count) }
}

/// `NRT_STATUS nrt_get_model_instance_count(nrt_model_t *model, uint32_t *instance_count)`
///
/// # Safety
/// `count` is null or valid for a write.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nrt_get_model_instance_count(model: *mut c_void, count: *mut u32) -> u32 {
    // SAFETY: same contract.
    unsafe { one("nrt_get_model_instance_count", model, count) }
}

/// Calls `each` with the tensor and operation of every entry of some batches.
///
/// # Safety
/// `batches` is null or valid for reading `n` batches, each with null or `num_ops` readable operations.
unsafe fn each_op(
    batches: *const Batch,
    n: u64,
    mut each: impl FnMut(*const c_void, BatchOp) -> Outcome<()>,
) -> Outcome<()> {
    for i in 0..n {
        // SAFETY: null, or the i-th of `n` batches, which are readable by this function's contract.
        let batch = unsafe { get(at(batches, i), "batches") }?;
        for j in 0..u64::from(batch.num_ops) {
            // SAFETY: null, or the j-th of `num_ops` operations, which are readable by this function's contract.
            let op = unsafe { get(at(batch.ops, j), "ops") }?;
            each(batch.tensor, op)?;
        }
    }
    Ok(())
}

/// The `i`-th of an array; null stays null.
fn at<T>(array: *const T, i: u64) -> *const T {
    if array.is_null() { array } else { array.wrapping_add(i as usize) }
}

/// What `unsafe = true` means: no wait for uses in flight. Nothing here can do without.
fn must_wait(unwaited: u8) -> Outcome<()> {
    if unwaited != 0 { violate(status::INVALID, "unsafe is true: uses in flight would be overtaken") } else { Ok(()) }
}

/// `NRT_STATUS nrt_tensor_read_batch(const nrt_tensor_batch_t *batches, uint64_t num_batches, bool unsafe)`
///
/// # Safety
/// `batches` is null or valid for reading `n` batches, each with null or `num_ops` readable operations whose buffers are
/// null or valid for writing their sizes.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nrt_tensor_read_batch(batches: *const Batch, n: u64, unwaited: u8) -> u32 {
    status_of("nrt_tensor_read_batch", Needs::Open, Inject::Instead, |_| {
        must_wait(unwaited)?;
        // SAFETY: the operation's buffer is null or valid for writing its size by this function's contract.
        let each = |tensor, op: BatchOp| unsafe { read(tensor, op.buffer, op.offset, op.size) };
        // SAFETY: same contract.
        unsafe { each_op(batches, n, each) }
    })
}

/// `NRT_STATUS nrt_tensor_write_batch(const nrt_tensor_batch_t *batches, uint64_t num_batches, bool unsafe)`
///
/// # Safety
/// `batches` is null or valid for reading `n` batches, each with null or `num_ops` readable operations whose buffers are
/// null or valid for reading their sizes, and nobody changes them during the call.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nrt_tensor_write_batch(batches: *const Batch, n: u64, unwaited: u8) -> u32 {
    status_of("nrt_tensor_write_batch", Needs::Open, Inject::Instead, |_| {
        must_wait(unwaited)?;
        // SAFETY: the operation's buffer is null or valid for reading its size by this function's contract.
        let each = |tensor, op: BatchOp| unsafe { write(tensor, op.buffer, op.offset, op.size) };
        // SAFETY: same contract.
        unsafe { each_op(batches, n, each) }
    })
}
