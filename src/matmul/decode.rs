//! Few rows of x: weights are read once, decoded in registers and multiplied at once.
//!
//! Memory's limit: several panels are walked in step, each a stream of its own, so that more loads are in flight.
#![forbid(unsafe_code)]

use super::coding::Coding;
use super::layout::{GROUP, PackedLayout};
use super::terms::{PAIRS, Paired, Reading, SINGLES, Single};
use super::tiles::Tiles;
use crate::cpu::knobs::DECODE_ROWS_AT_ONCE;
use crate::cpu::{Kernel, LANES, LINE, PairKernel, Pairs, Simd};

/// Sums of rows of x with consecutive panels.
pub(super) struct Decode<'a, C> {
    pub(super) coding: C,
    pub(super) layout: PackedLayout,
    /// Packed bytes from the first panel on, and its index.
    pub(super) data: &'a [u8],
    pub(super) first_panel: usize,
    /// Rows of x, `stride` words apart: f32 of `2^`[`Coding::power`] times their values, or pairs.
    pub(super) x: &'a [f32],
    pub(super) stride: usize,
    pub(super) rows: usize,
    pub(super) tiles: Option<Tiles<'a>>,
    pub(super) streams: usize,
    pub(super) prefetch: usize,
    /// `[panel][rows]`.
    pub(super) sums: &'a mut [[f32; LANES]],
    /// `[streams][rows]`, used with tiles.
    pub(super) part: &'a mut [[f32; LANES]],
}

impl<C: Coding> Kernel for Decode<'_, C> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        self.run_as::<S, Single, SINGLES>(s);
    }
}

impl<C: Coding> PairKernel for Decode<'_, C> {
    #[inline(always)]
    fn run<S: Pairs>(self, s: S) {
        self.run_as::<S, Paired, PAIRS>(s);
    }
}

impl<C: Coding> Decode<'_, C> {
    /// With T words of x in a step.
    #[inline(always)]
    fn run_as<S: Simd, A: Reading<S, C>, const T: usize>(self, s: S) {
        const { assert!(T == A::UNITS * A::WORDS) };
        let Decode { coding, layout, data, first_panel, x, stride, rows, tiles, streams, prefetch, sums, part } = self;
        let (panel_bytes, steps) = (layout.panel_bytes(), layout.steps());
        for (set, sums) in sums.chunks_mut(streams * rows).enumerate() {
            let first = set * streams;
            sums.fill([0.0; LANES]);
            let mut step = 0;
            while step < steps {
                let group = step / GROUP * GROUP;
                let mut end = (group + GROUP).min(steps);
                let mut target = &mut *sums;
                if let Some(tiles) = &tiles {
                    end = end.min(tiles.end(step));
                    target = &mut part[..target.len()];
                    if tiles.begins(step) {
                        target.fill([0.0; LANES]);
                    }
                }
                let offset = group / GROUP * layout.group_bytes();
                // Each stream goes on with the panel that it walks next.
                let ahead = offset.saturating_add(prefetch);
                let ahead = if ahead < panel_bytes { ahead } else { ahead.saturating_add((streams - 1) * panel_bytes) };
                let codes = layout.scale_area(GROUP.min(steps - group));
                let (first_step, count) = (step - group, end - step);
                let piece =
                    Piece { coding, data, x, stride, rows, panel_bytes, offset, codes, first_step, step, count, ahead };
                piece.run::<S, A, T>(s, first, target);
                if let Some(tiles) = &tiles
                    && tiles.ends(end, steps)
                {
                    let start = tiles.start(step);
                    for (p, (part, sums)) in part.chunks_exact(rows).zip(sums.chunks_exact_mut(rows)).enumerate() {
                        tiles.add(s, (0, first_panel + first + p, start), part, sums);
                    }
                }
                step = end;
            }
        }
    }
}

/// Consecutive steps of one group of steps, of all panels and rows.
#[derive(Clone, Copy)]
struct Piece<'a, C> {
    coding: C,
    data: &'a [u8],
    x: &'a [f32],
    stride: usize,
    rows: usize,
    panel_bytes: usize,
    /// Offset of the group in a panel, and of the codes in the group.
    offset: usize,
    codes: usize,
    /// Its first step, counted in the group and from the panel's beginning, and how many there are.
    first_step: usize,
    step: usize,
    count: usize,
    /// Offset in a panel of what is to be prefetched.
    ahead: usize,
}

impl<C: Coding> Piece<'_, C> {
    /// `sums[p][r] += x[r] . panel (panel + p)`.
    #[inline(always)]
    fn run<S: Simd, A: Reading<S, C>, const T: usize>(self, s: S, panel: usize, sums: &mut [[f32; LANES]]) {
        // Groups of rows as equal as can be: their number is how often codes are decoded.
        let most = const {
            if S::REGISTERS.decode_rows < DECODE_ROWS_AT_ONCE { S::REGISTERS.decode_rows } else { DECODE_ROWS_AT_ONCE }
        };
        let group = self.rows.div_ceil(self.rows.div_ceil(most));
        for row in (0..self.rows).step_by(group) {
            // Inline constants: what a tier does not take is not compiled for it.
            macro_rules! rows {
                ($($r:literal)*) => {
                    match group.min(self.rows - row) {
                        $($r => if const { $r <= S::REGISTERS.decode_rows } { self.panels::<S, A, T, $r>(s, panel, row, sums) },)*
                        more => debug_assert!(false, "{more} rows"),
                    }
                };
            }
            rows!(1 2 3 4 5 6 7 8);
        }
    }

    #[inline(always)]
    fn panels<S: Simd, A: Reading<S, C>, const T: usize, const R: usize>(
        self,
        s: S,
        panel: usize,
        row: usize,
        sums: &mut [[f32; LANES]],
    ) {
        let panels = sums.len() / self.rows;
        let mut p = 0;
        while const { S::REGISTERS.decode_panels[R - 1] >= 4 && C::PANELS >= 4 } && panels - p >= 4 {
            self.steps::<S, A, T, R, 4>(s, panel + p, row, &mut sums[p * self.rows..]);
            p += 4;
        }
        while const { S::REGISTERS.decode_panels[R - 1] >= 2 } && panels - p >= 2 {
            self.steps::<S, A, T, R, 2>(s, panel + p, row, &mut sums[p * self.rows..]);
            p += 2;
        }
        while p < panels {
            self.steps::<S, A, T, R, 1>(s, panel + p, row, &mut sums[p * self.rows..]);
            p += 1;
        }
    }

    /// R rows by P panels, in the canonical order.
    #[inline(always)]
    fn steps<S: Simd, A: Reading<S, C>, const T: usize, const R: usize, const P: usize>(
        self,
        s: S,
        panel: usize,
        row: usize,
        sums: &mut [[f32; LANES]],
    ) {
        let mut scales: [&[[u8; LANES]]; P] = [&[]; P];
        let mut lines: [&[[u8; LINE]]; P] = [&[]; P];
        let mut next = [self.data.as_ptr(); P];
        let mut acc = [[s.splat(0.0); R]; P];
        for p in 0..P {
            let start = (panel + p) * self.panel_bytes;
            next[p] = self.data.as_ptr().wrapping_add(start.wrapping_add(self.ahead));
            let group = &self.data[start + self.offset..];
            scales[p] = &group.as_chunks().0[self.first_step * C::SCALES..];
            let first = self.codes + self.first_step * C::LINES * LINE;
            lines[p] = &group[first..].as_chunks().0[..self.count * C::LINES];
            if C::SCALES > 0 && self.first_step == 0 {
                s.prefetch(next[p]);
            }
            next[p] = next[p].wrapping_add(first);
            for r in 0..R {
                acc[p][r] = s.load(&sums[p * self.rows + row + r]);
            }
        }
        let mut x: [&[[f32; T]]; R] = [&[]; R];
        for (r, x) in x.iter_mut().enumerate() {
            *x = &self.x[(row + r) * self.stride + self.step * T..].as_chunks().0[..self.count];
        }
        for _ in 0..self.count {
            let mut step_scales: [&[[u8; LANES]]; P] = [&[]; P];
            let mut step_lines: [&[[u8; LINE]]; P] = [&[]; P];
            let mut rows: [&[f32; T]; R] = [&[0.0; T]; R];
            for p in 0..P {
                (step_scales[p], scales[p]) = scales[p].split_at(C::SCALES);
                (step_lines[p], lines[p]) = lines[p].split_at(C::LINES);
            }
            for r in 0..R {
                let (now, after) = x[r].split_at(1);
                (rows[r], x[r]) = (&now[0], after);
            }
            // Both chains together if there are registers for them.
            let [first, second] = if const { 2 * R * P <= S::REGISTERS.chains } {
                A::chains::<T, R, P, 0, 2>(s, self.coding, &rows, &step_lines, &step_scales, &mut next)
            } else {
                let [first, _] =
                    A::chains::<T, R, P, 0, 1>(s, self.coding, &rows, &step_lines, &step_scales, &mut next);
                let [_, second] =
                    A::chains::<T, R, P, 1, 2>(s, self.coding, &rows, &step_lines, &step_scales, &mut next);
                [first, second]
            };
            for p in 0..P {
                for r in 0..R {
                    acc[p][r] = self.coding.add(s, A::sum(s, [first[p][r], second[p][r]]), acc[p][r], step_scales[p]);
                }
            }
        }
        for p in 0..P {
            for r in 0..R {
                s.store(acc[p][r], &mut sums[p * self.rows + row + r]);
            }
        }
    }
}
