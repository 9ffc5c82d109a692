//! Slices of codes from and to f32, bf16 and f16.
#![forbid(unsafe_code)]

use super::format::Overflow;
use super::fp4::F4E2M1x2;
use super::fp8::Fp8;
use crate::error::{Error, Result, length, mul};
use half::{bf16, f16};

/// A plain floating-point type that activations and outputs come in: `f32`, [`bf16`] or [`f16`](struct@f16).
///
/// Sealed: kernels are written for these three.
pub trait Real: Copy + Send + Sync + Default + std::fmt::Debug + sealed::Sealed + 'static {
    /// Name as the field writes it.
    const NAME: &'static str;
    /// The value, exactly.
    fn to_f32(self) -> f32;
    /// Nearest value, ties to even; NaN stays NaN.
    fn from_f32(x: f32) -> Self;
    /// The slice with its type as data.
    fn slice(x: &[Self]) -> RealSlice<'_>;
    /// The mutable slice with its type as data.
    fn slice_mut(x: &mut [Self]) -> RealSliceMut<'_>;
}

/// A slice whose element type is known at run time.
#[derive(Debug, Clone, Copy)]
pub enum RealSlice<'a> {
    /// f32.
    F32(&'a [f32]),
    /// bf16.
    Bf16(&'a [bf16]),
    /// f16.
    F16(&'a [f16]),
}

/// A mutable slice whose element type is known at run time.
#[derive(Debug)]
pub enum RealSliceMut<'a> {
    /// f32.
    F32(&'a mut [f32]),
    /// bf16.
    Bf16(&'a mut [bf16]),
    /// f16.
    F16(&'a mut [f16]),
}

mod sealed {
    use half::{bf16, f16};

    pub trait Sealed {
        /// `from_f32` with one NaN.
        fn rounded(x: f32) -> Self;
    }
    impl Sealed for f32 {
        #[inline(always)]
        fn rounded(x: f32) -> Self {
            if x.is_nan() { f32::NAN } else { x }
        }
    }
    impl Sealed for bf16 {
        // bf16::from_f32 keeps a NaN's payload, which takes as many operations again.
        #[inline(always)]
        fn rounded(x: f32) -> Self {
            let bits = x.to_bits();
            let near = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
            if x.is_nan() { bf16::NAN } else { bf16::from_bits(near as u16) }
        }
    }
    impl Sealed for f16 {
        #[inline(always)]
        fn rounded(x: f32) -> Self {
            f16::from_f32(if x.is_nan() { f32::NAN } else { x })
        }
    }
}

macro_rules! real {
    ($t:ty, $variant:ident, $name:literal, $to:expr, $from:expr) => {
        impl Real for $t {
            const NAME: &'static str = $name;
            #[inline]
            fn to_f32(self) -> f32 {
                $to(self)
            }
            #[inline]
            fn from_f32(x: f32) -> Self {
                $from(x)
            }
            fn slice(x: &[Self]) -> RealSlice<'_> {
                RealSlice::$variant(x)
            }
            fn slice_mut(x: &mut [Self]) -> RealSliceMut<'_> {
                RealSliceMut::$variant(x)
            }
        }
    };
}
real!(f32, F32, "f32", std::convert::identity, std::convert::identity);
real!(bf16, Bf16, "bf16", bf16::to_f32, bf16::from_f32);
real!(f16, F16, "f16", f16::to_f32, f16::from_f32);

/// `x` rounded for an output, every NaN as the one NaN: its payload would otherwise depend on the order in which a CPU sees
/// operands.
#[inline(always)]
pub(crate) fn rounded<T: Real>(x: f32) -> T {
    <T as sealed::Sealed>::rounded(x)
}

/// Codes of `format` to values. Every FP8 value is exact in f32, bf16 and f16.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) if the slices differ in length.
pub fn decode_slice<T: Real>(format: Fp8, codes: &[u8], out: &mut [T]) -> Result<()> {
    length("decode output", out.len(), codes.len())?;
    let values = format.values();
    for (y, &code) in out.iter_mut().zip(codes) {
        *y = T::from_f32(values[code as usize]);
    }
    Ok(())
}

/// Values to the nearest codes of `format`, ties to even, each rounded once from its exact source value.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) if the slices differ in length.
pub fn encode_slice<T: Real>(format: Fp8, x: &[T], overflow: Overflow, codes: &mut [u8]) -> Result<()> {
    length("encode output", codes.len(), x.len())?;
    let facts = format.format();
    for (code, &x) in codes.iter_mut().zip(x) {
        *code = facts.encode(x.to_f32(), overflow);
    }
    Ok(())
}

/// FP4 codes, two to a byte ([`F4E2M1x2`]: element 0 in the low nibble), to values. Every value is exact in f32, bf16 and f16.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) unless `out` holds two elements for each byte.
pub fn decode_fp4_slice<T: Real>(pairs: &[u8], out: &mut [T]) -> Result<()> {
    length("decode output", out.len(), mul("decode output", pairs.len(), 2)?)?;
    for (y, pair) in out.as_chunks_mut::<2>().0.iter_mut().zip(pairs) {
        *y = F4E2M1x2::from_bits(*pair).to_f32().map(T::from_f32);
    }
    Ok(())
}

/// Values to the nearest FP4 codes, two to a byte as [`decode_fp4_slice`] reads them, ties to even, saturating, each rounded once from its exact source value.
///
/// # Errors
/// [`Error::Length`] unless `x` holds two elements for each byte; [`Error::Value`] naming the first NaN, which FP4 cannot say.
/// Nothing is written then.
pub fn encode_fp4_slice<T: Real>(x: &[T], pairs: &mut [u8]) -> Result<()> {
    length("encode input", x.len(), mul("encode input", pairs.len(), 2)?)?;
    if let Some(at) = x.iter().position(|x| x.to_f32().is_nan()) {
        return Err(Error::Value {
            operand: "encode input".into(),
            at,
            got: "NaN".into(),
            needed: "a number: FP4 has no NaN",
        });
    }
    for (pair, x) in pairs.iter_mut().zip(x.as_chunks::<2>().0) {
        *pair = F4E2M1x2::from_f32(x.map(T::to_f32)).unwrap_or_default().to_bits();
    }
    Ok(())
}

/// The bf16 nearest `x`, ties to even, rounded once.
///
/// Going through f32 would round twice; f32 rounded *to odd* keeps what the second rounding needs to know.
pub fn bf16_from_f64(x: f64) -> bf16 {
    let y = x as f32;
    if f64::from(y) == x || !y.is_finite() {
        return bf16::from_f32(y);
    }
    // `y` is one of x's two neighbours in f32: take the one whose last bit is set.
    let odd = if y.to_bits() & 1 == 1 {
        y
    } else if (f64::from(y) < x) == (x > 0.0) {
        f32::from_bits(y.to_bits() + 1)
    } else {
        f32::from_bits(y.to_bits() - 1)
    };
    bf16::from_f32(odd)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All bf16, and what lies around the middle between each and the next.
    #[test]
    fn rounded_is_from_f32_with_one_nan() {
        for high in 0..=u16::MAX {
            for low in [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF] {
                let x = f32::from_bits(u32::from(high) << 16 | low);
                let (b, h, f) = (rounded::<bf16>(x), rounded::<f16>(x), rounded::<f32>(x));
                let want = if x.is_nan() { f32::NAN } else { x };
                assert_eq!(b.to_bits(), bf16::from_f32(want).to_bits(), "{x:e} as bf16");
                assert_eq!(h.to_bits(), f16::from_f32(want).to_bits(), "{x:e} as f16");
                assert_eq!(f.to_bits(), want.to_bits(), "{x:e}");
            }
        }
    }
}
