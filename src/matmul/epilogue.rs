//! What happens to a sum before it is stored.
#![forbid(unsafe_code)]

use super::operand::Output;
use super::packed::Outer;
use crate::cpu::{Handout, Kernel, LANES, Simd, Tier};
use crate::num::{Real, math, rounded};
use crate::view::MatMut;
use half::{bf16, f16};

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
    #[inline(always)]
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

/// What happens to every row of one weight matrix.
#[derive(Clone, Copy)]
pub(super) struct RowEpilogue<'a> {
    alpha: f32,
    accumulate: bool,
    activation: Activation,
    /// This expert's bias, `[n]`.
    bias: Option<&'a [f32]>,
}

impl<'a> RowEpilogue<'a> {
    pub(super) fn new(options: &MatmulOptions<'a>, bias: Option<&'a [f32]>) -> Self {
        RowEpilogue { alpha: options.alpha, accumulate: options.accumulate, activation: options.activation, bias }
    }
}

/// y, from which tasks take the parts that they finish.
pub(super) enum Target<'a> {
    F32(Handout<'a, f32>),
    Bf16(Handout<'a, bf16>),
    F16(Handout<'a, f16>),
}

impl<'a> Target<'a> {
    /// Claim words that y needs.
    pub(super) fn claims(y: &Output<'_>) -> usize {
        Handout::<f32>::claims(y.m(), y.n())
    }

    /// `None` if y does not fit its own slice, which views do not allow.
    pub(super) fn new(y: &'a mut Output<'_>, claims: &'a mut [usize]) -> Option<Target<'a>> {
        fn of<'a, T>(y: &'a mut MatMut<'_, T>, claims: &'a mut [usize]) -> Option<Handout<'a, T>> {
            // The stride of a single row means nothing and may be smaller than the row.
            let extents = (y.rows(), y.cols(), if y.rows() == 1 { y.cols() } else { y.row_stride() });
            Handout::new(y.data_mut(), extents, claims)
        }
        Some(match y {
            Output::F32(y) => Target::F32(of(y, claims)?),
            Output::Bf16(y) => Target::Bf16(of(y, claims)?),
            Output::F16(y) => Target::F16(of(y, claims)?),
        })
    }
}

/// Finishes sums of some rows with consecutive panels.
pub(super) struct Finish<'a> {
    pub(super) epilogue: RowEpilogue<'a>,
    pub(super) first_panel: usize,
    /// `[panel][row]`.
    pub(super) sums: &'a [[f32; LANES]],
    /// f32 scales of the weights.
    pub(super) outer: &'a Outer,
}

impl Finish<'_> {
    /// Stores the rows; `row(i)` is the row of y and the f32 scale of the row of x.
    pub(super) fn run(self, tier: Tier, y: &Target<'_>, rows: usize, row: impl Fn(usize) -> (usize, f32)) {
        match y {
            Target::F32(y) => tier.run(FinishAs { finish: self, y, rows, row }),
            Target::Bf16(y) => tier.run(FinishAs { finish: self, y, rows, row }),
            Target::F16(y) => tier.run(FinishAs { finish: self, y, rows, row }),
        }
    }
}

/// [`Finish`], compiled for a tier and a type.
struct FinishAs<'a, T, F> {
    finish: Finish<'a>,
    y: &'a Handout<'a, T>,
    rows: usize,
    row: F,
}

impl<T: Real, F: Fn(usize) -> (usize, f32)> Kernel for FinishAs<'_, T, F> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        // One loop for each activation: none of them asks in the inner loop.
        match self.finish.epilogue.activation {
            Activation::None => self.finish(|v| v),
            Activation::Relu => self.finish(|v| Activation::Relu.apply(v)),
            Activation::Silu => self.finish(|v| Activation::Silu.apply(v)),
            Activation::GeluTanh => self.finish(|v| Activation::GeluTanh.apply(v)),
        }
    }
}

impl<T: Real, F: Fn(usize) -> (usize, f32)> FinishAs<'_, T, F> {
    #[inline(always)]
    fn finish(self, activation: impl Fn(f32) -> f32) {
        let FinishAs { finish: Finish { epilogue, first_panel, sums, outer }, y, rows, row } = self;
        let RowEpilogue { alpha, accumulate, bias, .. } = epilogue;
        let panels = first_panel..first_panel + sums.len() / rows;
        for i in 0..rows {
            let (row, of_row) = row(i);
            let Some(y) = y.take(row, panels.clone()) else {
                debug_assert!(false, "row {row}, panels {panels:?} are taken");
                continue;
            };
            for (panel, y) in y.chunks_mut(LANES).enumerate() {
                let mut v = sums[panel * rows + i];
                let at = (first_panel + panel) * LANES;
                match outer {
                    Outer::Tensor(scale) => v.iter_mut().for_each(|v| *v *= scale),
                    Outer::Channel(scales) => v.iter_mut().zip(&scales[at..]).for_each(|(v, scale)| *v *= scale),
                    Outer::Tiles { .. } => {}
                }
                v.iter_mut().for_each(|v| *v = alpha * (*v * of_row));
                if let Some(bias) = bias {
                    v.iter_mut().zip(&bias[at..]).for_each(|(v, bias)| *v += bias);
                }
                if accumulate {
                    v.iter_mut().zip(&*y).for_each(|(v, y)| *v += y.to_f32());
                }
                v.iter_mut().for_each(|v| *v = activation(*v));
                for (y, v) in y.iter_mut().zip(v) {
                    *y = rounded(v);
                }
            }
        }
    }
}
