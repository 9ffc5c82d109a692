//! Seeded random operands of every scheme, as raw codes, so that nothing depends on the crate's own quantizers.
#![allow(dead_code, unreachable_pub)] // each test binary uses its part

use half::bf16;
use trn_kernels::num::Fp8;
use trn_kernels::quant::{GlobalScale, QuantizedMatrix, Scheme};

/// SplitMix64.
pub struct Rng(pub u64);

impl Rng {
    /// The next 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Roughly normal with deviation 1.
    pub fn normal(&mut self) -> f32 {
        (0..4).map(|_| (self.next() >> 40) as f32 / (1u32 << 23) as f32 - 1.0).sum::<f32>() * 0.866
    }

    /// `n` normal values times 2^e, e in `exponents`.
    pub fn wide(&mut self, n: usize, exponents: std::ops::RangeInclusive<i32>) -> Vec<f32> {
        let (lo, hi) = (*exponents.start(), *exponents.end());
        (0..n).map(|_| self.normal() * 2f32.powi(lo + self.below((hi - lo + 1) as usize) as i32)).collect()
    }
}

/// Every scheme, with every element format somewhere.
pub const SCHEMES: [Scheme; 13] = [
    Scheme::Bf16,
    Scheme::Mxfp4,
    Scheme::Mxfp8(Fp8::E4M3Fn),
    Scheme::Mxfp8(Fp8::E5M2),
    Scheme::Nvfp4,
    Scheme::Fp8PerTensor(Fp8::E4M3Fn),
    Scheme::Fp8PerTensor(Fp8::E5M2),
    Scheme::Fp8PerChannel(Fp8::E4M3Ieee),
    Scheme::Fp8PerChannel(Fp8::E3M4),
    Scheme::Fp8Blockwise { element: Fp8::E4M3Fn, n: 128, k: 128 },
    Scheme::Fp8Blockwise { element: Fp8::E4M3Fn, n: 1, k: 128 },
    Scheme::Fp8Blockwise { element: Fp8::E5M2, n: 24, k: 64 },
    Scheme::Fp8Blockwise { element: Fp8::E4M3Ieee, n: 3, k: 32 },
];

/// Codes and scales of a random matrix.
#[derive(Clone)]
pub struct RandomMatrix {
    scheme: Scheme,
    n: usize,
    k: usize,
    pub codes: Vec<u8>,
    pub scales: Vec<u8>,
    pub floats: Vec<f32>,
}

impl RandomMatrix {
    /// Finite codes; block exponents within `spread` of one.
    pub fn new(rng: &mut Rng, scheme: Scheme, n: usize, k: usize, spread: usize) -> Self {
        let codes = match scheme.fp8() {
            Some(e) => (0..n * k).map(|_| finite_code(rng, e)).collect(),
            None if scheme == Scheme::Bf16 => {
                (0..n * k).flat_map(|_| bf16::from_f32(rng.normal()).to_le_bytes()).collect()
            }
            None => (0..n * k / 2).map(|_| rng.next() as u8).collect(),
        };
        let scales = match scheme {
            Scheme::Mxfp4 | Scheme::Mxfp8(_) => {
                (0..n * k / 32).map(|_| (127 - spread + rng.below(2 * spread + 1)) as u8).collect()
            }
            Scheme::Nvfp4 => (0..n * k / 16).map(|_| rng.below(0x7F) as u8).collect(),
            _ => vec![],
        };
        let count = match scheme {
            Scheme::Nvfp4 | Scheme::Fp8PerTensor(_) => 1,
            Scheme::Fp8PerChannel(_) => n,
            Scheme::Fp8Blockwise { n: tn, k: tk, .. } => n.div_ceil(tn) * k.div_ceil(tk),
            _ => 0,
        };
        let floats = (0..count).map(|_| 0.01 * (1.0 + rng.normal().abs())).collect();
        RandomMatrix { scheme, n, k, codes, scales, floats }
    }

    /// The matrix.
    pub fn view(&self) -> QuantizedMatrix<'_> {
        let (n, k) = (self.n, self.k);
        match self.scheme {
            Scheme::Bf16 => QuantizedMatrix::bf16(n, k, &self.codes),
            Scheme::Mxfp4 => QuantizedMatrix::mxfp4(n, k, &self.codes, &self.scales),
            Scheme::Mxfp8(e) => QuantizedMatrix::mxfp8(e, n, k, &self.codes, &self.scales),
            Scheme::Nvfp4 => {
                QuantizedMatrix::nvfp4(n, k, &self.codes, &self.scales, GlobalScale::multiplier(self.floats[0]))
            }
            Scheme::Fp8PerTensor(e) => QuantizedMatrix::fp8_per_tensor(e, n, k, &self.codes, self.floats[0]),
            Scheme::Fp8PerChannel(e) => QuantizedMatrix::fp8_per_channel(e, n, k, &self.codes, &self.floats),
            Scheme::Fp8Blockwise { element, n: tn, k: tk } => {
                QuantizedMatrix::fp8_blockwise(element, n, k, &self.codes, &self.floats, (tn, tk))
            }
        }
        .unwrap()
    }
}

fn finite_code(rng: &mut Rng, e: Fp8) -> u8 {
    loop {
        let code = rng.next() as u8;
        if e.values()[code as usize].is_finite() {
            return code;
        }
    }
}
