//! Matmul: the canonical order to the bit, the oracle's bound, invariance, experts, refusals, planted bugs.

#[path = "support/random.rs"]
mod random;
#[path = "support/tiers.rs"]
mod tiers;

use half::{bf16, f16};
use random::{RandomMatrix, Rng, SCHEMES};
use trn_kernels::cpu::Blocking;
use trn_kernels::matmul::oracle::{self, OutputType};
use trn_kernels::matmul::{Activation, Activations, MatmulOptions, PackedExperts, PackedMatrix, RowSource};
use trn_kernels::num::{Fp8, Real};
use trn_kernels::quant::{QuantizationError, QuantizedExperts, QuantizedMatrix, Scheme};
use trn_kernels::{Cpu, Error, MatMut, MatRef, Parallelism, Workspace};

/// Small matrices fork too.
fn forks() -> Blocking {
    Blocking { fork: 0, ..Blocking::default() }
}

fn run(cpu: Cpu<'_>, x: Activations<'_>, w: &PackedMatrix, options: &MatmulOptions<'_>) -> Vec<f32> {
    let (m, n) = (x.m(), w.n());
    let mut y = vec![0.5; m * n];
    cpu.matmul(x, w, MatMut::new(&mut y, m, n).unwrap(), options, &mut Workspace::new()).unwrap();
    y
}

fn bits(y: &[f32]) -> Vec<u32> {
    y.iter().map(|v| v.to_bits()).collect()
}

fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0.0f32.copysign(x) } else { x }
}

/// docs/numerics.md, word by word, one output at a time: shares nothing with the kernels.
fn canonical(x: &[f32], w: &[f32]) -> f32 {
    let mut acc = 0.0f32;
    for (x, w) in x.chunks(32).zip(w.chunks(32)) {
        let mut chains = [0.0f32; 2];
        for (i, (x, w)) in x.iter().zip(w).enumerate() {
            chains[i % 2] = flush(flush(*x).mul_add(flush(*w), chains[i % 2]));
        }
        acc = flush(acc + flush(chains[0] + chains[1]));
    }
    acc
}

/// What the canonical sum of each output is, from dequantized rows.
fn canonical_matmul(x: &[f32], m: usize, w: &QuantizedMatrix<'_>) -> Vec<f32> {
    let (n, k) = (w.n(), w.k());
    let row = |j| (0..k).map(|c| w.value(j, c).unwrap() as f32).collect::<Vec<_>>();
    let rows: Vec<_> = (0..n).map(row).collect();
    (0..m).flat_map(|i| rows.iter().map(move |w| canonical(&x[i * k..(i + 1) * k], w))).collect()
}

/// Exponents chosen so that sums fall on both sides of the smallest normal number: the flush decides many of them.
#[test]
fn canonical_bits_with_and_without_subnormals() {
    let mut rng = Rng(1);
    for (exponents, spread) in [(-2..=2, 3), (-60..=-40, 30), (-100..=-30, 60)] {
        let (m, n, k) = (5, 37, 96 + 32 * rng.below(9));
        let x = rng.wide(m * k, exponents.clone());
        let halves: Vec<bf16> = x.iter().map(|v| bf16::from_f32(*v)).collect();
        let exact: Vec<f32> = halves.iter().map(|v| v.to_f32()).collect();
        for scheme in [Scheme::Bf16, Scheme::Mxfp4, Scheme::Mxfp8(Fp8::E5M2)] {
            let w = RandomMatrix::new(&mut rng, scheme, n, k, spread);
            for cpu in [Cpu::detect(), Cpu::baseline()] {
                let packed = cpu.pack(&w.view()).unwrap();
                let options = MatmulOptions::default();
                let y = run(cpu, MatRef::new(&x, m, k).unwrap().into(), &packed, &options);
                assert_eq!(bits(&y), bits(&canonical_matmul(&x, m, &w.view())), "f32 {scheme:?} {exponents:?}");
                let y = run(cpu, MatRef::new(&halves, m, k).unwrap().into(), &packed, &options);
                assert_eq!(bits(&y), bits(&canonical_matmul(&exact, m, &w.view())), "bf16 {scheme:?} {exponents:?}");
            }
        }
    }
}

/// The flush is really exercised: without it the same data give other bits.
#[test]
fn subnormal_data_notice_a_missing_flush() {
    let mut rng = Rng(2);
    let (k, n) = (256, 16);
    let x: Vec<f32> = rng.wide(k, -66..=-60).iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
    let w = rng.wide(n * k, -66..=-60);
    let unflushed = |x: &[f32], w: &[f32]| {
        x.chunks(32).zip(w.chunks(32)).fold(0.0f32, |acc, (x, w)| {
            let mut chains = [0.0f32; 2];
            x.iter().zip(w).enumerate().for_each(|(i, (x, w))| chains[i % 2] = x.mul_add(*w, chains[i % 2]));
            acc + (chains[0] + chains[1])
        })
    };
    let differs = (0..n).filter(|j| canonical(&x, &w[j * k..][..k]) != unflushed(&x, &w[j * k..][..k])).count();
    assert!(differs > 0);
}

fn check_against_oracle(x: Activations<'_>, w: &QuantizedMatrix<'_>, options: &MatmulOptions<'_>, what: &str) {
    let (m, n) = (x.m(), w.n());
    let cpu = Cpu::detect();
    let packed = cpu.pack(w).unwrap();
    let mut ws = Workspace::new();
    fn check<T: Real>(y: &[T], expected: &[oracle::Expected], what: &str) {
        for (y, e) in y.iter().zip(expected) {
            assert!(e.admits(f64::from(y.to_f32())), "{what} {}: {y:?} is not within {e:?}", T::NAME);
        }
    }
    let previous = vec![0.5; m * n];
    let expected = |t| oracle::matmul(x, w, options, &previous, t).unwrap();
    let mut y = vec![0.5f32; m * n];
    cpu.matmul(x, &packed, MatMut::new(&mut y, m, n).unwrap(), options, &mut ws).unwrap();
    check(&y, &expected(OutputType::F32), what);
    let mut y = vec![bf16::from_f32(0.5); m * n];
    cpu.matmul(x, &packed, MatMut::new(&mut y, m, n).unwrap(), options, &mut ws).unwrap();
    check(&y, &expected(OutputType::Bf16), what);
    let mut y = vec![f16::from_f32(0.5); m * n];
    cpu.matmul(x, &packed, MatMut::new(&mut y, m, n).unwrap(), options, &mut ws).unwrap();
    check(&y, &expected(OutputType::F16), what);
}

#[test]
fn every_scheme_and_activation_within_the_bound() {
    let mut rng = Rng(3);
    let activations = [Activation::None, Activation::Relu, Activation::Silu, Activation::GeluTanh];
    for (i, scheme) in SCHEMES.into_iter().enumerate() {
        for (m, n, k) in [(1, 1, 32), (3, 17, 96), (4, 40, 288), (2, 16, 0)] {
            let w = RandomMatrix::new(&mut rng, scheme, n, k, 4);
            let w = w.view();
            let bias: Vec<f32> = (0..n).map(|_| rng.normal()).collect();
            let options = MatmulOptions {
                bias: (k % 64 != 0).then_some(&bias),
                alpha: if m == 3 { -0.75 } else { 1.0 },
                accumulate: m == 4,
                activation: activations[(i + m) % 4],
            };
            let f: Vec<f32> = rng.wide(m * k, -3..=3);
            let b: Vec<bf16> = f.iter().map(|v| bf16::from_f32(*v)).collect();
            let h: Vec<f16> = f.iter().map(|v| f16::from_f32(*v)).collect();
            let what = format!("{scheme:?} {m}x{n}x{k}");
            check_against_oracle(MatRef::new(&f, m, k).unwrap().into(), &w, &options, &what);
            check_against_oracle(MatRef::new(&b, m, k).unwrap().into(), &w, &options, &what);
            check_against_oracle(MatRef::new(&h, m, k).unwrap().into(), &w, &options, &what);
            for of_x in SCHEMES {
                let x = RandomMatrix::new(&mut rng, of_x, m, k, 4);
                let x = x.view();
                check_against_oracle((&x).into(), &w, &options, &format!("{of_x:?} x {what}"));
            }
        }
    }
}

/// k that ends inside a step and inside a scale tile, and tiles longer than k, which need not fall on steps.
#[test]
fn ragged_k_within_the_bound() {
    let mut rng = Rng(11);
    let tiles = [(128, 128), (1, 128), (24, 64), (3, 32), (2, 200), (2, 208)];
    let tiled = tiles.map(|(n, k)| Scheme::Fp8Blockwise { element: Fp8::E4M3Fn, n, k });
    let untiled = [Scheme::Bf16, Scheme::Fp8PerTensor(Fp8::E5M2), Scheme::Fp8PerChannel(Fp8::E3M4)];
    for scheme in tiled.into_iter().chain(untiled) {
        for (m, n, k) in [(1, 3, 1), (2, 17, 31), (3, 5, 40), (2, 9, 130), (1, 4, 200)] {
            let w = RandomMatrix::new(&mut rng, scheme, n, k, 4);
            let w = w.view();
            let what = format!("{scheme:?} {m}x{n}x{k}");
            let f: Vec<f32> = rng.wide(m * k, -3..=3);
            let options = MatmulOptions::default();
            check_against_oracle(MatRef::new(&f, m, k).unwrap().into(), &w, &options, &what);
            for of_x in [scheme, Scheme::Fp8PerChannel(Fp8::E4M3Fn)] {
                let x = RandomMatrix::new(&mut rng, of_x, m, k, 4);
                check_against_oracle((&x.view()).into(), &w, &options, &format!("{of_x:?} x {what}"));
            }
        }
    }
}

/// f32 scales whose products with sums, or with each other, leave f32's normal range on the way to results inside it.
#[test]
fn scales_at_the_ends_of_f32_within_the_bound() {
    let mut rng = Rng(12);
    let tiled = Scheme::Fp8Blockwise { element: Fp8::E4M3Fn, n: 1, k: 32 };
    let (m, n, k) = (2, 20, 96);
    for scheme in [Scheme::Fp8PerTensor(Fp8::E5M2), Scheme::Fp8PerChannel(Fp8::E4M3Fn), tiled] {
        for (of_x, of_w) in [(1e30, 1e-30), (3e38, 1e-38), (1e-38, 3e38), (1e-25, 1e-25), (1e-20, 1e-22), (1e25, 1e25)]
        {
            let mut x = RandomMatrix::new(&mut rng, scheme, m, k, 4);
            let mut w = RandomMatrix::new(&mut rng, scheme, n, k, 4);
            x.floats.fill(of_x);
            w.floats.fill(of_w);
            let what = format!("{scheme:?}, scales {of_x:e} and {of_w:e}");
            check_against_oracle((&x.view()).into(), &w.view(), &MatmulOptions::default(), &what);
        }
    }
}

/// An exact infinity is no licence: only the same infinity is admitted.
#[test]
fn the_oracle_admits_no_number_for_infinity() {
    let x = [f32::INFINITY, 1.0];
    let w = QuantizedMatrix::bf16(1, 2, &[0x80, 0x3F, 0x80, 0x3F]).unwrap();
    let x = MatRef::new(&x, 1, 2).unwrap();
    let expected = oracle::matmul(x, &w, &MatmulOptions::default(), &[], OutputType::F32).unwrap()[0];
    assert!(expected.admits(f64::INFINITY));
    assert!([5.0, f64::NEG_INFINITY, f64::NAN].iter().all(|y| !expected.admits(*y)));
}

/// Data that sums are worst at.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Adversary {
    None,
    /// The second half of k is the first with the other sign: the sum is 0, the terms are not.
    Cancels,
    /// Signs alternate along k, no weight is negative.
    Alternates,
    /// Magnitudes over 2^80 and, where block scales have exponents, 2^40.
    Spread,
    /// All x and all w are the same number.
    Equal,
    /// One x of each row is 2^40 times the others.
    Outlier,
}

impl Adversary {
    const ALL: [Adversary; 6] = [
        Adversary::None,
        Adversary::Cancels,
        Adversary::Alternates,
        Adversary::Spread,
        Adversary::Equal,
        Adversary::Outlier,
    ];

    /// w `[n, k]` and x `[m, k]`.
    fn make(self, rng: &mut Rng, scheme: Scheme, (m, n, k): (usize, usize, usize)) -> (RandomMatrix, Vec<f32>) {
        let of_exponents = matches!(scheme, Scheme::Mxfp4 | Scheme::Mxfp8(_));
        let spread = if self == Adversary::Spread && of_exponents { 20 } else { 4 };
        let mut w = RandomMatrix::new(rng, scheme, n, k, spread);
        let mut x = rng.wide(m * k, if self == Adversary::Spread { -40..=40 } else { -3..=3 });
        match self {
            Adversary::None | Adversary::Spread => {}
            Adversary::Cancels => {
                x.chunks_exact_mut(k).for_each(|x| {
                    let (first, second) = x.split_at_mut(k / 2);
                    second.iter_mut().zip(first).for_each(|(second, first)| *second = -*first);
                });
                fn halves<T: Copy>(of: &mut [T], row: usize) {
                    of.chunks_exact_mut(row.max(2)).for_each(|row| row.copy_within(..row.len() / 2, row.len() / 2));
                }
                halves(&mut w.codes, k * scheme.bits() / 8);
                let row_scales = w.scales.len() / n;
                halves(&mut w.scales, row_scales);
                if let Scheme::Fp8Blockwise { k: tile, .. } = scheme {
                    halves(&mut w.floats, k / tile);
                }
            }
            Adversary::Alternates => {
                x.iter_mut().enumerate().for_each(|(i, x)| *x = if i % 2 == 0 { x.abs() } else { -x.abs() });
                match scheme {
                    Scheme::Bf16 => w.codes.iter_mut().skip(1).step_by(2).for_each(|high| *high &= 0x7F),
                    _ if scheme.bits() == 4 => w.codes.iter_mut().for_each(|pair| *pair &= 0x77),
                    _ => w.codes.iter_mut().for_each(|code| *code &= 0x7F),
                }
            }
            Adversary::Equal => {
                x.fill(1.1);
                // 0x33 twice is a number of every format but 0.
                w.codes.fill(0x33);
                w.scales.fill(if scheme == Scheme::Nvfp4 { 0x39 } else { 127 });
                w.floats.fill(0.7);
            }
            Adversary::Outlier => x.chunks_exact_mut(k).for_each(|x| x[rng.below(k)] *= 2f32.powi(40)),
        }
        (w, x)
    }
}

/// Every scheme, activations that take AMX's tiles and those that do not, few rows and many, on every build.
#[test]
fn adversarial_data_within_the_bound() {
    let mut rng = Rng(4);
    let (n, k) = (18, 256);
    let builds: Vec<_> = tiers::all_builds().collect();
    for scheme in SCHEMES {
        for (adversary, m) in Adversary::ALL.into_iter().flat_map(|a| [1, 4, 20, 40].map(|m| (a, m))) {
            let (w, f) = adversary.make(&mut rng, scheme, (m, n, k));
            let w = w.view();
            let b: Vec<bf16> = f.iter().map(|v| bf16::from_f32(*v)).collect();
            let of_f: Activations<'_> = MatRef::new(&f, m, k).unwrap().into();
            let of_b: Activations<'_> = MatRef::new(&b, m, k).unwrap().into();
            for (name, x) in [("f32", of_f), ("bf16", of_b)] {
                let options = MatmulOptions::default();
                let expected = oracle::matmul(x, &w, &options, &[], OutputType::F32).unwrap();
                // A test of nothing where anything is admitted.
                assert!(
                    expected.iter().all(|e| e.value.is_finite() && e.bound.is_finite()),
                    "{scheme:?} {adversary:?}"
                );
                if adversary == Adversary::Cancels {
                    assert!(expected.iter().all(|e| e.value.abs() <= e.bound), "{scheme:?}");
                }
                for (build, cpu) in &builds {
                    let y = run(*cpu, x, &cpu.pack(&w).unwrap(), &options);
                    for (at, (y, e)) in y.iter().zip(&expected).enumerate() {
                        let what = format!("{name} x {scheme:?}, {adversary:?}, m {m} on {build}: output {at}");
                        assert!(e.admits(f64::from(*y)), "{what} is {y:e}, needed {e:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn rows_threads_and_tiers_do_not_change_bits() {
    let mut rng = Rng(5);
    for scheme in SCHEMES {
        // 130 rows pass the row block, 9 steps of k the decode block, 5 panels are split unevenly over threads.
        let (m, n, k) = (130, 70, 288);
        let w = RandomMatrix::new(&mut rng, scheme, n, k, 4);
        let x: Vec<bf16> = rng.wide(m * k, -3..=3).iter().map(|v| bf16::from_f32(*v)).collect();
        let bias: Vec<f32> = (0..n).map(|_| rng.normal()).collect();
        let options = MatmulOptions { bias: Some(&bias), activation: Activation::Silu, ..Default::default() };
        let cpu = Cpu::detect();
        let packed = cpu.pack(&w.view()).unwrap();
        let whole = run(cpu, MatRef::new(&x, m, k).unwrap().into(), &packed, &options);
        for row in [0, 1, 127, 128, 129] {
            let alone = run(cpu, MatRef::new(&x[row * k..][..k], 1, k).unwrap().into(), &packed, &options);
            assert_eq!(bits(&alone), bits(&whole[row * n..][..n]), "{scheme:?} row {row} alone");
        }
        for threads in 1..=8 {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let cpu = cpu.with_parallelism(Parallelism::Pool(&pool)).with_blocking(forks());
            let packed = cpu.pack(&w.view()).unwrap();
            let y = run(cpu, MatRef::new(&x, m, k).unwrap().into(), &packed, &options);
            assert_eq!(bits(&y), bits(&whole), "{scheme:?} on {threads} threads");
        }
        let few = MatRef::new(&x[..9 * k], 9, k).unwrap();
        let y = run(Cpu::baseline(), few.into(), &packed, &options);
        assert_eq!(bits(&y), bits(&whole[..9 * n]), "{scheme:?} on the baseline tier");
    }
}

/// A shard of n is the same rows; a shard of k is the same product of the columns.
#[test]
fn shards() {
    let mut rng = Rng(6);
    for scheme in SCHEMES {
        let (m, n, k) = (2, 256, 256);
        let w = RandomMatrix::new(&mut rng, scheme, n, k, 3);
        let w = w.view();
        let x = rng.wide(m * k, -1..=1);
        let cpu = Cpu::detect();
        let options = MatmulOptions::default();
        let whole = run(cpu, MatRef::new(&x, m, k).unwrap().into(), &cpu.pack(&w).unwrap(), &options);
        let tile = if let Scheme::Fp8Blockwise { n, .. } = scheme { n } else { 1 };
        let start = 96usize.next_multiple_of(tile);
        let shard = w.slice_n(start..n - 5).unwrap();
        let y = run(cpu, MatRef::new(&x, m, k).unwrap().into(), &cpu.pack(&shard).unwrap(), &options);
        for i in 0..m {
            assert_eq!(
                bits(&y[i * shard.n()..][..shard.n()]),
                bits(&whole[i * n + start..][..shard.n()]),
                "{scheme:?}"
            );
        }
        let shard = w.slice_k(128..256).unwrap();
        for (row, col) in [(0, 0), (n - 1, 127), (77, 31)] {
            assert_eq!(shard.value(row, col), w.value(row, col + 128), "{scheme:?}");
        }
        let strided = MatRef::with_stride(&x[128..], m, 128, k).unwrap();
        let y = run(cpu, strided.into(), &cpu.pack(&shard).unwrap(), &options);
        let expected = oracle::matmul(strided, &shard, &options, &[], OutputType::F32).unwrap();
        assert!(y.iter().zip(expected).all(|(y, e)| e.admits(f64::from(*y))), "{scheme:?}");
    }
}

#[test]
fn experts_give_the_bits_of_dense() {
    let mut rng = Rng(7);
    let (experts, n, k, tokens, top_k) = (6, 40, 96, 21, 3);
    for scheme in [Scheme::Mxfp4, Scheme::Fp8Blockwise { element: Fp8::E4M3Fn, n: 128, k: 32 }] {
        let data: Vec<_> = (0..experts).map(|_| RandomMatrix::new(&mut rng, scheme, n, k, 4)).collect();
        let stack = QuantizedExperts::new(data.iter().map(RandomMatrix::view).collect()).unwrap();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let cpu = Cpu::detect().with_parallelism(Parallelism::Pool(&pool)).with_blocking(forks());
        let packed = cpu.pack_experts(&stack).unwrap();
        let bias: Vec<f32> = (0..experts * n).map(|_| rng.normal()).collect();
        let options = MatmulOptions { bias: Some(&bias), ..Default::default() };
        // Expert 2 is never chosen.
        let ids: Vec<u32> = (0..tokens * top_k).map(|_| [0, 1, 3, 4, 5][rng.below(5)]).collect();
        let dense = |x: &[f32], e: usize| {
            let options = MatmulOptions { bias: Some(&bias[e * n..][..n]), ..Default::default() };
            run(
                Cpu::detect(),
                MatRef::new(x, 1, k).unwrap().into(),
                &cpu.pack(stack.get(e).unwrap()).unwrap(),
                &options,
            )
        };
        let mut ws = Workspace::new();
        for (source, rows) in [(RowSource::Token, tokens), (RowSource::Slot, tokens * top_k)] {
            let x = rng.wide(rows * k, -2..=2);
            let mut y = vec![0.0; tokens * top_k * n];
            let out = MatMut::new(&mut y, tokens * top_k, n).unwrap();
            cpu.gather_matmul(MatRef::new(&x, rows, k).unwrap(), source, &packed, &ids, top_k, out, &options, &mut ws)
                .unwrap();
            for (slot, &id) in ids.iter().enumerate() {
                let row = if source == RowSource::Token { slot / top_k } else { slot };
                assert_eq!(
                    bits(&y[slot * n..][..n]),
                    bits(&dense(&x[row * k..][..k], id as usize)),
                    "{source:?} slot {slot}"
                );
            }
        }
        let offsets = [0, 5, 5, 6, 17, 17, tokens as u32];
        let x = rng.wide(tokens * k, -2..=2);
        let mut y = vec![0.0; tokens * n];
        let out = MatMut::new(&mut y, tokens, n).unwrap();
        cpu.grouped_matmul(MatRef::new(&x, tokens, k).unwrap(), &packed, &offsets, out, &options, &mut ws).unwrap();
        for row in 0..tokens {
            let e = offsets.iter().rposition(|o| *o as usize <= row).unwrap();
            assert_eq!(bits(&y[row * n..][..n]), bits(&dense(&x[row * k..][..k], e)), "grouped row {row}");
        }
    }
}

#[test]
fn nan_and_infinity_are_never_numbers() {
    let cpu = Cpu::detect();
    let (n, k) = (20, 64);
    let mut rng = Rng(8);
    let x = vec![bf16::ONE; k];
    let mut w = RandomMatrix::new(&mut rng, Scheme::Mxfp4, n, k, 1);
    w.scales[3 * 2 + 1] = 255;
    let y = run(cpu, MatRef::new(&x, 1, k).unwrap().into(), &cpu.pack(&w.view()).unwrap(), &MatmulOptions::default());
    assert!(y.iter().enumerate().all(|(j, y)| y.is_nan() == (j == 3)), "scale 255");
    assert!(!cpu.pack(&w.view()).unwrap().is_finite());
    w.scales[3 * 2 + 1] = 127;
    assert!(cpu.pack(&w.view()).unwrap().is_finite());
    for (code, expect_nan) in [(0x7Fu8, true), (0xFF, true)] {
        let mut w = RandomMatrix::new(&mut rng, Scheme::Fp8PerChannel(Fp8::E4M3Fn), n, k, 1);
        w.codes[5 * k + 40] = code;
        let y =
            run(cpu, MatRef::new(&x, 1, k).unwrap().into(), &cpu.pack(&w.view()).unwrap(), &MatmulOptions::default());
        assert!(y.iter().enumerate().all(|(j, y)| y.is_nan() == (j == 5 && expect_nan)), "code {code:#x}");
        assert!(y.iter().filter(|y| y.is_nan()).all(|y| y.to_bits() == f32::NAN.to_bits()), "one NaN");
    }
    let mut w = RandomMatrix::new(&mut rng, Scheme::Fp8PerTensor(Fp8::E5M2), n, k, 1);
    w.codes[7 * k] = 0x7C;
    let y = run(cpu, MatRef::new(&x, 1, k).unwrap().into(), &cpu.pack(&w.view()).unwrap(), &MatmulOptions::default());
    assert!(y.iter().enumerate().all(|(j, y)| (*y == f32::INFINITY) == (j == 7)), "infinite code");
    let mut x = x;
    x[0] = bf16::NAN;
    let y = run(cpu, MatRef::new(&x, 1, k).unwrap().into(), &cpu.pack(&w.view()).unwrap(), &MatmulOptions::default());
    assert!(y.iter().all(|y| y.is_nan()), "NaN activation");
}

#[test]
fn packed_mxfp4_is_hardly_larger_than_its_source() {
    let w = RandomMatrix::new(&mut Rng(9), Scheme::Mxfp4, 2880, 2880, 4);
    let w = w.view();
    let packed = Cpu::detect().pack(&w).unwrap();
    assert!(packed.bytes() as f64 <= 1.02 * w.bytes() as f64, "{} for {}", packed.bytes(), w.bytes());
}

#[test]
fn refusals_name_operand_axis_and_extents() {
    let cpu = Cpu::detect();
    let ws = &mut Workspace::new();
    let w = RandomMatrix::new(&mut Rng(10), Scheme::Mxfp4, 8, 64, 1);
    let packed = cpu.pack(&w.view()).unwrap();
    let x = vec![0.0f32; 2 * 64];
    let mut y = vec![7.0f32; 2 * 8];
    let options = MatmulOptions::default();
    let mut fails = |x: MatRef<'_, f32>, m, n, options: &MatmulOptions<'_>| {
        let e = cpu.matmul(x, &packed, MatMut::new(&mut y[..m * n], m, n).unwrap(), options, ws).unwrap_err();
        assert!(y.iter().all(|v| *v == 7.0), "refused calls write nothing");
        e.to_string()
    };
    let full = MatRef::new(&x, 2, 64).unwrap();
    assert_eq!(fails(MatRef::new(&x, 4, 32).unwrap(), 2, 8, &options), "activations: axis k is 32, needed 64");
    assert_eq!(fails(full, 1, 8, &options), "output: axis m is 1, needed 2");
    assert_eq!(fails(full, 2, 7, &options), "output: axis n is 7, needed 8");
    let bias = [0.0; 9];
    let with_bias = MatmulOptions { bias: Some(&bias), ..options };
    assert_eq!(fails(full, 2, 8, &with_bias), "bias: the slice has 9 elements, its extents need 8");

    let experts = PackedExperts::new(vec![packed.clone(), packed.clone()]).unwrap();
    let mut grouped = |offsets: &[u32]| {
        let y = MatMut::new(&mut y, 2, 8).unwrap();
        cpu.grouped_matmul(full, &experts, offsets, y, &options, ws).unwrap_err().to_string()
    };
    assert_eq!(grouped(&[0, 2]), "expert offsets: the slice has 2 elements, its extents need 3");
    assert_eq!(grouped(&[1, 1, 2]), "expert offsets[0]: got 1, needed 0");
    assert_eq!(grouped(&[0, 3, 2]), "expert offsets[2]: got 2, needed an offset not below the one before");
    assert_eq!(grouped(&[0, 1, 1]), "expert offsets[2]: got 1, needed the number of rows of x");
    let mut gather = |ids: &[u32], top_k| {
        let y = MatMut::new(&mut y, 2, 8).unwrap();
        let source = RowSource::Slot;
        cpu.gather_matmul(full, source, &experts, ids, top_k, y, &options, ws).unwrap_err().to_string()
    };
    assert_eq!(gather(&[0, 2], 1), "expert ids[1]: index 2 is out of range, needed 0 <= index < 2");
    assert_eq!(gather(&[0, 1], 0), "expert ids: axis top_k is empty, needed at least 1");
    assert_eq!(gather(&[0, 1, 1], 2), "expert ids: axis token * top_k is 3, needed a multiple of 2");
    assert_eq!(
        PackedExperts::new(vec![]).unwrap_err().to_string(),
        "packed experts: axis expert is empty, needed at least 1"
    );

    let odd = QuantizedMatrix::fp8_blockwise(Fp8::E4M3Fn, 2, 100, &[0; 200], vec![1.0; 4], (1, 50)).unwrap();
    assert!(matches!(cpu.pack(&odd), Err(Error::Unsupported { .. })));
    let a = QuantizedMatrix::fp8_blockwise(Fp8::E4M3Fn, 1, 288, &[0; 288], vec![1.0; 3], (1, 96)).unwrap();
    let b = QuantizedMatrix::fp8_blockwise(Fp8::E4M3Fn, 1, 288, &[0; 288], vec![1.0; 5], (1, 64)).unwrap();
    let e = cpu.matmul(&a, &cpu.pack(&b).unwrap(), MatMut::new(&mut [0.0f32], 1, 1).unwrap(), &options, ws);
    let text = "scale tiles of 96 (activations) and 64 (weights) along k is not supported: \
                tiles must nest and be multiples of the canonical step of 32";
    assert_eq!(e.unwrap_err().to_string(), text);
}

/// Extents that cannot exist in memory are refused, not computed with.
#[test]
fn impossible_extents() {
    assert!(matches!(QuantizedMatrix::mxfp4(0, usize::MAX - 31, &[], &[]), Err(Error::Overflow { .. })));
    assert!(matches!(QuantizedMatrix::bf16(usize::MAX, usize::MAX, &[]), Err(Error::Overflow { .. })));
    assert!(MatRef::<f32>::new(&[], usize::MAX, 2).is_err());
    let none: &[f32] = &[];
    let huge = MatRef::new(none, 0, usize::MAX).unwrap();
    let w = QuantizedMatrix::bf16(0, usize::MAX / 64, &[]).unwrap();
    let packed = Cpu::detect().pack(&w).unwrap();
    let y = MatMut::new(&mut [] as &mut [f32], 0, 0).unwrap();
    let options = MatmulOptions::default();
    assert!(Cpu::detect().matmul(huge, &packed, y, &options, &mut Workspace::new()).is_err());
    let empty = MatRef::new(none, 0, usize::MAX / 64).unwrap();
    let y = MatMut::new(&mut [] as &mut [f32], 0, 0).unwrap();
    assert!(Cpu::detect().matmul(empty, &packed, y, &options, &mut Workspace::new()).is_ok());

    // Rows without columns take no memory, so there can be any number of them: nothing may walk or count them.
    let tall = QuantizedMatrix::fp8_blockwise(Fp8::E4M3Fn, usize::MAX / 64, 0, &[], vec![], (1, 32)).unwrap();
    let packed = Cpu::detect().pack(&tall).unwrap();
    let y = MatMut::new(&mut [] as &mut [f32], 0, usize::MAX / 64).unwrap();
    let x = MatRef::new(none, 0, 0).unwrap();
    assert!(Cpu::detect().matmul(x, &packed, y, &options, &mut Workspace::new()).is_ok());
    let x = MatRef::new(none, usize::MAX / 64, 0).unwrap();
    assert!(QuantizationError::measure(x, &tall).is_ok_and(|e| e.compared == 0));
    assert!(matches!(oracle::matmul(x, &tall, &options, &[], OutputType::F32), Err(Error::Overflow { .. })));
    let flat = QuantizedMatrix::bf16(0, 0, &[]).unwrap();
    assert_eq!(oracle::matmul(x, &flat, &options, &[], OutputType::F32), Ok(vec![]));
    let half = MatRef::new(none, 1 << 31, 0).unwrap();
    let other = QuantizedMatrix::bf16(1 << 31, 0, &[]).unwrap();
    assert!(matches!(oracle::matmul(half, &other, &options, &[], OutputType::F32), Err(Error::Overflow { .. })));
}
