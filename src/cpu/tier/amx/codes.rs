//! Packed codes to tiles of bf16: what one step of a panel (32 k of 16 rows of w) looks like as the right operand of TDPBF16PS,
//! sixteen rows of sixteen pairs along k, and the instructions that make it.
//!
//! The macros are assembly, because a loop that uses tiles must be one `asm!` block (nothing may be assumed of tiles between two)
//! and decoding belongs in its middle. All take the same registers:
//!
//! | register | holds |
//! |---|---|
//! | rsi, rdi | codes and block scales of the step |
//! | r11 + `$out` | 1024 bytes for the tile |
//! | zmm26 to zmm31 | [`Constants`] |
//! | zmm16 to zmm23, k1, k2, ymm/xmm of the same | scratch |
//!
//! Powers of two are applied by integer subtraction: codes are first read as bf16 with an exponent field that is too large by a
//! constant (so that 15 bits hold every magnitude), zero as all zero bits; one saturating subtraction then takes that constant and
//! the block's scale off the exponent, and leaves zero zero.

use crate::num::{F4E2M1x2, Fp8};

/// How the codes of a packed matrix are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TileCode {
    /// E2M1 with an E8M0 scale for each 32.
    Mxfp4,
    /// E2M1 with an E4M3FN scale for each 16.
    Nvfp4,
    /// An FP8 format without block scales.
    Fp8(Fp8),
    /// An FP8 format with an E8M0 scale for each 32.
    Mxfp8(Fp8),
    /// bf16: the packed lines of a step are a tile.
    Bf16,
}

/// Sixteen words a table: contents of zmm26 to zmm31.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Constants(pub(super) [[u16; 32]; 6]);

/// A code and what its loops keep in registers: made once for many calls.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Coded {
    pub(super) code: TileCode,
    pub(super) constants: Constants,
}

impl Coded {
    pub(crate) fn new(code: TileCode) -> Coded {
        Coded { code, constants: code.constants() }
    }

    /// Whether the packed lines of a step are a tile, so that nothing is decoded.
    pub(crate) fn is_plain(&self) -> bool {
        self.code == TileCode::Bf16
    }
}

/// Exponent of 2 by which magnitudes of E2M1 codes are too large before the subtraction.
const FP4_UP: u16 = 125;
/// NVFP4: bf16 bits that stand for 1.0 before the subtraction. Scales times 1.5 stay below, twice them fit 15 bits.
const NV_ONE: u16 = 0x7000;

/// VPSHUFB's indices for the high byte of each word in its low byte; zero above.
const HIGH_BYTES: [u16; 32] = {
    let mut bytes = [0x8000; 32];
    let mut i = 0;
    while i < 32 {
        bytes[i] |= 2 * (i as u16 % 8) + 1;
        i += 1;
    }
    bytes
};

/// bf16 bits of a number that bf16 holds.
fn bf16_bits(x: f32) -> u16 {
    (x.to_bits() >> 16) as u16
}

impl TileCode {
    /// Bytes of codes and of block scales in a step.
    pub(super) fn step_bytes(self) -> (usize, usize) {
        match self {
            TileCode::Mxfp4 => (256, 16),
            TileCode::Nvfp4 => (256, 32),
            TileCode::Fp8(_) => (512, 0),
            TileCode::Mxfp8(_) => (512, 16),
            TileCode::Bf16 => (1024, 0),
        }
    }

    /// zmm26 to zmm31 for the macros below.
    fn constants(self) -> Constants {
        let mut c = [[0u16; 32]; 6];
        match self {
            TileCode::Bf16 => {}
            TileCode::Mxfp4 => {
                c[0] = words(u32::from(FP4_UP + 127));
                c[1] = HIGH_BYTES;
                c[5] = std::array::from_fn(|i| {
                    let value = F4E2M1x2::VALUES[i % 16];
                    if value == 0.0 { 0 } else { bf16_bits(value) + (FP4_UP << 7) }
                });
            }
            TileCode::Nvfp4 => {
                // An f16 of code << 7 is 2^-8 times the E4M3FN value.
                c[0] = words(256f32.to_bits());
                c[1] = words(384f32.to_bits());
                c[2] = [NV_ONE; 32];
                c[3] = [NV_ONE + 1; 32];
                c[4] = [1; 32];
                c[5] = std::array::from_fn(|i| {
                    let value = F4E2M1x2::VALUES[i % 16];
                    let (bits, sign) = (bf16_bits(value.abs()), bf16_bits(value) & 0x8000);
                    // Bit 6 of the mantissa tells 1.5 from 1; it becomes bit 0, which no product needs.
                    let power = bits & 0x7F80;
                    if bits == 0 { 0 } else { sign | (NV_ONE + power - bf16_bits(1.0) + (bits >> 6 & 1)) }
                });
            }
            TileCode::Fp8(format) | TileCode::Mxfp8(format) => {
                let (exponent_bits, bias) = (format.format().exponent_bits(), format.format().bias());
                let mantissa_bits = 7 - exponent_bits;
                // The exponent field of a normal code is its own below bits that are all ones.
                let ones = 0x7F80 & !(0x7F80u16 >> (8 - exponent_bits));
                let up = (ones >> 7) as i32 - (127 - bias);
                c[0] = match self {
                    TileCode::Mxfp8(_) => words((up + 127) as u32),
                    _ => [(up << 7) as u16; 32],
                };
                c[1] = [u16::from(0x7Fu8 >> mantissa_bits << mantissa_bits); 32];
                c[2] = [7 - mantissa_bits as u16; 32];
                c[3] = [ones; 32];
                c[4] = [0x8000 | 0x7F << (7 - mantissa_bits); 32];
                // Subnormals by the code turned left by one: mantissa above sign.
                c[5] = std::array::from_fn(|i| {
                    let value = format.values()[i >> 1 & ((1 << mantissa_bits) - 1)];
                    let bits = (i32::from(bf16_bits(value)) + (up << 7)) as u16;
                    if value == 0.0 { 0 } else { bits | (i as u16 & 1) << 15 }
                });
            }
        }
        Constants(c)
    }
}

/// A double word in every lane.
fn words(x: u32) -> [u16; 32] {
    std::array::from_fn(|i| (x >> (16 * (i % 2))) as u16)
}

/// E8M0 scales at rdi, as what is to be subtracted: zmm16, from the exponent's excess in zmm26.
macro_rules! e8m0_scales {
    () => {
        r"
        vpmovzxbd zmm16, xmmword ptr [rdi]
        vpsubd zmm16, zmm26, zmm16
        vpslld zmm17, zmm16, 7
        vpslld zmm16, zmm16, 23
        vpord zmm16, zmm16, zmm17
        "
    };
}

/// The permutation looks at the low bits of each word, so nothing is masked. One of the three shifts is a shuffle of bytes: shifts
/// and saturating subtractions of 512 bits share port 0, permutations have port 5.
macro_rules! mxfp4_tile {
    ($out:literal) => {
        concat!(
            $crate::cpu::tier::amx::codes::e8m0_scales!(),
            r"
            .irp line, 0, 1, 2, 3
            vmovdqu64 zmm17, zmmword ptr [rsi + 64 * \line]
            vpsrlw zmm18, zmm17, 4
            vpshufb zmm19, zmm17, zmm27
            vpsrlw zmm20, zmm17, 12
            vpermw zmm17, zmm17, zmm31
            vpermw zmm18, zmm18, zmm31
            vpermw zmm19, zmm19, zmm31
            vpermw zmm20, zmm20, zmm31
            vpsubusw zmm17, zmm17, zmm16
            vpsubusw zmm18, zmm18, zmm16
            vpsubusw zmm19, zmm19, zmm16
            vpsubusw zmm20, zmm20, zmm16
            vmovdqu64 zmmword ptr [r11 + ",
            $out,
            r" + 256 * \line], zmm17
            vmovdqu64 zmmword ptr [r11 + ",
            $out,
            r" + 256 * \line + 64], zmm18
            vmovdqu64 zmmword ptr [r11 + ",
            $out,
            r" + 256 * \line + 128], zmm19
            vmovdqu64 zmmword ptr [r11 + ",
            $out,
            r" + 256 * \line + 192], zmm20
            .endr
            "
        )
    };
}

/// Per block of 16 k: zmm20 is to be subtracted where the element's mantissa is 1, zmm21 where it is 1.5; all ones for scale 0.
macro_rules! nvfp4_tile {
    ($out:literal) => {
        concat!(
            r"
            .irp block, 0, 1
            vpmovzxbw ymm16, xmmword ptr [rdi + 16 * \block]
            vpsllw ymm16, ymm16, 7
            vcvtph2ps zmm16, ymm16
            vmulps zmm20, zmm16, zmm26
            vmulps zmm21, zmm16, zmm27
            vptestnmd k2, zmm16, zmm16
            vpsrld zmm18, zmm20, 16
            vpsrld zmm19, zmm21, 16
            vpord zmm20, zmm20, zmm18
            vpord zmm21, zmm21, zmm19
            vpsubw zmm20, zmm28, zmm20
            vpsubw zmm21, zmm29, zmm21
            vpternlogd zmm20 {{k2}}, zmm20, zmm20, 255
            vpternlogd zmm21 {{k2}}, zmm21, zmm21, 255
            .irp line, 0, 1
            vmovdqu64 zmm16, zmmword ptr [rsi + 128 * \block + 64 * \line]
            .irp shift, 0, 4, 8, 12
            .if \shift
            vpsrlw zmm17, zmm16, \shift
            vpermw zmm17, zmm17, zmm31
            .else
            vpermw zmm17, zmm16, zmm31
            .endif
            vptestmw k1, zmm17, zmm30
            vpblendmw zmm18 {{k1}}, zmm20, zmm21
            vpsubusw zmm18, zmm17, zmm18
            vmovdqu64 zmmword ptr [r11 + ",
            $out,
            r" + 512 * \block + 256 * \line + 16 * \shift], zmm18
            .endr
            .endr
            .endr
            "
        )
    };
}

/// Eight lines of FP8 codes; zmm16 is to be subtracted.
macro_rules! fp8_lines {
    ($out:literal) => {
        concat!(
            r"
            .irp row, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
            vpmovsxbw zmm17, ymmword ptr [rsi + 32 * \row]
            vpshldw zmm18, zmm17, zmm17, 1
            vptestnmw k1, zmm17, zmm27
            vpsllvw zmm17, zmm17, zmm28
            vpternlogd zmm17, zmm30, zmm29, 0xEA
            vpermw zmm17 {{k1}}, zmm18, zmm31
            vpsubusw zmm17, zmm17, zmm16
            vmovdqu64 zmmword ptr [r11 + ",
            $out,
            r" + 64 * \row], zmm17
            .endr
            "
        )
    };
}

macro_rules! fp8_tile {
    ($out:literal) => {
        concat!("vmovdqa64 zmm16, zmm26\n", $crate::cpu::tier::amx::codes::fp8_lines!($out))
    };
}

macro_rules! mxfp8_tile {
    ($out:literal) => {
        concat!($crate::cpu::tier::amx::codes::e8m0_scales!(), $crate::cpu::tier::amx::codes::fp8_lines!($out))
    };
}

pub(super) use {e8m0_scales, fp8_lines, fp8_tile, mxfp4_tile, mxfp8_tile, nvfp4_tile};
