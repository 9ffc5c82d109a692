//! The portable tier: plain Rust, compiled twice, with and without FMA as a target feature.
//!
//! Without the feature `f32::mul_add` is a library call, some 20 times slower, with the same bits.
#![allow(unsafe_code)] // calls of functions compiled for a detected target feature, nothing else

use crate::cpu::isa::{FmaToken, Isa};
use crate::num::F4E2M1x2;

/// Columns of a panel: outputs computed side by side, each in a lane of its own.
pub(crate) const LANES: usize = 16;

/// Elements along k after which the two chains are added to the accumulator: one MX block, one AMX tile row.
pub(crate) const STEP: usize = 32;

/// Rows of `a` that share one pass over a panel. Four chains of two 8-lane registers each fill half of AVX2's file.
const ROWS: usize = 2;

/// A tier this machine was found to have.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tier(Option<FmaToken>);

/// Operands of [`Tier::panel_dot`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct PanelDot<'a> {
    /// Rows, `a_stride` elements apart: element k of row r is `a[r * a_stride + k]`.
    pub(crate) a: &'a [f32],
    pub(crate) a_stride: usize,
    /// Panel: the lanes of k are `b[k * b_stride ..][..LANES]`.
    pub(crate) b: &'a [f32],
    pub(crate) b_stride: usize,
    /// Range of k; steps of 32 are counted from k = 0, so a range may begin and end inside a step.
    pub(crate) k: (usize, usize),
    /// Whether subnormal results must be looked for and flushed; false only where [`flush_free`] proves there are none.
    pub(crate) flush: bool,
}

impl Tier {
    pub(crate) fn detect() -> Self {
        Tier(FmaToken::detect())
    }

    pub(crate) const fn baseline() -> Self {
        Tier(None)
    }

    pub(crate) fn isa(self) -> Isa {
        if self.0.is_some() { Isa::Fma } else { Isa::Baseline }
    }

    /// `acc[r] += a[r] . b` in the canonical order (docs/numerics.md): for each step two chains, even and odd k, of fused
    /// multiply-adds in ascending order from zero; then `acc = acc + (even + odd)`; subnormals flushed.
    ///
    /// `a` and `b` hold no subnormals. Slices that are too short for their extents stop the call with a panic of slice
    /// indexing, never with a wild access; callers size them.
    pub(crate) fn panel_dot(self, dot: PanelDot<'_>, acc: &mut [[f32; LANES]]) {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Some(FmaToken { .. }) => {
                // SAFETY: the token exists only if AVX2 and FMA were detected on this CPU.
                unsafe { panel_dot_fma(dot, acc) }
            }
            _ => panel_dot(dot, acc),
        }
    }

    /// `acc[r][l] = fma(part[r][l], a[r] * w[l], acc[r][l])`: adds a scale block's partial sums. IEEE f32, nothing flushed.
    pub(crate) fn add_scaled(self, part: &[[f32; LANES]], a: &[f32], w: &[f32; LANES], acc: &mut [[f32; LANES]]) {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Some(FmaToken { .. }) => {
                // SAFETY: the token exists only if AVX2 and FMA were detected on this CPU.
                unsafe { add_scaled_fma(part, a, w, acc) }
            }
            _ => add_scaled(part, a, w, acc),
        }
    }

    /// Decodes FP4 words to f32 times a scale for each lane; see [`decode_fp4`].
    pub(crate) fn decode_fp4(self, words: &[u8], scales: &[f32; LANES], out: &mut [f32]) {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Some(FmaToken { .. }) => {
                // SAFETY: the token exists only if AVX2 and FMA were detected on this CPU.
                unsafe { decode_fp4_fma(words, scales, out) }
            }
            _ => decode_fp4(words, scales, out),
        }
    }

    /// Decodes FP8 words by table to f32 times a scale for each lane; see [`decode_fp8`].
    pub(crate) fn decode_fp8(self, values: &[f32; 256], words: &[u8], scales: &[f32; LANES], out: &mut [f32]) {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Some(FmaToken { .. }) => {
                // SAFETY: the token exists only if AVX2 and FMA were detected on this CPU.
                unsafe { decode_fp8_fma(values, words, scales, out) }
            }
            _ => decode_fp8(values, words, scales, out),
        }
    }
}

/// A computation that the tier's compilation applies to. Implementations mark `run`, and what it calls in its inner loop,
/// `#[inline(always)]`: only what is inlined is compiled with the tier's features.
pub(crate) trait Kernel {
    fn run(self);
}

impl Tier {
    /// Runs a kernel written elsewhere, compiled for this tier.
    pub(crate) fn run(self, kernel: impl Kernel) {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Some(FmaToken { .. }) => {
                // SAFETY: the token exists only if AVX2 and FMA were detected on this CPU.
                unsafe { run_fma(kernel) }
            }
            _ => kernel.run(),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_fma(kernel: impl Kernel) {
    kernel.run();
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn panel_dot_fma(dot: PanelDot<'_>, acc: &mut [[f32; LANES]]) {
    panel_dot(dot, acc);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn add_scaled_fma(part: &[[f32; LANES]], a: &[f32], w: &[f32; LANES], acc: &mut [[f32; LANES]]) {
    add_scaled(part, a, w, acc);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn decode_fp4_fma(words: &[u8], scales: &[f32; LANES], out: &mut [f32]) {
    decode_fp4(words, scales, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn decode_fp8_fma(values: &[f32; 256], words: &[u8], scales: &[f32; LANES], out: &mut [f32]) {
    decode_fp8(values, words, scales, out);
}

#[inline(always)]
fn panel_dot(dot: PanelDot<'_>, acc: &mut [[f32; LANES]]) {
    if dot.flush { rows::<true>(dot, acc) } else { rows::<false>(dot, acc) }
}

#[inline(always)]
fn rows<const FLUSH: bool>(dot: PanelDot<'_>, acc: &mut [[f32; LANES]]) {
    let mut at = 0;
    let mut pairs = acc.chunks_exact_mut(ROWS);
    for pair in &mut pairs {
        if let [first, second] = pair {
            steps::<ROWS, FLUSH>(dot, at, [first, second]);
        }
        at += ROWS;
    }
    for last in pairs.into_remainder() {
        steps::<1, FLUSH>(dot, at, [last]);
        at += 1;
    }
}

#[inline(always)]
fn steps<const R: usize, const FLUSH: bool>(dot: PanelDot<'_>, row: usize, acc: [&mut [f32; LANES]; R]) {
    let (lo, hi) = dot.k;
    let a: [&[f32]; R] = std::array::from_fn(|r| &dot.a[(row + r) * dot.a_stride..][..hi]);
    let mut sums: [[f32; LANES]; R] = std::array::from_fn(|r| *acc[r]);
    let mut first = lo / STEP * STEP;
    while first < hi {
        let (start, end) = (first.max(lo), (first + STEP).min(hi));
        let mut chains = [[[0.0f32; LANES]; R]; 2];
        if end - start == STEP {
            for k in (first..first + STEP).step_by(2) {
                chain::<R, FLUSH>(&dot, &a, k, &mut chains[0]);
                chain::<R, FLUSH>(&dot, &a, k + 1, &mut chains[1]);
            }
        } else {
            for k in start..end {
                chain::<R, FLUSH>(&dot, &a, k, &mut chains[k % 2]);
            }
        }
        for r in 0..R {
            for (l, sum) in sums[r].iter_mut().enumerate() {
                let step = flushed::<FLUSH>(chains[0][r][l] + chains[1][r][l]);
                *sum = flushed::<FLUSH>(*sum + step);
            }
        }
        first += STEP;
    }
    for (acc, sums) in acc.into_iter().zip(sums) {
        *acc = sums;
    }
}

#[inline(always)]
fn chain<const R: usize, const FLUSH: bool>(
    dot: &PanelDot<'_>,
    a: &[&[f32]; R],
    k: usize,
    sums: &mut [[f32; LANES]; R],
) {
    let b = &dot.b[k * dot.b_stride..][..LANES];
    for r in 0..R {
        let x = a[r][k];
        for l in 0..LANES {
            sums[r][l] = flushed::<FLUSH>(x.mul_add(b[l], sums[r][l]));
        }
    }
}

#[inline(always)]
fn add_scaled(part: &[[f32; LANES]], a: &[f32], w: &[f32; LANES], acc: &mut [[f32; LANES]]) {
    for ((part, &a), acc) in part.iter().zip(a).zip(acc) {
        for l in 0..LANES {
            acc[l] = part[l].mul_add(a * w[l], acc[l]);
        }
    }
}

/// Subnormal results become zero of their sign.
#[inline(always)]
fn flushed<const FLUSH: bool>(x: f32) -> f32 {
    if FLUSH { flush(x) } else { x }
}

/// Subnormals become zero of their sign; NaN stays.
#[inline(always)]
pub(crate) fn flush(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0.0f32.copysign(x) } else { x }
}

/// Decodes `words`: for each word w and lane l four bytes at `(w * LANES + l) * 4`, eight FP4 codes of ascending k from the
/// lowest nibble. `out[(8 * w + i) * LANES + l]` is code i of the word times the lane's scale, subnormals flushed.
#[inline(always)]
fn decode_fp4(words: &[u8], scales: &[f32; LANES], out: &mut [f32]) {
    for (words, out) in words.chunks_exact(4 * LANES).zip(out.chunks_exact_mut(8 * LANES)) {
        for (i, out) in out.chunks_exact_mut(LANES).enumerate() {
            for l in 0..LANES {
                let byte = words[4 * l + i / 2];
                let code = if i % 2 == 0 { byte & 15 } else { byte >> 4 };
                out[l] = flush(F4E2M1x2::VALUES[code as usize] * scales[l]);
            }
        }
    }
}

/// Decodes `words`: for each word w and lane l four bytes at `(w * LANES + l) * 4`, FP8 codes of ascending k.
/// `out[(4 * w + i) * LANES + l]` is code i of the word times the lane's scale, subnormals flushed.
#[inline(always)]
fn decode_fp8(values: &[f32; 256], words: &[u8], scales: &[f32; LANES], out: &mut [f32]) {
    for (words, out) in words.chunks_exact(4 * LANES).zip(out.chunks_exact_mut(4 * LANES)) {
        for (i, out) in out.chunks_exact_mut(LANES).enumerate() {
            for l in 0..LANES {
                out[l] = flush(values[words[4 * l + i] as usize] * scales[l]);
            }
        }
    }
}
