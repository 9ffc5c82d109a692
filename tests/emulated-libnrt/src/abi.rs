//! The C types and numbers of libnrt's headers, as far as this library uses them.
#![forbid(unsafe_code)]

use std::ffi::{CStr, c_void};
use std::mem::{offset_of, size_of};

/// Every NRT_STATUS with its name.
pub(crate) const STATUSES: [(u32, &CStr); 28] = [
    (0, c"NRT_SUCCESS"),
    (1, c"NRT_FAILURE"),
    (2, c"NRT_INVALID"),
    (3, c"NRT_INVALID_HANDLE"),
    (4, c"NRT_RESOURCE"),
    (5, c"NRT_TIMEOUT"),
    (6, c"NRT_HW_ERROR"),
    (7, c"NRT_QUEUE_FULL"),
    (9, c"NRT_LOAD_NOT_ENOUGH_NC"),
    (10, c"NRT_UNSUPPORTED_NEFF_VERSION"),
    (11, c"NRT_FAIL_HOST_MEM_ALLOC"),
    (13, c"NRT_UNINITIALIZED"),
    (14, c"NRT_CLOSED"),
    (15, c"NRT_QUEUE_EMPTY"),
    (101, c"NRT_EXEC_UNIT_UNRECOVERABLE"),
    (1002, c"NRT_EXEC_BAD_INPUT"),
    (1003, c"NRT_EXEC_COMPLETED_WITH_NUM_ERR"),
    (1004, c"NRT_EXEC_COMPLETED_WITH_ERR"),
    (1005, c"NRT_EXEC_NC_BUSY"),
    (1006, c"NRT_EXEC_OOB"),
    (1100, c"NRT_COLL_PENDING"),
    (1200, c"NRT_EXEC_HW_ERR_COLLECTIVES"),
    (1201, c"NRT_EXEC_HW_ERR_HBM_UE"),
    (1202, c"NRT_EXEC_HW_ERR_NC_UE"),
    (1203, c"NRT_EXEC_HW_ERR_DMA_ABORT"),
    (1204, c"NRT_EXEC_SW_NQ_OVERFLOW"),
    (1205, c"NRT_EXEC_HW_ERR_REPAIRABLE_HBM_UE"),
    (1206, c"NRT_NETWORK_PROXY_FAILURE"),
];

/// The name of a status.
pub(crate) fn status_name(status: u32) -> &'static CStr {
    STATUSES.iter().find(|(n, _)| *n == status).map_or(c"NRT_STATUS_UNKNOWN", |(_, name)| name)
}

/// The statuses this library gives of its own accord.
pub(crate) mod status {
    pub(crate) const SUCCESS: u32 = 0;
    pub(crate) const FAILURE: u32 = 1;
    pub(crate) const INVALID: u32 = 2;
    pub(crate) const INVALID_HANDLE: u32 = 3;
    pub(crate) const RESOURCE: u32 = 4;
    pub(crate) const HW_ERROR: u32 = 6;
    pub(crate) const NOT_ENOUGH_NC: u32 = 9;
    pub(crate) const UNSUPPORTED_NEFF: u32 = 10;
    pub(crate) const UNINITIALIZED: u32 = 13;
    pub(crate) const CLOSED: u32 = 14;
    pub(crate) const UNIT_UNRECOVERABLE: u32 = 101;
    pub(crate) const NUMERIC: u32 = 1003;
    pub(crate) const COMPLETED_WITH_ERR: u32 = 1004;
    pub(crate) const OOB: u32 = 1006;
}

/// Bytes of a tensor name, its NUL among them (NRT_TENSOR_NAME_MAX).
pub(crate) const NAME_MAX: usize = 256;

/// Places in `nrt_version_t`: four u64 numbers, then two char arrays.
pub(crate) mod version {
    pub(crate) const BYTES: usize = 224;
    pub(crate) const DETAIL: std::ops::Range<usize> = 32..160;
    pub(crate) const GIT_HASH: std::ops::Range<usize> = 160..224;
}

/// Places in `nrt_instance_info_t`: family u32, size u32, then two char arrays. Before SDK 2.28 it ended after the numbers.
pub(crate) mod instance {
    pub(crate) const BYTES: usize = 32;
    pub(crate) const OLD_BYTES: usize = 8;
    pub(crate) const ARCH_NAME: std::ops::Range<usize> = 8..24;
    pub(crate) const REVISION: std::ops::Range<usize> = 24..32;
}

/// Places in `nrt_tensor_info_array_t` (a u64 count, then the infos) and `nrt_tensor_info_t`.
pub(crate) mod info {
    pub(crate) const FIRST: usize = 8;
    pub(crate) const STRIDE: usize = 296;
    pub(crate) const USAGE: usize = 256;
    pub(crate) const SIZE: usize = 264;
    pub(crate) const DTYPE: usize = 272;
    pub(crate) const SHAPE: usize = 280;
    pub(crate) const NDIM: usize = 288;
}

/// Bytes of `nrt_vnc_memory_stats_t`: used and limit, both size_t.
pub(crate) const MEMORY_STATS_BYTES: usize = 16;
/// Bytes of `nrt_model_info_t`: the core, u32.
pub(crate) const MODEL_INFO_BYTES: usize = 4;

/// `nrt_tensor_batch_op_t`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct BatchOp {
    pub(crate) offset: u64,
    pub(crate) size: u64,
    pub(crate) buffer: *mut c_void,
}

/// `nrt_tensor_batch_t`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Batch {
    pub(crate) tensor: *const c_void,
    pub(crate) ops: *const BatchOp,
    pub(crate) num_ops: u32,
}

const _: () = {
    assert!(size_of::<BatchOp>() == 24 && offset_of!(BatchOp, buffer) == 16);
    assert!(size_of::<Batch>() == 24 && offset_of!(Batch, num_ops) == 16);
    assert!(size_of::<usize>() == 8, "libnrt exists for 64-bit Linux only");
};
