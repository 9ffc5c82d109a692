//! The C side of libnrt as data: opaque handles, structs, constants and function pointer types of the 2022 core, which no later
//! header re-typed, and of the few newer calls that are used when present. No code; every layout number is asserted below.
//!
//! Enums of the C header are 4 bytes and unsigned, and the library appends values: they are `u32` here, never Rust enums.
#![forbid(unsafe_code)]

use std::ffi::{c_char, c_void};
use std::marker::{PhantomData, PhantomPinned};

/// An incomplete C struct: only its address means anything, and only to the library.
macro_rules! opaque {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug)]
        pub struct $name {
            bytes: [u8; 0],
            foreign: PhantomData<(*mut u8, PhantomPinned)>,
        }
    )*};
}

opaque! {
    /// `nrt_model_t`: a loaded NEFF.
    Model,
    /// `nrt_tensor_t`: bytes in device memory, or a view of some.
    Tensor,
}

/// `nrt_tensor_set_t`: declared as `void` in C, so a pointer to a pointer to it is `void **`.
pub type TensorSet = c_void;

/// `nrt_tensor_placement_t`: device memory. The other placements are deprecated or removed.
pub const PLACEMENT_DEVICE: u32 = 0;
/// `nrt_framework_type_t`: no framework. Only labels the process for Neuron's tools.
pub const FRAMEWORK_NONE: u32 = 1;
/// `nrt_tensor_usage_t`: an input.
pub const USAGE_INPUT: u32 = 0;
/// `nrt_tensor_usage_t`: an output.
pub const USAGE_OUTPUT: u32 = 1;
/// Bytes of a tensor name with its NUL.
pub const TENSOR_NAME_MAX: usize = 256;
/// `vnc_count` of `nrt_load`: deprecated, the library decides.
pub const VNC_COUNT_DEFAULT: i32 = -1;

/// `nrt_version_t`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Version {
    /// First number.
    pub rt_major: u64,
    /// Second number.
    pub rt_minor: u64,
    /// Third number.
    pub rt_patch: u64,
    /// Fourth number.
    pub rt_maintenance: u64,
    /// Text behind the numbers; not always ended by a NUL.
    pub rt_detail: [c_char; 128],
    /// Commit the library was built from; not always ended by a NUL.
    pub git_hash: [c_char; 64],
}

/// `nrt_instance_info_t`. Before SDK 2.28 only the first 8 bytes existed.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct InstanceInfo {
    /// Instance family (`nrt_instance_family_t`).
    pub family: u32,
    /// Instance size (`nrt_instance_size_t`).
    pub size: u32,
    /// Architecture; not always ended by a NUL.
    pub arch_name: [c_char; 16],
    /// Revision of the device.
    pub device_revision: [c_char; 8],
}

/// Bytes of [`InstanceInfo`] that a library before SDK 2.28 knows.
pub const INSTANCE_INFO_SHORT: usize = 8;

/// `nrt_tensor_info_t`: an input or output of a loaded model.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct TensorInfo {
    /// Variable name; not always ended by a NUL.
    pub name: [c_char; TENSOR_NAME_MAX],
    /// [`USAGE_INPUT`] or [`USAGE_OUTPUT`].
    pub usage: u32,
    /// Bytes.
    pub size: usize,
    /// Element type; its numbering depends on the library's age.
    pub dtype: u32,
    /// `ndim` extents, owned by the array that this entry is part of.
    pub shape: *mut u32,
    /// Number of extents.
    pub ndim: u32,
}

/// `nrt_tensor_info_array_t`: a count, and that many [`TensorInfo`] behind it.
#[repr(C)]
#[derive(Debug)]
pub struct TensorInfoArray {
    /// Number of entries.
    pub tensor_count: u64,
    /// The entries: a flexible array member.
    pub tensor_array: [TensorInfo; 0],
}

/// `nrt_tensor_batch_op_t`: one copy of a batch.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct TensorBatchOp {
    /// First byte within the tensor.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
    /// Host memory.
    pub buffer: *mut c_void,
}

/// `nrt_tensor_batch_t`: the copies of one tensor.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct TensorBatch {
    /// The tensor.
    pub tensor: *const Tensor,
    /// `num_ops` copies.
    pub ops: *const TensorBatchOp,
    /// Number of copies.
    pub num_ops: u32,
}

/// `nrt_vnc_memory_stats_t`. Grows at its end only.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct MemoryStats {
    /// Device bytes in use.
    pub bytes_used: usize,
    /// Device bytes there are.
    pub bytes_limit: usize,
}

/// The numbers of the libnrt headers (x86-64 and aarch64 Linux), so that a change here cannot compile.
#[cfg(target_pointer_width = "64")]
const _: () = {
    use std::mem::{align_of, offset_of, size_of};
    assert!(size_of::<Version>() == 224 && align_of::<Version>() == 8);
    assert!(offset_of!(Version, rt_major) == 0 && offset_of!(Version, rt_minor) == 8);
    assert!(offset_of!(Version, rt_patch) == 16 && offset_of!(Version, rt_maintenance) == 24);
    assert!(offset_of!(Version, rt_detail) == 32 && offset_of!(Version, git_hash) == 160);

    assert!(size_of::<InstanceInfo>() == 32 && align_of::<InstanceInfo>() == 4);
    assert!(offset_of!(InstanceInfo, family) == 0 && offset_of!(InstanceInfo, size) == 4);
    assert!(offset_of!(InstanceInfo, arch_name) == INSTANCE_INFO_SHORT);
    assert!(offset_of!(InstanceInfo, device_revision) == 24);

    assert!(size_of::<TensorInfo>() == 296 && align_of::<TensorInfo>() == 8);
    assert!(offset_of!(TensorInfo, name) == 0 && offset_of!(TensorInfo, usage) == 256);
    assert!(offset_of!(TensorInfo, size) == 264 && offset_of!(TensorInfo, dtype) == 272);
    assert!(offset_of!(TensorInfo, shape) == 280 && offset_of!(TensorInfo, ndim) == 288);

    assert!(size_of::<TensorInfoArray>() == 8 && align_of::<TensorInfoArray>() == 8);
    assert!(offset_of!(TensorInfoArray, tensor_count) == 0 && offset_of!(TensorInfoArray, tensor_array) == 8);

    assert!(size_of::<TensorBatchOp>() == 24 && align_of::<TensorBatchOp>() == 8);
    assert!(offset_of!(TensorBatchOp, offset) == 0 && offset_of!(TensorBatchOp, size) == 8);
    assert!(offset_of!(TensorBatchOp, buffer) == 16);

    assert!(size_of::<TensorBatch>() == 24 && align_of::<TensorBatch>() == 8);
    assert!(offset_of!(TensorBatch, tensor) == 0 && offset_of!(TensorBatch, ops) == 8);
    assert!(offset_of!(TensorBatch, num_ops) == 16);

    assert!(size_of::<MemoryStats>() == 16 && align_of::<MemoryStats>() == 8);
    assert!(offset_of!(MemoryStats, bytes_used) == 0 && offset_of!(MemoryStats, bytes_limit) == 8);

    assert!(size_of::<bool>() == 1 && size_of::<c_char>() == 1);
};

/// Function pointer types, one for each bound symbol, in the order of the header.
pub mod functions {
    use super::{InstanceInfo, MemoryStats, Model, Tensor, TensorBatch, TensorInfoArray, TensorSet, Version};
    use std::ffi::{c_char, c_void};

    /// `nrt_init(framework, fw_version, fal_version)`.
    pub type Init = unsafe extern "C" fn(u32, *const c_char, *const c_char) -> u32;
    /// `nrt_close()`: the header says `void`, the guide a status.
    pub type Close = unsafe extern "C" fn();
    /// `nrt_get_version(version, size)`.
    pub type GetVersion = unsafe extern "C" fn(*mut Version, usize) -> u32;
    /// `nrt_get_total_nc_count(count)` and its siblings.
    pub type GetCount = unsafe extern "C" fn(*mut u32) -> u32;
    /// `nrt_get_instance_info(info, size)`.
    pub type GetInstanceInfo = unsafe extern "C" fn(*mut InstanceInfo, usize) -> u32;
    /// `nrt_get_vnc_memory_stats(vnc, stats, size, written)`.
    pub type GetMemoryStats = unsafe extern "C" fn(u32, *mut MemoryStats, usize, *mut usize) -> u32;
    /// `nrt_load(neff, size, vnc, vnc_count, model)`.
    pub type Load = unsafe extern "C" fn(*const c_void, usize, i32, i32, *mut *mut Model) -> u32;
    /// `nrt_unload(model)`.
    pub type Unload = unsafe extern "C" fn(*mut Model) -> u32;
    /// `nrt_get_model_instance_count(model, count)`.
    pub type GetModelInstanceCount = unsafe extern "C" fn(*mut Model, *mut u32) -> u32;
    /// `nrt_get_model_tensor_info(model, array)`.
    pub type GetModelTensorInfo = unsafe extern "C" fn(*mut Model, *mut *mut TensorInfoArray) -> u32;
    /// `nrt_free_model_tensor_info(array)`.
    pub type FreeModelTensorInfo = unsafe extern "C" fn(*mut TensorInfoArray) -> u32;
    /// `nrt_tensor_allocate(placement, vnc, size, name, tensor)`.
    pub type TensorAllocate = unsafe extern "C" fn(u32, i32, usize, *const c_char, *mut *mut Tensor) -> u32;
    /// `nrt_tensor_allocate_slice(source, offset, size, name, tensor)`.
    pub type TensorAllocateSlice =
        unsafe extern "C" fn(*const Tensor, usize, usize, *const c_char, *mut *mut Tensor) -> u32;
    /// `nrt_tensor_free(tensor)`: sets the pointer to null.
    pub type TensorFree = unsafe extern "C" fn(*mut *mut Tensor);
    /// `nrt_tensor_read(tensor, buffer, offset, size)`.
    pub type TensorRead = unsafe extern "C" fn(*const Tensor, *mut c_void, usize, usize) -> u32;
    /// `nrt_tensor_write(tensor, buffer, offset, size)`.
    pub type TensorWrite = unsafe extern "C" fn(*mut Tensor, *const c_void, usize, usize) -> u32;
    /// `nrt_tensor_read_batch(batches, count, unsafe)` and `nrt_tensor_write_batch`.
    pub type TensorBatchCall = unsafe extern "C" fn(*const TensorBatch, u64, bool) -> u32;
    /// `nrt_tensor_copy(source, source_offset, destination, destination_offset, size)`.
    pub type TensorCopy = unsafe extern "C" fn(*const Tensor, usize, *mut Tensor, usize, usize) -> u32;
    /// `nrt_tensor_memset(tensor, offset, value, size)`: the offset is 64 bits on every platform.
    pub type TensorMemset = unsafe extern "C" fn(*mut Tensor, u64, i32, usize) -> u32;
    /// `nrt_tensor_get_size(tensor)`.
    pub type TensorGetSize = unsafe extern "C" fn(*const Tensor) -> usize;
    /// `nrt_tensor_get_va(tensor)`.
    pub type TensorGetVa = unsafe extern "C" fn(*const Tensor) -> *mut c_void;
    /// `nrt_allocate_tensor_set(set)`.
    pub type AllocateTensorSet = unsafe extern "C" fn(*mut *mut TensorSet) -> u32;
    /// `nrt_destroy_tensor_set(set)`: sets the pointer to null and leaves the members alone.
    pub type DestroyTensorSet = unsafe extern "C" fn(*mut *mut TensorSet);
    /// `nrt_add_tensor_to_tensor_set(set, name, tensor)`.
    pub type AddTensorToTensorSet = unsafe extern "C" fn(*mut TensorSet, *const c_char, *mut Tensor) -> u32;
    /// `nrt_get_tensor_from_tensor_set(set, name, tensor)`.
    pub type GetTensorFromTensorSet = unsafe extern "C" fn(*mut TensorSet, *const c_char, *mut *mut Tensor) -> u32;
    /// `nrt_execute(model, inputs, outputs)`.
    pub type Execute = unsafe extern "C" fn(*mut Model, *const TensorSet, *mut TensorSet) -> u32;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The walk of a tensor table is base + 8 with a stride of 296, whatever an entry holds.
    #[test]
    fn a_table_is_walked_at_eight_plus_296_each() {
        let array = std::mem::offset_of!(TensorInfoArray, tensor_array);
        assert_eq!((array, size_of::<[TensorInfo; 3]>()), (8, 3 * 296));
    }
}
