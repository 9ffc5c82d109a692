//! What goes in and what comes out: activations and outputs of any plain type.
#![forbid(unsafe_code)]

use crate::cpu::{Kernel, Range, Simd, Smallest, Tier, flush};
use crate::num::{Real, RealSlice, RealSliceMut};
use crate::quant::{QuantizedMatrix, Scheme};
use crate::view::{MatMut, MatRef};
use half::slice::HalfFloatSliceExt;
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
    pub(super) fn load(&self, tier: Tier, row: usize, out: &mut [f32]) -> Range {
        let (values, pad) = out.split_at_mut(self.k());
        pad.fill(0.0);
        let mut range = Range::new(if self.exact_in_bf16() { Smallest::BF16 } else { Smallest::F32 });
        tier.run(Load { x: self, row, values, range: &mut range });
        range
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

    /// Whether bf16 holds every element (without f32 scales) exactly.
    pub(super) fn exact_in_bf16(&self) -> bool {
        matches!(self, Activations::Bf16(_) | Activations::Quantized(_))
    }

    /// The f32 scale at `(row, col)`.
    pub(super) fn outer_scale(&self, row: usize, col: usize) -> f32 {
        match self {
            Activations::Quantized(x) => x.outer_scale(row, col).unwrap_or(1.0),
            _ => 1.0,
        }
    }
}

/// [`Activations::load`], compiled for a tier.
struct Load<'a> {
    x: &'a Activations<'a>,
    row: usize,
    values: &'a mut [f32],
    range: &'a mut Range,
}

impl Kernel for Load<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Load { x, row, values, range } = self;
        match x {
            Activations::F32(x) => values.copy_from_slice(x.row(row).unwrap_or_default()),
            Activations::Bf16(x) => {
                for (value, x) in values.iter_mut().zip(x.row(row).unwrap_or_default()) {
                    *value = f32::from_bits(u32::from(x.to_bits()) << 16);
                }
            }
            Activations::F16(x) => x.row(row).unwrap_or_default().convert_to_f32_slice(values),
            Activations::Quantized(x) => x.decode_from(row, 0, values),
        }
        for value in &mut *values {
            *value = flush(*value);
        }
        range.see(values);
    }
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
