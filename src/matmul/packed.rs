//! Weights as the kernels read them.
#![forbid(unsafe_code)]

use super::layout::PackedLayout;
use crate::cpu::{Lines, Smallest};
use crate::num::Format;
use crate::quant::Scheme;
use std::fmt;
use std::sync::Arc;

/// Weights `[n, k]` packed for the CPU kernels: the same codes and scales in another order ([`PackedLayout`]), nothing decoded. Any
/// tier of any machine takes them. They can be written to a file once and mapped from then on
/// ([`write_to`](PackedMatrix::write_to), [`from_bytes`](PackedMatrix::from_bytes)).
#[derive(Debug, Clone)]
pub struct PackedMatrix {
    pub(super) layout: PackedLayout,
    pub(super) data: Bytes,
    pub(super) outer: Outer,
    pub(super) facts: Facts,
}

/// Who owns the packed bytes.
#[derive(Clone)]
pub(super) enum Bytes {
    /// This matrix.
    Own(Lines),
    /// Someone else: a map, say. The packed bytes are `len` from `start` on.
    Lent { owner: Arc<dyn AsRef<[u8]> + Send + Sync>, start: usize, len: usize },
}

impl Bytes {
    pub(super) fn get(&self) -> &[u8] {
        match self {
            Bytes::Own(lines) => lines.bytes(),
            Bytes::Lent { owner, start, len } => (**owner).as_ref().get(*start..start + len).unwrap_or_default(),
        }
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.get().len())
    }
}

/// f32 scales.
#[derive(Debug, Clone)]
pub(super) enum Outer {
    /// The same for all.
    Tensor(f32),
    /// One for each row.
    Channel(Vec<f32>),
    /// A grid of tiles `n` x `k`, `row` scales in a grid row.
    Tiles { n: usize, k: usize, row: usize, scales: Vec<f32> },
}

impl Outer {
    pub(super) fn scales(&self) -> &[f32] {
        match self {
            Outer::Tensor(scale) => std::slice::from_ref(scale),
            Outer::Channel(scales) | Outer::Tiles { scales, .. } => scales,
        }
    }
}

/// What was seen of the values code x block scale while they were packed or read back: what tells which shortcuts keep every bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Facts {
    /// All values are multiples of `2^grid`; `None` if all are zero.
    pub(super) grid: Option<i32>,
    /// All finite magnitudes are below `2^top`.
    pub(super) top: i32,
    /// No code and no scale is NaN or infinite, and no value is.
    pub(super) finite: bool,
    /// Every value is exactly code x block scale: none left bf16's normal range.
    pub(super) exact: bool,
}

/// Beyond this all exponents say the same; sums of a few of them do not overflow.
const FAR: i32 = 4096;

impl Facts {
    /// Of nothing.
    pub(super) const NONE: Facts = Facts { grid: None, top: -FAR, finite: true, exact: true };

    /// Of both.
    pub(super) fn merge(self, other: Facts) -> Facts {
        Facts {
            grid: self.grid.into_iter().chain(other.grid).min(),
            top: self.top.max(other.top),
            finite: self.finite && other.finite,
            exact: self.exact && other.exact,
        }
    }

    /// The grid as kernels compare it.
    pub(super) fn smallest(self) -> Smallest {
        self.grid.map_or(Smallest::BF16, Smallest::grid_of)
    }
}

/// Exponent of the smallest non-zero magnitude of a format, of which all its values are multiples, and the least e with all
/// finite values below `2^e`.
pub(super) fn code_range(format: Format) -> (i32, i32) {
    (1 - format.bias() - format.mantissa_bits() as i32, format.emax() + 1)
}

impl PackedMatrix {
    /// The scheme.
    pub fn scheme(&self) -> Scheme {
        self.layout.scheme()
    }

    /// Rows: output channels.
    pub fn n(&self) -> usize {
        self.layout.n()
    }

    /// Columns: the contraction axis.
    pub fn k(&self) -> usize {
        self.layout.k()
    }

    /// Where codes and scales lie.
    pub fn layout(&self) -> &PackedLayout {
        &self.layout
    }

    /// Whether every weight is a number: no NaN or infinite code, no NaN scale (f32 scales always are finite). Known since
    /// packing or reading, at no cost; [`QuantizedMatrix::check_finite`](crate::quant::QuantizedMatrix::check_finite) says where.
    pub fn is_finite(&self) -> bool {
        self.facts.finite
    }

    /// Bytes held: codes, block scales, f32 scales.
    pub fn bytes(&self) -> usize {
        self.layout.bytes() + size_of_val(self.outer.scales())
    }

    pub(super) fn outer(&self) -> &Outer {
        &self.outer
    }
}
