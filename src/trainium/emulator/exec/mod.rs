//! What the instructions do, by kind.
#![forbid(unsafe_code)]

pub(super) mod arithmetic;
pub(super) mod copy;
pub(super) mod dma;
pub(super) mod matmul;
pub(super) mod mx;
mod reduce;
pub(super) mod register;
pub(super) mod running;
pub(super) mod search;
pub(super) mod select;

use super::dtype::Dtype;
use super::fault::Result;
use super::memory::Elements;

/// Elements of one type as another: bit for bit between equal types, through f32 otherwise. An element with an undefined
/// byte is undefined as a whole after a conversion.
fn converted(from: &Elements, source: Dtype, target: Dtype) -> Result<Elements> {
    if source == target {
        return Ok(from.clone());
    }
    let mut out = Elements::defined(Vec::with_capacity(from.bits.len()));
    for (i, &bits) in from.bits.iter().enumerate() {
        out.bits.push(if from.undefined(i) == 0 { target.round(source.to_f32(bits))? } else { 0 });
    }
    if !from.undefined.is_empty() {
        out.undefined = from.undefined.iter().map(|&u| if u == 0 { 0 } else { 0xF }).collect();
    }
    Ok(out)
}
