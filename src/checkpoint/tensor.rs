//! One tensor as it lies in the file.
#![forbid(unsafe_code)]

use super::{bad, bytes};
use crate::error::{Error, Result};
use crate::quant::QuantizedMatrix;
use safetensors::Dtype;
use std::borrow::Cow;

/// A tensor of a safetensors file: what the header says and the bytes, borrowed. The bytes have the length that dtype and
/// shape ask for; they may have any alignment.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its element type.
    pub dtype: Dtype,
    /// Extents, slowest axis first; empty for a scalar.
    pub shape: &'a [usize],
    /// Row-major little-endian elements.
    pub bytes: &'a [u8],
}

impl<'a> Tensor<'a> {
    /// Asks for one of `dtypes`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming the tensor, what it is and what is needed.
    pub fn expect_dtype(&self, dtypes: &[Dtype]) -> Result<()> {
        if dtypes.contains(&self.dtype) {
            return Ok(());
        }
        let needed: Vec<String> = dtypes.iter().map(Dtype::to_string).collect();
        Err(bad(self.name, format!("is {}, needed {}", self.dtype, needed.join(" or "))))
    }

    /// Asks for exactly these axes.
    ///
    /// # Errors
    /// [`Error::Extent`] naming the first axis that differs; [`Error::Checkpoint`] if the number of axes does.
    pub fn expect_shape(&self, axes: &[(&'static str, usize)]) -> Result<()> {
        if self.shape.len() != axes.len() {
            let needed: Vec<usize> = axes.iter().map(|(_, n)| *n).collect();
            return Err(bad(self.name, format!("has shape {:?}, needed {needed:?}", self.shape)));
        }
        for (&got, &(axis, needed)) in self.shape.iter().zip(axes) {
            if got != needed {
                return Err(Error::Extent { operand: self.name.to_owned().into(), axis, got, needed });
            }
        }
        Ok(())
    }

    /// The extents `[n, k]` of a matrix.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] unless there are two axes; [`Error::Empty`] if one is 0.
    pub fn matrix_shape(&self) -> Result<(usize, usize)> {
        extents(self.name, self.shape, ["n", "k"]).map(|[n, k]| (n, k))
    }

    /// Number of elements: the product of the extents; `usize::MAX` if that does not fit, as it always does in a file that was
    /// opened.
    pub fn len(&self) -> usize {
        self.shape.iter().fold(1, |n, d| n.saturating_mul(*d))
    }

    /// Whether an extent is 0.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements as f32, exactly: F32 borrowed where aligned and copied where not, BF16 and F16 converted.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for another dtype.
    pub fn f32(&self) -> Result<Cow<'a, [f32]>> {
        self.expect_dtype(&[Dtype::F32, Dtype::BF16, Dtype::F16])?;
        Ok(match self.dtype {
            Dtype::F32 => bytes::f32s(self.bytes),
            Dtype::BF16 => bytes::bf16s(self.bytes).into(),
            _ => bytes::f16s(self.bytes).into(),
        })
    }

    /// The one element of a scalar or of a tensor with a single element, as f32.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for another dtype or another number of elements.
    pub fn scalar(&self) -> Result<f32> {
        match *self.f32()? {
            [x] => Ok(x),
            _ => Err(bad(self.name, format!("has shape {:?}, needed one element", self.shape))),
        }
    }

    /// A BF16 matrix `[n, k]`, borrowed.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for another dtype or number of axes; [`Error::Empty`] if one is 0.
    pub fn bf16_matrix(&self) -> Result<QuantizedMatrix<'a>> {
        self.expect_dtype(&[Dtype::BF16])?;
        let (n, k) = self.matrix_shape()?;
        QuantizedMatrix::bf16(n, k, self.bytes)
    }
}

/// The extents of a weight. None may be 0: a file of no bytes could claim 2^60 rows, and whoever walks them would never end.
pub(super) fn extents<const N: usize>(name: &str, shape: &[usize], axes: [&'static str; N]) -> Result<[usize; N]> {
    let Some(shape) = shape.first_chunk().filter(|_| shape.len() == N) else {
        return Err(bad(name, format!("has shape {shape:?}, needed {N} axes")));
    };
    match shape.iter().zip(axes).find(|(extent, _)| **extent == 0) {
        Some((_, axis)) => Err(Error::Empty { operand: name.to_owned().into(), axis }),
        None => Ok(*shape),
    }
}
