//! Calls on a model.

use super::{Inner, SetHandle, lock};
use crate::neuron::error::Result;
use crate::neuron::io::{ModelIo, TensorTable};
use crate::neuron::storage::Ranges;
use crate::neuron::{StatusClass, sys};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A loaded NEFF.
#[derive(Debug)]
pub(in crate::neuron) struct ModelHandle {
    runtime: Arc<Inner>,
    pointer: NonNull<sys::Model>,
}

// SAFETY: a model belongs to the process and not to a thread; the guide runs one from several threads. It is unloaded by the drop
// of its only owner.
unsafe impl Send for ModelHandle {}
// SAFETY: what can be called through a shared reference are execution, which the guide documents from several threads at once,
// and queries, which take `Inner::manage`.
unsafe impl Sync for ModelHandle {}

impl ModelHandle {
    pub(in crate::neuron) fn load(runtime: &Arc<Inner>, neff: &[u8], core: u32) -> Result<Self> {
        runtime.enter()?;
        let core = runtime.core(core)?;
        let _alone = lock(&runtime.manage);
        let mut pointer = ptr::null_mut();
        // SAFETY: the library is initialised (`enter`, and `runtime` keeps it so); the bytes are ours for the length passed
        // and are needed during the call only; the out-pointer is a variable of our own.
        let status = unsafe {
            (runtime.api().nrt_load)(neff.as_ptr().cast(), neff.len(), core, sys::VNC_COUNT_DEFAULT, &mut pointer)
        };
        runtime.check("nrt_load", status)?;
        Ok(ModelHandle { runtime: Arc::clone(runtime), pointer: Inner::given("nrt_load", pointer)? })
    }

    pub(in crate::neuron) fn io(&self) -> Result<ModelIo> {
        self.runtime.enter()?;
        let _alone = lock(&self.runtime.manage);
        let mut pointer = ptr::null_mut();
        // SAFETY: the model is loaded, as this value owns it; the out-pointer is a variable of our own.
        let status = unsafe { (self.runtime.api().nrt_get_model_tensor_info)(self.pointer.as_ptr(), &mut pointer) };
        self.runtime.check("nrt_get_model_tensor_info", status)?;
        let table = ForeignTable(Inner::given("nrt_get_model_tensor_info", pointer)?);
        let io = ModelIo::read(&table, self.runtime.version);
        // SAFETY: the table came from the library a moment ago, is freed here once, and `io` holds copies only.
        let status = unsafe { (self.runtime.api().nrt_free_model_tensor_info)(pointer) };
        self.runtime.check("nrt_free_model_tensor_info", status)?;
        io
    }

    /// How many threads are worth executing at once, if the library tells.
    pub(in crate::neuron) fn instances(&self) -> Result<Option<u32>> {
        self.runtime.enter()?;
        let Some(call) = self.runtime.api().nrt_get_model_instance_count else { return Ok(None) };
        let _alone = lock(&self.runtime.manage);
        let mut count = 0;
        // SAFETY: the model is loaded, as this value owns it; the pointer is to a u32 of our own.
        let status = unsafe { call(self.pointer.as_ptr(), &mut count) };
        self.runtime.check("nrt_get_model_instance_count", status)?;
        Ok(Some(count))
    }

    /// Runs the model. The caller has matched names, sizes and cores: what does not match is the library's to refuse.
    pub(in crate::neuron) fn execute(&self, inputs: &SetHandle, outputs: &mut SetHandle) -> Result<()> {
        self.runtime.enter()?;
        let failed_before = self.runtime.failed_before.load(Ordering::Acquire);
        if failed_before {
            inputs.members().iter().try_for_each(|(_, tensor)| tensor.handle.trusted())?;
        }
        // SAFETY: the model is loaded and both sets exist, as the values own them; every member of the sets is alive, as
        // `SetHandle` holds it; no other thread changes or uses the sets, as they are not `Sync` and one is borrowed mutably.
        // The call blocks until the outputs are there (`init` refuses the asynchronous mode). Other threads may execute too.
        let status = unsafe {
            (self.runtime.api().nrt_execute)(self.pointer.as_ptr(), inputs.pointer.as_ptr(), outputs.pointer.as_ptr())
        };
        let done = self.runtime.check("nrt_execute", status);
        match &done {
            Ok(()) => {
                self.runtime.calls.fetch_add(1, Ordering::Relaxed);
                if failed_before {
                    outputs.each_written(Ranges::remove);
                }
            }
            Err(e) if e.class() == Some(StatusClass::Retryable) => {} // it did not run
            Err(_) => {
                outputs.each_written(Ranges::add);
                self.runtime.failed_before.store(true, Ordering::Release);
            }
        }
        done
    }
}

impl Drop for ModelHandle {
    fn drop(&mut self) {
        if self.runtime.enter().is_err() {
            return;
        }
        let alone = lock(&self.runtime.manage);
        // SAFETY: loaded by `load`, owned by this value alone, unloaded here once: also after failed executions, as older
        // runtimes need. No thread executes it, since that borrows this value.
        let status = unsafe { (self.runtime.api().nrt_unload)(self.pointer.as_ptr()) };
        drop(alone); // the hook may use the runtime
        self.runtime.report("nrt_unload", status);
    }
}

/// The library's own table of tensors.
struct ForeignTable(NonNull<sys::TensorInfoArray>);

impl TensorTable for ForeignTable {
    fn count(&self) -> u64 {
        // SAFETY: the library handed the table out with success, so it is there until it is freed, after the walk; the count is
        // its first field (asserted in `sys`).
        unsafe { self.0.cast::<u64>().read() }
    }

    fn entry(&self, at: usize) -> sys::TensorInfo {
        // SAFETY: a place behind a valid pointer, computed without reading or making a reference.
        let first = unsafe { &raw const (*self.0.as_ptr()).tensor_array }.cast::<sys::TensorInfo>();
        // SAFETY: `ModelIo::read` asks for positions below the count only, and that many entries follow the header.
        let entry = unsafe { first.add(at) };
        // SAFETY: an entry of the table; any bytes are a `TensorInfo`, which holds integers and a pointer.
        unsafe { entry.read() }
    }

    fn shape(&self, entry: &sys::TensorInfo) -> Vec<u32> {
        // SAFETY: `ModelIo::read` asks for entries with extents, a sane number of them and a pointer that is not null only; the
        // library promises that many u32 there until the table is freed.
        let shape = unsafe { std::slice::from_raw_parts(entry.shape, entry.ndim as usize) };
        shape.to_vec()
    }
}
