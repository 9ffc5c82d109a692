//! The transposition under every weight layout: rows of words along k become `[128 partitions, tiles, columns]` words.
//!
//! Work is cut into strips of 512 columns. A thread reads a whole tile of a channel at a time and writes rows of the strip: both
//! sides of the transposition see long runs.
#![forbid(unsafe_code)]

use super::{Columns, PARTITIONS, filled};
use crate::cpu::{Parallelism, for_each_zip};
use crate::error::{Result, length, mul};

/// Side of the square of words that is transposed at once, and partitions of a quadrant.
const SIDE: usize = 32;
/// Columns that a thread takes at a time.
const STRIP: usize = 16 * SIDE;
/// Bytes of a row that are written at once: whole pairs of cache lines.
const RUN: usize = 128;
/// Quadrants of a tile.
pub(super) const QUADRANTS: usize = PARTITIONS / SIDE;

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

/// What is moved together: the words of one tile, for one column.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    pub(super) tile: usize,
    /// The column, from the strip's first.
    pub(super) column: usize,
    /// The channel in the column; `None` is padding.
    pub(super) channel: Option<usize>,
    /// Its first element along k.
    pub(super) first: usize,
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

    /// Strips in all.
    pub(super) fn strips(&self) -> usize {
        self.columns.div_ceil(STRIP)
    }

    fn row_bytes(&self) -> usize {
        self.columns * self.word
    }

    /// Flat index of a word; `None` outside the tensor.
    pub(super) fn index(&self, partition: usize, tile: usize, column: usize) -> Option<usize> {
        let inside = partition < PARTITIONS && tile < self.tiles && column < self.columns;
        inside.then(|| self.row(partition, tile) * self.columns + column)
    }

    /// Rows of words before that of (partition, tile).
    fn row(&self, partition: usize, tile: usize) -> usize {
        partition * self.tiles + tile
    }

    /// Fills `data`. `load(extra, piece, bytes)` writes the `128 * word` bytes of a piece, for every piece; pieces of one strip
    /// share `extra[strip]`.
    pub(super) fn pack<X: Send>(
        &self,
        columns: &Columns,
        parallelism: Parallelism<'_>,
        data: &mut [u8],
        extra: &mut [X],
        load: impl Fn(&mut X, Piece, &mut [u8]) + Sync,
    ) -> Result<()> {
        length("packed weight", data.len(), self.bytes())?;
        length("strips of the packed weight", extra.len(), self.strips())?;
        match self.word {
            1 => self.pack_words::<4, X>(columns, parallelism, data, extra, load),
            2 => self.pack_words::<8, X>(columns, parallelism, data, extra, load),
            _ => self.pack_words::<16, X>(columns, parallelism, data, extra, load),
        }
        Ok(())
    }

    /// `L`: 64-bit lanes of 32 words.
    fn pack_words<const L: usize, X: Send>(
        &self,
        columns: &Columns,
        parallelism: Parallelism<'_>,
        data: &mut [u8],
        extra: &mut [X],
        load: impl Fn(&mut X, Piece, &mut [u8]) + Sync,
    ) {
        let mut strips = strips(data, self.columns, self.word);
        for_each_zip(parallelism, (&mut strips, 1), (extra, 1), |strip, rows, extra| {
            let ([rows], [extra]) = (rows, extra) else { return };
            let channels: [Option<usize>; STRIP] = std::array::from_fn(|i| columns.channel(strip * STRIP + i));
            let width = STRIP.min(self.columns - strip * STRIP);
            let block = RUN / self.word;
            let mut source = vec![[[[0u8; 8]; L]; QUADRANTS]; block];
            let mut turned = vec![[[[0u8; 8]; L]; SIDE]; block / SIDE];
            for tile in 0..self.tiles {
                let first = tile * PARTITIONS * self.elements;
                for c0 in (0..width).step_by(block) {
                    let columns = block.min(width - c0);
                    for (column, bytes) in (c0..c0 + columns).zip(&mut source) {
                        let piece = Piece { tile, column, channel: channels[column], first };
                        load(extra, piece, bytes.as_flattened_mut().as_flattened_mut());
                    }
                    for quadrant in 0..QUADRANTS {
                        for (source, turned) in source.chunks_exact(SIDE).zip(&mut turned) {
                            transpose(std::array::from_fn(|i| &source[i][quadrant]), turned);
                        }
                        for p in 0..SIDE {
                            let row = &mut rows[self.row(quadrant * SIDE + p, tile)];
                            let row = &mut row[c0 * self.word..][..columns * self.word];
                            for (row, turned) in row.chunks_exact_mut(8 * L).zip(&turned) {
                                row.copy_from_slice(turned[p].as_flattened());
                            }
                        }
                    }
                }
            }
        });
    }

    /// The inverse: the elements of every channel, `row` bytes of codes each, `[channels, row]`.
    pub(super) fn unpack(
        &self,
        columns: &Columns,
        parallelism: Parallelism<'_>,
        data: &[u8],
        row: usize,
    ) -> Result<Vec<u8>> {
        length("packed weight", data.len(), self.bytes())?;
        let mut codes = filled("codes", mul("codes", columns.channels(), row)?, 0)?;
        match self.word {
            1 => self.unpack_words::<4>(columns, parallelism, data, &mut codes, row),
            2 => self.unpack_words::<8>(columns, parallelism, data, &mut codes, row),
            _ => self.unpack_words::<16>(columns, parallelism, data, &mut codes, row),
        }
        Ok(codes)
    }

    fn unpack_words<const L: usize>(
        &self,
        columns: &Columns,
        parallelism: Parallelism<'_>,
        data: &[u8],
        codes: &mut [u8],
        row: usize,
    ) {
        let run = SIDE * self.word;
        let mut nothing = vec![(); columns.channels().div_ceil(STRIP)];
        for_each_zip(parallelism, (codes, STRIP * row), (&mut nothing, 1), |strip, codes, _| {
            // Channels past the last repeat the last: their words are turned and dropped.
            let last = columns.channels() - 1;
            let column = |i: usize| columns.column((strip * STRIP + i).min(last)).unwrap_or_default();
            let at: [usize; STRIP] = std::array::from_fn(column);
            let (mut source, mut turned) = ([[[0u8; 8]; L]; SIDE], [[[0u8; 8]; L]; SIDE]);
            for part in 0..self.tiles * QUADRANTS {
                let (tile, quadrant) = (part / QUADRANTS, part % QUADRANTS);
                let (start, end) = ((part * run).min(row), (part * run + run).min(row));
                for (codes, at) in codes.chunks_mut(SIDE * row).zip(at.chunks_exact(SIDE)) {
                    let contiguous = at.windows(2).all(|pair| pair[1] == pair[0] + 1);
                    for (p, words) in source.iter_mut().enumerate() {
                        let words = words.as_flattened_mut();
                        let packed =
                            &data[self.row(quadrant * SIDE + p, tile) * self.row_bytes()..][..self.row_bytes()];
                        if contiguous {
                            words.copy_from_slice(&packed[at[0] * self.word..][..8 * L]);
                            continue;
                        }
                        for (word, column) in words.chunks_exact_mut(L / 4).zip(at) {
                            word.copy_from_slice(&packed[column * (L / 4)..][..L / 4]);
                        }
                    }
                    transpose(source.each_ref(), &mut turned);
                    for (codes, words) in codes.chunks_exact_mut(row).zip(&turned) {
                        codes[start..end].copy_from_slice(&words.as_flattened()[..end - start]);
                    }
                }
            }
        });
    }
}

/// The rows of a tensor of `columns` words of `word` bytes, cut into strips: for each strip its part of every row.
pub(super) fn strips(data: &mut [u8], columns: usize, word: usize) -> Vec<Vec<&mut [u8]>> {
    let mut strips = Vec::new();
    strips.resize_with(columns.div_ceil(STRIP), Vec::new);
    for row in data.chunks_exact_mut(columns * word) {
        for (strip, part) in strips.iter_mut().zip(row.chunks_mut(STRIP * word)) {
            strip.push(part);
        }
    }
    strips
}

/// Transposes 32 x 32 words of `L / 4` bytes: word j of row i becomes word i of row j. `L` is 4, 8 or 16.
///
/// In a 64-bit lane lie `R = 32 / L` words. R rows, lane by lane, are R x R squares: each is transposed by exchanging halves, then
/// quarters, then eighths (Warren, Hacker's Delight, section 7-3). The loops over lanes are what the compiler makes vectors of.
fn transpose<const L: usize>(source: [&[[u8; 8]; L]; SIDE], out: &mut [[[u8; 8]; L]; SIDE]) {
    let square = SIDE / L;
    let bits = 64 / square;
    for (block, rows) in source.chunks_exact(square).enumerate() {
        let mut a = [[0u64; L]; 8];
        for (a, row) in a.iter_mut().zip(rows) {
            *a = row.map(u64::from_le_bytes);
        }
        let mut half = square / 2;
        while half > 0 {
            let shift = half * bits;
            // Ones in the lower `shift` bits of every `2 * shift`.
            let mask = u64::MAX / ((1 << shift) + 1);
            for i in (0..square).filter(|i| i & half == 0) {
                let (upper, lower) = a.split_at_mut(i + half);
                for (x, y) in upper[i].iter_mut().zip(&mut lower[0]) {
                    let moved = ((*x >> shift) ^ *y) & mask;
                    *y ^= moved;
                    *x ^= moved << shift;
                }
            }
            half /= 2;
        }
        for (j, out) in out.chunks_exact_mut(square).enumerate() {
            for (out, a) in out.iter_mut().zip(&a) {
                out[block] = a[j].to_le_bytes();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<const L: usize>() {
        let word = L / 4;
        let mut source = [[[0u8; 8]; L]; SIDE];
        for (i, byte) in source.as_flattened_mut().as_flattened_mut().iter_mut().enumerate() {
            *byte = (i.wrapping_mul(0x9E37_79B1) >> 11) as u8;
        }
        let mut out = [[[0u8; 8]; L]; SIDE];
        transpose(source.each_ref(), &mut out);
        for (i, from) in source.iter().enumerate() {
            for (j, to) in out.iter().enumerate() {
                let from = &from.as_flattened()[j * word..][..word];
                assert_eq!(from, &to.as_flattened()[i * word..][..word], "{word} bytes, ({i}, {j})");
            }
        }
    }

    #[test]
    fn every_word_of_a_square_lands_across_the_diagonal() {
        check::<4>();
        check::<8>();
        check::<16>();
    }
}
