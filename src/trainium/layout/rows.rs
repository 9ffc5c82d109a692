//! `rows-128/1`: operands of the plain and the double-row `nc_matmul`.
#![forbid(unsafe_code)]

use super::columns::{ColumnOrder, Columns, GateUp};
use super::words::Words;
use crate::error::{Error, Result};
use crate::num::Fp8;
use crate::quant::{QuantizedMatrix, Scheme};
use std::fmt;

/// What the device reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RowElement {
    /// bf16, two bytes.
    Bf16,
    /// FP8, one byte. Trainium1 and Trainium2 read [`Fp8::E4M3Ieee`] and [`Fp8::E5M2`], Trainium3 [`Fp8::E4M3Fn`] too.
    Fp8(Fp8),
}

impl RowElement {
    /// Bytes of an element.
    pub const fn bytes(self) -> usize {
        match self {
            RowElement::Bf16 => 2,
            RowElement::Fp8(_) => 1,
        }
    }
}

/// `rows-128/1`: a weight `[n, k]` as `[128, H, C]` elements, `H = ceil(k / 128)`, `C` = [`Columns::count`].
///
/// Element (n, k) lies at partition `k % 128`, half chunk `k / 128`. Two neighbouring half chunks are a double-row operand of 256 k,
/// one alone is a plain operand. Padding is zero. `docs/layouts.md` section 3.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RowsLayout {
    scheme: Scheme,
    element: RowElement,
    k: usize,
    columns: Columns,
    pub(super) words: Words,
}

/// Where an element lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RowPlace {
    /// Partition, 0..128.
    pub partition: usize,
    /// Half chunk of 128 k, 0..H.
    pub half: usize,
    /// Column, 0..C.
    pub column: usize,
}

impl RowsLayout {
    /// Name and version.
    pub const NAME: &'static str = "rows-128/1";

    /// The layout of a weight `[n, k]` of `scheme` on a device that reads `element`.
    ///
    /// Served: bf16 as bf16; FP8 with f32 scales as the same FP8; E4M3FN as E4M3 IEEE, by halving. Tiles of f32 scales keep rows in
    /// order.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for other combinations; [`Error::Empty`]; [`Error::Multiple`] for an odd n to be split;
    /// [`Error::Overflow`].
    pub fn new(
        scheme: Scheme,
        element: RowElement,
        n: usize,
        k: usize,
        gate_up: GateUp,
        order: ColumnOrder,
    ) -> Result<Self> {
        check(scheme, element)?;
        let in_order = gate_up == GateUp::Together && order == ColumnOrder::Natural;
        if matches!(scheme, Scheme::Fp8Blockwise { .. }) && !in_order {
            return Err(Error::Unsupported {
                what: format!("{scheme:?} with its rows re-ordered"),
                because: "a tile of scales spans neighbouring rows".into(),
            });
        }
        if k == 0 {
            return Err(Error::Empty { operand: "weight".into(), axis: "k" });
        }
        let columns = Columns::new(n, gate_up, order)?;
        let words = Words::new(element.bytes(), 1, k.div_ceil(super::PARTITIONS), columns.count())?;
        Ok(RowsLayout { scheme, element, k, columns, words })
    }

    /// The layout of `w` with its rows in order.
    ///
    /// # Errors
    /// As [`RowsLayout::new`].
    pub fn of(w: &QuantizedMatrix<'_>, element: RowElement) -> Result<Self> {
        Self::new(w.scheme(), element, w.n(), w.k(), GateUp::Together, ColumnOrder::Natural)
    }

    /// The scheme it serves.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// What the device reads.
    pub fn element(&self) -> RowElement {
        self.element
    }

    /// The scheme of what the device reads: of what [`PackedRows::unpack`](super::PackedRows::unpack) gives.
    pub fn device_scheme(&self) -> Scheme {
        match (self.scheme, self.element) {
            (Scheme::Fp8PerTensor(_), RowElement::Fp8(e)) => Scheme::Fp8PerTensor(e),
            (Scheme::Fp8PerChannel(_), RowElement::Fp8(e)) => Scheme::Fp8PerChannel(e),
            (Scheme::Fp8Blockwise { n, k, .. }, RowElement::Fp8(element)) => Scheme::Fp8Blockwise { element, n, k },
            (scheme, _) => scheme,
        }
    }

    /// Whether codes are halved and scales doubled.
    pub fn halves(&self) -> bool {
        self.device_scheme() != self.scheme
    }

    /// Output channels.
    pub fn n(&self) -> usize {
        self.columns.channels()
    }

    /// The contraction extent.
    pub fn k(&self) -> usize {
        self.k
    }

    /// k rounded up to half chunks of 128.
    pub fn padded_k(&self) -> usize {
        self.words.tiles * super::PARTITIONS
    }

    /// The map of output channels.
    pub fn columns(&self) -> &Columns {
        &self.columns
    }

    /// `[128, H, C]`, in elements.
    pub fn data_shape(&self) -> [usize; 3] {
        [super::PARTITIONS, self.words.tiles, self.words.columns]
    }

    /// Bytes of the data tensor.
    pub fn data_bytes(&self) -> usize {
        self.words.bytes()
    }

    /// Where element `(n, k)` lies; `None` outside the matrix.
    pub fn place(&self, n: usize, k: usize) -> Option<RowPlace> {
        let column = self.columns.column(n)?;
        (k < self.k).then_some(RowPlace { partition: k % super::PARTITIONS, half: k / super::PARTITIONS, column })
    }

    /// The element `(n, k)` at a place; `None` for padding and outside the tensor.
    pub fn element_at(&self, at: RowPlace) -> Option<(usize, usize)> {
        self.index(at)?;
        let k = at.half * super::PARTITIONS + at.partition;
        Some((self.columns.channel(at.column)?, k)).filter(|_| k < self.k)
    }

    /// Flat index of a place in the data tensor, in elements; `None` outside.
    pub fn index(&self, at: RowPlace) -> Option<usize> {
        self.words.index(at.partition, at.half, at.column)
    }
}

/// Asks that the device can read the scheme's codes.
fn check(scheme: Scheme, element: RowElement) -> Result<()> {
    let from = match scheme {
        Scheme::Fp8PerTensor(e) | Scheme::Fp8PerChannel(e) => Some(e),
        Scheme::Fp8Blockwise { element, .. } => Some(element),
        _ => None,
    };
    let because = match (scheme, from, element) {
        (Scheme::Bf16, _, RowElement::Bf16) => return Ok(()),
        (_, Some(Fp8::E4M3Fn), RowElement::Fp8(Fp8::E4M3Ieee)) => return Ok(()),
        (_, Some(from), RowElement::Fp8(to)) if from == to && to != Fp8::E3M4 => return Ok(()),
        (_, _, RowElement::Fp8(Fp8::E3M4)) => "NKI has no E3M4 dtype",
        (Scheme::Mxfp4 | Scheme::Mxfp8(_), ..) => "block scales need nc_matmul_mx; use MxLayout",
        (Scheme::Nvfp4, ..) => "no Trainium instruction takes E4M3 scales of 16 elements",
        (Scheme::Bf16, ..) | (.., RowElement::Bf16) => "packing moves codes and does not re-quantize",
        _ => "of the FP8 formats only E4M3FN becomes another, E4M3 IEEE, by halving",
    };
    Err(Error::Unsupported {
        what: format!("{scheme:?} read as {element:?} in layout {}", RowsLayout::NAME),
        because: because.into(),
    })
}

impl fmt::Display for RowsLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [p, h, c] = self.data_shape();
        let (n, k, padded) = (self.n(), self.k, self.padded_k());
        writeln!(f, "{}: [{n}, {k}] of {:?}, k padded to {padded}", Self::NAME, self.scheme)?;
        let halved = if self.halves() { ", codes halved, scales doubled" } else { "" };
        writeln!(f, "  data [{p}, {h}, {c}] {:?}: [k % 128, k / 128, column]{halved}", self.element)?;
        write!(f, "  {}", self.columns)
    }
}

impl fmt::Display for RowPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "partition {}, half chunk {}, column {}", self.partition, self.half, self.column)
    }
}
