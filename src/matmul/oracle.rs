//! The product in f64, from exact values, with the bound within which every conforming kernel must lie.
//!
//! Thirty obvious lines and a derivation: this is what the fast code is tested against. It takes the checkpoint's matrix, not
//! the packed one, so that it shares nothing with the kernels but the decoding of single values.
#![forbid(unsafe_code)]

use super::epilogue::{Activation, MatmulOptions};
use super::operand::Activations;
use crate::error::{Error, Result, extent, length, mul, reserve, zeros};
use crate::quant::{QuantizedMatrix, Scheme};

/// Unit roundoff of f32.
const U: f64 = f32::EPSILON as f64 / 2.0;
/// Smallest normal f32.
const TINY: f64 = f32::MIN_POSITIVE as f64;
/// Half of the smallest subnormal f32: what rounding below [`TINY`] may be off by.
const SUBNORMAL: f64 = TINY / (1u64 << 24) as f64;

/// The type a result is rounded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputType {
    /// f32.
    F32,
    /// bf16.
    Bf16,
    /// f16.
    F16,
}

/// An exact result and how far a conforming kernel may be from it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Expected {
    /// The result in f64.
    pub value: f64,
    /// Largest `|kernel - value|`; infinite where a sum, a scaled sum or the result may overflow, NaN never.
    pub bound: f64,
}

impl Expected {
    /// Whether `got` is within the bound; NaN and infinities of the exact result must match.
    pub fn admits(&self, got: f64) -> bool {
        if self.value.is_nan() {
            return got.is_nan();
        }
        if self.value.is_infinite() {
            return got == self.value;
        }
        // What overflows on the way may end as an infinity or, where two of them meet, as NaN.
        self.bound == f64::INFINITY || (got - self.value).abs() <= self.bound
    }
}

/// `activation(alpha x w^T + bias + y)` of one weight matrix: `[m, n]`, row-major.
///
/// `previous` is what y held (`[m, n]`), read if `options.accumulate`.
///
/// The bound. Let `u = 2^-24`, `gamma(j) = j u / (1 - j u)`, `S` the steps of 32 in the longest sum between f32 scales and `B`
/// the number of such sums. A product passes at most 16 roundings in its chain, one where the chains meet and S at the
/// accumulator; then 2 for each of B scale blocks (the scale's product and the add), and 3 for row scale, column scale and
/// alpha. So the sum is off by at most `gamma(20 + S + 2B) sum |x w|` (Higham, Accuracy and Stability, lemma 3.1), plus `2^-126`
/// for each operation that can flush, times the largest scales (none below 1, so that a sum that one scale makes subnormal before
/// the other multiplies it is covered), plus the products whose operand is itself flushed, plus `2^-150 sum |code products|`
/// where the product of two tile scales can be subnormal. Bias, accumulation and the output add half a unit of their result
/// each; activations multiply by their Lipschitz constant and add their own error. Where a sum or a scaled sum may leave f32's
/// range on the way the bound is infinite.
///
/// # Errors
/// [`Error::Extent`] if x and w disagree on k; [`Error::Length`] for the bias (`[n]`) or, with `accumulate`, for `previous`;
/// [`Error::Overflow`] if `m * n` results do not fit in memory.
pub fn matmul<'a>(
    x: impl Into<Activations<'a>>,
    w: &QuantizedMatrix<'_>,
    options: &MatmulOptions<'_>,
    previous: &[f64],
    output: OutputType,
) -> Result<Vec<Expected>> {
    let x = x.into();
    extent("activations", "k", x.k(), w.k())?;
    let (m, n, k) = (x.m(), w.n(), w.k());
    if let Some(bias) = options.bias {
        length("bias", bias.len(), n)?;
    }
    if options.accumulate {
        length("previous output", previous.len(), mul("previous output", m, n)?)?;
    }
    let mut out = Vec::new();
    // With k = 0 no operand's memory bounds m and n, with m or n = 0 none bounds k.
    reserve("output", &mut out, mul("output", m, n)?)?;
    if m == 0 || n == 0 {
        return Ok(out);
    }
    let tile = smallest_tile(&x, w);
    let steps = tile.unwrap_or(k).min(k).div_ceil(32) as f64;
    let blocks = tile.map_or(0.0, |tile| k.div_ceil(tile) as f64);
    let gamma = gamma(20.0 + steps + 2.0 * blocks);
    let alpha = f64::from(options.alpha);
    let mut row = zeros("a row of activations", k)?;
    for i in 0..m {
        for (col, x_value) in row.iter_mut().enumerate() {
            *x_value = value(&x, i, col).ok_or(Error::Overflow { operand: "activations".into() })?;
        }
        for j in 0..n {
            let (mut sum, mut magnitude, mut flushed, mut unscaled) = (0.0f64, 0.0f64, 0.0f64, 0.0f64);
            let (mut of_x, mut of_w) = (1.0f64, 1.0f64);
            for (col, &a) in row.iter().enumerate() {
                let b = weight(w, j, col);
                let (x_scale, w_scale) = (outer_scale(&x, i, col), f64::from(w.outer_scale(j, col).unwrap_or(1.0)));
                let product = a * b * x_scale * w_scale;
                sum += product;
                magnitude += product.abs();
                unscaled += (a * b).abs();
                if a.abs() < TINY || b.abs() < TINY {
                    flushed += product.abs();
                }
                (of_x, of_w) = (of_x.max(x_scale.abs()), of_w.max(w_scale.abs()));
            }
            let operations = 2.0 * k as f64 + 64.0;
            let mut error = gamma * magnitude + flushed + operations * TINY * of_x * of_w;
            if tile.is_some() {
                // The product of two tile scales may be subnormal and multiplies a whole sum.
                error += SUBNORMAL * unscaled;
            }
            // What is finite in f64 may not be on the way: the sum, scaled by one side, or the product of tile scales.
            if unscaled.is_finite() && unscaled.max(1.0) * of_x * of_w * (1.0 + gamma) > f64::from(f32::MAX) {
                error = f64::INFINITY;
            }
            let at = i * n + j;
            let previous = if options.accumulate { previous[at] } else { 0.0 };
            let bias = options.bias.map_or(0.0, |b| f64::from(b[j]));
            // Alpha may make a subnormal of the sum, and NaN of 0 times an unbounded error.
            let error = if error.is_finite() { alpha.abs() * error + SUBNORMAL } else { error };
            out.push(finish(alpha * sum, error, bias, previous, options, output));
        }
    }
    Ok(out)
}

fn gamma(roundings: f64) -> f64 {
    roundings * U / (1.0 - roundings * U)
}

/// Bias, accumulation, activation and output rounding of a value known to within `error`.
fn finish(sum: f64, error: f64, bias: f64, previous: f64, options: &MatmulOptions<'_>, output: OutputType) -> Expected {
    let mut bound = error;
    let with_bias = sum + bias;
    bound += U * (with_bias.abs() + bound);
    let v = with_bias + previous;
    bound += U * (v.abs() + bound);
    let (value, lipschitz, own) = match options.activation {
        Activation::None => (v, 1.0, 0.0),
        Activation::Relu => (if v < 0.0 { 0.0 } else { v }, 1.0, 0.0),
        // |silu'| < 1.1. exp is within 2 ulp, then an addition, a division, a product: below 8 u of the result.
        Activation::Silu => (v / (1.0 + (-v).exp()), 1.1, 8.0 * U * v.abs() + TINY),
        // |gelu'| < 1.13. tanh within 4 u; its argument within 6 u and |t tanh'(t)| < 0.45: 8 u of |x|, halved, and roundings.
        Activation::GeluTanh => {
            let t = (0.797_884_560_802_865_4 * (v + 0.044_715 * v * v * v)).tanh();
            (0.5 * v * (1.0 + t), 1.13, 12.0 * U * v.abs() + TINY)
        }
    };
    bound = bound * lipschitz + own;
    let reach = value.abs() + bound;
    let (half_unit, max, subnormal) = match output {
        OutputType::F32 => (U, f64::from(f32::MAX), 2f64.powi(-150)),
        OutputType::Bf16 => (2f64.powi(-8), f64::from(half::bf16::MAX), 2f64.powi(-134)),
        OutputType::F16 => (2f64.powi(-11), f64::from(half::f16::MAX), 2f64.powi(-25)),
    };
    bound += half_unit * reach + subnormal;
    Expected { value, bound: if reach > max { f64::INFINITY } else { bound } }
}

/// Element `(row, col)` of x without its f32 scale, exactly.
fn value(x: &Activations<'_>, row: usize, col: usize) -> Option<f64> {
    match x {
        Activations::F32(x) => x.row(row)?.get(col).map(|v| f64::from(*v)),
        Activations::Bf16(x) => x.row(row)?.get(col).map(|v| f64::from(*v)),
        Activations::F16(x) => x.row(row)?.get(col).map(|v| f64::from(*v)),
        Activations::Quantized(x) => Some(weight(x, row, col)),
    }
}

/// Code x block scale; what bf16 cannot hold is infinite.
fn weight(w: &QuantizedMatrix<'_>, row: usize, col: usize) -> f64 {
    let exact = w.unscaled(row, col).unwrap_or(f64::NAN);
    if exact.abs() > f64::from(f32::MAX) { f64::INFINITY.copysign(exact) } else { exact }
}

fn outer_scale(x: &Activations<'_>, row: usize, col: usize) -> f64 {
    match x {
        Activations::Quantized(x) => f64::from(x.outer_scale(row, col).unwrap_or(1.0)),
        _ => 1.0,
    }
}

/// Length along k of the sums between f32 scales, if scales change along k.
fn smallest_tile(x: &Activations<'_>, w: &QuantizedMatrix<'_>) -> Option<usize> {
    let of_weights = match w.scheme() {
        Scheme::Fp8Blockwise { k, .. } => Some(k),
        _ => None,
    };
    x.scale_tile().into_iter().chain(of_weights).min()
}
