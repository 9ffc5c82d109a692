//! Where a packed matrix's codes and scales lie.
#![forbid(unsafe_code)]

use crate::cpu::{LANES, LINE, STEP};
use crate::error::{Error, Result, mul};
use crate::quant::Scheme;
use std::fmt;
use std::ops::Range;

/// Steps of 32 along k that share a block of scales.
pub(super) const GROUP: usize = 4;

/// The packed layout of weights `[n, k]`, the same for every tier.
///
/// Panels of 16 rows (n) follow each other; a panel is groups of 4 steps of 32 along k, the last one perhaps shorter. A group holds
/// the block scales of its steps (a byte for each of the 16 rows, twice for NVFP4's blocks of 16), filled up to 64 bytes, then the
/// codes of its steps, 64-byte lines of all 16 rows:
///
/// | codes | a line holds | of row l |
/// |---|---|---|
/// | FP4 | 8 k | word l (32 bits): nibbles k0 k2 k4 k6 k1 k3 k5 k7 from the lowest |
/// | FP8 | 4 k | bytes 2l, 2l + 1: k0, k1; bytes 32 + 2l, 33 + 2l: k2, k3 |
/// | bf16 | 2 k | word l: k0 in the low half, k1 in the high half; subnormals are zero |
///
/// So even and odd k, which the canonical sum keeps apart, come from one register by one shift, as f32 and as the bf16 pairs that
/// AMX takes; two such registers unpacked are the pairs of k and k + 2 that AVX-512 BF16 takes. Rows past n and columns past k are zero; a block of zeros has scale 1. Everything begins at a multiple of 64 bytes.
/// f32 scales lie beside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedLayout {
    scheme: Scheme,
    n: usize,
    k: usize,
    panel_bytes: usize,
    bytes: usize,
}

impl PackedLayout {
    /// Changes with every change of the order of bytes, or of the file around them. Version 1 was never written to a file; version 2
    /// has the same order, its files said what is now found in the packed bytes.
    pub const VERSION: u32 = 3;

    /// Of weights `[n, k]`.
    ///
    /// # Errors
    /// [`Error::Overflow`] if the bytes cannot be counted.
    pub fn new(scheme: Scheme, n: usize, k: usize) -> Result<Self> {
        k.checked_next_multiple_of(STEP).ok_or(Error::Overflow { operand: "packed weights".into() })?;
        let steps = k.div_ceil(STEP);
        let layout = PackedLayout { scheme, n, k, panel_bytes: 0, bytes: 0 };
        let rest = steps % GROUP;
        let last = if rest == 0 { 0 } else { layout.scale_area(rest) + rest * layout.step_bytes() };
        let panel_bytes = mul("packed weights", steps / GROUP, layout.group_bytes())?
            .checked_add(last)
            .ok_or(Error::Overflow { operand: "packed weights".into() })?;
        let bytes = mul("packed weights", layout.panels(), panel_bytes)?;
        Ok(PackedLayout { panel_bytes, bytes, ..layout })
    }

    /// The scheme.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Rows: output channels.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Columns: the contraction axis.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Panels of 16 rows.
    pub fn panels(&self) -> usize {
        self.n.div_ceil(LANES)
    }

    /// Steps of 32 along k.
    pub fn steps(&self) -> usize {
        self.k.div_ceil(STEP)
    }

    /// Bytes of one panel.
    pub fn panel_bytes(&self) -> usize {
        self.panel_bytes
    }

    /// Bytes of codes and block scales.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes of a step's codes.
    pub(super) const fn step_bytes(&self) -> usize {
        STEP * LANES * self.scheme.bits() / 8
    }

    /// Bytes of a step's block scales.
    pub(super) const fn step_scales(&self) -> usize {
        match self.scheme.block() {
            1 => 0,
            block => STEP / block * LANES,
        }
    }

    /// Bytes of the scales of a group of so many steps.
    pub(super) const fn scale_area(&self, steps: usize) -> usize {
        (steps * self.step_scales()).next_multiple_of(LINE)
    }

    /// Bytes of a whole group.
    pub(super) const fn group_bytes(&self) -> usize {
        self.scale_area(GROUP) + GROUP * self.step_bytes()
    }

    /// Where the scales and the codes of a step lie in its panel.
    pub(super) fn step(&self, step: usize) -> (Range<usize>, Range<usize>) {
        let (group, at) = (step / GROUP, step % GROUP);
        let first = group * self.group_bytes();
        let codes = first + self.scale_area(GROUP.min(self.steps() - group * GROUP)) + at * self.step_bytes();
        let scales = first + at * self.step_scales();
        (scales..scales + self.step_scales(), codes..codes + self.step_bytes())
    }
}

impl fmt::Display for PackedLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PackedLayout { scheme, n, k, bytes, .. } = self;
        write!(
            f,
            "packed layout v{}: {scheme:?} [{n}, {k}] in {} panels of 16 rows, {} steps of 32, {bytes} bytes",
            Self::VERSION,
            self.panels(),
            self.steps(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::num::Fp8;

    #[test]
    fn steps_tile_the_panel() {
        for scheme in
            [Scheme::Mxfp4, Scheme::Nvfp4, Scheme::Mxfp8(Fp8::E5M2), Scheme::Fp8PerTensor(Fp8::E3M4), Scheme::Bf16]
        {
            for k in [0, 16, 32, 96, 128, 160, 2880] {
                let layout = PackedLayout::new(scheme, 40, k).unwrap();
                let mut covered = vec![0u8; layout.panel_bytes()];
                for step in 0..layout.steps() {
                    let (scales, codes) = layout.step(step);
                    assert_eq!(codes.start % LINE, 0);
                    covered[scales].iter_mut().chain(&mut []).for_each(|c| *c += 1);
                    covered[codes].iter_mut().for_each(|c| *c += 1);
                }
                assert!(covered.iter().all(|c| *c <= 1), "{layout}");
                let filling = covered.iter().filter(|c| **c == 0).count();
                assert!(filling < LINE, "{layout}: {filling} bytes of filling");
                assert_eq!(layout.bytes(), 3 * layout.panel_bytes());
            }
        }
        assert!(PackedLayout::new(Scheme::Bf16, 1, usize::MAX).is_err());
        assert!(PackedLayout::new(Scheme::Mxfp4, usize::MAX, 32).is_err());
    }
}
