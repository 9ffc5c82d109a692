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
//! | zmm24 to zmm31 | [`Constants`] |
//! | zmm16 to zmm23, k1, k2, ymm/xmm of the same | scratch |
//!
//! Powers of two are applied by integer subtraction (`cpu::tier::fp4`), but for plain FP8.

use crate::cpu::tier::fp4::{self, FP4_UP, NV_NORMAL, bf16_bits};
use crate::num::Fp8;

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

/// Contents of zmm24 to zmm31; tables of sixteen words stand twice, because five bits of an index count.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Constants([[u16; 32]; 8]);

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

/// VPMULTISHIFTQB's offsets that move every word down by so many bits; what a word's low four bits do not need comes round.
fn down(bits: u16) -> [u16; 32] {
    std::array::from_fn(|word| {
        let of_byte = |byte: u16| (16 * (word as u16 % 4) + 8 * byte + bits) % 64;
        of_byte(0) | of_byte(1) << 8
    })
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

    /// zmm24 to zmm31 for the macros below.
    fn constants(self) -> Constants {
        let mut c = [[0u16; 32]; 8];
        match self {
            TileCode::Bf16 => {}
            TileCode::Mxfp4 => {
                c[2] = words(u32::from(FP4_UP + 127));
                [c[3], c[4], c[5]] = [down(4), down(8), down(12)];
                c[7] = fp4::values(FP4_UP);
            }
            TileCode::Nvfp4 => {
                // Words of both blocks, of four columns in turn, so that unpacking makes double words of each block's.
                let turns = [0u32, 4, 1, 5, 2, 6, 3, 7];
                c[0] = std::array::from_fn(|i| if i % 2 == 0 { turns[i / 2 % 8] as u16 } else { 0 });
                let [more, below_1, below_3] = fp4::scales();
                c[1] = more;
                c[2] = [NV_NORMAL; 32];
                c[3] = [0x78; 32];
                c[4] = below_1;
                c[5] = below_3;
                c[6] = [1; 32];
                c[7] = fp4::powers();
            }
            TileCode::Fp8(format) | TileCode::Mxfp8(format) => {
                let (exponent_bits, bias) = (format.format().exponent_bits(), format.format().bias());
                let mantissa_bits = 7 - exponent_bits;
                let shift = 7 - mantissa_bits;
                c[3] = [u16::from(0x7Fu8 >> mantissa_bits << mantissa_bits); 32];
                c[4] = [shift as u16; 32];
                c[6] = [0x8000 | 0x7F << shift; 32];
                // A subnormal code's mantissa is its value's place in these tables.
                let value = |mantissa: usize| format.values()[mantissa % (1 << mantissa_bits)];
                if let TileCode::Fp8(_) = self {
                    // What is added to a code in its place: to a normal one the difference of biases, to others what makes them bf16.
                    c[2] = [((127 - bias) << 7) as u16; 32];
                    c[7] = std::array::from_fn(|i| bf16_bits(value(i)).wrapping_sub((i << shift) as u16));
                } else {
                    // The exponent field of a normal code is its own below bits that are all ones.
                    let ones = 0x7F80 & !(0x7F80u16 >> (8 - exponent_bits));
                    let up = (ones >> 7) as i32 - (127 - bias);
                    c[2] = words((up + 127) as u32);
                    c[5] = [ones; 32];
                    // By the code turned left by one: mantissa above sign.
                    c[7] = std::array::from_fn(|i| {
                        let bits = (i32::from(bf16_bits(value(i >> 1))) + (up << 7)) as u16;
                        if value(i >> 1) == 0.0 { 0 } else { bits | (i as u16 & 1) << 15 }
                    });
                }
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

/// The permutation looks at the low bits of each word, so nothing is masked. Words are moved by multishifts, of port 5: port 0 has
/// the subtractions and, by LLVM's model, half of each permutation.
macro_rules! mxfp4_tile {
    ($out:literal) => {
        concat!(
            $crate::cpu::tier::amx::codes::e8m0_scales!(),
            r"
            .irp line, 0, 1, 2, 3
            vmovdqu64 zmm17, zmmword ptr [rsi + 64 * \line]
            vpmultishiftqb zmm18, zmm27, zmm17
            vpmultishiftqb zmm19, zmm28, zmm17
            vpmultishiftqb zmm20, zmm29, zmm17
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

/// What is to be subtracted where the element's mantissa is 1 and where it is 1.5: zmm20 and zmm21 in the first block of 16 k, zmm22
/// and zmm23 in the second; all ones for scale 0. Both blocks' scales are prepared at once, in words. Normal ones are a subtraction
/// away, the eight codes below come from tables.
macro_rules! nvfp4_tile {
    ($out:literal) => {
        concat!(
            r"
            vpermd ymm16, ymm24, ymmword ptr [rdi]
            vpmovzxbw zmm16, ymm16
            vptestnmw k2, zmm16, zmm27
            vpsllw zmm17, zmm16, 4
            vpsubw zmm17, zmm26, zmm17
            vpermw zmm18, zmm16, zmm25
            vpermw zmm17 {{k2}}, zmm16, zmm28
            vpaddw zmm18, zmm17, zmm18
            vpermw zmm18 {{k2}}, zmm16, zmm29
            vpunpcklwd zmm20, zmm17, zmm17
            vpunpcklwd zmm21, zmm18, zmm18
            vpunpckhwd zmm22, zmm17, zmm17
            vpunpckhwd zmm23, zmm18, zmm18
            ",
            $crate::cpu::tier::amx::codes::nvfp4_lines!($out, "0, 1", "zmm20", "zmm21"),
            $crate::cpu::tier::amx::codes::nvfp4_lines!($out, "2, 3", "zmm22", "zmm23"),
        )
    };
}

/// The lines of a block.
macro_rules! nvfp4_lines {
    ($out:literal, $lines:literal, $of_1:literal, $of_3:literal) => {
        concat!(
            ".irp line, ",
            $lines,
            r"
            vmovdqu64 zmm16, zmmword ptr [rsi + 64 * \line]
            .irp shift, 0, 4, 8, 12
            .if \shift
            vpsrlw zmm17, zmm16, \shift
            vpermw zmm17, zmm17, zmm31
            .else
            vpermw zmm17, zmm16, zmm31
            .endif
            vptestmw k1, zmm17, zmm30
            vpblendmw zmm18 {{k1}}, ",
            $of_1,
            ", ",
            $of_3,
            r"
            vpsubusw zmm18, zmm17, zmm18
            vmovdqu64 zmmword ptr [r11 + ",
            $out,
            r" + 256 * \line + 16 * \shift], zmm18
            .endr
            .endr
            "
        )
    };
}

/// Sign and code shifted to where bf16 has them, and the difference of biases added; of subnormal codes, what a table has for them. The sign
/// of a zero stays.
macro_rules! fp8_tile {
    ($out:literal) => {
        concat!(
            r"
            .irp row, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
            vpmovsxbw zmm17, ymmword ptr [rsi + 32 * \row]
            vptestnmw k1, zmm17, zmm27
            vpsllvw zmm18, zmm17, zmm28
            vmovdqa64 zmm19, zmm26
            vpermw zmm19 {{k1}}, zmm17, zmm31
            vpandd zmm18, zmm18, zmm30
            vpaddw zmm18, zmm18, zmm19
            vmovdqu64 zmmword ptr [r11 + ",
            $out,
            r" + 64 * \row], zmm18
            .endr
            "
        )
    };
}

/// With scales: what they subtract must leave zeros alone, so those have no sign. Subnormal codes come from a table by mantissa and sign.
macro_rules! mxfp8_tile {
    ($out:literal) => {
        concat!(
            $crate::cpu::tier::amx::codes::e8m0_scales!(),
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

/// Constants at rsi to their registers.
macro_rules! load_constants {
    () => {
        r"
        vmovdqa64 zmm24, zmmword ptr [rsi]
        vmovdqa64 zmm25, zmmword ptr [rsi + 64]
        vmovdqa64 zmm26, zmmword ptr [rsi + 128]
        vmovdqa64 zmm27, zmmword ptr [rsi + 192]
        vmovdqa64 zmm28, zmmword ptr [rsi + 256]
        vmovdqa64 zmm29, zmmword ptr [rsi + 320]
        vmovdqa64 zmm30, zmmword ptr [rsi + 384]
        vmovdqa64 zmm31, zmmword ptr [rsi + 448]
        "
    };
}

pub(super) use {e8m0_scales, fp8_tile, load_constants, mxfp4_tile, mxfp8_tile, nvfp4_lines, nvfp4_tile};
