//! Runs exported device programs on this crate's own codecs: a second, independent reading of the instruction set.
//!
//! After its Python loops have run, an NKI kernel is a flat list of instructions. `kernels/trace.py` exports that list from
//! the simulator (`kernels/programs/*.json`); this module loads it, checks it and executes it without Python. It is written
//! from the documented API, not from the simulator, so that where the two agree both had to read the documents alike.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use trn_kernels::trainium::emulator::{Limits, Options, Program};
//! # let json = br#"{"format":"trn-kernels.program.1","kernel":"copy","example":"e","target":"trn2","sources":{},"parameters":{},
//! # "inputs":[{"name":"x","tensor":0}],"outputs":[{"name":"output_0","tensor":1}],
//! # "tensors":[{"name":"x","shape":[2],"dtype":"uint8","buffer":"private_hbm"},
//! # {"name":"","shape":[2],"dtype":"uint8","buffer":"shared_hbm"}],
//! # "instructions":[{"name":"dma_copy","engine":"dma","writes":{"dst":[1,"uint8",0,[[1,2]]]},
//! # "reads":{"src":[0,"uint8",0,[[1,2]]]},"attrs":{}}]}"#;
//! let program = Program::from_json(json, &Limits::default())?; // a file of kernels/programs
//! let outputs = program.run(&[&[7, 8]], &Options::default())?;
//! assert_eq!(outputs, [[7, 8]]);
//! # Ok(())
//! # }
//! ```
//!
//! It is strict: what the documents leave open is a [`Fault`], what they state in two ways is an [option](Options). A program
//! is untrusted input: any bytes give a program or a fault, never a panic, and sizes are checked before anything is
//! allocated for them.
//!
//! Nothing here was compared with a NeuronCore.
#![forbid(unsafe_code)]

mod alu;
mod args;
mod check;
mod dtype;
mod exec;
mod fault;
mod load;
mod machine;
mod memory;
mod op;
mod op_rare;
mod program;
mod rules;
mod rules_rare;

pub use crate::trainium::{Dtype, Target};
pub use fault::{Fault, Result, Rule};
pub use load::Limits;
pub use machine::Options;
pub use program::{Access, Buffer, Dynamic, Engine, Instruction, Operand, Port, Program, Source, Tensor};
