//! NVFP4 weights of a GGUF file: repacked, because their scales lie between their codes in pairs of 32 bytes.
#![forbid(unsafe_code)]

use super::super::{named, tensor::extents};
use super::{GgmlType, Gguf, bad};
use crate::error::{Error, Result};
use crate::quant::{GlobalScale, QuantizedExperts, QuantizedMatrix, nvfp4_from_gguf};

/// NVFP4 weights of one matrix or of a stack of experts, with the f32 scales that the file keeps in another tensor.
#[derive(Debug, Clone)]
pub struct Nvfp4 {
    name: String,
    n: usize,
    k: usize,
    codes: Vec<u8>,
    scales: Vec<u8>,
    /// One for each expert, or one for all.
    global: Vec<f32>,
}

impl Gguf {
    /// The NVFP4 weight `[n, k]` or `[experts, n, k]` of that name, copied into planar codes and scales.
    ///
    /// Its f32 scale is the tensor `X.scale` or `X.weight.scale` for a weight `X.weight` (writers differ); it has one element,
    /// or one for each expert.
    ///
    /// # Errors
    /// [`Error::Missing`] for the weight, or for the scale: without it the values would be wrong without a sign;
    /// [`Error::Unexpected`] if both names of the scale are there; [`Error::Unsupported`] for another type;
    /// [`Error::Checkpoint`] for other numbers of axes or scales; [`Error::Empty`] for an extent of 0; [`Error::Value`] for a
    /// block scale with the sign bit.
    pub fn nvfp4(&self, name: &str) -> Result<Nvfp4> {
        let tensor = self.tensor(name)?;
        if tensor.ggml_type != GgmlType::NVFP4 {
            return Err(tensor.unsupported("needed NVFP4"));
        }
        let (experts, n, k) = match tensor.shape.len() {
            3 => extents(name, tensor.shape, ["expert", "n", "k"]).map(|[e, n, k]| (e, n, k))?,
            _ => extents(name, tensor.shape, ["n", "k"]).map(|[n, k]| (1, n, k))?,
        };
        let global = self.nvfp4_scale(name)?;
        if ![1, experts].contains(&global.len()) {
            return Err(bad(name, format!("has {} f32 scales, needed 1 or {experts}", global.len())));
        }
        // Whole super-blocks of 36 bytes, as the type and the shape ask for: 4 scales and 32 bytes of codes each.
        let blocks = tensor.bytes.len() / 36;
        let (mut codes, mut scales) = (vec![0; blocks * 32], vec![0; blocks * 4]);
        nvfp4_from_gguf(tensor.bytes, &mut codes, &mut scales).map_err(|e| named(e, name, name))?;
        Ok(Nvfp4 { name: name.into(), n, k, codes, scales, global })
    }

    fn nvfp4_scale(&self, weight: &str) -> Result<Vec<f32>> {
        let (short, long) = (format!("{}.scale", weight.trim_end_matches(".weight")), format!("{weight}.scale"));
        match (self.contains(&short), self.contains(&long)) {
            (true, true) if short != long => {
                let because = format!("there is {short} as well: which of the two holds is not clear");
                Err(Error::Unexpected { operand: long.into(), because: because.into() })
            }
            (true, _) => self.f32(&short).map(|s| s.into_owned()),
            (false, true) => self.f32(&long).map(|s| s.into_owned()),
            (false, false) => {
                Err(Error::Missing { operand: short.into(), needed_by: format!("the NVFP4 weight {weight}").into() })
            }
        }
    }
}

impl Nvfp4 {
    /// Number of experts; 1 for a matrix.
    pub fn experts(&self) -> usize {
        // Both axes are above 0 and the codes are whole rows.
        self.codes.len() / (self.n * self.k / 2)
    }

    /// Expert `e` as a matrix `[n, k]`; 0 for a matrix.
    ///
    /// # Errors
    /// [`Error::Index`] past the last; [`Error::Value`] if its f32 scale is not finite.
    pub fn matrix(&self, e: usize) -> Result<QuantizedMatrix<'_>> {
        let (codes, scales) = (self.n * self.k / 2, self.n * self.k / 16);
        let (Some(codes), Some(scales)) =
            (self.codes.chunks_exact(codes).nth(e), self.scales.chunks_exact(scales).nth(e))
        else {
            return Err(Error::index(self.name.clone(), 0, e, self.experts()));
        };
        let global = self.global.get(e).or(self.global.first()).copied().unwrap_or(f32::NAN);
        QuantizedMatrix::nvfp4(self.n, self.k, codes, scales, GlobalScale::multiplier(global))
            .map_err(|e| named(e, &self.name, &format!("{} f32 scale", self.name)))
    }

    /// All experts.
    ///
    /// # Errors
    /// As [`Nvfp4::matrix`].
    pub fn stack(&self) -> Result<QuantizedExperts<'_>> {
        QuantizedExperts::new((0..self.experts()).map(|e| self.matrix(e)).collect::<Result<_>>()?)
    }
}
