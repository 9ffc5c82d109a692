#![doc = "trn-kernels"]
#![deny(unsafe_code)]

mod error;
pub mod num;
pub mod quant;
mod view;

pub use error::{Error, Name, Result};
pub use view::{HeadsMut, HeadsRef, MatMut, MatRef};
