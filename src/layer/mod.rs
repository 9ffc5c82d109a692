//! What a transformer layer needs between its matmuls and its attention: norms, rotary positions, gated activations, the
//! expert router and the sum of its experts, and token ids in and out.
//!
//! Every function defines its numbers: f32 arithmetic in a stated order with [`num::math`](crate::num::math) for `exp`, each
//! output rounded once. So the bits are equal on every CPU, tier and number of threads, and a row has the same bits alone or in
//! a batch. Each states an error bound; `u` is 2^-24, the unit roundoff of f32. NaN in gives NaN out (the one NaN 0x7FC00000,
//! rounded) in every output it touches. The functions that take a [`Cpu`](crate::Cpu) work row by row and split rows over its threads.
#![forbid(unsafe_code)]

mod experts;
mod norm;
mod residual;
mod rope;
mod router;
mod rows;
mod swiglu;
mod tokens;

pub use experts::combine_experts;
pub use norm::{rms_norm, rms_norm_quantize};
pub use residual::add;
pub use rope::{RopeFrequencies, RopePairs, RopeScaling, RopeTable};
pub use router::{RouterMode, route_top_k};
pub use swiglu::{GateLayout, SwigluSpec, swiglu};
pub use tokens::{argmax, embed};

use crate::error::{Error, Result};

/// Asks that a parameter be what `holds` says.
fn parameter(operand: &'static str, value: f64, holds: bool, needed: &'static str) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Value { operand: operand.into(), at: 0, got: value.to_string(), needed }) }
}
