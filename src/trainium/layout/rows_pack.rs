//! Packing into `rows-128/1` and back.
#![forbid(unsafe_code)]

use super::halve::{doubled, halve, halved};
use super::rows::{RowElement, RowPlace, RowsLayout};
use super::{check_name, check_weight, zeros};
use crate::cpu::Parallelism;
use crate::error::{Error, Result, length, mul};
use crate::num::BridgeReport;
use crate::quant::{QuantizedMatrix, QuantizedMatrixBuf, Scheme, finite};
use std::borrow::Cow;

/// A weight in [`RowsLayout`]: the tensors to write to HBM.
#[derive(Debug, Clone, PartialEq)]
pub struct PackedRows {
    layout: RowsLayout,
    data: Vec<u8>,
    scales: Vec<f32>,
}

impl RowsLayout {
    /// Packs `w` into the caller's memory: `data` of [`data_bytes`](RowsLayout::data_bytes). Every byte is written, padding too.
    /// f32 scales are not part of it: [`RowsLayout::scales`].
    ///
    /// The report counts codes that halving rounded; if nothing is halved, all are exact.
    ///
    /// # Errors
    /// [`Error::Extent`] or [`Error::Unsupported`] for a weight of another shape or scheme; [`Error::Length`]. Nothing is written
    /// then.
    pub fn pack_into(
        &self,
        w: &QuantizedMatrix<'_>,
        parallelism: Parallelism<'_>,
        data: &mut [u8],
    ) -> Result<BridgeReport> {
        check_weight(w, (self.scheme(), self.n(), self.k()))?;
        length("packed data", data.len(), self.data_bytes())?;
        let rounded = self.words.turn(self.columns()).pack(parallelism, data, |channel, word, bytes| {
            let Some(n) = channel else {
                bytes.fill(0);
                return 0;
            };
            w.copy_codes(n, word * self.words.elements(), bytes);
            if self.halves() { halve(bytes) } else { 0 }
        })?;
        // Padding is zeros, which halve exactly: only the weight's codes are reported.
        Ok(halved(self.n() * self.k(), rounded))
    }

    /// The f32 scales that multiply the result: `[1]` per tensor, `[C]` per channel (1.0 in padding), the grid as it is for tiles
    /// (`[ceil(n / tile n), ceil(k / tile k)]`), none for bf16. Doubled where codes are halved.
    ///
    /// # Errors
    /// [`Error::Extent`] or [`Error::Unsupported`] for a weight of another shape or scheme; [`Error::Value`] for a scale that
    /// cannot be doubled.
    pub fn scales(&self, w: &QuantizedMatrix<'_>) -> Result<Vec<f32>> {
        check_weight(w, (self.scheme(), self.n(), self.k()))?;
        let mut scales: Vec<f32> = match self.scheme() {
            Scheme::Fp8PerTensor(_) => w.outer_scale(0, 0).into_iter().collect(),
            Scheme::Fp8PerChannel(_) => (0..w.n()).filter_map(|n| w.outer_scale(n, 0)).collect(),
            Scheme::Fp8Blockwise { n, k, .. } => {
                let tiles = (0..w.n()).step_by(n).flat_map(|i| (0..w.k()).step_by(k).map(move |j| (i, j)));
                tiles.filter_map(|(i, j)| w.outer_scale(i, j)).collect()
            }
            _ => Vec::new(),
        };
        if self.halves() {
            doubled("scales", &mut scales)?;
        }
        match self.scheme() {
            Scheme::Fp8PerChannel(_) => self.columns().pack(&scales, 1.0),
            _ => Ok(scales),
        }
    }

    /// Packs `w`, and says what halving did to its codes.
    ///
    /// # Errors
    /// As [`RowsLayout::pack_into`] and [`RowsLayout::scales`]; [`Error::Unsupported`] without memory for the padded tensor.
    pub fn pack(&self, w: &QuantizedMatrix<'_>, parallelism: Parallelism<'_>) -> Result<(PackedRows, BridgeReport)> {
        let scales = self.scales(w)?;
        let mut data = zeros("packed data", self.data_bytes())?;
        let report = self.pack_into(w, parallelism, &mut data)?;
        Ok((PackedRows { layout: *self, data, scales }, report))
    }

    /// Number of f32 scales.
    fn scale_count(&self) -> Result<usize> {
        const TILE: Error = Error::Empty { operand: Cow::Borrowed("scale tile"), axis: "n or k" };
        match self.scheme() {
            Scheme::Fp8PerTensor(_) => Ok(1),
            Scheme::Fp8PerChannel(_) => Ok(self.columns().count()),
            Scheme::Fp8Blockwise { n: 0, .. } | Scheme::Fp8Blockwise { k: 0, .. } => Err(TILE),
            Scheme::Fp8Blockwise { n, k, .. } => mul("f32 scales", self.n().div_ceil(n), self.k().div_ceil(k)),
            _ => Ok(0),
        }
    }
}

impl PackedRows {
    /// Takes tensors that were packed before: `name` is the layout they were packed in, `scales` as [`RowsLayout::scales`] gives
    /// them.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another layout or version; [`Error::Length`]; [`Error::Value`] for a scale that is not finite.
    pub fn from_parts(name: &str, layout: RowsLayout, data: Vec<u8>, scales: Vec<f32>) -> Result<Self> {
        check_name(name, RowsLayout::NAME)?;
        length("packed data", data.len(), layout.data_bytes())?;
        length("f32 scales", scales.len(), layout.scale_count()?)?;
        finite("f32 scales", &scales)?;
        Ok(PackedRows { layout, data, scales })
    }

    /// The layout.
    pub fn layout(&self) -> &RowsLayout {
        &self.layout
    }

    /// `[128, H, C]` elements, little-endian.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// f32 multipliers: as [`RowsLayout::scales`].
    pub fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// The code at a place, as the device reads it; `None` outside the tensor.
    pub fn code(&self, at: RowPlace) -> Option<u16> {
        let i = self.layout.index(at)?;
        match self.layout.element() {
            RowElement::Fp8(_) => self.data.get(i).map(|code| u16::from(*code)),
            RowElement::Bf16 => self.data.as_chunks::<2>().0.get(i).map(|word| u16::from_le_bytes(*word)),
        }
    }

    /// What the device reads as a matrix again: codes and scales in planar order, of [`RowsLayout::device_scheme`] (so halved codes
    /// stay halved and their scales doubled).
    ///
    /// # Errors
    /// [`Error::Unsupported`] without memory for it.
    pub fn unpack(&self, parallelism: Parallelism<'_>) -> Result<QuantizedMatrixBuf> {
        let mut out = QuantizedMatrixBuf::new();
        self.unpack_into(parallelism, &mut out)?;
        Ok(out)
    }

    /// As [`PackedRows::unpack`], into the memory of `out` where that is enough: fresh memory costs more than unpacking.
    ///
    /// # Errors
    /// [`Error::Unsupported`] without memory for it; `out` is unchanged then.
    pub fn unpack_into(&self, parallelism: Parallelism<'_>, out: &mut QuantizedMatrixBuf) -> Result<()> {
        let (scheme, n, k) = (self.layout.device_scheme(), self.layout.n(), self.layout.k());
        let columns = self.layout.columns();
        let outer_scales = match scheme {
            Scheme::Fp8PerChannel(_) => columns.unpack(&self.scales)?,
            _ => self.scales.clone(),
        };
        out.reshape(scheme, (n, k), 0, outer_scales)?;
        self.layout.words.turn(columns).unpack(parallelism, &self.data, &mut out.codes, scheme.code_bytes(k))
    }
}
