//! Runs a kernel row by row, compiled for the CPU's tier and split over its threads.
#![forbid(unsafe_code)]

use crate::cpu::{Cpu, Kernel, Simd, for_each};
use crate::view::{HeadsMut, MatMut};

/// Elements below which a part is not worth handing to another thread (a fork costs 10 to 30 us).
const PART: usize = 1 << 15;

/// What is computed for one row of an output. Implementations are `#[inline(always)]` (see [`Kernel`]).
pub(super) trait RowKernel<U>: Sync {
    /// Writes row `i`.
    fn row(&self, i: usize, out: &mut [U]);
}

/// All rows of a matrix.
pub(super) fn matrix<U: Send>(cpu: &Cpu<'_>, out: &mut MatMut<'_, U>, kernel: &impl RowKernel<U>) {
    let (rows, cols, stride) = (out.rows(), out.cols(), out.row_stride());
    run(cpu, out.data_mut(), (rows, cols, stride), kernel);
}

/// All tokens of a batch of heads; a row is one token's `heads * head_dim` elements.
pub(super) fn tokens<U: Send>(cpu: &Cpu<'_>, out: &mut HeadsMut<'_, U>, kernel: &impl RowKernel<U>) {
    let (rows, cols, stride) = (out.tokens(), out.heads() * out.head_dim(), out.token_stride());
    run(cpu, out.data_mut(), (rows, cols, stride), kernel);
}

fn run<U: Send>(
    cpu: &Cpu<'_>,
    data: &mut [U],
    (rows, cols, stride): (usize, usize, usize),
    kernel: &impl RowKernel<U>,
) {
    if rows == 0 || cols == 0 {
        return;
    }
    // The stride of a single row means nothing and may be smaller than the row.
    let stride = if rows == 1 { cols } else { stride };
    let data = data.get_mut(..(rows - 1) * stride + cols).unwrap_or_default();
    let part = (PART / cols).max(1);
    let rows_from = |first: usize, data: &mut [U]| cpu.tier().run(Rows { kernel, first, cols, stride, data });
    if rows <= part {
        return rows_from(0, data);
    }
    for_each(cpu.parallelism(), (data, part.saturating_mul(stride)), |i, data| rows_from(i * part, data));
}

/// Consecutive rows, as one thread does them.
struct Rows<'a, K, U> {
    kernel: &'a K,
    first: usize,
    cols: usize,
    stride: usize,
    data: &'a mut [U],
}

impl<U, K: RowKernel<U>> Kernel for Rows<'_, K, U> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (i, row) in self.data.chunks_mut(self.stride).enumerate() {
            if let Some(row) = row.get_mut(..self.cols) {
                self.kernel.row(self.first + i, row);
            }
        }
    }
}
