//! Models and what they take and give.

use crate::abi::status;
use crate::caller::{bytes, put};
use crate::calls::{Outcome, refuse, violate};
use crate::container::Container;
use crate::entry::{Inject, Needs, status_of, world};
use crate::handle::Kind;
use crate::model::Loaded;
use crate::settings::flag;
use crate::world::{Model, World};
use std::ffi::c_void;
use std::sync::Arc;
use trn_kernels::trainium::emulator::Target;

/// `NRT_STATUS nrt_load(const void *neff, size_t size, int32_t vnc, int32_t vnc_count, nrt_model_t **model)`
///
/// # Safety
/// `neff` is null or readable for `size` bytes, which nobody changes during the call; `model` is null or valid for a write.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nrt_load(
    neff: *const c_void,
    size: usize,
    vnc: i32,
    vnc_count: i32,
    model: *mut *mut c_void,
) -> u32 {
    status_of("nrt_load", Needs::Open, Inject::Instead, |_| {
        if model.is_null() {
            return violate(status::INVALID, "model is null");
        }
        // SAFETY: null or readable and unchanged by this function's contract; the slice does not outlive the call.
        let neff = unsafe { bytes(neff, size, "neff") }?;
        let check_hash = world().settings.validate_hash;
        let container = Container::read(neff, check_hash)?;
        // Parsed outside the lock: other threads go on executing.
        let loaded = Loaded::new(&container)?;
        let mut world = world();
        let core = world.place(&container, &loaded, vnc, vnc_count)?;
        let handle = world.handle(Kind::Model)?;
        // SAFETY: null or valid for a write by this function's contract.
        unsafe { put(model, handle.pointer(), "model") }?;
        world.models.insert(handle, Model { loaded: Arc::new(loaded), core, failed: false });
        Ok(())
    })
}

impl World {
    /// The core that a model goes to.
    fn place(&mut self, container: &Container, loaded: &Loaded, vnc: i32, vnc_count: i32) -> Outcome<u32> {
        if !matches!(vnc_count, -1 | 1) {
            return refuse(status::NOT_ENOUGH_NC, format!("vnc_count is {vnc_count}, the model is for one core"));
        }
        let (lnc, configured) = (container.lnc, self.settings.lnc);
        if lnc != 0 && configured != 0 && lnc != configured {
            return refuse(status::INVALID, format!("neff: lnc {lnc}, the process is configured for {configured}"));
        }
        let chip = match loaded.program.target() {
            Target::Trn1 => 1,
            Target::Trn2 => 2,
            Target::Trn3 => 3,
        };
        if self.settings.chip != 0 && self.settings.chip != chip {
            return refuse(status::HW_ERROR, format!("neff: for trn{chip}, this is trn{}", self.settings.chip));
        }
        let core = if vnc != -1 {
            self.core(vnc)?
        } else if self.settings.has(flag::AUTO_VNC) {
            self.automatic = self.automatic.wrapping_add(1);
            self.automatic % self.settings.visible.max(1)
        } else {
            0
        };
        let (wanted, left) = (container.cores.max(1), self.settings.visible.saturating_sub(core));
        if wanted > left {
            return refuse(status::NOT_ENOUGH_NC, format!("neff: wants {wanted} cores, {left} there are from {core}"));
        }
        Ok(core)
    }
}

/// `NRT_STATUS nrt_unload(nrt_model_t *model)`; the model is gone whatever it returns.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn nrt_unload(model: *mut c_void) -> u32 {
    status_of("nrt_unload", Needs::Open, Inject::Told, |injected| {
        let mut world = world();
        let handle = world.model(model)?.0;
        world.must_rest("nrt_unload", handle, "the model is unloaded");
        world.models.remove(&handle);
        match injected {
            Some(status) if !world.settings.unload_always_succeeds() => refuse(status, "injected"),
            _ => Ok(()),
        }
    })
}

/// `NRT_STATUS nrt_get_model_tensor_info(nrt_model_t *model, nrt_tensor_info_array_t **tensor_info)`
///
/// # Safety
/// `tensor_info` is null or valid for a write.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn nrt_get_model_tensor_info(model: *mut c_void, tensor_info: *mut *mut c_void) -> u32 {
    status_of("nrt_get_model_tensor_info", Needs::Open, Inject::Instead, |_| {
        if tensor_info.is_null() {
            return violate(status::INVALID, "tensor_info is null");
        }
        let mut world = world();
        let loaded = world.model(model)?.1.loaded.clone();
        let settings = world.settings.clone();
        let null = settings.has(flag::INFO_NULL);
        let array = if null { std::ptr::null_mut() } else { world.arrays.give(&loaded, &settings) };
        // SAFETY: null or valid for a write by this function's contract.
        unsafe { put(tensor_info, array, "tensor_info") }
    })
}

/// `NRT_STATUS nrt_free_model_tensor_info(nrt_tensor_info_array_t *tensor_info)`; the array is gone whatever it returns.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn nrt_free_model_tensor_info(tensor_info: *mut c_void) -> u32 {
    status_of("nrt_free_model_tensor_info", Needs::Open, Inject::Told, |injected| {
        match world().arrays.free(tensor_info) {
            Ok(()) => injected.map_or(Ok(()), |status| refuse(status, "injected")),
            Err(true) => violate(status::INVALID_HANDLE, "the array was freed before"),
            Err(false) => violate(status::INVALID_HANDLE, "not an array of this library"),
        }
    })
}
