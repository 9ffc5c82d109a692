//! Online softmax: states of rows, their update by a tile, their merge.
//!
//! Plain IEEE f32: only the two dot products flush subnormals. Order of every sum is fixed (docs/numerics.md).
#![forbid(unsafe_code)]

use crate::cpu::{Kernel, LANES, STEP, Simd};
use crate::num::math::{softmax_exp, tanh};
use std::ops::Range;

/// Softmax of the tokens seen so far by each row, apart from the accumulators.
pub(crate) struct States<'a> {
    /// Largest score; -inf before the first.
    pub(crate) max: &'a mut [f32],
    /// Sum of the weights `exp(score - max)`.
    pub(crate) sum: &'a mut [f32],
}

impl States<'_> {
    /// Back to no token seen.
    pub(crate) fn reset(&mut self) {
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
    }

    /// Some of the rows.
    pub(crate) fn rows(&mut self, rows: Range<usize>) -> States<'_> {
        States { max: &mut self.max[rows.clone()], sum: &mut self.sum[rows] }
    }

    #[inline(always)]
    fn iter_mut(&mut self) -> impl Iterator<Item = (&mut f32, &mut f32)> {
        self.max.iter_mut().zip(self.sum.iter_mut())
    }
}

/// The larger of two, the first on a tie. NaN never wins: it reaches the result through the sum of weights instead.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// What scores are measured from: the maximum, or 0 while there is none, so that a score of -inf weighs 0 and not NaN.
#[inline(always)]
fn base(max: f32) -> f32 {
    if max == f32::NEG_INFINITY { 0.0 } else { max }
}

/// How dots become weights.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Weighting {
    /// `sm_scale` times the scale of the keys.
    pub(crate) scale: f32,
    pub(crate) cap: Option<f32>,
    /// Whether weights are rounded to bf16 for the product with V.
    pub(crate) round: bool,
}

/// Turns the dots of a tile into weights, row by row, and takes them into each row's state.
pub(crate) struct TileWeights<'a> {
    pub(crate) how: Weighting,
    /// Dots `[rows, tile]`; weights on return, 0 where invisible.
    pub(crate) scores: &'a mut [f32],
    pub(crate) tile: usize,
    /// What these rows see of the tile, relative to it.
    pub(crate) visible: (usize, usize),
    pub(crate) states: States<'a>,
    /// Factor on what each row has accumulated before.
    pub(crate) corrections: &'a mut [f32],
}

impl Kernel for TileWeights<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        let rows = self.scores.chunks_exact_mut(self.tile).zip(self.corrections);
        for ((scores, correction), state) in rows.zip(self.states.iter_mut()) {
            *correction = row(self.how, scores, self.visible, state);
        }
    }
}

#[inline(always)]
fn row(how: Weighting, scores: &mut [f32], (lo, hi): (usize, usize), (max, sum): (&mut f32, &mut f32)) -> f32 {
    for s in &mut *scores {
        *s *= how.scale;
    }
    if let Some(cap) = how.cap {
        for s in &mut *scores {
            *s = cap * tanh(*s / cap);
        }
    }
    scores[..lo].fill(f32::NEG_INFINITY);
    scores[hi..].fill(f32::NEG_INFINITY);

    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in scores.as_chunks::<LANES>().0 {
        for (m, &s) in lanes.iter_mut().zip(chunk) {
            *m = larger(*m, s);
        }
    }
    let new_max = lanes.into_iter().fold(*max, larger);
    let base = base(new_max);
    let correction = softmax_exp(*max - base);
    for s in &mut *scores {
        *s = softmax_exp(*s - base);
    }
    *sum = sum.mul_add(correction, canonical_sum(scores));
    *max = new_max;
    if how.round {
        for s in &mut *scores {
            *s = round_weight(*s);
        }
    }
    correction
}

/// Sum in the order of the canonical dot: for each step of 32 an even and an odd chain, then `sum = sum + (even + odd)`.
#[inline(always)]
fn canonical_sum(weights: &[f32]) -> f32 {
    let mut sum = 0.0f32;
    for step in weights.as_chunks::<STEP>().0 {
        let (mut even, mut odd) = (0.0f32, 0.0f32);
        for [e, o] in step.as_chunks::<2>().0 {
            even += e;
            odd += o;
        }
        sum += even + odd;
    }
    sum
}

/// Nearest bf16, ties to even, of a weight: 0, at least 2^-60 and at most 1, or the NaN of `exp`.
#[inline(always)]
fn round_weight(w: f32) -> f32 {
    let bits = w.to_bits();
    f32::from_bits((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF_0000)
}

/// `acc[row, lanes] = acc x correction + lanes`, fused, for one group of lanes.
pub(crate) struct Accumulate<'a> {
    /// Accumulators, `stride` apart, from the group's first lane on.
    pub(crate) acc: &'a mut [f32],
    pub(crate) stride: usize,
    pub(crate) corrections: &'a [f32],
    pub(crate) lanes: &'a [[f32; LANES]],
}

impl Kernel for Accumulate<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let rows = self.acc.chunks_mut(self.stride);
        for ((acc, &correction), lanes) in rows.zip(self.corrections).zip(self.lanes) {
            for (a, &x) in acc.iter_mut().zip(lanes) {
                *a = a.mul_add(correction, x);
            }
        }
    }
}

/// Merges the states and accumulators of a section into those of the sections before it. A section in which a row saw nothing
/// leaves the row as it is.
pub(crate) struct Merge<'a> {
    pub(crate) states: States<'a>,
    pub(crate) acc: &'a mut [f32],
    pub(crate) section: States<'a>,
    pub(crate) section_acc: &'a [f32],
    /// Elements of a row's accumulator.
    pub(crate) width: usize,
}

impl Kernel for Merge<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        let accs = self.acc.chunks_exact_mut(self.width).zip(self.section_acc.chunks_exact(self.width));
        let states = self.states.iter_mut().zip(self.section.iter_mut());
        for (((max, sum), (section_max, section_sum)), (acc, section_acc)) in states.zip(accs) {
            let new_max = larger(*max, *section_max);
            let base = base(new_max);
            let (a, b) = (softmax_exp(*max - base), softmax_exp(*section_max - base));
            *sum = sum.mul_add(a, *section_sum * b);
            *max = new_max;
            for (x, &y) in acc.iter_mut().zip(section_acc) {
                *x = x.mul_add(a, y * b);
            }
        }
    }
}

/// Divides each row by its sum of weights, the sink's included: the output in place of the accumulator.
pub(crate) struct Finish<'a> {
    pub(crate) states: States<'a>,
    pub(crate) acc: &'a mut [f32],
    pub(crate) width: usize,
    /// One logit for each head; row r has head `r % sinks.len()`. Empty: none.
    pub(crate) sinks: &'a [f32],
    /// Scale of the values.
    pub(crate) v_scale: f32,
}

impl Kernel for Finish<'_> {
    #[inline(always)]
    fn run<S: Simd>(mut self, _: S) {
        let heads = self.sinks.len().max(1);
        let rows = self.states.iter_mut().zip(self.acc.chunks_exact_mut(self.width));
        for (r, ((max, sum), acc)) in rows.enumerate() {
            let factor = match self.sinks.get(r % heads) {
                None => 1.0 / *sum,
                Some(&sink) => {
                    let base = base(larger(*max, sink));
                    let a = softmax_exp(*max - base);
                    a / sum.mul_add(a, softmax_exp(sink - base))
                }
            };
            for x in acc {
                let y = *x * factor * self.v_scale;
                // A zero is +0, a NaN is the one NaN, whoever computed it.
                *x = if y.is_nan() { f32::NAN } else { y + 0.0 };
            }
        }
    }
}
