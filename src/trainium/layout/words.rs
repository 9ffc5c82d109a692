//! The tensor under every weight layout: rows of words along k become `[128 partitions, tiles, columns]` words.
#![forbid(unsafe_code)]

use super::turn::Turn;
use super::{Columns, PARTITIONS};
use crate::error::{Result, mul};

/// Words `[128, tiles, columns]`: word `(p, t)` of a column holds its elements from `(128 t + p) * elements` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Words {
    /// Bytes of a word: 1, 2 or 4.
    word: usize,
    /// Elements along k in a word.
    elements: usize,
    /// Words along k, over 128.
    pub(super) tiles: usize,
    /// Columns: a multiple of 32.
    pub(super) columns: usize,
}

impl Words {
    /// # Errors
    /// [`Error::Overflow`](crate::Error::Overflow) if the bytes, or the elements along k, do not fit usize.
    pub(super) fn new(word: usize, elements: usize, tiles: usize, columns: usize) -> Result<Self> {
        const OPERAND: &str = "packed weight";
        mul(OPERAND, mul(OPERAND, tiles, PARTITIONS)?, elements)?;
        mul(OPERAND, mul(OPERAND, mul(OPERAND, tiles, PARTITIONS)?, columns)?, word)?;
        Ok(Words { word, elements, tiles, columns })
    }

    /// Bytes in all.
    pub(super) fn bytes(&self) -> usize {
        PARTITIONS * self.tiles * self.columns * self.word
    }

    /// Elements along k in a word.
    pub(super) fn elements(&self) -> usize {
        self.elements
    }

    /// Flat index of a word; `None` outside the tensor.
    pub(super) fn index(&self, partition: usize, tile: usize, column: usize) -> Option<usize> {
        let inside = partition < PARTITIONS && tile < self.tiles && column < self.columns;
        inside.then(|| (partition * self.tiles + tile) * self.columns + column)
    }

    /// How a channel's words along k become rows `(partition, tile)`.
    pub(super) fn turn<'a>(&self, columns: &'a Columns) -> Turn<'a, impl Fn(usize) -> usize + Sync + use<'a>> {
        let tiles = self.tiles;
        let row = move |w: usize| w % PARTITIONS * tiles + w / PARTITIONS;
        Turn { columns, word: self.word, words: tiles * PARTITIONS, row }
    }
}
