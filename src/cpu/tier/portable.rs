//! Sixteen lanes in plain Rust.
#![forbid(unsafe_code)]

use crate::cpu::flush;
use crate::cpu::knobs::{self, Registers};
use crate::cpu::simd::{Fp8Bits, LANES, LINE, Simd};
use crate::num::{E8M0, F4E2M1x2, F8E4M3Fn};

/// Any machine.
#[derive(Debug, Clone, Copy)]
pub(super) struct Portable;

/// One lane at a time; a loop that the compiler turns into vector code where it can.
#[inline(always)]
fn each(mut f: impl FnMut(usize) -> f32) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    for (l, out) in out.iter_mut().enumerate() {
        *out = f(l);
    }
    out
}

impl Simd for Portable {
    type V = [f32; LANES];
    type W = [u32; LANES];

    const REGISTERS: Registers = knobs::PORTABLE;
    const FP4_POWER: i32 = 0;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::V {
        *x
    }

    #[inline(always)]
    fn store(self, x: Self::V, to: &mut [f32; LANES]) {
        *to = x;
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        each(|l| a[l].mul_add(b[l], c[l]))
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        each(|l| a[l] + b[l])
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        each(|l| a[l] * b[l])
    }

    #[inline(always)]
    fn flush(self, x: Self::V) -> Self::V {
        each(|l| flush(x[l]))
    }

    #[inline(always)]
    fn words(self, line: &[u8; LINE]) -> Self::W {
        let mut words = [0; LANES];
        for (word, bytes) in words.iter_mut().zip(line.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*bytes);
        }
        words
    }

    #[inline(always)]
    fn store_words(self, words: Self::W, line: &mut [u8; LINE]) {
        for (to, word) in line.as_chunks_mut().0.iter_mut().zip(words) {
            *to = word.to_le_bytes();
        }
    }

    #[inline(always)]
    fn interleave(self, a: Self::W, b: Self::W) -> [Self::W; 2] {
        let mut words = [[[0; 2]; LANES / 2]; 2];
        for (pair, (a, b)) in words.as_flattened_mut().iter_mut().zip(a.into_iter().zip(b)) {
            *pair = [a, b];
        }
        bytemuck::cast(words)
    }

    #[inline(always)]
    fn fp4<const SIGNED_ZERO: bool>(self, line: &[u8; LINE]) -> [Self::V; 8] {
        let words = self.words(line);
        [0, 16, 4, 20, 8, 24, 12, 28].map(|shift| each(|l| F4E2M1x2::VALUES[(words[l] >> shift & 15) as usize]))
    }

    #[inline(always)]
    fn bf16(self, words: Self::W) -> [Self::V; 2] {
        [each(|l| f32::from_bits(words[l] << 16)), each(|l| f32::from_bits(words[l] & 0xFFFF_0000))]
    }

    #[inline(always)]
    fn fp8(self, line: &[u8; LINE], bits: Fp8Bits) -> [Self::V; 4] {
        // A table is simpler than the bits of an f16 where there is no instruction that reads one.
        let down = f32::from_bits(((127 - bits.power) as u32) << 23);
        let pair = |k: usize| each(|l| bits.values[usize::from(line[32 * (k / 2) + 2 * l + k % 2])] * down);
        [pair(0), pair(1), pair(2), pair(3)]
    }

    #[inline(always)]
    fn e8m0(self, codes: &[u8; LANES]) -> Self::V {
        each(|l| E8M0::from_bits(codes[l]).to_f32())
    }

    #[inline(always)]
    fn e4m3(self, codes: &[u8; LANES]) -> Self::V {
        each(|l| F8E4M3Fn::from_bits(codes[l]).to_f32())
    }

    #[inline(always)]
    fn prefetch(self, _: *const u8) {}
}
