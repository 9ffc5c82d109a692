//! Execution.

use crate::entry::{Inject, Needs, status_of};
use crate::execute;
use std::ffi::c_void;

/// `NRT_STATUS nrt_execute(nrt_model_t *model, const nrt_tensor_set_t *inputs, nrt_tensor_set_t *outputs)`
#[unsafe(no_mangle)]
pub(crate) extern "C" fn nrt_execute(model: *mut c_void, inputs: *const c_void, outputs: *mut c_void) -> u32 {
    status_of(execute::NAME, Needs::Open, Inject::Told, |injected| execute::execute(model, inputs, outputs, injected))
}
