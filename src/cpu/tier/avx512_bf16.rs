//! Pairs of bf16 in 512-bit registers.
#![allow(unsafe_code)] // intrinsics of features that the token proves

use super::PairKernel;
use super::avx512::Avx512;
use crate::cpu::isa::Bf16Token;
use crate::cpu::simd::{Fp8Bits, LANES, LINE, Pairs, Simd};
use crate::num::F4E2M1x2;
use std::arch::x86_64::*;

/// Compiles a kernel for AVX-512 with BF16 and VBMI.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
pub(super) fn run(token: Bf16Token, kernel: impl PairKernel) {
    kernel.run(Avx512::<true>::of(token));
}

/// One intrinsic that reads and writes registers only.
macro_rules! op {
    ($e:expr) => {
        // SAFETY: the intrinsic touches no memory, and its feature is one of those that `Bf16Token` proves: `self` was made of one.
        unsafe { $e }
    };
}

/// A constant of a register.
#[repr(align(64))]
struct Line([u8; LINE]);

/// VPMULTISHIFTQB's offsets that bring the nibbles of four pairs, each to the low bits of its half of a word. What stands above them is
/// not looked at.
static NIBBLES: [Line; 4] = {
    // Low half, high half.
    const fn offsets(nibbles: [u8; 2]) -> Line {
        let (mut line, mut i) = ([0; LINE], 0);
        while i < LINE {
            line[i] = (nibbles[i / 2 % 2] + 8 * (i as u8 % 2) + 32 * (i as u8 / 4 % 2)) % 64;
            i += 1;
        }
        Line(line)
    }
    [offsets([4, 0]), offsets([20, 16]), offsets([12, 8]), offsets([28, 24])]
};

/// bf16 of the E2M1 codes; twice, because five bits of an index count.
static FP4: Line = fp4(0, false);

/// Exponent of 2 by which magnitudes are too large before a scale is subtracted.
const FP4_UP: u16 = 125;
/// [`FP4`] so much too large; zeros are all zero bits, from which nothing is subtracted.
static FP4_RAISED: Line = fp4(FP4_UP << 7, false);

/// NVFP4: bf16 bits that stand for 1.0 before the subtraction. Scales times 1.5 stay below, twice them fit 15 bits.
const NV_ONE: u16 = 0x7000;
/// Powers of two of the E2M1 codes, [`NV_ONE`] being 1.0; bit 0 where the mantissa is 1.5.
static FP4_POWERS: Line = fp4(NV_ONE - 0x3F80, true);

const fn fp4(up: u16, powers: bool) -> Line {
    let (mut line, mut i) = ([0; LINE], 0);
    while i < LINE / 2 {
        let bits = (F4E2M1x2::VALUES[i % 16].to_bits() >> 16) as u16;
        if bits & 0x7FFF != 0 {
            // E2M1 has one bit of mantissa, bit 6 of a bf16.
            let word = up + if powers { bits & 0xFF80 | bits >> 6 & 1 } else { bits };
            [line[2 * i], line[2 * i + 1]] = word.to_le_bytes();
        }
        i += 1;
    }
    Line(line)
}

/// Which bytes of a line of four k of FP8 codes make, unpacked with others, the pairs (0, 2) and (1, 3): in each sixteen bytes eight words
/// of the first pair, low half and high half in turn, and eight of the second.
static FP8: Line = {
    let (mut line, mut i) = ([0; LINE], 0);
    while i < LINE {
        let (word, second) = (i / 16 * 8 + i % 8, i / 8 % 2);
        // The low half is of k 2 (and 3), which lie 32 bytes further.
        line[i] = (2 * (word / 2) + second + 32 * (1 - word % 2)) as u8;
        i += 1;
    }
    Line(line)
};

impl Pairs for Avx512<true> {
    #[inline(always)]
    fn fma_pairs(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: a register of 64 bytes as another type of 64 bytes for which all bits are valid.
        let (a, b) =
            unsafe { (std::mem::transmute::<__m512, __m512bh>(a), std::mem::transmute::<__m512, __m512bh>(b)) };
        op!(_mm512_dpbf16_ps(c, a, b))
    }

    #[inline(always)]
    fn pair(self, high: __m512, low: __m512) -> __m512 {
        let low = op!(_mm512_srli_epi32::<16>(_mm512_castps_si512(low)));
        op!(_mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(high), low)))
    }

    #[inline(always)]
    fn fp4_pairs(self, line: &[u8; LINE]) -> [__m512; 4] {
        self.floats(self.looked_up(line, &FP4))
    }

    #[inline(always)]
    fn mxfp4_pairs(self, line: &[u8; LINE], scales: &[u8; LANES]) -> [__m512; 4] {
        let up = op!(_mm512_set1_epi32(i32::from(FP4_UP) + 127));
        let down = op!(_mm512_sub_epi32(up, self.bytes(scales)));
        let down = op!(_mm512_or_si512(_mm512_slli_epi32::<7>(down), _mm512_slli_epi32::<23>(down)));
        let mut pairs = self.looked_up(line, &FP4_RAISED);
        for pair in &mut pairs {
            *pair = op!(_mm512_subs_epu16(*pair, down));
        }
        self.floats(pairs)
    }

    #[inline(always)]
    fn nvfp4_pairs(self, line: &[u8; LINE], scales: &[u8; LANES]) -> [__m512; 4] {
        // What is to be subtracted from elements of mantissa 1 and of mantissa 1.5: for a scale of 0 more than there is.
        let scale = self.e4m3(scales);
        let down = |one: u16, scale: __m512| {
            let bits = op!(_mm512_srli_epi32::<16>(_mm512_castps_si512(scale)));
            let down = op!(_mm512_sub_epi32(_mm512_set1_epi32(i32::from(one)), bits));
            let zero = op!(_mm512_testn_epi32_mask(bits, bits));
            let down = op!(_mm512_mask_set1_epi32(down, zero, 0xFFFF));
            op!(_mm512_or_si512(_mm512_slli_epi32::<16>(down), down))
        };
        let (of_1, of_3) = (down(NV_ONE, scale), down(NV_ONE + 1, self.mul(scale, self.splat(1.5))));
        let bit = op!(_mm512_set1_epi16(1));
        let mut pairs = self.looked_up(line, &FP4_POWERS);
        for pair in &mut pairs {
            let down = op!(_mm512_mask_blend_epi16(_mm512_test_epi16_mask(*pair, bit), of_1, of_3));
            *pair = op!(_mm512_subs_epu16(*pair, down));
        }
        self.floats(pairs)
    }

    #[inline(always)]
    fn fp8_pairs(self, lines: &[[u8; LINE]; 2], bits: Fp8Bits) -> [__m512; 4] {
        let order = self.words(&FP8.0);
        let [low, high] = bits.halves;
        let table = |bytes: &[u8; 2 * LINE]| [self.words(&bytes.as_chunks().0[0]), self.words(&bytes.as_chunks().0[1])];
        let ([low, low_more], [high, high_more]) = (table(low), table(high));
        let sign = op!(_mm512_set1_epi8(i8::MIN));
        let mut pairs = [order; 4];
        for (pairs, line) in pairs.as_chunks_mut::<2>().0.iter_mut().zip(lines) {
            let codes = op!(_mm512_permutexvar_epi8(order, self.words(line)));
            // The look-up reads seven bits of each index.
            let low = op!(_mm512_permutex2var_epi8(low, codes, low_more));
            let high = op!(_mm512_permutex2var_epi8(high, codes, high_more));
            // high | (codes & sign)
            let high = op!(_mm512_ternarylogic_epi32::<0xF8>(high, codes, sign));
            *pairs = [op!(_mm512_unpacklo_epi8(low, high)), op!(_mm512_unpackhi_epi8(low, high))];
        }
        self.floats(pairs)
    }

    #[inline(always)]
    fn bf16_pairs(self, lines: &[[u8; LINE]; 4]) -> [__m512; 4] {
        let mut pairs = [self.words(&lines[0]); 4];
        for (pairs, [first, second]) in pairs.as_chunks_mut::<2>().0.iter_mut().zip(lines.as_chunks::<2>().0) {
            let (first, second) = (self.words(first), self.words(second));
            const HIGH: u32 = 0xAAAA_AAAA;
            *pairs = [
                op!(_mm512_mask_blend_epi16(HIGH, second, _mm512_slli_epi32::<16>(first))),
                op!(_mm512_mask_blend_epi16(HIGH, _mm512_srli_epi32::<16>(second), first)),
            ];
        }
        self.floats(pairs)
    }

    #[inline(always)]
    fn scale_pairs(self, mut pairs: [__m512; 4], scales: &[u8; LANES]) -> [__m512; 4] {
        let up = op!(_mm512_sub_epi32(self.bytes(scales), _mm512_set1_epi32(127)));
        let up = op!(_mm512_slli_epi32::<7>(up));
        let up = op!(_mm512_mask_blend_epi16(0xAAAA_AAAA, up, _mm512_slli_epi32::<16>(up)));
        for pair in &mut pairs {
            let words = op!(_mm512_castps_si512(*pair));
            let some = op!(_mm512_test_epi16_mask(words, _mm512_set1_epi16(i16::MAX)));
            *pair = op!(_mm512_castsi512_ps(_mm512_mask_add_epi16(words, some, words, up)));
        }
        pairs
    }
}

impl Avx512<true> {
    /// The pairs of a line of E2M1 codes by a table of words.
    #[inline(always)]
    fn looked_up(self, line: &[u8; LINE], table: &Line) -> [__m512i; 4] {
        let (words, table) = (self.words(line), self.words(&table.0));
        let mut pairs = [words; 4];
        for (pair, offsets) in pairs.iter_mut().zip(&NIBBLES) {
            let index = op!(_mm512_multishift_epi64_epi8(self.words(&offsets.0), words));
            *pair = op!(_mm512_permutexvar_epi16(index, table));
        }
        pairs
    }

    #[inline(always)]
    fn floats(self, [a, b, c, d]: [__m512i; 4]) -> [__m512; 4] {
        op!([_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), _mm512_castsi512_ps(c), _mm512_castsi512_ps(d)])
    }
}
