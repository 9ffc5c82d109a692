//! A loaded NEFF.
#![forbid(unsafe_code)]

use super::error::Result;
use super::io::{Expected, ModelIo, TensorDesc, Usage};
use super::runtime::ModelHandle;
use super::set::stamp;
use super::{Runtime, TensorSet, neff};

/// A compiled kernel on one core. Unloaded when dropped.
///
/// Several threads may execute one model at once, each with sets of its own; [`Model::instances`] says how many help.
#[derive(Debug)]
pub struct Model {
    handle: ModelHandle,
    runtime: Runtime,
    core: u32,
    io: ModelIo,
    warnings: Vec<String>,
    /// Changes with `io`.
    stamp: u64,
}

impl Runtime {
    /// Loads a NEFF on a core of this process and asks what it takes and gives. The bytes are not needed afterwards.
    ///
    /// # Errors
    /// [`NeuronError::Neff`](super::NeuronError::Neff) if they are none, [`NeuronError::NoSuchCore`](super::NeuronError::NoSuchCore)
    /// before the library is called; [`NeuronError::Call`](super::NeuronError::Call),
    /// [`NeuronError::Answer`](super::NeuronError::Answer); what [`Runtime::usable`] says. A NEFF made for another device answers
    /// as [`Status::HW_ERROR`](super::Status::HW_ERROR) or [`Status::FAILURE`](super::Status::FAILURE); the former is also what a
    /// broken device answers, so the runtime counts as lost then.
    pub fn load(&self, neff: &[u8], core: u32) -> Result<Model> {
        neff::Header::parse(neff)?;
        let handle = ModelHandle::load(&self.inner, neff, core)?;
        let io = handle.io()?;
        Ok(Model { handle, runtime: self.clone(), core, io, warnings: Vec::new(), stamp: stamp() })
    }
}

impl Model {
    /// What it reads, by ascending name. The input half of a tensor that is updated in place is called `NAME.must_alias_input`.
    pub fn inputs(&self) -> &[TensorDesc] {
        &self.io.inputs
    }

    /// What it writes, by ascending name.
    pub fn outputs(&self) -> &[TensorDesc] {
        &self.io.outputs
    }

    /// Both sides and the in-place pairs.
    pub fn io(&self) -> &ModelIo {
        &self.io
    }

    /// Compares one tensor with what is known from where the kernel was made: see [`ModelIo::expect`]. A difference of the
    /// reported type joins [`Model::warnings`]; a size that this runtime is known to report wrong is put right.
    ///
    /// # Errors
    /// [`NeuronError::NoSuchTensor`](super::NeuronError::NoSuchTensor),
    /// [`NeuronError::SizeMismatch`](super::NeuronError::SizeMismatch).
    pub fn expect(&mut self, usage: Usage, name: &str, expected: &Expected) -> Result<()> {
        self.warnings.extend(self.io.expect(self.runtime.version(), usage, name, expected)?);
        self.stamp = stamp();
        Ok(())
    }

    /// What was odd and is not an error.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Runs the model and returns when the outputs are there. Allocates nothing, and compares names and sizes only when a set
    /// changed since it was last found to fit.
    ///
    /// Success does not mean that no output is not-a-number: the runtime's check is off by default.
    ///
    /// # Errors
    /// Before anything runs: [`OtherRuntime`](super::NeuronError::OtherRuntime), [`WrongCore`](super::NeuronError::WrongCore),
    /// [`MissingTensor`](super::NeuronError::MissingTensor), [`NoSuchTensor`](super::NeuronError::NoSuchTensor) (one too many),
    /// [`SizeMismatch`](super::NeuronError::SizeMismatch), [`NotAliased`](super::NeuronError::NotAliased),
    /// [`Overlap`](super::NeuronError::Overlap) (an output in the memory of another tensor),
    /// [`Untrusted`](super::NeuronError::Untrusted) (an input that a failed execution was to write); what [`Runtime::usable`]
    /// says. [`Call`](super::NeuronError::Call) with the status of the execution: the outputs are in doubt then, unless the
    /// status is [retryable](super::StatusClass::Retryable) and nothing ran ([`retry`](super::retry)).
    pub fn execute(&self, inputs: &TensorSet, outputs: &mut TensorSet) -> Result<()> {
        TensorSet::verify(self, inputs, outputs)?;
        self.handle.execute(&inputs.handle, &mut outputs.handle)
    }

    /// How many threads are worth executing at once, if the library tells.
    ///
    /// # Errors
    /// [`NeuronError::Call`](super::NeuronError::Call); what [`Runtime::usable`] says.
    pub fn instances(&self) -> Result<Option<u32>> {
        self.handle.instances()
    }

    /// The core it is on, counted within the visible ones.
    pub fn core(&self) -> u32 {
        self.core
    }

    /// The runtime it belongs to.
    pub fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    pub(super) fn stamp(&self) -> u64 {
        self.stamp
    }
}
