//! What enters a chain at a time: one element as f32, or a pair of bf16. Both kernels are written once for the two.
#![forbid(unsafe_code)]

use super::coding::{Coding, MAX_K};
use crate::cpu::{LANES, LINE, Pairs, STEP, Simd};

/// Words of x, and of each lane of w, that a step is: elements, or pairs of them, of the even and the odd chain in turn.
pub(super) const SINGLES: usize = STEP;
pub(super) const PAIRS: usize = STEP / 2;

/// How words of both operands are multiplied.
pub(super) trait Terms<S: Simd> {
    /// Whether every sum can be looked at.
    const FLUSHES: bool;

    /// The chain `acc` after these words.
    fn fma(s: S, x: S::V, w: S::V, acc: S::V) -> S::V;
}

/// How lines of packed codes become such words.
pub(super) trait Reading<S: Simd, C: Coding>: Terms<S> {
    /// Lines that are decoded together, how many words they are, and how often they make a step.
    const LINES: usize;
    const WORDS: usize;
    const UNITS: usize;
    /// Most rows with which four units are written out: what they share is prepared once, but a compiler that orders the products itself
    /// may run out of registers.
    const UNROLLED_ROWS: usize;

    /// Words of the `i`-th lines of a step, the first [`Reading::WORDS`], but for what [`Coding::add`] does: of two chains in turn, each
    /// multiplied by [`Reading::x`] of the same index.
    fn unscaled(coding: C, s: S, lines: &[[u8; LINE]], i: usize, scales: &[[u8; LANES]]) -> [S::V; MAX_K];

    /// The word of x, of those of a step, that a word of [`Reading::unscaled`] is multiplied by.
    fn x<const T: usize>(s: S, words: &[f32; T], i: usize) -> S::V;

    /// The sum of the even and the odd chain, from the two chains.
    fn sum(s: S, chains: [S::V; 2]) -> S::V;

    /// Words of the `i`-th lines of a step, code x block scale, of the even and the odd chain in turn.
    fn values(coding: C, s: S, lines: &[[u8; LINE]], i: usize, scales: &[[u8; LANES]]) -> [S::V; MAX_K];
}

/// Elements as f32.
pub(super) struct Single;

impl<S: Simd> Terms<S> for Single {
    const FLUSHES: bool = true;

    #[inline(always)]
    fn fma(s: S, x: S::V, w: S::V, acc: S::V) -> S::V {
        s.fma(x, w, acc)
    }
}

impl<S: Simd, C: Coding> Reading<S, C> for Single {
    const LINES: usize = 1;
    const WORDS: usize = C::K;
    const UNITS: usize = C::LINES;
    // Two scales: NVFP4, whose units share more.
    const UNROLLED_ROWS: usize = if C::SCALES == 2 { 8 } else { 7 };

    #[inline(always)]
    fn unscaled(coding: C, s: S, lines: &[[u8; LINE]], i: usize, scales: &[[u8; LANES]]) -> [S::V; MAX_K] {
        coding.line(s, &lines[0], i, scales)
    }

    #[inline(always)]
    fn x<const T: usize>(s: S, words: &[f32; T], i: usize) -> S::V {
        s.splat(words[i])
    }

    #[inline(always)]
    fn sum(s: S, [even, odd]: [S::V; 2]) -> S::V {
        s.add(even, odd)
    }

    #[inline(always)]
    fn values(coding: C, s: S, lines: &[[u8; LINE]], i: usize, scales: &[[u8; LANES]]) -> [S::V; MAX_K] {
        coding.values(s, &lines[0], i, scales)
    }
}

/// Pairs of bf16: eight k are four words. Both chains of half of the columns are one chain of the decode kernel.
pub(super) struct Paired;

impl<S: Pairs> Terms<S> for Paired {
    // The one between the two links of a pair is not seen.
    const FLUSHES: bool = false;

    #[inline(always)]
    fn fma(s: S, x: S::V, w: S::V, acc: S::V) -> S::V {
        s.fma_pairs(x, w, acc)
    }
}

impl<S: Pairs, C: Coding> Reading<S, C> for Paired {
    const LINES: usize = C::LINES / 4;
    const WORDS: usize = 4;
    const UNITS: usize = 4;
    const UNROLLED_ROWS: usize = 8;

    #[inline(always)]
    fn unscaled(coding: C, s: S, lines: &[[u8; LINE]], i: usize, scales: &[[u8; LANES]]) -> [S::V; MAX_K] {
        let [[a, b], [c, d]] = coding.pairs(s, lines, i, scales);
        [a, b, c, d, a, b, c, d]
    }

    #[inline(always)]
    fn x<const T: usize>(s: S, words: &[f32; T], i: usize) -> S::V {
        s.splat_two(&words.as_chunks().0[i / 2])
    }

    #[inline(always)]
    fn sum(s: S, chains: [S::V; 2]) -> S::V {
        let [even, odd] = s.sorted(chains);
        s.add(even, odd)
    }

    #[inline(always)]
    fn values(coding: C, s: S, lines: &[[u8; LINE]], i: usize, scales: &[[u8; LANES]]) -> [S::V; MAX_K] {
        let [ab, cd] = coding.paired_values(s, lines, i, scales);
        let ([a, b], [c, d]) = (s.sorted(ab), s.sorted(cd));
        [a, b, c, d, a, b, c, d]
    }
}
