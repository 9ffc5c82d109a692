//! E4M3FN bytes halved for Trainium2, by table.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::num::{BridgeReport, halve_for_ieee};

/// The bridge of [`halve_for_ieee`] for all 256 codes: the new code in the low byte, 1 in the high byte if it rounded.
pub(super) struct Halving([u16; 256]);

impl Halving {
    pub(super) fn new() -> Self {
        Halving(std::array::from_fn(|code| {
            let mut byte = [code as u8];
            let rounded = halve_for_ieee(&mut byte).rounded;
            u16::from_le_bytes([byte[0], u8::from(rounded > 0)])
        }))
    }

    /// Halves in place; the number of codes that rounded.
    pub(super) fn apply(&self, codes: &mut [u8]) -> usize {
        let mut rounded = 0;
        for code in codes {
            let [new, rounds] = self.0[usize::from(*code)].to_le_bytes();
            *code = new;
            rounded += u32::from(rounds);
        }
        rounded as usize
    }

    /// The report for `codes` codes of which `rounded` rounded: none can overflow.
    pub(super) fn report(codes: usize, rounded: usize) -> BridgeReport {
        BridgeReport { exact: codes.saturating_sub(rounded), rounded, overflowed: 0 }
    }
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
