//! Values to cached codes, one head vector at a time.
#![forbid(unsafe_code)]

use super::KvFormat;
use crate::error::Result;
use crate::num::{Format, Overflow, Real};
use crate::quant::{GlobalScale, Nvfp4Rule, ScaleRule, encode_mx_block, encode_nvfp4_block, pack_nibbles};
use half::{bf16, f16};

/// Encodes one head vector into its codes and block scales; slices fit the layout.
///
/// Plain formats round to nearest, ties to even. FP8: `rne_sat(x / scale)`, the quotient in f32. MX: each block by `rule`. NVFP4: each
/// block by [`Nvfp4Rule::ModelOpt`]. What is not finite stays visible: an FP8 code becomes NaN, a block gets a NaN scale and codes 0.
///
/// # Errors
/// None for scales that [`super::KvScale`] accepts: block encoders refuse only a global scale that is not positive and normal.
pub(super) fn encode<T: Real>(
    format: KvFormat,
    rule: ScaleRule,
    scale: f32,
    x: &[T],
    codes: &mut [u8],
    scales: &mut [u8],
) -> Result<()> {
    match format {
        KvFormat::F32 => words(x, codes, f32::to_le_bytes),
        KvFormat::Bf16 => words(x, codes, |x| bf16::from_f32(x).to_le_bytes()),
        KvFormat::F16 => words(x, codes, |x| f16::from_f32(x).to_le_bytes()),
        KvFormat::Fp8(element) => {
            let format = element.format();
            words(x, codes, |x| {
                // An infinity does not saturate to a number.
                let x = if x.is_finite() { x / scale } else { f32::NAN };
                [format.encode(x, Overflow::Saturate)]
            });
        }
        KvFormat::Mxfp8(element) => {
            for ((x, codes), scale) in x.as_chunks::<32>().0.iter().zip(codes.chunks_mut(32)).zip(scales) {
                *scale = encode_mx_block(element.format(), rule, x, codes)?.to_bits();
            }
        }
        KvFormat::Mxfp4 => {
            for ((x, codes), scale) in x.as_chunks::<32>().0.iter().zip(codes.chunks_mut(16)).zip(scales) {
                let mut one_each = [0; 32];
                *scale = encode_mx_block(Format::E2M1, rule, x, &mut one_each)?.to_bits();
                pack_nibbles(&one_each, codes);
            }
        }
        KvFormat::Nvfp4 => {
            for ((x, codes), block_scale) in x.as_chunks::<16>().0.iter().zip(codes.chunks_mut(8)).zip(scales) {
                let mut one_each = [0; 16];
                let global = GlobalScale::multiplier(scale);
                *block_scale = encode_nvfp4_block(Nvfp4Rule::ModelOpt, global, x, &mut one_each)?.to_bits();
                pack_nibbles(&one_each, codes);
            }
        }
    }
    Ok(())
}

fn words<const N: usize, T: Real>(x: &[T], codes: &mut [u8], encode: impl Fn(f32) -> [u8; N]) {
    for (to, &x) in codes.as_chunks_mut::<N>().0.iter_mut().zip(x) {
        *to = encode(x.to_f32());
    }
}
