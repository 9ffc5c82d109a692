//! The exported functions, by header chapter. Each says in its safety section what the C caller promises, no more than the
//! header asks; handles may be anything.
//!
//! The names of the functions are listed in [`REQUIRED`] and [`OPTIONAL`] once; injections and tests go by these lists.

pub(crate) mod control;
pub(crate) mod execution;
pub(crate) mod lifecycle;
pub(crate) mod model;
pub(crate) mod optional;
pub(crate) mod set;
pub(crate) mod tensor;

/// The core of 2022, which every runtime has.
pub(crate) const REQUIRED: [&str; 23] = [
    "nrt_init",
    "nrt_close",
    "nrt_get_version",
    "nrt_get_total_nc_count",
    "nrt_get_visible_nc_count",
    "nrt_load",
    "nrt_unload",
    "nrt_get_model_tensor_info",
    "nrt_free_model_tensor_info",
    "nrt_allocate_tensor_set",
    "nrt_destroy_tensor_set",
    "nrt_add_tensor_to_tensor_set",
    "nrt_get_tensor_from_tensor_set",
    "nrt_execute",
    "nrt_tensor_allocate",
    "nrt_tensor_free",
    "nrt_tensor_read",
    "nrt_tensor_write",
    "nrt_tensor_get_size",
    "nrt_tensor_copy",
    "nrt_tensor_memset",
    "nrt_tensor_allocate_slice",
    "nrt_tensor_get_va",
];

/// What newer runtimes have besides.
pub(crate) const OPTIONAL: [&str; 10] = [
    "nrt_get_status_as_str",
    "nrt_get_total_vnc_count",
    "nrt_get_visible_vnc_count",
    "nrt_get_instance_info",
    "nrt_get_model_info",
    "nrt_get_model_nc_count",
    "nrt_get_model_instance_count",
    "nrt_get_vnc_memory_stats",
    "nrt_tensor_read_batch",
    "nrt_tensor_write_batch",
];
