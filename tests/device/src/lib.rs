//! What the device tests share: private copies of the emulated libnrt, their control calls, the exported programs.
//!
//! Two copies of the file are two libraries with two states, so every test that makes its own [`Emulated`] is alone with it.
//! Control calls and behaviours are described in `tests/emulated-libnrt/README.md`.
#![deny(unsafe_code)]

pub mod child;
mod emulated;
#[path = "../../support/programs.rs"]
pub mod programs;
pub mod raw;
pub mod registry;
mod session;

pub use emulated::{Emulated, Kind, flag, shared_object};
pub use session::{BESIDE, Bound, Session, input_name, output_name};
