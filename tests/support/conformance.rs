//! What every [`Backend`] must do, whoever computes: within the derived bound of the f64 oracle where it serves a call, a typed
//! refusal with the same reason as [`Backend::supports`] where it does not.
#![allow(dead_code, unreachable_pub)] // each test binary uses its part

use crate::random::{RandomMatrix, Rng};
use half::bf16;
use trn_kernels::attention::oracle::{self as attention_oracle, Reference};
use trn_kernels::attention::{AttentionSpec, Queries};
use trn_kernels::backend::{Backend, Element, ExpertWeights, Inner, Problem};
use trn_kernels::kv::{KvConfig, KvFormat, KvPool, KvSequence, PageAllocator, PageTable, append_kv};
use trn_kernels::layer::{GateLayout, SwigluSpec};
use trn_kernels::matmul::oracle::{self, OutputType};
use trn_kernels::matmul::{Activations, MatmulOptions};
use trn_kernels::quant::{QuantizedExperts, QuantizedMatrix, Scheme};
use trn_kernels::{Error, HeadsMut, HeadsRef, MatMut, MatRef};

/// How far a backend may be from the exact result, beyond what another order of f32 sums explains.
pub struct Rules<'a> {
    /// Largest |x taken - x| of an activation, as a share of the largest magnitude in its 32 along k; 0 where taken exactly.
    pub activations: f64,
    /// The same of a bf16 weight.
    pub weights: f64,
    /// What enters the down projection of experts.
    pub inner: Inner,
    /// Largest error of an attention output that is stored as bf16.
    pub attention: &'a dyn Fn(&Attended<'_>) -> f64,
    /// Numbers the random data.
    pub seed: u64,
}

/// One element of an attention's output, and what bounds of it are made of.
pub struct Attended<'a> {
    /// The exact result.
    pub exact: &'a Reference,
    /// Which element of it.
    pub i: usize,
    /// Sum of weight x |v| over the tokens that the query sees.
    pub spread: f64,
    /// At least the largest sum of magnitudes |q| |k| sm_scale of those tokens.
    pub reach: f64,
    /// The head's sink; 0 without.
    pub sink: f64,
    pub head_dim: usize,
}

/// Calls tried and served, so that a test can ask that enough were.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Served {
    pub tried: usize,
    pub served: usize,
}

impl Served {
    /// Counts a call: what [`Backend::supports`] said must be what the call does.
    fn count(&mut self, what: &str, ahead: trn_kernels::Result<()>, call: trn_kernels::Result<()>) -> bool {
        self.tried += 1;
        match (ahead, call) {
            (Ok(()), Ok(())) => {
                self.served += 1;
                true
            }
            (Err(ahead), Err(call)) => {
                let Error::Unsupported { because, .. } = &ahead else { panic!("{what}: supports() says {ahead:?}") };
                assert!(!because.is_empty(), "{what}: refused without a reason");
                assert_eq!(ahead, call, "{what}: two reasons for one refusal");
                false
            }
            (ahead, call) => panic!("{what}: supports() says {ahead:?}, the call {call:?}"),
        }
    }
}

const U: f64 = f32::EPSILON as f64 / 2.0;

/// Largest relative error of a sum of `terms` products in any order, with some roundings to spare.
fn any_order(terms: usize) -> f64 {
    let roundings = (2 * terms + 32) as f64 * U;
    roundings / (1.0 - roundings)
}

fn round_bf16(x: &[f32]) -> Vec<bf16> {
    x.iter().map(|v| bf16::from_f32(*v)).collect()
}

/// Sum of |x w| and of what inexact activations and bf16 weights add, for each output.
fn magnitudes(x: &[bf16], w: &QuantizedMatrix<'_>, m: usize, rules: &Rules<'_>) -> Vec<(f64, f64)> {
    let (k, share) = (w.k(), rules.activations);
    let of_weights = if w.scheme() == Scheme::Bf16 { rules.weights } else { 0.0 };
    let mut all = vec![];
    for i in 0..m {
        let row = &x[i * k..(i + 1) * k];
        for j in 0..w.n() {
            let (mut sum, mut slack) = (0.0, 0.0);
            for (b, block) in row.chunks(32).enumerate() {
                let top = block.iter().map(|v| v.to_f64().abs()).fold(0.0, f64::max);
                let weights: Vec<f64> = (0..block.len()).map(|c| w.value(j, 32 * b + c).unwrap().abs()).collect();
                let lost = of_weights * weights.iter().fold(0.0, |top: f64, w| top.max(*w));
                for (v, weight) in block.iter().zip(weights) {
                    let v = v.to_f64().abs();
                    sum += v * weight;
                    slack += share * top * (weight + lost) + v * lost;
                }
            }
            all.push((sum, slack));
        }
    }
    all
}

/// One matmul `[m, k] x [n, k]`, with and without bias, stored and accumulated, bf16 and f32 activations.
pub fn matmul<'w>(
    backend: &mut dyn Backend<'w>,
    weights: &'w RandomMatrix,
    (scheme, m, n, k): (Scheme, usize, usize, usize),
    rules: &Rules<'_>,
    served: &mut Served,
) {
    let rng = &mut Rng(rules.seed ^ (m * 31 + n) as u64);
    let w = weights.view();
    let bias = rng.wide(n, -2..=2);
    for bias in [&[][..], &bias] {
        let what = format!("{} matmul {scheme:?} m {m} n {n} k {k} bias {}", backend.name(), bias.len());
        let id = match backend.load_matrix(&w, bias) {
            Ok(id) => id,
            Err(e) => {
                let problem = Problem::Matmul { scheme, n, k, m, bias: !bias.is_empty(), activations: Element::Bf16 };
                served.count(&what, backend.supports(&problem), Err(e));
                continue;
            }
        };
        let x = round_bf16(&rng.wide(m * k, -3..=3));
        let magnitudes = magnitudes(&x, &w, m, rules);
        for accumulate in [false, true] {
            let before = rng.wide(m * n, -2..=2);
            let mut y = before.clone();
            let x_view: Activations<'_> = MatRef::new(&x, m, k).unwrap().into();
            let problem = Problem::Matmul { scheme, n, k, m, bias: !bias.is_empty(), activations: (&x_view).into() };
            let call = backend.matmul(id, x_view, MatMut::new(&mut y, m, n).unwrap().into(), accumulate);
            if !served.count(&what, backend.supports(&problem), call) {
                assert_eq!(y, before, "{what}: a refused call wrote");
                continue;
            }
            let options =
                MatmulOptions { bias: Some(bias).filter(|b| !b.is_empty()), accumulate, ..Default::default() };
            let previous: Vec<f64> = before.iter().map(|v| f64::from(*v)).collect();
            let exact = oracle::matmul(x_view, &w, &options, &previous, OutputType::F32).unwrap();
            for (i, (got, want)) in y.iter().zip(&exact).enumerate() {
                let (sum, slack) = magnitudes[i];
                let bound = want.bound + any_order(k) * (sum + slack) + slack;
                let error = (f64::from(*got) - want.value).abs();
                assert!(error <= bound, "{what} [{i}]: {got} is {error:e} from {}, bound {bound:e}", want.value);
            }
            // The same row alone: a batch changes nothing.
            let mut alone = before[..n].to_vec();
            let row = MatRef::new(&x[..k], 1, k).unwrap().into();
            backend.matmul(id, row, MatMut::new(&mut alone, 1, n).unwrap().into(), accumulate).unwrap();
            assert_eq!(alone[..], y[..n], "{what}: row 0 alone");
            // Stored as bf16: the f32 result, rounded once.
            if !accumulate {
                let mut half = vec![bf16::ZERO; m * n];
                backend.matmul(id, x_view, MatMut::new(&mut half, m, n).unwrap().into(), false).unwrap();
                assert_eq!(half, round_bf16(&y), "{what}: bf16 output");
            }
        }
        let x32 = rng.wide(m * k, -3..=3);
        let mut y = vec![0.0f32; m * n];
        let x_view: Activations<'_> = MatRef::new(&x32, m, k).unwrap().into();
        let problem = Problem::Matmul { scheme, n, k, m, bias: !bias.is_empty(), activations: Element::F32 };
        let call = backend.matmul(id, x_view, MatMut::new(&mut y, m, n).unwrap().into(), false);
        if served.count(&what, backend.supports(&problem), call) {
            let options = MatmulOptions { bias: Some(bias).filter(|b| !b.is_empty()), ..Default::default() };
            let exact = oracle::matmul(x_view, &w, &options, &[], OutputType::F32).unwrap();
            assert!(y.iter().zip(&exact).all(|(got, want)| want.admits((*got).into())), "{what}: f32 activations");
        }
    }
}

/// The experts of a layer, borrowed by the backend under test.
pub struct ExpertData {
    pub gate_up: Vec<RandomMatrix>,
    pub down: Vec<RandomMatrix>,
    pub gate_up_bias: Vec<f32>,
    pub down_bias: Vec<f32>,
    hidden: usize,
    intermediate: usize,
}

impl ExpertData {
    pub fn new(rng: &mut Rng, scheme: Scheme, experts: usize, hidden: usize, intermediate: usize) -> Self {
        let mut stack = |n, k| (0..experts).map(|_| RandomMatrix::new(rng, scheme, n, k, 2)).collect();
        let (gate_up, down) = (stack(2 * intermediate, hidden), stack(hidden, intermediate));
        let (gate_up_bias, down_bias) =
            (rng.wide(experts * 2 * intermediate, -2..=0), rng.wide(experts * hidden, -2..=0));
        // The device's down bias is bf16.
        let down_bias = down_bias.into_iter().map(|v| bf16::from_f32(v).to_f32()).collect();
        ExpertData { gate_up, down, gate_up_bias, down_bias, hidden, intermediate }
    }
}

/// Two grouped matmuls with the clamped swiglu between, product rounded to bf16 (and to what `rules.inner` says).
pub fn moe<'w>(
    backend: &mut dyn Backend<'w>,
    data: &'w ExpertData,
    (tokens, top_k): (usize, usize),
    rules: &Rules<'_>,
    served: &mut Served,
) {
    let rng = &mut Rng(rules.seed ^ tokens as u64);
    let stack = |all: &'w [RandomMatrix]| QuantizedExperts::new(all.iter().map(RandomMatrix::view).collect()).unwrap();
    let (gate_up, down) = (stack(&data.gate_up), stack(&data.down));
    let (experts, h, width) = (gate_up.len(), data.hidden, data.intermediate);
    let spec = SwigluSpec::GPT_OSS;
    let weights = ExpertWeights {
        gate_up: &gate_up,
        gate_up_bias: &data.gate_up_bias,
        down: &down,
        down_bias: &data.down_bias,
        swiglu: spec,
        gates: GateLayout::Interleaved,
        inner: rules.inner,
    };
    let scheme = gate_up.scheme();
    let what = format!("{} moe {scheme:?} tokens {tokens} of {top_k}, h {h} i {width}", backend.name());
    let problem = Problem::Moe {
        scheme,
        experts,
        hidden: h,
        intermediate: width,
        swiglu: spec,
        inner: rules.inner,
        tokens,
        top_k,
        activations: Element::Bf16,
    };
    let id = match backend.load_experts(&weights) {
        Ok(id) => id,
        Err(e) => {
            served.count(&what, backend.supports(&problem), Err(e));
            return;
        }
    };
    let x = round_bf16(&rng.wide(tokens * h, -2..=1));
    let ids: Vec<u32> = (0..tokens * top_k).map(|_| rng.below(experts) as u32).collect();
    let mut y = vec![f32::NAN; ids.len() * h];
    let call = backend.moe(
        id,
        MatRef::new(&x, tokens, h).unwrap().into(),
        &ids,
        top_k,
        MatMut::new(&mut y, ids.len(), h).unwrap(),
    );
    if !served.count(&what, backend.supports(&problem), call) {
        assert!(y.iter().all(|v| v.is_nan()), "{what}: a refused call wrote");
        return;
    }
    for (slot, &expert) in ids.iter().enumerate() {
        let e = expert as usize;
        let row = &x[slot / top_k * h..][..h];
        let up = gate_up.get(e).unwrap();
        let options =
            MatmulOptions { bias: Some(&data.gate_up_bias[e * 2 * width..][..2 * width]), ..Default::default() };
        let first = oracle::matmul(MatRef::new(row, 1, h).unwrap(), up, &options, &[], OutputType::F32).unwrap();
        let sizes = magnitudes(row, up, 1, rules);
        let limit = f64::from(spec.limit.unwrap());
        let (mut inner, mut slack) = (vec![], vec![]);
        for j in 0..width {
            let of = |at: usize| {
                let (sum, extra) = sizes[at];
                (first[at].value, first[at].bound + any_order(h) * (sum + extra) + extra + 4.0 * U * (1.0 + sum))
            };
            let ((gate, gate_error), (up, up_error)) = (of(2 * j), of(2 * j + 1));
            let (g, u) = (gate.min(limit), up.clamp(-limit, limit) + 1.0);
            let glu = g / (1.0 + (-1.702 * g).exp());
            let value = glu * u;
            // Largest slope of g sigmoid(1.702 g), that of silu: below 1.1. Then four roundings.
            let error = 1.1 * gate_error * (u.abs() + up_error) + up_error * glu.abs();
            let error = error + 8.0 * U * (value.abs() + error) + f64::from(f32::MIN_POSITIVE);
            let rounded = bf16::from_f64(value);
            inner.push(rounded);
            // Two numbers so far apart round to bf16 values at most one unit further apart.
            slack.push(error + 2f64.powi(-7) * (value.abs() + error));
        }
        let second = down.get(e).unwrap();
        let options = MatmulOptions { bias: Some(&data.down_bias[e * h..][..h]), ..Default::default() };
        let exact =
            oracle::matmul(MatRef::new(&inner, 1, width).unwrap(), second, &options, &[], OutputType::F32).unwrap();
        // At least what enters the product: 2^-7 covers the rounding to bf16.
        let upper = inner.iter().zip(&slack).map(|(v, slack)| (v.to_f64().abs() + slack) * (1.0 + 2f64.powi(-7)));
        let sizes = magnitudes(&upper.map(bf16::from_f64).collect::<Vec<_>>(), second, 1, rules);
        for (c, want) in exact.iter().enumerate() {
            let carried: f64 = (0..width).map(|j| slack[j] * second.value(c, j).unwrap().abs()).sum();
            let (sum, extra) = sizes[c];
            let bound = want.bound + carried + any_order(width) * (sum + carried + extra) + extra;
            let got = f64::from(y[slot * h + c]);
            let error = (got - want.value).abs();
            assert!(
                error <= bound,
                "{what} slot {slot} [{c}]: {got} is {error:e} from {}, bound {bound:e}",
                want.value
            );
        }
    }
}

fn view(x: &[bf16], tokens: usize, heads: usize) -> HeadsRef<'_, bf16> {
    HeadsRef::new(x, tokens, heads, x.len() / (tokens * heads)).unwrap()
}

fn magnitudes_of(x: &[bf16]) -> Vec<bf16> {
    x.iter().map(|v| bf16::from_bits(v.to_bits() & 0x7FFF)).collect()
}

/// One attention's shape.
#[derive(Clone, Copy)]
pub struct AttentionCase {
    pub spec: AttentionSpec,
    pub format: KvFormat,
    pub num_pages: usize,
    pub page_size: usize,
    /// Tokens prefilled in each chunk.
    pub chunks: &'static [usize],
    /// Tokens decoded afterwards.
    pub steps: usize,
    pub sinks: bool,
}

/// Append, prefill in chunks and decode of one sequence, whose pages are handed out in no order.
pub fn attention<'w>(backend: &mut dyn Backend<'w>, case: &AttentionCase, rules: &Rules<'_>, served: &mut Served) {
    let AttentionCase { spec, format, num_pages, page_size, .. } = *case;
    let rng = &mut Rng(rules.seed ^ page_size as u64);
    let what = format!("{} attention {format:?} window {:?}", backend.name(), spec.window_left);
    let config = KvConfig::new(format, 1, num_pages, page_size, spec.num_kv_heads, spec.head_dim_qk);
    let sinks = if case.sinks { rng.wide(spec.num_qo_heads, 0..=0) } else { vec![] };
    let attention = backend.load_attention(&spec, &sinks).unwrap();
    let append_problem = |tokens| Problem::Append { cache: config.shape, tokens, element: Element::Bf16 };
    let cache = match backend.create_cache(&config) {
        Ok(cache) => cache,
        Err(e) => {
            served.count(&what, backend.supports(&append_problem(1)), Err(e));
            return;
        }
    };
    // The cache itself, with |V|, and with |K|: quantizing commutes with signs.
    let mut pages = PageAllocator::new(num_pages, page_size).unwrap();
    let mut references = [(); 3].map(|()| KvPool::new(config).unwrap());
    let taken: Vec<u32> = (0..num_pages).map(|_| pages.alloc().unwrap()).collect();
    // Give them back in another order, so that a sequence's pages are not neighbours.
    for page in taken.iter().step_by(2).chain(taken.iter().skip(1).step_by(2)) {
        pages.free(*page).unwrap();
    }
    for reference in &mut references {
        (0..num_pages).for_each(|_| {
            reference.alloc().unwrap();
        });
    }
    let mut sequence = KvSequence::new(&pages);
    let steps = vec![1; case.steps];
    for &t in case.chunks.iter().chain(&steps) {
        sequence.grow(&mut pages, t).unwrap();
        let table = PageTable::from_sequences([&sequence]).unwrap();
        let mut heads = |heads: usize, dim: usize| round_bf16(&rng.wide(t * heads * dim, -1..=1));
        let (k_data, v_data) = (heads(spec.num_kv_heads, spec.head_dim_qk), heads(spec.num_kv_heads, spec.head_dim_vo));
        let q_data = heads(spec.num_qo_heads, spec.head_dim_qk);
        let (k, v) = (view(&k_data, t, spec.num_kv_heads), view(&v_data, t, spec.num_kv_heads));
        let q = view(&q_data, t, spec.num_qo_heads);
        let call = backend.append(cache, 0, &table, &[0, t], k.into(), v.into());
        if !served.count(&what, backend.supports(&append_problem(t)), call) {
            return;
        }
        let [k_size, v_size, q_size] = [&k_data, &v_data, &q_data].map(|x| magnitudes_of(x));
        let (k_size, v_size) = (view(&k_size, t, spec.num_kv_heads), view(&v_size, t, spec.num_kv_heads));
        for (reference, (k, v)) in references.iter_mut().zip([(k, v), (k, v_size), (k_size, v)]) {
            append_kv(reference, 0, &table, &[0, t], k, v).unwrap();
        }

        let tokens = sequence.len();
        let mut out = vec![bf16::NAN; t * spec.num_qo_heads * spec.head_dim_vo];
        let y = HeadsMut::new(&mut out, t, spec.num_qo_heads, spec.head_dim_vo).unwrap().into();
        let (problem, call) = if t == 1 {
            let problem = Problem::Decode {
                spec,
                sinks: case.sinks,
                cache: config.shape,
                sequences: 1,
                tokens,
                element: Element::Bf16,
            };
            (problem, backend.decode(attention, cache, 0, &table, q.into(), y))
        } else {
            let problem = Problem::Prefill {
                spec,
                sinks: case.sinks,
                cache: config.shape,
                queries: t,
                tokens,
                element: Element::Bf16,
            };
            (problem, backend.prefill(attention, cache, 0, &table, q.into(), &[0, t], y))
        };
        let what = format!("{what}, {t} tokens of {tokens}");
        if !served.count(&what, backend.supports(&problem), call) {
            assert!(out.iter().all(|v| v.is_nan()), "{what}: a refused call wrote");
            continue;
        }
        let with_sinks = Some(&sinks[..]).filter(|s| !s.is_empty());
        let reference = |q, sinks, reference: &KvPool| {
            let queries = Queries { q, indptr: &[0, t], sinks };
            attention_oracle::paged(&spec, queries, &reference.layer(0).unwrap(), &table).unwrap()
        };
        let exact = reference(q, with_sinks, &references[0]);
        let spread = reference(q, with_sinks, &references[1]).out;
        // A log-sum-exp is at least the largest of its terms.
        let reach = reference(view(&q_size, t, spec.num_qo_heads), None, &references[2]).lse;
        for (i, got) in out.iter().enumerate() {
            let row = i / spec.head_dim_vo;
            let sink = sinks.get(row % spec.num_qo_heads).map_or(0.0, |s| f64::from(*s));
            let (spread, reach, head_dim) = (spread[i], reach[row].max(0.0), spec.head_dim_qk);
            let attended = Attended { exact: &exact, i, spread, reach, sink, head_dim };
            let (want, bound) = (exact.out[i], (rules.attention)(&attended));
            let error = (got.to_f64() - want).abs();
            assert!(error <= bound, "{what} [{i}]: {got} is {error:e} from {want}, bound {bound:e}");
        }
    }
}

/// Ids of another backend are refused by name.
pub fn foreign_ids<'w>(backend: &mut dyn Backend<'w>, other: &mut dyn Backend<'w>, weights: &QuantizedMatrix<'w>) {
    let mut id = other.load_matrix(weights, &[]).unwrap();
    for _ in 0..64 {
        id = other.load_matrix(weights, &[]).unwrap();
    }
    let x = vec![bf16::ONE; weights.k()];
    let mut y = vec![0.0f32; weights.n()];
    let x = MatRef::new(&x, 1, weights.k()).unwrap();
    let said = backend.matmul(id, x.into(), MatMut::new(&mut y, 1, weights.n()).unwrap().into(), false).unwrap_err();
    assert!(matches!(&said, Error::Index { operand, .. } if operand == "weight matrix"), "{said:?}");
}

/// Bound of a kernel whose attention is the CPU's.
pub fn cpu_attention(attended: &Attended<'_>) -> f64 {
    attended.exact.tolerance::<bf16>(attended.i)
}
