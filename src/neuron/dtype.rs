//! Element types as the library numbers them, which it has done in two ways.
#![forbid(unsafe_code)]

use super::Version;
use std::fmt;

/// An element type that libnrt can report. There is none for FP4, nor for the packed `_x4` types of MX kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeviceDtype {
    /// Not known to the library.
    Unknown,
    /// 64-bit unsigned.
    Uint64,
    /// 8-bit signed; how FP8 is often reported.
    Int8,
    /// 8-bit unsigned.
    Uint8,
    /// 16-bit signed.
    Int16,
    /// 16-bit unsigned.
    Uint16,
    /// bfloat16.
    Bfloat16,
    /// IEEE half.
    Float16,
    /// 32-bit signed.
    Int32,
    /// 32-bit unsigned.
    Uint32,
    /// IEEE single.
    Float32,
    /// Single, "round" mode of TensorE.
    Fp32r,
    /// 64-bit signed.
    Int64,
    /// FP8 with 3 exponent bits.
    Fp8E3,
    /// FP8 with 4 exponent bits.
    Fp8E4,
    /// FP8 with 5 exponent bits.
    Fp8E5,
    /// A number that has no name in the table it was looked up in.
    Other(u32),
}

/// One of the two tables. The same number means two types in them; only 8 and 9 agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DtypeNumbering {
    /// Headers up to SDK 2.27, and still the developer guide.
    Old,
    /// Headers from SDK 2.28 (runtime 2.30).
    New,
}

use DeviceDtype as D;

/// Position is the number.
const OLD: [DeviceDtype; 12] = [
    D::Unknown,
    D::Float32,
    D::Float16,
    D::Bfloat16,
    D::Int8,
    D::Uint8,
    D::Int16,
    D::Uint16,
    D::Int32,
    D::Uint32,
    D::Int64,
    D::Uint64,
];
/// Position is the number.
const NEW: [DeviceDtype; 16] = [
    D::Unknown,
    D::Uint64,
    D::Int8,
    D::Uint8,
    D::Int16,
    D::Uint16,
    D::Bfloat16,
    D::Float16,
    D::Int32,
    D::Uint32,
    D::Float32,
    D::Fp32r,
    D::Int64,
    D::Fp8E3,
    D::Fp8E4,
    D::Fp8E5,
];

impl DtypeNumbering {
    /// The table that a runtime most likely uses. When the library itself switched is not documented: never decide
    /// correctness on a reported type.
    pub fn of(version: Version) -> DtypeNumbering {
        if version >= Version::new(2, 30, 0) { DtypeNumbering::New } else { DtypeNumbering::Old }
    }

    fn table(self) -> &'static [DeviceDtype] {
        match self {
            DtypeNumbering::Old => &OLD,
            DtypeNumbering::New => &NEW,
        }
    }

    /// The type a number stands for.
    pub fn decode(self, number: u32) -> DeviceDtype {
        let known = usize::try_from(number).ok().and_then(|at| self.table().get(at));
        known.copied().unwrap_or(DeviceDtype::Other(number))
    }

    /// The number that stands for a type, if the table has one.
    pub fn encode(self, dtype: DeviceDtype) -> Option<u32> {
        self.table().iter().position(|d| *d == dtype).and_then(|at| u32::try_from(at).ok())
    }
}

impl DeviceDtype {
    /// Whether it is one of the 8-bit floats.
    pub const fn is_fp8(self) -> bool {
        matches!(self, D::Fp8E3 | D::Fp8E4 | D::Fp8E5)
    }

    /// Bytes of an element, if known.
    pub const fn bytes(self) -> Option<usize> {
        match self {
            D::Int8 | D::Uint8 | D::Fp8E3 | D::Fp8E4 | D::Fp8E5 => Some(1),
            D::Int16 | D::Uint16 | D::Bfloat16 | D::Float16 => Some(2),
            D::Int32 | D::Uint32 | D::Float32 | D::Fp32r => Some(4),
            D::Int64 | D::Uint64 => Some(8),
            D::Unknown | D::Other(_) => None,
        }
    }

    /// Its name in NEFF files.
    pub const fn name(self) -> &'static str {
        match self {
            D::Unknown => "unknown",
            D::Uint64 => "uint64",
            D::Int8 => "int8",
            D::Uint8 => "uint8",
            D::Int16 => "int16",
            D::Uint16 => "uint16",
            D::Bfloat16 => "bfloat16",
            D::Float16 => "float16",
            D::Int32 => "int32",
            D::Uint32 => "uint32",
            D::Float32 => "float32",
            D::Fp32r => "float32r",
            D::Int64 => "int64",
            D::Fp8E3 => "float8e3",
            D::Fp8E4 => "float8e4",
            D::Fp8E5 => "float8e5",
            D::Other(_) => "other",
        }
    }
}

impl fmt::Display for DeviceDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            D::Other(number) => write!(f, "dtype number {number}"),
            known => f.write_str(known.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_tables_lead_there_and_back() {
        for numbering in [DtypeNumbering::Old, DtypeNumbering::New] {
            for number in 0..20 {
                let dtype = numbering.decode(number);
                match dtype {
                    DeviceDtype::Other(n) => assert!(n == number && numbering.encode(dtype).is_none()),
                    _ => assert_eq!(numbering.encode(dtype), Some(number)),
                }
            }
        }
        assert_eq!(DtypeNumbering::New.decode(u32::MAX), DeviceDtype::Other(u32::MAX));
    }

    /// Numbers of the two header generations.
    #[test]
    fn known_numbers() {
        let new =
            [(0x6, D::Bfloat16), (0xA, D::Float32), (0xD, D::Fp8E3), (0xE, D::Fp8E4), (0xF, D::Fp8E5), (2, D::Int8)];
        let old = [(1, D::Float32), (3, D::Bfloat16), (4, D::Int8), (5, D::Uint8), (11, D::Uint64), (12, D::Other(12))];
        assert!(new.iter().all(|&(n, d)| DtypeNumbering::New.decode(n) == d));
        assert!(old.iter().all(|&(n, d)| DtypeNumbering::Old.decode(n) == d));
        let same: Vec<u32> =
            (1..12).filter(|&n| DtypeNumbering::Old.decode(n) == DtypeNumbering::New.decode(n)).collect();
        assert_eq!(same, [8, 9]);
        assert!([D::Fp8E3, D::Fp8E4, D::Fp8E5].iter().all(|d| d.is_fp8() && d.bytes() == Some(1)));
    }

    #[test]
    fn the_table_follows_the_version() {
        assert_eq!(DtypeNumbering::of(Version::new(2, 29, 40)), DtypeNumbering::Old);
        assert_eq!(DtypeNumbering::of(Version::new(2, 30, 0)), DtypeNumbering::New);
        assert_eq!(DtypeNumbering::of(Version::new(2, 34, 10)), DtypeNumbering::New);
    }
}
