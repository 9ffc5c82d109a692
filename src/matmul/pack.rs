//! From a checkpoint's order to the kernels'.
#![forbid(unsafe_code)]

use super::coding::decode_any;
use super::layout::{GROUP, PackedLayout};
use super::packed::{Bytes, Facts, Outer, PackedMatrix, code_range};
use crate::cpu::{Cpu, Kernel, LANES, LINE, Lines, Range, STEP, Simd, Smallest, for_each_zip};
use crate::error::{Error, Result};
use crate::quant::{QuantizedMatrix, Scheme};
use bytemuck::{Pod, cast_slice, cast_slice_mut};

/// Most code bytes of a row in a group: bf16.
const ROW_BYTES: usize = GROUP * STEP * 2;

impl Cpu<'_> {
    /// Packs weights once, in parallel; any number of calls then use them, on any tier.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for scale tiles whose k is neither a multiple of 32 nor at least the matrix's k;
    /// [`Error::Overflow`].
    pub fn pack(&self, w: &QuantizedMatrix<'_>) -> Result<PackedMatrix> {
        let scheme = w.scheme();
        check_tiles(scheme, w.k())?;
        let layout = PackedLayout::new(scheme, w.n(), w.k())?;
        let mut data = Lines::zeroed("packed weights", layout.bytes())?;
        // One for each panel that holds anything: without columns there is no memory that would bound n.
        let mut facts = vec![Facts::NONE; if layout.steps() == 0 { 0 } else { layout.panels() }];
        // Runs of panels: a source row's neighbours in memory are then read by the same thread.
        let run = facts.len().div_ceil(self.parallelism().threads() * self.blocking().tasks).max(1);
        let tier = self.tier();
        let all = (data.bytes_mut(), layout.panel_bytes().saturating_mul(run));
        for_each_zip(self.parallelism(), all, (&mut facts, run), |r, data, facts| {
            tier.run(Pack { w, layout, first_panel: r * run, data, facts });
        });
        let facts = facts.into_iter().fold(Facts::NONE, Facts::merge);
        Ok(PackedMatrix { layout, data: Bytes::Own(data), outer: outer(w), facts })
    }
}

/// Refuses tiles that cut a step.
pub(super) fn check_tiles(scheme: Scheme, matrix_k: usize) -> Result<()> {
    match scheme {
        Scheme::Fp8Blockwise { k, .. } if !k.is_multiple_of(STEP) && k < matrix_k => Err(Error::Unsupported {
            what: format!("weights with scale tiles of {k} along k"),
            because: format!("the canonical sum takes steps of {STEP}: tiles must be a multiple of it"),
        }),
        _ => Ok(()),
    }
}

fn outer(w: &QuantizedMatrix<'_>) -> Outer {
    let at = |row, col| w.outer_scale(row, col).unwrap_or(1.0);
    match w.scheme() {
        Scheme::Fp8PerChannel(_) => Outer::Channel((0..w.n()).map(|row| at(row, 0)).collect()),
        Scheme::Fp8Blockwise { n, k, .. } => {
            let row = w.k().div_ceil(k);
            // Without columns any number of rows fits any slice: do not walk them.
            let rows = (0..if row == 0 { 0 } else { w.n() }).step_by(n);
            let scales = rows.flat_map(|i| (0..row).map(move |j| (i, j * k))).map(|(i, j)| at(i, j)).collect();
            Outer::Tiles { n, k, row, scales }
        }
        _ => Outer::Tensor(at(0, 0)),
    }
}

/// Packs consecutive panels.
struct Pack<'a> {
    w: &'a QuantizedMatrix<'a>,
    layout: PackedLayout,
    first_panel: usize,
    data: &'a mut [u8],
    facts: &'a mut [Facts],
}

impl Kernel for Pack<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let panels = self.data.chunks_exact_mut(self.layout.panel_bytes());
        for (p, (panel, facts)) in panels.zip(self.facts).enumerate() {
            *facts = pack_panel(self.w, self.layout, (self.first_panel + p) * LANES, panel);
        }
    }
}

/// Packs the 16 rows from `first` on.
#[inline(always)]
fn pack_panel(w: &QuantizedMatrix<'_>, layout: PackedLayout, first: usize, panel: &mut [u8]) -> Facts {
    let scheme = layout.scheme();
    let mut rows = [[0u8; ROW_BYTES]; LANES];
    let rows_here = (w.n() - first).min(LANES);
    let mut seen = Seen::new();
    for (g, group) in panel.chunks_mut(layout.group_bytes()).enumerate() {
        let steps = GROUP.min(layout.steps() - g * GROUP);
        let (scales, codes) = group.split_at_mut(layout.scale_area(steps));
        let row_bytes = steps * layout.step_bytes() / LANES;
        for (l, row) in rows.iter_mut().enumerate().take(rows_here) {
            w.copy_codes(first + l, g * GROUP * STEP, &mut row[..row_bytes]);
        }
        for (step, codes) in codes.chunks_exact_mut(layout.step_bytes()).enumerate() {
            turn(scheme, &rows, step, codes);
            seen.codes(scheme, codes);
        }
        if layout.step_scales() == 0 {
            continue;
        }
        let (blocks, block_bytes) = (steps * STEP / scheme.block(), scheme.block() * scheme.bits() / 8);
        for (l, row) in rows.iter().enumerate().take(rows_here) {
            let mut own = [0; GROUP * 2];
            w.copy_block_scales(first + l, g * GROUP * STEP / scheme.block(), &mut own[..blocks]);
            for (b, (scale, codes)) in own.iter().zip(row.chunks_exact(block_bytes)).enumerate().take(blocks) {
                // Blocks beyond k are zero and so have scale 1 too.
                scales[b * LANES + l] = seen.scale(scheme, *scale, codes);
            }
        }
    }
    let mut facts = seen.facts(scheme);
    if facts.top > 127 && facts.finite {
        // A bound is not a value: look whether any leaves f32's range.
        let mut values = [[0.0; LANES]; STEP];
        for step in 0..layout.steps() {
            let (scales, codes) = layout.step(step);
            decode_any(scheme, &panel[scales], &panel[codes], &mut values);
            facts.finite &= values.as_flattened().iter().fold(true, |all, v| all & v.is_finite());
        }
    }
    facts
}

/// The codes of a step, of 16 rows side by side, to lines.
#[inline(always)]
fn turn(scheme: Scheme, rows: &[[u8; ROW_BYTES]; LANES], step: usize, lines: &mut [u8]) {
    match scheme.bits() {
        4 => {
            let mut words = [[0u32; 4]; LANES];
            for (words, row) in words.iter_mut().zip(rows) {
                *words = bytemuck::cast::<[u8; 16], [u32; 4]>(*first(&row[16 * step..])).map(u32::from_le);
                for word in words {
                    *word = even_then_odd(*word).to_le();
                }
            }
            for (j, line) in lines.chunks_exact_mut(LINE).enumerate() {
                for (to, words) in line.as_chunks_mut::<4>().0.iter_mut().zip(&words) {
                    *to = words[j].to_ne_bytes();
                }
            }
        }
        8 => {
            let mut square = [[0u16; LANES]; LANES];
            for (words, row) in square.iter_mut().zip(rows) {
                *words = bytemuck::cast(*first::<32>(&row[32 * step..]));
            }
            put(transposed(square), lines);
        }
        _ => {
            let mut square = [[0u32; LANES]; LANES];
            for (words, row) in square.iter_mut().zip(rows) {
                *words = bytemuck::cast(*first::<64>(&row[64 * step..]));
                for word in words {
                    *word = without_subnormals(u32::from_le(*word)).to_le();
                }
            }
            put(transposed(square), lines);
        }
    }
}

#[inline(always)]
fn first<const N: usize>(bytes: &[u8]) -> &[u8; N] {
    bytes.first_chunk().unwrap_or(&[0; N])
}

#[inline(always)]
fn put<T: Pod, const N: usize>(square: [[T; LANES]; N], lines: &mut [u8]) {
    let from: &[u8] = cast_slice(square.as_flattened());
    cast_slice_mut(lines).copy_from_slice(from);
}

/// Nibbles k0..k7 to k0 k2 k4 k6 k1 k3 k5 k7.
#[inline(always)]
fn even_then_odd(x: u32) -> u32 {
    let x = x & 0xF00F_F00F | (x & 0x0F00_0F00) >> 4 | (x & 0x00F0_00F0) << 4;
    x & 0xFF00_00FF | (x & 0x00FF_0000) >> 8 | (x & 0x0000_FF00) << 8
}

/// Two bf16, subnormals as zeros of their sign.
#[inline(always)]
fn without_subnormals(x: u32) -> u32 {
    let half = |x: u32| if x & 0x7F80 == 0 { x & 0x8000 } else { x };
    half(x & 0xFFFF) | half(x >> 16) << 16
}

/// The transposed square, in four stages of interleaving rows i and i + 8.
#[inline(always)]
fn transposed<T: Copy + Default>(mut square: [[T; LANES]; LANES]) -> [[T; LANES]; LANES] {
    for _ in 0..4 {
        let from = square;
        for i in 0..LANES / 2 {
            for l in 0..LANES / 2 {
                square[2 * i][2 * l] = from[i][l];
                square[2 * i][2 * l + 1] = from[i + LANES / 2][l];
                square[2 * i + 1][2 * l] = from[i][l + LANES / 2];
                square[2 * i + 1][2 * l + 1] = from[i + LANES / 2][l + LANES / 2];
            }
        }
    }
    square
}

/// What is gathered of a panel.
struct Seen {
    /// Least and largest scale code of blocks that are not zero.
    scales: (u8, u8),
    nan: bool,
    /// Largest magnitude byte of FP8 codes.
    largest: u8,
    /// Values of bf16.
    range: Range,
}

impl Seen {
    fn new() -> Seen {
        Seen { scales: (255, 0), nan: false, largest: 0, range: Range::new(Smallest::BF16) }
    }

    /// Takes in a block; returns the scale to pack.
    #[inline(always)]
    fn scale(&mut self, scheme: Scheme, scale: u8, codes: &[u8]) -> u8 {
        if scheme == Scheme::Nvfp4 {
            self.nan |= scale & 0x7F == 0x7F;
            return scale;
        }
        let magnitudes = if scheme.bits() == 4 { 0x77 } else { 0x7F };
        if scale == 255 {
            self.nan = true;
            return scale;
        }
        if codes.iter().fold(0, |any, code| any | code) & magnitudes == 0 {
            return 127;
        }
        self.scales = (self.scales.0.min(scale), self.scales.1.max(scale));
        scale
    }

    /// Takes in the packed codes of a step.
    #[inline(always)]
    fn codes(&mut self, scheme: Scheme, lines: &[u8]) {
        match scheme.bits() {
            4 => {}
            8 => self.largest = lines.iter().fold(self.largest, |m, code| m.max(code & 0x7F)),
            _ => {
                let mut values = [0.0; LANES * 2];
                for line in lines.as_chunks::<LINE>().0 {
                    for (value, bytes) in values.iter_mut().zip(line.as_chunks::<2>().0) {
                        *value = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
                    }
                    self.range.see(&values);
                }
            }
        }
    }

    fn facts(self, scheme: Scheme) -> Facts {
        let Some(format) = scheme.element() else {
            let (grid, top) = (self.range.smallest.grid(), self.range.top());
            return Facts { grid, top, finite: top <= 128, exact: true };
        };
        let (grid, top) = code_range(format);
        let finite = !self.nan && (scheme.bits() == 4 || self.largest <= format.max_code());
        match scheme {
            Scheme::Mxfp4 | Scheme::Mxfp8(_) if self.scales.0 > self.scales.1 => Facts { finite, ..Facts::NONE },
            Scheme::Mxfp4 | Scheme::Mxfp8(_) => {
                let (least, most) = (i32::from(self.scales.0) - 127, i32::from(self.scales.1) - 127);
                // Code 0 is 2^-127, which kernels that make powers of two by shifts do not know.
                let exact = grid + least >= -126 && top + most <= 127 && least > -127;
                Facts { grid: Some(grid + least), top: top + most, finite, exact }
            }
            // An E4M3FN scale is a multiple of 2^-9 and below 2^9.
            Scheme::Nvfp4 => Facts { grid: Some(grid - 9), top: top + 9, finite, exact: true },
            _ => Facts { grid: Some(grid), top, finite, exact: true },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn squares_turn() {
        let square: [[u32; LANES]; LANES] = std::array::from_fn(|i| std::array::from_fn(|j| (i * 100 + j) as u32));
        let turned = transposed(square);
        assert!((0..LANES).all(|i| (0..LANES).all(|j| turned[j][i] == square[i][j])));
    }

    #[test]
    fn nibbles_and_subnormals() {
        assert_eq!(even_then_odd(0x7654_3210), 0x7531_6420);
        assert_eq!(without_subnormals(0x8001_0080), 0x8000_0080);
        assert_eq!(without_subnormals(0x7FC0_007F), 0x7FC0_0000);
    }
}
