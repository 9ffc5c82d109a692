//! What happens to a sum before it is stored.
#![forbid(unsafe_code)]

use super::operand::Output;
use super::packed::Outer;
use crate::cpu::{Cpu, Kernel, LANES, Simd, for_each};
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

/// Sums as tasks leave them: for each task `task` f32, `[panel][row][LANES]`.
#[derive(Clone, Copy)]
pub(super) struct Sums<'a> {
    pub(super) sums: &'a [f32],
    pub(super) task: usize,
    /// Rows of all tasks side by side, how many tasks that are, and rows and panels of one.
    pub(super) rows: usize,
    pub(super) row_tasks: usize,
    pub(super) task_rows: usize,
    pub(super) task_panels: usize,
}

impl Sums<'_> {
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

    /// Stores rows `first..first + count` of `y` from rows `i..` of `sums`, `part` rows at a time in parallel. `outer` holds the
    /// weights' f32 scales, `of_row(i)` is the activations' of row i.
    pub(super) fn store(
        &self,
        cpu: &Cpu<'_>,
        y: &mut Output<'_>,
        rows: (usize, usize, usize),
        sums: (&Sums<'_>, usize),
        outer: &Outer,
        of_row: impl Fn(usize) -> f32 + Sync,
    ) {
        match y {
            Output::F32(y) => self.store_as(cpu, y, rows, sums, outer, of_row),
            Output::Bf16(y) => self.store_as(cpu, y, rows, sums, outer, of_row),
            Output::F16(y) => self.store_as(cpu, y, rows, sums, outer, of_row),
        }
    }

    fn store_as<T: Real>(
        &self,
        cpu: &Cpu<'_>,
        y: &mut MatMut<'_, T>,
        (first, count, part): (usize, usize, usize),
        (sums, i): (&Sums<'_>, usize),
        outer: &Outer,
        of_row: impl Fn(usize) -> f32 + Sync,
    ) {
        // The stride of a single row means nothing and may be smaller than the row.
        let (n, stride) = (y.cols(), if y.rows() == 1 { y.cols() } else { y.row_stride() });
        let Some(data) = y.data_mut().get_mut(first * stride..(first + count - 1) * stride + n) else { return };
        for_each(cpu.parallelism(), (data, part * stride), |p, data| {
            for (row, y) in data.chunks_mut(stride).enumerate() {
                let i = i + p * part + row;
                if let Some(y) = y.get_mut(..n) {
                    cpu.tier().run(StoreRow { epilogue: *self, sums: *sums, i, of_row: of_row(i), outer, y });
                }
            }
        });
    }
}

/// Scales, finishes and rounds one row.
struct StoreRow<'a, T> {
    epilogue: RowEpilogue<'a>,
    sums: Sums<'a>,
    i: usize,
    of_row: f32,
    outer: &'a Outer,
    y: &'a mut [T],
}

impl<T: Real> Kernel for StoreRow<'_, T> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        // One loop for each activation: none of them asks in the inner loop.
        match self.epilogue.activation {
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
        let RowEpilogue { alpha, accumulate, bias, .. } = self.epilogue;
        for (panel, y) in self.y.chunks_mut(LANES).enumerate() {
            let mut v = *self.sums.get(self.i, panel);
            let at = panel * LANES;
            match self.outer {
                Outer::Tensor(scale) => v.iter_mut().for_each(|v| *v *= scale),
                Outer::Channel(scales) => v.iter_mut().zip(&scales[at..]).for_each(|(v, scale)| *v *= scale),
                Outer::Tiles { .. } => {}
            }
            v.iter_mut().for_each(|v| *v = alpha * (*v * self.of_row));
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
