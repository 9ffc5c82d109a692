//! Tables of bf16 words for E2M1 codes and their scales, for permutations of 32 words: five bits of an index count, so tables of sixteen
//! words stand twice, of eight four times.
//!
//! Powers of two are applied by integer subtraction: codes are first read as bf16 with an exponent field that is too large by a constant (so
//! that 15 bits hold every magnitude), zero as all zero bits; one saturating subtraction then takes that constant and the block's scale
//! off the exponent, and leaves zero zero.
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
#![forbid(unsafe_code)]

use crate::num::{F4E2M1x2, Fp8};

/// Words of a 512-bit register.
pub(super) type Words = [u16; 32];

/// MXFP4: exponent of 2 by which magnitudes are too large before the subtraction.
pub(super) const FP4_UP: u16 = 125;

/// NVFP4: bf16 bits that stand for 1.0 before the subtraction. Magnitudes, up to 4 times 1.0, stay below 0x8000, and those of scales times 1.5
/// below it.
pub(super) const NV_ONE: u16 = 0x7000;
/// [`NV_ONE`] less the bf16 of a normal scale is this less the scale's code, four bits higher: 0x3C00 is the bf16 of 1.0 less 0x38, the code
/// of 1.0, four bits higher.
pub(super) const NV_NORMAL: u16 = NV_ONE - 0x3C00;

/// bf16 of the E2M1 codes, exponents larger by `up`.
pub(super) const fn values(up: u16) -> Words {
    let (mut words, mut i) = ([0; 32], 0);
    while i < 32 {
        let bits = bf16_bits(F4E2M1x2::VALUES[i % 16]);
        if bits & 0x7FFF != 0 {
            words[i] = bits + (up << 7);
        }
        i += 1;
    }
    words
}

/// NVFP4: powers of two of the E2M1 codes, [`NV_ONE`] being 1.0, with signs. E2M1 has one bit of mantissa, bit 6 of a bf16: it becomes bit 0,
/// which no product needs.
pub(super) const fn powers() -> Words {
    let (mut words, mut i) = (values(0), 0);
    while i < 32 {
        if words[i] != 0 {
            words[i] = (words[i] & 0xFF80 | words[i] >> 6 & 1) + (NV_ONE - bf16_bits(1.0));
        }
        i += 1;
    }
    words
}

/// NVFP4: what is to be subtracted for an element of mantissa 1.5 more than for one of 1, by the mantissa of a normal scale; and, where
/// the scale is zero or subnormal, what is to be subtracted for 1 and for 1.5, by code.
pub(super) const fn scales() -> [Words; 3] {
    let (mut words, mut i) = ([[0; 32]; 3], 0);
    while i < 32 {
        let ([below_1, below_3], [of_1, of_3]) = (minus(i % 8), minus(8 + i % 8));
        (words[0][i], words[1][i], words[2][i]) = (of_3.wrapping_sub(of_1), below_1, below_3);
        i += 1;
    }
    words
}

/// What is to be subtracted for an E4M3FN scale from an element of mantissa 1 and of 1.5; all ones, more than there is, for a scale of 0.
const fn minus(code: usize) -> [u16; 2] {
    let scale = Fp8::E4M3Fn.values()[code];
    if scale == 0.0 { [u16::MAX; 2] } else { [NV_ONE - bf16_bits(scale), NV_ONE + 1 - bf16_bits(1.5 * scale)] }
}

/// bf16 bits of a number that bf16 holds.
pub(super) const fn bf16_bits(x: f32) -> u16 {
    (x.to_bits() >> 16) as u16
}
