//! The power-of-two scale.
#![forbid(unsafe_code)]

/// E8M0: an 8-bit power of two, `2^(code - 127)`; 255 is NaN. No sign, no zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct E8M0(u8);

impl E8M0 {
    /// 1.0
    pub const ONE: E8M0 = E8M0(127);
    /// NaN
    pub const NAN: E8M0 = E8M0(255);

    /// The scale with this code.
    pub const fn from_bits(code: u8) -> Self {
        Self(code)
    }

    /// The code.
    pub const fn to_bits(self) -> u8 {
        self.0
    }

    /// `2^exponent`, clamped to `2^-127 ..= 2^127`.
    pub const fn from_exponent(exponent: i32) -> Self {
        let clamped = if exponent < -127 {
            -127
        } else if exponent > 127 {
            127
        } else {
            exponent
        };
        E8M0((clamped + 127) as u8)
    }

    /// The exponent, or `None` for NaN.
    pub const fn exponent(self) -> Option<i32> {
        if self.0 == 255 { None } else { Some(self.0 as i32 - 127) }
    }

    /// The exact value. Code 0 is 2^-127, a subnormal f32: shifting the code into the exponent field would lose it.
    pub const fn to_f32(self) -> f32 {
        match self.0 {
            0 => f32::from_bits(0x0040_0000),
            255 => f32::NAN,
            code => f32::from_bits((code as u32) << 23),
        }
    }

    /// `2^-exponent` as f64: exact for every code but NaN.
    pub const fn reciprocal(self) -> f64 {
        match self.exponent() {
            None => f64::NAN,
            Some(e) => f64::from_bits(((1023 - e) as u64) << 52),
        }
    }

    /// Largest power of two not above `|x|`, clamped; zero gives code 0, NaN and infinities give NaN.
    pub const fn floor(x: f32) -> Self {
        match super::math::floor_log2(x) {
            Some(e) => E8M0::from_exponent(e),
            None => non_finite_or_zero(x),
        }
    }

    /// Smallest power of two not below `|x|`, clamped; zero gives code 0, NaN and infinities give NaN.
    pub const fn ceil(x: f32) -> Self {
        match super::math::ceil_log2(x) {
            Some(e) => E8M0::from_exponent(e),
            None => non_finite_or_zero(x),
        }
    }
}

const fn non_finite_or_zero(x: f32) -> E8M0 {
    if x == 0.0 { E8M0(0) } else { E8M0::NAN }
}
