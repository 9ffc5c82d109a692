//! What happens to a sum before it is stored.
#![forbid(unsafe_code)]

use super::operand::Output;
use crate::cpu::LANES;
use crate::num::{Real, math, rounded};
use crate::view::MatMut;

/// Element-wise function applied last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Activation {
    /// None.
    #[default]
    None,
    /// `max(x, 0)`; NaN stays NaN.
    Relu,
    /// `x sigmoid(x)`.
    Silu,
    /// `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`: the tanh form of GELU.
    GeluTanh,
}

impl Activation {
    /// The function, in f32 with the crate's own `exp`.
    pub fn apply(self, x: f32) -> f32 {
        match self {
            Activation::None => x,
            Activation::Relu => {
                if x < 0.0 {
                    0.0
                } else {
                    x
                }
            }
            Activation::Silu => x * math::sigmoid(x),
            Activation::GeluTanh => {
                let inner = 0.797_884_6 * (x + 0.044_715 * x * x * x);
                0.5 * x * (1.0 + math::tanh(inner))
            }
        }
    }
}

/// What to do beyond the product. Order, all in f32: `v = alpha * sum; v += bias; v += y` (if accumulating);
/// `v = activation(v)`; one rounding to the output's type.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MatmulOptions<'a> {
    /// Added to each row: `[n]`, or `[experts, n]` for grouped and gathered matmul.
    pub bias: Option<&'a [f32]>,
    /// Factor of the product; 1 by default.
    pub alpha: f32,
    /// Whether what `y` holds is added.
    pub accumulate: bool,
    /// Applied last.
    pub activation: Activation,
}

impl Default for MatmulOptions<'_> {
    fn default() -> Self {
        MatmulOptions { bias: None, alpha: 1.0, accumulate: false, activation: Activation::None }
    }
}

/// One row's sums, by panels, on their way out.
pub(super) struct RowEpilogue<'a> {
    pub(super) alpha: f32,
    pub(super) accumulate: bool,
    pub(super) activation: Activation,
    /// This expert's bias, `[n]`.
    pub(super) bias: Option<&'a [f32]>,
}

impl<'a> RowEpilogue<'a> {
    pub(super) fn new(options: &MatmulOptions<'a>, bias: Option<&'a [f32]>) -> Self {
        RowEpilogue { alpha: options.alpha, accumulate: options.accumulate, activation: options.activation, bias }
    }

    /// Stores row `row` of `y`; `sum(j)` is the scaled sum of column j.
    pub(super) fn store(&self, y: &mut Output<'_>, row: usize, sum: impl Fn(usize) -> f32) {
        match y {
            Output::F32(y) => self.store_as(y, row, sum),
            Output::Bf16(y) => self.store_as(y, row, sum),
            Output::F16(y) => self.store_as(y, row, sum),
        }
    }

    fn store_as<T: Real>(&self, y: &mut MatMut<'_, T>, row: usize, sum: impl Fn(usize) -> f32) {
        for (j, y) in y.row_mut(row).unwrap_or_default().iter_mut().enumerate() {
            let mut v = self.alpha * sum(j);
            if let Some(bias) = self.bias {
                v += bias[j];
            }
            if self.accumulate {
                v += y.to_f32();
            }
            v = self.activation.apply(v);
            *y = rounded(v);
        }
    }
}

/// Position of column `j` of block row `i` in panel-major sums `[n / LANES][rows][LANES]`.
pub(super) fn panel_index(j: usize, i: usize, rows: usize) -> usize {
    (j / LANES * rows + i) * LANES + j % LANES
}
