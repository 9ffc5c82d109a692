//! The entry for kernels that multiply pairs of bf16, and the question whether a machine's product of pairs is the one they need.
#![allow(unsafe_code)] // a call of a function compiled for detected target features, nothing else

use super::{Kernel, Tier};
use crate::cpu::flush;
use crate::cpu::isa::Bf16Token;
use crate::cpu::simd::{LANES, Pairs};

/// A computation on pairs of bf16, as [`Kernel`].
pub(crate) trait PairKernel {
    fn run<S: Pairs>(self, simd: S);
}

impl Tier {
    /// Runs a kernel on pairs, with the right to, else as this tier runs it.
    pub(crate) fn run_with(self, pairs: Option<Bf16Token>, kernel: impl Kernel + PairKernel) {
        match pairs {
            Some(token) => token.run(kernel),
            None => self.run(kernel),
        }
    }
}

impl Bf16Token {
    /// Runs a kernel compiled for AVX-512 with BF16 and VBMI.
    fn run(self, kernel: impl PairKernel) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the token exists only if all of the entry's features were detected on this CPU.
        unsafe {
            super::avx512_bf16::run(self, kernel);
        }
        // On other architectures there is no token.
        #[cfg(not(target_arch = "x86_64"))]
        let _ = kernel;
    }
}

/// Whether VDPBF16PS, on a machine that has it, adds the product of high halves first and that of low halves to what this gives, each sum
/// rounded once: what [`Pairs::fma_pairs`] needs of it. The Intel SDM (VDPBF16PS, Operation) says so; every CPU is asked.
pub(in crate::cpu) fn pairs_in_order(token: Bf16Token) -> bool {
    struct Asked<'a>(&'a mut bool);
    impl PairKernel for Asked<'_> {
        fn run<S: Pairs>(self, s: S) {
            let pairs = |high: &[f32; LANES], low: &[f32; LANES]| s.pair(s.load(high), s.load(low));
            *self.0 = in_order(|[high, low, other_high, other_low, c]| {
                let mut sums = [0.0; LANES];
                s.store(s.fma_pairs(pairs(high, low), pairs(other_high, other_low), s.load(c)), &mut sums);
                sums
            });
        }
    }
    let mut answer = false;
    token.run(Asked(&mut answer));
    answer
}

/// [`pairs_in_order`] of what sums operands `[high, low, high, low, c]`: on numbers whose sums differ if they are added in another order or
/// rounded less often or otherwise, if subnormal elements count or if a sum that cancels or a product of zeros is not +0.
fn in_order(sum: impl Fn([&[f32; LANES]; 5]) -> [f32; LANES]) -> bool {
    let mut state = 1u32;
    let mut number = |bits: u32, least: u32, exponents: u32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f32::from_bits(state.rotate_left(11) & bits | (least + (state >> 8) % exponents) << 23)
    };
    (0..96).all(|round| {
        // Products of like and of unlike magnitude, in the middle of the range and towards its ends; c has all of an f32's bits.
        let (least, exponents) = ([116, 80, 170][round % 3], [20, 3, 1][round / 3 % 3]);
        let mut operands = [[0.0; LANES]; 4];
        operands.as_flattened_mut().iter_mut().for_each(|x| *x = number(0x807F_0000, least, exponents));
        let [high, low, other_high, other_low] = &mut operands;
        let mut c: [f32; LANES] = std::array::from_fn(|_| number(0x807F_FFFF, 2 * least - 129, 2 * exponents + 2));
        for l in 0..LANES {
            match round / 16 {
                // Subnormals and zeros of both signs against numbers whose products with them would count.
                3 if l % 2 == 0 => (high[l], other_high[l]) = (number(0x807F_0000, 0, 1), number(0x8000_0000, 240, 1)),
                3 => (low[l], other_low[l]) = (number(0x8000_0000, 0, 1), number(0x807F_0000, 100, 30)),
                // Zeros, and products that cancel.
                4 if l % 2 == 0 => (high[l], low[l], c[l]) = (-0.0, 0.0, 0.0),
                4 => (c[l], low[l], other_low[l]) = (0.0, -high[l], other_high[l]),
                // A quarter and three quarters of the last place in turn, halves and what decides for them.
                5 => {
                    c[l] = number(0x807F_FFFF, 127, 1);
                    (high[l], other_high[l]) = (number(0x8000_0000, 103, 1), number(0x8040_0000, 126, 3));
                    (low[l], other_low[l]) = (number(0x8000_0000, 103, 1), number(0x8040_0000, 126, 3));
                }
                _ => {}
            }
        }
        let sums = sum([high, low, other_high, other_low, &c]);
        let product = |a: f32, b: f32, c: f32| flush(a).mul_add(flush(b), c);
        let want = |l: usize| product(low[l], other_low[l], product(high[l], other_high[l], c[l]));
        (0..LANES).all(|l| sums[l].to_bits() == want(l).to_bits())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::{Fp8Bits, LINE, Simd};
    use crate::num::{E8M0, F4E2M1x2, F8E4M3Fn, Fp8};
    use half::bf16;

    /// Every method of [`Pairs`] but its product, which [`in_order`] asks for, against its definition, on all codes.
    struct Check;

    /// High and low halves of each lane.
    fn halves<S: Simd>(s: S, v: S::V) -> [[f32; LANES]; 2] {
        let mut x = [0.0; LANES];
        s.store(v, &mut x);
        [x.map(|v| f32::from_bits(v.to_bits() & 0xFFFF_0000)), x.map(|v| f32::from_bits(v.to_bits() << 16))]
    }

    /// The k of the high and of the low half of each pair of eight k.
    const K: [[usize; 2]; 4] = [[0, 2], [1, 3], [4, 6], [5, 7]];

    /// Pairs against the values of eight k, zeros of any sign being the same.
    fn same<S: Pairs>(s: S, pairs: [[S::V; 2]; 2], want: impl Fn(usize, usize) -> f32, what: &str) {
        for (pair, k) in pairs.into_iter().flat_map(|pairs| s.sorted(pairs)).zip(K) {
            for (half, k) in halves(s, pair).into_iter().zip(k) {
                let want: [f32; LANES] = std::array::from_fn(|l| want(k, l));
                assert_eq!(half, want, "{what}, k {k}");
            }
        }
    }

    impl PairKernel for Check {
        fn run<S: Pairs>(self, s: S) {
            let line = |first: u8| -> [u8; LINE] { std::array::from_fn(|i| first.wrapping_add((i * 37) as u8)) };
            let nibble = |line: &[u8; LINE], k: usize, l: usize| {
                let word = u32::from_le_bytes([0, 1, 2, 3].map(|b| line[4 * l + b]));
                F4E2M1x2::VALUES[(word >> [0, 16, 4, 20, 8, 24, 12, 28][k] & 15) as usize]
            };
            for first in (0..=255u8).step_by(16) {
                let codes = line(first);
                same(s, s.fp4_pairs(&codes), |k, l| nibble(&codes, k, l), "E2M1");
                for scale in 2..=252u8 {
                    let scales: [u8; LANES] = std::array::from_fn(|l| scale.saturating_add(l as u8).min(252));
                    let power = |l: usize| E8M0::from_bits(scales[l]).to_f32();
                    same(s, s.mxfp4_pairs(&codes, &scales), |k, l| nibble(&codes, k, l) * power(l), "MXFP4");
                }
                for scale in 0..=0x7Eu8 {
                    let scale = |i: usize| ((usize::from(scale) + i) % 0x7F) as u8;
                    let scales: [[u8; LANES]; 2] =
                        [std::array::from_fn(scale), std::array::from_fn(|l| scale(100 - l))];
                    for (block, scales_of) in scales.iter().enumerate() {
                        let times = |l: usize| F8E4M3Fn::from_bits(scales_of[l]).to_f32();
                        let pairs = s.nvfp4_pairs(&codes, &scales, block);
                        same(s, pairs, |k, l| nibble(&codes, k, l) * times(l), "NVFP4");
                    }
                }
            }
            for (element, first) in Fp8::ALL.into_iter().flat_map(|e| (0..=255u8).step_by(64).map(move |f| (e, f))) {
                let mut lines = [line(first), line(!first)];
                // Infinities and NaN are not asked of it.
                let most = element.format().max_code();
                lines.as_flattened_mut().iter_mut().for_each(|c| *c = *c & 0x80 | (*c & 0x7F).min(most));
                let value =
                    |k: usize, l: usize| element.values()[usize::from(lines[k / 4][k % 4 / 2 * 32 + 2 * l + k % 2])];
                let pairs = s.fp8_pairs(&lines, Fp8Bits::of(element));
                same(s, pairs, value, element.format().name());
                // Scales that leave every value in bf16's normal range.
                let format = element.format();
                let least = format.bias() + format.mantissa_bits() as i32;
                let (least, most) = (least as u8, (254 - format.emax()) as u8);
                for scale in least..=most {
                    let scales: [u8; LANES] = std::array::from_fn(|l| scale.saturating_add(l as u8).min(most));
                    let power = |l: usize| E8M0::from_bits(scales[l]).to_f32();
                    same(s, s.scale_pairs(pairs, &scales), |k, l| value(k, l) * power(l), "scaled");
                }
            }
            let words: [[u8; LINE]; 4] = std::array::from_fn(|i| line(1 + 77 * i as u8).map(|b| b & 0xBF));
            let value = |k: usize, l: usize| {
                let at = 4 * l + 2 * (k % 2);
                bf16::from_le_bytes([words[k / 2][at], words[k / 2][at + 1]]).to_f32()
            };
            same(s, s.bf16_pairs(&words), value, "bf16");
            let mut turns = [0.0; LANES];
            s.store(s.splat_two(&[1.5, -2.0]), &mut turns);
            assert_eq!(turns.as_chunks().0, [[1.5, -2.0]; LANES / 2]);
            let (high, low) = ([1.5; LANES], std::array::from_fn(|l| l as f32 - 3.0));
            assert_eq!(halves(s, s.pair(s.load(&high), s.load(&low))), [high, low]);
        }
    }

    #[test]
    fn pairs_are_what_they_say() {
        match Bf16Token::detect() {
            Ok(token) => token.run(Check),
            Err(because) => eprintln!("skipped: {because}"),
        }
    }

    /// A machine that sums in another order is found out.
    #[test]
    fn the_order_is_asked_for() {
        type Sum = fn([f32; 5]) -> f32;
        let answer = |sum: Sum| in_order(|x| std::array::from_fn(|l| sum(x.map(|x| x[l]))));
        assert!(answer(|[h, l, oh, ol, c]| flush(l).mul_add(ol, flush(h).mul_add(oh, c))));
        let others: [Sum; 8] = [
            |[h, l, oh, ol, c]| h.mul_add(oh, l.mul_add(ol, c)),
            |[h, l, oh, ol, c]| c + l.mul_add(ol, h * oh),
            |[h, l, oh, ol, c]| (f64::from(h) * f64::from(oh) + f64::from(l) * f64::from(ol) + f64::from(c)) as f32,
            // Without the low halves; the last sum rounded towards zero, and halves away from it.
            |[h, _, oh, _, c]| h.mul_add(oh, c),
            |[h, l, oh, ol, c]| {
                let [h, l] = [flush(h), flush(l)];
                let exact = f64::from(h.mul_add(oh, c)) + f64::from(l * ol);
                let near = exact as f32;
                if f64::from(near).abs() > exact.abs() { f32::from_bits(near.to_bits() - 1) } else { near }
            },
            |[h, l, oh, ol, c]| {
                let [h, l] = [flush(h), flush(l)];
                let exact = f64::from(h.mul_add(oh, c)) + f64::from(l * ol);
                let (near, beyond) = (exact as f32, f32::from_bits((exact as f32).to_bits() + 1));
                let tie = f64::from(beyond) - exact == exact - f64::from(near);
                if tie { beyond } else { near }
            },
            // Subnormals count; zeros are negative.
            |[h, l, oh, ol, c]| l.mul_add(ol, h.mul_add(oh, c)),
            |[h, l, oh, ol, c]| {
                let sum = flush(l).mul_add(ol, flush(h).mul_add(oh, c));
                if sum == 0.0 { -0.0 } else { sum }
            },
        ];
        for (i, sum) in others.into_iter().enumerate() {
            assert!(!answer(sum), "{i}");
        }
    }
}
