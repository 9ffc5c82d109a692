//! The one routine behind prefill, chunked prefill and decode: a block of queries and one kv head against all tokens they see.
#![forbid(unsafe_code)]

use super::softmax::{Accumulate, Finish, Merge, States, TileWeights, Weighting};
use super::source::{KvSource, read, smallest_of};
use super::spec::{AttentionSpec, Walk};
use crate::cpu::{LANES, PanelDot, Smallest, Tier, flush_free};
use crate::error::{Error, Result};
use crate::num::Real;
use crate::num::math::ln;
use crate::view::HeadsRef;

/// Rows (queries x heads of a group) that one block aims for: enough to share a decoded tile, few enough to stay in cache.
const BLOCK_ROWS: usize = 64;

/// What all items of a call share.
pub(super) struct Call<'a, T, S> {
    pub(super) tier: Tier,
    pub(super) spec: &'a AttentionSpec,
    pub(super) walk: Walk,
    pub(super) q: HeadsRef<'a, T>,
    pub(super) source: &'a S,
    /// `[num_qo_heads]`, or empty.
    pub(super) sinks: &'a [f32],
}

/// One piece of work: queries `first..first + queries` of a sequence, and one kv head.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Item {
    pub(super) seq: usize,
    /// Query within the sequence.
    pub(super) first: usize,
    pub(super) queries: usize,
    pub(super) kv_head: usize,
    /// Row of the sequence's first query in `q` and in the output.
    pub(super) row: usize,
    /// Queries of the sequence.
    pub(super) of: usize,
}

impl Item {
    /// Words an item is stored as.
    pub(super) const WORDS: usize = 6;

    pub(super) fn to_words(self) -> [usize; Self::WORDS] {
        [self.seq, self.first, self.queries, self.kv_head, self.row, self.of]
    }

    pub(super) fn from_words(words: &[usize]) -> Option<Self> {
        match *words {
            [seq, first, queries, kv_head, row, of] => Some(Item { seq, first, queries, kv_head, row, of }),
            _ => None,
        }
    }
}

/// Queries of a block.
pub(super) fn block_queries(spec: &AttentionSpec) -> usize {
    (BLOCK_ROWS / spec.group_size().max(1)).max(1)
}

/// Extents of one item's scratch memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extents {
    rows: usize,
    qk: usize,
    /// head_dim_vo, rounded up to lanes.
    vo: usize,
    tile: usize,
}

/// One item's scratch memory. After [`attend`] `acc` holds the outputs `[rows, vo]` and `lse` the log-sum-exps.
pub(super) struct Scratch<'a> {
    q: &'a mut [f32],
    /// Keys or values as rows.
    stage: &'a mut [f32],
    /// Keys as panels `[tile / LANES, qk, LANES]`.
    panels: &'a mut [f32],
    scores: &'a mut [f32],
    lanes: &'a mut [f32],
    corrections: &'a mut [f32],
    section: States<'a>,
    section_acc: &'a mut [f32],
    states: States<'a>,
    pub(super) acc: &'a mut [f32],
    pub(super) lse: &'a mut [f32],
}

impl Extents {
    pub(super) fn new(spec: &AttentionSpec, walk: Walk) -> Self {
        Extents {
            rows: block_queries(spec).saturating_mul(spec.group_size()),
            qk: spec.head_dim_qk,
            vo: spec.head_dim_vo.div_ceil(LANES).saturating_mul(LANES),
            tile: walk.tile,
        }
    }

    /// Elements of a row of `acc`.
    pub(super) fn width(&self) -> usize {
        self.vo
    }

    fn parts(&self) -> [(usize, usize); 13] {
        let Extents { rows, qk, vo, tile } = *self;
        let dots = [(rows, qk), (tile, qk.max(vo)), (tile, qk), (rows, tile), (rows, LANES), (rows, 1)];
        let [q, stage, panels, scores, lanes, row] = dots;
        [q, stage, panels, scores, lanes, row, row, row, (rows, vo), row, row, (rows, vo), row]
    }

    /// f32 elements of the scratch.
    pub(super) fn floats(&self) -> Result<usize> {
        let sum = self.parts().iter().try_fold(0usize, |sum, (a, b)| sum.checked_add(a.checked_mul(*b)?));
        sum.ok_or(Error::Overflow { operand: "attention scratch".into() })
    }

    /// Divides memory of [`Extents::floats`] elements; `None` if it is shorter.
    pub(super) fn split<'a>(&self, mut memory: &'a mut [f32]) -> Option<Scratch<'a>> {
        let mut next = |(a, b): (usize, usize)| {
            let (part, rest) = std::mem::take(&mut memory).split_at_mut_checked(a * b)?;
            memory = rest;
            Some(part)
        };
        let [q, stage, panels, scores, lanes, corrections, rest @ ..] = self.parts();
        let [section_max, section_sum, section_acc, max, sum, acc, lse] = rest;
        Some(Scratch {
            q: next(q)?,
            stage: next(stage)?,
            panels: next(panels)?,
            scores: next(scores)?,
            lanes: next(lanes)?,
            corrections: next(corrections)?,
            section: States { max: next(section_max)?, sum: next(section_sum)? },
            section_acc: next(section_acc)?,
            states: States { max: next(max)?, sum: next(sum)? },
            acc: next(acc)?,
            lse: next(lse)?,
        })
    }
}

impl<T: Real, S: KvSource> Call<'_, T, S> {
    /// Tokens that query `i` of the item sees.
    fn visible(&self, item: &Item, i: usize, len: usize) -> (usize, usize) {
        // Lengths fit i64: they are lengths of slices or checked by the page table.
        let position = len as i64 - item.of as i64 + (item.first + i) as i64;
        self.spec.visible(position, len)
    }

    /// Outputs and log-sum-exps of an item into its scratch.
    pub(super) fn attend(&self, item: &Item, extents: &Extents, scratch: &mut Scratch<'_>) {
        let group = self.spec.group_size();
        let rows = item.queries * group;
        let mut q_smallest = smallest_of::<T>();
        for (r, q) in scratch.q.chunks_exact_mut(extents.qk).take(rows).enumerate() {
            let head = item.kv_head * group + r % group;
            read(self.q.head(item.row + item.first + r / group, head).unwrap_or_default(), q);
            q_smallest.see(q);
        }

        let len = self.source.len(item.seq);
        // Later queries begin and end no earlier, so first and last bound what any sees.
        let lo = self.visible(item, 0, len).0;
        let hi = self.visible(item, item.queries - 1, len).1;
        scratch.states.reset();
        scratch.acc.fill(0.0);
        let Walk { tile, section } = self.walk;
        let mut section_at = lo / section * section;
        while section_at < hi {
            scratch.section.reset();
            scratch.section_acc.fill(0.0);
            let mut at = section_at.max(lo / tile * tile);
            while at < hi.min(section_at + section) {
                self.tile(item, extents, scratch, (at, (lo, hi), len), q_smallest);
                at += tile;
            }
            self.tier.run(Merge {
                states: scratch.states.rows(0..rows),
                acc: scratch.acc,
                section: scratch.section.rows(0..rows),
                section_acc: scratch.section_acc,
                width: extents.vo,
            });
            section_at += section;
        }
        self.finish(item, extents, scratch, len);
    }

    /// Takes the tile that starts at token `at` into the section's states.
    fn tile(
        &self,
        item: &Item,
        extents: &Extents,
        scratch: &mut Scratch<'_>,
        (at, (lo, hi), len): (usize, (usize, usize), usize),
        q_smallest: Smallest,
    ) {
        let Extents { qk, vo, tile, .. } = *extents;
        let group = self.spec.group_size();
        let (lo, hi) = (lo.max(at) - at, hi.min(at + tile) - at);
        let tokens = at + lo..at + hi;
        let inside = |i: usize| {
            let (lo, hi) = self.visible(item, i, len);
            (lo.clamp(at, at + tile) - at, hi.clamp(at, at + tile) - at)
        };

        let mut smallest = self.source.smallest();
        self.source.keys(item.seq, item.kv_head, tokens.clone(), scratch.stage);
        smallest.see(&scratch.stage[..(hi - lo) * qk]);
        let flush = !flush_free(q_smallest, smallest);
        // Queries that see any of the tile stand together.
        let Some(from) = (0..item.queries).find(|&i| inside(i).0 < inside(i).1) else { return };
        let to = (from..item.queries).find(|&i| inside(i).0 >= inside(i).1).unwrap_or(item.queries);
        for panel in lo / LANES..hi.div_ceil(LANES) {
            let keys = &mut scratch.panels[panel * LANES * qk..][..LANES * qk];
            transpose(&scratch.stage[..(hi - lo) * qk], lo, panel * LANES, qk, keys);
            let lanes = &mut scratch.lanes.as_chunks_mut::<LANES>().0[..(to - from) * group];
            lanes.fill([0.0; LANES]);
            let a = &scratch.q[from * group * qk..];
            let dot = PanelDot { a, a_stride: qk, b: keys, b_stride: LANES, k: (0, qk), flush };
            self.tier.panel_dot(dot, lanes);
            for (scores, lanes) in scratch.scores[from * group * tile..].chunks_exact_mut(tile).zip(lanes) {
                scores[panel * LANES..][..LANES].copy_from_slice(lanes);
            }
        }

        let mut smallest = self.source.smallest();
        scratch.stage[lo * vo..hi * vo].fill(0.0);
        self.source.values(item.seq, item.kv_head, tokens, vo, &mut scratch.stage[lo * vo..hi * vo]);
        smallest.see(&scratch.stage[lo * vo..hi * vo]);
        let round = self.source.rounds_weights();
        let mut weight = if round { Smallest::BF16 } else { Smallest::F32 };
        weight.see(&[SMALLEST_WEIGHT]);
        let flush = !flush_free(weight, smallest);
        let scale = self.spec.sm_scale * self.source.scales(item.kv_head).0;
        let how = Weighting { scale, cap: self.spec.logits_soft_cap, round };
        let mut i = from;
        while i < to {
            // Queries that see the same part of the tile go together.
            let visible = inside(i);
            let end = (i + 1..to).find(|&i| inside(i) != visible).unwrap_or(to);
            let rows = i * group..end * group;
            let scores = &mut scratch.scores[rows.start * tile..rows.end * tile];
            let states = scratch.section.rows(rows.clone());
            let corrections = &mut scratch.corrections[rows.clone()];
            self.tier.run(TileWeights { how, scores, tile, visible, states, corrections });
            for first in (0..vo).step_by(LANES) {
                let lanes = &mut scratch.lanes.as_chunks_mut::<LANES>().0[..rows.len()];
                lanes.fill([0.0; LANES]);
                let b = &scratch.stage[first..];
                let a = &scratch.scores[rows.start * tile..];
                self.tier.panel_dot(PanelDot { a, a_stride: tile, b, b_stride: vo, k: visible, flush }, lanes);
                let acc = &mut scratch.section_acc[rows.start * vo + first..];
                self.tier.run(Accumulate { acc, stride: vo, corrections: &scratch.corrections[rows.clone()], lanes });
            }
            i = end;
        }
    }

    /// Divides by the sums; rows that saw no token give 0 and -inf, sink or not.
    fn finish(&self, item: &Item, extents: &Extents, scratch: &mut Scratch<'_>, len: usize) {
        let group = self.spec.group_size();
        let rows = item.queries * group;
        for (lse, (max, sum)) in scratch.lse.iter_mut().zip(scratch.states.max.iter().zip(&*scratch.states.sum)) {
            let y = *max + ln(*sum);
            *lse = if y.is_nan() { f32::NAN } else { y };
        }
        let sinks = self.sinks.get(item.kv_head * group..(item.kv_head + 1) * group).unwrap_or_default();
        let v_scale = self.source.scales(item.kv_head).1;
        let states = scratch.states.rows(0..rows);
        self.tier.run(Finish { states, acc: scratch.acc, width: extents.vo, sinks, v_scale });
        for i in 0..item.queries {
            let (lo, hi) = self.visible(item, i, len);
            if lo >= hi {
                scratch.acc[i * group * extents.vo..(i + 1) * group * extents.vo].fill(0.0);
                scratch.lse[i * group..(i + 1) * group].fill(f32::NEG_INFINITY);
            }
        }
    }
}

/// A lower bound of the non-zero softmax weights: `exp(SOFTMAX_FLOOR)` is above it.
const SMALLEST_WEIGHT: f32 = f32::from_bits((127 - 60) << 23);

/// Rows of keys (the first is token `lo` of the tile) to the panel whose lanes are tokens `first..first + LANES` of the tile; a lane
/// without a row is zero.
fn transpose(rows: &[f32], lo: usize, first: usize, width: usize, panel: &mut [f32]) {
    for lane in 0..LANES {
        let row = (first + lane).checked_sub(lo).and_then(|r| rows.get(r * width..(r + 1) * width));
        for (d, to) in panel.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            to[lane] = row.map_or(0.0, |row| row[d]);
        }
    }
}
