//! Packed bytes that someone else wrote: refused if packing does not write such, and what is to be known of them.
#![forbid(unsafe_code)]

use super::coding::decode_any;
use super::facts::Seen;
use super::layout::{GROUP, PackedLayout};
use super::packed::Facts;
use crate::cpu::{Kernel, LANES, STEP, Simd};
use crate::quant::Scheme;

/// Something that packing does not write: where in the panel, what it is, what packing writes.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Foreign {
    pub(super) at: usize,
    pub(super) got: String,
    pub(super) needed: &'static str,
}

/// Checks panel `panel`, whose bytes are `bytes`.
pub(super) struct Check<'a> {
    pub(super) layout: PackedLayout,
    pub(super) panel: usize,
    pub(super) bytes: &'a [u8],
    pub(super) found: &'a mut Result<Facts, Foreign>,
}

impl Kernel for Check<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        *self.found = match self.layout.scheme().bits() {
            4 => check::<S, 1>(s, self.layout, self.panel, self.bytes),
            8 => check::<S, 2>(s, self.layout, self.panel, self.bytes),
            _ => check::<S, 4>(s, self.layout, self.panel, self.bytes),
        };
    }
}

#[inline(always)]
fn check<S: Simd, const Q: usize>(s: S, layout: PackedLayout, panel: usize, bytes: &[u8]) -> Result<Facts, Foreign> {
    let mut seen = Seen::new();
    for (g, group) in bytes.chunks(layout.group_bytes()).enumerate() {
        let steps = GROUP.min(layout.steps() - g * GROUP);
        let (area, codes) = group.split_at(layout.scale_area(steps));
        let scales = &area[..steps * layout.step_scales()];
        let mut packed = [0; 2 * GROUP * LANES];
        let packed = &mut packed[..scales.len()];
        packed.copy_from_slice(scales);
        seen.group::<Q>(layout.scheme(), codes, packed);
        if let Some(i) = packed.iter().zip(scales).position(|(packed, scale)| packed != scale) {
            let got = format!("block scale code {:#04x}", scales[i]);
            return Err(Foreign { at: g * layout.group_bytes() + i, got, needed: packed_scale(layout.scheme()) });
        }
    }
    if seen.subnormal() {
        return Err(Foreign { at: 0, got: "a subnormal bf16".into(), needed: "subnormals packed as zeros" });
    }
    if let Some(step) = filled(s, layout, panel, bytes) {
        let at = layout.step(step).1.start;
        return Err(Foreign { at, got: "another value".into(), needed: "zeros past n and k" });
    }
    Ok(seen.facts(s, layout, bytes))
}

fn packed_scale(scheme: Scheme) -> &'static str {
    match scheme {
        Scheme::Nvfp4 => "an NVFP4 block scale without the sign bit",
        _ => "scale 1 (code 0x7f) where a block is zeros",
    }
}

/// The first step that is not zero past n or past k.
#[inline(always)]
fn filled<S: Simd>(s: S, layout: PackedLayout, panel: usize, bytes: &[u8]) -> Option<usize> {
    let rows = (layout.n() - panel * LANES).min(LANES);
    let first = if rows < LANES { 0 } else { layout.k() / STEP };
    let mut values = [[0.0; LANES]; STEP];
    (first..layout.steps()).find(|step| {
        let (scales, codes) = layout.step(*step);
        decode_any(s, layout.scheme(), &bytes[scales], &bytes[codes], &mut values);
        let columns = layout.k() - step * STEP;
        let past = |k: usize| if k < columns { rows } else { 0 };
        values.iter().enumerate().any(|(k, values)| values[past(k)..].iter().any(|v| v.to_bits() != 0))
    })
}
