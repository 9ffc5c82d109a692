//! Gated activations: clamped SwiGLU (gpt-oss) and plain SiLU gating.
#![forbid(unsafe_code)]

use super::parameter;
use super::rows::{self, RowKernel};
use crate::cpu::Cpu;
use crate::error::{Result, extent, mul};
use crate::num::{Real, math, rounded};
use crate::view::{MatMut, MatRef};

/// `g * sigmoid(alpha * g) * (u + up_offset)` with `g = min(gate, limit)` and `u = clamp(up, -limit, limit)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SwigluSpec {
    /// Factor inside the sigmoid. Finite.
    pub alpha: f32,
    /// Clamp of the gate from above and of the up half from both sides; `None`: no clamp. Above zero.
    pub limit: Option<f32>,
    /// Added to the up half. Finite.
    pub up_offset: f32,
}

impl SwigluSpec {
    /// gpt-oss: alpha 1.702, limit 7 (`swiglu_limit` of its config), offset 1.
    pub const GPT_OSS: SwigluSpec = SwigluSpec { alpha: 1.702, limit: Some(7.0), up_offset: 1.0 };
    /// `silu(gate) * up`: Llama, Qwen, DeepSeek.
    pub const SILU: SwigluSpec = SwigluSpec { alpha: 1.0, limit: None, up_offset: 0.0 };

    /// One output, in this order in f32: `(g * sigmoid(alpha * g)) * (u + up_offset)`. NaN in either gives NaN.
    ///
    /// Error bound: with t = alpha * g, `|a - exact| <= ((|t| + 1) (1 - sigmoid(t)) + 9) u |exact|`, plus `2^-126 |g (u + up_offset)|`
    /// where the sigmoid is flushed to zero.
    #[inline(always)]
    pub fn apply(&self, gate: f32, up: f32) -> f32 {
        let limit = self.limit.unwrap_or(f32::INFINITY);
        // Comparisons, not `f32::min` and `clamp`: `min` would turn a NaN gate into the limit.
        let g = if gate > limit { limit } else { gate };
        let u = if up > limit { limit } else { up };
        let u = if u < -limit { -limit } else { u };
        (g * math::sigmoid(self.alpha * g)) * (u + self.up_offset)
    }

    fn check(&self) -> Result<()> {
        parameter("swiglu alpha", self.alpha.into(), self.alpha.is_finite(), "a finite number")?;
        let limit = self.limit.unwrap_or(f32::INFINITY);
        parameter("swiglu limit", limit.into(), limit > 0.0, "a number above zero")?;
        parameter("swiglu up_offset", self.up_offset.into(), self.up_offset.is_finite(), "a finite number")
    }
}

/// Where gate and up lie in a row of 2n.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GateLayout {
    /// Element 2j is gate j, element 2j + 1 is up j: gpt-oss.
    Interleaved,
    /// The first n elements are the gate, the last n are up.
    Split,
}

/// `out[i, j]` = [`SwigluSpec::apply`] of gate j and up j of row i, rounded once to `U`.
///
/// `gate_up`: `[m, 2n]` in `layout`. `out`: `[m, n]`. The error bound is that of [`SwigluSpec::apply`] and the rounding to `U`.
///
/// # Errors
/// [`Error::Extent`](crate::Error::Extent) unless `gate_up` has the rows of `out` and twice its columns;
/// [`Error::Value`](crate::Error::Value) if the spec is not as its fields say.
pub fn swiglu<T: Real, U: Real>(
    cpu: &Cpu<'_>,
    spec: SwigluSpec,
    layout: GateLayout,
    gate_up: MatRef<'_, T>,
    mut out: MatMut<'_, U>,
) -> Result<()> {
    spec.check()?;
    extent("swiglu gate_up", "m", gate_up.rows(), out.rows())?;
    extent("swiglu gate_up", "2n", gate_up.cols(), mul("swiglu output", out.cols(), 2)?)?;
    rows::matrix(cpu, &mut out, &Swiglu { spec, layout, gate_up });
    Ok(())
}

struct Swiglu<'a, T> {
    spec: SwigluSpec,
    layout: GateLayout,
    gate_up: MatRef<'a, T>,
}

impl<T: Real, U: Real> RowKernel<U> for Swiglu<'_, T> {
    #[inline(always)]
    fn row(&self, i: usize, out: &mut [U]) {
        let Some(row) = self.gate_up.row(i) else { return };
        match self.layout {
            GateLayout::Interleaved => {
                for (y, pair) in out.iter_mut().zip(row.chunks_exact(2)) {
                    *y = rounded(self.spec.apply(pair[0].to_f32(), pair[1].to_f32()));
                }
            }
            GateLayout::Split => {
                let (gate, up) = row.split_at(row.len() / 2);
                for ((y, gate), up) in out.iter_mut().zip(gate).zip(up) {
                    *y = rounded(self.spec.apply(gate.to_f32(), up.to_f32()));
                }
            }
        }
    }
}
