//! Compiled kernels on one core.
#![forbid(unsafe_code)]

use super::{CompiledKernel, KernelSet, read};
use crate::error::{Error, Result};
use crate::neuron::{ALIAS_SUFFIX, Expected, Model, Runtime, Tensor, TensorSet, Usage};
use crate::trainium::Dtype;
use crate::trainium::manifest::BoundTensor;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A [`KernelSet`] on a core: NEFFs are loaded when a call first needs them, and stay.
///
/// Typed kernels ([`MatmulMxKernel`](super::MatmulMxKernel) and the others) are made from it. Their calls take turns, since a core
/// does one thing at a time.
#[derive(Debug)]
pub struct DeviceKernels {
    set: KernelSet,
    runtime: Runtime,
    core: u32,
    loaded: Mutex<HashMap<String, Arc<Loaded>>>,
    turn: Mutex<()>,
}

impl KernelSet {
    /// This set on a core of a runtime.
    pub fn on(self, runtime: &Runtime, core: u32) -> Arc<DeviceKernels> {
        let (loaded, turn) = (Mutex::default(), Mutex::default());
        Arc::new(DeviceKernels { set: self, runtime: runtime.clone(), core, loaded, turn })
    }
}

impl DeviceKernels {
    /// What is compiled.
    pub fn set(&self) -> &KernelSet {
        &self.set
    }

    /// The runtime it runs on.
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// The core, counted within the visible ones.
    pub fn core(&self) -> u32 {
        self.core
    }

    /// Waits for the turn of a call.
    pub(super) fn turn(&self) -> MutexGuard<'_, ()> {
        // What a panicking caller left half done is its own; the device is as it was.
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A tensor that holds these bytes for as long as it lives.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn resident(&self, bytes: &[u8], name: &str) -> Result<Arc<Tensor>> {
        let tensor = self.runtime.allocate(self.core, bytes.len(), name)?;
        tensor.write(0, bytes)?;
        Ok(Arc::new(tensor))
    }

    /// A tensor of zeros: what padding reads must be numbers.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn zeroed(&self, bytes: usize, name: &str) -> Result<Arc<Tensor>> {
        let tensor = self.runtime.allocate(self.core, bytes, name)?;
        tensor.fill(0)?;
        Ok(Arc::new(tensor))
    }

    /// The loaded kernel; a NEFF is read, held against its hash, loaded and held against the manifest once.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Manifest`] for a file that is not the one the manifest was written for; [`Error::Device`].
    pub(super) fn load(&self, kernel: &CompiledKernel) -> Result<Arc<Loaded>> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(there) = loaded.get(&kernel.file) {
            return Ok(Arc::clone(there));
        }
        let path = self.set.folder().join(&kernel.file);
        let neff = std::fs::read(&path).map_err(|e| Error::io(&path, &e))?;
        read::check_hash(kernel, &neff)?;
        let mut model = self.runtime.load(&neff, self.core)?;
        let mut ports = [Vec::new(), Vec::new()];
        let sides = [(Usage::Input, kernel.bound.inputs()), (Usage::Output, kernel.bound.outputs())];
        for ((usage, tensors), ports) in sides.into_iter().zip(&mut ports) {
            for tensor in tensors {
                let alias = format!("{}{ALIAS_SUFFIX}", tensor.name);
                let in_place = usage == Usage::Input && model.inputs().iter().any(|d| d.name == alias);
                let name = if in_place { alias } else { tensor.name.clone() };
                let packed_x4 = matches!(tensor.dtype, Dtype::Uint16 | Dtype::Uint32);
                model.expect(usage, &name, &Expected { bytes: tensor.bytes as u64, dtype: None, packed_x4 })?;
                let io = [None, None];
                ports.push(Port { tensor: tensor.clone(), name, io: Mutex::new(io) });
            }
        }
        let [inputs, outputs] = ports;
        let there = Arc::new(Loaded { model, inputs, outputs });
        loaded.insert(kernel.file.clone(), Arc::clone(&there));
        Ok(there)
    }
}

/// A kernel on a core, with the tensors of its calls.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) model: Model,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
}

/// An input or output.
#[derive(Debug)]
struct Port {
    tensor: BoundTensor,
    /// The model's name for it: inputs that are changed in place carry a suffix.
    name: String,
    /// What calls write and read, once they do: one for each of two calls in flight.
    io: Mutex<[Option<Arc<Tensor>>; 2]>,
}

impl Port {
    fn io(&self, device: &DeviceKernels, slot: usize) -> Result<Arc<Tensor>> {
        let mut io = self.io.lock().unwrap_or_else(PoisonError::into_inner);
        let there = &mut io[slot % 2];
        if there.is_none() {
            *there = Some(device.zeroed(self.tensor.bytes, &self.tensor.name)?);
        }
        there.clone().ok_or(Error::Missing { operand: "device tensor".into(), needed_by: "a call".into() })
    }
}

impl Loaded {
    /// Sets for calls through `slot`: resident tensors by name, the call's own for the rest.
    pub(super) fn sets(
        &self,
        device: &DeviceKernels,
        slot: usize,
        resident: &[(&str, Arc<Tensor>)],
    ) -> Result<[TensorSet; 2]> {
        let set = |ports: &[Port]| -> Result<TensorSet> {
            let mut set = TensorSet::new(self.model.runtime(), self.model.core())?;
            for port in ports {
                let tensor = match resident.iter().find(|(name, _)| *name == port.tensor.name) {
                    Some((_, tensor)) => Arc::clone(tensor),
                    None => port.io(device, slot)?,
                };
                set.insert(&port.name, tensor)?;
            }
            Ok(set)
        };
        Ok([set(&self.inputs)?, set(&self.outputs)?])
    }

    /// Whether there is such an input or output.
    pub(super) fn has(&self, name: &str) -> bool {
        self.inputs.iter().chain(&self.outputs).any(|port| port.tensor.name == name)
    }

    /// The call's own tensor for an input or output.
    pub(super) fn io(&self, device: &DeviceKernels, name: &str, slot: usize) -> Result<Arc<Tensor>> {
        let mut ports = self.inputs.iter().chain(&self.outputs);
        let port = ports.find(|port| port.tensor.name == name);
        port.ok_or_else(|| Error::Missing { operand: name.to_owned().into(), needed_by: "a kernel".into() })?
            .io(device, slot)
    }
}
