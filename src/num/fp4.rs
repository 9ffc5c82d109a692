//! Two FP4 numbers in a byte.
#![forbid(unsafe_code)]

use super::format::{Format, Overflow};

/// Two E2M1 numbers in one byte: element 0 in the low nibble, element 1 in the high nibble. Max 6, no infinity, no NaN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct F4E2M1x2(u8);

impl F4E2M1x2 {
    /// The format's facts.
    pub const FORMAT: Format = Format::E2M1;
    /// Largest finite value.
    pub const MAX: f32 = 6.0;
    /// Value of every 4-bit code.
    pub const VALUES: [f32; 16] =
        [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

    /// The pair with this byte.
    pub const fn from_bits(byte: u8) -> Self {
        Self(byte)
    }

    /// The byte.
    pub const fn to_bits(self) -> u8 {
        self.0
    }

    /// The pair with these 4-bit codes; bits above the fourth are ignored.
    pub const fn from_codes(low: u8, high: u8) -> Self {
        Self(low & 15 | high << 4)
    }

    /// The two 4-bit codes, element 0 first.
    pub const fn codes(self) -> [u8; 2] {
        [self.0 & 15, self.0 >> 4]
    }

    /// The exact values, element 0 first.
    pub const fn to_f32(self) -> [f32; 2] {
        [Self::VALUES[(self.0 & 15) as usize], Self::VALUES[(self.0 >> 4) as usize]]
    }

    /// Nearest codes, ties to even, saturating (the format has nothing else). `None` if either is NaN: FP4 cannot say it.
    pub const fn from_f32(x: [f32; 2]) -> Option<Self> {
        if x[0].is_nan() || x[1].is_nan() {
            return None;
        }
        let low = Format::E2M1.encode(x[0], Overflow::Saturate);
        Some(Self::from_codes(low, Format::E2M1.encode(x[1], Overflow::Saturate)))
    }
}
