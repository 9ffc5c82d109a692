#![doc = "trn-kernels"]
#![deny(unsafe_code)]

#[cfg(feature = "checkpoint")]
pub mod checkpoint;
mod error;
pub mod num;
pub mod quant;
mod view;

pub use error::{Error, Name, Result};
pub use view::{HeadsMut, HeadsRef, MatMut, MatRef};
