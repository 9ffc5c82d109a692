//! Many rows of x, or numbers that the decode kernel's shortcuts do not cover: a few panels are decoded to f32, or to pairs of bf16, in
//! the cache and multiplied by all rows, in blocks that fill the registers.
#![forbid(unsafe_code)]

use super::coding::{Coding, decode_any};
use super::layout::PackedLayout;
use super::terms::{PAIRS, Paired, Reading, SINGLES, Single, Terms};
use super::tiles::Tiles;
use crate::cpu::{Bf16Token, Kernel, LANES, LINE, PairKernel, Pairs, STEP, Simd, Tier, flushed};
use std::ops::Range;

/// Sums of rows of x with consecutive panels.
pub(super) struct Prefill<'a, C> {
    pub(super) tier: Tier,
    /// Whether x and decoded weights are pairs.
    pub(super) pairs: Option<Bf16Token>,
    /// `None`: decode by definition, which makes no pairs.
    pub(super) coding: Option<C>,
    pub(super) layout: PackedLayout,
    /// Packed bytes from the first panel on, and its index.
    pub(super) data: &'a [u8],
    pub(super) first_panel: usize,
    /// Rows of x, `stride` words apart.
    pub(super) x: &'a [f32],
    pub(super) stride: usize,
    pub(super) rows: usize,
    pub(super) tiles: Option<Tiles<'a>>,
    /// Whether subnormals may arise.
    pub(super) flush: bool,
    /// Panels of a register block.
    pub(super) together: usize,
    /// Steps decoded at a time, and k in a block.
    pub(super) chunk_steps: usize,
    pub(super) k_block: usize,
    pub(super) prefetch: usize,
    /// `[panel][rows]`.
    pub(super) sums: &'a mut [[f32; LANES]],
    /// `[panels of a register block][rows]`, used with tiles.
    pub(super) part: &'a mut [[f32; LANES]],
    /// `[chunk_steps * words of a step][panels of a register block]`.
    pub(super) decoded: &'a mut [[f32; LANES]],
}

impl<C: Coding> Prefill<'_, C> {
    pub(super) fn run(mut self) {
        debug_assert!(
            self.pairs.is_none() || self.coding.is_some() && !self.flush,
            "pairs of what they do not give the bits of"
        );
        let (steps, panels) = (self.layout.steps(), self.sums.len() / self.rows);
        self.sums.fill([0.0; LANES]);
        let mut start = 0;
        while start < steps {
            // A whole number of tiles.
            let mut end = start + (self.k_block / STEP).max(1);
            if let Some(tiles) = &self.tiles {
                end = tiles.end(end - 1);
            }
            let end = end.min(steps);
            for panel in (0..panels).step_by(self.together) {
                self.block(panel, self.together.min(panels - panel), start..end);
            }
            start = end;
        }
    }

    /// Takes a block of k through a few panels and all rows.
    fn block(&mut self, panel: usize, panels: usize, block: Range<usize>) {
        let (tier, layout, rows) = (self.tier, self.layout, self.rows);
        let words = if self.pairs.is_some() { PAIRS } else { SINGLES };
        let sums = &mut self.sums[panel * rows..(panel + panels) * rows];
        let mut step = block.start;
        while step < block.end {
            let mut end = (step + self.chunk_steps).min(block.end);
            if let Some(tiles) = &self.tiles {
                end = end.min(tiles.end(step));
            }
            let decoded = &mut self.decoded[..(end - step) * words * panels];
            let data = &self.data[panel * layout.panel_bytes()..];
            match self.coding {
                Some(coding) => {
                    let decode = Decoded { coding, layout, data, panels, step, prefetch: self.prefetch, out: decoded };
                    tier.run_with(self.pairs, decode);
                }
                None => tier.run(DecodedAny { layout, data, panels, step, out: decoded }),
            }
            let (x, stride, flush) = (&self.x[step * words..], self.stride, self.flush);
            let first_panel = self.first_panel + panel;
            let tile = self.tiles.as_ref().map(|tiles| Tile {
                tiles,
                of_panels: std::array::from_fn(|p| tiles.lanes(first_panel + p.min(panels - 1), tiles.start(step))),
                start: tiles.start(step),
                begins: tiles.begins(step),
                ends: tiles.ends(end, layout.steps()),
                part: &mut self.part[..panels * rows],
            });
            let multiply = Multiply { x, stride, rows, decoded, panels, flush, tile, sums };
            tier.run_with(self.pairs, multiply);
            step = end;
        }
    }
}

/// Decodes steps of a few panels from step `step` on, to `[word][panel]`.
struct Decoded<'a, C> {
    coding: C,
    layout: PackedLayout,
    data: &'a [u8],
    panels: usize,
    step: usize,
    prefetch: usize,
    out: &'a mut [[f32; LANES]],
}

impl<C: Coding> Kernel for Decoded<'_, C> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.run_as::<S, Single>(s);
    }
}

impl<C: Coding> PairKernel for Decoded<'_, C> {
    #[inline(always)]
    fn run<S: Pairs>(self, s: S) {
        self.run_as::<S, Paired>(s);
    }
}

impl<C: Coding> Decoded<'_, C> {
    #[inline(always)]
    fn run_as<S: Simd, A: Reading<S, C>>(self, s: S) {
        let Decoded { coding, layout, data, panels, .. } = self;
        for p in 0..panels {
            let panel = &data[p * layout.panel_bytes()..];
            for (step, out) in self.out.chunks_exact_mut(A::UNITS * A::WORDS * panels).enumerate() {
                let (scales, codes) = layout.step(self.step + step);
                let scales = panel[scales].as_chunks().0;
                let lines = panel[codes].as_chunks::<LINE>().0.chunks_exact(A::LINES);
                for (i, (lines, out)) in lines.zip(out.chunks_exact_mut(A::WORDS * panels)).enumerate() {
                    for line in lines {
                        s.prefetch(line.as_ptr().wrapping_add(self.prefetch));
                    }
                    let values = A::values(coding, s, lines, i, scales);
                    for word in 0..A::WORDS {
                        s.store(values[word], &mut out[word * panels + p]);
                    }
                }
            }
        }
    }
}

/// As [`Decoded`], for any numbers.
struct DecodedAny<'a> {
    layout: PackedLayout,
    data: &'a [u8],
    panels: usize,
    step: usize,
    out: &'a mut [[f32; LANES]],
}

impl Kernel for DecodedAny<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let DecodedAny { layout, data, panels, .. } = self;
        let mut values = [[0.0; LANES]; STEP];
        for p in 0..panels {
            let panel = &data[p * layout.panel_bytes()..];
            for (step, out) in self.out.chunks_exact_mut(SINGLES * panels).enumerate() {
                let (scales, codes) = layout.step(self.step + step);
                decode_any(s, layout.scheme(), &panel[scales], &panel[codes], &mut values);
                for (out, values) in out.chunks_exact_mut(panels).zip(&values) {
                    out[p] = *values;
                }
            }
        }
    }
}

/// `sums[p][r] += x[r] . panel p` over decoded steps, all rows.
struct Multiply<'a> {
    x: &'a [f32],
    stride: usize,
    rows: usize,
    /// `[word][panel]`.
    decoded: &'a [[f32; LANES]],
    panels: usize,
    flush: bool,
    tile: Option<Tile<'a>>,
    /// `[panel][row]`.
    sums: &'a mut [[f32; LANES]],
}

/// No tier's register block has more panels.
const MOST_PANELS: usize = 3;

/// The scale tile that a chunk of steps lies in.
struct Tile<'a> {
    tiles: &'a Tiles<'a>,
    /// Scales of the panels, and first k of the tile.
    of_panels: [[f32; LANES]; MOST_PANELS],
    start: usize,
    /// Whether the chunk begins and ends it.
    begins: bool,
    ends: bool,
    /// Its sums so far, as [`Multiply::sums`].
    part: &'a mut [[f32; LANES]],
}

impl Kernel for Multiply<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.run_as::<S, Single, SINGLES>(s);
    }
}

impl PairKernel for Multiply<'_> {
    #[inline(always)]
    fn run<S: Pairs>(self, s: S) {
        self.run_as::<S, Paired, PAIRS>(s);
    }
}

impl Multiply<'_> {
    /// With T words in a step.
    #[inline(always)]
    fn run_as<S: Simd, A: Terms<S>, const T: usize>(mut self, s: S) {
        // Inline constants: what a tier does not take is not compiled for it.
        if const { S::REGISTERS.block.1 >= 3 } {
            match self.panels {
                3 => return self.panels::<S, A, T, 3>(s),
                2 => return self.panels::<S, A, T, 2>(s),
                _ => {}
            }
        }
        self.panels::<S, A, T, 1>(s);
    }

    #[inline(always)]
    fn panels<S: Simd, A: Terms<S>, const T: usize, const P: usize>(&mut self, s: S) {
        if const { A::FLUSHES } && self.flush {
            self.all_rows::<S, A, T, P, true>(s)
        } else {
            self.all_rows::<S, A, T, P, false>(s)
        }
    }

    #[inline(always)]
    fn all_rows<S: Simd, A: Terms<S>, const T: usize, const P: usize, const FLUSH: bool>(&mut self, s: S) {
        let mut r = 0;
        while const { S::REGISTERS.block.0 == 8 && !FLUSH } && self.rows - r >= 8 {
            self.registers::<S, A, T, 8, P, FLUSH>(s, r);
            r += 8;
        }
        while const { S::REGISTERS.block.0 == 6 && !FLUSH } && self.rows - r >= 6 {
            self.registers::<S, A, T, 6, P, FLUSH>(s, r);
            r += 6;
        }
        while const { S::REGISTERS.block.0 >= 4 && !FLUSH } && self.rows - r >= 4 {
            self.registers::<S, A, T, 4, P, FLUSH>(s, r);
            r += 4;
        }
        while self.rows - r >= 2 {
            self.registers::<S, A, T, 2, P, FLUSH>(s, r);
            r += 2;
        }
        if r < self.rows {
            self.registers::<S, A, T, 1, P, FLUSH>(s, r);
        }
    }

    /// R rows by P panels: chains stay in registers, both of a step or one after the other.
    #[inline(always)]
    fn registers<S: Simd, A: Terms<S>, const T: usize, const R: usize, const P: usize, const FLUSH: bool>(
        &mut self,
        s: S,
        row: usize,
    ) {
        let decoded = self.decoded.as_chunks::<P>().0.as_chunks::<T>().0;
        let mut x_rows: [&[[f32; T]]; R] = [&[]; R];
        for (r, x_row) in x_rows.iter_mut().enumerate() {
            *x_row = &self.x[(row + r) * self.stride..].as_chunks().0[..decoded.len()];
        }
        // In memory: the chains have the registers. Sums of a tile that is one chunk stay in the same few lines, in L1.
        let whole = matches!(self.tile, Some(Tile { begins: true, ends: true, .. }));
        let (stride, at) = if whole { (R, 0) } else { (self.rows, row) };
        let sums = match &mut self.tile {
            None => &mut *self.sums,
            Some(tile) => {
                if tile.begins {
                    for p in 0..P {
                        tile.part[p * stride + at..][..R].fill([0.0; LANES]);
                    }
                }
                &mut *tile.part
            }
        };
        for (step, decoded) in decoded.iter().enumerate() {
            let mut x: [&[f32; T]; R] = [&[0.0; T]; R];
            for r in 0..R {
                x[r] = &x_rows[r][step];
            }
            let [even, odd] = if const { S::REGISTERS.both } {
                chains::<S, A, T, R, P, 0, 2, FLUSH>(s, &x, decoded)
            } else {
                let [even, _] = chains::<S, A, T, R, P, 0, 1, FLUSH>(s, &x, decoded);
                let [_, odd] = chains::<S, A, T, R, P, 1, 2, FLUSH>(s, &x, decoded);
                [even, odd]
            };
            for p in 0..P {
                let sums = &mut sums[p * stride + at..][..R];
                for r in 0..R {
                    let sum = flushed::<S, FLUSH>(s, s.add(even[r][p], odd[r][p]));
                    s.store(flushed::<S, FLUSH>(s, s.add(s.load(&sums[r]), sum)), &mut sums[r]);
                }
            }
        }
        if let Some(Tile { tiles, of_panels, start, part, ends: true, .. }) = &self.tile {
            for (p, of_panel) in of_panels.iter().enumerate().take(P) {
                let (part, sums) = (&part[p * stride + at..][..R], &mut self.sums[p * self.rows + row..][..R]);
                tiles.add_times(s, (row, *start), s.load(of_panel), part, sums);
            }
        }
    }
}

/// The even and the odd chain of a step; those from `FROM` to `TO`, the other zero.
#[inline(always)]
fn chains<
    S: Simd,
    A: Terms<S>,
    const T: usize,
    const R: usize,
    const P: usize,
    const FROM: usize,
    const TO: usize,
    const FLUSH: bool,
>(
    s: S,
    x: &[&[f32; T]; R],
    decoded: &[[[f32; LANES]; P]; T],
) -> [[[S::V; P]; R]; 2] {
    let mut chains = [[[s.splat(0.0); P]; R]; 2];
    for i in 0..T / 2 {
        for (odd, chains) in chains.iter_mut().enumerate().take(TO).skip(FROM) {
            let k = 2 * i + odd;
            let mut w = [s.splat(0.0); P];
            for p in 0..P {
                w[p] = s.load(&decoded[k][p]);
            }
            for r in 0..R {
                let x = s.splat(x[r][k]);
                for p in 0..P {
                    chains[r][p] = flushed::<S, FLUSH>(s, A::fma(s, x, w[p], chains[r][p]));
                }
            }
        }
    }
    chains
}
