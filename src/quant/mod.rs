//! What a quantized matrix is: schemes, scales, nibble order; encode, decode, and how much was lost.
//!
//! One scale direction everywhere: value = code x scale. Rows are what the matmul calls n (weights) or m (activations);
//! quantization blocks run along k, the contraction axis, which is contiguous in memory.
#![forbid(unsafe_code)]

mod buffer;
mod encode;
mod experts;
mod matrix;
mod nvfp4;
mod quantize;
mod repack;
mod report;
mod rule;
mod scheme;

pub use buffer::QuantizedMatrixBuf;
pub use encode::encode_mx_block;
pub(crate) use encode::pack_nibbles;
pub use experts::QuantizedExperts;
pub use matrix::QuantizedMatrix;
pub(crate) use matrix::{finite, same_k};
pub use nvfp4::{Nvfp4Rule, encode_nvfp4_block, encode_ue4m3};
pub use quantize::{QuantizeOptions, quantize, quantize_into};
pub use repack::{mxfp4_from_gguf, mxfp4_to_gguf, nvfp4_from_gguf, repack_nibbles};
pub use report::QuantizationError;
pub use rule::ScaleRule;
pub use scheme::{GlobalScale, NibbleOrder, Scheme};
