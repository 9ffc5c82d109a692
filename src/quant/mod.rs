//! What a quantized matrix is: schemes, scales, nibble order; encode, decode, and how much was lost.
//!
//! One scale direction everywhere: value = code x scale. Rows are what the matmul calls n (weights) or m (activations);
//! quantization blocks run along k, the contraction axis, which is contiguous in memory.
#![forbid(unsafe_code)]

mod experts;
mod matrix;
mod scheme;

pub use experts::QuantizedExperts;
pub use matrix::QuantizedMatrix;
pub(crate) use matrix::same_k;
pub use scheme::{GlobalScale, NibbleOrder, Scheme};
