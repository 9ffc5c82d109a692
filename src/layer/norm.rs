//! RMS normalisation.
#![forbid(unsafe_code)]

use super::parameter;
use super::rows::{self, RowKernel};
use crate::cpu::{Cpu, STEP, Workspace};
use crate::error::{Error, Result, extent, mul};
use crate::num::{Real, rounded};
use crate::quant::{QuantizeOptions, QuantizedMatrixBuf, Scheme, quantize_into};
use crate::view::{MatMut, MatRef};

/// `y[i, j] = x[i, j] / sqrt(mean(x[i, :]^2) + eps) * weight[j]`.
///
/// * `x`: `[m, k]`. `weight`: `k` elements (bf16 in gpt-oss checkpoints). `y`: `[m, k]`, any of the three types.
/// * `eps` is inside the root (gpt-oss: 1e-5).
///
/// In this order, in f32: the sum of squares is the canonical dot product of the row with itself (steps of 32, even and odd
/// chains of 16 fused multiply-adds from zero, `sum = sum + (even + odd)`; subnormals kept); `mean = sum / k`;
/// `r = 1 / sqrt(mean + eps)`; `y = (x * r) * weight`, rounded once to `U`. A sum of squares that overflows f32 (some |x| above
/// 1.8e19, or infinite) makes the row NaN, not the zeros that `r = 0` would give; a row of zeros with `eps` 0 is NaN too.
///
/// Error bound: with s = ceil(k/32), `|y - exact| <= (s/2 + 15) u |exact|` and the rounding to `U`, as long as no square
/// underflows or `eps` is above 2^-100.
///
/// # Errors
/// [`Error::Empty`] if k is 0; [`Error::Extent`] unless `weight` and `y` fit `x`; [`Error::Value`] unless `eps` is finite and not
/// negative.
pub fn rms_norm<T: Real, W: Real, U: Real>(
    cpu: &Cpu<'_>,
    x: MatRef<'_, T>,
    weight: &[W],
    eps: f32,
    mut y: MatMut<'_, U>,
) -> Result<()> {
    check(x, weight, eps)?;
    extent("rms_norm output", "m", y.rows(), x.rows())?;
    extent("rms_norm output", "k", y.cols(), x.cols())?;
    rows::matrix(cpu, &mut y, &RmsNorm { x, weight, eps });
    Ok(())
}

/// [`rms_norm`] to f32, quantized by [`quantize_into`] as `to` says: the activations of a quantized matmul.
///
/// `x`: `[m, k]`. `out` becomes `[m, k]`. Nothing is rounded between the norm's f32 and the codes. Allocates only while `out` and
/// the workspace grow.
///
/// # Errors
/// Those of [`rms_norm`] and of [`quantize_into`]; `out` is unchanged then.
pub fn rms_norm_quantize<T: Real, W: Real>(
    cpu: &Cpu<'_>,
    x: MatRef<'_, T>,
    weight: &[W],
    eps: f32,
    to: (Scheme, &QuantizeOptions),
    out: &mut QuantizedMatrixBuf,
    ws: &mut Workspace,
) -> Result<()> {
    let (m, k) = (x.rows(), x.cols());
    let (scratch, _) = ws.take(mul("rms_norm input", m, k)?, 0);
    rms_norm(cpu, x, weight, eps, MatMut::new(scratch, m, k)?)?;
    quantize_into(MatRef::new(scratch, m, k)?, to.0, to.1, out)
}

fn check<T: Real, W>(x: MatRef<'_, T>, weight: &[W], eps: f32) -> Result<()> {
    if x.cols() == 0 {
        return Err(Error::Empty { operand: "rms_norm input".into(), axis: "k" });
    }
    extent("rms_norm weight", "k", weight.len(), x.cols())?;
    parameter("rms_norm eps", eps.into(), eps.is_finite() && eps >= 0.0, "a finite number that is not negative")
}

struct RmsNorm<'a, T, W> {
    x: MatRef<'a, T>,
    weight: &'a [W],
    eps: f32,
}

impl<T: Real, W: Real, U: Real> RowKernel<U> for RmsNorm<'_, T, W> {
    #[inline(always)]
    fn row(&self, i: usize, out: &mut [U]) {
        let Some(x) = self.x.row(i) else { return };
        let sum = sum_of_squares(x);
        let r = if sum.is_finite() { 1.0 / (sum / x.len() as f32 + self.eps).sqrt() } else { f32::NAN };
        for ((y, x), w) in out.iter_mut().zip(x).zip(self.weight) {
            *y = rounded((x.to_f32() * r) * w.to_f32());
        }
    }
}

/// The canonical dot product of a row with itself. Zeros that would pad the last step change no bit of a sum of squares.
#[inline(always)]
fn sum_of_squares<T: Real>(x: &[T]) -> f32 {
    let mut sum = 0.0f32;
    for step in x.chunks(STEP) {
        let mut chains = [0.0f32; 2];
        for pair in step.chunks(2) {
            for (chain, x) in chains.iter_mut().zip(pair) {
                let x = x.to_f32();
                *chain = x.mul_add(x, *chain);
            }
        }
        sum += chains[0] + chains[1];
    }
    sum
}
