//! What happens to a sum before it is stored.
#![forbid(unsafe_code)]

use super::driver::{Block, Plan};
use super::operand::Output;
use super::packed::Outer;
use crate::cpu::{Cpu, Kernel, LANES, Simd, for_each};
use crate::num::{Real, math, rounded};
use crate::view::MatMut;
use std::ops::Range;

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

/// Sums of a block as its tasks leave them: for each task `task` f32, `[panel][row][LANES]`.
#[derive(Clone, Copy)]
pub(super) struct Sums<'a> {
    sums: &'a [f32],
    task: usize,
    /// Rows of all tasks side by side, how many tasks that are, and rows and panels of one.
    rows: usize,
    row_tasks: usize,
    task_rows: usize,
    task_panels: usize,
}

impl<'a> Sums<'a> {
    pub(super) fn new(sums: &'a [f32], task: usize, block: &Block<'_>) -> Self {
        let Plan { row_tasks, task_rows, task_panels, .. } = *block.plan();
        Sums { sums, task, rows: block.positions().len(), row_tasks, task_rows, task_panels }
    }

    /// Sums of row i with a panel.
    #[inline(always)]
    fn get(&self, i: usize, panel: usize) -> &[f32; LANES] {
        let (of_rows, row) = (i / self.task_rows, i % self.task_rows);
        let rows = self.task_rows.min(self.rows - of_rows * self.task_rows);
        let at = (panel / self.task_panels * self.row_tasks + of_rows) * self.task;
        let at = at + (panel % self.task_panels * rows + row) * LANES;
        self.sums.get(at..).and_then(|s| s.first_chunk()).unwrap_or(&[0.0; LANES])
    }
}

impl<'a> RowEpilogue<'a> {
    pub(super) fn new(options: &MatmulOptions<'a>, bias: Option<&'a [f32]>) -> Self {
        RowEpilogue { alpha: options.alpha, accumulate: options.accumulate, activation: options.activation, bias }
    }
}

/// What a row of y is made of.
pub(super) struct FinishRow<'a> {
    pub(super) epilogue: RowEpilogue<'a>,
    /// Row i of these.
    pub(super) sums: Sums<'a>,
    pub(super) i: usize,
    /// The f32 scale of the row of x, and those of the weights.
    pub(super) of_row: f32,
    pub(super) outer: &'a Outer,
}

/// Stores those of the given rows of `y` that `of(row)` knows, `part` rows at a time in parallel.
pub(super) fn store<'a>(
    cpu: &Cpu<'_>,
    y: &mut Output<'_>,
    rows: (Range<usize>, usize),
    of: impl Fn(usize) -> Option<FinishRow<'a>> + Sync,
) {
    match y {
        Output::F32(y) => store_as(cpu, y, rows, of),
        Output::Bf16(y) => store_as(cpu, y, rows, of),
        Output::F16(y) => store_as(cpu, y, rows, of),
    }
}

fn store_as<'a, T: Real>(
    cpu: &Cpu<'_>,
    y: &mut MatMut<'_, T>,
    (rows, part): (Range<usize>, usize),
    of: impl Fn(usize) -> Option<FinishRow<'a>> + Sync,
) {
    // The stride of a single row means nothing and may be smaller than the row.
    let (n, stride) = (y.cols(), if y.rows() == 1 { y.cols() } else { y.row_stride() });
    let Some(data) = y.data_mut().get_mut(rows.start * stride..(rows.end - 1) * stride + n) else { return };
    for_each(cpu.parallelism(), (data, part * stride), |p, data| {
        for (i, y) in data.chunks_mut(stride).enumerate() {
            if let (Some(row), Some(y)) = (of(rows.start + p * part + i), y.get_mut(..n)) {
                cpu.tier().run(StoreRow { row, y });
            }
        }
    });
}

/// Scales, finishes and rounds one row.
struct StoreRow<'a, T> {
    row: FinishRow<'a>,
    y: &'a mut [T],
}

impl<T: Real> Kernel for StoreRow<'_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        // One loop for each activation: none of them asks in the inner loop.
        match self.row.epilogue.activation {
            Activation::None => self.finish(|v| v),
            Activation::Relu => self.finish(|v| Activation::Relu.apply(v)),
            Activation::Silu => self.finish(|v| Activation::Silu.apply(v)),
            Activation::GeluTanh => self.finish(|v| Activation::GeluTanh.apply(v)),
        }
    }
}

impl<T: Real> StoreRow<'_, T> {
    #[inline(always)]
    fn finish(self, activation: impl Fn(f32) -> f32) {
        let FinishRow { epilogue, sums, i, of_row, outer } = self.row;
        let RowEpilogue { alpha, accumulate, bias, .. } = epilogue;
        for (panel, y) in self.y.chunks_mut(LANES).enumerate() {
            let mut v = *sums.get(i, panel);
            let at = panel * LANES;
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
