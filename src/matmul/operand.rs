//! What goes in and what comes out: activations and outputs of any plain type.
#![forbid(unsafe_code)]

use crate::cpu::{Smallest, flush};
use crate::num::{Real, RealSlice, RealSliceMut};
use crate::quant::{QuantizedMatrix, Scheme};
use crate::view::{MatMut, MatRef};
use half::{bf16, f16};

/// The left operand `[m, k]`: plain values, or codes and scales of any [`Scheme`] (W8A8, W4A8, MX x MX).
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Activations<'a> {
    /// f32, never rounded to bf16.
    F32(MatRef<'a, f32>),
    /// bf16.
    Bf16(MatRef<'a, bf16>),
    /// f16, taken exactly.
    F16(MatRef<'a, f16>),
    /// Quantized: codes x block scales enter the product exactly, f32 scales multiply sums.
    Quantized(&'a QuantizedMatrix<'a>),
}

impl Activations<'_> {
    /// Number of rows (tokens).
    pub fn m(&self) -> usize {
        match self {
            Activations::F32(x) => x.rows(),
            Activations::Bf16(x) => x.rows(),
            Activations::F16(x) => x.rows(),
            Activations::Quantized(x) => x.n(),
        }
    }

    /// Extent of the contraction axis.
    pub fn k(&self) -> usize {
        match self {
            Activations::F32(x) => x.cols(),
            Activations::Bf16(x) => x.cols(),
            Activations::F16(x) => x.cols(),
            Activations::Quantized(x) => x.k(),
        }
    }

    /// Row `row` as f32 with subnormals read as zero and zeros past k, and what was seen.
    pub(super) fn load(&self, row: usize, out: &mut [f32]) -> Smallest {
        let (values, pad) = out.split_at_mut(self.k());
        pad.fill(0.0);
        let mut seen = match self {
            Activations::F32(x) => copy(x.row(row), values, Smallest::F32),
            Activations::Bf16(x) => copy(x.row(row), values, Smallest::BF16),
            Activations::F16(x) => copy(x.row(row), values, Smallest::F32),
            Activations::Quantized(x) => {
                x.decode_row(row, values);
                values.iter_mut().for_each(|v| *v = flush(*v));
                Smallest::BF16
            }
        };
        seen.see(values);
        seen
    }

    /// Elements along k of one f32 scale tile, if scales change along k.
    pub(super) fn scale_tile(&self) -> Option<usize> {
        match self {
            Activations::Quantized(x) => match x.scheme() {
                Scheme::Fp8Blockwise { k, .. } => Some(k),
                _ => None,
            },
            _ => None,
        }
    }

    /// The f32 scale at `(row, col)`.
    pub(super) fn outer_scale(&self, row: usize, col: usize) -> f32 {
        match self {
            Activations::Quantized(x) => x.outer_scale(row, col).unwrap_or(1.0),
            _ => 1.0,
        }
    }
}

fn copy<T: Real>(row: Option<&[T]>, out: &mut [f32], kind: Smallest) -> Smallest {
    for (y, x) in out.iter_mut().zip(row.unwrap_or_default()) {
        *y = flush(x.to_f32());
    }
    kind
}

/// The result `[m, n]`, rounded once to the type it is stored in.
#[derive(Debug)]
#[non_exhaustive]
pub enum Output<'a> {
    /// f32.
    F32(MatMut<'a, f32>),
    /// bf16.
    Bf16(MatMut<'a, bf16>),
    /// f16; values beyond 65504 become infinite.
    F16(MatMut<'a, f16>),
}

impl Output<'_> {
    /// Number of rows.
    pub fn m(&self) -> usize {
        match self {
            Output::F32(y) => y.rows(),
            Output::Bf16(y) => y.rows(),
            Output::F16(y) => y.rows(),
        }
    }

    /// Number of columns.
    pub fn n(&self) -> usize {
        match self {
            Output::F32(y) => y.cols(),
            Output::Bf16(y) => y.cols(),
            Output::F16(y) => y.cols(),
        }
    }
}

impl<'a, T: Real> From<MatRef<'a, T>> for Activations<'a> {
    fn from(x: MatRef<'a, T>) -> Self {
        let (data, rows, cols, stride) = x.into_parts();
        match T::slice(data) {
            RealSlice::F32(data) => Activations::F32(MatRef::from_parts((data, rows, cols, stride))),
            RealSlice::Bf16(data) => Activations::Bf16(MatRef::from_parts((data, rows, cols, stride))),
            RealSlice::F16(data) => Activations::F16(MatRef::from_parts((data, rows, cols, stride))),
        }
    }
}

impl<'a, T: Real> From<MatMut<'a, T>> for Output<'a> {
    fn from(y: MatMut<'a, T>) -> Self {
        let (data, rows, cols, stride) = y.into_parts();
        match T::slice_mut(data) {
            RealSliceMut::F32(data) => Output::F32(MatMut::from_parts((data, rows, cols, stride))),
            RealSliceMut::Bf16(data) => Output::Bf16(MatMut::from_parts((data, rows, cols, stride))),
            RealSliceMut::F16(data) => Output::F16(MatMut::from_parts((data, rows, cols, stride))),
        }
    }
}

impl<'a> From<&'a QuantizedMatrix<'a>> for Activations<'a> {
    fn from(x: &'a QuantizedMatrix<'a>) -> Self {
        Activations::Quantized(x)
    }
}
