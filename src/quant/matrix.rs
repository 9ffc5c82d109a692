//! A borrowed quantized matrix, validated once.
#![forbid(unsafe_code)]

use super::scheme::{GlobalScale, NibbleOrder, Scheme};
use crate::error::{Error, Result, extent, length, mul, multiple};
use crate::num::{E8M0, F4E2M1x2, F8E4M3Fn, Fp8};
use half::bf16;
use std::borrow::Cow;
use std::ops::Range;

/// Bytes laid out by row and block.
#[derive(Debug, Clone, Copy)]
struct Strided<'a> {
    data: &'a [u8],
    /// Bytes from row to row.
    row: usize,
    /// Bytes from block to block.
    block: usize,
}

impl<'a> Strided<'a> {
    fn planar(data: &'a [u8], row: usize, block: usize) -> Self {
        Strided { data, row, block }
    }

    fn at(&self, row: usize, block: usize, bytes: usize) -> &'a [u8] {
        let start = row * self.row + block * self.block;
        &self.data[start..start + bytes]
    }

    fn skip(self, row: usize, block: usize) -> Self {
        let start = (row * self.row + block * self.block).min(self.data.len());
        Strided { data: &self.data[start..], ..self }
    }
}

#[derive(Debug, Clone)]
enum Scales<'a> {
    None,
    E8m0(Strided<'a>),
    Nvfp4 {
        block: Strided<'a>,
        global: GlobalScale,
    },
    /// Row-major grid of f32, `row` elements from one tile row to the next.
    F32 {
        data: Cow<'a, [f32]>,
        row: usize,
    },
}

/// A quantized matrix `[n, k]`: codes and scales borrowed from wherever they lie, checked once.
///
/// Value of element `(row, col)` = code x block scale x f32 scale, as far as the scheme has them. Codes of a row are
/// contiguous along k (or, for GGUF, contiguous within a block); rows may be strided. Weights have n output channels; an
/// activation has its m tokens as rows.
#[derive(Debug, Clone)]
pub struct QuantizedMatrix<'a> {
    scheme: Scheme,
    n: usize,
    k: usize,
    codes: Strided<'a>,
    nibbles: NibbleOrder,
    scales: Scales<'a>,
}

/// Names the operand in messages.
const CODES: &str = "codes";
const SCALES: &str = "scales";

impl<'a> QuantizedMatrix<'a> {
    /// bf16 values: `bytes` is `[n, k]` little-endian bf16, any alignment.
    ///
    /// # Errors
    /// [`Error::Length`] unless `bytes` holds `2 * n * k`.
    pub fn bf16(n: usize, k: usize, bytes: &'a [u8]) -> Result<Self> {
        Self::build(Scheme::Bf16, n, k, bytes, Scales::None)
    }

    /// OCP MXFP4 as gpt-oss and compressed-tensors store it.
    ///
    /// `blocks`: `[n, k/32, 16]` bytes, low nibble = even element. `scales`: `[n, k/32]` E8M0 codes (255 makes its block NaN).
    ///
    /// # Errors
    /// [`Error::Multiple`] unless k is a multiple of 32; [`Error::Length`] for either slice.
    pub fn mxfp4(n: usize, k: usize, blocks: &'a [u8], scales: &'a [u8]) -> Result<Self> {
        let scales = Self::block_scales(Scheme::Mxfp4, n, k, scales)?;
        Self::build(Scheme::Mxfp4, n, k, blocks, Scales::E8m0(scales))
    }

    /// OCP MXFP4 as GGUF stores it (ggml type 39): `[n, k/32, 17]` bytes, each block an E8M0 code and 16 bytes whose low
    /// nibbles are elements 0..16 and high nibbles elements 16..32. Borrowed as it lies.
    ///
    /// Scale code 255 is NaN here (ggml reads it as 2^128).
    ///
    /// # Errors
    /// [`Error::Multiple`] unless k is a multiple of 32; [`Error::Length`].
    pub fn mxfp4_gguf(n: usize, k: usize, bytes: &'a [u8]) -> Result<Self> {
        multiple("gguf mxfp4 weight", "k", k, 32)?;
        mul(CODES, n, k)?;
        let row = mul(CODES, k / 32, 17)?;
        length(CODES, bytes.len(), mul(CODES, n, row)?)?;
        Ok(QuantizedMatrix {
            scheme: Scheme::Mxfp4,
            n,
            k,
            codes: Strided { data: bytes.get(1..).unwrap_or_default(), row, block: 17 },
            nibbles: NibbleOrder::Halves,
            scales: Scales::E8m0(Strided { data: bytes, row, block: 17 }),
        })
    }

    /// OCP MXFP8. `codes`: `[n, k]` bytes. `scales`: `[n, k/32]` E8M0 codes (255 makes its block NaN).
    ///
    /// # Errors
    /// [`Error::Multiple`] unless k is a multiple of 32; [`Error::Length`] for either slice.
    pub fn mxfp8(element: Fp8, n: usize, k: usize, codes: &'a [u8], scales: &'a [u8]) -> Result<Self> {
        let scheme = Scheme::Mxfp8(element);
        let scales = Self::block_scales(scheme, n, k, scales)?;
        Self::build(scheme, n, k, codes, Scales::E8m0(scales))
    }

    /// NVFP4. `codes`: `[n, k/2]` bytes, low nibble = even element. `scales`: `[n, k/16]` E4M3FN codes; a sign bit is refused,
    /// NaN (0x7F) makes its block NaN.
    ///
    /// # Errors
    /// [`Error::Multiple`] unless k is a multiple of 16; [`Error::Length`]; [`Error::Value`] for a scale with the sign bit or a
    /// global scale that is not finite.
    pub fn nvfp4(n: usize, k: usize, codes: &'a [u8], scales: &'a [u8], global: GlobalScale) -> Result<Self> {
        let block = Self::block_scales(Scheme::Nvfp4, n, k, scales)?;
        if let Some(at) = scales.iter().position(|s| *s >= 0x80) {
            let got = format!("E4M3FN code {:#04x}", scales[at]);
            return Err(Error::Value {
                operand: SCALES.into(),
                at,
                got,
                needed: "an NVFP4 block scale without the sign bit",
            });
        }
        // As stored and as used: an infinite divisor would be a silent zero, a tiny one an infinite multiplier.
        for stored_or_used in [global.stored(), global.get()] {
            finite("global scale", &[stored_or_used])?;
        }
        Self::build(Scheme::Nvfp4, n, k, codes, Scales::Nvfp4 { block, global })
    }

    /// FP8 with one f32 scale. `codes`: `[n, k]` bytes.
    ///
    /// # Errors
    /// [`Error::Length`]; [`Error::Value`] if the scale is not finite.
    pub fn fp8_per_tensor(element: Fp8, n: usize, k: usize, codes: &'a [u8], scale: f32) -> Result<Self> {
        finite("scale", &[scale])?;
        Self::build(Scheme::Fp8PerTensor(element), n, k, codes, Scales::F32 { data: vec![scale].into(), row: 0 })
    }

    /// FP8 with one f32 scale for each row. `codes`: `[n, k]` bytes; `scales`: `[n]`.
    ///
    /// # Errors
    /// [`Error::Length`]; [`Error::Value`] if a scale is not finite.
    pub fn fp8_per_channel(
        element: Fp8,
        n: usize,
        k: usize,
        codes: &'a [u8],
        scales: impl Into<Cow<'a, [f32]>>,
    ) -> Result<Self> {
        let data = scales.into();
        length(SCALES, data.len(), n)?;
        finite(SCALES, &data)?;
        Self::build(Scheme::Fp8PerChannel(element), n, k, codes, Scales::F32 { data, row: 1 })
    }

    /// FP8 with one f32 scale for each `block.0` x `block.1` tile. `codes`: `[n, k]` bytes; `scales`:
    /// `[ceil(n / block.0), ceil(k / block.1)]`, multipliers (DeepSeek's `weight_scale_inv` is one in spite of its name).
    ///
    /// # Errors
    /// [`Error::Empty`] for a tile without extent; [`Error::Length`]; [`Error::Value`] if a scale is not finite.
    pub fn fp8_blockwise(
        element: Fp8,
        n: usize,
        k: usize,
        codes: &'a [u8],
        scales: impl Into<Cow<'a, [f32]>>,
        block: (usize, usize),
    ) -> Result<Self> {
        for (extent, axis) in [(block.0, "n"), (block.1, "k")] {
            if extent == 0 {
                return Err(Error::Empty { operand: "scale tile".into(), axis });
            }
        }
        let data = scales.into();
        let row = k.div_ceil(block.1);
        length(SCALES, data.len(), mul(SCALES, n.div_ceil(block.0), row)?)?;
        finite(SCALES, &data)?;
        let scheme = Scheme::Fp8Blockwise { element, n: block.0, k: block.1 };
        Self::build(scheme, n, k, codes, Scales::F32 { data, row })
    }

    /// Block scales of one byte for each `scheme.block()` elements, contiguous.
    fn block_scales(scheme: Scheme, n: usize, k: usize, scales: &'a [u8]) -> Result<Strided<'a>> {
        multiple("quantized matrix", "k", k, scheme.block())?;
        let row = k / scheme.block();
        length(SCALES, scales.len(), mul(SCALES, n, row)?)?;
        Ok(Strided::planar(scales, row, 1))
    }

    fn build(scheme: Scheme, n: usize, k: usize, codes: &'a [u8], scales: Scales<'a>) -> Result<Self> {
        // Kernels round k up to whole steps of 32.
        k.checked_next_multiple_of(32).ok_or(Error::Overflow { operand: CODES.into() })?;
        let row = mul(CODES, k, scheme.bits())? / 8;
        length(CODES, codes.len(), mul(CODES, n, row)?)?;
        let codes = Strided::planar(codes, row, scheme.code_bytes(scheme.block()));
        Ok(QuantizedMatrix { scheme, n, k, codes, nibbles: NibbleOrder::Interleaved, scales })
    }

    /// From planes whose lengths the caller vouches for: contiguous codes, then the scales that `scheme` has (the others are
    /// ignored). What [`QuantizedMatrixBuf`](super::QuantizedMatrixBuf) holds, without a second validation or an allocation.
    pub(crate) fn from_planes(
        (scheme, n, k): (Scheme, usize, usize),
        codes: &'a [u8],
        block_scales: &'a [u8],
        global: GlobalScale,
        outer_scales: &'a [f32],
    ) -> Self {
        let block = Strided::planar(block_scales, k / scheme.block(), 1);
        let outer = |row| Scales::F32 { data: Cow::Borrowed(outer_scales), row };
        let scales = match scheme {
            Scheme::Bf16 => Scales::None,
            Scheme::Mxfp4 | Scheme::Mxfp8(_) => Scales::E8m0(block),
            Scheme::Nvfp4 => Scales::Nvfp4 { block, global },
            Scheme::Fp8PerTensor(_) => outer(0),
            Scheme::Fp8PerChannel(_) => outer(1),
            Scheme::Fp8Blockwise { k: tile, .. } => outer(k.div_ceil(tile)),
        };
        let codes = Strided::planar(codes, scheme.code_bytes(k), scheme.code_bytes(scheme.block()));
        QuantizedMatrix { scheme, n, k, codes, nibbles: NibbleOrder::Interleaved, scales }
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

    /// How FP4 codes lie in their bytes.
    pub fn nibble_order(&self) -> NibbleOrder {
        self.nibbles
    }

    /// Bytes that codes and scales take, as stored (16-bit values count as codes).
    pub fn bytes(&self) -> usize {
        let scales = match &self.scales {
            Scales::None => 0,
            Scales::E8m0(_) | Scales::Nvfp4 { .. } => self.n * (self.k / self.scheme.block()),
            Scales::F32 { data, .. } => data.len() * 4,
        };
        self.n * self.scheme.code_bytes(self.k) + scales
    }

    /// Rows `rows` as a matrix of their own, at no copy (a tensor-parallel shard along n).
    ///
    /// # Errors
    /// [`Error::Index`] outside the matrix; [`Error::Multiple`] if the range does not start at a scale tile's edge.
    pub fn slice_n(&self, rows: Range<usize>) -> Result<QuantizedMatrix<'a>> {
        check_range("quantized matrix rows", &rows, self.n)?;
        let tile = if let Scheme::Fp8Blockwise { n, .. } = self.scheme { n } else { 1 };
        multiple("start of the row slice", "n", rows.start, tile)?;
        let scales = match &self.scales {
            Scales::None => Scales::None,
            Scales::E8m0(s) => Scales::E8m0(s.skip(rows.start, 0)),
            Scales::Nvfp4 { block, global } => Scales::Nvfp4 { block: block.skip(rows.start, 0), global: *global },
            Scales::F32 { data, row } => {
                let skip = (rows.start / tile * row).min(data.len());
                let len = if self.is_per_channel() { rows.len() } else { rows.len().div_ceil(tile) * row };
                let len = if *row == 0 { data.len() } else { len };
                // After a slice along k the last tile row ends before a full stride.
                let end = (skip + len).min(data.len());
                Scales::F32 { data: narrow(data, skip..end), row: *row }
            }
        };
        Ok(QuantizedMatrix { n: rows.len(), codes: self.codes.skip(rows.start, 0), scales, ..self.clone() })
    }

    /// Every `step`-th row from `start` on, at no copy: gate rows are `(0, 2)`, up rows `(1, 2)` of a gpt-oss gate-up matrix.
    ///
    /// # Errors
    /// [`Error::Empty`] for step 0; [`Error::Index`] if `start > n`; [`Error::Unsupported`] for [`Scheme::Fp8Blockwise`], whose
    /// scale tiles are of neighbouring rows.
    pub fn step_n(&self, start: usize, step: usize) -> Result<QuantizedMatrix<'a>> {
        if step == 0 {
            return Err(Error::Empty { operand: "row step".into(), axis: "n" });
        }
        if let Scheme::Fp8Blockwise { n, .. } = self.scheme {
            return Err(Error::Unsupported {
                what: format!("step_n({start}, {step}) of a matrix with scale tiles of {n} rows"),
                because: "a scale tile is of neighbouring rows".into(),
            });
        }
        let tail = self.slice_n(start..self.n)?;
        let strided = |s: &Strided<'a>| Strided { row: s.row.saturating_mul(step), ..*s };
        let scales = match &tail.scales {
            Scales::None => Scales::None,
            Scales::E8m0(s) => Scales::E8m0(strided(s)),
            Scales::Nvfp4 { block, global } => Scales::Nvfp4 { block: strided(block), global: *global },
            Scales::F32 { data, row: 0 } => Scales::F32 { data: data.clone(), row: 0 },
            Scales::F32 { data, row } => Scales::F32 { data: data.iter().copied().step_by(step).collect(), row: *row },
        };
        Ok(QuantizedMatrix { n: tail.n.div_ceil(step), codes: strided(&tail.codes), scales, ..tail })
    }

    /// Columns `cols` as a matrix of their own, at no copy (a tensor-parallel shard along k).
    ///
    /// # Errors
    /// [`Error::Index`] outside the matrix; [`Error::Multiple`] unless the range starts at a block's edge and ends at one or at
    /// k.
    pub fn slice_k(&self, cols: Range<usize>) -> Result<QuantizedMatrix<'a>> {
        check_range("quantized matrix columns", &cols, self.k)?;
        let tile = match self.scheme {
            Scheme::Fp8Blockwise { k, .. } => k,
            scheme => scheme.block(),
        };
        multiple("start of the column slice", "k", cols.start, tile)?;
        if cols.end != self.k {
            multiple("end of the column slice", "k", cols.end, tile)?;
        }
        let block = self.scheme.block();
        let scales = match &self.scales {
            Scales::None => Scales::None,
            Scales::E8m0(s) => Scales::E8m0(s.skip(0, cols.start / block)),
            Scales::Nvfp4 { block: s, global } => {
                Scales::Nvfp4 { block: s.skip(0, cols.start / block), global: *global }
            }
            Scales::F32 { data, row } => match self.scheme {
                Scheme::Fp8Blockwise { .. } => {
                    let skip = (cols.start / tile).min(data.len());
                    Scales::F32 { data: narrow(data, skip..data.len()), row: *row }
                }
                _ => Scales::F32 { data: data.clone(), row: *row },
            },
        };
        Ok(QuantizedMatrix { k: cols.len(), codes: self.codes.skip(0, cols.start / block), scales, ..self.clone() })
    }

    fn is_per_channel(&self) -> bool {
        matches!(self.scheme, Scheme::Fp8PerChannel(_))
    }

    /// The code at `(row, col)`: 4, 8 or 16 significant bits. `None` outside the matrix.
    pub fn code(&self, row: usize, col: usize) -> Option<u16> {
        if row >= self.n || col >= self.k {
            return None;
        }
        let block = self.scheme.block();
        let (b, i) = (col / block, col % block);
        Some(match self.scheme {
            Scheme::Bf16 => {
                let bytes = self.codes.at(row, b, 2);
                u16::from_le_bytes([bytes[0], bytes[1]])
            }
            Scheme::Mxfp4 | Scheme::Nvfp4 => {
                let half = block / 2;
                let (byte, high) = match self.nibbles {
                    NibbleOrder::Interleaved => (i / 2, i % 2 == 1),
                    NibbleOrder::Halves => (i % half, i >= half),
                };
                let pair = self.codes.at(row, b, half)[byte];
                u16::from(if high { pair >> 4 } else { pair & 15 })
            }
            _ => u16::from(self.codes.at(row, b, block)[i]),
        })
    }

    /// The value of the code at `(row, col)`, without scales. `None` outside the matrix.
    fn element(&self, row: usize, col: usize) -> Option<f32> {
        let code = self.code(row, col)?;
        Some(match self.scheme {
            Scheme::Bf16 => bf16::from_bits(code).to_f32(),
            Scheme::Mxfp4 | Scheme::Nvfp4 => F4E2M1x2::VALUES[code as usize],
            _ => self.scheme.fp8().map_or(f32::NAN, |e| e.values()[code as usize]),
        })
    }

    /// The code byte of the block scale that covers `(row, col)`, if the scheme has block scales.
    pub fn block_scale_code(&self, row: usize, col: usize) -> Option<u8> {
        if row >= self.n || col >= self.k {
            return None;
        }
        match &self.scales {
            Scales::E8m0(s) | Scales::Nvfp4 { block: s, .. } => Some(s.at(row, col / self.scheme.block(), 1)[0]),
            _ => None,
        }
    }

    /// The block scale that covers `(row, col)`: E8M0 or E4M3FN, 1 for schemes without. `None` outside the matrix.
    pub fn block_scale(&self, row: usize, col: usize) -> Option<f32> {
        if row >= self.n || col >= self.k {
            return None;
        }
        let code = self.block_scale_code(row, col);
        Some(match (&self.scales, code) {
            (Scales::E8m0(_), Some(code)) => E8M0::from_bits(code).to_f32(),
            (Scales::Nvfp4 { .. }, Some(code)) => F8E4M3Fn::from_bits(code).to_f32(),
            _ => 1.0,
        })
    }

    /// The f32 scale that covers `(row, col)`: tensor, channel, tile or NVFP4 global; 1 for schemes without. `None` outside.
    pub fn outer_scale(&self, row: usize, col: usize) -> Option<f32> {
        if row >= self.n || col >= self.k {
            return None;
        }
        Some(match (&self.scales, self.scheme) {
            (Scales::Nvfp4 { global, .. }, _) => global.get(),
            (Scales::F32 { data, row: stride }, Scheme::Fp8Blockwise { n, k, .. }) => data[row / n * stride + col / k],
            (Scales::F32 { data, row: stride }, _) => data[row * stride],
            _ => 1.0,
        })
    }

    /// The exact value of element `(row, col)` in f64: code x block scale x f32 scale. `None` outside the matrix.
    pub fn value(&self, row: usize, col: usize) -> Option<f64> {
        Some(self.unscaled(row, col)? * f64::from(self.outer_scale(row, col)?))
    }

    /// Element `(row, col)` without its f32 scale, exactly: code x block scale. `None` outside the matrix.
    pub(crate) fn unscaled(&self, row: usize, col: usize) -> Option<f64> {
        Some(f64::from(self.element(row, col)?) * f64::from(self.block_scale(row, col)?))
    }

    /// Asks that every code and block scale be a number: what a loader calls on weights it does not trust.
    ///
    /// # Errors
    /// [`Error::Value`] naming the first NaN or infinite block scale or code.
    pub fn check_finite(&self) -> Result<()> {
        // Without columns any number of rows fits any slice: do not walk them.
        let rows = if self.k == 0 { 0 } else { self.n };
        for row in 0..rows {
            for b in 0..self.k.div_ceil(self.scheme.block()) {
                let col = b * self.scheme.block();
                let at = row * self.k + col;
                if let Some(code) = self.block_scale_code(row, col)
                    && !self.block_scale(row, col).is_some_and(f32::is_finite)
                {
                    let needed = "a finite block scale";
                    return Err(Error::Value { operand: SCALES.into(), at, got: format!("code {code:#04x}"), needed });
                }
                for col in col..(col + self.scheme.block()).min(self.k) {
                    if !self.element(row, col).is_some_and(f32::is_finite) {
                        let got = format!("code {:#04x}", self.code(row, col).unwrap_or_default());
                        let at = row * self.k + col;
                        return Err(Error::Value { operand: CODES.into(), at, got, needed: "a finite code" });
                    }
                }
            }
        }
        Ok(())
    }

    /// Elements of a row from `first` on, where a block begins, without f32 scales: code x block scale, exact unless it leaves f32's
    /// range. Without blocks `first` may be any.
    pub(crate) fn decode_from(&self, row: usize, first: usize, out: &mut [f32]) {
        let block = if self.scheme.block() == 1 { 32 } else { self.scheme.block() };
        let fp8 = self.scheme.fp8().map(Fp8::values);
        for (b, out) in out.chunks_mut(block).enumerate() {
            let first = first + b * block;
            let scale = self.block_scale(row, first).unwrap_or(f32::NAN);
            for (i, y) in out.iter_mut().enumerate() {
                let element = match (fp8, self.code(row, first + i)) {
                    (Some(values), Some(code)) => values[usize::from(code) & 255],
                    _ => self.element(row, first + i).unwrap_or(f32::NAN),
                };
                *y = element * scale;
            }
        }
    }

    /// A row's code bytes, if they lie one after the other in [`NibbleOrder::Interleaved`] order; else nothing.
    pub(crate) fn row_codes(&self, row: usize) -> &'a [u8] {
        match self.nibbles {
            NibbleOrder::Interleaved if row < self.n => {
                let start = row * self.codes.row;
                &self.codes.data[start..start + self.scheme.code_bytes(self.k)]
            }
            _ => &[],
        }
    }

    /// A row's block scales, if it has any and they lie one after the other; else nothing.
    pub(crate) fn row_scales(&self, row: usize) -> &'a [u8] {
        match &self.scales {
            Scales::E8m0(s) | Scales::Nvfp4 { block: s, .. } if row < self.n && s.block == 1 => {
                s.at(row, 0, self.k / self.scheme.block())
            }
            _ => &[],
        }
    }

    /// Code bytes of as many elements as `out` has room for, from the even element `first` of a row, in
    /// [`NibbleOrder::Interleaved`] order, zero past k.
    #[inline]
    pub(crate) fn copy_codes(&self, row: usize, first: usize, out: &mut [u8]) {
        let planar = self.nibbles == NibbleOrder::Interleaved;
        if planar && first + out.len() * 8 / self.scheme.bits() <= self.k {
            // Planar: a row's codes are contiguous whatever the block.
            let start = row * self.codes.row + self.scheme.code_bytes(first);
            out.copy_from_slice(&self.codes.data[start..start + out.len()]);
        } else {
            self.copy_last_codes(row, first, out);
        }
    }

    /// As [`QuantizedMatrix::copy_codes`], at the end of a row or in another nibble order.
    fn copy_last_codes(&self, row: usize, first: usize, out: &mut [u8]) {
        let valid = self.k.saturating_sub(first).min(out.len() * 8 / self.scheme.bits());
        if self.scheme.bits() == 4 && self.nibbles == NibbleOrder::Halves {
            out.fill(0);
            for i in 0..valid {
                let code = self.code(row, first + i).unwrap_or_default() as u8;
                out[i / 2] |= code << (4 * (i % 2));
            }
            return;
        }
        let start = row * self.codes.row + self.scheme.code_bytes(first.min(self.k));
        let (codes, pad) = out.split_at_mut(self.scheme.code_bytes(valid));
        codes.copy_from_slice(&self.codes.data[start..start + codes.len()]);
        pad.fill(0);
    }

    /// Block scale codes of a row from block `first` on, as many as `out` has room for; what lies past k, or has no block scale,
    /// is left as it was.
    #[inline]
    pub(crate) fn copy_block_scales(&self, row: usize, first: usize, out: &mut [u8]) {
        if let Scales::E8m0(s) | Scales::Nvfp4 { block: s, .. } = &self.scales {
            let blocks = self.k / self.scheme.block();
            if s.block == 1 {
                let count = out.len().min(blocks.saturating_sub(first));
                if count > 0 {
                    out[..count].copy_from_slice(s.at(row, first, count));
                }
                return;
            }
            for (scale, b) in out.iter_mut().zip(first..blocks) {
                *scale = s.at(row, b, 1)[0];
            }
        }
    }
}

/// Part of a slice, borrowed where it was.
fn narrow<'a>(data: &Cow<'a, [f32]>, range: Range<usize>) -> Cow<'a, [f32]> {
    match data {
        Cow::Borrowed(d) => Cow::Borrowed(&d[range]),
        Cow::Owned(d) => Cow::Owned(d[range].to_vec()),
    }
}

fn check_range(operand: &'static str, range: &Range<usize>, limit: usize) -> Result<()> {
    if range.end > limit || range.start > range.end {
        return Err(Error::index(operand, 0, range.end.max(range.start), limit.saturating_add(1)));
    }
    Ok(())
}

/// Asks that f32 scales be numbers.
pub(crate) fn finite(operand: &'static str, scales: &[f32]) -> Result<()> {
    match scales.iter().position(|s| !s.is_finite()) {
        None => Ok(()),
        Some(at) => {
            Err(Error::Value { operand: operand.into(), at, got: scales[at].to_string(), needed: "a finite scale" })
        }
    }
}

impl QuantizedMatrix<'_> {
    /// The exact values in f32, row-major `[n, k]`, rounded once where an f32 scale makes the product inexact.
    ///
    /// # Errors
    /// [`Error::Length`] unless `out` holds `n * k`.
    pub fn dequantize_f32(&self, out: &mut [f32]) -> Result<()> {
        self.dequantize(out, |v| v as f32)
    }

    /// The values in bf16, row-major `[n, k]`, each rounded once from its exact value.
    ///
    /// # Errors
    /// [`Error::Length`] unless `out` holds `n * k`.
    pub fn dequantize_bf16(&self, out: &mut [bf16]) -> Result<()> {
        self.dequantize(out, crate::num::bf16_from_f64)
    }

    fn dequantize<T>(&self, out: &mut [T], round: impl Fn(f64) -> T) -> Result<()> {
        length("dequantized matrix", out.len(), mul("dequantized matrix", self.n, self.k)?)?;
        if self.k == 0 {
            return Ok(());
        }
        for (row, out) in out.chunks_exact_mut(self.k).enumerate() {
            for (col, y) in out.iter_mut().enumerate() {
                *y = round(self.value(row, col).unwrap_or(f64::NAN));
            }
        }
        Ok(())
    }
}

/// Asks that two matrices agree on k.
pub(crate) fn same_k(a: usize, w: usize) -> Result<()> {
    extent("activations", "k", a, w)
}
