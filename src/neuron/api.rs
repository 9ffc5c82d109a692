//! The functions of libnrt that this crate calls: which are required, which are used when present.
#![forbid(unsafe_code)]

use super::sys::functions;
use std::ffi::{CStr, c_void};
use std::ptr::NonNull;

/// Calls `$then!` with every bound symbol and the name of its type in [`functions`]: the one list.
macro_rules! symbols {
    ($then:ident) => {
        $then! {
            required {
                nrt_init: Init,
                nrt_close: Close,
                nrt_get_version: GetVersion,
                nrt_get_total_nc_count: GetCount,
                nrt_get_visible_nc_count: GetCount,
                nrt_load: Load,
                nrt_unload: Unload,
                nrt_get_model_tensor_info: GetModelTensorInfo,
                nrt_free_model_tensor_info: FreeModelTensorInfo,
                nrt_allocate_tensor_set: AllocateTensorSet,
                nrt_destroy_tensor_set: DestroyTensorSet,
                nrt_add_tensor_to_tensor_set: AddTensorToTensorSet,
                nrt_get_tensor_from_tensor_set: GetTensorFromTensorSet,
                nrt_execute: Execute,
                nrt_tensor_allocate: TensorAllocate,
                nrt_tensor_free: TensorFree,
                nrt_tensor_read: TensorRead,
                nrt_tensor_write: TensorWrite,
                nrt_tensor_get_size: TensorGetSize,
                nrt_tensor_copy: TensorCopy,
                nrt_tensor_memset: TensorMemset,
                nrt_tensor_allocate_slice: TensorAllocateSlice,
                nrt_tensor_get_va: TensorGetVa,
            }
            optional {
                nrt_get_instance_info: GetInstanceInfo,
                nrt_get_vnc_memory_stats: GetMemoryStats,
                nrt_get_model_instance_count: GetModelInstanceCount,
                nrt_tensor_read_batch: TensorBatchCall,
                nrt_tensor_write_batch: TensorBatchCall,
            }
        }
    };
}
pub(super) use symbols;

macro_rules! define {
    (required { $($name:ident: $kind:ident,)* } optional { $($extra:ident: $extra_kind:ident,)* }) => {
        /// The functions without which a library is refused: the core of 2022, unchanged since.
        pub const REQUIRED_SYMBOLS: &[&str] = &[$(stringify!($name)),*];

        /// Newer functions that are used when the library has them.
        pub const OPTIONAL_SYMBOLS: &[&str] = &[$(stringify!($extra)),*];

        /// The library as typed function pointers. Made by `load.rs` only.
        #[derive(Debug, Clone, Copy)]
        pub(super) struct Api {
            $(pub(super) $name: functions::$kind,)*
            $(pub(super) $extra: Option<functions::$extra_kind>,)*
        }

        /// Where the functions are, before anybody calls them that.
        #[derive(Debug, Clone, Copy)]
        pub(super) struct Addresses {
            $(pub(super) $name: NonNull<c_void>,)*
            $(pub(super) $extra: Option<NonNull<c_void>>,)*
        }

        impl Addresses {
            /// Asks `resolve` for every symbol.
            ///
            /// # Errors
            /// The names of all required symbols that it does not have.
            pub(super) fn find(
                resolve: &dyn Fn(&CStr) -> Option<NonNull<c_void>>,
            ) -> Result<Addresses, Vec<&'static str>> {
                let mut missing = Vec::new();
                let mut ask = |symbol: &'static str, name: &CStr, required: bool| {
                    let address = resolve(name);
                    if required && address.is_none() {
                        missing.push(symbol);
                    }
                    address
                };
                $(let $name = ask(stringify!($name), c_name(concat!(stringify!($name), "\0")), true);)*
                $(let $extra = ask(stringify!($extra), c_name(concat!(stringify!($extra), "\0")), false);)*
                let ($(Some($name),)*) = ($($name,)*) else {
                    return Err(missing);
                };
                Ok(Addresses { $($name,)* $($extra,)* })
            }
        }
    };
}
symbols!(define);

/// A symbol's name for C; the text ends with its only NUL.
fn c_name(text: &'static str) -> &'static CStr {
    CStr::from_bytes_with_nul(text.as_bytes()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A resolver that knows all but some names.
    fn without<'a>(gone: &'a [&'a str]) -> impl Fn(&CStr) -> Option<NonNull<c_void>> + 'a {
        move |name| (!gone.contains(&name.to_str().unwrap())).then(NonNull::dangling)
    }

    #[test]
    fn the_list_is_the_core_of_2022() {
        assert_eq!((REQUIRED_SYMBOLS.len(), OPTIONAL_SYMBOLS.len()), (23, 5));
        let all: std::collections::BTreeSet<_> = REQUIRED_SYMBOLS.iter().chain(OPTIONAL_SYMBOLS).collect();
        assert_eq!(all.len(), 28);
        assert!(all.iter().all(|s| s.starts_with("nrt_")), "nrta_* is never bound");
    }

    #[test]
    fn every_missing_name_is_reported_at_once() {
        assert!(Addresses::find(&without(&[])).is_ok());
        let gone = ["nrt_execute", "nrt_init", "nrt_tensor_get_va", "nrt_tensor_read_batch"];
        assert_eq!(Addresses::find(&without(&gone)).unwrap_err(), ["nrt_init", "nrt_execute", "nrt_tensor_get_va"]);
        assert_eq!(Addresses::find(&|_| None).unwrap_err(), REQUIRED_SYMBOLS);
    }

    #[test]
    fn each_required_symbol_is_required_and_no_optional_one() {
        for &name in REQUIRED_SYMBOLS {
            assert_eq!(Addresses::find(&without(&[name])).unwrap_err(), [name]);
        }
        let bare = Addresses::find(&without(OPTIONAL_SYMBOLS)).unwrap();
        assert!(bare.nrt_get_instance_info.is_none() && bare.nrt_tensor_write_batch.is_none());
    }
}
