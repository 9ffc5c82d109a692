//! The expert weights of a mixture-of-experts layer.
#![forbid(unsafe_code)]

use super::matrix::QuantizedMatrix;
use super::scheme::Scheme;
use crate::error::{Error, Result, extent};
use std::ops::Range;

/// One quantized matrix `[n, k]` for each expert, all of one scheme and shape.
#[derive(Debug, Clone)]
pub struct QuantizedExperts<'a> {
    experts: Vec<QuantizedMatrix<'a>>,
}

impl<'a> QuantizedExperts<'a> {
    /// From one matrix for each expert.
    ///
    /// # Errors
    /// [`Error::Empty`] without experts; [`Error::Extent`] or [`Error::Unsupported`] if shapes or schemes differ.
    pub fn new(experts: Vec<QuantizedMatrix<'a>>) -> Result<Self> {
        let Some(first) = experts.first() else {
            return Err(Error::Empty { operand: "experts".into(), axis: "expert" });
        };
        for e in &experts {
            extent("experts", "n", e.n(), first.n())?;
            extent("experts", "k", e.k(), first.k())?;
            if e.scheme() != first.scheme() {
                return Err(Error::Unsupported {
                    what: format!("experts of {:?} and {:?} in one stack", first.scheme(), e.scheme()),
                    because: "all experts of a stack share one scheme".into(),
                });
            }
        }
        Ok(QuantizedExperts { experts })
    }

    /// MXFP4 experts as gpt-oss stores them. `blocks`: `[experts, n, k/32, 16]`, low nibble = even element; `scales`:
    /// `[experts, n, k/32]` E8M0 codes.
    ///
    /// # Errors
    /// [`Error::Empty`] without experts, rows or columns; as [`QuantizedMatrix::mxfp4`].
    pub fn mxfp4(experts: usize, n: usize, k: usize, blocks: &'a [u8], scales: &'a [u8]) -> Result<Self> {
        let rows = crate::error::mul("experts", experts, n)?;
        Self::split(&QuantizedMatrix::mxfp4(rows, k, blocks, scales)?, experts)
    }

    /// The `experts` equal parts of one tall matrix `[experts * n, k]`, at no copy.
    ///
    /// # Errors
    /// [`Error::Empty`] without experts, rows or columns; [`Error::Multiple`] unless the rows divide by `experts`; as
    /// [`QuantizedMatrix::slice_n`].
    pub fn split(stack: &QuantizedMatrix<'a>, experts: usize) -> Result<Self> {
        // Without rows or columns any number of experts would fit any slice: refused before memory is taken for them.
        for (axis, extent) in [("expert", experts), ("n", stack.n()), ("k", stack.k())] {
            if extent == 0 {
                return Err(Error::Empty { operand: "experts".into(), axis });
            }
        }
        crate::error::multiple("experts", "n", stack.n(), experts)?;
        let n = stack.n() / experts;
        Self::new((0..experts).map(|e| stack.slice_n(e * n..(e + 1) * n)).collect::<Result<_>>()?)
    }

    /// Number of experts.
    pub fn len(&self) -> usize {
        self.experts.len()
    }

    /// Never: a stack has at least one expert.
    pub fn is_empty(&self) -> bool {
        self.experts.is_empty()
    }

    /// The scheme all experts share.
    pub fn scheme(&self) -> Scheme {
        self.experts[0].scheme()
    }

    /// Rows (output channels) of each expert.
    pub fn n(&self) -> usize {
        self.experts[0].n()
    }

    /// Columns (contraction axis) of each expert.
    pub fn k(&self) -> usize {
        self.experts[0].k()
    }

    /// Expert `e`, or `None` past the last.
    pub fn get(&self, e: usize) -> Option<&QuantizedMatrix<'a>> {
        self.experts.get(e)
    }

    /// The experts in order.
    pub fn iter(&self) -> std::slice::Iter<'_, QuantizedMatrix<'a>> {
        self.experts.iter()
    }

    /// Rows `rows` of each expert, at no copy (a tensor-parallel shard along n).
    ///
    /// # Errors
    /// As [`QuantizedMatrix::slice_n`].
    pub fn slice_n(&self, rows: Range<usize>) -> Result<QuantizedExperts<'a>> {
        Self::new(self.experts.iter().map(|e| e.slice_n(rows.clone())).collect::<Result<_>>()?)
    }

    /// Columns `cols` of each expert, at no copy (a tensor-parallel shard along k).
    ///
    /// # Errors
    /// As [`QuantizedMatrix::slice_k`].
    pub fn slice_k(&self, cols: Range<usize>) -> Result<QuantizedExperts<'a>> {
        Self::new(self.experts.iter().map(|e| e.slice_k(cols.clone())).collect::<Result<_>>()?)
    }

    /// Every `step`-th row of each expert from `start` on, at no copy: gate `(0, 2)` and up `(1, 2)` of gpt-oss.
    ///
    /// # Errors
    /// As [`QuantizedMatrix::step_n`].
    pub fn step_n(&self, start: usize, step: usize) -> Result<QuantizedExperts<'a>> {
        Self::new(self.experts.iter().map(|e| e.step_n(start, step)).collect::<Result<_>>()?)
    }
}
