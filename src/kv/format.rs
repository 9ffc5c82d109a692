//! What a cached number is.
#![forbid(unsafe_code)]

use crate::cpu::flush;
use crate::error::{Error, Result, length, multiple};
use crate::num::{E8M0, F4E2M1x2, F8E4M3Fn, Fp8};
use half::{bf16, f16};
use std::borrow::Cow;

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvFormat {
    /// f32, little-endian.
    F32,
    /// bf16, little-endian.
    Bf16,
    /// f16, little-endian.
    F16,
    /// FP8 codes; value = code x the f32 scale of the tensor or of the kv head ([`KvScale`]).
    Fp8(Fp8),
    /// FP8 codes, one E8M0 scale for each 32 along head_dim.
    Mxfp8(Fp8),
    /// FP4 codes, low nibble first, one E8M0 scale for each 32 along head_dim.
    Mxfp4,
    /// FP4 codes, low nibble first, one E4M3FN scale for each 16 along head_dim, and the f32 scale of the tensor or of the kv
    /// head ([`KvScale`]).
    Nvfp4,
}

impl KvFormat {
    /// Elements along head_dim that share a block scale: 32 (MX), 16 (NVFP4), 1 (no block scale). head_dim must be a multiple.
    pub const fn block(self) -> usize {
        match self {
            KvFormat::Mxfp8(_) | KvFormat::Mxfp4 => 32,
            KvFormat::Nvfp4 => 16,
            _ => 1,
        }
    }

    /// Whether values take an f32 scale beside the codes.
    pub const fn has_scale(self) -> bool {
        matches!(self, KvFormat::Fp8(_) | KvFormat::Nvfp4)
    }

    /// Whether attention rounds its weights to bf16 before it multiplies them with V (design: for bf16 and all quantized V).
    pub(crate) const fn rounds_weights(self) -> bool {
        !matches!(self, KvFormat::F32 | KvFormat::F16)
    }

    /// Bytes of the codes of `head_dim` elements; `None` on overflow. FP4 needs an even head_dim, which its block gives.
    pub(crate) const fn code_bytes(self, head_dim: usize) -> Option<usize> {
        match self {
            KvFormat::F32 => head_dim.checked_mul(4),
            KvFormat::Bf16 | KvFormat::F16 => head_dim.checked_mul(2),
            KvFormat::Fp8(_) | KvFormat::Mxfp8(_) => Some(head_dim),
            KvFormat::Mxfp4 | KvFormat::Nvfp4 => Some(head_dim / 2),
        }
    }

    /// Block scales (one byte each) of `head_dim` elements.
    pub(crate) const fn scale_bytes(self, head_dim: usize) -> usize {
        match self.block() {
            1 => 0,
            block => head_dim / block,
        }
    }

    /// Asks that head_dim be a multiple of the block.
    pub(crate) fn check_head_dim(self, axis: &'static str, head_dim: usize) -> Result<()> {
        if head_dim == 0 {
            return Err(Error::Empty { operand: "kv cache".into(), axis });
        }
        multiple("kv cache", axis, head_dim, self.block())
    }

    /// Decodes one head vector: element x block scale, without the f32 scale, subnormals flushed. Slices fit the layout.
    ///
    /// A block scale that is NaN, or an NVFP4 one with the sign bit (not a legal code), makes its block NaN.
    pub(crate) fn decode(self, codes: &[u8], scales: &[u8], out: &mut [f32]) {
        match self {
            KvFormat::F32 => words(codes, out, |b| flush(f32::from_le_bytes(b))),
            KvFormat::Bf16 => words(codes, out, |b| flush(bf16::from_le_bytes(b).to_f32())),
            KvFormat::F16 => words(codes, out, |b| f16::from_le_bytes(b).to_f32()),
            KvFormat::Fp8(element) => {
                let values = element.values();
                words(codes, out, |[code]: [u8; 1]| values[code as usize]);
            }
            KvFormat::Mxfp8(element) => {
                let values = element.values();
                for ((codes, out), &scale) in codes.chunks(32).zip(out.chunks_mut(32)).zip(scales) {
                    let scale = E8M0::from_bits(scale).to_f32();
                    words(codes, out, |[code]: [u8; 1]| flush(values[code as usize] * scale));
                }
            }
            KvFormat::Mxfp4 => fp4(codes, scales, 32, out, |s| E8M0::from_bits(s).to_f32()),
            KvFormat::Nvfp4 => fp4(codes, scales, 16, out, nvfp4_scale),
        }
    }
}

/// Value of an NVFP4 block scale; a sign bit is not legal and reads as NaN.
pub(crate) fn nvfp4_scale(code: u8) -> f32 {
    if code >= 0x80 { f32::NAN } else { F8E4M3Fn::from_bits(code).to_f32() }
}

fn words<const N: usize>(bytes: &[u8], out: &mut [f32], value: impl Fn([u8; N]) -> f32) {
    let (words, _) = bytes.as_chunks::<N>();
    for (y, word) in out.iter_mut().zip(words) {
        *y = value(*word);
    }
}

fn fp4(codes: &[u8], scales: &[u8], block: usize, out: &mut [f32], value: impl Fn(u8) -> f32) {
    for ((codes, out), &scale) in codes.chunks(block / 2).zip(out.chunks_mut(block)).zip(scales) {
        let scale = value(scale);
        for (pair, byte) in out.as_chunks_mut::<2>().0.iter_mut().zip(codes) {
            *pair = F4E2M1x2::from_bits(*byte).to_f32().map(|x| flush(x * scale));
        }
    }
}

/// The f32 scales of cached keys or values: value = code x scale.
///
/// [`KvFormat::Fp8`] and [`KvFormat::Nvfp4`] take one; every other format takes [`KvScale::One`]. Scales are positive normal
/// f32: data is divided by them.
#[derive(Debug, Clone, PartialEq)]
pub enum KvScale<'a> {
    /// No scale, written out.
    One,
    /// One for all heads (vLLM's `k_scale`, `v_scale`).
    Tensor(f32),
    /// One for each kv head: `[num_kv_heads]`.
    Head(Cow<'a, [f32]>),
}

impl KvScale<'_> {
    /// The scale of kv head `head`; callers have checked the number of heads.
    pub(crate) fn of(&self, head: usize) -> f32 {
        match self {
            KvScale::One => 1.0,
            KvScale::Tensor(scale) => *scale,
            KvScale::Head(scales) => scales.get(head).copied().unwrap_or(f32::NAN),
        }
    }

    /// Asks that the scale fit the format and the number of heads.
    pub(crate) fn check(&self, operand: &'static str, format: KvFormat, heads: usize) -> Result<()> {
        let scales = match self {
            KvScale::One => return Ok(()),
            KvScale::Tensor(scale) => std::slice::from_ref(scale),
            KvScale::Head(scales) => {
                length(operand, scales.len(), heads)?;
                &scales[..]
            }
        };
        if !format.has_scale() {
            let because = format!("{format:?} stores no f32 scale; use KvScale::One");
            return Err(Error::Unexpected { operand: operand.into(), because: because.into() });
        }
        match scales.iter().position(|s| !(s.is_normal() && *s > 0.0)) {
            None => Ok(()),
            Some(at) => Err(Error::Value {
                operand: operand.into(),
                at,
                got: scales[at].to_string(),
                needed: "a positive normal scale",
            }),
        }
    }

    /// The same scales, owned.
    pub fn into_owned(self) -> KvScale<'static> {
        match self {
            KvScale::One => KvScale::One,
            KvScale::Tensor(scale) => KvScale::Tensor(scale),
            KvScale::Head(scales) => KvScale::Head(scales.into_owned().into()),
        }
    }

    /// The same scales, borrowed.
    pub(crate) fn as_ref(&self) -> KvScale<'_> {
        match self {
            KvScale::One => KvScale::One,
            KvScale::Tensor(scale) => KvScale::Tensor(*scale),
            KvScale::Head(scales) => KvScale::Head(Cow::Borrowed(scales)),
        }
    }
}
