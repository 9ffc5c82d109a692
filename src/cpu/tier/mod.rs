//! One file for each instruction set: sixteen lanes of it, and the entry that kernels are compiled into.
#![allow(unsafe_code)] // calls of functions compiled for a detected target feature, nothing else

pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_bf16;
mod fp4;
#[cfg(feature = "limits")]
pub(super) mod limits;
mod pairs;
mod portable;

use super::isa::{AmxToken, Avx2Token, Avx512Token, Bf16Token, Isa};
use super::simd::Simd;
use portable::Portable;

pub(crate) use pairs::PairKernel;
pub(in crate::cpu) use pairs::pairs_in_order;

/// A computation written once for every machine. Implementations mark `run`, and what it calls in its inner loop,
/// `#[inline(always)]`: only what is inlined is compiled with the tier's features.
pub(crate) trait Kernel {
    fn run<S: Simd>(self, simd: S);
}

/// A tier this machine was found to have.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Tier {
    /// Plain code, the target's baseline.
    Baseline,
    /// Plain code compiled with AVX2 and FMA.
    Portable(Avx2Token),
    Avx2(Avx2Token),
    Avx512(Avx512Token),
    /// Pairs for matmul of what bf16 holds, AVX-512 for everything else.
    Avx512Bf16(Bf16Token),
    /// Tiles for matmul of what bf16 holds, AVX-512 for everything else.
    Amx(AmxToken),
}

impl Tier {
    /// The tier of an instruction set; `None` if this machine lacks it.
    pub(crate) fn of(isa: Isa) -> Option<Self> {
        match isa {
            Isa::Portable => Some(Avx2Token::detect().map_or(Tier::Baseline, Tier::Portable)),
            Isa::Avx2 => Avx2Token::detect().map(Tier::Avx2),
            Isa::Avx512 => Avx512Token::detect().map(Tier::Avx512),
            Isa::Avx512Bf16 => Bf16Token::detect().ok().map(Tier::Avx512Bf16),
            Isa::Amx => AmxToken::detect().ok().map(Tier::Amx),
        }
    }

    pub(crate) fn isa(self) -> Isa {
        match self {
            Tier::Baseline | Tier::Portable(_) => Isa::Portable,
            Tier::Avx2(_) => Isa::Avx2,
            Tier::Avx512(_) => Isa::Avx512,
            Tier::Avx512Bf16(_) => Isa::Avx512Bf16,
            Tier::Amx(_) => Isa::Amx,
        }
    }

    /// The right to use tiles, if this tier has it.
    pub(crate) fn amx(self) -> Option<AmxToken> {
        match self {
            Tier::Amx(token) => Some(token),
            _ => None,
        }
    }

    /// The right to multiply pairs, if this tier has it.
    pub(crate) fn pairs(self) -> Option<Bf16Token> {
        match self {
            Tier::Avx512Bf16(token) => Some(token),
            _ => None,
        }
    }

    /// Runs a kernel compiled for this tier.
    pub(crate) fn run(self, kernel: impl Kernel) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Tier::Portable(_) => {
                // SAFETY: the token exists only if AVX2 and FMA were detected on this CPU.
                unsafe { run_fma(kernel) }
            }
            #[cfg(target_arch = "x86_64")]
            Tier::Avx2(token) => {
                // SAFETY: the token exists only if AVX2, FMA and F16C were detected on this CPU.
                unsafe { avx2::run(token, kernel) }
            }
            #[cfg(target_arch = "x86_64")]
            Tier::Avx512(token) => {
                // SAFETY: the token exists only if all of the entry's features were detected on this CPU.
                unsafe { avx512::run(token, kernel) }
            }
            #[cfg(target_arch = "x86_64")]
            Tier::Avx512Bf16(token) => {
                // SAFETY: as above; the token holds that of AVX-512.
                unsafe { avx512::run(token.avx512(), kernel) }
            }
            #[cfg(target_arch = "x86_64")]
            Tier::Amx(token) => {
                // SAFETY: as above; the token holds that of AVX-512.
                unsafe { avx512::run(token.avx512(), kernel) }
            }
            _ => kernel.run(Portable),
        }
    }

    /// Rows and panels of the prefill kernel's register block, and rows of the decode kernel.
    pub(crate) fn block(self) -> ((usize, usize), usize) {
        fn of<S: Simd>() -> ((usize, usize), usize) {
            (S::REGISTERS.block, S::REGISTERS.decode_rows)
        }
        match self {
            #[cfg(target_arch = "x86_64")]
            Tier::Avx2(_) => of::<avx2::Avx2>(),
            #[cfg(target_arch = "x86_64")]
            Tier::Avx512(_) | Tier::Amx(_) => of::<avx512::Avx512<false>>(),
            #[cfg(target_arch = "x86_64")]
            Tier::Avx512Bf16(_) => of::<avx512::Avx512<true>>(),
            _ => of::<Portable>(),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_fma(kernel: impl Kernel) {
    kernel.run(Portable);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::{FP4_HEADROOM, Fp8Bits, LANES, LINE};
    use crate::num::{E8M0, F4E2M1x2, F8E4M3Fn, Fp8};
    use half::bf16;

    /// Every method of [`Simd`] against its definition, on all codes.
    struct Check;

    impl Kernel for Check {
        fn run<S: Simd>(self, s: S) {
            let get = |v| {
                let mut x = [0.0; LANES];
                s.store(v, &mut x);
                x.map(f32::to_bits)
            };
            let tiny = f32::from_bits(1);
            let x = [
                1.5,
                -0.0,
                0.0,
                tiny,
                -tiny,
                1e-39,
                -1e-39,
                f32::MIN_POSITIVE,
                -f32::MIN_POSITIVE,
                f32::INFINITY,
                f32::NEG_INFINITY,
                f32::MAX,
                3.0,
                -7.25,
                1e-20,
                1e20,
            ];
            let y: [f32; LANES] = std::array::from_fn(|l| x[(l + 5) % LANES] * 0.75);
            assert_eq!(get(s.load(&x)), x.map(f32::to_bits));
            assert_eq!(get(s.splat(-2.5)), [(-2.5f32).to_bits(); LANES]);
            assert_eq!(get(s.flush(s.load(&x))), x.map(|v| crate::cpu::flush(v).to_bits()));
            let quiet = |v: f32| if v.is_nan() { 0 } else { v.to_bits() };
            let same = |got: [u32; LANES], f: &dyn Fn(usize) -> f32| {
                let (got, want): (Vec<u32>, Vec<u32>) =
                    (0..LANES).map(|l| (quiet(f32::from_bits(got[l])), quiet(f(l)))).unzip();
                assert_eq!(got, want);
            };
            same(get(s.fma(s.load(&x), s.load(&y), s.splat(0.3))), &|l| x[l].mul_add(y[l], 0.3));
            same(get(s.add(s.load(&x), s.load(&y))), &|l| x[l] + y[l]);
            same(get(s.mul(s.load(&x), s.load(&y))), &|l| x[l] * y[l]);

            for first in (0..=255u8).step_by(LINE) {
                let line: [u8; LINE] = std::array::from_fn(|i| first.wrapping_add((i * 37) as u8));
                let word = |l: usize| u32::from_le_bytes([0, 1, 2, 3].map(|b| line[4 * l + b]));
                let words = s.words(&line);
                let mut back = [0; LINE];
                s.store_words(words, &mut back);
                assert_eq!(back, line);
                let other: [u8; LINE] = line.map(|b| !b);
                for (i, words) in s.interleave(words, s.words(&other)).into_iter().enumerate() {
                    s.store_words(words, &mut back);
                    for (at, word) in back.as_chunks::<4>().0.iter().enumerate() {
                        let from = [&line, &other][at % 2].as_chunks::<4>().0;
                        assert_eq!(*word, from[i * LANES / 2 + at / 2]);
                    }
                }
                let (exact, any) = (s.fp4::<true>(&line), s.fp4::<false>(&line));
                for (k, shift) in [0, 16, 4, 20, 8, 24, 12, 28].into_iter().enumerate() {
                    let up = (S::FP4_POWER as f32).exp2();
                    let fp4 = |l: usize| F4E2M1x2::VALUES[(word(l) >> shift & 15) as usize] * up;
                    same(get(exact[k]), &fp4);
                    same(get(s.add(any[k], s.splat(0.0))), &|l| fp4(l) + 0.0);
                }
                assert!((0..=FP4_HEADROOM).contains(&S::FP4_POWER));
                let halves = s.bf16(words);
                same(get(halves[0]), &|l| bf16::from_bits(word(l) as u16).to_f32());
                same(get(halves[1]), &|l| bf16::from_bits((word(l) >> 16) as u16).to_f32());
                for element in Fp8::ALL {
                    let bits = Fp8Bits::of(element);
                    for (k, v) in s.fp8(&line, bits).into_iter().enumerate() {
                        let got = get(v);
                        for l in 0..LANES {
                            let value = element.values()[usize::from(line[32 * (k / 2) + 2 * l + k % 2])];
                            let scaled = f32::from_bits(got[l]) * (bits.power as f32).exp2();
                            assert!(scaled.to_bits() == value.to_bits() || !value.is_finite(), "{element:?} {value}");
                        }
                    }
                }
            }
            for first in (1..=239u8).step_by(LANES) {
                let codes: [u8; LANES] = std::array::from_fn(|l| (first + l as u8).min(254));
                same(get(s.e8m0(&codes)), &|l| E8M0::from_bits(codes[l]).to_f32());
                let codes = codes.map(|c| (c / 2).min(0x7E));
                same(get(s.e4m3(&codes)), &|l| F8E4M3Fn::from_bits(codes[l]).to_f32());
            }
            s.prefetch(x.as_ptr().cast());
            s.prefetch(std::ptr::null());
        }
    }

    #[test]
    fn lanes_of_every_tier() {
        Tier::Baseline.run(Check);
        for isa in Isa::ALL {
            match Tier::of(isa) {
                Some(tier) => tier.run(Check),
                None => eprintln!("skipped: {isa}: {}", isa.missing().unwrap_or_default()),
            }
        }
    }
}
