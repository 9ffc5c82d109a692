//! From a checkpoint's order to the kernels'.
#![forbid(unsafe_code)]

use super::facts::Seen;
use super::layout::{GROUP, PackedLayout};
use super::packed::{Bytes, Facts, Outer, PackedMatrix};
use crate::cpu::knobs::PACK_AHEAD;
use crate::cpu::{Cpu, Kernel, LANES, LINE, Lines, STEP, Simd, for_each_zip};
use crate::error::{Error, Result};
use crate::quant::{QuantizedMatrix, Scheme};

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
        let run = facts.len().div_ceil(self.parallelism().threads().saturating_mul(self.blocking().tasks)).max(1);
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
    fn run<S: Simd>(self, s: S) {
        let panels = self.data.chunks_exact_mut(self.layout.panel_bytes());
        for (p, (panel, facts)) in panels.zip(self.facts).enumerate() {
            *facts = pack_panel(s, self.w, self.layout, (self.first_panel + p) * LANES, panel);
        }
    }
}

/// Packs the 16 rows from `first` on.
#[inline(always)]
fn pack_panel<S: Simd>(s: S, w: &QuantizedMatrix<'_>, layout: PackedLayout, first: usize, panel: &mut [u8]) -> Facts {
    let rows = Rows::new(w, first);
    let seen = match layout.scheme().bits() {
        4 => pack_groups::<S, 1>(s, &rows, layout, panel),
        8 => pack_groups::<S, 2>(s, &rows, layout, panel),
        _ => pack_groups::<S, 4>(s, &rows, layout, panel),
    };
    seen.facts(s, layout, panel)
}

/// 16 rows where they come from.
struct Rows<'a> {
    w: &'a QuantizedMatrix<'a>,
    first: usize,
    /// Codes and block scales of each row; empty past n, and where they are not one after the other.
    codes: [&'a [u8]; LANES],
    scales: [&'a [u8]; LANES],
}

impl<'a> Rows<'a> {
    fn new(w: &'a QuantizedMatrix<'a>, first: usize) -> Self {
        let codes = std::array::from_fn(|l| w.row_codes(first + l));
        let scales = std::array::from_fn(|l| w.row_scales(first + l));
        Rows { w, first, codes, scales }
    }

    /// Codes of row l in a group, Q lines, if they lie one after the other.
    #[inline(always)]
    fn codes<const Q: usize>(&self, l: usize, group: usize) -> Option<&'a [[u8; LINE]; Q]> {
        self.codes[l].as_chunks().0.get(group * Q..).and_then(|lines| lines.first_chunk())
    }

    /// Where row l will be read next but a few lines, then the same row of the next panel. A hint: any address will do.
    #[inline(always)]
    fn ahead(&self, l: usize, at: usize) -> *const u8 {
        let row = self.codes[l];
        let next = if at + PACK_AHEAD < row.len() { 0 } else { (LANES - 1) * row.len() };
        row.as_ptr().wrapping_add(next.wrapping_add(at + PACK_AHEAD))
    }

    /// As [`Rows::codes`], for any order and at the end of a row, zeros past n and k.
    #[inline(never)]
    fn other_codes<const Q: usize>(&self, l: usize, group: usize) -> [[u8; LINE]; Q] {
        let mut lines = [[0; LINE]; Q];
        if self.first + l < self.w.n() {
            self.w.copy_codes(self.first + l, group * GROUP * STEP, lines.as_flattened_mut());
        }
        lines
    }

    /// Block scales of row l from block `first` on, zeros past n and k.
    #[inline(always)]
    fn scales(&self, l: usize, first: usize) -> [u8; GROUP] {
        match self.scales[l].get(first..).and_then(|scales| scales.first_chunk()) {
            Some(scales) => *scales,
            None => self.other_scales(l, first),
        }
    }

    /// As [`Rows::scales`], for any order and at the end of a row.
    #[inline(never)]
    fn other_scales(&self, l: usize, first: usize) -> [u8; GROUP] {
        let mut scales = [0; GROUP];
        if self.first + l < self.w.n() {
            self.w.copy_block_scales(self.first + l, first, &mut scales);
        }
        scales
    }
}

/// Packs a panel whose rows have Q lines in a group: in squares of 16 rows by 16 words, which are turned.
#[inline(always)]
fn pack_groups<S: Simd, const Q: usize>(s: S, rows: &Rows<'_>, layout: PackedLayout, panel: &mut [u8]) -> Seen {
    let scheme = layout.scheme();
    let mut seen = Seen::new();
    for (g, group) in panel.chunks_mut(layout.group_bytes()).enumerate() {
        let steps = GROUP.min(layout.steps() - g * GROUP);
        let (scales, codes) = group.split_at_mut(layout.scale_area(steps));
        let mut squares = [[s.words(&[0; LINE]); LANES]; Q];
        #[allow(clippy::needless_range_loop)] // row l of several arrays
        for l in 0..LANES {
            let other;
            let lines = match rows.codes::<Q>(l, g) {
                Some(lines) => lines,
                None => {
                    other = rows.other_codes::<Q>(l, g);
                    &other
                }
            };
            for q in 0..Q {
                let mut words: [u32; LANES] = bytemuck::cast(lines[q]);
                // A loop: what a closure does in `map` is not always compiled for the tier.
                s.prefetch(rows.ahead(l, (g * Q + q) * LINE));
                for word in &mut words {
                    match Q {
                        1 => *word = even_then_odd(u32::from_le(*word)).to_le(),
                        2 => {}
                        _ => *word = without_subnormals(u32::from_le(*word)).to_le(),
                    }
                }
                squares[q][l] = s.words(&bytemuck::cast(words));
            }
        }
        // Word l of each line is of row l then.
        let mut lines = [[[0; LINE]; LANES]; Q];
        for q in 0..Q {
            for (words, line) in transposed(s, squares[q]).into_iter().zip(&mut lines[q]) {
                s.store_words(words, line);
            }
        }
        let lines = lines.as_flattened();
        for (line, to) in lines.iter().zip(codes.as_chunks_mut::<LINE>().0) {
            *to = if Q == 2 { pairs_apart(line) } else { *line };
        }
        let scales = &mut scales[..steps * layout.step_scales()];
        let mut own = [0u32; LANES];
        for (b, scales) in scales.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            // Four blocks of each row at a time.
            if b % GROUP == 0 {
                let first = g * GROUP * STEP / scheme.block() + b;
                for (l, own) in own.iter_mut().enumerate() {
                    *own = u32::from_le_bytes(rows.scales(l, first));
                }
            }
            for l in 0..LANES {
                scales[l] = (own[l] >> (8 * (b % GROUP))) as u8;
            }
        }
        seen.group::<Q>(scheme, codes, scales);
    }
    seen
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

/// The low halves of all words, then the high halves.
#[inline(always)]
fn pairs_apart(words: &[u8; LINE]) -> [u8; LINE] {
    let words: [[u16; 2]; LANES] = bytemuck::cast(*words);
    let mut halves = [[0u16; LANES]; 2];
    for l in 0..LANES {
        halves[0][l] = words[l][0];
        halves[1][l] = words[l][1];
    }
    bytemuck::cast(halves)
}

/// The transposed square: four times rows i and i + 8 in turn.
#[inline(always)]
fn transposed<S: Simd>(s: S, mut square: [S::W; LANES]) -> [S::W; LANES] {
    for _ in 0..4 {
        let from = square;
        for i in 0..LANES / 2 {
            [square[2 * i], square[2 * i + 1]] = s.interleave(from[i], from[i + LANES / 2]);
        }
    }
    square
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nibbles_and_subnormals() {
        assert_eq!(even_then_odd(0x7654_3210), 0x7531_6420);
        assert_eq!(without_subnormals(0x8001_0080), 0x8000_0080);
        assert_eq!(without_subnormals(0x7FC0_007F), 0x7FC0_0000);
    }
}
