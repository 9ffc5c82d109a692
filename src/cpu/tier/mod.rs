//! One file for each instruction set a kernel is compiled for.

pub(super) mod portable;
