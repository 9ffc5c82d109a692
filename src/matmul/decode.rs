//! Few rows of x: weights are read once, decoded in registers and multiplied at once.
//!
//! Memory's limit: several panels are walked in step, each a stream of its own, so that more loads are in flight.
#![forbid(unsafe_code)]

use super::coding::Coding;
use super::layout::{GROUP, PackedLayout};
use super::tiles::{Tiles, add_scaled};
use crate::cpu::{Kernel, LANES, LINE, STEP, Simd};

/// Sums of rows of x with consecutive panels.
pub(super) struct Decode<'a, C> {
    pub(super) coding: C,
    pub(super) layout: PackedLayout,
    /// Packed bytes from the first panel on, and its index.
    pub(super) data: &'a [u8],
    pub(super) first_panel: usize,
    /// Rows of x, `stride` apart, each of [`Coding::power`] times its value.
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
        // Inline constants: what a tier does not take is not compiled for it.
        if const { S::DECODE_ROWS >= 2 } {
            match self.rows {
                1 => return self.rows::<S, 1>(s),
                2 => return self.rows::<S, 2>(s),
                _ => {}
            }
        }
        if const { S::DECODE_ROWS >= 4 } {
            match self.rows {
                3 => return self.rows::<S, 3>(s),
                4 => return self.rows::<S, 4>(s),
                _ => {}
            }
        }
        debug_assert!(false, "{} rows", self.rows);
    }
}

/// What one call of [`Decode::steps`] reads: consecutive steps of one group.
#[derive(Clone, Copy)]
struct Piece {
    /// Offset of the group in a panel, and of the codes in the group.
    group: usize,
    codes: usize,
    /// Its first step, counted in the group and from the panel's beginning, and how many there are.
    first: usize,
    step: usize,
    count: usize,
}

impl<C: Coding> Decode<'_, C> {
    #[inline(always)]
    fn rows<S: Simd, const R: usize>(self, s: S) {
        let Decode { layout, data, first_panel, tiles, streams, sums, part, .. } = self;
        let (panel_bytes, steps) = (layout.panel_bytes(), layout.steps());
        let mut x: [&[[f32; STEP]]; R] = [&[]; R];
        for (r, x) in x.iter_mut().enumerate() {
            *x = self.x[r * self.stride..].as_chunks().0;
        }
        for (set, sums) in sums.chunks_mut(streams * R).enumerate() {
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
                let piece = Piece {
                    group: group / GROUP * layout.group_bytes(),
                    codes: layout.scale_area(GROUP.min(steps - group)),
                    first: step - group,
                    step,
                    count: end - step,
                };
                // Each stream goes on with the panel that it walks next.
                let ahead = piece.group.saturating_add(self.prefetch);
                let ahead = if ahead < panel_bytes { ahead } else { ahead.saturating_add((streams - 1) * panel_bytes) };
                let mut panel = first;
                let mut rest = target;
                // So many chains side by side that they cover the latency of FMA.
                while const { S::DECODE_ROWS >= 4 && R == 1 } && rest.len() >= 4 * R {
                    let (four, others) = rest.split_at_mut(4 * R);
                    self::steps::<S, C, R, 4>(s, self.coding, piece, (data, panel, layout, ahead), &x, four);
                    (panel, rest) = (panel + 4, others);
                }
                while const { S::DECODE_ROWS >= 4 && R >= 2 } && rest.len() >= 2 * R {
                    let (two, others) = rest.split_at_mut(2 * R);
                    self::steps::<S, C, R, 2>(s, self.coding, piece, (data, panel, layout, ahead), &x, two);
                    (panel, rest) = (panel + 2, others);
                }
                for one in rest.chunks_exact_mut(R) {
                    self::steps::<S, C, R, 1>(s, self.coding, piece, (data, panel, layout, ahead), &x, one);
                    panel += 1;
                }
                if let Some(tiles) = &tiles
                    && tiles.ends(end, steps)
                {
                    let start = tiles.start(step);
                    for (p, (part, sums)) in part.chunks_exact(R).zip(sums.chunks_exact_mut(R)).enumerate() {
                        let of_panel = tiles.lanes(first_panel + first + p, start);
                        add_scaled(s, part, |r| tiles.row(r, start), &of_panel, sums);
                    }
                }
                step = end;
            }
        }
    }
}

/// `sums[p][r] += x[r] . panel p` over a piece, in the canonical order.
#[inline(always)]
fn steps<S: Simd, C: Coding, const R: usize, const P: usize>(
    s: S,
    coding: C,
    piece: Piece,
    (data, panel, layout, ahead): (&[u8], usize, PackedLayout, usize),
    x: &[&[[f32; STEP]]; R],
    sums: &mut [[f32; LANES]],
) {
    let (mut scales, mut lines): ([&[u8]; P], [&[[u8; LINE]]; P]) = ([&[]; P], [&[]; P]);
    let mut next = [data.as_ptr(); P];
    let mut acc = [[s.splat(0.0); R]; P];
    for p in 0..P {
        let start = (panel + p) * layout.panel_bytes();
        next[p] = data.as_ptr().wrapping_add(start.wrapping_add(ahead));
        let group = &data[start + piece.group..];
        scales[p] = &group[piece.first * C::SCALES..];
        lines[p] = &group[piece.codes + piece.first * C::LINES * LINE..].as_chunks().0[..piece.count * C::LINES];
        if C::SCALES > 0 && piece.first == 0 {
            s.prefetch(next[p]);
        }
        next[p] = next[p].wrapping_add(piece.codes + piece.first * C::LINES * LINE);
        for r in 0..R {
            acc[p][r] = s.load(&sums[p * R + r]);
        }
    }
    for step in 0..piece.count {
        let (mut even, mut odd) = ([[s.splat(0.0); R]; P], [[s.splat(0.0); R]; P]);
        let mut step_scales = [[s.splat(0.0); 2]; P];
        let mut step_lines: [&[[u8; LINE]]; P] = [&[]; P];
        let mut rows: [&[f32; STEP]; R] = [&[0.0; STEP]; R];
        for p in 0..P {
            let codes;
            (codes, scales[p]) = scales[p].split_at(C::SCALES);
            step_scales[p] = coding.scales(s, codes);
            (step_lines[p], lines[p]) = lines[p].split_at(C::LINES);
        }
        for r in 0..R {
            rows[r] = &x[r][piece.step + step];
        }
        for line in 0..C::LINES {
            for p in 0..P {
                s.prefetch(next[p]);
                next[p] = next[p].wrapping_add(LINE);
                let values = coding.line(s, &step_lines[p][line], line, &step_scales[p]);
                for i in 0..C::K / 2 {
                    for r in 0..R {
                        even[p][r] = s.fma(s.splat(rows[r][line * C::K + 2 * i]), values[2 * i], even[p][r]);
                        odd[p][r] = s.fma(s.splat(rows[r][line * C::K + 2 * i + 1]), values[2 * i + 1], odd[p][r]);
                    }
                }
            }
        }
        for p in 0..P {
            for r in 0..R {
                acc[p][r] = coding.add(s, s.add(even[p][r], odd[p][r]), acc[p][r], &step_scales[p]);
            }
        }
    }
    for p in 0..P {
        for r in 0..R {
            s.store(acc[p][r], &mut sums[p * R + r]);
        }
    }
}
