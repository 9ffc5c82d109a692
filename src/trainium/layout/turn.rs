//! The transposition under every layout: a channel's words along k become words of one column, and back.
//!
//! Both sides are matrices much larger than the caches, and the two things that cost are short runs and new pages
//! (`docs/layouts.md` section 6). So squares of 512 bytes by 512 bytes are staged: read in runs of 512 along one side, turned in
//! the cache, written in runs of 512 along the other; and squares follow each other along the rows of columns, whose pages lie
//! far apart, so that a page is used up before it is left.
#![forbid(unsafe_code)]

use super::Columns;
use crate::cpu::{Parallelism, for_each_zip};
use crate::error::{Result, length, mul};

/// Side of the square of words that is transposed at once.
const SIDE: usize = 32;
/// Bytes of a vector: what x86-64 and AArch64 have without extensions.
const VECTOR: usize = 16;
/// Bytes that are read, and that are written, at once.
const RUN: usize = 512;
/// Runs of a row of columns that one thread does after each other: a page of 4 KiB.
const RUNS: usize = 8;
/// Jobs for each thread, if there is enough to do: the last to finish is not waited for long.
const JOBS: usize = 4;

/// Rows of `word`-byte words along k, one for each channel of `columns`, and rows of columns.
pub(super) struct Turn<'a, R> {
    pub(super) columns: &'a Columns,
    /// Bytes of a word: 1, 2 or 4.
    pub(super) word: usize,
    /// Words along k.
    pub(super) words: usize,
    /// The row of columns that a word along k belongs to; each row has one word.
    pub(super) row: R,
}

/// The part of a packed tensor that one thread writes: a piece of some rows.
struct Job<'a> {
    /// Its first column and first word along k.
    column: usize,
    first: usize,
    /// For each word along k its piece of a row.
    rows: Vec<&'a mut [u8]>,
}

impl<R: Fn(usize) -> usize + Sync> Turn<'_, R> {
    fn bytes(&self) -> Result<usize> {
        mul("packed tensor", mul("packed tensor", self.words, self.columns.count())?, self.word)
    }

    /// Columns, or channels, of a job, if `across` jobs lie side by side along the other axis.
    fn span(&self, across: usize, parallelism: Parallelism<'_>) -> usize {
        let block = RUN / self.word;
        let jobs = (JOBS * parallelism.threads()).div_ceil(across.max(1));
        (self.columns.count().div_ceil(jobs).div_ceil(block)).clamp(1, RUNS) * block
    }

    /// Fills `data`, `[words, columns]` in the order of `row`. `load(channel, first, bytes)` writes whole words of a channel from word
    /// `first` on; no channel is padding. Returns the sum of what the loads return.
    pub(super) fn pack(
        &self,
        parallelism: Parallelism<'_>,
        data: &mut [u8],
        load: impl Fn(Option<usize>, usize, &mut [u8]) -> usize + Sync,
    ) -> Result<usize> {
        length("packed tensor", data.len(), self.bytes()?)?;
        let block = RUN / self.word;
        let span = self.span(self.words.div_ceil(block), parallelism);
        let mut rows: Vec<_> =
            data.chunks_exact_mut(self.columns.count() * self.word).map(|r| r.chunks_mut(span * self.word)).collect();
        let mut jobs = Vec::new();
        for first in (0..self.words).step_by(block) {
            for column in (0..self.columns.count()).step_by(span) {
                let words = first..self.words.min(first + block);
                let rows = words.filter_map(|w| rows.get_mut((self.row)(w))?.next()).collect();
                jobs.push(Job { column, first, rows });
            }
        }
        let mut sums = vec![0; jobs.len()];
        for_each_zip(parallelism, (&mut jobs, 1), (&mut sums, 1), |_, jobs, sums| {
            for (job, sum) in jobs.iter_mut().zip(sums) {
                *sum = match self.word {
                    1 => self.pack_job::<2, 16>(job, &load),
                    2 => self.pack_job::<4, 8>(job, &load),
                    _ => self.pack_job::<8, 4>(job, &load),
                };
            }
        });
        Ok(sums.iter().sum())
    }

    /// `V` vectors of 16 bytes hold 32 words, `N` words each.
    fn pack_job<const V: usize, const N: usize>(
        &self,
        job: &mut Job<'_>,
        load: &impl Fn(Option<usize>, usize, &mut [u8]) -> usize,
    ) -> usize {
        let word = V / 2;
        let (block, words) = (RUN / word, job.rows.len());
        let columns = job.rows.first().map_or(0, |row| row.len() / word);
        let (mut source, mut turned) = (vec![0u8; block * RUN], vec![0u8; SIDE * RUN]);
        let mut square = [[[0u8; VECTOR]; V]; SIDE];
        let mut sum = 0;
        for at in (0..columns).step_by(block) {
            let width = block.min(columns - at);
            for (column, bytes) in (job.column + at..job.column + at + width).zip(source.chunks_exact_mut(RUN)) {
                sum += load(self.columns.channel(column), job.first, &mut bytes[..words * word]);
            }
            for (w, rows) in (0..).step_by(SIDE).zip(job.rows.chunks_mut(SIDE)) {
                for c in (0..width).step_by(SIDE) {
                    transpose::<V, N>(
                        std::array::from_fn(|i| vectors(&source[(c + i) * RUN + w * word..])),
                        &mut square,
                    );
                    for (row, square) in turned.chunks_exact_mut(RUN).zip(&square) {
                        row[c * word..][..SIDE * word].copy_from_slice(square.as_flattened());
                    }
                }
                for (row, turned) in rows.iter_mut().zip(turned.chunks_exact(RUN)) {
                    row[at * word..][..width * word].copy_from_slice(&turned[..width * word]);
                }
            }
        }
        sum
    }

    /// The inverse: words of every channel, cut to `row` bytes each, into `out`, `[channels, row]`.
    pub(super) fn unpack(&self, parallelism: Parallelism<'_>, data: &[u8], out: &mut [u8], row: usize) -> Result<()> {
        length("packed tensor", data.len(), self.bytes()?)?;
        length("unpacked tensor", out.len(), mul("unpacked tensor", self.columns.channels(), row)?)?;
        if row == 0 {
            return Ok(());
        }
        let span = self.span(1, parallelism);
        let mut nothing = vec![(); self.columns.channels().div_ceil(span)];
        for_each_zip(parallelism, (out, span * row), (&mut nothing, 1), |job, out, _| match self.word {
            1 => self.unpack_job::<2, 16>(data, job * span, out, row),
            2 => self.unpack_job::<4, 8>(data, job * span, out, row),
            _ => self.unpack_job::<8, 4>(data, job * span, out, row),
        });
        Ok(())
    }

    /// The channels from `first` on, as many as `out` has rows.
    fn unpack_job<const V: usize, const N: usize>(&self, data: &[u8], first: usize, out: &mut [u8], row: usize) {
        let word = V / 2;
        let (block, row_bytes) = (RUN / word, self.columns.count() * word);
        let (mut source, mut turned) = (vec![0u8; block * RUN], vec![0u8; SIDE * RUN]);
        let mut square = [[[0u8; VECTOR]; V]; SIDE];
        let order = by_column(self.columns, first, out.len() / row);
        let blocks: Vec<_> = order.chunks(block).map(|order| (order, runs(order))).collect();
        for first in (0..self.words).step_by(block) {
            let words = block.min(self.words - first);
            let (start, end) = ((first * word).min(row), ((first + words) * word).min(row));
            for (order, runs) in &blocks {
                for (w, staged) in (first..first + words).zip(source.chunks_exact_mut(RUN)) {
                    let packed = &data[(self.row)(w) * row_bytes..][..row_bytes];
                    for &(column, place, len) in runs {
                        let run = &packed[column * word..][..len * word];
                        staged[place * word..][..len * word].copy_from_slice(run);
                    }
                }
                for (c, order) in (0..).step_by(SIDE).zip(order.chunks(SIDE)) {
                    for w in (0..words).step_by(SIDE) {
                        transpose::<V, N>(
                            std::array::from_fn(|i| vectors(&source[(w + i) * RUN + c * word..])),
                            &mut square,
                        );
                        for (row, square) in turned.chunks_exact_mut(RUN).zip(&square) {
                            row[w * word..][..SIDE * word].copy_from_slice(square.as_flattened());
                        }
                    }
                    for (&(_, channel), turned) in order.iter().zip(turned.chunks_exact(RUN)) {
                        out[channel * row..][start..end].copy_from_slice(&turned[..end - start]);
                    }
                }
            }
        }
    }
}

/// `(column, channel - first)` of `count` channels from `first` on, in the order of columns.
fn by_column(columns: &Columns, first: usize, count: usize) -> Vec<(usize, usize)> {
    let mut order: Vec<_> = (0..count).filter_map(|i| Some((columns.column(first + i)?, i))).collect();
    order.sort_unstable();
    order
}

/// `(first column, its position in the order, length)` of the stretches of neighbouring columns.
fn runs(order: &[(usize, usize)]) -> Vec<(usize, usize, usize)> {
    let mut runs: Vec<(usize, usize, usize)> = Vec::new();
    for (place, &(column, _)) in order.iter().enumerate() {
        match runs.last_mut() {
            Some((first, _, len)) if *first + *len == column => *len += 1,
            _ => runs.push((column, place, 1)),
        }
    }
    runs
}

/// The first bytes as vectors; zeros where there are fewer, which no caller has.
fn vectors<const V: usize>(bytes: &[u8]) -> &[[u8; VECTOR]; V] {
    bytes.as_chunks::<VECTOR>().0.first_chunk().unwrap_or(&[[0; VECTOR]; V])
}

/// Transposes 32 x 32 words: word j of row i becomes word i of row j. A row is `V` vectors of `N` words.
///
/// N rows, vector by vector, are squares of N x N words. Interleaving the first half of a square's rows with the second moves each
/// bit of a word's row and column number on by one place; after log2(N) times they have changed sides.
fn transpose<const V: usize, const N: usize>(source: [&[[u8; VECTOR]; V]; SIDE], out: &mut [[[u8; VECTOR]; V]; SIDE]) {
    for (block, rows) in source.chunks_exact(N).enumerate() {
        for (across, out) in out.chunks_exact_mut(N).enumerate() {
            // Not a loop: the compiler keeps vectors in registers only through straight code.
            let mut square = interleaved(interleaved(std::array::from_fn::<_, N, _>(|i| rows[i][across])));
            if N > 4 {
                square = interleaved(square);
            }
            if N > 8 {
                square = interleaved(square);
            }
            for (out, vector) in out.iter_mut().zip(square) {
                out[block] = vector;
            }
        }
    }
}

/// Row i and row i + N / 2 word by word, as rows 2 i and 2 i + 1. With constant N a pair is two instructions of any SIMD unit.
#[inline(always)]
fn interleaved<const N: usize>(rows: [[u8; VECTOR]; N]) -> [[u8; VECTOR]; N] {
    let word = VECTOR / N;
    let mut out = [[0; VECTOR]; N];
    for i in 0..N / 2 {
        for w in 0..N {
            for byte in 0..word {
                let (row, at) = (2 * i + w / (N / 2), w % (N / 2) * 2 * word + byte);
                out[row][at] = rows[i][w * word + byte];
                out[row][at + word] = rows[i + N / 2][w * word + byte];
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<const V: usize, const N: usize>() {
        let word = V / 2;
        let mut source = [[[0u8; VECTOR]; V]; SIDE];
        for (i, byte) in source.as_flattened_mut().as_flattened_mut().iter_mut().enumerate() {
            *byte = (i.wrapping_mul(0x9E37_79B1) >> 11) as u8;
        }
        let mut out = [[[0u8; VECTOR]; V]; SIDE];
        transpose::<V, N>(source.each_ref(), &mut out);
        for (i, from) in source.iter().enumerate() {
            for (j, to) in out.iter().enumerate() {
                let from = &from.as_flattened()[j * word..][..word];
                assert_eq!(from, &to.as_flattened()[i * word..][..word], "{word} bytes, ({i}, {j})");
            }
        }
    }

    #[test]
    fn every_word_of_a_square_lands_across_the_diagonal() {
        check::<2, 16>();
        check::<4, 8>();
        check::<8, 4>();
    }
}
