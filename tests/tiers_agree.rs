//! Bits do not depend on the machine: every tier this host has gives those of a word-by-word reading of docs/numerics.md.
//! A tier that the host lacks is reported as skipped.

#[path = "support/random.rs"]
mod random;
#[path = "support/tiers.rs"]
mod tiers;

use half::{bf16, f16};
use random::{RandomMatrix, Rng, SCHEMES};
use trn_kernels::cpu::Blocking;
use trn_kernels::matmul::{Activations, MatmulOptions, PackedMatrix};
use trn_kernels::num::Fp8;
use trn_kernels::quant::{QuantizedMatrix, Scheme};
use trn_kernels::{Cpu, Isa, MatMut, MatRef, Workspace};

/// Loops cut so small that a few rows and panels cross every edge.
const TINY: Blocking = Blocking {
    streams: 2,
    prefetch: 64,
    chunk_steps: 1,
    k_block: 64,
    tile_steps: 1,
    rows: 9,
    sums: 16 * 16 * 4,
    tile_sums: 16 * 16 * 4,
    scratch: 1,
    tasks: 3,
    store: 64,
    fork: 0,
};

/// The same with blocks of rows that AMX's two rows of tiles do not divide.
const ROWS: Blocking = Blocking { tile_steps: 8, rows: 43, sums: 5 * 43 * 64, tile_sums: 5 * 43 * 64, ..TINY };

/// Whole and cut blocks of 32 rows one after the other.
const BLOCKS: Blocking = Blocking { tile_steps: 64, rows: 110, ..ROWS };

fn run(cpu: Cpu<'_>, x: Activations<'_>, w: &PackedMatrix) -> Vec<u32> {
    let (m, n) = (x.m(), w.n());
    let mut y = vec![0.5f32; m * n];
    let options = MatmulOptions::default();
    cpu.matmul(x, w, MatMut::new(&mut y, m, n).unwrap(), &options, &mut Workspace::new()).unwrap();
    y.iter().map(|v| v.to_bits()).collect()
}

fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0.0f32.copysign(x) } else { x }
}

/// docs/numerics.md sections 2 and 3 for one output, shares nothing with the kernels: x, w without f32 scales; `tile` and the f32
/// scale of each tile if they change along k; the scales of w and of x else.
fn canonical(x: &[f32], w: &[f32], tiles: Option<(usize, &dyn Fn(usize) -> f32)>, of_w: f32, of_x: f32) -> u32 {
    let dot = |x: &[f32], w: &[f32]| {
        let mut acc = 0.0f32;
        for (x, w) in x.chunks(32).zip(w.chunks(32)) {
            let mut chains = [0.0f32; 2];
            for (i, (x, w)) in x.iter().zip(w).enumerate() {
                chains[i % 2] = flush(flush(*x).mul_add(flush(*w), chains[i % 2]));
            }
            acc = flush(acc + flush(chains[0] + chains[1]));
        }
        acc
    };
    let sum = match tiles {
        None => dot(x, w),
        Some((tile, scale)) => {
            let parts = x.chunks(tile).zip(w.chunks(tile)).enumerate();
            parts.fold(0.0f32, |sum, (t, (x, w))| dot(x, w).mul_add(scale(t * tile), sum))
        }
    };
    let y = sum * of_w * of_x;
    (if y.is_nan() { f32::NAN } else { y }).to_bits()
}

/// Elements without f32 scales, as the kernels are to read them.
fn unscaled(w: &QuantizedMatrix<'_>) -> Vec<f32> {
    let at = |row, col| {
        let (code, scale) = (w.code(row, col).unwrap(), w.block_scale(row, col).unwrap());
        let element = match w.scheme().element() {
            None => bf16::from_bits(code).to_f32(),
            Some(format) => format.decode(code as u8),
        };
        element * scale
    };
    (0..w.n()).flat_map(|row| (0..w.k()).map(move |col| at(row, col))).collect()
}

fn expected(x: &[f32], x_scales: Option<&QuantizedMatrix<'_>>, m: usize, w: &QuantizedMatrix<'_>) -> Vec<u32> {
    let k = w.k();
    let values = unscaled(w);
    let tile_of = |q: &QuantizedMatrix<'_>| match q.scheme() {
        Scheme::Fp8Blockwise { k, .. } => Some(k),
        _ => None,
    };
    let (x_tile, w_tile) = (x_scales.and_then(tile_of), tile_of(w));
    let mut out = vec![];
    for i in 0..m {
        for j in 0..w.n() {
            let of = |q: Option<&QuantizedMatrix<'_>>, row, col| q.and_then(|q| q.outer_scale(row, col)).unwrap_or(1.0);
            let (xs, ws) = (&x[i * k..][..k], &values[j * k..][..k]);
            // One scale where the other side has none is 1.
            let scale =
                |col| x_tile.map_or(1.0, |_| of(x_scales, i, col)) * w_tile.map_or(1.0, |_| of(Some(w), j, col));
            let tile = x_tile.into_iter().chain(w_tile).min();
            let of_w = w_tile.map_or_else(|| of(Some(w), j, 0), |_| 1.0);
            let of_x = x_tile.map_or_else(|| of(x_scales, i, 0), |_| 1.0);
            out.push(canonical(xs, ws, tile.map(|t| (t, &scale as &dyn Fn(usize) -> f32)), of_w, of_x));
        }
    }
    out
}

/// One problem on every tier, with the machine's loops and with tiny ones.
fn check(x: Activations<'_>, exact: &[f32], w: &QuantizedMatrix<'_>, what: &str) {
    let of_x = if let Activations::Quantized(q) = x { Some(q) } else { None };
    let want = expected(exact, of_x, x.m(), w);
    for (name, cpu) in tiers::all_builds() {
        let packed = cpu.pack(w).unwrap();
        for (cut, cpu) in [
            ("default", cpu),
            ("tiny", cpu.with_blocking(TINY)),
            ("row", cpu.with_blocking(ROWS)),
            ("block", cpu.with_blocking(BLOCKS)),
        ] {
            let got = run(cpu, x, &packed);
            if let Some(at) = got.iter().zip(&want).position(|(a, b)| a != b) {
                let (got, want) = (f32::from_bits(got[at]), f32::from_bits(want[at]));
                panic!("{what} on {name}, {cut} loops: output {at} is {got:e}, needed {want:e}");
            }
        }
    }
}

fn every_activation(rng: &mut Rng, f: &[f32], m: usize, w: &QuantizedMatrix<'_>, what: &str) {
    let k = w.k();
    let b: Vec<bf16> = f.iter().map(|v| bf16::from_f32(*v)).collect();
    let h: Vec<f16> = f.iter().map(|v| f16::from_f32(*v)).collect();
    check(MatRef::new(f, m, k).unwrap().into(), f, w, &format!("f32 x {what}"));
    let exact: Vec<f32> = b.iter().map(|v| v.to_f32()).collect();
    check(MatRef::new(&b, m, k).unwrap().into(), &exact, w, &format!("bf16 x {what}"));
    let exact: Vec<f32> = h.iter().map(|v| v.to_f32()).collect();
    check(MatRef::new(&h, m, k).unwrap().into(), &exact, w, &format!("f16 x {what}"));
    let q = RandomMatrix::new(rng, w.scheme(), m, k, 3);
    let q = q.view();
    check((&q).into(), &unscaled(&q), w, &format!("{:?} x {what}", w.scheme()));
}

/// Rows around the decode kernel's 2 and 4, the register blocks' 6 and 8 and the tiles' 16 and 32; n around panels of 16 and blocks of 3; k around steps,
/// groups of 4 steps and the blocks of k.
#[test]
fn every_scheme_activation_and_edge() {
    let mut rng = Rng(1);
    for (s, scheme) in SCHEMES.into_iter().enumerate() {
        let shapes = [
            (1, 1, 32),
            (1, 130, 288),
            (2, 33, 128),
            (3, 16, 160),
            (4, 65, 256),
            (5, 15, 96),
            (7, 47, 544),
            (6, 40, 96),
            (8, 33, 160),
            (9, 49, 64),
            (10, 35, 32),
            (11, 17, 128),
            (12, 40, 96),
            (13, 33, 64),
            (14, 18, 32),
            (15, 49, 160),
            (16, 80, 128),
            (17, 64, 416),
            (50, 65, 672),
        ];
        for (i, (m, n, k)) in shapes.into_iter().enumerate() {
            let w = RandomMatrix::new(&mut rng, scheme, n, k, 1 + (s + i) % 4);
            let f = rng.wide(m * k, -3..=3);
            every_activation(&mut rng, &f, m, &w.view(), &format!("{scheme:?} {m}x{n}x{k}"));
        }
    }
}

/// Several whole blocks of 32 rows and what is left of one, several chunks of k, and one, two and more runs between f32 scales.
#[test]
fn many_blocks_of_rows() {
    let mut rng = Rng(7);
    let fp8 = |k| Scheme::Fp8Blockwise { element: Fp8::E4M3Fn, n: 48, k };
    for scheme in [Scheme::Mxfp4, Scheme::Bf16, fp8(128), fp8(256)] {
        for (m, n, k) in [(64, 33, 128), (96, 16, 640), (135, 97, 384), (65, 50, 1152)] {
            let w = RandomMatrix::new(&mut rng, scheme, n, k, 2);
            let b: Vec<bf16> = rng.wide(m * k, -3..=3).iter().map(|v| bf16::from_f32(*v)).collect();
            let exact: Vec<f32> = b.iter().map(|v| v.to_f32()).collect();
            check(MatRef::new(&b, m, k).unwrap().into(), &exact, &w.view(), &format!("bf16 x {scheme:?} {m}x{n}x{k}"));
            // Scales of rows and of panels.
            let q = RandomMatrix::new(&mut rng, Scheme::Fp8Blockwise { element: Fp8::E4M3Fn, n: 1, k: 128 }, m, k, 2);
            let q = q.view();
            check((&q).into(), &unscaled(&q), &w.view(), &format!("{:?} x {scheme:?} {m}x{n}x{k}", q.scheme()));
        }
    }
}

/// More rows than one block takes, and a last block of few: of so few that AMX decodes more steps at a time, and of one tile.
#[test]
fn last_blocks() {
    let mut rng = Rng(8);
    for scheme in [Scheme::Mxfp4, Scheme::Fp8Blockwise { element: Fp8::E4M3Fn, n: 48, k: 128 }] {
        for m in [512 + 5, 512 + 90] {
            let (n, k) = (36, 544);
            let w = RandomMatrix::new(&mut rng, scheme, n, k, 2);
            let b: Vec<bf16> = rng.wide(m * k, -3..=3).iter().map(|v| bf16::from_f32(*v)).collect();
            let exact: Vec<f32> = b.iter().map(|v| v.to_f32()).collect();
            check(MatRef::new(&b, m, k).unwrap().into(), &exact, &w.view(), &format!("bf16 x {scheme:?} {m}x{n}x{k}"));
        }
    }
}

/// Scale tiles that hold all of k, though no whole number of groups of four steps.
#[test]
fn tiles_longer_than_k() {
    let mut rng = Rng(9);
    for (tile, k) in [(200, 200), (160, 150), (416, 300), (96, 96)] {
        let scheme = Scheme::Fp8Blockwise { element: Fp8::E4M3Fn, n: 1, k: tile };
        for m in [1, 20] {
            let w = RandomMatrix::new(&mut rng, scheme, 20, k, 2);
            let f = rng.wide(m * k, -3..=3);
            every_activation(&mut rng, &f, m, &w.view(), &format!("tiles of {tile}, {m}x20x{k}"));
        }
    }
}

#[test]
fn nothing() {
    for scheme in SCHEMES {
        for (m, n, k) in [(0, 5, 32), (3, 0, 32), (2, 17, 0), (0, 0, 0)] {
            let w = RandomMatrix::new(&mut Rng(2), scheme, n, k, 1);
            let x = vec![1.0f32; m * k];
            check(MatRef::new(&x, m, k).unwrap().into(), &x, &w.view(), &format!("{scheme:?} {m}x{n}x{k}"));
        }
    }
}

/// k that does not end at a step, where the scheme allows it.
#[test]
fn ragged_k() {
    let mut rng = Rng(3);
    let tiled = Scheme::Fp8Blockwise { element: Fp8::E4M3Fn, n: 24, k: 64 };
    for scheme in [Scheme::Bf16, Scheme::Fp8PerTensor(Fp8::E5M2), Scheme::Fp8PerChannel(Fp8::E3M4), tiled] {
        for (m, n, k) in [(1, 17, 1), (2, 31, 33), (6, 20, 200)] {
            let w = RandomMatrix::new(&mut rng, scheme, n, k, 2);
            let f = rng.wide(m * k, -3..=3);
            every_activation(&mut rng, &f, m, &w.view(), &format!("{scheme:?} {m}x{n}x{k}"));
        }
    }
}

/// Exponents around both ends of f32's range: the flush decides, and scaling a step's sum is not scaling its elements. Up to more rows
/// than a tile has.
#[test]
fn the_ends_of_the_range() {
    let mut rng = Rng(4);
    for scheme in
        [Scheme::Mxfp4, Scheme::Mxfp8(Fp8::E4M3Fn), Scheme::Mxfp8(Fp8::E5M2), Scheme::Mxfp8(Fp8::E3M4), Scheme::Bf16]
    {
        for (x_exponents, scales) in [
            (-60..=-40, 40..=110),
            (-110..=-60, 100..=160),
            (60..=110, 140..=200),
            (-4..=4, 0..=254),
            (100..=125, 0..=40),
            // Sums of sixteen products just within f32's range, and just beyond.
            (20..=21, 214..=221),
            (22..=24, 221..=226),
            // Subnormals in x, and weights so large that no sum is one.
            (-133..=-120, 150..=180),
        ] {
            for m in [1, 4, 10, 20, 40] {
                let (n, k) = (35, 192);
                let mut w = RandomMatrix::new(&mut rng, scheme, n, k, 3);
                rescale(&mut rng, &mut w, scales.clone());
                let f: Vec<f32> = rng.wide(m * k, x_exponents.clone());
                let b: Vec<bf16> = f.iter().map(|v| bf16::from_f32(*v)).collect();
                let exact: Vec<f32> = b.iter().map(|v| v.to_f32()).collect();
                let what = format!("{scheme:?}, x 2^{x_exponents:?}, scales {scales:?}, m {m}");
                check(MatRef::new(&b, m, k).unwrap().into(), &exact, &w.view(), &what);
            }
        }
    }
}

/// Every finite code of a format under every block scale, one at a time: rows of x are those of the unit matrix. Sixteen scales at a time, so
/// that those which keep tiles from being taken do not keep the others, too.
#[test]
fn every_scale_and_code() {
    let mx = [Fp8::E4M3Fn, Fp8::E4M3Ieee, Fp8::E5M2, Fp8::E3M4].map(Scheme::Mxfp8);
    let of_scales = [(Scheme::Nvfp4, 0x7F), (Scheme::Mxfp4, 255)].into_iter().chain(mx.map(|scheme| (scheme, 255)));
    let without = mx.map(|scheme| (Scheme::Fp8PerTensor(scheme.fp8().unwrap()), 1));
    for (scheme, scales) in of_scales.chain(without) {
        let k = if scheme.fp8().is_some() { 256 } else { 32 };
        let unit = |row: usize| (0..k).map(move |col| bf16::from_f32(f32::from(u8::from(row == col))));
        let x: Vec<bf16> = (0..k).flat_map(unit).collect();
        let exact: Vec<f32> = x.iter().map(|v| v.to_f32()).collect();
        for first in (0..scales).step_by(16) {
            let n = 16.min(scales - first);
            let mut w = RandomMatrix::new(&mut Rng(11), scheme, n, k, 1);
            for (i, codes) in w.codes.iter_mut().enumerate() {
                *codes = match scheme.fp8() {
                    Some(format) if format.values()[i % 256].is_finite() => i as u8,
                    Some(_) => 0,
                    // A row's 32 codes are all of them twice.
                    None => ((2 * i) % 16 + 16 * ((2 * i + 1) % 16)) as u8,
                };
            }
            let of_row = w.scales.len() / n;
            // A row's blocks have scales of their own, so that none can be taken for another's.
            let of = |i: usize| (first + (i / of_row.max(1) + i % of_row.max(1)) % n) as u8;
            w.scales.iter_mut().enumerate().for_each(|(i, scale)| *scale = of(i));
            w.floats.fill(1.0);
            let want = expected(&exact, None, k, &w.view());
            for (name, cpu) in tiers::all_builds() {
                let packed = cpu.pack(&w.view()).unwrap();
                // By what takes few rows and by what takes many.
                for rows in [16, k] {
                    for (x, want) in x.chunks(rows * k).zip(want.chunks(rows * n)) {
                        let got = run(cpu, MatRef::new(x, rows, k).unwrap().into(), &packed);
                        assert!(got == want, "{scheme:?}, scales from {first} on, {rows} rows on {name}");
                    }
                }
            }
        }
    }
}

fn rescale(rng: &mut Rng, w: &mut RandomMatrix, scales: std::ops::RangeInclusive<u8>) {
    let count = usize::from(scales.end() - scales.start()) + 1;
    w.scales.iter_mut().for_each(|scale| *scale = scales.start() + rng.below(count) as u8);
}

/// The same with quantized x: codes that block scales make subnormal, with bits below what bf16 holds, and infinite.
#[test]
fn the_ends_of_the_range_in_codes() {
    let mut rng = Rng(10);
    let (e5m2, e4m3) = (Scheme::Mxfp8(Fp8::E5M2), Scheme::Mxfp8(Fp8::E4M3Fn));
    for (of_x, of_w) in [(Scheme::Mxfp4, Scheme::Mxfp4), (e5m2, Scheme::Mxfp4), (e4m3, e4m3), (e5m2, e5m2)] {
        for (x_scales, scales) in [
            // Tiles are taken: what is subnormal in x is zero, and weights are so large that no sum is subnormal.
            (0..=12, 150..=180),
            (0..=2, 160..=160),
            (110..=140, 0..=12),
            (60..=90, 60..=90),
            (0..=254, 0..=254),
            (240..=254, 1..=40),
            (240..=254, 120..=130),
        ] {
            for m in [1, 4, 20, 40] {
                let (n, k) = (35, 192);
                let mut w = RandomMatrix::new(&mut rng, of_w, n, k, 3);
                rescale(&mut rng, &mut w, scales.clone());
                let mut x = RandomMatrix::new(&mut rng, of_x, m, k, 3);
                rescale(&mut rng, &mut x, x_scales.clone());
                let what = format!("{of_x:?} of {x_scales:?} x {of_w:?} of {scales:?}, m {m}");
                let x = x.view();
                check((&x).into(), &unscaled(&x), &w.view(), &what);
            }
        }
    }
    // bf16 as a scheme: subnormals are its own codes.
    for m in [1, 20, 40] {
        let (n, k) = (35, 192);
        let w = RandomMatrix::new(&mut rng, Scheme::Mxfp4, n, k, 3);
        let mut x = RandomMatrix::new(&mut rng, Scheme::Bf16, m, k, 3);
        let subnormals = (0..m * k).step_by(3).map(|at| 2 * at);
        for at in subnormals {
            let code = (rng.next() as u16) & 0x807F;
            x.codes[at..at + 2].copy_from_slice(&code.to_le_bytes());
        }
        let x = x.view();
        check((&x).into(), &unscaled(&x), &w.view(), &format!("bf16 codes x MXFP4, m {m}"));
    }
}

/// Row 0 holds every code there is, the next ones one infinity or NaN each, one a NaN scale, so that the others tell whether they hear
/// of it; a block of zeros under the smallest scale.
fn no_numbers(rng: &mut Rng, scheme: Scheme, n: usize, k: usize) -> RandomMatrix {
    let mut q = RandomMatrix::new(rng, scheme, n, k, 2);
    let row_bytes = k * scheme.bits() / 8;
    if let Some(format) = scheme.fp8() {
        (0..row_bytes).for_each(|i| q.codes[i] = i as u8);
        let codes = |is: fn(&f32) -> bool| {
            let code_if = move |(code, v): (usize, &f32)| is(v).then_some(code as u8);
            let mut all = format.values().iter().enumerate().filter_map(code_if);
            (all.next(), all.next_back())
        };
        let (infinities, nans) = (codes(|v| v.is_infinite()), codes(|v| v.is_nan()));
        for (row, code) in (1..n).zip([infinities.0, infinities.1, nans.0, nans.1]) {
            q.codes[row * row_bytes + rng.below(k)] = code.unwrap_or(0x80);
        }
    }
    if scheme == Scheme::Bf16 {
        for (row, value) in (0..n).zip([f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e-40, f32::MAX, -0.0]) {
            let at = row * row_bytes + 2 * rng.below(k);
            // What rounds to infinity is the largest number here.
            let value = if value == f32::MAX { bf16::MAX } else { bf16::from_f32(value) };
            q.codes[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
    }
    let row_scales = q.scales.len() / n;
    if n > 5 && row_scales > 0 {
        q.scales[5 * row_scales + 1] = if scheme == Scheme::Nvfp4 { 0x7F } else { 255 };
    }
    if matches!(scheme, Scheme::Mxfp4 | Scheme::Mxfp8(_)) {
        q.scales[2] = 0;
        q.codes[2 * 32 * scheme.bits() / 8..3 * 32 * scheme.bits() / 8].fill(0);
    }
    q
}

/// Every code, infinities and NaN among them, NaN scales, blocks of zeros under the smallest scale; x with zeros of both signs,
/// subnormals, infinities, NaN and the largest numbers. In weights, in x, and in both, so that one cannot hide the other; up to more
/// rows than a tile has.
#[test]
fn every_code_and_what_is_no_number() {
    let mut rng = Rng(5);
    let specials =
        [0.0, -0.0, 1e-40, -1e-40, f32::MIN_POSITIVE, 3e38, -3e38, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
    for scheme in SCHEMES {
        for (m, in_w, in_x) in [1, 3, 8, 20, 40]
            .into_iter()
            .flat_map(|m| [(true, false), (false, true), (true, true)].map(|(in_w, in_x)| (m, in_w, in_x)))
        {
            let (n, k) = (21, 256);
            let mut operand = |rows, special| match special {
                true => no_numbers(&mut rng, scheme, rows, k),
                false => RandomMatrix::new(&mut rng, scheme, rows, k, 2),
            };
            let (w, x) = (operand(n, in_w), operand(m, in_x));
            let mut f = rng.wide(m * k, -2..=2);
            if in_x {
                specials.iter().for_each(|v| f[rng.below(m * k)] = *v);
            }
            let what = format!("{scheme:?}, m {m}, no numbers in w {in_w}, in x {in_x}");
            check(MatRef::new(&f, m, k).unwrap().into(), &f, &w.view(), &format!("f32 x {what}"));
            let b: Vec<bf16> = f.iter().map(|v| bf16::from_f32(*v)).collect();
            let exact: Vec<f32> = b.iter().map(|v| v.to_f32()).collect();
            check(MatRef::new(&b, m, k).unwrap().into(), &exact, &w.view(), &format!("bf16 x {what}"));
            let x = x.view();
            check((&x).into(), &unscaled(&x), &w.view(), &format!("codes x {what}"));
        }
    }
}

/// A sum that is flushed to -0 keeps its sign through weights of -0 alone: who reads them as +0, as tiles do, must notice that sums may
/// be flushed.
#[test]
fn zeros_of_flushed_sums() {
    let mut rng = Rng(11);
    let (n, k) = (20, 96);
    for scheme in [
        Scheme::Bf16,
        Scheme::Mxfp4,
        Scheme::Mxfp8(Fp8::E4M3Fn),
        Scheme::Mxfp8(Fp8::E5M2),
        Scheme::Fp8PerTensor(Fp8::E4M3Fn),
    ] {
        // The sum of the first step is the least normal number, that of the second makes it a negative subnormal, those of
        // the third are flushed at once and meet -0 from then on.
        let weight = |col: usize| match col {
            0 => 1.0,
            32 => -1.5,
            64 | 65 => -0.5,
            _ => -0.0f32,
        };
        let x_row = |col: usize| if [0, 32, 64, 65].contains(&col) { f32::MIN_POSITIVE } else { 1.0 };
        let mut w = RandomMatrix::new(&mut rng, scheme, n, k, 0);
        for (at, value) in (0..n * k).map(|at| (at, weight(at % k))) {
            match scheme.fp8() {
                Some(format) => {
                    let code = format.values().iter().position(|v| v.to_bits() == value.to_bits());
                    w.codes[at] = code.unwrap() as u8;
                }
                None if scheme == Scheme::Bf16 => {
                    w.codes[2 * at..2 * at + 2].copy_from_slice(&bf16::from_f32(value).to_le_bytes());
                }
                None => {
                    let magnitude = (value.abs() * 2.0) as u8;
                    let (code, shift) = (magnitude | u8::from(value.is_sign_negative()) << 3, at % 2 * 4);
                    w.codes[at / 2] = w.codes[at / 2] & !(15 << shift) | code << shift;
                }
            }
        }
        // Every row does so, or the first alone: one row decides for all.
        for (m, rows) in [1, 4, 20, 40].into_iter().flat_map(|m| [(m, 1), (m, m)]) {
            let value = |at: usize| if at / k < rows { x_row(at % k) } else { 1.0 };
            let x: Vec<bf16> = (0..m * k).map(|at| bf16::from_f32(value(at))).collect();
            let exact: Vec<f32> = x.iter().map(|v| v.to_f32()).collect();
            let zeros = &expected(&exact, None, m, &w.view())[..rows * n];
            assert!(zeros.iter().all(|y| *y == (-0.0f32).to_bits()), "{scheme:?}");
            check(MatRef::new(&x, m, k).unwrap().into(), &exact, &w.view(), &format!("{scheme:?}, m {m}, rows {rows}"));
        }
    }
}

/// The reference is not blind: nibbles swapped, a scale off by one, a row shifted by a step are other bits.
#[test]
fn the_check_can_fail() {
    let mut rng = Rng(6);
    let w = RandomMatrix::new(&mut rng, Scheme::Mxfp4, 16, 64, 1);
    let x = rng.wide(64, -1..=1);
    let want = expected(&x, None, 1, &w.view());
    let mut swapped = RandomMatrix::new(&mut Rng(6), Scheme::Mxfp4, 16, 64, 1);
    swapped.codes.iter_mut().for_each(|code| *code = code.rotate_left(4));
    assert_ne!(want, expected(&x, None, 1, &swapped.view()));
    let mut scaled = RandomMatrix::new(&mut Rng(6), Scheme::Mxfp4, 16, 64, 1);
    scaled.scales[5] += 1;
    assert_ne!(want, expected(&x, None, 1, &scaled.view()));
}

/// The words name what runs.
#[test]
fn explained() {
    use trn_kernels::matmul::MatmulProblem;
    for (_, cpu) in tiers::all_builds() {
        let text = |m| cpu.explain(&MatmulProblem { scheme: Scheme::Mxfp4, m, n: 4096, k: 2880 }).unwrap();
        let one = text(1);
        let decodes = cpu.isa() > Isa::Portable;
        assert_eq!(one.contains("Decode kernel"), decodes, "{one}");
        assert!(one.contains(&format!("on {}", cpu.isa())) && one.contains("packed layout v3"), "{one}");
        assert!(text(512).contains("Prefill kernel"));
        for m in [1, 512] {
            assert_eq!(text(m).contains("pairs of bf16"), cpu.isa() == Isa::Avx512Bf16, "{}", text(m));
        }
        // Rows that fill at most one tile, and more.
        let amx = cpu.isa() == Isa::Amx;
        for (m, kernel) in [(1, "AMX decode kernel"), (16, "AMX decode kernel"), (17, "AMX prefill kernel")] {
            let text = text(m);
            assert_eq!(text.contains(kernel), amx, "{text}");
            assert_eq!(text.matches("AMX").count(), usize::from(amx), "{text}");
        }
        // Scales that change inside a group of four steps are not for tiles.
        let short = Scheme::Fp8Blockwise { element: Fp8::E4M3Fn, n: 1, k: 64 };
        let short = cpu.explain(&MatmulProblem { scheme: short, m: 1, n: 16, k: 256 }).unwrap();
        assert!(!short.contains("AMX"), "{short}");
        let tile = Scheme::Fp8Blockwise { element: Fp8::E4M3Fn, n: 1, k: 50 };
        assert!(cpu.explain(&MatmulProblem { scheme: tile, m: 1, n: 1, k: 100 }).is_err());
    }
}

/// `TRN_KERNELS_ISA` in a process of its own: this test runs itself again with the variable set.
#[test]
fn the_environment_caps_the_tier() {
    const SELF: &str = "the_environment_caps_the_tier";
    tiers::with_amx();
    if std::env::var_os("TIERS_AGREE_CHILD").is_some() {
        println!("{:?} / {}", Cpu::try_detect().map(|cpu| cpu.isa()), Cpu::detect().isa());
        return;
    }
    let detected = |value: &str| {
        let test = std::env::current_exe().unwrap();
        let mut child = std::process::Command::new(test);
        child.args(["--exact", SELF, "--nocapture"]).env("TIERS_AGREE_CHILD", "1").env("TRN_KERNELS_ISA", value);
        String::from_utf8(child.output().unwrap().stdout).unwrap()
    };
    for isa in Isa::ALL {
        let text = detected(isa.name());
        match Cpu::with_isa(isa) {
            Ok(_) => assert!(text.contains(&format!("Ok({isa:?}) / {isa}")), "{text}"),
            Err(_) => {
                assert!(text.contains("Err(Unsupported") && text.contains(&format!("/ {}", Isa::best())), "{text}");
            }
        }
    }
    let text = detected("mmx");
    assert!(text.contains("Err(Value") && text.contains(&format!("/ {}", Isa::best())), "{text}");
}
