//! The engine: decode and encode any small float from five facts.
#![forbid(unsafe_code)]

/// Which codes are not finite numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Specials {
    /// None: every code is a finite number (FP4, FP6).
    None,
    /// Only the all-ones magnitude is NaN; there is no infinity (the OCP "FN" formats).
    NanOnly,
    /// As IEEE 754: the top exponent holds infinity and NaN.
    Ieee,
}

/// What becomes of a value too large for the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overflow {
    /// Finite overflow and infinities become the largest finite value of that sign.
    Saturate,
    /// Rounding alone decides: overflow becomes infinity, or NaN where the format has no infinity. Formats with neither
    /// saturate.
    NonSaturating,
}

/// A small float format: sign bit, `exponent_bits`, `mantissa_bits`, from high to low.
///
/// Value of a code with sign `s`, exponent field `e`, mantissa field `m` (`M` bits), bias `b`: `(-1)^s m 2^(1-b-M)` if
/// `e == 0`, else `(-1)^s (1 + m/2^M) 2^(e-b)`, but for the codes [`Specials`] takes away. Source: OCP MX v1.0 and OFP8
/// v1.0; E4M3 "IEEE" and E3M4 as ml_dtypes and XLA define them. The facts are read-only: the engine's shifts rely on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Format {
    name: &'static str,
    exponent_bits: u32,
    mantissa_bits: u32,
    bias: i32,
    specials: Specials,
}

impl Format {
    /// OCP FP8 E4M3 ("FN": finite and NaN only), max 448.
    pub const E4M3FN: Format = Format::new("E4M3FN", 4, 3, 7, Specials::NanOnly);
    /// E4M3 with infinities, max 240: the FP8_EXP4 of Trainium1 and Trainium2.
    pub const E4M3_IEEE: Format = Format::new("E4M3 IEEE", 4, 3, 7, Specials::Ieee);
    /// OCP FP8 E5M2, max 57344.
    pub const E5M2: Format = Format::new("E5M2", 5, 2, 15, Specials::Ieee);
    /// E3M4 with infinities, max 15.5.
    pub const E3M4: Format = Format::new("E3M4", 3, 4, 3, Specials::Ieee);
    /// OCP FP4 E2M1, max 6.
    pub const E2M1: Format = Format::new("E2M1", 2, 1, 1, Specials::None);
    /// OCP FP6 E2M3, max 7.5.
    pub const E2M3: Format = Format::new("E2M3", 2, 3, 1, Specials::None);
    /// OCP FP6 E3M2, max 28.
    pub const E3M2: Format = Format::new("E3M2", 3, 2, 3, Specials::None);

    const fn new(name: &'static str, exponent_bits: u32, mantissa_bits: u32, bias: i32, specials: Specials) -> Self {
        Format { name, exponent_bits, mantissa_bits, bias, specials }
    }

    /// Name as the field writes it.
    pub const fn name(self) -> &'static str {
        self.name
    }

    /// Bits of the exponent field.
    pub const fn exponent_bits(self) -> u32 {
        self.exponent_bits
    }

    /// Bits of the mantissa field.
    pub const fn mantissa_bits(self) -> u32 {
        self.mantissa_bits
    }

    /// Exponent bias.
    pub const fn bias(self) -> i32 {
        self.bias
    }

    /// Codes that are not finite.
    pub const fn specials(self) -> Specials {
        self.specials
    }

    /// Mask of the magnitude bits of a code.
    const fn magnitude(self) -> u32 {
        (1 << (self.exponent_bits + self.mantissa_bits)) - 1
    }

    /// Sign bit of a code.
    pub const fn sign_bit(self) -> u8 {
        1 << (self.exponent_bits + self.mantissa_bits)
    }

    /// Code of positive infinity, if there is one.
    pub const fn infinity(self) -> Option<u8> {
        match self.specials {
            Specials::Ieee => Some((((1 << self.exponent_bits) - 1) << self.mantissa_bits) as u8),
            _ => None,
        }
    }

    /// Code of the positive quiet NaN, if there is one.
    pub const fn nan(self) -> Option<u8> {
        match self.specials {
            Specials::None => None,
            Specials::NanOnly => Some(self.magnitude() as u8),
            Specials::Ieee => {
                Some((((1 << self.exponent_bits) - 1) << self.mantissa_bits | 1 << (self.mantissa_bits - 1)) as u8)
            }
        }
    }

    /// Code of the largest finite value.
    pub const fn max_code(self) -> u8 {
        match self.specials {
            Specials::None => self.magnitude() as u8,
            Specials::NanOnly => self.magnitude() as u8 - 1,
            Specials::Ieee => ((((1 << self.exponent_bits) - 1) << self.mantissa_bits) - 1) as u8,
        }
    }

    /// Largest finite value.
    pub const fn max(self) -> f32 {
        self.decode(self.max_code())
    }

    /// Exponent of the largest finite value: `floor(log2(max))`.
    pub const fn emax(self) -> i32 {
        (self.max_code() as i32 >> self.mantissa_bits) - self.bias
    }

    /// The exact value of `code`; bits above the format's width are ignored.
    pub const fn decode(self, code: u8) -> f32 {
        let magnitude = code as u32 & self.magnitude();
        let sign = (((code & self.sign_bit()) != 0) as u32) << 31;
        match self.specials {
            Specials::NanOnly if magnitude == self.magnitude() => return f32::from_bits(sign | 0x7FC0_0000),
            Specials::Ieee if magnitude > self.max_code() as u32 => {
                let nan = magnitude > self.max_code() as u32 + 1;
                return f32::from_bits(sign | 0x7F80_0000 | ((nan as u32) << 22));
            }
            _ => {}
        }
        let exponent = (magnitude >> self.mantissa_bits) as i32;
        let mantissa = magnitude & ((1 << self.mantissa_bits) - 1);
        // Both factors are exact and no product leaves f32's normal range: the widest format here reaches 2^-16 and 2^15.
        let (integer, power) = if exponent == 0 {
            (mantissa, 1 - self.bias - self.mantissa_bits as i32)
        } else {
            (mantissa | 1 << self.mantissa_bits, exponent - self.bias - self.mantissa_bits as i32)
        };
        let value = integer as f32 * f32::from_bits(((power + 127) as u32) << 23);
        f32::from_bits(sign | value.to_bits())
    }

    /// The code nearest `x`, ties to the even code, rounded once from the exact value of `x`.
    ///
    /// The sign is kept, also of results that round to zero. NaN gives NaN where the format has one; FP4 and FP6 have none and
    /// give +0: whoever encodes blocks must look for NaN first (facts: libraries disagree, so this crate's quantizers turn the
    /// whole block into NaN instead).
    #[inline]
    pub const fn encode(self, x: f32, overflow: Overflow) -> u8 {
        // No branch depends on x, so that a loop over a slice becomes vector code.
        let sign = (x.to_bits() >> 31) * self.sign_bit() as u32;
        let magnitude = x.to_bits() & 0x7FFF_FFFF;
        let max = self.max_code() as u32;
        let beyond = match (overflow, self.infinity(), self.nan()) {
            (Overflow::NonSaturating, Some(infinity), _) => infinity as u32,
            (Overflow::NonSaturating, None, Some(nan)) => nan as u32,
            _ => max,
        };
        let rounded = self.round(magnitude);
        let code = if rounded > max { beyond } else { rounded } | sign;
        let nan = match self.nan() {
            Some(nan) => nan as u32 | sign,
            None => 0,
        };
        (if magnitude > 0x7F80_0000 { nan } else { code }) as u8
    }

    /// Rounds the non-negative f32 with these bits to a code as if exponents had no end. NaN gives no code in particular.
    #[inline]
    const fn round(self, magnitude: u32) -> u32 {
        let min_exponent = 1 - self.bias;
        // Below the smallest normal number codes count steps. Adding a power of two whose last place is one step makes the
        // f32 addition round to whole steps, ties to even; 2^M of them carry into the exponent by themselves.
        let steps = ((min_exponent - self.mantissa_bits as i32 + 23 + 127) as u32) << 23;
        let subnormal = (f32::from_bits(magnitude) + f32::from_bits(steps)).to_bits().wrapping_sub(steps);
        // From there on rounding drops mantissa bits, ties to even, and the exponent changes its bias.
        let shift = 23 - self.mantissa_bits;
        let odd = magnitude >> shift & 1;
        let rebias = ((126 + min_exponent) as u32) << self.mantissa_bits;
        let normal = ((magnitude + ((1 << (shift - 1)) - 1) + odd) >> shift).wrapping_sub(rebias);
        if magnitude < ((127 + min_exponent) as u32) << 23 { subnormal } else { normal }
    }
}

/// The values of all codes of an 8-bit format.
pub(crate) const fn table(format: Format) -> [f32; 256] {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        values[code] = format.decode(code as u8);
        code += 1;
    }
    values
}
