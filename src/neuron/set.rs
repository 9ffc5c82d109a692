//! Named tensors for one side of an execution.
#![forbid(unsafe_code)]

use super::error::{NeuronError, Result};
use super::io::{TensorDesc, Usage};
use super::runtime::SetHandle;
use super::tensor::c_name;
use super::{Model, Runtime, Tensor};
use std::cmp::Ordering;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Pairs of model and inputs that a set of outputs remembers to fit: room for double buffering over two models.
const REMEMBERED: usize = 4;

/// A number that no other model or state of a set has.
pub(super) fn stamp() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Relaxed)
}

/// Tensors by the names that a model has for them. Keeps its tensors alive. Cheap to make: give each thread its own.
///
/// It may move to another thread, not be shared by two, since the library promises nothing for that:
/// ```compile_fail
/// fn shared<T: Sync>() {}
/// shared::<trn_kernels::neuron::TensorSet>();
/// ```
#[derive(Debug)]
pub struct TensorSet {
    pub(super) handle: SetHandle,
    core: u32,
    /// Changes with every insertion.
    stamp: u64,
    /// As outputs: stamps of model and inputs with which this set, as it is, was found to fit.
    fits: [(u64, u64); REMEMBERED],
}

impl TensorSet {
    /// An empty set for one core.
    ///
    /// # Errors
    /// [`NeuronError::NoSuchCore`], [`NeuronError::Call`]; what [`Runtime::usable`] says.
    pub fn new(runtime: &Runtime, core: u32) -> Result<TensorSet> {
        runtime.check_core(core)?;
        Ok(TensorSet { handle: SetHandle::new(&runtime.inner)?, core, stamp: stamp(), fits: [(0, 0); REMEMBERED] })
    }

    /// Adds a tensor under a model's name for it, or puts it in the place of the one with that name.
    ///
    /// # Errors
    /// [`NeuronError::Name`], [`NeuronError::WrongCore`], [`NeuronError::OtherRuntime`] with the set as it was;
    /// [`NeuronError::Call`], after which the set has no tensor of that name. What [`Runtime::usable`] says.
    pub fn insert(&mut self, name: &str, tensor: Arc<Tensor>) -> Result<()> {
        let c_name = c_name(name)?;
        if name.is_empty() {
            return Err(NeuronError::Name { name: String::new(), problem: "empty" });
        }
        if tensor.core() != self.core {
            return Err(NeuronError::WrongCore { tensor: name.into(), got: tensor.core(), needed: self.core });
        }
        self.stamp = stamp();
        self.fits = [(0, 0); REMEMBERED];
        self.handle.insert(c_name, tensor)
    }

    /// The tensor of that name.
    ///
    /// # Errors
    /// [`NeuronError::NoSuchTensor`], [`NeuronError::Name`]; [`NeuronError::Answer`] if the library has another; what
    /// [`Runtime::usable`] says.
    pub fn get(&self, name: &str) -> Result<&Arc<Tensor>> {
        self.handle.get(&c_name(name)?)?.ok_or_else(|| NeuronError::NoSuchTensor {
            tensor: name.into(),
            usage: None,
            known: self.names().collect(),
        })
    }

    /// The names, ascending.
    pub fn names(&self) -> impl Iterator<Item = String> + '_ {
        self.handle.members().iter().map(|(name, _)| name.to_string_lossy().into_owned())
    }

    /// The core it is for.
    pub fn core(&self) -> u32 {
        self.core
    }

    fn tensor(&self, at: usize) -> Option<&Arc<Tensor>> {
        self.handle.members().get(at).map(|(_, tensor)| tensor)
    }

    /// Asks that the set is for the model's core and has exactly the tensors it wants, each of its size.
    fn matches(&self, model: &Model, usage: Usage) -> Result<()> {
        if !Arc::ptr_eq(self.handle.runtime(), &model.runtime().inner) {
            return Err(NeuronError::OtherRuntime { tensor: format!("the set of {}s", usage.name()) });
        }
        if self.core != model.core() {
            let tensor = format!("the set of {}s", usage.name());
            return Err(NeuronError::WrongCore { tensor, got: self.core, needed: model.core() });
        }
        let wanted = model.io().side(usage);
        let missing = |d: &TensorDesc| NeuronError::MissingTensor { tensor: d.name.clone(), usage };
        let mut descs = wanted.iter();
        for (name, tensor) in self.handle.members() {
            let unknown = || NeuronError::NoSuchTensor {
                tensor: name.to_string_lossy().into_owned(),
                usage: Some(usage),
                known: wanted.iter().map(|d| d.name.clone()).collect(),
            };
            let desc = descs.next().ok_or_else(unknown)?;
            match desc.name.as_bytes().cmp(name.as_bytes()) {
                Ordering::Equal => {}
                Ordering::Less => return Err(missing(desc)),
                Ordering::Greater => return Err(unknown()),
            }
            if tensor.len() as u64 != desc.bytes {
                let (got, needed) = (tensor.len() as u64, desc.bytes);
                return Err(NeuronError::SizeMismatch { tensor: desc.name.clone(), got, needed });
            }
        }
        descs.next().map_or(Ok(()), |d| Err(missing(d)))
    }

    /// Asks that the two sets fit the model and each other. What was found to fit is remembered until one of the three
    /// changes, so that an execution compares a few numbers and no names.
    pub(super) fn verify(model: &Model, inputs: &TensorSet, outputs: &mut TensorSet) -> Result<()> {
        let this = (model.stamp(), inputs.stamp);
        if outputs.fits.contains(&this) {
            return Ok(());
        }
        inputs.matches(model, Usage::Input)?;
        outputs.matches(model, Usage::Output)?;
        let aliases = &model.io().aliases;
        for &(i, o) in aliases {
            let one = inputs.tensor(i).zip(outputs.tensor(o)).is_some_and(|(a, b)| Arc::ptr_eq(a, b));
            if !one {
                let input = model.io().inputs.get(i).map_or_else(String::new, |d| d.name.clone());
                return Err(NeuronError::NotAliased { input });
            }
        }
        // Nothing else may share memory with an output: who reads and writes first is open.
        for (o, (_, written)) in outputs.handle.members().iter().enumerate() {
            let others = inputs.handle.members().iter().enumerate().filter(|(i, _)| !aliases.contains(&(*i, o)));
            let later = outputs.handle.members().iter().skip(o + 1);
            for (_, other) in others.map(|(_, m)| m).chain(later) {
                if written.handle.overlaps(&other.handle) {
                    return Err(NeuronError::Overlap { from: other.name().into(), to: written.name().into() });
                }
            }
        }
        outputs.fits.rotate_right(1);
        outputs.fits[0] = this;
        Ok(())
    }
}
