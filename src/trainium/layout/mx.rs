//! `mx-quads/1`: operands of `nc_matmul_mx`.
#![forbid(unsafe_code)]

use super::columns::{ColumnOrder, Columns, GateUp};
use super::turn::Turn;
use super::words::Words;
use crate::error::{Error, Result, mul};
use crate::num::Fp8;
use crate::quant::{QuantizedMatrix, Scheme};
use std::fmt;

/// Elements along k that share a scale.
pub(super) const GROUP: usize = 32;
/// Elements of a packed word.
const QUAD: usize = 4;
/// Elements along k of a tile: 128 partitions x 4.
const TILE: usize = 512;
/// Scale groups of a tile.
const TILE_GROUPS: usize = TILE / GROUP;
/// Scale groups of a tile in one quadrant of 32 partitions.
const GROUPS: usize = 4;
/// Tiles whose scales share the 128 partitions of a scale tile: row offsets 0, 4, 8, 12.
const SHARING: usize = 4;
/// Live scale rows of a quadrant.
const LIVE: usize = GROUPS * SHARING;
/// Partitions of a quadrant.
const QUADRANT: usize = 32;
/// Quadrants of a tile.
const QUADRANTS: usize = super::PARTITIONS / QUADRANT;

/// What an x4 word holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MxElement {
    /// `float8_e4m3fn_x4`, 32 bits.
    E4M3Fn,
    /// `float8_e5m2_x4`, 32 bits.
    E5M2,
    /// `float4_e2m1fn_x4`, 16 bits.
    E2M1,
}

impl MxElement {
    /// Bytes of an x4 word: 4 or 2. The tensor crosses the kernel boundary as unsigned integers of this size.
    pub const fn word_bytes(self) -> usize {
        match self {
            MxElement::E4M3Fn | MxElement::E5M2 => 4,
            MxElement::E2M1 => 2,
        }
    }

    /// The dtype's name in NKI.
    pub const fn nki_name(self) -> &'static str {
        match self {
            MxElement::E4M3Fn => "float8_e4m3fn_x4",
            MxElement::E5M2 => "float8_e5m2_x4",
            MxElement::E2M1 => "float4_e2m1fn_x4",
        }
    }

    fn of(scheme: Scheme) -> Result<Self> {
        let because = match scheme {
            Scheme::Mxfp4 => return Ok(MxElement::E2M1),
            Scheme::Mxfp8(Fp8::E4M3Fn) | Scheme::Fp8PerTensor(Fp8::E4M3Fn) | Scheme::Fp8PerChannel(Fp8::E4M3Fn) => {
                return Ok(MxElement::E4M3Fn);
            }
            Scheme::Mxfp8(Fp8::E5M2) | Scheme::Fp8PerTensor(Fp8::E5M2) | Scheme::Fp8PerChannel(Fp8::E5M2) => {
                return Ok(MxElement::E5M2);
            }
            Scheme::Nvfp4 => "no Trainium instruction takes E4M3 scales of 16 elements",
            Scheme::Bf16 => "nc_matmul_mx takes fp8 and fp4; use RowsLayout",
            Scheme::Fp8Blockwise { .. } => {
                "f32 scales that change along k cannot be applied to the result; use RowsLayout"
            }
            Scheme::Mxfp8(_) | Scheme::Fp8PerTensor(_) | Scheme::Fp8PerChannel(_) => {
                "nc_matmul_mx takes E4M3FN and E5M2 elements only"
            }
        };
        Err(Error::Unsupported { what: format!("{scheme:?} in layout {}", MxLayout::NAME), because: because.into() })
    }
}

/// `mx-quads/1`: a quantized matrix `[n, k]` as data `[128, T, C]` of x4 words and scales `[64, S, C]` of E8M0 bytes.
///
/// `T = ceil(k / 512)`, `S = ceil(T / 4)`, `C` = [`Columns::count`]. Element (n, k) is sub-element `k % 4` of the word at partition
/// `(k % 512) / 4`, tile `k / 512`: 32 consecutive k are 8 partitions x 4, one scale group, so blocks of an OCP checkpoint keep
/// codes and scales. Padding is zero codes under scale 127 (1.0). Source: AWS's "contiguous" order, `docs/layouts.md` section 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MxLayout {
    scheme: Scheme,
    element: MxElement,
    k: usize,
    columns: Columns,
    pub(super) words: Words,
}

/// Where a code lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MxPlace {
    /// Partition, 0..128.
    pub partition: usize,
    /// k tile, 0..T.
    pub tile: usize,
    /// Column, 0..C.
    pub column: usize,
    /// Element of the x4 word, 0..4, lowest bits first.
    pub sub: usize,
}

/// Where a scale lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MxScalePlace {
    /// Row in HBM, 0..64.
    pub row: usize,
    /// Scale tile, 0..S.
    pub tile: usize,
    /// Column, 0..C.
    pub column: usize,
}

impl MxScalePlace {
    /// The SBUF partition that the row is loaded to: the first 16 rows of each quadrant of 32 are live. Above 127 for a row above
    /// 63, which no layout has.
    pub const fn partition(self) -> usize {
        (self.row / LIVE).saturating_mul(QUADRANT).saturating_add(self.row % LIVE)
    }
}

impl MxLayout {
    /// Name and version.
    pub const NAME: &'static str = "mx-quads/1";

    /// The layout of a matrix `[n, k]` of `scheme`.
    ///
    /// Served: MXFP4, MXFP8 of E4M3FN or E5M2, and FP8 of those with one f32 scale for the tensor or each channel (every block
    /// scale is then 1.0 and the f32 scales multiply the result).
    ///
    /// # Errors
    /// [`Error::Unsupported`] for other schemes; [`Error::Empty`]; [`Error::Multiple`] unless k is whole scale blocks, or n is even
    /// where it is split; [`Error::Overflow`].
    pub fn new(scheme: Scheme, n: usize, k: usize, gate_up: GateUp, order: ColumnOrder) -> Result<Self> {
        let element = MxElement::of(scheme)?;
        if k == 0 {
            return Err(Error::Empty { operand: "weight".into(), axis: "k" });
        }
        crate::error::multiple("weight", "k", k, scheme.block())?;
        let columns = Columns::new(n, gate_up, order)?;
        let words = Words::new(element.word_bytes(), QUAD, k.div_ceil(TILE), columns.count())?;
        let layout = MxLayout { scheme, element, k, columns, words };
        let [rows, tiles, columns] = layout.scale_shape();
        mul("packed scales", mul("packed scales", rows, tiles)?, columns)?;
        Ok(layout)
    }

    /// The layout of `w` with its rows in order: activations, and weights that are neither split nor re-ordered.
    ///
    /// # Errors
    /// As [`MxLayout::new`].
    pub fn of(w: &QuantizedMatrix<'_>) -> Result<Self> {
        Self::new(w.scheme(), w.n(), w.k(), GateUp::Together, ColumnOrder::Natural)
    }

    /// The scheme it serves.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// What a word holds.
    pub fn element(&self) -> MxElement {
        self.element
    }

    /// Output channels.
    pub fn n(&self) -> usize {
        self.columns.channels()
    }

    /// The contraction extent.
    pub fn k(&self) -> usize {
        self.k
    }

    /// k rounded up to tiles of 512.
    pub fn padded_k(&self) -> usize {
        self.words.tiles * TILE
    }

    /// The map of output channels.
    pub fn columns(&self) -> &Columns {
        &self.columns
    }

    /// `[128, T, C]`, in x4 words.
    pub fn data_shape(&self) -> [usize; 3] {
        [super::PARTITIONS, self.words.tiles, self.words.columns]
    }

    /// `[64, S, C]`, in bytes.
    pub fn scale_shape(&self) -> [usize; 3] {
        [QUADRANTS * LIVE, self.words.tiles.div_ceil(SHARING), self.words.columns]
    }

    /// Bytes of the data tensor.
    pub fn data_bytes(&self) -> usize {
        self.words.bytes()
    }

    /// Bytes of the scale tensor.
    pub fn scale_bytes(&self) -> usize {
        self.scale_shape().iter().product()
    }

    /// Where element `(n, k)` lies; `None` outside the matrix.
    pub fn place(&self, n: usize, k: usize) -> Option<MxPlace> {
        let column = self.columns.column(n)?;
        (k < self.k).then_some(MxPlace { partition: k % TILE / QUAD, tile: k / TILE, column, sub: k % QUAD })
    }

    /// The element `(n, k)` at a place; `None` for padding and outside the tensor.
    pub fn element_at(&self, at: MxPlace) -> Option<(usize, usize)> {
        self.word_index(at).filter(|_| at.sub < QUAD)?;
        let k = at.tile * TILE + at.partition * QUAD + at.sub;
        Some((self.columns.channel(at.column)?, k)).filter(|_| k < self.k)
    }

    /// Where the scale of element `(n, k)` lies; `None` outside the matrix.
    pub fn scale_place(&self, n: usize, k: usize) -> Option<MxScalePlace> {
        let column = self.columns.column(n)?;
        let (tile, group) = (k / TILE, k % TILE / GROUP);
        let row = group / GROUPS * LIVE + tile % SHARING * GROUPS + group % GROUPS;
        (k < self.k).then_some(MxScalePlace { row, tile: tile / SHARING, column })
    }

    /// The channel n and the first k of the group whose scale is at a place; `None` for padding and outside the tensor.
    pub fn group_at(&self, at: MxScalePlace) -> Option<(usize, usize)> {
        self.scale_index(at)?;
        let tile = at.tile * SHARING + at.row % LIVE / GROUPS;
        let k = tile * TILE + (at.row / LIVE * GROUPS + at.row % GROUPS) * GROUP;
        Some((self.columns.channel(at.column)?, k)).filter(|_| k < self.k)
    }

    /// Flat index of a place's word in the data tensor; `None` outside.
    pub fn word_index(&self, at: MxPlace) -> Option<usize> {
        self.words.index(at.partition, at.tile, at.column)
    }

    /// Flat index of a place in the scale tensor; `None` outside.
    pub fn scale_index(&self, at: MxScalePlace) -> Option<usize> {
        let [rows, tiles, columns] = self.scale_shape();
        let inside = at.row < rows && at.tile < tiles && at.column < columns;
        inside.then(|| (at.row * tiles + at.tile) * columns + at.column)
    }

    /// How a channel's scales along k become rows of `[64, S]`, those of tiles past the last too.
    pub(super) fn turn_scales(&self) -> Turn<'_, impl Fn(usize) -> usize + Sync> {
        let depth = self.words.tiles.div_ceil(SHARING);
        let row = move |scale: usize| {
            let (tile, group) = (scale / TILE_GROUPS, scale % TILE_GROUPS);
            (group / GROUPS * LIVE + tile % SHARING * GROUPS + group % GROUPS) * depth + tile / SHARING
        };
        Turn { columns: &self.columns, word: 1, words: depth * SHARING * TILE_GROUPS, row }
    }
}

impl fmt::Display for MxLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ([p, t, c], [r, s, _]) = (self.data_shape(), self.scale_shape());
        let (n, k, padded, nki) = (self.n(), self.k, self.padded_k(), self.element.nki_name());
        writeln!(f, "{}: [{n}, {k}] of {:?}, k padded to {padded}", Self::NAME, self.scheme)?;
        writeln!(f, "  data   [{p}, {t}, {c}] {nki}: [(k % 512) / 4, k / 512, column], element k % 4")?;
        writeln!(
            f,
            "  scales [{r}, {s}, {c}] u8: [16 (g / 4) + 4 (t % 4) + g % 4, t / 4, column], t = k / 512, g = k % 512 / 32"
        )?;
        write!(f, "  {}", self.columns)
    }
}

impl fmt::Display for MxPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "partition {}, tile {}, column {}, element {}", self.partition, self.tile, self.column, self.sub)
    }
}

impl fmt::Display for MxScalePlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "row {} (partition {}), tile {}, column {}", self.row, self.partition(), self.tile, self.column)
    }
}
