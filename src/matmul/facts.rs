//! What is to be known of packed weights, gathered from their packed bytes: by packing, and of bytes that someone else packed.
#![forbid(unsafe_code)]

use super::coding::decode_any;
use super::layout::PackedLayout;
use super::packed::{Facts, code_range};
use crate::cpu::{LANES, LINE, Range, STEP, Simd, Smallest};
use crate::quant::Scheme;

/// What is gathered of a panel, lane by lane.
pub(super) struct Seen {
    /// Least and largest scale code of blocks that are not zero.
    least: [u8; LANES],
    most: [u8; LANES],
    /// Whether a scale is NaN.
    nan: bool,
    /// Largest magnitude byte of FP8 codes.
    largest_code: [u8; LINE],
    /// Smallest magnitude of bf16 less one (so zero is the largest), largest magnitude.
    smallest: [u16; LINE / 2],
    largest: [u16; LINE / 2],
}

impl Seen {
    pub(super) fn new() -> Seen {
        Seen {
            least: [255; LANES],
            most: [0; LANES],
            nan: false,
            largest_code: [0; LINE],
            smallest: [u16::MAX; LINE / 2],
            largest: [0; LINE / 2],
        }
    }

    /// Takes in the packed codes and the block scales of a group's steps, Q lines for 8 k. Makes the scales what packed scales are:
    /// blocks of zeros get scale 1, NVFP4's have no sign.
    #[inline(always)]
    pub(super) fn group<const Q: usize>(&mut self, scheme: Scheme, codes: &[u8], scales: &mut [u8]) {
        let lines = codes.as_chunks::<LINE>().0;
        for line in lines {
            self.line::<Q>(line);
        }
        let scales = scales.as_chunks_mut::<LANES>().0;
        if scheme == Scheme::Nvfp4 {
            scales.iter_mut().for_each(|scales| self.e4m3_scales(scales));
        } else {
            for (scales, block) in scales.iter_mut().zip(lines.chunks_exact(4 * Q)) {
                self.e8m0_scales::<Q>(scales, block);
            }
        }
    }

    /// Takes in a line of codes.
    #[inline(always)]
    fn line<const Q: usize>(&mut self, line: &[u8; LINE]) {
        if Q == 2 {
            for (largest, code) in self.largest_code.iter_mut().zip(line) {
                *largest = (*largest).max(code & 0x7F);
            }
        }
        if Q == 4 {
            let values: [u16; LINE / 2] = bytemuck::cast(*line);
            for ((smallest, largest), value) in self.smallest.iter_mut().zip(&mut self.largest).zip(values) {
                let magnitude = u16::from_le(value) & 0x7FFF;
                *smallest = (*smallest).min(magnitude.wrapping_sub(1));
                *largest = (*largest).max(magnitude);
            }
        }
    }

    #[inline(always)]
    fn e4m3_scales(&mut self, scales: &mut [u8; LANES]) {
        for scale in scales {
            *scale &= 0x7F;
            self.nan |= *scale == 0x7F;
        }
    }

    /// Takes in the scales of a block of each row, whose codes are `lines`.
    #[inline(always)]
    fn e8m0_scales<const Q: usize>(&mut self, scales: &mut [u8; LANES], lines: &[[u8; LINE]]) {
        let magnitudes = if Q == 1 { 0x77 } else { 0x7F };
        let mut any = [0; LINE];
        for line in lines {
            for i in 0..LINE {
                any[i] |= line[i] & magnitudes;
            }
        }
        let mut of_row = [0u32; LANES];
        if Q == 1 {
            of_row = bytemuck::cast(any);
        } else {
            // Half of an FP8 line each: bytes 2l and 2l + 1 are of row l.
            let halves: [[u16; LANES]; 2] = bytemuck::cast(any);
            for l in 0..LANES {
                of_row[l] = u32::from(halves[0][l] | halves[1][l]);
            }
        }
        let mut nan = 0;
        for l in 0..LANES {
            let zero = of_row[l] == 0;
            let is_nan = scales[l] == 255;
            nan |= u8::from(is_nan);
            self.least[l] = self.least[l].min(if zero { 255 } else { scales[l] });
            self.most[l] = self.most[l].max(if zero | is_nan { 0 } else { scales[l] });
            scales[l] = if zero & !is_nan { 127 } else { scales[l] };
        }
        self.nan |= nan != 0;
    }

    /// Whether a bf16 is subnormal, which no packed one is.
    pub(super) fn subnormal(&self) -> bool {
        self.smallest.iter().any(|less_one| *less_one < 0x7F)
    }

    /// The facts of a panel all of whose groups were taken in.
    #[inline(always)]
    pub(super) fn facts<S: Simd>(self, s: S, layout: PackedLayout, panel: &[u8]) -> Facts {
        let mut facts = self.bounds(layout.scheme());
        if facts.top > 127 && facts.finite {
            // A bound is not a value: look whether any leaves f32's range.
            let mut values = [[0.0; LANES]; STEP];
            for step in 0..layout.steps() {
                let (scales, codes) = layout.step(step);
                decode_any(s, layout.scheme(), &panel[scales], &panel[codes], &mut values);
                facts.finite &= values.as_flattened().iter().fold(true, |all, v| all & v.is_finite());
            }
        }
        facts
    }

    fn bounds(self, scheme: Scheme) -> Facts {
        let Some(format) = scheme.element() else {
            let mut range = Range::new(Smallest::BF16);
            let value = |bits: u16| f32::from_bits(u32::from(bits) << 16);
            range.see(&self.smallest.map(|bits| value(bits.wrapping_add(1))));
            range.see(&self.largest.map(value));
            let (grid, top) = (range.smallest.grid(), range.top());
            return Facts { grid, top, finite: top <= 128, exact: true };
        };
        let (grid, top) = code_range(format);
        let largest_code = self.largest_code.iter().fold(0, |m, code| m.max(*code));
        let least = self.least.iter().fold(255, |m, scale| m.min(*scale));
        let most = self.most.iter().fold(0, |m, scale| m.max(*scale));
        let finite = !self.nan && (scheme.bits() == 4 || largest_code <= format.max_code());
        match scheme {
            Scheme::Mxfp4 | Scheme::Mxfp8(_) if least > most => Facts { finite, ..Facts::NONE },
            Scheme::Mxfp4 | Scheme::Mxfp8(_) => {
                let (least, most) = (i32::from(least) - 127, i32::from(most) - 127);
                // Code 0 is 2^-127, which kernels that make powers of two by shifts do not know.
                let exact = grid + least >= -126 && top + most <= 127 && least > -127;
                Facts { grid: Some(grid + least), top: top + most, finite, exact }
            }
            // An E4M3FN scale is a multiple of 2^-9 and below 2^9.
            Scheme::Nvfp4 => Facts { grid: Some(grid - 9), top: top + 9, finite, exact: true },
            _ => Facts { grid: Some(grid), top, finite, exact: true },
        }
    }
}
