//! What happens to a sum before it is stored.
#![forbid(unsafe_code)]

use super::operand::Output;
use super::packed::Outer;
use crate::cpu::knobs::EPILOGUE_ROWS;
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
        for first in (0..rows).step_by(EPILOGUE_ROWS) {
            let mut block = [const { None }; EPILOGUE_ROWS];
            for (i, taken) in block.iter_mut().enumerate().take(rows - first) {
                let (row, of_row) = row(first + i);
                *taken = y.take(row, panels.clone()).map(|y| (y, of_row));
                debug_assert!(taken.is_some(), "row {row}, panels {panels:?} are taken");
            }
            for (panel, sums) in sums.chunks_exact(rows).enumerate() {
                let at = (first_panel + panel) * LANES;
                let factors = Factors {
                    scales: match outer {
                        Outer::Tensor(scale) => [*scale; LANES],
                        Outer::Channel(scales) => lanes(&scales[at..]),
                        Outer::Tiles { .. } => [1.0; LANES],
                    },
                    alpha,
                    bias: bias.map_or([NOTHING; LANES], |bias| lanes(&bias[at..])),
                    accumulate,
                };
                for (sums, taken) in sums[first..].iter().zip(&mut block) {
                    let Some((y, of_row)) = taken else { continue };
                    let y = &mut y[panel * LANES..];
                    if let Some(y) = y.first_chunk_mut() {
                        *y = factors.apply(sums, *of_row, y, &activation);
                    } else {
                        let last = factors.apply(sums, *of_row, &lanes(y), &activation);
                        y.iter_mut().zip(last).for_each(|(y, v)| *y = v);
                    }
                }
            }
        }
    }
}

/// What leaves every number as it is when added: adding +0 would turn -0 into +0.
const NOTHING: f32 = -0.0;

/// What a panel's sums meet. What is absent is there as 1 or [`NOTHING`]: with an `Option` for each, calls of k = 64 with bf16 outputs took
/// 1.5 times as long on AVX2.
struct Factors {
    scales: [f32; LANES],
    alpha: f32,
    bias: [f32; LANES],
    accumulate: bool,
}

impl Factors {
    #[inline(always)] // compiled for the tier it ends up in, which a closure is not
    #[allow(clippy::needless_range_loop)] // one loop of known length over five arrays
    fn apply<T: Real>(
        &self,
        sums: &[f32; LANES],
        of_row: f32,
        y: &[T; LANES],
        activation: &impl Fn(f32) -> f32,
    ) -> [T; LANES] {
        let mut before = [NOTHING; LANES];
        if self.accumulate {
            for l in 0..LANES {
                before[l] = y[l].to_f32();
            }
        }
        let mut out = [T::default(); LANES];
        for l in 0..LANES {
            let v = self.alpha * (sums[l] * self.scales[l] * of_row);
            out[l] = rounded(activation(v + self.bias[l] + before[l]));
        }
        out
    }
}

/// The first of `x`, with zeros if there are fewer.
#[inline(always)]
fn lanes<T: Copy + Default>(x: &[T]) -> [T; LANES] {
    if let Some(x) = x.first_chunk() {
        return *x;
    }
    let mut lanes = [T::default(); LANES];
    lanes[..x.len()].copy_from_slice(x);
    lanes
}
