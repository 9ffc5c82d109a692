//! The canonical dot product of rows with a panel: what attention is made of.
#![forbid(unsafe_code)]

use super::simd::{LANES, STEP, Simd};
use super::tier::{Kernel, Tier};

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
    /// Whether subnormal results must be looked for and flushed; false only where
    /// [`flush_free`](super::flush_free) proves there are none.
    pub(crate) flush: bool,
}

impl Tier {
    /// `acc[r] += a[r] . b` in the canonical order (docs/numerics.md): for each step two chains, even and odd k, of fused
    /// multiply-adds in ascending order from zero; then `acc = acc + (even + odd)`; subnormals flushed.
    ///
    /// `a` and `b` hold no subnormals. Slices that are too short for their extents stop the call with a panic of slice
    /// indexing, never with a wild access; callers size them.
    pub(crate) fn panel_dot(self, dot: PanelDot<'_>, acc: &mut [[f32; LANES]]) {
        self.run(Rows { dot, acc });
    }
}

struct Rows<'a> {
    dot: PanelDot<'a>,
    acc: &'a mut [[f32; LANES]],
}

impl Kernel for Rows<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Rows { dot, acc } = self;
        if dot.flush { rows::<S, true>(s, dot, acc) } else { rows::<S, false>(s, dot, acc) }
    }
}

#[inline(always)]
fn rows<S: Simd, const FLUSH: bool>(s: S, dot: PanelDot<'_>, acc: &mut [[f32; LANES]]) {
    // As many rows at once as there are registers for two chains each.
    let mut at = 0;
    while const { S::REGISTERS.chains >= 8 && !FLUSH } && acc.len() - at >= 4 {
        steps::<S, 4, FLUSH>(s, dot, at, &mut acc[at..]);
        at += 4;
    }
    while acc.len() - at >= 2 {
        steps::<S, 2, FLUSH>(s, dot, at, &mut acc[at..]);
        at += 2;
    }
    if at < acc.len() {
        steps::<S, 1, FLUSH>(s, dot, at, &mut acc[at..]);
    }
}

#[inline(always)]
fn steps<S: Simd, const R: usize, const FLUSH: bool>(s: S, dot: PanelDot<'_>, row: usize, acc: &mut [[f32; LANES]]) {
    let (lo, hi) = dot.k;
    let mut a: [&[f32]; R] = [&[]; R];
    let mut sums = [s.splat(0.0); R];
    for r in 0..R {
        a[r] = &dot.a[(row + r) * dot.a_stride..][..hi];
        sums[r] = s.load(&acc[r]);
    }
    let mut first = lo / STEP * STEP;
    while first < hi {
        let (start, end) = (first.max(lo), (first + STEP).min(hi));
        let (mut even, mut odd) = ([s.splat(0.0); R], [s.splat(0.0); R]);
        let mut k = start;
        if k % 2 == 1 {
            chain::<S, R, FLUSH>(s, &dot, &a, k, &mut odd);
            k += 1;
        }
        while k + 1 < end {
            chain::<S, R, FLUSH>(s, &dot, &a, k, &mut even);
            chain::<S, R, FLUSH>(s, &dot, &a, k + 1, &mut odd);
            k += 2;
        }
        if k < end {
            chain::<S, R, FLUSH>(s, &dot, &a, k, &mut even);
        }
        for r in 0..R {
            let step = flushed::<S, FLUSH>(s, s.add(even[r], odd[r]));
            sums[r] = flushed::<S, FLUSH>(s, s.add(sums[r], step));
        }
        first += STEP;
    }
    for r in 0..R {
        s.store(sums[r], &mut acc[r]);
    }
}

#[inline(always)]
fn chain<S: Simd, const R: usize, const FLUSH: bool>(
    s: S,
    dot: &PanelDot<'_>,
    a: &[&[f32]; R],
    k: usize,
    sums: &mut [S::V; R],
) {
    let Some(b) = dot.b[k * dot.b_stride..].first_chunk() else { return };
    let b = s.load(b);
    for r in 0..R {
        sums[r] = flushed::<S, FLUSH>(s, s.fma(s.splat(a[r][k]), b, sums[r]));
    }
}

/// Subnormal results become zero of their sign.
#[inline(always)]
pub(crate) fn flushed<S: Simd, const FLUSH: bool>(s: S, x: S::V) -> S::V {
    if FLUSH { s.flush(x) } else { x }
}
