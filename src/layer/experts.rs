//! The sum of a token's experts.
#![forbid(unsafe_code)]

use super::rows::{self, RowKernel};
use crate::cpu::Cpu;
use crate::error::{Error, Result, extent, mul};
use crate::num::{Real, rounded};
use crate::view::{MatMut, MatRef};

/// Columns summed side by side.
const COLUMNS: usize = 64;

/// `out[t, j] = sum over slots s of weights[t, s] * y[t * k + s, j]`, or that added to `out` if `accumulate`.
///
/// * `y`: `[m * k, n]`: the experts' outputs, a token's k slots one after the other, biases already in.
/// * `weights`: `[m, k]`, of the router. `out`: `[m, n]` (the residual stream, with `accumulate`).
///
/// In f32: `acc = fma(weight, y, acc)` from zero, slots ascending; then, if `accumulate`, `out + acc`; rounded once to `U`.
///
/// Error bound: `k u / (1 - k u) * sum |weight y|`, with `accumulate` `u |out + acc|` more, and the rounding to `U`.
///
/// # Errors
/// [`Error::Empty`] if k is 0; [`Error::Extent`] unless the shapes agree; [`Error::Overflow`].
pub fn combine_experts<T: Real, U: Real>(
    cpu: &Cpu<'_>,
    y: MatRef<'_, T>,
    weights: MatRef<'_, f32>,
    accumulate: bool,
    mut out: MatMut<'_, U>,
) -> Result<()> {
    if weights.cols() == 0 {
        return Err(Error::Empty { operand: "expert weights".into(), axis: "k" });
    }
    extent("combined output", "m", out.rows(), weights.rows())?;
    extent("combined output", "n", out.cols(), y.cols())?;
    extent("expert outputs", "m * k", y.rows(), mul("expert weights", weights.rows(), weights.cols())?)?;
    rows::matrix(cpu, &mut out, &Combine { y, weights, accumulate });
    Ok(())
}

struct Combine<'a, T> {
    y: MatRef<'a, T>,
    weights: MatRef<'a, f32>,
    accumulate: bool,
}

impl<T: Real, U: Real> RowKernel<U> for Combine<'_, T> {
    #[inline(always)]
    fn row(&self, t: usize, out: &mut [U]) {
        let Some(weights) = self.weights.row(t) else { return };
        for (c, out) in out.chunks_mut(COLUMNS).enumerate() {
            let mut acc = [0.0f32; COLUMNS];
            for (s, &weight) in weights.iter().enumerate() {
                let y = self.y.row(t * weights.len() + s).and_then(|y| y.get(c * COLUMNS..)).unwrap_or_default();
                for (acc, y) in acc.iter_mut().zip(y) {
                    *acc = weight.mul_add(y.to_f32(), *acc);
                }
            }
            for (out, acc) in out.iter_mut().zip(acc) {
                *out = rounded(if self.accumulate { out.to_f32() + acc } else { acc });
            }
        }
    }
}
