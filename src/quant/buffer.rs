//! An owned quantized matrix.
#![forbid(unsafe_code)]

use super::matrix::QuantizedMatrix;
use super::scheme::{GlobalScale, Scheme};
use crate::error::{Error, Result, mul};

/// A quantized matrix `[n, k]` that owns its codes and scales: what [`quantize`](super::quantize) makes.
///
/// A cleared or overwritten buffer keeps its capacity, so activations can be quantized call after call without allocating
/// ([`quantize_into`](super::quantize_into)).
#[derive(Debug, Clone)]
pub struct QuantizedMatrixBuf {
    pub(crate) scheme: Scheme,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) codes: Vec<u8>,
    pub(crate) block_scales: Vec<u8>,
    pub(crate) global: GlobalScale,
    pub(crate) outer_scales: Vec<f32>,
}

impl Default for QuantizedMatrixBuf {
    fn default() -> Self {
        QuantizedMatrixBuf {
            scheme: Scheme::Bf16,
            n: 0,
            k: 0,
            codes: Vec::new(),
            block_scales: Vec::new(),
            global: GlobalScale::ONE,
            outer_scales: Vec::new(),
        }
    }
}

impl QuantizedMatrixBuf {
    /// An empty matrix (bf16, 0 x 0): something for [`quantize_into`](super::quantize_into) to write into.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes it `[n, k]` of `scheme` with planes of the right size whose bytes do not matter, keeping their memory where that is
    /// enough. Unchanged on error.
    pub(crate) fn reshape(
        &mut self,
        scheme: Scheme,
        (n, k): (usize, usize),
        block_scales: usize,
        outer_scales: Vec<f32>,
    ) -> Result<()> {
        let codes = mul("codes", n, scheme.code_bytes(k))?;
        let planes = [("codes", &mut self.codes, codes), ("block scales", &mut self.block_scales, block_scales)];
        for (what, plane, len) in &planes {
            if plane.capacity() < *len {
                Vec::<u8>::new().try_reserve_exact(*len).map_err(|e| Error::Unsupported {
                    what: format!("{what} of {len} bytes"),
                    because: e.to_string(),
                })?;
            }
        }
        for (_, plane, len) in planes {
            if plane.capacity() < len {
                // Not `resize`, which would touch the memory once more.
                *plane = vec![0; len];
            } else {
                plane.resize(len, 0);
            }
        }
        (self.scheme, self.n, self.k) = (scheme, n, k);
        (self.global, self.outer_scales) = (GlobalScale::ONE, outer_scales);
        Ok(())
    }

    /// The matrix, borrowed. Allocates nothing.
    pub fn view(&self) -> QuantizedMatrix<'_> {
        QuantizedMatrix::from_planes(
            (self.scheme, self.n, self.k),
            &self.codes,
            &self.block_scales,
            self.global,
            &self.outer_scales,
        )
    }

    /// The scheme.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Rows: output channels of a weight, tokens of an activation.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Columns: the contraction axis.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Code bytes, row-major: `[n, k]` FP8 codes, `[n, k/2]` FP4 pairs (low nibble = even element), `[n, 2k]` bytes of
    /// little-endian bf16.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// Block scale codes, row-major: `[n, k/32]` E8M0 (MX), `[n, k/16]` E4M3FN (NVFP4), else empty.
    pub fn block_scales(&self) -> &[u8] {
        &self.block_scales
    }

    /// The global scale of an NVFP4 matrix; [`GlobalScale::ONE`] for other schemes.
    pub fn global_scale(&self) -> GlobalScale {
        self.global
    }

    /// f32 scales (multipliers) of the FP8 schemes: `[1]` per tensor, `[n]` per channel, row-major
    /// `[ceil(n / tile n), ceil(k / tile k)]` blockwise; else empty.
    pub fn outer_scales(&self) -> &[f32] {
        &self.outer_scales
    }
}
