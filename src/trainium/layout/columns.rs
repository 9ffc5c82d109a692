//! Which column of the packed tensors an output channel is.
#![forbid(unsafe_code)]

use crate::error::{Error, Result, length, multiple};
use std::fmt;

/// Natural parts are padded to a multiple of this: stationary tiles are even, transposes work on 32, rows start at 64 bytes.
const NATURAL: usize = 32;
/// Parts in quad order are padded to a multiple of this: one k tile of the matmul that reads the result.
const TILE: usize = 512;

/// Whether the rows of a fused gate-up weight stay interleaved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum GateUp {
    /// Rows in checkpoint order.
    #[default]
    Together,
    /// Even rows (gate) are the first half of the columns, odd rows (up) the second.
    Split,
}

/// The order of the columns of a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ColumnOrder {
    /// Channel i is column i.
    #[default]
    Natural,
    /// Channel `512 t + 4 p + q` is column `512 t + 128 q + p`: the result, computed with these weights stationary, is in the
    /// contraction order of [`MxLayout`](super::MxLayout) without a transpose.
    Quads,
}

/// The map between n output channels and the columns of a packed tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Columns {
    n: usize,
    gate_up: GateUp,
    order: ColumnOrder,
    /// Columns of a part, padding included.
    part: usize,
}

impl Columns {
    /// Columns for n channels.
    ///
    /// # Errors
    /// [`Error::Empty`] without channels; [`Error::Multiple`] for an odd n to be split; [`Error::Overflow`].
    pub fn new(n: usize, gate_up: GateUp, order: ColumnOrder) -> Result<Self> {
        if n == 0 {
            return Err(Error::Empty { operand: "weight".into(), axis: "n" });
        }
        let parts = parts(gate_up);
        multiple("gate-up weight", "n", n, parts)?;
        let to = match order {
            ColumnOrder::Natural => NATURAL,
            ColumnOrder::Quads => TILE,
        };
        let part = (n / parts).checked_next_multiple_of(to).filter(|part| part.checked_mul(parts).is_some());
        let part = part.ok_or(Error::Overflow { operand: "packed columns".into() })?;
        Ok(Columns { n, gate_up, order, part })
    }

    /// Output channels.
    pub fn channels(&self) -> usize {
        self.n
    }

    /// Columns, padding included: a multiple of 32.
    pub fn count(&self) -> usize {
        self.part * parts(self.gate_up)
    }

    /// Whether gate and up are split.
    pub fn gate_up(&self) -> GateUp {
        self.gate_up
    }

    /// The order of columns.
    pub fn order(&self) -> ColumnOrder {
        self.order
    }

    /// The column of channel `n`, or `None` past the last.
    pub fn column(&self, n: usize) -> Option<usize> {
        if n >= self.n {
            return None;
        }
        let parts = parts(self.gate_up);
        let i = n / parts;
        let c = match self.order {
            ColumnOrder::Natural => i,
            ColumnOrder::Quads => i / TILE * TILE + i % 4 * (TILE / 4) + i % TILE / 4,
        };
        Some(n % parts * self.part + c)
    }

    /// The channel in `column`, or `None` for padding and past the last.
    pub fn channel(&self, column: usize) -> Option<usize> {
        let parts = parts(self.gate_up);
        let (part, c) = (column / self.part, column % self.part);
        let i = match self.order {
            ColumnOrder::Natural => c,
            ColumnOrder::Quads => c / TILE * TILE + c % (TILE / 4) * 4 + c % TILE / (TILE / 4),
        };
        (part < parts && i < self.n / parts).then_some(i * parts + part)
    }

    /// One value for each channel (a bias, channel scales) in column order, `pad` in padding: `[count]`.
    ///
    /// # Errors
    /// [`Error::Length`] unless `values` holds one for each channel.
    pub fn pack<T: Copy>(&self, values: &[T], pad: T) -> Result<Vec<T>> {
        length("values of the channels", values.len(), self.n)?;
        Ok((0..self.count()).map(|c| self.channel(c).map_or(pad, |n| values[n])).collect())
    }

    /// The inverse of [`Columns::pack`]: `[n]`.
    ///
    /// # Errors
    /// [`Error::Length`] unless `packed` holds one value for each column.
    pub fn unpack<T: Copy>(&self, packed: &[T]) -> Result<Vec<T>> {
        length("packed values of the channels", packed.len(), self.count())?;
        Ok((0..self.n).filter_map(|n| self.column(n)).map(|c| packed[c]).collect())
    }
}

fn parts(gate_up: GateUp) -> usize {
    match gate_up {
        GateUp::Together => 1,
        GateUp::Split => 2,
    }
}

impl fmt::Display for Columns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let i = match self.gate_up {
            GateUp::Together => "n",
            GateUp::Split => "(n / 2)",
        };
        match self.order {
            ColumnOrder::Natural => write!(f, "column = {i}")?,
            ColumnOrder::Quads => write!(f, "column = 512 ({i} / 512) + 128 ({i} % 4) + ({i} % 512) / 4")?,
        }
        match self.gate_up {
            GateUp::Together => write!(f, ", {} of {}", self.n, self.count()),
            GateUp::Split => write!(f, " + {} (n % 2), {} of {}", self.part, self.n, self.count()),
        }
    }
}
