#![doc = "trn-kernels"]
#![deny(unsafe_code)]

pub mod cpu;
mod error;
pub mod layer;
pub mod matmul;
pub mod num;
pub mod quant;
mod view;

pub use cpu::{Cpu, Isa, Parallelism, Workspace};
pub use error::{Error, Name, Result};
pub use view::{HeadsMut, HeadsRef, MatMut, MatRef};
