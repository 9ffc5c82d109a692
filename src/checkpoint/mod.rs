//! What is on disk: safetensors and GGUF tensors, handed out as [`QuantizedMatrix`](crate::quant::QuantizedMatrix) and
//! [`QuantizedExperts`](crate::quant::QuantizedExperts) without copying where the bytes allow.
//!
//! | to read | use |
//! | --- | --- |
//! | one safetensors file, or a folder of them with or without an index | [`Checkpoint`] |
//! | one linear layer in any of the known quantized layouts | [`Checkpoint::linear`] |
//! | FP8 KV cache scales | [`Checkpoint::kv_scales`] |
//! | a gpt-oss model, Hugging Face or original naming | [`GptOss`] |
//! | a GGUF file | [`Gguf`] |
//!
//! Files are hostile until proven otherwise: extents, offsets and counts are checked against the file's length before
//! anything is allocated, and no input makes a function of this module panic. What is *not* looked at on opening are the
//! codes themselves: a NaN block scale stays and makes NaN of what it touches. Who does not trust the weights calls
//! [`QuantizedMatrix::check_finite`](crate::quant::QuantizedMatrix::check_finite), which reads every byte.
//!
//! Shapes are row-major with the slowest axis first, `[out, in]` for a weight; all values are little-endian.
#![deny(unsafe_op_in_unsafe_fn)]

mod bytes;
mod files;
pub mod gguf;
mod gpt_oss;
mod header;
mod kv_scales;
mod linear;
mod map;
mod quant_config;
mod tensor;

pub use files::Checkpoint;
pub use gguf::Gguf;
pub use gpt_oss::{Dense, Experts, GptOss, GptOssConfig, GptOssLayer, Yarn};
pub use kv_scales::KvScales;
pub use linear::Linear;
pub use safetensors::Dtype;
pub use tensor::Tensor;

use crate::error::Error;

/// A problem with a file or a tensor.
fn bad(at: impl Into<String>, problem: impl Into<String>) -> Error {
    Error::Checkpoint { at: at.into(), problem: problem.into() }
}

/// The error of a quantized matrix, with the tensor's name in place of the operand's.
fn named(mut e: Error, codes: &str, scale: &str) -> Error {
    match &mut e {
        Error::Length { operand, .. }
        | Error::Extent { operand, .. }
        | Error::Multiple { operand, .. }
        | Error::Overflow { operand }
        | Error::Empty { operand, .. }
        | Error::Value { operand, .. } => {
            *operand = if operand.contains("scale") { scale } else { codes }.to_owned().into();
        }
        _ => {}
    }
    e
}
