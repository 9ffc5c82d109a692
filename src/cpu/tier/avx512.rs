//! Sixteen lanes in one 512-bit register.
#![allow(unsafe_code)] // intrinsics of features that the token proves

use super::Kernel;
use crate::cpu::isa::{Avx512Token, Bf16Token};
use crate::cpu::knobs::{self, Registers};
use crate::cpu::simd::{Fp8Bits, LANES, LINE, Simd};
use std::arch::x86_64::*;

/// A machine with AVX-512, and with AVX-512 BF16 and VBMI if `BF16`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Avx512<const BF16: bool>(#[allow(dead_code)] Avx512Token);

/// Compiles a kernel for AVX-512.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) fn run(token: Avx512Token, kernel: impl Kernel) {
    kernel.run(Avx512::<false>(token));
}

impl Avx512<true> {
    pub(super) fn of(token: Bf16Token) -> Self {
        Avx512(token.avx512())
    }
}

/// One intrinsic that reads and writes registers only.
macro_rules! op {
    ($e:expr) => {
        // SAFETY: the intrinsic touches no memory and its feature is one of those that `Avx512Token` proves; `self` holds one.
        unsafe { $e }
    };
}

impl<const BF16: bool> Simd for Avx512<BF16> {
    type V = __m512;
    type W = __m512i;

    const REGISTERS: Registers = if BF16 { knobs::AVX512_BF16 } else { knobs::AVX512 };
    const FP4_POWER: i32 = 0;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        op!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> __m512 {
        // SAFETY: `x` is 64 readable bytes; the load asks for no alignment. The feature: as `op`.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, x: __m512, to: &mut [f32; LANES]) {
        // SAFETY: `to` is 64 writable bytes; the store asks for no alignment. The feature: as `op`.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), x) }
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        op!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn flush(self, x: __m512) -> __m512 {
        // Class 0x20: subnormal.
        let subnormal = op!(_mm512_fpclass_ps_mask::<0x20>(x));
        let sign = op!(_mm512_set1_ps(-0.0));
        op!(_mm512_mask_and_ps(x, subnormal, x, sign))
    }

    #[inline(always)]
    fn words(self, line: &[u8; LINE]) -> __m512i {
        // SAFETY: `line` is 64 readable bytes; the load asks for no alignment. The feature: as `op`.
        unsafe { _mm512_loadu_si512(line.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store_words(self, words: __m512i, line: &mut [u8; LINE]) {
        // SAFETY: `line` is 64 writable bytes; the store asks for no alignment. The feature: as `op`.
        unsafe { _mm512_storeu_si512(line.as_mut_ptr().cast(), words) }
    }

    #[inline(always)]
    fn interleave(self, a: __m512i, b: __m512i) -> [__m512i; 2] {
        let first = op!(_mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
        let last = op!(_mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
        [op!(_mm512_permutex2var_epi32(a, first, b)), op!(_mm512_permutex2var_epi32(a, last, b))]
    }

    #[inline(always)]
    fn fp4<const SIGNED_ZERO: bool>(self, line: &[u8; LINE]) -> [__m512; 8] {
        let words = self.words(line);
        [
            self.nibble::<0>(words),
            self.nibble::<16>(words),
            self.nibble::<4>(words),
            self.nibble::<20>(words),
            self.nibble::<8>(words),
            self.nibble::<24>(words),
            self.nibble::<12>(words),
            self.nibble::<28>(words),
        ]
    }

    #[inline(always)]
    fn bf16(self, words: __m512i) -> [__m512; 2] {
        let low = op!(_mm512_slli_epi32::<16>(words));
        let mask = op!(_mm512_set1_epi32(0xFFFF_0000u32 as i32));
        let high = op!(_mm512_and_si512(words, mask));
        [op!(_mm512_castsi512_ps(low)), op!(_mm512_castsi512_ps(high))]
    }

    #[inline(always)]
    fn fp8(self, line: &[u8; LINE], bits: Fp8Bits) -> [__m512; 4] {
        let words = self.words(line);
        let shift = op!(_mm512_set1_epi16(bits.shift as i16));
        let mask = op!(_mm512_set1_epi16(bits.mask as i16));
        let low = op!(_mm512_slli_epi16::<8>(words));
        let low = op!(_mm512_srav_epi16(low, shift));
        let low = op!(_mm512_and_si512(low, mask));
        let high = op!(_mm512_srav_epi16(words, shift));
        let high = op!(_mm512_and_si512(high, mask));
        let (low0, high0) = (op!(_mm512_castsi512_si256(low)), op!(_mm512_castsi512_si256(high)));
        let low1 = op!(_mm512_extracti64x4_epi64::<1>(low));
        let high1 = op!(_mm512_extracti64x4_epi64::<1>(high));
        [
            op!(_mm512_cvtph_ps(low0)),
            op!(_mm512_cvtph_ps(high0)),
            op!(_mm512_cvtph_ps(low1)),
            op!(_mm512_cvtph_ps(high1)),
        ]
    }

    #[inline(always)]
    fn e8m0(self, codes: &[u8; LANES]) -> __m512 {
        let exponents = op!(_mm512_slli_epi32::<23>(self.bytes(codes)));
        op!(_mm512_castsi512_ps(exponents))
    }

    #[inline(always)]
    fn e4m3(self, codes: &[u8; LANES]) -> __m512 {
        // As `Fp8Bits` has it, without a sign: an f16 of 2^-8 times the value.
        let halves = op!(_mm512_slli_epi32::<7>(self.bytes(codes)));
        let halves = op!(_mm512_cvtepi32_epi16(halves));
        let up = self.splat(256.0);
        let values = op!(_mm512_cvtph_ps(halves));
        self.mul(values, up)
    }

    #[inline(always)]
    fn prefetch(self, data: *const u8) {
        // SAFETY: a prefetch is a hint that faults at no address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(data.cast()) }
    }
}

impl<const BF16: bool> Avx512<BF16> {
    /// Value of the E2M1 code in bits `SHIFT..SHIFT + 4` of each word.
    #[inline(always)]
    fn nibble<const SHIFT: u32>(self, words: __m512i) -> __m512 {
        let table =
            op!(_mm512_setr_ps(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0));
        // The permutation reads the low four bits of each index: no mask.
        let index = op!(_mm512_srli_epi32::<SHIFT>(words));
        op!(_mm512_permutexvar_ps(index, table))
    }

    /// Sixteen bytes as words.
    #[inline(always)]
    pub(super) fn bytes(self, bytes: &[u8; LANES]) -> __m512i {
        // SAFETY: `bytes` is 16 readable bytes; the load asks for no alignment. The feature: as `op`.
        let bytes = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
        op!(_mm512_cvtepu8_epi32(bytes))
    }
}
