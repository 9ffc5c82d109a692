//! E4M3FN bytes halved for Trainium2, by table.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::num::{BridgeReport, halve_for_ieee};

/// The bridge of [`halve_for_ieee`] for all 256 codes.
pub(super) struct Halving {
    code: [u8; 256],
    rounds: [bool; 256],
}

impl Halving {
    pub(super) fn new() -> Self {
        let mut code: [u8; 256] = std::array::from_fn(|c| c as u8);
        let rounds = std::array::from_fn(|c| halve_for_ieee(&mut code[c..=c]).rounded > 0);
        Halving { code, rounds }
    }

    /// Halves in place; the number of codes that rounded.
    pub(super) fn apply(&self, codes: &mut [u8]) -> usize {
        let mut rounded = 0;
        for code in codes {
            rounded += usize::from(self.rounds[usize::from(*code)]);
            *code = self.code[usize::from(*code)];
        }
        rounded
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
