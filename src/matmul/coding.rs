//! How the lines of a packed step become sixteen lanes of f32, or of pairs of bf16, for each kind of code.
#![forbid(unsafe_code)]

use crate::cpu::{FP4_HEADROOM, Fp8Bits, LANES, LINE, Pairs, STEP, Simd};
use crate::num::{E8M0, F8E4M3Fn};
use crate::quant::Scheme;

/// Most k in a line.
pub(super) const MAX_K: usize = 8;

/// A kind of code, as kernels read it where [`Quick`](super::driver::Quick) holds.
pub(super) trait Coding: Copy + Sync {
    /// Lines of codes in a step.
    const LINES: usize;
    /// k in a line.
    const K: usize = STEP / Self::LINES;
    /// Block scales of a row in a step.
    const SCALES: usize;

    /// Panels that the decode kernel takes side by side for one row: 4, or 2 where scales need registers too.
    const PANELS: usize = 4;

    /// Values of line `i` of a step whose block scales are `scales`, ascending k, the first [`Coding::K`] of them; but for what
    /// [`Coding::add`] does, and short of `2^power`.
    fn line<S: Simd>(self, s: S, line: &[u8; LINE], i: usize, scales: &[[u8; LANES]]) -> [S::V; MAX_K];

    /// Exponent of the power of two that values of [`Coding::line`] are short of: the decode kernel's x is multiplied by it.
    fn power(self) -> i32 {
        0
    }

    /// Values of [`Coding::line`] on any tier are less than `2^HEADROOM` times the codes' or the weights'.
    const HEADROOM: i32 = 0;

    /// `acc + sum` for a step's sum of products with values of [`Coding::line`] and x times `2^power`.
    fn add<S: Simd>(self, s: S, sum: S::V, acc: S::V, scales: &[[u8; LANES]]) -> S::V;

    /// As [`Coding::line`], code x block scale.
    fn values<S: Simd>(self, s: S, line: &[u8; LINE], i: usize, scales: &[[u8; LANES]]) -> [S::V; MAX_K];

    /// Values of eight k, the `i`-th of a step, in these lines, as pairs; but for what [`Coding::add`] does.
    fn pairs<S: Pairs>(self, s: S, lines: &[[u8; LINE]], i: usize, scales: &[[u8; LANES]]) -> [[S::V; 2]; 2];

    /// As [`Coding::pairs`], code x block scale.
    #[inline(always)]
    fn paired_values<S: Pairs>(self, s: S, lines: &[[u8; LINE]], i: usize, scales: &[[u8; LANES]]) -> [[S::V; 2]; 2] {
        self.pairs(s, lines, i, scales)
    }
}

/// MXFP4: sums of whole steps are scaled, not elements.
#[derive(Clone, Copy)]
pub(super) struct Mxfp4;

/// NVFP4: its scales are no powers of two, so they multiply elements, as they are defined.
#[derive(Clone, Copy)]
pub(super) struct Nvfp4;

/// bf16.
#[derive(Clone, Copy)]
pub(super) struct Bf16;

/// FP8 without block scales.
#[derive(Clone, Copy)]
pub(super) struct Fp8Plain(pub(super) Fp8Bits);

/// MXFP8: sums of whole steps are scaled, not elements.
#[derive(Clone, Copy)]
pub(super) struct Mxfp8(pub(super) Fp8Bits);

#[inline(always)]
fn fp8<S: Simd>(s: S, line: &[u8; LINE], bits: Fp8Bits) -> [S::V; MAX_K] {
    let [a, b, c, d] = s.fp8(line, bits);
    [a, b, c, d, a, b, c, d]
}

/// Takes back the power of two in values of [`Simd::fp4`].
#[inline(always)]
fn unit_fp4<S: Simd>(s: S, value: S::V) -> S::V {
    if const { S::FP4_POWER == 0 } { value } else { s.mul(value, s.splat(power_of_two(-S::FP4_POWER))) }
}

#[inline(always)]
fn scaled<S: Simd>(s: S, mut values: [S::V; MAX_K], scale: S::V) -> [S::V; MAX_K] {
    // A loop, not `map`: its closure would not be compiled for the tier.
    for value in &mut values {
        *value = s.mul(*value, scale);
    }
    values
}

/// `2^exponent`, a normal number.
fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits(((127 + exponent) as u32) << 23)
}

impl Coding for Mxfp4 {
    const HEADROOM: i32 = FP4_HEADROOM;
    const LINES: usize = 4;
    const SCALES: usize = 1;

    #[inline(always)]
    fn line<S: Simd>(self, s: S, line: &[u8; LINE], _: usize, _: &[[u8; LANES]]) -> [S::V; MAX_K] {
        s.fp4::<false>(line)
    }

    #[inline(always)]
    fn add<S: Simd>(self, s: S, sum: S::V, acc: S::V, scales: &[[u8; LANES]]) -> S::V {
        s.fma(unit_fp4(s, sum), s.e8m0(&scales[0]), acc)
    }

    #[inline(always)]
    fn values<S: Simd>(self, s: S, line: &[u8; LINE], _: usize, scales: &[[u8; LANES]]) -> [S::V; MAX_K] {
        let mut values = s.fp4::<true>(line);
        for value in &mut values {
            *value = unit_fp4(s, *value);
        }
        scaled(s, values, s.e8m0(&scales[0]))
    }

    #[inline(always)]
    fn pairs<S: Pairs>(self, s: S, lines: &[[u8; LINE]], _: usize, _: &[[u8; LANES]]) -> [[S::V; 2]; 2] {
        const { assert!(S::FP4_POWER == 0, "sums of pairs are not short of a power of two") };
        s.fp4_pairs(&lines[0])
    }

    #[inline(always)]
    fn paired_values<S: Pairs>(self, s: S, lines: &[[u8; LINE]], _: usize, scales: &[[u8; LANES]]) -> [[S::V; 2]; 2] {
        s.mxfp4_pairs(&lines[0], &scales[0])
    }
}

impl Nvfp4 {
    /// The block scale of line `i`.
    #[inline(always)]
    fn scale<S: Simd>(s: S, i: usize, scales: &[[u8; LANES]]) -> S::V {
        unit_fp4(s, s.e4m3(&scales[2 * i / Self::LINES]))
    }
}

impl Coding for Nvfp4 {
    const LINES: usize = 4;
    const SCALES: usize = 2;
    const PANELS: usize = 2;

    #[inline(always)]
    fn line<S: Simd>(self, s: S, line: &[u8; LINE], i: usize, scales: &[[u8; LANES]]) -> [S::V; MAX_K] {
        scaled(s, s.fp4::<false>(line), Self::scale(s, i, scales))
    }

    #[inline(always)]
    fn add<S: Simd>(self, s: S, sum: S::V, acc: S::V, _: &[[u8; LANES]]) -> S::V {
        s.add(acc, sum)
    }

    #[inline(always)]
    fn values<S: Simd>(self, s: S, line: &[u8; LINE], i: usize, scales: &[[u8; LANES]]) -> [S::V; MAX_K] {
        scaled(s, s.fp4::<true>(line), Self::scale(s, i, scales))
    }

    #[inline(always)]
    fn pairs<S: Pairs>(self, s: S, lines: &[[u8; LINE]], i: usize, scales: &[[u8; LANES]]) -> [[S::V; 2]; 2] {
        s.nvfp4_pairs(&lines[0], &scales.as_chunks().0[0], i / 2)
    }
}

impl Coding for Bf16 {
    const LINES: usize = 16;
    const SCALES: usize = 0;

    #[inline(always)]
    fn line<S: Simd>(self, s: S, line: &[u8; LINE], _: usize, _: &[[u8; LANES]]) -> [S::V; MAX_K] {
        let [a, b] = s.bf16(s.words(line));
        [a, b, a, b, a, b, a, b]
    }

    #[inline(always)]
    fn add<S: Simd>(self, s: S, sum: S::V, acc: S::V, _: &[[u8; LANES]]) -> S::V {
        s.add(acc, sum)
    }

    #[inline(always)]
    fn values<S: Simd>(self, s: S, line: &[u8; LINE], i: usize, scales: &[[u8; LANES]]) -> [S::V; MAX_K] {
        self.line(s, line, i, scales)
    }

    #[inline(always)]
    fn pairs<S: Pairs>(self, s: S, lines: &[[u8; LINE]], _: usize, _: &[[u8; LANES]]) -> [[S::V; 2]; 2] {
        s.bf16_pairs(&lines.as_chunks().0[0])
    }
}

impl Coding for Fp8Plain {
    const LINES: usize = 8;
    const SCALES: usize = 0;

    #[inline(always)]
    fn line<S: Simd>(self, s: S, line: &[u8; LINE], _: usize, _: &[[u8; LANES]]) -> [S::V; MAX_K] {
        fp8(s, line, self.0)
    }

    #[inline(always)]
    fn power(self) -> i32 {
        self.0.power
    }

    #[inline(always)]
    fn add<S: Simd>(self, s: S, sum: S::V, acc: S::V, _: &[[u8; LANES]]) -> S::V {
        s.add(acc, sum)
    }

    #[inline(always)]
    fn values<S: Simd>(self, s: S, line: &[u8; LINE], i: usize, scales: &[[u8; LANES]]) -> [S::V; MAX_K] {
        scaled(s, self.line(s, line, i, scales), s.splat(power_of_two(self.0.power)))
    }

    #[inline(always)]
    fn pairs<S: Pairs>(self, s: S, lines: &[[u8; LINE]], _: usize, _: &[[u8; LANES]]) -> [[S::V; 2]; 2] {
        s.fp8_pairs(&lines.as_chunks().0[0], self.0)
    }
}

impl Coding for Mxfp8 {
    const LINES: usize = 8;
    const SCALES: usize = 1;

    #[inline(always)]
    fn line<S: Simd>(self, s: S, line: &[u8; LINE], _: usize, _: &[[u8; LANES]]) -> [S::V; MAX_K] {
        fp8(s, line, self.0)
    }

    #[inline(always)]
    fn power(self) -> i32 {
        self.0.power
    }

    #[inline(always)]
    fn add<S: Simd>(self, s: S, sum: S::V, acc: S::V, scales: &[[u8; LANES]]) -> S::V {
        s.fma(sum, s.e8m0(&scales[0]), acc)
    }

    #[inline(always)]
    fn values<S: Simd>(self, s: S, line: &[u8; LINE], i: usize, scales: &[[u8; LANES]]) -> [S::V; MAX_K] {
        let values = scaled(s, self.line(s, line, i, scales), s.splat(power_of_two(self.0.power)));
        scaled(s, values, s.e8m0(&scales[0]))
    }

    #[inline(always)]
    fn pairs<S: Pairs>(self, s: S, lines: &[[u8; LINE]], _: usize, _: &[[u8; LANES]]) -> [[S::V; 2]; 2] {
        s.fp8_pairs(&lines.as_chunks().0[0], self.0)
    }

    #[inline(always)]
    fn paired_values<S: Pairs>(self, s: S, lines: &[[u8; LINE]], i: usize, scales: &[[u8; LANES]]) -> [[S::V; 2]; 2] {
        s.scale_pairs(self.pairs(s, lines, i, scales), &scales[0])
    }
}

/// Calls `$f` with the [`Coding`] of a scheme.
macro_rules! with_coding {
    ($scheme:expr, |$coding:ident| $body:expr) => {{
        use crate::cpu::Fp8Bits;
        use crate::matmul::coding;
        use crate::quant::Scheme;
        match $scheme {
            Scheme::Mxfp4 => {
                let $coding = coding::Mxfp4;
                $body
            }
            Scheme::Nvfp4 => {
                let $coding = coding::Nvfp4;
                $body
            }
            Scheme::Bf16 => {
                let $coding = coding::Bf16;
                $body
            }
            Scheme::Mxfp8(element) => {
                let $coding = coding::Mxfp8(Fp8Bits::of(element));
                $body
            }
            Scheme::Fp8PerTensor(element) | Scheme::Fp8PerChannel(element) | Scheme::Fp8Blockwise { element, .. } => {
                let $coding = coding::Fp8Plain(Fp8Bits::of(element));
                $body
            }
        }
    }};
}
pub(super) use with_coding;

/// The definition, for any codes and scales: values `[32][16]` of a step, code x block scale, subnormals flushed.
#[inline(always)]
pub(super) fn decode_any<S: Simd>(s: S, scheme: Scheme, scales: &[u8], codes: &[u8], out: &mut [[f32; LANES]; STEP]) {
    let mut halves = [[1.0; LANES]; 2];
    for (i, scale) in halves.as_flattened_mut().iter_mut().enumerate() {
        *scale = match scheme {
            Scheme::Mxfp4 | Scheme::Mxfp8(_) => E8M0::from_bits(scales[i % LANES]).to_f32(),
            Scheme::Nvfp4 => F8E4M3Fn::from_bits(scales[i]).to_f32(),
            _ => 1.0,
        };
    }
    let lines = codes.as_chunks::<LINE>().0;
    let of_line = STEP / lines.len().max(1);
    for (i, (line, out)) in lines.iter().zip(out.chunks_exact_mut(of_line)).enumerate() {
        let scale = s.load(&halves[i * 2 / lines.len()]);
        let values = elements(s, scheme, line);
        for (out, value) in out.iter_mut().zip(values) {
            s.store(s.flush(s.mul(value, scale)), out);
        }
    }
}

/// Elements of a line, ascending k, for any codes.
#[inline(always)]
fn elements<S: Simd>(s: S, scheme: Scheme, line: &[u8; LINE]) -> [S::V; MAX_K] {
    let Some(element) = scheme.fp8() else {
        let [a, b] = s.bf16(s.words(line));
        let mut values = if scheme.bits() == 4 { s.fp4::<true>(line) } else { [a, b, a, b, a, b, a, b] };
        for value in &mut values {
            *value = if scheme.bits() == 4 { unit_fp4(s, *value) } else { *value };
        }
        return values;
    };
    let bits = Fp8Bits::of(element);
    if line.iter().fold(0, |most, code| most.max(code & 0x7F)) <= element.format().max_code() {
        return scaled(s, fp8(s, line, bits), s.splat(power_of_two(bits.power)));
    }
    // NaN and infinities are known to the table alone.
    let mut values = [[0.0; LANES]; MAX_K];
    for (k, values) in values.iter_mut().enumerate() {
        for (l, value) in values.iter_mut().enumerate() {
            *value = bits.values[usize::from(line[k % 4 / 2 * 2 * LANES + 2 * l + k % 2])];
        }
    }
    let mut loaded = [s.splat(0.0); MAX_K];
    for (loaded, values) in loaded.iter_mut().zip(&values) {
        *loaded = s.load(values);
    }
    loaded
}
