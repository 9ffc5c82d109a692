//! The device path case by case, through the safe runtime on the emulated library. `tests/device/README.md` maps the numbers of the
//! cases to tests, those elsewhere included. Each test has a copy of the library of its own, so they run side by side.
#![deny(unsafe_code)]

mod faults;
mod lifecycle;
mod model_io;
mod probe;
mod process;
mod tensors;
mod threads;
