//! What algorithms need of a machine: sixteen f32 lanes, and the decoding of codes into them.
#![forbid(unsafe_code)]

use super::knobs::Registers;
use crate::num::Fp8;

/// Columns of a panel: outputs computed side by side, each in a lane of its own.
pub(crate) const LANES: usize = 16;

/// Elements along k after which the two chains are added to the accumulator: one MX block, one AMX tile row.
pub(crate) const STEP: usize = 32;

/// Bytes of a cache line: what codes are read in.
pub(crate) const LINE: usize = 64;

/// No tier's [`Simd::FP4_POWER`] is greater.
pub(crate) const FP4_HEADROOM: i32 = 25;

/// How the four FP8 elements sit in the bits of an f16: `code << 8`, shifted right with its sign by `shift`, is an f16 under
/// `mask` whose value is the code's times `2^-power`, subnormals included (an f16 has one or two exponent bits more). Infinities
/// and NaN of formats with fewer exponent bits are not: who packs sees them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fp8Bits {
    pub(crate) values: &'static [f32; 256],
    /// Low and high bytes of the bf16 of codes without a sign.
    pub(crate) halves: &'static [[u8; 128]; 2],
    pub(crate) shift: u32,
    pub(crate) mask: u16,
    pub(crate) power: i32,
}

impl Fp8Bits {
    pub(crate) fn of(element: Fp8) -> Fp8Bits {
        let format = element.format();
        let shift = 5 - format.exponent_bits();
        // The sign, and the exponent and mantissa bits below the copies of the sign.
        let mask = 0x8000 | ((0x7F00u32 >> shift) as u16 & (0x7FFF >> shift));
        Fp8Bits { values: element.values(), halves: halves(element), shift, mask, power: 15 - format.bias() }
    }
}

/// [`Fp8Bits::halves`].
fn halves(element: Fp8) -> &'static [[u8; 128]; 2] {
    const fn of(element: Fp8) -> [[u8; 128]; 2] {
        let (values, mut halves) = (element.values(), [[0; 128]; 2]);
        let mut code = 0;
        while code < 128 {
            let [_, _, low, high] = values[code].to_bits().to_le_bytes();
            (halves[0][code], halves[1][code]) = (low, high);
            code += 1;
        }
        halves
    }
    macro_rules! tables {
        ($($element:ident)*) => {
            match element {
                $(Fp8::$element => {
                    static HALVES: [[u8; 128]; 2] = of(Fp8::$element);
                    &HALVES
                })*
            }
        };
    }
    tables!(E4M3Fn E4M3Ieee E5M2 E3M4)
}

/// Sixteen f32 lanes of one machine. A value of the type is the proof that the machine has the instructions, so every method is
/// safe; all are `#[inline(always)]` and compiled with the features of the [`Kernel`](super::Kernel) entry they end up in.
pub(crate) trait Simd: Copy {
    /// Sixteen f32.
    type V: Copy;
    /// Sixteen u32.
    type W: Copy;

    /// What of a matmul it holds in registers.
    const REGISTERS: Registers;
    /// Power of two that values of [`Simd::fp4`] are multiplied by: at most [`FP4_HEADROOM`].
    const FP4_POWER: i32;

    fn splat(self, x: f32) -> Self::V;
    fn load(self, x: &[f32; LANES]) -> Self::V;
    fn store(self, x: Self::V, to: &mut [f32; LANES]);
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// Subnormals become zero of their sign; NaN stays.
    fn flush(self, x: Self::V) -> Self::V;

    /// Sixteen little-endian words.
    fn words(self, line: &[u8; LINE]) -> Self::W;
    /// The opposite.
    fn store_words(self, words: Self::W, line: &mut [u8; LINE]);
    /// Words of both in turn: `a0 b0 a1 b1 ... a7 b7` and `a8 b8 ... a15 b15`.
    fn interleave(self, a: Self::W, b: Self::W) -> [Self::W; 2];
    /// Values of the E2M1 codes in the nibbles of each little-endian word, times `2^FP4_POWER`, in the order of the packed layout:
    /// k 0 to 7 are the nibbles 0 4 1 5 2 6 3 7 from the lowest. -0 may become +0 unless `SIGNED_ZERO`: chains that nothing
    /// flushes to -0 do not show it.
    fn fp4<const SIGNED_ZERO: bool>(self, line: &[u8; LINE]) -> [Self::V; 8];
    /// Values of the bf16 in the low and in the high half of each word.
    fn bf16(self, words: Self::W) -> [Self::V; 2];
    /// Four k of FP8 codes, times `2^-power`: k `2 p + b` of lane l is byte `32 p + 2 l + b`.
    fn fp8(self, line: &[u8; LINE], bits: Fp8Bits) -> [Self::V; 4];
    /// Powers of two of E8M0 codes 1 to 254.
    fn e8m0(self, codes: &[u8; LANES]) -> Self::V;
    /// Values of E4M3FN codes 0 to 0x7E.
    fn e4m3(self, codes: &[u8; LANES]) -> Self::V;

    /// Asks for the cache line at `data + at` bytes; a hint, any address will do.
    fn prefetch(self, data: *const u8);
}

/// Machines that multiply bf16 in pairs: words of two, of which the high one comes first in a chain. A chain of even or odd k takes
/// two of its elements at once, so pairs are of k and k + 2: eight k in a row are the pairs (0, 2), (1, 3), (4, 6), (5, 7).
///
/// Decoded weights come as two times two registers: of pairs (0, 2) and (1, 3), then of the others; in each sixteen bytes of a register
/// an even and an odd chain of two columns, columns 0, 1, 4, 5, ... in the first, 2, 3, 6, 7, ... in the second.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub(crate) trait Pairs: Simd {
    /// `a.low * b.low + (a.high * b.high + c)`, each sum rounded once, subnormal elements being zeros. No product or sum is subnormal, and
    /// nothing infinite or NaN: with others it may be anything.
    fn fma_pairs(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// Two words in turn.
    fn splat_two(self, words: &[f32; 2]) -> Self::V;
    /// Sixteen columns of the even and of the odd chain, from two registers of both.
    fn sorted(self, mixed: [Self::V; 2]) -> [Self::V; 2];
    /// Pairs of f32 that bf16 holds.
    fn pair(self, high: Self::V, low: Self::V) -> Self::V;
    /// The values of [`Simd::fp4`], without a power of two: -0 may become +0.
    fn fp4_pairs(self, line: &[u8; LINE]) -> [[Self::V; 2]; 2];
    /// The same times E8M0 scales, where no product leaves bf16's normal range.
    fn mxfp4_pairs(self, line: &[u8; LINE], scales: &[u8; LANES]) -> [[Self::V; 2]; 2];
    /// The same times E4M3FN scales, codes 0 to 0x7E, of this one of two blocks.
    fn nvfp4_pairs(self, line: &[u8; LINE], scales: &[[u8; LANES]; 2], block: usize) -> [[Self::V; 2]; 2];
    /// FP8 codes in two lines, as [`Simd::fp8`] has them.
    fn fp8_pairs(self, lines: &[[u8; LINE]; 2], bits: Fp8Bits) -> [[Self::V; 2]; 2];
    /// bf16 in four lines, as [`Simd::bf16`] has them.
    fn bf16_pairs(self, lines: &[[u8; LINE]; 4]) -> [[Self::V; 2]; 2];
    /// Both of each pair times E8M0 scales, where no product leaves bf16's normal range.
    fn scale_pairs(self, pairs: [[Self::V; 2]; 2], scales: &[u8; LANES]) -> [[Self::V; 2]; 2];
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::f16;

    /// The claim of [`Fp8Bits`], for every code.
    #[test]
    fn fp8_codes_are_f16_bits() {
        for element in Fp8::ALL {
            let bits = Fp8Bits::of(element);
            for code in 0..=255u8 {
                let value = element.values()[usize::from(code)];
                let word = (i16::from_ne_bytes([0, code]) >> bits.shift) as u16 & bits.mask;
                let got = f16::from_bits(word).to_f32() * (bits.power as f32).exp2();
                assert!(
                    got.to_bits() == value.to_bits() || !value.is_finite(),
                    "{element:?} {code:#04x}: {got} {value}"
                );
            }
        }
    }
}
