//! Sixteen lanes in two 256-bit registers.
#![allow(unsafe_code)] // intrinsics of features that the token proves

use super::Kernel;
use crate::cpu::isa::Avx2Token;
use crate::cpu::knobs::{self, Registers};
use crate::cpu::simd::{Fp8Bits, LANES, LINE, Simd};
use std::arch::x86_64::*;

/// A machine with AVX2, FMA and F16C.
#[derive(Debug, Clone, Copy)]
pub(super) struct Avx2(#[allow(dead_code)] Avx2Token);

/// Compiles a kernel for AVX2.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn run(token: Avx2Token, kernel: impl Kernel) {
    kernel.run(Avx2(token));
}

/// One intrinsic that reads and writes registers only.
macro_rules! op {
    ($e:expr) => {
        // SAFETY: the intrinsic touches no memory and its feature is one of those that `Avx2Token` proves; `self` holds one.
        unsafe { $e }
    };
}

impl Simd for Avx2 {
    type V = [__m256; 2];
    type W = [__m256i; 2];

    const REGISTERS: Registers = knobs::AVX2;
    // Codes become bytes of twice their value, and those the highest bytes of integers.
    const FP4_POWER: i32 = 25;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        let x = op!(_mm256_set1_ps(x));
        [x, x]
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::V {
        let [a, b] = halves(x);
        // SAFETY: `a` is 32 readable bytes; the load asks for no alignment. The feature: as `op`.
        let a = unsafe { _mm256_loadu_ps(a.as_ptr()) };
        // SAFETY: as above.
        let b = unsafe { _mm256_loadu_ps(b.as_ptr()) };
        [a, b]
    }

    #[inline(always)]
    fn store(self, x: Self::V, to: &mut [f32; LANES]) {
        let (a, b) = to.split_at_mut(LANES / 2);
        // SAFETY: `a` is 32 writable bytes; the store asks for no alignment. The feature: as `op`.
        unsafe { _mm256_storeu_ps(a.as_mut_ptr(), x[0]) }
        // SAFETY: as above.
        unsafe { _mm256_storeu_ps(b.as_mut_ptr(), x[1]) }
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        [op!(_mm256_fmadd_ps(a[0], b[0], c[0])), op!(_mm256_fmadd_ps(a[1], b[1], c[1]))]
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        [op!(_mm256_add_ps(a[0], b[0])), op!(_mm256_add_ps(a[1], b[1]))]
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        [op!(_mm256_mul_ps(a[0], b[0])), op!(_mm256_mul_ps(a[1], b[1]))]
    }

    #[inline(always)]
    fn flush(self, x: Self::V) -> Self::V {
        [self.flush_half(x[0]), self.flush_half(x[1])]
    }

    #[inline(always)]
    fn words(self, line: &[u8; LINE]) -> Self::W {
        let [a, b] = halves(line);
        // SAFETY: `a` is 32 readable bytes; the load asks for no alignment. The feature: as `op`.
        let a = unsafe { _mm256_loadu_si256(a.as_ptr().cast()) };
        // SAFETY: as above.
        let b = unsafe { _mm256_loadu_si256(b.as_ptr().cast()) };
        [a, b]
    }

    #[inline(always)]
    fn store_words(self, words: Self::W, line: &mut [u8; LINE]) {
        let (a, b) = line.split_at_mut(LINE / 2);
        // SAFETY: `a` is 32 writable bytes; the store asks for no alignment. The feature: as `op`.
        unsafe { _mm256_storeu_si256(a.as_mut_ptr().cast(), words[0]) };
        // SAFETY: as above.
        unsafe { _mm256_storeu_si256(b.as_mut_ptr().cast(), words[1]) };
    }

    #[inline(always)]
    fn interleave(self, a: Self::W, b: Self::W) -> [Self::W; 2] {
        [self.interleave_half(a[0], b[0]), self.interleave_half(a[1], b[1])]
    }

    #[inline(always)]
    fn fp4<const SIGNED_ZERO: bool>(self, line: &[u8; LINE]) -> [Self::V; 8] {
        let [first, second] = self.words(line);
        let (a, b) = (self.fp4_half::<SIGNED_ZERO>(first), self.fp4_half::<SIGNED_ZERO>(second));
        let mut values = [[a[0], b[0]]; 8];
        for (value, (a, b)) in values.iter_mut().zip(a.into_iter().zip(b)) {
            *value = [a, b];
        }
        values
    }

    #[inline(always)]
    fn bf16(self, words: Self::W) -> [Self::V; 2] {
        let mask = op!(_mm256_set1_epi32(0xFFFF_0000u32 as i32));
        let low = [op!(_mm256_slli_epi32::<16>(words[0])), op!(_mm256_slli_epi32::<16>(words[1]))];
        let high = [op!(_mm256_and_si256(words[0], mask)), op!(_mm256_and_si256(words[1], mask))];
        [self.floats(low), self.floats(high)]
    }

    #[inline(always)]
    fn fp8(self, line: &[u8; LINE], bits: Fp8Bits) -> [Self::V; 4] {
        let [first, second] = self.words(line);
        let ([a, b], [c, d]) = (self.fp8_half(first, bits), self.fp8_half(second, bits));
        [a, b, c, d]
    }

    #[inline(always)]
    fn e8m0(self, codes: &[u8; LANES]) -> Self::V {
        let [a, b] = self.bytes(codes);
        self.floats([op!(_mm256_slli_epi32::<23>(a)), op!(_mm256_slli_epi32::<23>(b))])
    }

    #[inline(always)]
    fn e4m3(self, codes: &[u8; LANES]) -> Self::V {
        // SAFETY: `codes` is 16 readable bytes; the load asks for no alignment. The feature: as `op`.
        let codes = unsafe { _mm_loadu_si128(codes.as_ptr().cast()) };
        // As `Fp8Bits` has it, without a sign: an f16 of 2^-8 times the value.
        let halves = op!(_mm256_cvtepu8_epi16(codes));
        let halves = op!(_mm256_slli_epi16::<7>(halves));
        let up = self.splat(256.0);
        self.mul(self.f16(halves), up)
    }

    #[inline(always)]
    fn prefetch(self, data: *const u8) {
        // SAFETY: a prefetch is a hint that faults at no address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(data.cast()) }
    }
}

/// The two halves of a line of floats or bytes.
#[inline(always)]
fn halves<T>(x: &[T]) -> [&[T]; 2] {
    let (a, b) = x.split_at(x.len() / 2);
    [a, b]
}

impl Avx2 {
    #[inline(always)]
    fn floats(self, x: [__m256i; 2]) -> [__m256; 2] {
        [op!(_mm256_castsi256_ps(x[0])), op!(_mm256_castsi256_ps(x[1]))]
    }

    /// Sixteen bytes as words.
    #[inline(always)]
    fn bytes(self, bytes: &[u8; LANES]) -> [__m256i; 2] {
        // SAFETY: `bytes` is 16 readable bytes; the load asks for no alignment. The feature: as `op`.
        let bytes = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
        let high = op!(_mm_unpackhi_epi64(bytes, bytes));
        [op!(_mm256_cvtepu8_epi32(bytes)), op!(_mm256_cvtepu8_epi32(high))]
    }

    /// Sixteen f16 as f32.
    #[inline(always)]
    fn f16(self, x: __m256i) -> [__m256; 2] {
        let low = op!(_mm256_castsi256_si128(x));
        let high = op!(_mm256_extracti128_si256::<1>(x));
        [op!(_mm256_cvtph_ps(low)), op!(_mm256_cvtph_ps(high))]
    }

    #[inline(always)]
    fn interleave_half(self, a: __m256i, b: __m256i) -> [__m256i; 2] {
        // In each half of a register: words 0 and 1 of both, words 2 and 3 of both.
        let low = op!(_mm256_unpacklo_epi32(a, b));
        let high = op!(_mm256_unpackhi_epi32(a, b));
        let first = op!(_mm256_permute2x128_si256::<0x20>(low, high));
        [first, op!(_mm256_permute2x128_si256::<0x31>(low, high))]
    }

    #[inline(always)]
    fn flush_half(self, x: __m256) -> __m256 {
        let sign = op!(_mm256_set1_ps(-0.0));
        let magnitude = op!(_mm256_andnot_ps(sign, x));
        let smallest = op!(_mm256_set1_ps(f32::MIN_POSITIVE));
        let below = op!(_mm256_cmp_ps::<_CMP_LT_OQ>(magnitude, smallest));
        let cleared = op!(_mm256_andnot_ps(sign, below));
        op!(_mm256_andnot_ps(cleared, x))
    }

    /// Eight k of eight words.
    #[inline(always)]
    fn fp4_half<const SIGNED_ZERO: bool>(self, words: __m256i) -> [__m256; 8] {
        let table = op!(_mm256_setr_epi8(
            0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12, 0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6,
            -8, -12
        ));
        let mask = op!(_mm256_set1_epi8(15));
        let low = op!(_mm256_and_si256(words, mask));
        let high = op!(_mm256_srli_epi16::<4>(words));
        let high = op!(_mm256_and_si256(high, mask));
        let low = self.bytes_high(op!(_mm256_shuffle_epi8(table, low)));
        let high = self.bytes_high(op!(_mm256_shuffle_epi8(table, high)));
        // Bytes of a word are k 0 4 1 5, then 2 6 3 7.
        let mut values = [low[0], low[2], high[0], high[2], low[1], low[3], high[1], high[3]];
        if SIGNED_ZERO {
            // Integers have one zero: once more the sign, the highest bit of nibbles 0 4 1 5 2 6 3 7.
            let bit = op!(_mm256_set1_ps(-0.0));
            for (value, left) in values.iter_mut().zip([28, 12, 24, 8, 20, 4, 16, 0]) {
                let count = op!(_mm_cvtsi32_si128(left));
                let sign = op!(_mm256_sll_epi32(words, count));
                let sign = op!(_mm256_castsi256_ps(sign));
                let sign = op!(_mm256_and_ps(sign, bit));
                *value = op!(_mm256_or_ps(*value, sign));
            }
        }
        values
    }

    /// The four bytes of each word, signed, times 2^24.
    #[inline(always)]
    fn bytes_high(self, words: __m256i) -> [__m256; 4] {
        let zero = -1;
        let second = op!(_mm256_setr_epi8(
            zero, zero, zero, 1, zero, zero, zero, 5, zero, zero, zero, 9, zero, zero, zero, 13, zero, zero, zero, 1,
            zero, zero, zero, 5, zero, zero, zero, 9, zero, zero, zero, 13
        ));
        let third = op!(_mm256_setr_epi8(
            zero, zero, zero, 2, zero, zero, zero, 6, zero, zero, zero, 10, zero, zero, zero, 14, zero, zero, zero, 2,
            zero, zero, zero, 6, zero, zero, zero, 10, zero, zero, zero, 14
        ));
        let fourth = op!(_mm256_set1_epi32(0xFF00_0000u32 as i32));
        let first = op!(_mm256_slli_epi32::<24>(words));
        let second = op!(_mm256_shuffle_epi8(words, second));
        let third = op!(_mm256_shuffle_epi8(words, third));
        let fourth = op!(_mm256_and_si256(words, fourth));
        [
            op!(_mm256_cvtepi32_ps(first)),
            op!(_mm256_cvtepi32_ps(second)),
            op!(_mm256_cvtepi32_ps(third)),
            op!(_mm256_cvtepi32_ps(fourth)),
        ]
    }

    /// Two k of FP8 codes: the low and the high bytes of sixteen words.
    #[inline(always)]
    fn fp8_half(self, words: __m256i, bits: Fp8Bits) -> [[__m256; 2]; 2] {
        let shift = op!(_mm_cvtsi32_si128(bits.shift as i32));
        let mask = op!(_mm256_set1_epi16(bits.mask as i16));
        let low = op!(_mm256_slli_epi16::<8>(words));
        let low = op!(_mm256_sra_epi16(low, shift));
        let low = op!(_mm256_and_si256(low, mask));
        let high = op!(_mm256_sra_epi16(words, shift));
        let high = op!(_mm256_and_si256(high, mask));
        [self.f16(low), self.f16(high)]
    }
}
