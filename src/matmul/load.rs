//! Rows of x to memory as bf16: in tiles, or in pairs.
#![forbid(unsafe_code)]

use super::driver::Rows;
use super::operand::Activations;
use crate::cpu::{Kernel, Range, STEP, Simd, Tier};
use half::bf16;

/// Steps from a tile of rows of x to the next. All tiles are walked in step, so they must not fall on the same sets of a cache, as they do
/// where k is a large power of two: neither in L2 nor, a few steps on, in L1. Those left out are room that rows of x in f32 have.
pub(super) fn pitch(steps: usize) -> usize {
    let apart = steps + (26 - steps % 16) % 16;
    if apart <= 2 * steps { apart } else { steps }
}

/// Loads rows of x to `[step][row][32]` bf16, zeros past k, with room for [`pitch`] steps: up to 16 as a tile, or one in the order of
/// [`Pairs`](crate::cpu::Pairs). Subnormals stay: the products read them as zeros.
pub(super) struct LoadBf16<'a> {
    pub(super) x: &'a Activations<'a>,
    pub(super) rows: Rows<'a>,
    pub(super) first: usize,
    pub(super) steps: usize,
    pub(super) pairs: bool,
    pub(super) out: &'a mut [u16],
    pub(super) range: &'a mut Range,
}

impl LoadBf16<'_> {
    pub(super) fn run(self, tier: Tier) {
        tier.run(self);
    }
}

impl Kernel for LoadBf16<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let LoadBf16 { x, rows, first, steps, pairs, out, range } = self;
        let height = out.len() / (pitch(steps) * STEP).max(1);
        let out = out.as_chunks_mut::<STEP>().0;
        let mut seen = Magnitudes::NONE;
        for row in 0..height {
            let source = rows.source(first + row);
            let places = out[row..steps * height].iter_mut().step_by(height);
            match x {
                Activations::Bf16(x) => {
                    let (whole, rest) = x.row(source).unwrap_or_default().as_chunks::<STEP>();
                    let mut last = [bf16::ZERO; STEP];
                    last[..rest.len()].copy_from_slice(rest);
                    for (to, x) in places.zip(whole.iter().chain([&last])) {
                        *to = ordered(pairs, seen.see(std::array::from_fn(|i| x[i].to_bits())));
                    }
                }
                Activations::Quantized(x) => {
                    for (step, to) in places.enumerate() {
                        let mut values = [0.0; STEP];
                        let valid = STEP.min(x.k() - step * STEP);
                        x.decode_from(source, step * STEP, &mut values[..valid]);
                        *to = ordered(pairs, seen.see(values.map(|v| (v.to_bits() >> 16) as u16)));
                    }
                }
                // Plans for others do not load bf16.
                _ => places.for_each(|to| *to = [0; STEP]),
            }
        }
        let value = |bits: u16| f32::from_bits(u32::from(bits) << 16);
        range.see(&seen.smallest.map(|s| value(if s < LEAST.wrapping_neg() { s + LEAST } else { 0 })));
        range.see(&seen.largest.map(|l| value(if l < LEAST { 0 } else { l })));
    }
}

/// A step as it is, or as words of k and k + 2, the first one high.
#[inline(always)]
fn ordered(pairs: bool, bits: [u16; STEP]) -> [u16; STEP] {
    if !pairs {
        return bits;
    }
    let mut words = [0; STEP];
    for (words, bits) in words.as_chunks_mut::<4>().0.iter_mut().zip(bits.as_chunks::<4>().0) {
        *words = [bits[2], bits[0], bits[3], bits[1]];
    }
    words
}

/// Bits of the least normal bf16.
const LEAST: u16 = 0x80;

/// The smallest (less [`LEAST`]) and largest magnitudes of normal bf16 bits, which order as the bits do.
struct Magnitudes {
    smallest: [u16; STEP],
    largest: [u16; STEP],
}

impl Magnitudes {
    const NONE: Magnitudes = Magnitudes { smallest: [u16::MAX; STEP], largest: [0; STEP] };

    #[inline(always)]
    fn see(&mut self, bits: [u16; STEP]) -> [u16; STEP] {
        for (bits, (smallest, largest)) in bits.iter().zip(self.smallest.iter_mut().zip(&mut self.largest)) {
            let magnitude = bits & 0x7FFF;
            // Zeros and subnormals wrap to the top.
            *smallest = (*smallest).min(magnitude.wrapping_sub(LEAST));
            *largest = (*largest).max(magnitude);
        }
        bits
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{Cpu, Smallest};
    use crate::view::MatRef;

    /// A tile of these rows, and what was seen of them.
    fn load(x: &[f32], m: usize) -> (Vec<u16>, Range) {
        load_as(x, m, false)
    }

    fn load_as(x: &[f32], m: usize, pairs: bool) -> (Vec<u16>, Range) {
        let (k, x): (_, Vec<bf16>) = (x.len() / m, x.iter().map(|v| bf16::from_f32(*v)).collect());
        let steps = k.div_ceil(STEP);
        let (mut out, mut range) = (vec![u16::MAX; m * steps * STEP], Range::new(Smallest::BF16));
        let x = &Activations::Bf16(MatRef::new(&x, m, k).unwrap());
        LoadBf16 { x, rows: Rows::Each, first: 0, steps, pairs, out: &mut out, range: &mut range }
            .run(Cpu::detect().tier());
        (out, range)
    }

    #[test]
    fn rows_become_tiles() {
        for (m, k) in [(1, 32), (3, 70), (16, 33), (5, 1), (2, 64)] {
            let x: Vec<f32> = (0..m * k).map(|i| (i % 200) as f32 - 20.0).collect();
            let tiles = load(&x, m).0;
            for (i, got) in tiles.iter().enumerate() {
                let (step, row, at) = (i / STEP / m, i / STEP % m, i % STEP);
                let want = if step * STEP + at < k { x[row * k + step * STEP + at] } else { 0.0 };
                assert_eq!(bf16::from_bits(*got).to_f32(), want, "{m} x {k}: {i}");
            }
        }
    }

    /// The high half of a word comes first in its chain, and chains take turns.
    #[test]
    fn rows_become_pairs() {
        for k in [1, 31, 32, 70, 128] {
            let x: Vec<f32> = (0..k).map(|i| (i % 200) as f32 - 20.0).collect();
            let (words, seen) = load_as(&x, 1, true);
            assert_eq!(seen, load(&x, 1).1);
            let at = |i: usize| x.get(i).copied().unwrap_or(0.0);
            for (i, halves) in words.as_chunks::<2>().0.iter().enumerate() {
                let first = 4 * (i / 2) + i % 2;
                let [low, high] = halves.map(|half| bf16::from_bits(half).to_f32());
                assert_eq!([high, low], [at(first), at(first + 2)], "k {k}, word {i}");
            }
        }
    }

    /// Zeros and subnormals, which the product reads as zeros, count as neither small nor large.
    #[test]
    fn magnitudes_are_seen() {
        let mut seen = Range::new(Smallest::BF16);
        let magnitudes = [f32::MIN_POSITIVE, -3.0, 0.25];
        for (small, others) in [(0.0, 0.0), (1e-39, -1e-39), (-0.0, 1e-40)] {
            let mut x = vec![small; 3 * 40];
            assert_eq!(load(&x, 3).1.smallest, Smallest::BF16, "{small}");
            for (i, magnitude) in magnitudes.iter().enumerate() {
                x[37 * (i + 1)] = *magnitude;
                x[i] = others;
            }
            seen = load(&x, 3).1;
            let mut want = Range::new(Smallest::BF16);
            want.see(&magnitudes);
            assert_eq!(seen, want, "{small}");
        }
        assert_eq!(seen.top(), 2);
        assert!(load(&[1.0, f32::INFINITY], 1).1.top() > 128 && load(&[f32::NAN; 40], 2).1.top() > 128);
        assert_eq!(load(&[f32::MIN_POSITIVE], 1).1.smallest.grid(), Some(-126 - 7));
    }
}
