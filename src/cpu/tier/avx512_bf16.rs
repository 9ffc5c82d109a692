//! Pairs of bf16 in 512-bit registers.
#![allow(unsafe_code)] // intrinsics of features that the token proves

use super::PairKernel;
use super::avx512::Avx512;
use super::fp4::{self, FP4_UP, NV_NORMAL, Words};
use crate::cpu::isa::Bf16Token;
use crate::cpu::simd::{Fp8Bits, LANES, LINE, Pairs, Simd};
use std::arch::x86_64::*;

/// Compiles a kernel for AVX-512 with BF16 and VBMI.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
pub(super) fn run(token: Bf16Token, kernel: impl PairKernel) {
    kernel.run(Avx512::<true>::of(token));
}

/// Intrinsics that read and write registers only.
macro_rules! op {
    ($e:expr) => {
        // SAFETY: no intrinsic here touches memory, and its feature is one of those that `Bf16Token` proves: `self` was made of one.
        unsafe { $e }
    };
}

/// A constant of a register.
#[repr(align(64))]
struct Constant<T>(T);

static FP4: Constant<Words> = Constant(fp4::values(0));
static FP4_RAISED: Constant<Words> = Constant(fp4::values(FP4_UP));
static FP4_POWERS: Constant<Words> = Constant(fp4::powers());
static NV_SCALES: Constant<[Words; 3]> = Constant(fp4::scales());

/// Which bytes of a line of four k of FP8 codes make, unpacked with others, the pairs (0, 2) and (1, 3) of four columns: in each sixteen
/// bytes those of two columns and of two more, words of the low and of the high half in turn.
static FP8: Constant<[u8; LINE]> = {
    let (mut line, mut i) = ([0; LINE], 0);
    while i < LINE {
        let (column, odd) = (i / 4, i / 2 % 2);
        // The low half is of k 2 (and 3), which lie 32 bytes further.
        line[i] = (2 * column + odd + 32 * (1 - i % 2)) as u8;
        i += 1;
    }
    Constant(line)
};

/// VDPBF16PS. Not its intrinsic: LLVM orders many of those so that sums and broadcasts go through memory, at twice the time. These stay in the
/// order of the source: `pure`, which would free them, is left out for that.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn dot_pairs(a: __m512, b: __m512, mut c: __m512) -> __m512 {
    // SAFETY: two registers are read, one is read and written, and nothing else; the function is compiled for the feature.
    unsafe {
        std::arch::asm!(
            "vdpbf16ps {c}, {a}, {b}",
            a = in(zmm_reg) a,
            b = in(zmm_reg) b,
            c = inlateout(zmm_reg) c,
            options(nomem, nostack, preserves_flags),
        );
    }
    c
}

impl Pairs for Avx512<true> {
    #[inline(always)]
    fn fma_pairs(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the features are among those that `Bf16Token` proves: `self` was made of one.
        unsafe { dot_pairs(a, b, c) }
    }

    #[inline(always)]
    fn pair(self, high: __m512, low: __m512) -> __m512 {
        let low = op!(_mm512_srli_epi32::<16>(_mm512_castps_si512(low)));
        op!(_mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(high), low)))
    }

    #[inline(always)]
    fn splat_two(self, words: &[f32; 2]) -> __m512 {
        op!(_mm512_castpd_ps(_mm512_set1_pd(bytemuck::cast(*words))))
    }

    #[inline(always)]
    fn sorted(self, [a, b]: [__m512; 2]) -> [__m512; 2] {
        op!([_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xDD>(a, b)])
    }

    #[inline(always)]
    fn fp4_pairs(self, line: &[u8; LINE]) -> [[__m512; 2]; 2] {
        self.paired(self.looked_up(line, &FP4.0))
    }

    #[inline(always)]
    fn mxfp4_pairs(self, line: &[u8; LINE], scales: &[u8; LANES]) -> [[__m512; 2]; 2] {
        let up = op!(_mm512_set1_epi32(i32::from(FP4_UP) + 127));
        let scales = self.bytes(scales);
        let down = op!(_mm512_sub_epi32(up, scales));
        let down = op!(_mm512_or_si512(_mm512_slli_epi32::<7>(down), _mm512_slli_epi32::<23>(down)));
        let mut words = self.looked_up(line, &FP4_RAISED.0);
        for words in &mut words {
            *words = op!(_mm512_subs_epu16(*words, down));
        }
        self.paired(words)
    }

    #[inline(always)]
    fn nvfp4_pairs(self, line: &[u8; LINE], scales: &[[u8; LANES]; 2], block: usize) -> [[__m512; 2]; 2] {
        let (down, bit) = (self.subtracted(scales)[block], op!(_mm512_set1_epi16(1)));
        let mut words = self.looked_up(line, &FP4_POWERS.0);
        for words in &mut words {
            let down = op!(_mm512_mask_blend_epi16(_mm512_test_epi16_mask(*words, bit), down[0], down[1]));
            *words = op!(_mm512_subs_epu16(*words, down));
        }
        self.paired(words)
    }

    #[inline(always)]
    fn fp8_pairs(self, lines: &[[u8; LINE]; 2], bits: Fp8Bits) -> [[__m512; 2]; 2] {
        let order = self.words(&FP8.0);
        let [low, high] = bits.halves;
        let ([low, low_more], [high, high_more]) = (self.table(low), self.table(high));
        let sign = op!(_mm512_set1_epi8(i8::MIN));
        let mut pairs = [[self.splat(0.0); 2]; 2];
        for (pairs, line) in pairs.iter_mut().zip(lines) {
            let line = self.words(line);
            let codes = op!(_mm512_permutexvar_epi8(order, line));
            // The look-up reads seven bits of each index.
            let low = op!(_mm512_permutex2var_epi8(low, codes, low_more));
            let high = op!(_mm512_permutex2var_epi8(high, codes, high_more));
            // high | (codes & sign)
            let high = op!(_mm512_ternarylogic_epi32::<0xF8>(high, codes, sign));
            let (first, last) = op!((_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)));
            *pairs = op!([_mm512_castsi512_ps(first), _mm512_castsi512_ps(last)]);
        }
        pairs
    }

    #[inline(always)]
    fn bf16_pairs(self, [a, b, c, d]: &[[u8; LINE]; 4]) -> [[__m512; 2]; 2] {
        self.paired([self.words(a), self.words(b), self.words(c), self.words(d)])
    }

    #[inline(always)]
    fn scale_pairs(self, pairs: [[__m512; 2]; 2], scales: &[u8; LANES]) -> [[__m512; 2]; 2] {
        let scales = self.bytes(scales);
        let up = op!(_mm512_sub_epi32(scales, _mm512_set1_epi32(127)));
        let up = op!(_mm512_slli_epi32::<7>(up));
        let up = op!(_mm512_mask_blend_epi16(0xAAAA_AAAA, up, _mm512_slli_epi32::<16>(up)));
        let up = op!([_mm512_unpacklo_epi32(up, up), _mm512_unpackhi_epi32(up, up)]);
        let mut scaled = pairs;
        for pairs in &mut scaled {
            for (pair, up) in pairs.iter_mut().zip(up) {
                let words = op!(_mm512_castps_si512(*pair));
                let some = op!(_mm512_test_epi16_mask(words, _mm512_set1_epi16(i16::MAX)));
                *pair = op!(_mm512_castsi512_ps(_mm512_mask_add_epi16(words, some, words, up)));
            }
        }
        scaled
    }
}

impl Avx512<true> {
    /// bf16 of the E2M1 codes of a line by a table: words of k and k + 1 (high) for each column, ascending k.
    #[inline(always)]
    fn looked_up(self, line: &[u8; LINE], table: &Words) -> [__m512i; 4] {
        let (words, table) = (self.words(line), self.words(bytemuck::cast_ref(table)));
        // The permutation reads the low five bits of each index: no mask.
        op!([
            _mm512_permutexvar_epi16(words, table),
            _mm512_permutexvar_epi16(_mm512_srli_epi32::<4>(words), table),
            _mm512_permutexvar_epi16(_mm512_srli_epi32::<8>(words), table),
            _mm512_permutexvar_epi16(_mm512_srli_epi32::<12>(words), table),
        ])
    }

    /// Words of k and k + 1 as pairs of k and k + 2.
    #[inline(always)]
    fn paired(self, [a, b, c, d]: [__m512i; 4]) -> [[__m512; 2]; 2] {
        op!([
            [_mm512_castsi512_ps(_mm512_unpacklo_epi16(b, a)), _mm512_castsi512_ps(_mm512_unpackhi_epi16(b, a))],
            [_mm512_castsi512_ps(_mm512_unpacklo_epi16(d, c)), _mm512_castsi512_ps(_mm512_unpackhi_epi16(d, c))],
        ])
    }

    /// What is to be subtracted from elements of mantissa 1 and of mantissa 1.5, in both words of each column, of both blocks. Both blocks'
    /// scales are prepared at once, in words: normal ones are a subtraction away, the eight codes below come from tables.
    #[inline(always)]
    fn subtracted(self, scales: &[[u8; LANES]; 2]) -> [[__m512i; 2]; 2] {
        // Of four columns the words of one block and of the other in turn, so that unpacking makes double words of each block's.
        // SAFETY: 32 readable bytes; the load asks for no alignment. The feature: as `op`.
        let codes = unsafe { _mm256_loadu_si256(scales.as_ptr().cast()) };
        let turns = op!(_mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        let codes = op!(_mm512_cvtepu8_epi16(_mm256_permutevar8x32_epi32(codes, turns)));
        let below = op!(_mm512_testn_epi16_mask(codes, _mm512_set1_epi16(0x78)));
        let of_1 = op!(_mm512_sub_epi16(_mm512_set1_epi16(NV_NORMAL as i16), _mm512_slli_epi16::<4>(codes)));
        let [more, below_1, below_3] = bytemuck::cast_ref::<_, [[u8; LINE]; 3]>(&NV_SCALES.0);
        let (more, below_1, below_3) = (self.words(more), self.words(below_1), self.words(below_3));
        let more = op!(_mm512_add_epi16(of_1, _mm512_permutexvar_epi16(codes, more)));
        let of_1 = op!(_mm512_mask_permutexvar_epi16(of_1, below, codes, below_1));
        let of_3 = op!(_mm512_mask_permutexvar_epi16(more, below, codes, below_3));
        op!([
            [_mm512_unpacklo_epi16(of_1, of_1), _mm512_unpacklo_epi16(of_3, of_3)],
            [_mm512_unpackhi_epi16(of_1, of_1), _mm512_unpackhi_epi16(of_3, of_3)],
        ])
    }

    #[inline(always)]
    fn table(self, bytes: &[u8; 2 * LINE]) -> [__m512i; 2] {
        let halves = bytes.as_chunks().0;
        [self.words(&halves[0]), self.words(&halves[1])]
    }
}
