//! What enters a chain at a time: one element as f32, or a pair of bf16. Both kernels are written once for the two.
#![forbid(unsafe_code)]

use super::coding::{Coding, MAX_K};
use crate::cpu::{LANES, LINE, Pairs, STEP, Simd};

/// Words of x, and of each lane of w, that a step is: elements, or pairs of them, of the even and the odd chain in turn.
pub(super) const SINGLES: usize = STEP;
pub(super) const PAIRS: usize = STEP / 2;

/// How words of both operands are multiplied.
pub(super) trait Terms<S: Simd> {
    /// The chain `acc` after these words.
    fn fma(s: S, x: S::V, w: S::V, acc: S::V) -> S::V;
}

/// How lines of packed codes become such words.
pub(super) trait Decoded<S: Simd, C: Coding>: Terms<S> {
    /// Lines that are decoded together, how many words they are, and how often they make a step.
    const LINES: usize;
    const WORDS: usize;
    const UNITS: usize;

    /// The words of the `i`-th lines of a step, the first [`Decoded::WORDS`]; but for what [`Coding::add`] does.
    fn unscaled(coding: C, s: S, lines: &[[u8; LINE]], i: usize, scales: &[[u8; LANES]]) -> [S::V; MAX_K];

    /// The same, code x block scale.
    fn values(coding: C, s: S, lines: &[[u8; LINE]], i: usize, scales: &[[u8; LANES]]) -> [S::V; MAX_K];
}

/// Elements as f32.
pub(super) struct Single;

impl<S: Simd> Terms<S> for Single {
    #[inline(always)]
    fn fma(s: S, x: S::V, w: S::V, acc: S::V) -> S::V {
        s.fma(x, w, acc)
    }
}

impl<S: Simd, C: Coding> Decoded<S, C> for Single {
    const LINES: usize = 1;
    const WORDS: usize = C::K;
    const UNITS: usize = C::LINES;

    #[inline(always)]
    fn unscaled(coding: C, s: S, lines: &[[u8; LINE]], i: usize, scales: &[[u8; LANES]]) -> [S::V; MAX_K] {
        coding.line(s, &lines[0], i, scales)
    }

    #[inline(always)]
    fn values(coding: C, s: S, lines: &[[u8; LINE]], i: usize, scales: &[[u8; LANES]]) -> [S::V; MAX_K] {
        coding.values(s, &lines[0], i, scales)
    }
}

/// Pairs of bf16: eight k are four words.
pub(super) struct Paired;

impl<S: Pairs> Terms<S> for Paired {
    #[inline(always)]
    fn fma(s: S, x: S::V, w: S::V, acc: S::V) -> S::V {
        s.fma_pairs(x, w, acc)
    }
}

impl<S: Pairs, C: Coding> Decoded<S, C> for Paired {
    const LINES: usize = C::LINES / 4;
    const WORDS: usize = 4;
    const UNITS: usize = 4;

    #[inline(always)]
    fn unscaled(coding: C, s: S, lines: &[[u8; LINE]], i: usize, scales: &[[u8; LANES]]) -> [S::V; MAX_K] {
        let [a, b, c, d] = coding.pairs(s, lines, i, scales);
        [a, b, c, d, a, b, c, d]
    }

    #[inline(always)]
    fn values(coding: C, s: S, lines: &[[u8; LINE]], i: usize, scales: &[[u8; LANES]]) -> [S::V; MAX_K] {
        let [a, b, c, d] = coding.paired_values(s, lines, i, scales);
        [a, b, c, d, a, b, c, d]
    }
}
