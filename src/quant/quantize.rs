//! Whole matrices: weights offline, activations online.
#![forbid(unsafe_code)]

use super::buffer::QuantizedMatrixBuf;
use super::encode::{encode_mx_block, encode_with, finite_amax, pack_nibbles};
use super::nvfp4::{Nvfp4Rule, check_global, encode_nvfp4_block};
use super::rule::ScaleRule;
use super::scheme::{GlobalScale, Scheme};
use crate::error::{Error, Result, mul, multiple};
use crate::num::{Format, Fp8, Real};
use crate::view::MatRef;
use half::bf16;

/// How to quantize, beyond the [`Scheme`]. The default is OCP's rule for MX, ModelOpt's for NVFP4, and scales from the data.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct QuantizeOptions {
    /// From amax to scale, for the MX schemes.
    pub rule: ScaleRule,
    /// From amax to scales, for NVFP4.
    pub nvfp4: Nvfp4Rule,
    /// [`Scheme::Fp8PerTensor`] only: the scale to use (a checkpoint's `input_scale`) instead of amax / max. A positive,
    /// finite multiplier; elements beyond scale x max saturate.
    pub static_scale: Option<f32>,
    /// [`Scheme::Nvfp4`] only: the global scale to use (`input_scale`, `input_global_scale`) instead of one from amax. A
    /// positive normal multiplier; blocks beyond its range saturate.
    pub global: Option<GlobalScale>,
}

/// Quantizes `x` (`[n, k]`: weights by output channel, or activations by token) along k.
///
/// * [`Scheme::Bf16`]: each element to the nearest bf16, ties to even.
/// * MX: each 32 along a row by [`encode_mx_block`].
/// * NVFP4: each 16 along a row by [`encode_nvfp4_block`] under one global scale, given or from the largest finite magnitude.
/// * FP8 with f32 scales: `scale = amax / max` over the tensor, row or tile (`max` of the element; amax over finite values),
///   then `code = nearest(x / scale)`, saturating; both divisions in f32. A group of zeros has scale 1; no scale is below
///   2^-126. A NaN or an infinity becomes the element's NaN.
///
/// So what is not finite decodes to NaN in every scheme: the element itself (FP8, bf16; bf16 keeps infinities), or its whole
/// block (MX, NVFP4).
///
/// # Errors
/// [`Error::Empty`] if k is 0 or a tile has no extent; [`Error::Multiple`] unless k is a multiple of the scheme's block;
/// [`Error::Unexpected`] for an option that the scheme has no use for; [`Error::Value`] for a given scale that is not a
/// positive number; [`Error::Overflow`].
pub fn quantize<T: Real>(x: MatRef<'_, T>, scheme: Scheme, options: &QuantizeOptions) -> Result<QuantizedMatrixBuf> {
    let mut out = QuantizedMatrixBuf::new();
    quantize_into(x, scheme, options, &mut out)?;
    Ok(out)
}

/// [`quantize`] into a buffer the caller keeps, which allocates only if its capacity is too small.
///
/// # Errors
/// As [`quantize`]; `out` is unchanged then.
pub fn quantize_into<T: Real>(
    x: MatRef<'_, T>,
    scheme: Scheme,
    options: &QuantizeOptions,
    out: &mut QuantizedMatrixBuf,
) -> Result<()> {
    let (n, k) = (x.rows(), x.cols());
    let sizes = validate(n, k, scheme, options)?;
    out.scheme = scheme;
    out.n = n;
    out.k = k;
    out.global = GlobalScale::ONE;
    out.codes.resize(sizes.codes, 0);
    out.block_scales.resize(sizes.block_scales, 0);
    out.outer_scales.clear();
    out.outer_scales.resize(sizes.outer_scales, 0.0);
    match scheme {
        Scheme::Bf16 => round_to_bf16(x, &mut out.codes),
        Scheme::Mxfp4 => blocks::<T, 32>(x, out, Packing::Nibbles, |x, codes| {
            Ok(encode_mx_block(Format::E2M1, options.rule, x, codes)?.to_bits())
        })?,
        Scheme::Mxfp8(element) => blocks::<T, 32>(x, out, Packing::Bytes, |x, codes| {
            Ok(encode_mx_block(element.format(), options.rule, x, codes)?.to_bits())
        })?,
        Scheme::Nvfp4 => {
            let global = options.global.unwrap_or_else(|| options.nvfp4.global_scale(matrix_amax(x)));
            out.global = global;
            blocks::<T, 16>(x, out, Packing::Nibbles, |x, codes| {
                Ok(encode_nvfp4_block(options.nvfp4, global, x, codes)?.to_bits())
            })?;
        }
        Scheme::Fp8PerTensor(element) => {
            match options.static_scale {
                Some(scale) => out.outer_scales.fill(scale),
                None => tile_scales(element, x, (n.max(1), k), &mut out.outer_scales),
            }
            tile_codes(element, x, (n.max(1), k), out);
        }
        Scheme::Fp8PerChannel(element) => {
            tile_scales(element, x, (1, k), &mut out.outer_scales);
            tile_codes(element, x, (1, k), out);
        }
        Scheme::Fp8Blockwise { element, n: rows, k: cols } => {
            tile_scales(element, x, (rows, cols), &mut out.outer_scales);
            tile_codes(element, x, (rows, cols), out);
        }
    }
    Ok(())
}

/// Lengths of a matrix's planes, in bytes and in scales.
struct Sizes {
    codes: usize,
    block_scales: usize,
    outer_scales: usize,
}

fn validate(n: usize, k: usize, scheme: Scheme, options: &QuantizeOptions) -> Result<Sizes> {
    const INPUT: &str = "matrix to quantize";
    // With columns, the slice behind the matrix bounds n.
    if k == 0 {
        return Err(Error::Empty { operand: INPUT.into(), axis: "k" });
    }
    multiple(INPUT, "k", k, scheme.block())?;
    let outer_scales = match scheme {
        Scheme::Fp8PerTensor(_) => 1,
        Scheme::Fp8PerChannel(_) => n,
        Scheme::Fp8Blockwise { n: rows, k: cols, .. } => {
            for (extent, axis) in [(rows, "n"), (cols, "k")] {
                if extent == 0 {
                    return Err(Error::Empty { operand: "scale tile".into(), axis });
                }
            }
            mul("scales", n.div_ceil(rows), k.div_ceil(cols))?
        }
        _ => 0,
    };
    if let Some(scale) = options.static_scale {
        wanted("static scale", matches!(scheme, Scheme::Fp8PerTensor(_)), "only the per-tensor FP8 scheme has one")?;
        if !(scale.is_finite() && scale > 0.0) {
            let needed = "a finite positive scale";
            return Err(Error::Value { operand: "static scale".into(), at: 0, got: scale.to_string(), needed });
        }
    }
    if let Some(global) = options.global {
        wanted("global scale", matches!(scheme, Scheme::Nvfp4), "only NVFP4 has one")?;
        check_global(global)?;
    }
    let block_scales = if scheme.block() > 1 { mul("block scales", n, k / scheme.block())? } else { 0 };
    // k is a multiple of two where codes are nibbles.
    let row_bytes = mul("codes", k, scheme.bits())? / 8;
    Ok(Sizes { codes: mul("codes", n, row_bytes)?, block_scales, outer_scales })
}

/// Refuses an option the scheme has no use for.
fn wanted(operand: &'static str, used: bool, because: &'static str) -> Result<()> {
    if used { Ok(()) } else { Err(Error::Unexpected { operand: operand.into(), because: because.into() }) }
}

fn rows<'a, T: Real>(x: MatRef<'a, T>) -> impl Iterator<Item = &'a [T]> {
    (0..x.rows()).filter_map(move |i| x.row_of(i))
}

fn matrix_amax<T: Real>(x: MatRef<'_, T>) -> f32 {
    rows(x).map(finite_amax).fold(0.0, f32::max)
}

fn round_to_bf16<T: Real>(x: MatRef<'_, T>, bytes: &mut [u8]) {
    for (x, bytes) in rows(x).flatten().zip(bytes.chunks_exact_mut(2)) {
        bytes.copy_from_slice(&bf16::from_f32(x.to_f32()).to_le_bytes());
    }
}

/// How codes lie in bytes.
#[derive(Clone, Copy)]
enum Packing {
    Bytes,
    Nibbles,
}

/// Encodes each `B` elements along k with `encode`, which writes one code per byte and gives the scale's code.
fn blocks<T: Real, const B: usize>(
    x: MatRef<'_, T>,
    out: &mut QuantizedMatrixBuf,
    packing: Packing,
    encode: impl Fn(&[T], &mut [u8]) -> Result<u8>,
) -> Result<()> {
    let x = rows(x).flat_map(|row| row.chunks_exact(B));
    match packing {
        Packing::Bytes => {
            for ((x, scale), codes) in x.zip(&mut out.block_scales).zip(out.codes.chunks_exact_mut(B)) {
                *scale = encode(x, codes)?;
            }
        }
        Packing::Nibbles => {
            let mut codes = [0; B];
            for ((x, scale), bytes) in x.zip(&mut out.block_scales).zip(out.codes.chunks_exact_mut(B / 2)) {
                *scale = encode(x, &mut codes)?;
                pack_nibbles(&codes, bytes);
            }
        }
    }
    Ok(())
}

/// One scale for each tile: amax / max, 1 where all is zero. `scales` holds `ceil(n / tile.0) x ceil(k / tile.1)` zeros.
fn tile_scales<T: Real>(element: Fp8, x: MatRef<'_, T>, tile: (usize, usize), scales: &mut [f32]) {
    let across = x.cols().div_ceil(tile.1);
    for (i, row) in rows(x).enumerate() {
        let amaxes = scales.iter_mut().skip(i / tile.0 * across);
        for (amax, x) in amaxes.zip(row.chunks(tile.1)) {
            *amax = amax.max(finite_amax(x));
        }
    }
    for scale in scales {
        // Below the smallest normal f32 a quotient would lose bits, or be zero.
        *scale = if *scale == 0.0 { 1.0 } else { (*scale / element.format().max()).max(f32::MIN_POSITIVE) };
    }
}

/// Codes under the scales in `out`.
fn tile_codes<T: Real>(element: Fp8, x: MatRef<'_, T>, tile: (usize, usize), out: &mut QuantizedMatrixBuf) {
    let across = x.cols().div_ceil(tile.1);
    for ((i, row), codes) in rows(x).enumerate().zip(out.codes.chunks_exact_mut(x.cols())) {
        let scales = out.outer_scales.iter().skip(i / tile.0 * across);
        for ((&scale, x), codes) in scales.zip(row.chunks(tile.1)).zip(codes.chunks_mut(tile.1)) {
            // An infinity has no finite scale that would hold it: NaN, not the largest number.
            encode_with(element.format(), x, codes, |x| if x.is_finite() { x / scale } else { f32::NAN });
        }
    }
}
