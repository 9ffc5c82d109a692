//! The device for real: AWS's Neuron runtime, `libnrt`, found and loaded when the program asks for it.
//!
//! Nothing is needed to build, and nothing happens until [`Library::open`] or [`Runtime::init`] is called. [`probe()`] says in one
//! sentence whether this machine can run kernels, and what to do if not, without taking a core.
//!
//! ```no_run
//! use std::sync::Arc;
//! use trn_kernels::neuron::{Library, LoadOptions, Runtime, RuntimeOptions, TensorSet};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let library = Library::open(&LoadOptions::default())?;
//! let runtime = Runtime::init(&library, &RuntimeOptions::default())?; // takes the cores, for seconds
//! let model = runtime.load(&std::fs::read("kernel.neff")?, 0)?;
//! let side = |descs: &[trn_kernels::neuron::TensorDesc]| -> Result<TensorSet, Box<dyn std::error::Error>> {
//!     let mut set = TensorSet::new(&runtime, 0)?;
//!     for desc in descs {
//!         set.insert(&desc.name, Arc::new(runtime.allocate(0, usize::try_from(desc.bytes)?, &desc.name)?))?;
//!     }
//!     Ok(set)
//! };
//! let (inputs, mut outputs) = (side(model.inputs())?, side(model.outputs())?);
//! inputs.get("x")?.write(0, &[0; 64])?;
//! model.execute(&inputs, &mut outputs)?;
//! let mut y = vec![0; outputs.get("output_0")?.len()];
//! outputs.get("output_0")?.read(0, &mut y)?;
//! # Ok(())
//! # }
//! ```
//!
//! # What holds
//! * One runtime for a process. It is closed when the last of it, its models, tensors and sets is dropped, in any order.
//! * Anything the library would answer with a bare number is refused here first, by name.
//! * A call that fails leaves a typed error and never a result: outputs of failed executions cannot be read.
//! * After a fork, or when the device is lost, calls fail at once and drops leak. A drop never panics.
//!
//! # What is not bound
//! * `nrta_*`, the explicitly asynchronous calls: four incompatible prototypes went by the same names between SDK 2.27 and 2.30, a
//!   symbol's presence does not tell which it is, and the wrong guess is memory corruption. Threads give concurrency.
//! * `nrt_tensor_attach_buffer` and host or virtual placement: removed or on their way out.
//! * `nrt_execute_repeat`, which feeds outputs back as inputs; collectives; profiling, which the library also does by environment.
//!
//! `docs/neuron.md` has the search order, the version policies and every verdict with its remedy. Written from the public headers
//! and the developer guide, run against an emulated library; never run on a NeuronCore.
#![deny(unsafe_code)]

mod api;
mod dtype;
mod environment;
mod error;
mod io;
pub mod kernels;
mod load;
mod model;
pub mod neff;
mod probe;
mod runtime;
mod set;
mod status;
mod storage;
pub mod sys;
mod tensor;
pub mod trace;
mod version;

pub use api::{OPTIONAL_SYMBOLS, REQUIRED_SYMBOLS};
pub use dtype::{DeviceDtype, DtypeNumbering};
pub use environment::{VARIABLES, Variable};
pub use error::{NeuronError, Result, retry};
pub use io::{ALIAS_SUFFIX, Expected, ModelIo, TensorDesc, TensorTable, Usage};
pub use load::{LIBRARY_VARIABLE, Library, LoadOptions, Origin, SWITCH_VARIABLE};
pub use model::Model;
pub use probe::{Device, Found, ProbeOptions, ProbeReport, Verdict, probe};
pub use runtime::{DeviceMemory, Instance, Runtime, RuntimeOptions, Traffic};
pub use set::TensorSet;
pub use status::{Status, StatusClass};
pub use tensor::{Read, Tensor, Write};
pub use version::Version;
