//! Every golden file, case by case from its manifest; `TRN_KERNELS_GOLDEN` names another directory with the same files.

mod support;

#[path = "golden_cases/layouts.rs"]
mod layouts;

#[path = "golden_cases/matmul.rs"]
mod matmul;
