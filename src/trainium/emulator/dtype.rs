//! What arithmetic makes of an element type: the one way in and out of f32.
//!
//! Every compute instruction widens its inputs to f32 and rounds once, to nearest even, into its destination.
#![forbid(unsafe_code)]

use super::fault::{Result, Rule, fault};
use crate::num::{Element, F8E4M3Fn, F8E4M3Ieee, F8E5M2, Format, Fp8, Overflow};
use Dtype::*;
use half::{bf16, f16};

pub(super) use crate::trainium::Dtype;

impl Dtype {
    /// Whether it is an integer (or boolean) type.
    pub fn is_integer(self) -> bool {
        matches!(self, Bool | Int8 | Int16 | Int32 | Uint8 | Uint16 | Uint32)
    }

    /// Whether it is a float that arithmetic reads and writes.
    pub fn is_float(self) -> bool {
        matches!(self, Float16 | Float32 | Bfloat16 | Tfloat32) || self.fp8().is_some()
    }

    /// Whether arithmetic reads and writes it: every type but E8M0 and the packed ones.
    pub fn is_arithmetic(self) -> bool {
        self.is_integer() || self.is_float()
    }

    /// Whether it is one of the x4 types.
    pub fn is_packed(self) -> bool {
        matches!(self, Float8E4M3FnX4 | Float8E5M2X4 | Float4E2M1FnX4)
    }

    /// The FP8 format of a plain FP8 type.
    pub fn fp8(self) -> Option<Fp8> {
        match self {
            Float8E4M3 => Some(Fp8::E4M3Ieee),
            Float8E4M3Fn => Some(Fp8::E4M3Fn),
            Float8E5M2 => Some(Fp8::E5M2),
            _ => None,
        }
    }

    /// The format of the four elements of a packed type.
    pub fn lane(self) -> Option<Format> {
        match self {
            Float8E4M3FnX4 => Some(Format::E4M3FN),
            Float8E5M2X4 => Some(Format::E5M2),
            Float4E2M1FnX4 => Some(Format::E2M1),
            _ => None,
        }
    }

    /// Smallest and largest value of an integer type.
    pub fn range(self) -> Option<(i64, i64)> {
        match self {
            Bool => Some((0, 1)),
            Int8 => Some((i8::MIN.into(), i8::MAX.into())),
            Int16 => Some((i16::MIN.into(), i16::MAX.into())),
            Int32 => Some((i32::MIN.into(), i32::MAX.into())),
            Uint8 => Some((0, u8::MAX.into())),
            Uint16 => Some((0, u16::MAX.into())),
            Uint32 => Some((0, u32::MAX.into())),
            _ => None,
        }
    }

    /// The integer with these bits; the bits themselves for other types.
    pub(super) fn integer(self, bits: u32) -> i64 {
        match self {
            Int8 => (bits as u8 as i8).into(),
            Int16 => (bits as u16 as i16).into(),
            Int32 => (bits as i32).into(),
            _ => bits.into(),
        }
    }

    /// The value of an arithmetic element, 32-bit integers rounded to nearest even. Other types give 0: callers ask
    /// [`Dtype::is_arithmetic`] when the program is loaded.
    pub(super) fn to_f32(self, bits: u32) -> f32 {
        match self {
            Float32 | Tfloat32 => f32::from_bits(bits),
            Bfloat16 => bf16::from_bits(bits as u16).to_f32(),
            Float16 => f16::from_bits(bits as u16).to_f32(),
            Float8E4M3 => F8E4M3Ieee::VALUES[(bits & 0xFF) as usize],
            Float8E4M3Fn => F8E4M3Fn::VALUES[(bits & 0xFF) as usize],
            Float8E5M2 => F8E5M2::VALUES[(bits & 0xFF) as usize],
            _ if self.is_integer() => self.integer(bits) as f32,
            _ => 0.0,
        }
    }

    /// Rounds `x` into the type, once, to nearest even; integers saturate.
    ///
    /// # Errors
    /// [`Rule::Value`] where the documents define no result: a value too large for FP8, an infinity in E4M3FN, NaN in an
    /// integer. [`Rule::Operand`] for types that arithmetic does not write.
    pub(super) fn round(self, x: f32) -> Result<u32> {
        Ok(match self {
            Float32 => x.to_bits(),
            Tfloat32 => round_tf32(x),
            Bfloat16 => bf16::from_f32(x).to_bits().into(),
            Float16 => f16::from_f32(x).to_bits().into(),
            Float8E4M3 | Float8E4M3Fn | Float8E5M2 => return self.round_fp8(x),
            _ => match self.range() {
                Some(_) if x.is_nan() => {
                    return fault(Rule::Value, format!("NaN has no defined value in {}", self.name()));
                }
                // f64 holds every bound and every rounded f32 exactly, and the cast back is exact after the clamp.
                Some((low, high)) => {
                    f64::from(x).round_ties_even().clamp(low as f64, high as f64) as i64 as u32 & self.mask()
                }
                None => return fault(Rule::Operand, format!("{} is not written by arithmetic", self.name())),
            },
        })
    }

    fn round_fp8(self, x: f32) -> Result<u32> {
        let Some(fp8) = self.fp8() else { return fault(Rule::Operand, "not an FP8 type") };
        let code = fp8.format().encode(x, Overflow::NonSaturating);
        let value = fp8.format().decode(code);
        let lost = if x.is_finite() { !value.is_finite() } else { x.is_infinite() && !value.is_infinite() };
        if lost {
            let max = fp8.format().max();
            return fault(
                Rule::Value,
                format!("{x} exceeds the largest {} value {max}; clamp before the cast", self.name()),
            );
        }
        Ok(code.into())
    }

    /// Mask of the element's bits.
    pub(super) fn mask(self) -> u32 {
        match self.size() {
            1 => 0xFF,
            2 => 0xFFFF,
            _ => u32::MAX,
        }
    }
}

/// Ten mantissa bits, nearest even; infinities and NaN stay.
fn round_tf32(x: f32) -> u32 {
    let bits = x.to_bits();
    if !x.is_finite() {
        return bits;
    }
    let odd = (bits >> 13) & 1;
    bits.wrapping_add(0xFFF + odd) & 0xFFFF_E000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_round_to_even_and_saturate() {
        let uint8 = |x: f32| Uint8.round(x).unwrap();
        assert_eq!([2.5, 3.5, -2.5, 300.0, -7.0].map(uint8), [2, 4, 0, 255, 0]);
        assert_eq!(Int8.round(-200.0).unwrap(), 0x80);
        assert_eq!(Int32.round(3e9).unwrap(), i32::MAX as u32);
        assert_eq!(Uint8.round(f32::NAN).unwrap_err().rule, Rule::Value);
    }

    #[test]
    fn fp8_overflow_is_an_error_and_the_edge_is_not() {
        assert_eq!(Float8E4M3.round(240.0).unwrap(), 0x77);
        assert_eq!(Float8E4M3Fn.round(-448.0).unwrap(), 0xFE);
        assert_eq!(Float8E4M3Fn.round(463.0).unwrap(), 0x7E);
        for (dtype, x) in
            [(Float8E4M3, 248.0), (Float8E4M3Fn, 470.0), (Float8E5M2, 62000.0), (Float8E4M3Fn, f32::INFINITY)]
        {
            assert_eq!(dtype.round(x).unwrap_err().rule, Rule::Value, "{x} into {}", dtype.name());
        }
        assert_eq!(Float8E4M3.round(f32::INFINITY).unwrap(), 0x78);
    }

    #[test]
    fn every_16_bit_float_survives_the_round_trip() {
        for dtype in [Bfloat16, Float16] {
            for bits in 0..=0xFFFF {
                let x = dtype.to_f32(bits);
                assert!(x.is_nan() || dtype.round(x).unwrap() == bits, "{} {bits:#x}", dtype.name());
            }
        }
    }
}
