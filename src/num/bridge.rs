//! E4M3FN codes for a device that reads E4M3 IEEE (Trainium1 and Trainium2).
#![forbid(unsafe_code)]

use super::format::{Format, Overflow};
use super::fp8::{F8E4M3Fn, F8E4M3Ieee};

/// What became of the codes of a conversion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BridgeReport {
    /// Codes whose value is unchanged (times two for [`halve_for_ieee`]); NaN counts as exact.
    pub exact: usize,
    /// Codes whose value was rounded.
    pub rounded: usize,
    /// Codes beyond the largest IEEE value, saturated to 240.
    pub overflowed: usize,
}

/// Rewrites E4M3FN codes as the E4M3 IEEE codes of the same values, in place, under the same scale.
///
/// Magnitudes up to 240 keep their byte. The seven codes from 256 to 448 saturate to 240 and count as overflowed: use
/// [`halve_for_ieee`] when there are any. NaN stays NaN. Source: facts of the two formats, magnitudes 0x00..=0x77 agree.
pub fn to_ieee(codes: &mut [u8]) -> BridgeReport {
    rewrite(codes, 1.0)
}

/// Rewrites E4M3FN codes as E4M3 IEEE codes of *half* their values, in place: the caller doubles the scale.
///
/// 448 becomes 224, so nothing overflows. Only the odd codes below magnitude 0x10 round (their halves lie between two
/// subnormals, ties go to even): the error is 2^-9 of the old scale, half of a subnormal step of the new one.
pub fn halve_for_ieee(codes: &mut [u8]) -> BridgeReport {
    rewrite(codes, 0.5)
}

fn rewrite(codes: &mut [u8], factor: f32) -> BridgeReport {
    let mut report = BridgeReport::default();
    for code in codes {
        let wanted = F8E4M3Fn::from_bits(*code).to_f32() * factor;
        let new = F8E4M3Ieee::from_f32(wanted, Overflow::Saturate);
        *code = new.to_bits();
        if wanted.is_nan() || new.to_f32() == wanted {
            report.exact += 1;
        } else if wanted.abs() > Format::E4M3_IEEE.max() {
            report.overflowed += 1;
        } else {
            report.rounded += 1;
        }
    }
    report
}
