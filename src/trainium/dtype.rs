//! Element types of device tensors.
#![forbid(unsafe_code)]

/// An element type, by its NKI name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // the names say it all
pub enum Dtype {
    Bool,
    Int8,
    Int16,
    Int32,
    Uint8,
    Uint16,
    Uint32,
    Float16,
    Float32,
    Bfloat16,
    /// 1 sign, 8 exponent and 10 mantissa bits, stored as f32.
    Tfloat32,
    /// IEEE-like, max 240: Trn1 and Trn2.
    Float8E4M3,
    /// OCP, max 448: Trn3.
    Float8E4M3Fn,
    Float8E5M2,
    Float8E8M0Fnu,
    /// Four codes in 32 bits, element 0 in the lowest byte.
    Float8E4M3FnX4,
    /// Four codes in 32 bits, element 0 in the lowest byte.
    Float8E5M2X4,
    /// Four codes in 16 bits, element 0 in the lowest nibble.
    Float4E2M1FnX4,
}

use Dtype::*;

const NAMES: [(&str, Dtype, usize); 18] = [
    ("bool", Bool, 1),
    ("int8", Int8, 1),
    ("int16", Int16, 2),
    ("int32", Int32, 4),
    ("uint8", Uint8, 1),
    ("uint16", Uint16, 2),
    ("uint32", Uint32, 4),
    ("float16", Float16, 2),
    ("float32", Float32, 4),
    ("bfloat16", Bfloat16, 2),
    ("tfloat32", Tfloat32, 4),
    ("float8_e4m3", Float8E4M3, 1),
    ("float8_e4m3fn", Float8E4M3Fn, 1),
    ("float8_e5m2", Float8E5M2, 1),
    ("float8_e8m0fnu", Float8E8M0Fnu, 1),
    ("float8_e4m3fn_x4", Float8E4M3FnX4, 4),
    ("float8_e5m2_x4", Float8E5M2X4, 4),
    ("float4_e2m1fn_x4", Float4E2M1FnX4, 2),
];

impl Dtype {
    /// The type called `name` in NKI.
    pub fn by_name(name: &str) -> Option<Dtype> {
        NAMES.iter().find(|(n, ..)| *n == name).map(|&(_, dtype, _)| dtype)
    }

    /// Its NKI name.
    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(_, d, _)| *d == self).map_or("", |(name, ..)| name)
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Bool | Int8 | Uint8 | Float8E4M3 | Float8E4M3Fn | Float8E5M2 | Float8E8M0Fnu => 1,
            Int16 | Uint16 | Float16 | Bfloat16 | Float4E2M1FnX4 => 2,
            Int32 | Uint32 | Float32 | Tfloat32 | Float8E4M3FnX4 | Float8E5M2X4 => 4,
        }
    }

    /// The name of the libnrt type that a tensor of this type has (`nrt_dtype_t`, short: `u8`, `f32`, `fp8_e4`...). The two E4M3 types share one; `None` for types that libnrt has no name for (E8M0, the x4 types, TF32, bool).
    pub const fn nrt_name(self) -> Option<&'static str> {
        Some(match self {
            Int8 => "i8",
            Int16 => "i16",
            Int32 => "i32",
            Uint8 => "u8",
            Uint16 => "u16",
            Uint32 => "u32",
            Float16 => "f16",
            Float32 => "f32",
            Bfloat16 => "bf16",
            Float8E4M3 | Float8E4M3Fn => "fp8_e4",
            Float8E5M2 => "fp8_e5",
            Bool | Tfloat32 | Float8E8M0Fnu | Float8E4M3FnX4 | Float8E5M2X4 | Float4E2M1FnX4 => return None,
        })
    }

    /// All types.
    pub fn all() -> impl Iterator<Item = Dtype> {
        NAMES.into_iter().map(|(_, dtype, _)| dtype)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_sizes_agree_with_the_table() {
        for (name, dtype, size) in NAMES {
            assert_eq!((dtype.name(), dtype.size(), Dtype::by_name(name)), (name, size, Some(dtype)));
        }
    }
}
