//! libnrt's functions without any wrapper, for tests of the emulated library itself: what a careless C program would do.
#![allow(unsafe_code)]

use libloading::os::unix::Library;
use std::ffi::{c_char, c_void};

/// Any handle.
pub type Handle = *mut c_void;

macro_rules! functions {
    ($($name:ident: $type:ty,)*) => {
        /// The functions by name, with the header's prototypes.
        #[allow(missing_docs)] // libnrt's own names
        #[derive(Debug, Clone, Copy)]
        pub struct Raw {
            $(pub $name: $type,)*
        }

        impl Raw {
            /// All functions of a library; panics if it lacks one.
            pub(crate) fn resolve(library: &Library) -> Raw {
                Raw {
                    $($name: {
                        // SAFETY: the types below are the header's.
                        let symbol = unsafe { library.get::<$type>(stringify!($name)) };
                        *symbol.unwrap_or_else(|e| panic!("{}: {e}", stringify!($name)))
                    },)*
                }
            }
        }
    };
}

functions! {
    nrt_init: unsafe extern "C" fn(u32, *const c_char, *const c_char) -> u32,
    nrt_close: unsafe extern "C" fn(),
    nrt_get_version: unsafe extern "C" fn(*mut u8, usize) -> u32,
    nrt_get_visible_nc_count: unsafe extern "C" fn(*mut u32) -> u32,
    nrt_load: unsafe extern "C" fn(*const u8, usize, i32, i32, *mut Handle) -> u32,
    nrt_unload: unsafe extern "C" fn(Handle) -> u32,
    nrt_get_model_tensor_info: unsafe extern "C" fn(Handle, *mut *mut u64) -> u32,
    nrt_free_model_tensor_info: unsafe extern "C" fn(*mut u64) -> u32,
    nrt_allocate_tensor_set: unsafe extern "C" fn(*mut Handle) -> u32,
    nrt_destroy_tensor_set: unsafe extern "C" fn(*mut Handle),
    nrt_add_tensor_to_tensor_set: unsafe extern "C" fn(Handle, *const c_char, Handle) -> u32,
    nrt_get_tensor_from_tensor_set: unsafe extern "C" fn(Handle, *const c_char, *mut Handle) -> u32,
    nrt_execute: unsafe extern "C" fn(Handle, Handle, Handle) -> u32,
    nrt_tensor_allocate: unsafe extern "C" fn(u32, i32, usize, *const c_char, *mut Handle) -> u32,
    nrt_tensor_free: unsafe extern "C" fn(*mut Handle),
    nrt_tensor_read: unsafe extern "C" fn(Handle, *mut u8, usize, usize) -> u32,
    nrt_tensor_write: unsafe extern "C" fn(Handle, *const u8, usize, usize) -> u32,
    nrt_tensor_get_size: unsafe extern "C" fn(Handle) -> usize,
    nrt_tensor_copy: unsafe extern "C" fn(Handle, usize, Handle, usize, usize) -> u32,
    nrt_tensor_memset: unsafe extern "C" fn(Handle, u64, i32, usize) -> u32,
    nrt_tensor_allocate_slice: unsafe extern "C" fn(Handle, usize, usize, *const c_char, *mut Handle) -> u32,
    nrt_tensor_get_va: unsafe extern "C" fn(Handle) -> *mut c_void,
    nrt_get_status_as_str: unsafe extern "C" fn(u32) -> *const c_char,
    nrt_get_instance_info: unsafe extern "C" fn(*mut u8, usize) -> u32,
    nrt_get_model_info: unsafe extern "C" fn(Handle, *mut u32, usize, *mut usize) -> u32,
    nrt_get_vnc_memory_stats: unsafe extern "C" fn(u32, *mut u64, usize, *mut usize) -> u32,
}
