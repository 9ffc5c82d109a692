//! Which number libnrt reports for an element type, in both numberings.
#![forbid(unsafe_code)]

use crate::settings::{Settings, flag};
use trn_kernels::trainium::emulator::Dtype;

const UNKNOWN: u32 = 0;

/// The number of a type under these settings; 0 if libnrt has none for it.
pub(crate) fn number(dtype: Dtype, settings: &Settings) -> u32 {
    let legacy = settings.legacy_dtypes();
    let int8 = if legacy { 4 } else { 2 };
    // (new numbering, SDK 2.27 and older)
    let (new, old) = match dtype {
        _ if settings.has(flag::INFO_DTYPE_UNKNOWN) => (UNKNOWN, UNKNOWN),
        Dtype::Float8E4M3 | Dtype::Float8E4M3Fn | Dtype::Float8E5M2 if settings.has(flag::FP8_AS_INT8) => (int8, int8),
        Dtype::Int8 => (0x2, 4),
        Dtype::Uint8 | Dtype::Bool | Dtype::Float8E8M0Fnu => (0x3, 5),
        Dtype::Int16 => (0x4, 6),
        Dtype::Uint16 => (0x5, 7),
        Dtype::Bfloat16 => (0x6, 3),
        Dtype::Float16 => (0x7, 2),
        Dtype::Int32 => (0x8, 8),
        Dtype::Uint32 => (0x9, 9),
        Dtype::Float32 => (0xA, 1),
        Dtype::Tfloat32 => (0xB, 1),
        // The old numbering has no FP8; it was reported as INT8.
        Dtype::Float8E4M3 | Dtype::Float8E4M3Fn => (0xE, 4),
        Dtype::Float8E5M2 => (0xF, 4),
        Dtype::Float8E4M3FnX4 | Dtype::Float8E5M2X4 | Dtype::Float4E2M1FnX4 => (UNKNOWN, UNKNOWN),
    };
    if legacy { old } else { new }
}

/// Whether some element of a float tensor is NaN.
pub(crate) fn has_nan(dtype: Dtype, bytes: &[u8]) -> bool {
    let wide = |exponent: u16, mantissa: u16| {
        bytes
            .chunks_exact(2)
            .map(|b| u16::from_le_bytes([b[0], b[1]]))
            .any(|x| x & exponent == exponent && x & mantissa != 0)
    };
    match dtype {
        Dtype::Float32 | Dtype::Tfloat32 => {
            bytes.chunks_exact(4).any(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]).is_nan())
        }
        Dtype::Bfloat16 => wide(0x7F80, 0x007F),
        Dtype::Float16 => wide(0x7C00, 0x03FF),
        _ => dtype.fp8().is_some_and(|fp8| bytes.iter().any(|&code| fp8.values()[usize::from(code)].is_nan())),
    }
}
