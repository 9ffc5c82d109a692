//! f32 scales that change along k: the sums between them are apart.
#![forbid(unsafe_code)]

use super::driver::Rows;
use super::operand::Activations;
use super::packed::{Outer, PackedMatrix};
use crate::cpu::{Kernel, LANES, STEP, Simd};

/// Scale tiles of a problem.
#[derive(Clone, Copy)]
pub(super) struct Tiles<'a> {
    /// Their k: a multiple of 32, or at least the matrix's.
    pub(super) k: usize,
    pub(super) x: &'a Activations<'a>,
    pub(super) w: &'a PackedMatrix,
    /// Row i is row `rows.source(first + i)` of x.
    pub(super) rows: Rows<'a>,
    pub(super) first: usize,
}

impl Tiles<'_> {
    /// First step past the tile of a step.
    #[inline(always)]
    pub(super) fn end(&self, step: usize) -> usize {
        (step * STEP / self.k + 1).saturating_mul(self.k).div_ceil(STEP)
    }

    #[inline(always)]
    pub(super) fn begins(&self, step: usize) -> bool {
        (step * STEP).is_multiple_of(self.k)
    }

    /// Whether a piece that ends at step `end` of `steps` ends its tile.
    #[inline(always)]
    pub(super) fn ends(&self, end: usize, steps: usize) -> bool {
        end == steps || self.begins(end)
    }

    /// First k of the tile of a step.
    #[inline(always)]
    pub(super) fn start(&self, step: usize) -> usize {
        step * STEP / self.k * self.k
    }

    /// Scale of row i of x in the tile from k = `start` on.
    #[inline(always)]
    pub(super) fn row(&self, i: usize, start: usize) -> f32 {
        if self.x.scale_tile().is_none() {
            return 1.0;
        }
        self.x.outer_scale(self.rows.source(self.first + i), start)
    }

    /// Scales of a panel's rows of w.
    #[inline(always)]
    pub(super) fn lanes(&self, panel: usize, start: usize) -> [f32; LANES] {
        let mut lanes = [1.0; LANES];
        if let Outer::Tiles { n, k, row, scales } = self.w.outer() {
            let (first, last) = (panel * LANES / n, ((panel + 1) * LANES).min(self.w.n()).saturating_sub(1) / n);
            if first == last {
                return [scales[first * row + start / k]; LANES];
            }
            for (l, lane) in lanes.iter_mut().enumerate() {
                let column = (panel * LANES + l).min(self.w.n() - 1);
                *lane = scales[column / n * row + start / k];
            }
        }
        lanes
    }
}

impl Tiles<'_> {
    /// [`Tiles::add_times`] with the scales of a panel.
    #[inline(always)]
    pub(super) fn add<S: Simd>(
        &self,
        s: S,
        (row, panel, start): (usize, usize, usize),
        part: &[[f32; LANES]],
        acc: &mut [[f32; LANES]],
    ) {
        self.add_times(s, (row, start), s.load(&self.lanes(panel, start)), part, acc);
    }

    /// `acc[i] = fma(part[i], scale of row (row + i) * of_panel, acc[i])` for the tile from k = `start` on, whose [`Tiles::lanes`] are
    /// `of_panel`: IEEE f32, nothing flushed.
    #[inline(always)]
    pub(super) fn add_times<S: Simd>(
        &self,
        s: S,
        (row, start): (usize, usize),
        of_panel: S::V,
        part: &[[f32; LANES]],
        acc: &mut [[f32; LANES]],
    ) {
        let sums = part.iter().zip(acc);
        if self.x.scale_tile().is_none() {
            // Times one: nothing to multiply, nothing to look up.
            for (part, acc) in sums {
                s.store(s.fma(s.load(part), of_panel, s.load(acc)), acc);
            }
            return;
        }
        for (i, (part, acc)) in sums.enumerate() {
            let scale = s.mul(s.splat(self.row(row + i, start)), of_panel);
            s.store(s.fma(s.load(part), scale, s.load(acc)), acc);
        }
    }
}

/// [`Tiles::add`] for a few panels, `[panel][row]`.
pub(super) struct AddScaled<'a> {
    pub(super) tiles: &'a Tiles<'a>,
    pub(super) panel: usize,
    /// First k of the tile.
    pub(super) start: usize,
    pub(super) rows: usize,
    pub(super) part: &'a [[f32; LANES]],
    pub(super) acc: &'a mut [[f32; LANES]],
}

impl Kernel for AddScaled<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let AddScaled { tiles, panel, start, rows, part, acc } = self;
        for (p, (part, acc)) in part.chunks_exact(rows).zip(acc.chunks_exact_mut(rows)).enumerate() {
            tiles.add(s, (0, panel + p, start), part, acc);
        }
    }
}
