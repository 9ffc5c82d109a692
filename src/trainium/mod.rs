//! The device on paper: what its memories and engines are, how tensors lie in them, what a problem must cost.
//!
//! Pure data: nothing here calls a driver. [`chip`] is the table of documented constants, [`layout`] turns checkpoint weights into
//! the tensors that the kernels in `kernels/` read from HBM and back, [`roofline`] says what bounds a problem. With the feature
//! `emulator`, `emulator` runs exported device programs and `cost` says what a chip would take for one.
#![forbid(unsafe_code)]

pub mod chip;
#[cfg(feature = "emulator")]
pub mod cost;
mod dtype;
#[cfg(feature = "emulator")]
pub mod emulator;
pub mod layout;
#[cfg(feature = "manifest")]
pub mod manifest;
pub mod roofline;
mod target;

pub use chip::{Chip, MatmulMode};
pub use dtype::Dtype;
pub use target::Target;
