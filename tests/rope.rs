//! Rotary positions: against f64 within the stated bound, in the stated order to the bit, YaRN's frequencies, planted bugs.
#![forbid(unsafe_code)]

#[path = "support/exact.rs"]
mod exact;
#[path = "support/random.rs"]
mod random;

use exact::{Exact, U, bits, cast, for_each_type, judge, wide};
use proptest::prelude::*;
use random::Rng;
use trn_kernels::layer::{RopeFrequencies, RopePairs, RopeScaling, RopeTable};
use trn_kernels::{Cpu, HeadsMut};

fn yarn(truncate: bool) -> RopeScaling {
    let (factor, original_context, beta_fast, beta_slow) = (32.0, 4096, 32.0, 1.0);
    RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, truncate, concentration: None }
}

/// `[tokens, heads, head_dim]` turned, in f64 from the f64 frequencies, with the bound of f32 arithmetic.
fn rope_exact(
    x: &[f64],
    head_dim: usize,
    heads: usize,
    positions: &[u32],
    f: &RopeFrequencies,
    pairs: RopePairs,
) -> Vec<Exact> {
    let half = f.rotary_dim() / 2;
    let mut out: Vec<Exact> = x.iter().map(|&value| Exact { value, bound: 0.0 }).collect();
    for (h, head) in x.chunks(head_dim).enumerate() {
        for (i, inv_freq) in f.inv_freq().iter().enumerate() {
            let (a, b) = match pairs {
                RopePairs::HalfSplit => (i, i + half),
                RopePairs::Interleaved => (2 * i, 2 * i + 1),
            };
            let (sin, cos) = (f64::from(positions[h / heads]) * inv_freq).sin_cos();
            let (sin, cos) = (sin * f.concentration(), cos * f.concentration());
            let (x, y) = (head[a], head[b]);
            let bound = |p: f64, q: f64| 3.01 * U * (p.abs() + q.abs());
            out[h * head_dim + a] = Exact { value: x * cos - y * sin, bound: bound(x * cos, y * sin) };
            out[h * head_dim + b] = Exact { value: y * cos + x * sin, bound: bound(y * cos, x * sin) };
        }
    }
    out
}

fn table(f: &RopeFrequencies, positions: &[u32]) -> RopeTable {
    let mut table = RopeTable::default();
    table.fill(f, positions).unwrap();
    table
}

#[test]
fn rope_is_within_its_bound() {
    let mut rng = Rng(4);
    let positions = [0, 1, 2, 4095, 4096, 131_071, 1 << 31, u32::MAX];
    let (heads, head_dim) = (3, 64);
    let x = rng.wide(positions.len() * heads * head_dim, -2..=2);
    let scalings = [RopeScaling::None, RopeScaling::Linear { factor: 4.0 }, yarn(false), yarn(true)];
    for (scaling, rotary_dim) in scalings.into_iter().flat_map(|s| [64, 32, 2].map(|d| (s, d))) {
        let f = RopeFrequencies::new(150_000.0, rotary_dim, scaling).unwrap();
        let table = table(&f, &positions);
        for pairs in [RopePairs::HalfSplit, RopePairs::Interleaved] {
            for_each_type!(T => {
                let mut y = cast::<T>(&x);
                let exact = rope_exact(&wide(&y), head_dim, heads, &positions, &f, pairs);
                let view = HeadsMut::new(&mut y, positions.len(), heads, head_dim).unwrap();
                table.apply(&Cpu::detect(), pairs, view).unwrap();
                judge(&y, &exact).unwrap();
            });
        }
    }
}

#[test]
fn rope_has_the_bits_of_its_stated_order_and_leaves_the_tail() {
    let f = RopeFrequencies::new(10_000.0, 4, RopeScaling::None).unwrap();
    let table = table(&f, &[5]);
    let (cos, sin) = table.cos_sin(0).unwrap();
    let x = [0.3f32, -1.7, 2.5, 0.11, 9.0, -8.0];
    let turn =
        |a: usize, b: usize, i: usize| (x[a].mul_add(cos[i], -(x[b] * sin[i])), x[b].mul_add(cos[i], x[a] * sin[i]));
    let ((a0, b0), (a1, b1)) = (turn(0, 2, 0), turn(1, 3, 1));
    let mut y = x;
    table.apply(&Cpu::detect(), RopePairs::HalfSplit, HeadsMut::new(&mut y, 1, 1, 6).unwrap()).unwrap();
    assert_eq!(bits(&y), bits(&[a0, a1, b0, b1, 9.0, -8.0]));
    let ((a0, b0), (a1, b1)) = (turn(0, 1, 0), turn(2, 3, 1));
    let mut y = x;
    table.apply(&Cpu::detect(), RopePairs::Interleaved, HeadsMut::new(&mut y, 1, 1, 6).unwrap()).unwrap();
    assert_eq!(bits(&y), bits(&[a0, b0, a1, b1, 9.0, -8.0]));
}

/// facts of gpt-oss: head_dim 64, theta 150000, factor 32 on 4096 tokens.
#[test]
fn yarn_frequencies_are_those_of_gpt_oss() {
    let f = RopeFrequencies::new(150_000.0, 64, yarn(false)).unwrap();
    assert!((f.concentration() - 1.346_573_590_279_972_6).abs() < 1e-15);
    let (low, high) = (8.092_779_115_512_402, 17.398_024_501_588_56);
    for (i, got) in f.inv_freq().iter().enumerate() {
        let unscaled = 150_000f64.powf(-(i as f64) / 32.0);
        let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        let want = ramp * unscaled / 32.0 + (1.0 - ramp) * unscaled;
        assert!((got - want).abs() <= 1e-12 * want, "{i}: {got:e}, {want:e}");
    }
    // Rounded outwards: low 8, high 18.
    let f = RopeFrequencies::new(150_000.0, 64, yarn(true)).unwrap();
    let (unscaled, ramp) = (150_000f64.powf(-10.0 / 32.0), 0.2);
    assert!((f.inv_freq()[10] / ((ramp / 32.0 + 1.0 - ramp) * unscaled) - 1.0).abs() < 1e-12);
}

#[test]
fn yarn_ramps_that_leave_the_head_stay_defined() {
    for (original_context, beta_fast) in [(1, 32.0), (u32::MAX, 1.5), (4096, 1.000_000_1)] {
        let scaling = RopeScaling::Yarn {
            factor: 8.0,
            original_context,
            beta_fast,
            beta_slow: 1.0,
            truncate: true,
            concentration: Some(1.0),
        };
        let f = RopeFrequencies::new(10_000.0, 8, scaling).unwrap();
        let plain = RopeFrequencies::new(10_000.0, 8, RopeScaling::None).unwrap();
        assert_eq!(f.concentration(), 1.0);
        for (got, plain) in f.inv_freq().iter().zip(plain.inv_freq()) {
            assert!(*got >= plain / 8.0 * 0.999_999 && *got <= plain * 1.000_001, "{original_context}: {got} {plain}");
        }
    }
    // A context so long that every frequency turns often enough: none is slowed down.
    let long = RopeScaling::Yarn {
        factor: 8.0,
        original_context: u32::MAX,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate: false,
        concentration: None,
    };
    let f = RopeFrequencies::new(1.001, 8, long).unwrap();
    assert_eq!(f.inv_freq(), RopeFrequencies::new(1.001, 8, RopeScaling::None).unwrap().inv_freq());
}

#[test]
fn rope_table_can_be_filled_again() {
    let f = RopeFrequencies::new(10_000.0, 8, RopeScaling::None).unwrap();
    let mut again = table(&f, &[1, 2, 3]);
    again.fill(&f, &[9]).unwrap();
    assert_eq!(again, table(&f, &[9]));
    assert_eq!((again.tokens(), again.rotary_dim()), (1, 8));
    assert!(again.cos_sin(1).is_none());
}

#[test]
fn planted_rope_pairs_are_caught() {
    let f = RopeFrequencies::new(10_000.0, 8, RopeScaling::None).unwrap();
    let x: Vec<f32> = Rng(5).wide(16, 0..=0);
    let exact = rope_exact(&wide(&x), 8, 1, &[3, 70], &f, RopePairs::HalfSplit);
    let turned = |pairs, positions: &[u32]| {
        let mut y = x.clone();
        table(&f, positions).apply(&Cpu::detect(), pairs, HeadsMut::new(&mut y, 2, 1, 8).unwrap()).unwrap();
        y
    };
    judge(&turned(RopePairs::HalfSplit, &[3, 70]), &exact).unwrap();
    judge(&turned(RopePairs::Interleaved, &[3, 70]), &exact).unwrap_err();
    judge(&turned(RopePairs::HalfSplit, &[4, 71]), &exact).unwrap_err();
    // Members of a pair exchanged: the rotation runs backwards.
    let mut swapped = x.clone();
    swapped.chunks_mut(8).for_each(|head| head.rotate_left(4));
    let view = HeadsMut::new(&mut swapped, 2, 1, 8).unwrap();
    table(&f, &[3, 70]).apply(&Cpu::detect(), RopePairs::HalfSplit, view).unwrap();
    swapped.chunks_mut(8).for_each(|head| head.rotate_left(4));
    judge(&swapped, &exact).unwrap_err();
}

#[test]
fn heads_inside_a_fused_qkv_row_are_turned_where_they_lie() {
    let f = RopeFrequencies::new(10_000.0, 8, RopeScaling::None).unwrap();
    let mut qkv = vec![1.0f32; 2 * 32];
    let view = HeadsMut::with_stride(&mut qkv, 2, 2, 8, 32).unwrap();
    table(&f, &[1, 2]).apply(&Cpu::detect(), RopePairs::HalfSplit, view).unwrap();
    for token in qkv.chunks(32) {
        assert!(token[..16].iter().any(|v| *v != 1.0) && token[16..].iter().all(|v| *v == 1.0));
    }
}

proptest! {
    #[test]
    fn any_rope_parameters_are_survived(
        theta: f64, dim in 0usize..70, factor: f64, original_context: u32, beta_fast: f64, beta_slow: f64, truncate: bool,
        position: u32,
    ) {
        let yarn = RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, truncate, concentration: None };
        for scaling in [RopeScaling::None, RopeScaling::Linear { factor }, yarn] {
            if let Ok(f) = RopeFrequencies::new(theta, dim, scaling) {
                let mut y = vec![1.0f32; 70];
                table(&f, &[position]).apply(&Cpu::detect(), RopePairs::HalfSplit, HeadsMut::new(&mut y, 1, 1, 70).unwrap()).unwrap();
            }
        }
    }
}
