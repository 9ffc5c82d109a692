//! Layer operations: against f64 within their stated bounds, in their stated order to the bit, the same alone and in a batch,
//! refusals, planted bugs. Golden traces are in `tests/golden_cases/layer.rs`.
#![forbid(unsafe_code)]

#[path = "support/exact.rs"]
mod exact;
#[path = "support/random.rs"]
mod random;

use exact::{Exact, U, bits, cast, for_each_type, judge, wide};
use half::bf16;
use proptest::prelude::*;
use random::Rng;
use std::ops::Range;
use trn_kernels::layer::{
    GateLayout, RopeFrequencies, RopePairs, RopeScaling, RopeTable, RouterMode, SwigluSpec, add, argmax,
    combine_experts, embed, rms_norm, rms_norm_quantize, route_top_k, swiglu,
};
use trn_kernels::num::Real;
use trn_kernels::quant::{QuantizeOptions, QuantizedMatrix, QuantizedMatrixBuf, Scheme, quantize};
use trn_kernels::{Cpu, Error, HeadsMut, MatMut, MatRef, Parallelism, Workspace};

fn mat<T>(data: &[T], rows: usize) -> MatRef<'_, T> {
    MatRef::new(data, rows, data.len() / rows.max(1)).unwrap()
}

fn mat_mut<T>(data: &mut [T], rows: usize) -> MatMut<'_, T> {
    let cols = data.len() / rows.max(1);
    MatMut::new(data, rows, cols).unwrap()
}

// ---- RMS norm

fn norm_exact(x: &[f64], weight: &[f64], eps: f64) -> Vec<Exact> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let relative = (x.len().div_ceil(32) as f64 / 2.0 + 15.0) * U;
    let value = |(x, w): (&f64, &f64)| x / (mean + eps).sqrt() * w;
    x.iter().zip(weight).map(value).map(|value| Exact { value, bound: relative * value.abs() }).collect()
}

fn norm<T: Real, W: Real, Y: Real>(cpu: &Cpu<'_>, x: &[T], rows: usize, weight: &[W], eps: f32) -> Vec<Y> {
    let mut y = vec![Y::default(); x.len()];
    rms_norm(cpu, mat(x, rows), weight, eps, mat_mut(&mut y, rows)).unwrap();
    y
}

/// Extents on both sides of a step of 32.
const EXTENTS: [usize; 9] = [1, 2, 31, 32, 33, 63, 64, 65, 2880];

#[test]
fn rms_norm_is_within_its_bound() {
    let mut rng = Rng(1);
    for k in EXTENTS {
        for exponents in [0..=0, -12..=-8, -3..=6] {
            let (x, weight) = (rng.wide(k, exponents), rng.wide(k, 0..=1));
            for_each_type!(T => {
                for_each_type!(Y => {
                    let (x, weight) = (cast::<T>(&x), cast::<bf16>(&weight));
                    let exact = norm_exact(&wide(&x), &wide(&weight), f64::from(1e-5f32));
                    judge(&norm::<T, bf16, Y>(&Cpu::detect(), &x, 1, &weight, 1e-5), &exact).unwrap();
                });
            });
        }
    }
}

/// The order in the docs, written out: shares nothing with the kernel.
#[test]
fn rms_norm_has_the_bits_of_its_stated_order() {
    let mut rng = Rng(2);
    for k in EXTENTS {
        let (x, weight) = (rng.wide(k, -3..=3), rng.wide(k, 0..=1));
        let padded: Vec<f32> = x.iter().copied().chain([0.0; 32]).take(k.div_ceil(32) * 32).collect();
        let mut sum = 0.0f32;
        for step in padded.chunks(32) {
            let chain = |first| step.iter().skip(first).step_by(2).fold(0.0f32, |acc, x| x.mul_add(*x, acc));
            sum += chain(0) + chain(1);
        }
        let r = 1.0 / (sum / k as f32 + 1e-5).sqrt();
        let want: Vec<f32> = x.iter().zip(&weight).map(|(x, w)| (x * r) * w).collect();
        assert_eq!(bits(&norm::<f32, f32, f32>(&Cpu::detect(), &x, 1, &weight, 1e-5)), bits(&want), "k = {k}");
    }
}

#[test]
fn rms_norm_poisons_rows_it_cannot_normalise() {
    for bad in [f32::NAN, f32::INFINITY, 2e19] {
        let x = [1.0, bad, 1.0, 1.0, 1.0, 1.0];
        let y = norm::<f32, f32, f32>(&Cpu::detect(), &x, 2, &[1.0; 3], 1e-5);
        assert_eq!(bits(&y[..3]), [0x7FC0_0000; 3], "{bad}");
        assert!(y[3..].iter().all(|y| (y - 1.0).abs() < 1e-5), "{bad}");
    }
}

#[test]
fn rms_norm_quantize_is_the_norm_then_the_quantizer() {
    let mut rng = Rng(14);
    let (m, k, cpu) = (3, 256, Cpu::detect());
    let (x, weight) = (cast::<bf16>(&rng.wide(m * k, -3..=3)), rng.wide(k, 0..=0));
    let normed = norm::<bf16, f32, f32>(&cpu, &x, m, &weight, 1e-5);
    // One buffer for all, as a runtime keeps it.
    let (mut out, mut ws) = (QuantizedMatrixBuf::new(), Workspace::new());
    for scheme in random::SCHEMES {
        let options = QuantizeOptions::default();
        rms_norm_quantize(&cpu, mat(&x, m), &weight, 1e-5, (scheme, &options), &mut out, &mut ws).unwrap();
        assert_eq!(content(&out), content(&quantize(mat(&normed, m), scheme, &options).unwrap()), "{scheme:?}");
    }
    let before = content(&out);
    let options = QuantizeOptions::default();
    let mut call = |weight: &[f32], eps, options: &QuantizeOptions| {
        rms_norm_quantize(&cpu, mat(&x, m), weight, eps, (Scheme::Mxfp4, options), &mut out, &mut ws).unwrap_err()
    };
    assert!(matches!(call(&weight[1..], 1e-5, &options), Error::Extent { axis: "k", .. }));
    assert!(matches!(call(&weight, -1.0, &options), Error::Value { .. }));
    let unwanted = QuantizeOptions { static_scale: Some(1.0), ..options };
    assert!(matches!(call(&weight, 1e-5, &unwanted), Error::Unexpected { .. }));
    assert_eq!(content(&out), before);
}

/// All a quantized matrix holds.
fn content(q: &QuantizedMatrixBuf) -> impl PartialEq + std::fmt::Debug + use<> {
    let scales = (q.block_scales().to_vec(), bits(&[q.global_scale().get()]), bits(q.outer_scales()));
    (q.scheme(), q.n(), q.k(), q.codes().to_vec(), scales)
}

#[test]
fn planted_eps_outside_the_root_is_caught() {
    let x: Vec<f32> = Rng(3).wide(64, -3..=0);
    let (exact_x, eps) = (wide(&x), 1e-5);
    let mean = exact_x.iter().map(|x| x * x).sum::<f64>() / 64.0;
    let right = |root: f64| -> Vec<f32> { exact_x.iter().map(|x| (x / root) as f32).collect() };
    let exact = norm_exact(&exact_x, &[1.0; 64], eps);
    judge(&right((mean + eps).sqrt()), &exact).unwrap();
    judge(&right(mean.sqrt() + eps), &exact).unwrap_err();
    judge(&right(mean.sqrt()), &exact).unwrap_err();
}

// ---- swiglu

/// What can be wrong with a gated activation.
#[derive(Clone, Copy, PartialEq)]
enum SwigluBug {
    None,
    OffsetDropped,
    LowerSideOpen,
    GateOpen,
    GateClampedBelow,
    AlphaDropped,
}

fn swiglu_exact(spec: SwigluSpec, gate: f64, up: f64, bug: SwigluBug) -> Exact {
    let limit = spec.limit.map_or(f64::INFINITY, f64::from);
    let alpha = if bug == SwigluBug::AlphaDropped { 1.0 } else { f64::from(spec.alpha) };
    let offset = if bug == SwigluBug::OffsetDropped { 0.0 } else { f64::from(spec.up_offset) };
    let g = match bug {
        SwigluBug::GateOpen => gate,
        SwigluBug::GateClampedBelow => gate.clamp(-limit, limit),
        _ => {
            if gate > limit {
                limit
            } else {
                gate
            }
        }
    };
    let u = if up > limit { limit } else { up };
    let u = if u < -limit && bug != SwigluBug::LowerSideOpen { -limit } else { u };
    let t = alpha * g;
    let sigmoid = 1.0 / (1.0 + (-t).exp());
    let value = g * sigmoid * (u + offset);
    let relative = ((t.abs() + 1.0) * (1.0 - sigmoid) + 9.0) * U;
    // Flushed sigmoids, and products that are subnormal.
    let flushed = 2f64.powi(-126) * (g * (u + offset)).abs() + 2f64.powi(-149) * ((u + offset).abs() + 1.0);
    Exact { value, bound: relative * value.abs() + flushed }
}

fn gate_up_exact(spec: SwigluSpec, layout: GateLayout, row: &[f64], bug: SwigluBug) -> Vec<Exact> {
    let n = row.len() / 2;
    let pair = |j| match layout {
        GateLayout::Interleaved => (row[2 * j], row[2 * j + 1]),
        GateLayout::Split => (row[j], row[n + j]),
    };
    (0..n).map(pair).map(|(gate, up)| swiglu_exact(spec, gate, up, bug)).collect()
}

fn gated<T: Real, Y: Real>(cpu: &Cpu<'_>, spec: SwigluSpec, layout: GateLayout, x: &[T], rows: usize) -> Vec<Y> {
    let mut y = vec![Y::default(); x.len() / 2];
    swiglu(cpu, spec, layout, mat(x, rows), mat_mut(&mut y, rows)).unwrap();
    y
}

const LAYOUTS: [GateLayout; 2] = [GateLayout::Interleaved, GateLayout::Split];

#[test]
fn swiglu_is_within_its_bound() {
    let mut rng = Rng(6);
    let odd = SwigluSpec { alpha: -0.3, limit: Some(2.5), up_offset: -4.0 };
    for (spec, layout) in [SwigluSpec::GPT_OSS, SwigluSpec::SILU, odd].into_iter().flat_map(|s| LAYOUTS.map(|l| (s, l)))
    {
        for (n, exponents) in [(1, 0..=0), (7, 0..=3), (96, -30..=3), (1000, 2..=6)] {
            let x = rng.wide(2 * n, exponents);
            for_each_type!(T => {
                let x = cast::<T>(&x);
                let exact = gate_up_exact(spec, layout, &wide(&x), SwigluBug::None);
                judge(&gated::<T, f32>(&Cpu::detect(), spec, layout, &x, 1), &exact).unwrap();
                judge(&gated::<T, bf16>(&Cpu::detect(), spec, layout, &x, 1), &exact).unwrap();
            });
        }
    }
}

#[test]
fn swiglu_keeps_nan_and_clamps_infinity() {
    let gpt_oss = SwigluSpec::GPT_OSS;
    for (gate, up) in [(f32::NAN, 1.0), (1.0, f32::NAN), (f32::NAN, f32::NAN), (-f32::NAN, 9.0)] {
        let y = gated::<f32, f32>(&Cpu::detect(), gpt_oss, GateLayout::Interleaved, &[gate, up, 1.0, 1.0], 1);
        assert_eq!(y[0].to_bits(), 0x7FC0_0000);
        assert!(y[1].is_finite());
        assert!(gpt_oss.apply(gate, up).is_nan());
    }
    assert_eq!(gpt_oss.apply(f32::INFINITY, f32::INFINITY).to_bits(), gpt_oss.apply(7.0, 7.0).to_bits());
    assert_eq!(gpt_oss.apply(8.0, f32::NEG_INFINITY).to_bits(), gpt_oss.apply(7.0, -7.0).to_bits());
}

#[test]
fn planted_swiglu_bugs_are_caught() {
    let spec = SwigluSpec::GPT_OSS;
    let x: Vec<f32> = Rng(7).wide(2 * 64, 0..=4);
    assert!(x.iter().skip(1).step_by(2).any(|up| *up < -7.0), "no up below the limit");
    assert!(x.iter().step_by(2).any(|gate| *gate > 7.0), "no gate above the limit");
    let layout = GateLayout::Interleaved;
    let exact = gate_up_exact(spec, layout, &wide(&x), SwigluBug::None);
    let mutant =
        |bug| -> Vec<f32> { gate_up_exact(spec, layout, &wide(&x), bug).iter().map(|e| e.value as f32).collect() };
    judge(&mutant(SwigluBug::None), &exact).unwrap();
    use SwigluBug::*;
    for bug in [OffsetDropped, LowerSideOpen, GateOpen, GateClampedBelow, AlphaDropped] {
        judge(&mutant(bug), &exact).unwrap_err();
    }
    judge(&gated::<f32, f32>(&Cpu::detect(), spec, layout, &x, 1), &exact).unwrap();
    judge(&gated::<f32, f32>(&Cpu::detect(), spec, GateLayout::Split, &x, 1), &exact).unwrap_err();
}

// ---- router

const MODES: [RouterMode; 5] = [
    RouterMode::SoftmaxAfterTopK,
    RouterMode::SoftmaxThenTopK { renormalize: false },
    RouterMode::SoftmaxThenTopK { renormalize: true },
    RouterMode::Sigmoid { renormalize: false },
    RouterMode::Sigmoid { renormalize: true },
];

fn route(mode: RouterMode, logits: &[f32], rows: usize, k: usize) -> (Vec<u32>, Vec<f32>) {
    let (mut ids, mut weights) = (vec![u32::MAX; rows * k], vec![-1.0; rows * k]);
    route_top_k(mode, mat(logits, rows), mat_mut(&mut ids, rows), mat_mut(&mut weights, rows)).unwrap();
    (ids, weights)
}

/// Ids by sorting everything, weights by definition. `highest_first` is the planted bug: ties go to the highest index.
fn route_exact(mode: RouterMode, logits: &[f32], k: usize, highest_first: bool) -> (Vec<u32>, Vec<Exact>) {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    if highest_first {
        order.reverse();
    }
    // Stable, so ties stay in the order of the line above.
    order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).expect("no NaN here"));
    order.truncate(k);
    let all = wide(logits);
    let max = all.iter().fold(f64::NEG_INFINITY, |m, l| m.max(*l));
    let softmax = |over: &[f64]| over.iter().map(|l| (l - max).exp()).sum::<f64>();
    let chosen: Vec<f64> = order.iter().map(|&e| all[e]).collect();
    let b = |d: f64, n: usize| (d + (n as f64).ln() + n as f64 + 6.0) * U;
    let sigmoid = |l: f64| 1.0 / (1.0 + (-l).exp());
    let weight = |l: f64| {
        let (d, n) = (max - l, logits.len());
        let (value, relative) = match mode {
            RouterMode::SoftmaxAfterTopK => ((l - max).exp() / softmax(&chosen), b(d, k)),
            RouterMode::SoftmaxThenTopK { renormalize: false } => ((l - max).exp() / softmax(&all), b(d, n)),
            RouterMode::SoftmaxThenTopK { renormalize: true } => {
                ((l - max).exp() / softmax(&chosen), 2.0 * b(d, n) + b(d, k))
            }
            RouterMode::Sigmoid { renormalize: false } => (sigmoid(l), 5.0 * U),
            RouterMode::Sigmoid { renormalize: true } => {
                (sigmoid(l) / chosen.iter().map(|l| sigmoid(*l)).sum::<f64>(), (k as f64 + 11.0) * U)
            }
        };
        Exact { value, bound: relative * value + 2f64.powi(-126) }
    };
    (order.iter().map(|e| *e as u32).collect(), chosen.iter().map(|l| weight(*l)).collect())
}

fn judge_route(got: &(Vec<u32>, Vec<f32>), want: &(Vec<u32>, Vec<Exact>)) -> Result<(), String> {
    if got.0 != want.0 {
        return Err(format!("chose {:?}, right is {:?}", got.0, want.0));
    }
    judge(&got.1, &want.1)
}

#[test]
fn router_chooses_and_weighs_as_defined() {
    let mut rng = Rng(8);
    for mode in MODES {
        for (experts, k) in [(1, 1), (2, 1), (8, 4), (32, 4), (128, 8), (16, 16)] {
            for exponents in [0..=0, 1..=4, -20..=5] {
                // Quantised, so that ties are common.
                let logits: Vec<f32> = rng.wide(experts, exponents).iter().map(|l| (l * 4.0).round() / 4.0).collect();
                judge_route(&route(mode, &logits, 1, k), &route_exact(mode, &logits, k, false)).unwrap();
            }
        }
    }
}

#[test]
fn router_ties_go_to_the_lowest_index() {
    for mode in MODES {
        assert_eq!(route(mode, &[1.0, 2.0, 2.0, 2.0, 1.0], 1, 4).0, [1, 2, 3, 0]);
        assert_eq!(route(mode, &[-0.0, 0.0, -0.0], 1, 3).0, [0, 1, 2]);
        assert_eq!(route(mode, &[f32::NEG_INFINITY; 3], 1, 2).0, [0, 1]);
    }
}

#[test]
fn router_nan_is_chosen_and_poisons() {
    let logits = [0.5, f32::INFINITY, f32::NAN, 3.0, -f32::NAN];
    for mode in MODES {
        let (ids, weights) = route(mode, &logits, 1, 3);
        assert_eq!(ids, [2, 4, 1], "{mode:?}");
        let poisoned = if mode == (RouterMode::Sigmoid { renormalize: false }) { 2 } else { 3 };
        assert!(weights[..poisoned].iter().all(|w| w.to_bits() == 0x7FC0_0000), "{mode:?}: {weights:?}");
    }
    // The clean token beside it is not touched.
    let (_, weights) = route(RouterMode::SoftmaxAfterTopK, &[f32::NAN, 0.0, 1.0, 1.0], 2, 2);
    assert_eq!(weights[2..], [0.5, 0.5]);
}

#[test]
fn sigmoid_router_with_nothing_to_renormalise_gives_zeros() {
    let (ids, weights) = route(RouterMode::Sigmoid { renormalize: true }, &[-300.0, -200.0, -250.0], 1, 2);
    assert_eq!((ids, weights), (vec![1, 2], vec![0.0, 0.0]));
}

#[test]
fn planted_router_bugs_are_caught() {
    let logits = [0.25, 1.5, -0.5, 1.5, 0.75, 0.25, -2.0, 0.0];
    let after = RouterMode::SoftmaxAfterTopK;
    let want = route_exact(after, &logits, 3, false);
    judge_route(&route(after, &logits, 1, 3), &want).unwrap();
    let values = |(ids, weights): (Vec<u32>, Vec<Exact>)| (ids, weights.iter().map(|e| e.value as f32).collect());
    judge_route(&values(route_exact(after, &logits, 3, false)), &want).unwrap();
    judge_route(&values(route_exact(after, &logits, 3, true)), &want).unwrap_err();
    judge_route(&route(RouterMode::SoftmaxThenTopK { renormalize: false }, &logits, 1, 3), &want).unwrap_err();
    judge_route(&route(RouterMode::Sigmoid { renormalize: true }, &logits, 1, 3), &want).unwrap_err();
}

// ---- experts, residual, tokens

fn combine_exact(y: &[f64], weights: &[f64], n: usize, old: Option<&[f64]>) -> Vec<Exact> {
    let k = weights.len() as f64;
    let one = |j: usize| {
        let terms = || weights.iter().zip(y.chunks(n)).map(|(w, y)| w * y[j]);
        let (sum, magnitude): (f64, f64) = (terms().sum(), terms().map(f64::abs).sum());
        let bound = k * U / (1.0 - k * U) * magnitude + k * 2f64.powi(-150);
        let value = sum + old.map_or(0.0, |o| o[j]);
        Exact { value, bound: bound + if old.is_some() { U * (value.abs() + bound) } else { 0.0 } }
    };
    (0..n).map(one).collect()
}

#[test]
fn combine_experts_is_within_its_bound_and_in_order() {
    let mut rng = Rng(9);
    for (k, n) in [(1, 1), (4, 63), (4, 64), (4, 65), (8, 200)] {
        let (y, weights, old) = (rng.wide(k * n, -3..=3), rng.wide(k, -1..=0), rng.wide(n, 0..=0));
        for_each_type!(T => {
            let (y, old) = (cast::<T>(&y), cast::<T>(&old));
            for accumulate in [false, true] {
                let mut out = old.clone();
                let out_view = mat_mut(&mut out, 1);
                combine_experts(&Cpu::detect(), mat(&y, k), mat(&weights, 1), accumulate, out_view).unwrap();
                let before = wide(&old);
                judge(&out, &combine_exact(&wide(&y), &wide(&weights), n, accumulate.then_some(&before))).unwrap();
                for j in 0..n {
                    let acc = (0..k).fold(0.0f32, |acc, s| weights[s].mul_add(y[s * n + j].to_f32(), acc));
                    let want = T::from_f32(if accumulate { old[j].to_f32() + acc } else { acc });
                    assert_eq!(out[j].to_f32().to_bits(), want.to_f32().to_bits());
                }
            }
        });
    }
}

#[test]
fn planted_expert_slots_out_of_step_are_caught() {
    let mut rng = Rng(10);
    let (y, weights) = (rng.wide(4 * 8, 0..=0), rng.wide(4, 0..=0));
    let exact = combine_exact(&wide(&y), &wide(&weights), 8, None);
    let combined = |weights: &[f32]| {
        let mut out = [0.0f32; 8];
        combine_experts(&Cpu::detect(), mat(&y, 4), mat(weights, 1), false, mat_mut(&mut out, 1)).unwrap();
        out
    };
    judge(&combined(&weights), &exact).unwrap();
    let mut shifted = weights.clone();
    shifted.rotate_left(1);
    judge(&combined(&shifted), &exact).unwrap_err();
}

#[test]
fn add_rounds_once() {
    let mut residual = cast::<bf16>(&[1.0, 256.0, f32::NAN]);
    add(&Cpu::detect(), mat(&[0.5f32, 1.001, 1.0], 1), mat_mut(&mut residual, 1)).unwrap();
    // 257.001 lies above the tie between 256 and 258.
    assert_eq!(bits(&residual), bits(&[1.5, 258.0, f32::NAN]));
}

#[test]
fn embed_gathers_rows_and_refuses_ids_outside_the_vocabulary() {
    let values = cast::<bf16>(&Rng(11).wide(5 * 3, -2..=2));
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let table = QuantizedMatrix::bf16(5, 3, &bytes).unwrap();
    let mut out = vec![7.0f32; 9];
    embed(&table, &[4, 0, 4], mat_mut(&mut out, 3)).unwrap();
    let want: Vec<f32> = [4, 0, 4].iter().flat_map(|t| values[3 * t..3 * t + 3].iter().map(|v| v.to_f32())).collect();
    assert_eq!(bits(&out), bits(&want));
    let before = out.clone();
    let error = embed(&table, &[1, 2, 5], mat_mut(&mut out, 3)).unwrap_err();
    assert_eq!(error.to_string(), "tokens[2]: index 5 is out of range, needed 0 <= index < 5");
    assert_eq!(out, before);
    assert!(matches!(embed(&table, &[1, 2], mat_mut(&mut out, 3)), Err(Error::Extent { axis: "m", .. })));
    assert!(matches!(embed(&table, &[1; 9], mat_mut(&mut out, 9)), Err(Error::Extent { axis: "k", .. })));
}

#[test]
fn argmax_takes_the_lowest_of_equals() {
    assert_eq!(argmax(&[1.0f32, 3.0, 3.0]), Ok(1));
    assert_eq!(argmax(&[-0.0f32, 0.0]), Ok(0));
    assert_eq!(argmax(&cast::<bf16>(&[-2.0, -1.0])), Ok(1));
    assert_eq!(argmax(&[f32::NEG_INFINITY; 4]), Ok(0));
    assert_eq!(argmax(&[1.0, f32::NAN]).unwrap_err().to_string(), "logits[1]: got NaN, needed a number");
    assert_eq!(argmax::<f32>(&[]).unwrap_err().to_string(), "logits: axis vocab is empty, needed at least 1");
}

// ---- the same bits for every batch, tier, number of threads and stride

/// Hidden size: three rows of it are more than one thread's part.
const K: usize = 12_800;

type Op = fn(&Cpu<'_>, &[f32], Range<usize>) -> Vec<u32>;

/// Every row-wise operation on rows `rows` of `x`, as bits.
const OPS: [(&str, Op); 6] = [
    ("rms_norm", |cpu, x, rows| {
        let weight = cast::<bf16>(&x[..K]);
        bits(&norm::<f32, bf16, bf16>(cpu, &x[rows.start * K..rows.end * K], rows.len(), &weight, 1e-5))
    }),
    ("swiglu", |cpu, x, rows| {
        let x = &x[rows.start * K..rows.end * K];
        bits(&gated::<f32, f32>(cpu, SwigluSpec::GPT_OSS, GateLayout::Interleaved, x, rows.len()))
    }),
    ("rope", |cpu, x, rows| {
        let mut y = cast::<bf16>(&x[rows.start * K..rows.end * K]);
        let positions: Vec<u32> = rows.clone().map(|r| 1000 * r as u32).collect();
        let mut table = RopeTable::default();
        table.fill(&RopeFrequencies::new(10_000.0, 64, RopeScaling::None).unwrap(), &positions).unwrap();
        table.apply(cpu, RopePairs::HalfSplit, HeadsMut::new(&mut y, rows.len(), K / 128, 128).unwrap()).unwrap();
        bits(&y)
    }),
    ("add", |cpu, x, rows| {
        let x = &x[rows.start * K..rows.end * K];
        let mut y = cast::<bf16>(x);
        add(cpu, mat(x, rows.len()), mat_mut(&mut y, rows.len())).unwrap();
        bits(&y)
    }),
    ("combine_experts", |cpu, x, rows| {
        let (y, n) = (&x[rows.start * K..rows.end * K], K / 4);
        let weights: Vec<f32> = y.iter().step_by(n).copied().collect();
        let mut out = vec![0.0f32; rows.len() * n];
        let m = rows.len();
        combine_experts(cpu, mat(y, 4 * m), mat(&weights, m), false, mat_mut(&mut out, m)).unwrap();
        bits(&out)
    }),
    ("route_top_k", |_, x, rows| {
        let (ids, weights) = route(RouterMode::SoftmaxAfterTopK, &x[rows.start * K..rows.end * K], rows.len(), 4);
        (0..rows.len()).flat_map(|r| [&ids[4 * r..4 * r + 4], &bits(&weights[4 * r..4 * r + 4])].concat()).collect()
    }),
];

#[test]
fn rows_have_the_same_bits_alone_in_a_batch_on_every_tier_and_any_number_of_threads() {
    let m = 11;
    let mut x = Rng(12).wide(m * K, -4..=4);
    x[3 * K + 5] = f32::NAN;
    x[7 * K + 1] = f32::INFINITY;
    let cpus = [Cpu::detect(), Cpu::baseline()];
    for (name, op) in OPS {
        let batch = op(&cpus[0], &x, 0..m);
        for cpu in &cpus {
            let alone: Vec<u32> = (0..m).flat_map(|r| op(cpu, &x, r..r + 1)).collect();
            assert_eq!(alone, batch, "{name}, {:?}", cpu.isa());
        }
        for threads in 1..=8 {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let cpu = Cpu::detect().with_parallelism(Parallelism::Pool(&pool));
            assert_eq!(op(&cpu, &x, 0..m), batch, "{name}, {threads} threads");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_split_of_a_batch_gives_the_same_bits(seed: u64, m in 2usize..5, cut in 1usize..4, spread in 0i32..40) {
        let x = Rng(seed).wide(m * K, -spread..=spread);
        let cut = cut.min(m - 1);
        for (name, op) in OPS {
            let split = [op(&Cpu::detect(), &x, 0..cut), op(&Cpu::detect(), &x, cut..m)].concat();
            prop_assert_eq!(split, op(&Cpu::detect(), &x, 0..m), "{}", name);
        }
    }

    /// Arbitrary bit patterns: never a panic, and no NaN input that comes out as a number.
    #[test]
    fn any_bits_are_survived(raw in prop::collection::vec(any::<u32>(), 64), alpha: f32, limit: f32, eps: f32) {
        let x: Vec<f32> = raw.iter().map(|b| f32::from_bits(*b)).collect();
        let mut y = vec![0.0f32; 64];
        if rms_norm(&Cpu::detect(), mat(&x, 2), &[1.0f32; 32], eps, mat_mut(&mut y, 2)).is_ok() {
            for (x, y) in x.iter().zip(&y) {
                prop_assert!(!x.is_nan() || y.is_nan());
            }
        }
        let spec = SwigluSpec { alpha, limit: Some(limit), up_offset: 1.0 };
        if swiglu(&Cpu::detect(), spec, GateLayout::Split, mat(&x, 2), mat_mut(&mut y[..32], 2)).is_ok() {
            for (i, y) in y[..32].iter().enumerate() {
                let row = &x[i / 16 * 32..];
                prop_assert!(!(row[i % 16].is_nan() || row[16 + i % 16].is_nan()) || y.is_nan());
            }
        }
        for mode in MODES {
            let (ids, weights) = route(mode, &x, 4, 3);
            for (id, w) in ids.iter().zip(&weights) {
                prop_assert!(*id < 16 && (w.is_nan() || (0.0..=1.0).contains(w)), "{} {}", id, w);
            }
        }
    }
}

#[test]
fn strided_views_are_read_and_written_where_they_lie() {
    let (m, k, stride) = (3, 40, 47);
    let x = Rng(13).wide(m * stride, 0..=0);
    let weight = vec![1.0f32; k];
    let mut y = vec![-9.0f32; m * stride];
    let view = MatRef::with_stride(&x, m, k, stride).unwrap();
    rms_norm(&Cpu::detect(), view, &weight, 1e-5, MatMut::with_stride(&mut y, m, k, stride).unwrap()).unwrap();
    for i in 0..m {
        let row = &x[i * stride..i * stride + k];
        let alone = norm::<f32, f32, f32>(&Cpu::detect(), row, 1, &weight, 1e-5);
        assert_eq!(bits(&y[i * stride..i * stride + k]), bits(&alone));
        assert!(y[i * stride + k..(i + 1) * stride].iter().all(|y| *y == -9.0));
    }
}

#[test]
fn empty_batches_are_served() {
    let cpu = Cpu::detect();
    let (x, mut y): ([f32; 0], [f32; 0]) = ([], []);
    rms_norm(&cpu, MatRef::new(&x, 0, 4).unwrap(), &[1.0f32; 4], 0.0, MatMut::new(&mut y, 0, 4).unwrap()).unwrap();
    let gate_up = MatRef::new(&x, 0, 8).unwrap();
    swiglu(&cpu, SwigluSpec::SILU, GateLayout::Split, gate_up, MatMut::new(&mut y, 0, 4).unwrap()).unwrap();
    let (mut ids, logits) = ([], MatRef::new(&x, 0, 4).unwrap());
    let ids = MatMut::new(&mut ids, 0, 2).unwrap();
    route_top_k(MODES[0], logits, ids, MatMut::new(&mut y, 0, 2).unwrap()).unwrap();
    RopeTable::default().apply(&cpu, RopePairs::HalfSplit, HeadsMut::new(&mut y, 0, 2, 8).unwrap()).unwrap();
}
