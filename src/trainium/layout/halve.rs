//! E4M3FN bytes halved for Trainium2.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::num::BridgeReport;

/// Magnitude bits of NaN in E4M3FN, and of the NaN that it becomes in IEEE E4M3.
const NAN: u8 = 0x7F;
const IEEE_NAN: u8 = 0x7C;

/// [`halve_for_ieee`](crate::num::halve_for_ieee) without branches, so that it runs at the speed of the copy around it; the number of
/// codes that rounded.
pub(super) fn halve(codes: &mut [u8]) -> usize {
    let mut rounded = 0;
    // At most 255 codes at a time: their count fits the byte it is summed in.
    for codes in codes.chunks_mut(128) {
        let mut odd = 0u8;
        for code in codes {
            let magnitude = *code & 0x7F;
            // Subnormals and the first binade are steps of 2^-9 alike: half as many, ties to even.
            let few = (magnitude + (magnitude >> 1 & 1)) >> 1;
            // Above, the exponent falls by one. NaN has no exponent to lower.
            let lowered = if magnitude == NAN { IEEE_NAN } else { magnitude.wrapping_sub(8) };
            let small = magnitude < 0x10;
            odd += u8::from(small) & magnitude & 1;
            *code = *code & 0x80 | if small { few } else { lowered };
        }
        rounded += usize::from(odd);
    }
    rounded
}

/// The report for `codes` codes of which `rounded` rounded: none can overflow.
pub(super) fn halved(codes: usize, rounded: usize) -> BridgeReport {
    BridgeReport { exact: codes.saturating_sub(rounded), rounded, overflowed: 0 }
}

/// Twice a scale.
///
/// # Errors
/// [`Error::Value`] if that is not finite.
pub(super) fn doubled(operand: &'static str, scales: &mut [f32]) -> Result<()> {
    for (at, scale) in scales.iter_mut().enumerate() {
        let got = *scale;
        *scale *= 2.0;
        if !scale.is_finite() {
            let needed = "a scale that can be doubled";
            return Err(Error::Value { operand: operand.into(), at, got: got.to_string(), needed });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::num::halve_for_ieee;

    #[test]
    fn every_code_halves_as_the_bridge_says() {
        for code in 0..=u8::MAX {
            let (mut fast, mut slow) = ([code], [code]);
            let rounded = halve(&mut fast);
            let report = halve_for_ieee(&mut slow);
            assert_eq!((fast, halved(1, rounded)), (slow, report), "{code:#x}");
        }
        let mut all: Vec<u8> = (0..1000).map(|i| i as u8).collect();
        let mut same = all.clone();
        assert_eq!(halve(&mut all), halve_for_ieee(&mut same).rounded);
        assert_eq!(all, same);
    }
}
