//! `y = x w^T` from quantized operands: dense, grouped (rows sorted by expert) and gathered (token x top-k ids).
//!
//! Shapes: activations x `[m, k]`, weights w `[n, k]`, outputs y `[m, n]`, all row-major. The arithmetic is stated in
//! `docs/numerics.md`; [`oracle`] is the same product in f64 with the bound within which every result must lie.
#![forbid(unsafe_code)]

mod amx;
mod batch;
#[cfg(test)]
mod caches;
mod check;
mod checksum;
mod coding;
mod decode;
mod dense;
mod driver;
mod epilogue;
mod experts;
mod explain;
mod facts;
mod file;
mod layout;
mod load;
mod operand;
pub mod oracle;
mod pack;
mod packed;
mod prefill;
mod terms;
mod tiles;

pub use epilogue::{Activation, MatmulOptions};
pub use experts::{PackedExperts, RowSource};
pub use explain::MatmulProblem;
pub use layout::PackedLayout;
pub use operand::{Activations, Output};
pub use packed::PackedMatrix;
