//! What enters a chain at a time: one element as f32, or a pair of bf16. Both kernels are written once for the two, but for the decode
//! kernel's innermost loop: how that is written decides what the compiler keeps in registers.
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

    /// Words of the `i`-th lines of a step, code x block scale, of the even and the odd chain in turn.
    fn values(coding: C, s: S, lines: &[[u8; LINE]], i: usize, scales: &[[u8; LANES]]) -> [S::V; MAX_K];

    /// Two chains of each row and panel over a step, those from `FROM` to `TO`, the other zero; but for what [`Coding::add`] does. Asks for
    /// the lines at `next` and moves on.
    fn chains<const T: usize, const R: usize, const P: usize, const FROM: usize, const TO: usize>(
        s: S,
        coding: C,
        x: &[&[f32; T]; R],
        lines: &[&[[u8; LINE]]; P],
        scales: &[&[[u8; LANES]]; P],
        next: &mut [*const u8; P],
    ) -> [[[S::V; R]; P]; 2];

    /// The sum of the even and the odd chain, from the two chains.
    fn sum(s: S, chains: [S::V; 2]) -> S::V;
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

    #[inline(always)]
    fn values(coding: C, s: S, lines: &[[u8; LINE]], i: usize, scales: &[[u8; LANES]]) -> [S::V; MAX_K] {
        coding.values(s, &lines[0], i, scales)
    }

    /// Even k, then odd.
    #[inline(always)]
    fn chains<const T: usize, const R: usize, const P: usize, const FROM: usize, const TO: usize>(
        s: S,
        coding: C,
        x: &[&[f32; T]; R],
        lines: &[&[[u8; LINE]]; P],
        scales: &[&[[u8; LANES]]; P],
        next: &mut [*const u8; P],
    ) -> [[[S::V; R]; P]; 2] {
        let mut chains = [[[s.splat(0.0); R]; P]; 2];
        // Written out: the chains of a loop that the compiler leaves a loop are in memory.
        macro_rules! panels {
            ($line:expr, $($p:literal)*) => {$(
                if const { $p < P } {
                    if const { FROM == 0 } {
                        s.prefetch(next[$p]);
                        next[$p] = next[$p].wrapping_add(LINE);
                    }
                    let values = coding.line(s, &lines[$p][$line], $line, scales[$p]);
                    for i in 0..C::K / 2 {
                        for odd in FROM..TO {
                            for r in 0..R {
                                let x = s.splat(x[r][$line * C::K + 2 * i + odd]);
                                chains[odd][$p][r] = s.fma(x, values[2 * i + odd], chains[odd][$p][r]);
                            }
                        }
                    }
                }
            )*};
        }
        // FP4 on AVX2, and NVFP4, whose lines share scales, are faster so, MXFP4 on AVX-512 is not (Zen 5).
        if const { C::LINES == 4 && R * P <= 4 && (C::SCALES == 2 || S::REGISTERS.chains <= 4) } {
            panels!(0, 0 1 2 3);
            panels!(1, 0 1 2 3);
            panels!(2, 0 1 2 3);
            panels!(3, 0 1 2 3);
            return chains;
        }
        for line in 0..C::LINES {
            panels!(line, 0 1 2 3);
        }
        chains
    }

    #[inline(always)]
    fn sum(s: S, [even, odd]: [S::V; 2]) -> S::V {
        s.add(even, odd)
    }
}

/// Pairs of bf16: eight k are four words.
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

    #[inline(always)]
    fn values(coding: C, s: S, lines: &[[u8; LINE]], i: usize, scales: &[[u8; LANES]]) -> [S::V; MAX_K] {
        let [ab, cd] = coding.paired_values(s, lines, i, scales);
        let ([a, b], [c, d]) = (s.sorted(ab), s.sorted(cd));
        [a, b, c, d, a, b, c, d]
    }

    /// Both chains of half of the columns, and of the others.
    #[inline(always)]
    fn chains<const T: usize, const R: usize, const P: usize, const FROM: usize, const TO: usize>(
        s: S,
        coding: C,
        x: &[&[f32; T]; R],
        lines: &[&[[u8; LINE]]; P],
        scales: &[&[[u8; LANES]]; P],
        next: &mut [*const u8; P],
    ) -> [[[S::V; R]; P]; 2] {
        let mut chains = [[[s.splat(0.0); R]; P]; 2];
        let of_unit = const { C::LINES / 4 };
        // All written out: the products stay in this order, and what units share is prepared once.
        macro_rules! panels {
            ($unit:literal, $($p:literal)*) => {$(
                if const { $p < P } {
                    for _ in 0..const { if FROM == 0 { C::LINES / 4 } else { 0 } } {
                        s.prefetch(next[$p]);
                        next[$p] = next[$p].wrapping_add(LINE);
                    }
                    let pairs = coding.pairs(s, &lines[$p][$unit * of_unit..], $unit, scales[$p]);
                    for (i, pairs) in pairs.iter().enumerate() {
                        for half in FROM..TO {
                            for r in 0..R {
                                let x = s.splat_two(&x[r].as_chunks().0[2 * $unit + i]);
                                chains[half][$p][r] = s.fma_pairs(x, pairs[half], chains[half][$p][r]);
                            }
                        }
                    }
                }
            )*};
        }
        panels!(0, 0 1 2 3);
        panels!(1, 0 1 2 3);
        panels!(2, 0 1 2 3);
        panels!(3, 0 1 2 3);
        chains
    }

    #[inline(always)]
    fn sum(s: S, chains: [S::V; 2]) -> S::V {
        let [even, odd] = s.sorted(chains);
        s.add(even, odd)
    }
}
