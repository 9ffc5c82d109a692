//! Real numbers to element codes, one block at a time.
#![forbid(unsafe_code)]

use super::rule::ScaleRule;
use crate::error::{Result, length};
use crate::num::{E8M0, Format, Overflow, Real};

/// Quantizes one MX block: writes one code per byte and gives the block's scale. value = code x scale.
///
/// `x` is the block, of any length (OCP MX blocks are 32 long); `codes` is as long. The scale follows `rule` from the largest
/// magnitude; each code is `x / scale` (exact: the scale is a power of two) rounded once to the nearest, ties to even,
/// saturating. The sign of zero is kept.
///
/// A block of zeros has scale code 0. A block with a NaN or an infinity in it has the NaN scale and codes 0, so that all of
/// its values decode to NaN: FP4 has no NaN of its own, and libraries disagree on such blocks.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) if the slices differ in length; nothing is written then.
pub fn encode_mx_block<T: Real>(element: Format, rule: ScaleRule, x: &[T], codes: &mut [u8]) -> Result<E8M0> {
    length("block codes", codes.len(), x.len())?;
    let scale = rule.scale(element, amax(x));
    match scale.exponent() {
        None => codes.fill(0),
        Some(e) => {
            // 2^-e is a subnormal f32 for e = 127 and exact all the same. A product that leaves f32's range lies far outside
            // every element's: it saturates, or rounds to a signed zero, as the exact quotient does.
            let reciprocal = E8M0::from_exponent(-e).to_f32();
            encode_with(element, x, codes, |x| x * reciprocal);
        }
    }
    Ok(scale)
}

/// Codes of `scaled(x)`, saturating. The slices are as long as each other.
pub(crate) fn encode_with<T: Real>(element: Format, x: &[T], codes: &mut [u8], scaled: impl Fn(f32) -> f32) {
    for (code, &x) in codes.iter_mut().zip(x) {
        *code = element.encode(scaled(x.to_f32()), Overflow::Saturate);
    }
}

/// Bits of an f32 without its sign; magnitudes order as their bits do, infinity and NaN last.
fn magnitude(x: f32) -> u32 {
    x.to_bits() & 0x7FFF_FFFF
}

/// Bits of infinity: the smallest magnitude that is not finite.
const INFINITE: u32 = 0x7F80_0000;

/// The largest magnitude; infinite or NaN if any element is, 0 of nothing.
pub(crate) fn amax<T: Real>(x: &[T]) -> f32 {
    f32::from_bits(x.iter().fold(0, |m, &x| m.max(magnitude(x.to_f32()))))
}

/// The largest finite magnitude, 0 if there is none.
pub(crate) fn finite_amax<T: Real>(x: &[T]) -> f32 {
    let finite = |x: f32| if magnitude(x) < INFINITE { magnitude(x) } else { 0 };
    f32::from_bits(x.iter().fold(0, |m, &x| m.max(finite(x.to_f32()))))
}

/// Packs 4-bit codes in pairs, the even element in the low nibble. `codes` is twice as long as `bytes`.
pub(crate) fn pack_nibbles(codes: &[u8], bytes: &mut [u8]) {
    let (pairs, _) = codes.as_chunks::<2>();
    for (byte, [low, high]) in bytes.iter_mut().zip(pairs) {
        *byte = low & 15 | high << 4;
    }
}
