//! Packing into `mx-quads/1` and back.
#![forbid(unsafe_code)]

use super::mx::{GROUP, MxElement, MxLayout, MxPlace, MxScalePlace};
use super::{ColumnOrder, GateUp, check_name, check_weight, zeros};
use crate::cpu::Parallelism;
use crate::error::{Error, Result, length, mul};
use crate::num::E8M0;
use crate::quant::{QuantizedExperts, QuantizedMatrix, QuantizedMatrixBuf, Scheme, finite};

/// The scale of padding and of weights without block scales.
const ONE: u8 = E8M0::ONE.to_bits();

/// A matrix in [`MxLayout`]: the tensors to write to HBM.
#[derive(Debug, Clone, PartialEq)]
pub struct PackedMx {
    layout: MxLayout,
    data: Vec<u8>,
    scales: Vec<u8>,
    outer_scales: Vec<f32>,
}

impl MxLayout {
    /// Packs `w` into the caller's memory: `data` of [`data_bytes`](MxLayout::data_bytes), `scales` of
    /// [`scale_bytes`](MxLayout::scale_bytes). Every byte is written, padding too.
    ///
    /// # Errors
    /// [`Error::Extent`] or [`Error::Unsupported`] for a matrix of another shape or scheme; [`Error::Length`]. Nothing is written
    /// then.
    pub fn pack_into(
        &self,
        w: &QuantizedMatrix<'_>,
        parallelism: Parallelism<'_>,
        data: &mut [u8],
        scales: &mut [u8],
    ) -> Result<()> {
        check_weight(w, (self.scheme(), self.n(), self.k()))?;
        length("packed data", data.len(), self.data_bytes())?;
        length("packed scales", scales.len(), self.scale_bytes())?;
        self.words.turn(self.columns()).pack(parallelism, data, |channel, word, bytes| {
            match channel {
                Some(n) => w.copy_codes(n, word * self.words.elements(), bytes),
                None => bytes.fill(0),
            }
            0
        })?;
        self.turn_scales().pack(parallelism, scales, |channel, block, bytes| {
            bytes.fill(ONE);
            if let Some(n) = channel {
                w.copy_block_scales(n, block, bytes);
            }
            0
        })?;
        Ok(())
    }

    /// Packs `w`.
    ///
    /// # Errors
    /// As [`MxLayout::pack_into`]; [`Error::Unsupported`] without memory for the padded tensors.
    pub fn pack(&self, w: &QuantizedMatrix<'_>, parallelism: Parallelism<'_>) -> Result<PackedMx> {
        check_weight(w, (self.scheme(), self.n(), self.k()))?;
        let mut data = zeros("packed data", self.data_bytes())?;
        let mut scales = zeros("packed scales", self.scale_bytes())?;
        self.pack_into(w, parallelism, &mut data, &mut scales)?;
        let outer_scales = outer_scales(self, w)?;
        Ok(PackedMx { layout: *self, data, scales, outer_scales })
    }
}

/// The f32 scales beside the tensors: none (MX), `[1]` (tensor), `[C]` (channel).
fn outer_scales(layout: &MxLayout, w: &QuantizedMatrix<'_>) -> Result<Vec<f32>> {
    match layout.scheme() {
        Scheme::Fp8PerTensor(_) => Ok(w.outer_scale(0, 0).into_iter().collect()),
        Scheme::Fp8PerChannel(_) => {
            let scales: Vec<f32> = (0..w.n()).filter_map(|n| w.outer_scale(n, 0)).collect();
            layout.columns().pack(&scales, 1.0)
        }
        _ => Ok(Vec::new()),
    }
}

impl PackedMx {
    /// Takes tensors that were packed before (read from a file, from the device): `name` is the layout they were packed in.
    ///
    /// `outer_scales`: none for MX schemes, `[1]` per tensor, `[C]` per channel.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another layout or version; [`Error::Length`]; [`Error::Value`] for a scale that is not finite.
    pub fn from_parts(
        name: &str,
        layout: MxLayout,
        data: Vec<u8>,
        scales: Vec<u8>,
        outer_scales: Vec<f32>,
    ) -> Result<Self> {
        check_name(name, MxLayout::NAME)?;
        length("packed data", data.len(), layout.data_bytes())?;
        length("packed scales", scales.len(), layout.scale_bytes())?;
        let needed = match layout.scheme() {
            Scheme::Fp8PerTensor(_) => 1,
            Scheme::Fp8PerChannel(_) => layout.columns().count(),
            _ => 0,
        };
        length("f32 scales", outer_scales.len(), needed)?;
        finite("f32 scales", &outer_scales)?;
        Ok(PackedMx { layout, data, scales, outer_scales })
    }

    /// The layout.
    pub fn layout(&self) -> &MxLayout {
        &self.layout
    }

    /// `[128, T, C]` x4 words, little-endian.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// `[64, S, C]` E8M0 codes.
    pub fn scales(&self) -> &[u8] {
        &self.scales
    }

    /// f32 multipliers of the result: none (MX), `[1]` (tensor), `[C]` (channel, 1.0 in padding).
    pub fn outer_scales(&self) -> &[f32] {
        &self.outer_scales
    }

    /// The code at a place; `None` outside the tensor.
    pub fn code(&self, at: MxPlace) -> Option<u8> {
        let word = self.layout.word_index(at).filter(|_| at.sub < 4)? * self.layout.element().word_bytes();
        match self.layout.element() {
            MxElement::E4M3Fn | MxElement::E5M2 => self.data.get(word + at.sub).copied(),
            MxElement::E2M1 => self.data.get(word + at.sub / 2).map(|pair| (pair >> (4 * (at.sub % 2))) & 15),
        }
    }

    /// The scale code at a place; `None` outside the tensor.
    pub fn scale(&self, at: MxScalePlace) -> Option<u8> {
        self.scales.get(self.layout.scale_index(at)?).copied()
    }

    /// The matrix again: codes, block scales and f32 scales as they were, in planar order.
    ///
    /// # Errors
    /// [`Error::Unsupported`] without memory for it.
    pub fn unpack(&self, parallelism: Parallelism<'_>) -> Result<QuantizedMatrixBuf> {
        let mut out = QuantizedMatrixBuf::new();
        self.unpack_into(parallelism, &mut out)?;
        Ok(out)
    }

    /// As [`PackedMx::unpack`], into the memory of `out` where that is enough: fresh memory costs more than unpacking.
    ///
    /// # Errors
    /// [`Error::Unsupported`] without memory for it; `out` is unchanged then.
    pub fn unpack_into(&self, parallelism: Parallelism<'_>, out: &mut QuantizedMatrixBuf) -> Result<()> {
        let (layout, columns) = (&self.layout, self.layout.columns());
        let (scheme, n, k) = (layout.scheme(), layout.n(), layout.k());
        let blocks = if scheme.block() == GROUP { k / GROUP } else { 0 };
        let outer_scales = match scheme {
            Scheme::Fp8PerChannel(_) => columns.unpack(&self.outer_scales)?,
            _ => self.outer_scales.clone(),
        };
        out.reshape(scheme, (n, k), mul("block scales", n, blocks)?, outer_scales)?;
        layout.words.turn(columns).unpack(parallelism, &self.data, &mut out.codes, scheme.code_bytes(k))?;
        layout.turn_scales().unpack(parallelism, &self.scales, &mut out.block_scales, blocks)
    }
}

/// The experts of a layer in [`MxLayout`]: `[E]` in front of the data and of the scale tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct PackedMxExperts {
    layout: MxLayout,
    experts: usize,
    data: Vec<u8>,
    scales: Vec<u8>,
}

impl PackedMxExperts {
    /// Packs every expert.
    ///
    /// # Errors
    /// As [`MxLayout::new`]; [`Error::Unsupported`] for schemes other than MX, or without memory; [`Error::Overflow`].
    pub fn pack(
        w: &QuantizedExperts<'_>,
        gate_up: GateUp,
        order: ColumnOrder,
        parallelism: Parallelism<'_>,
    ) -> Result<Self> {
        let layout = MxLayout::new(w.scheme(), w.n(), w.k(), gate_up, order)?;
        if w.scheme().block() != GROUP {
            return Err(Error::Unsupported {
                what: format!("experts of {:?} in layout {}", w.scheme(), MxLayout::NAME),
                because: "the grouped kernel takes block scales only; pack each expert on its own".into(),
            });
        }
        let experts = w.len();
        let mut data = zeros("packed experts", mul("packed experts", experts, layout.data_bytes())?)?;
        let mut scales = zeros("packed experts", mul("packed experts", experts, layout.scale_bytes())?)?;
        let parts = data.chunks_exact_mut(layout.data_bytes()).zip(scales.chunks_exact_mut(layout.scale_bytes()));
        for (w, (data, scales)) in w.iter().zip(parts) {
            layout.pack_into(w, parallelism, data, scales)?;
        }
        Ok(PackedMxExperts { layout, experts, data, scales })
    }

    /// The layout of each expert.
    pub fn layout(&self) -> &MxLayout {
        &self.layout
    }

    /// Number of experts.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// `[E, 128, T, C]` x4 words, little-endian.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// `[E, 64, S, C]` E8M0 codes.
    pub fn scales(&self) -> &[u8] {
        &self.scales
    }

    /// Expert `e`, copied; `None` past the last.
    pub fn get(&self, e: usize) -> Option<PackedMx> {
        let (d, s) = (self.layout.data_bytes(), self.layout.scale_bytes());
        if e >= self.experts {
            return None;
        }
        let (data, scales) = (self.data[e * d..(e + 1) * d].to_vec(), self.scales[e * s..(e + 1) * s].to_vec());
        Some(PackedMx { layout: self.layout, data, scales, outer_scales: Vec::new() })
    }
}
