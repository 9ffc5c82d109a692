//! A runtime on a private copy of the emulated library, and a program with its tensors bound.

use crate::programs::Checked;
use crate::{Emulated, Kind};
use std::sync::Arc;
use trn_kernels::neuron::{
    ALIAS_SUFFIX, Library, LoadOptions, Model, Result, Runtime, RuntimeOptions, Tensor, TensorSet, neff,
};
use trn_kernels::trainium::emulator::{Options, Port, Program};

/// Options under which each test of a process has a library of its own.
pub const BESIDE: RuntimeOptions = RuntimeOptions { beside_other_libraries: true, on_drop_failure: None };

/// An initialised runtime. Dropped from the top: the runtime closes before the library goes.
pub struct Session {
    /// The runtime.
    pub runtime: Runtime,
    /// Its library, with its control calls.
    pub emulated: Emulated,
}

impl Default for Session {
    fn default() -> Self {
        Session::open()
    }
}

impl Session {
    /// On a fresh copy.
    pub fn open() -> Session {
        Session::on(Emulated::new())
    }

    /// On this copy.
    pub fn on(emulated: Emulated) -> Session {
        let runtime = Runtime::init(&emulated.open(), &BESIDE).expect("a runtime");
        Session { runtime, emulated }
    }

    /// A program on a core, with tensors of its own and its recorded inputs written.
    pub fn bind(&self, checked: &Checked, core: u32) -> Bound {
        Bound::new(&self.runtime, checked, core).expect("a bound program")
    }

    /// Closes the runtime and panics if anything is alive, was violated, or if it was closed twice.
    pub fn end(self) {
        self.runtime.close().expect("the last holder");
        self.emulated.assert_clean();
        assert_eq!(self.emulated.calls("nrt_close"), 1);
    }

    /// Panics unless exactly `n` objects are alive and nothing was violated.
    pub fn assert_live(&self, n: u64) {
        self.emulated.assert_no_violation();
        assert_eq!(self.emulated.live(Kind::Everything), n);
    }
}

impl Emulated {
    /// The copy as the crate opens it, whatever the environment says.
    pub fn open(&self) -> Library {
        let options = LoadOptions { path: Some(self.path()), environment: false };
        Library::open(&options).expect("the emulated library")
    }
}

/// The library's name for an input of a program.
pub fn input_name(program: &Program, port: &Port) -> String {
    let in_place = program.outputs().iter().any(|o| o.tensor == port.tensor);
    if in_place { format!("{}{ALIAS_SUFFIX}", port.name) } else { port.name.clone() }
}

/// The library's name for an output of a program: the input's, if it is updated in place.
pub fn output_name(program: &Program, port: &Port) -> String {
    program.inputs().iter().find(|i| i.tensor == port.tensor).unwrap_or(port).name.clone()
}

/// A loaded program and tensors for its inputs and outputs.
pub struct Bound {
    /// The model; threads may share it.
    pub model: Arc<Model>,
    /// Its inputs.
    pub inputs: TensorSet,
    /// Its outputs.
    pub outputs: TensorSet,
    /// Names and bytes of the outputs, as the emulator gives them for the recorded inputs.
    pub wanted: Vec<(String, Vec<u8>)>,
}

impl Bound {
    /// Loads, allocates, binds and writes.
    ///
    /// # Errors
    /// The first of those that fails.
    pub fn new(runtime: &Runtime, checked: &Checked, core: u32) -> Result<Bound> {
        let model = runtime.load(&neff::emulated(&checked.json, false).expect("a NEFF"), core)?;
        Bound::of(Arc::new(model), checked)
    }

    /// Allocates, binds and writes for a model of the program.
    ///
    /// # Errors
    /// The first of those that fails.
    pub fn of(model: Arc<Model>, checked: &Checked) -> Result<Bound> {
        let (program, runtime, core) = (&checked.program, &model.runtime().clone(), model.core());
        let (mut inputs, mut outputs) = (TensorSet::new(runtime, core)?, TensorSet::new(runtime, core)?);
        for (port, bytes) in program.inputs().iter().zip(checked.inputs()) {
            let tensor = Arc::new(runtime.allocate(core, bytes.len(), &port.name)?);
            tensor.write(0, &bytes)?;
            inputs.insert(&input_name(program, port), tensor)?;
        }
        let mut wanted = vec![];
        for (port, bytes) in program.outputs().iter().zip(checked.run(&Options::default())) {
            let shared = program.inputs().iter().find(|i| i.tensor == port.tensor);
            let tensor = match shared {
                Some(input) => Arc::clone(inputs.get(&input_name(program, input))?),
                None => Arc::new(runtime.allocate(core, bytes.len(), &port.name)?),
            };
            outputs.insert(&output_name(program, port), tensor)?;
            wanted.push((output_name(program, port), bytes));
        }
        Ok(Bound { model, inputs, outputs, wanted })
    }

    /// Runs it.
    ///
    /// # Errors
    /// As [`Model::execute`].
    pub fn execute(&mut self) -> Result<()> {
        self.model.execute(&self.inputs, &mut self.outputs)
    }

    /// An output's tensor.
    pub fn output(&self, at: usize) -> &Arc<Tensor> {
        self.outputs.get(&self.wanted[at].0).expect("an output")
    }

    /// What an output holds.
    ///
    /// # Errors
    /// As [`Tensor::read`].
    pub fn read(&self, at: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.wanted[at].1.len()];
        self.outputs.get(&self.wanted[at].0)?.read(0, &mut bytes)?;
        Ok(bytes)
    }

    /// Runs it and panics unless every output has the emulator's bits.
    pub fn assert_runs(&mut self) {
        self.execute().expect("an execution");
        for (at, (name, wanted)) in self.wanted.iter().enumerate() {
            assert!(self.read(at).expect("an output") == *wanted, "{name} differs from the emulator");
        }
    }
}
