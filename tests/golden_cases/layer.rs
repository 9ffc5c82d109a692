//! golden/gptoss_layer, operation by operation: each layer operation alone, from the trace's own inputs, within a derived bound.
//!
//! The trace is f64, stored in f32 or f64. Bounds add to the operation's own what storing its input and its output in f32 did.

use crate::support::{Golden, number, uint};
use serde_json::Value;
use trn_kernels::layer::{
    GateLayout, RopeFrequencies, RopePairs, RopeScaling, RopeTable, RouterMode, SwigluSpec, rms_norm, route_top_k,
    swiglu,
};
use trn_kernels::{Cpu, HeadsMut, MatMut, MatRef};

/// Unit roundoff of f32.
const U: f64 = 1.0 / (1u64 << 24) as f64;

/// gpt-oss's epsilon: its config.json says so, the manifest does not repeat it.
const EPS: f32 = 1e-5;

struct Trace {
    golden: Golden,
    config: Value,
}

impl Trace {
    fn open() -> Trace {
        let golden = Golden::open("gptoss_layer");
        let lines = golden.manifest["conventions"].as_array().expect("conventions");
        let config = lines.iter().find_map(|l| l.as_str()?.strip_prefix("config: ")).expect("a config line");
        let config = serde_json::from_str(config).expect("the config is JSON");
        Trace { golden, config }
    }

    fn layers(&self) -> std::ops::Range<usize> {
        let layers = uint(&self.config, "num_hidden_layers");
        assert!(layers > 0);
        0..layers
    }

    fn f32(&self, layer: usize, name: &str) -> Vec<f32> {
        self.golden.real(&format!("l{layer}.{name}")).into_iter().map(|v| v as f32).collect()
    }

    fn real(&self, layer: usize, name: &str) -> Vec<f64> {
        self.golden.real(&format!("l{layer}.{name}"))
    }

    fn weight(&self, layer: usize, name: &str) -> Vec<f64> {
        self.golden.real(&format!("model.layers.{layer}.{name}"))
    }

    fn tokens(&self) -> usize {
        self.golden.shape("x")[0]
    }
}

/// The first output that is further from the trace than its bound.
fn judge(got: &[f32], want: &[f64], bound: impl Fn(usize) -> f64) -> Result<(), String> {
    assert_eq!(got.len(), want.len());
    assert!(!want.is_empty());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let bound = bound(i) + U * want.abs();
        let within = (f64::from(*got) - want).abs() <= bound;
        if !within {
            return Err(format!("output {i} is {got:e}, the trace has {want:e}, bound {bound:e}"));
        }
    }
    Ok(())
}

fn check_norm(got: &[f32], want: &[f64], k: usize) -> Result<(), String> {
    // Two more roundings: the input's, of the element and of the mean.
    let relative = (k.div_ceil(32) as f64 / 2.0 + 15.0 + 2.0) * U;
    judge(got, want, |i| relative * want[i].abs())
}

#[test]
fn norms_match_the_trace() {
    let trace = Trace::open();
    let m = trace.tokens();
    for layer in trace.layers() {
        let x: Vec<f32> = trace.golden.bf16("x").into_iter().map(f32::from).collect();
        for (input, name, output) in [
            (x, "input_layernorm", "attn_norm"),
            (trace.f32(layer, "after_attn"), "post_attention_layernorm", "mlp_norm"),
        ] {
            let k = input.len() / m;
            let weight = trace.golden.bf16(&format!("model.layers.{layer}.{name}.weight"));
            let want = trace.real(layer, output);
            let mut y = vec![0.0f32; m * k];
            let (x, y_view) = (MatRef::new(&input, m, k).unwrap(), MatMut::new(&mut y, m, k).unwrap());
            rms_norm(&Cpu::detect(), x, &weight, EPS, y_view).unwrap();
            check_norm(&y, &want, k).unwrap_or_else(|e| panic!("layer {layer}, {output}: {e}"));
            // Planted: rows out of step. (Epsilon shows only in small rows: tests/layer.rs has them.)
            y.rotate_left(k);
            check_norm(&y, &want, k).unwrap_err();
        }
    }
}

fn spec(config: &Value) -> SwigluSpec {
    SwigluSpec { limit: Some(number(config, "swiglu_limit") as f32), ..SwigluSpec::GPT_OSS }
}

/// `gate_up` is interleaved; its storage moved each gate and up by at most `u` of it.
fn check_swiglu(got: &[f32], want: &[f64], gate_up: &[f32], spec: SwigluSpec) -> Result<(), String> {
    let (alpha, limit, offset) = (f64::from(spec.alpha), f64::from(spec.limit.unwrap()), f64::from(spec.up_offset));
    judge(got, want, |i| {
        let gate = f64::from(gate_up[2 * i]).min(limit);
        let up = f64::from(gate_up[2 * i + 1]).clamp(-limit, limit);
        let t = alpha * gate;
        let sigmoid = 1.0 / (1.0 + (-t).exp());
        let own = ((t.abs() + 1.0) * (1.0 - sigmoid) + 9.0) * U * want[i].abs();
        let by_gate = (gate * sigmoid * (1.0 + t.abs() * (1.0 - sigmoid)) * (up + offset)).abs();
        let by_up = (gate * sigmoid * up).abs();
        own + 1.01 * U * (by_gate + by_up)
    })
}

#[test]
fn swiglu_matches_the_trace() {
    let trace = Trace::open();
    for layer in trace.layers() {
        let shape = trace.golden.shape(&format!("l{layer}.gate_up"));
        let (m, n) = (shape[0] * shape[1], shape[2] / 2);
        let (gate_up, want) = (trace.f32(layer, "gate_up"), trace.real(layer, "swiglu"));
        let run = |spec, layout| {
            let mut y = vec![0.0f32; m * n];
            let x = MatRef::new(&gate_up, m, 2 * n).unwrap();
            swiglu(&Cpu::detect(), spec, layout, x, MatMut::new(&mut y, m, n).unwrap()).unwrap();
            y
        };
        let right = spec(&trace.config);
        let check = |y: &[f32]| check_swiglu(y, &want, &gate_up, right);
        check(&run(right, GateLayout::Interleaved)).unwrap_or_else(|e| panic!("layer {layer}: {e}"));
        // Planted. (Clamps show only in large values: tests/layer.rs has them.)
        check(&run(right, GateLayout::Split)).unwrap_err();
        check(&run(SwigluSpec { up_offset: 0.0, ..right }, GateLayout::Interleaved)).unwrap_err();
        check(&run(SwigluSpec { alpha: 1.0, ..right }, GateLayout::Interleaved)).unwrap_err();
    }
}

fn check_route(got: &(Vec<u32>, Vec<f32>), ids: &[i32], weights: &[f64], logits: &[f32]) -> Result<(), String> {
    let want: Vec<u32> = ids.iter().map(|id| *id as u32).collect();
    if got.0 != want {
        return Err("other experts".into());
    }
    // Storing the logits moved every exponent's argument by at most u times the largest of them.
    let largest = logits.iter().fold(0.0f64, |m, l| m.max(f64::from(l.abs())));
    let k = ids.len() as f64;
    judge(&got.1, weights, |i| {
        // B(k) of `route_top_k`, with |logit - max| at most twice the largest and k at most their number.
        let own = 2.0 * largest + k.ln() + k + 6.0;
        (own + 2.0 * largest) * U * weights[i]
    })
}

#[test]
fn routing_matches_the_trace() {
    let trace = Trace::open();
    let (m, k) = (trace.tokens(), uint(&trace.config, "experts_per_token"));
    for layer in trace.layers() {
        let logits = trace.f32(layer, "router_logits");
        let ids = trace.golden.i32(&format!("l{layer}.expert_ids"));
        let weights = trace.real(layer, "expert_weights");
        let experts = logits.len() / m;
        let run = |mode| {
            let (mut ids, mut weights) = (vec![0u32; m * k], vec![0.0f32; m * k]);
            let (i, w) = (MatMut::new(&mut ids, m, k).unwrap(), MatMut::new(&mut weights, m, k).unwrap());
            route_top_k(mode, MatRef::new(&logits, m, experts).unwrap(), i, w).unwrap();
            (ids, weights)
        };
        let row = |all: &(Vec<u32>, Vec<f32>), t: usize| -> (Vec<u32>, Vec<f32>) {
            (all.0[t * k..(t + 1) * k].to_vec(), all.1[t * k..(t + 1) * k].to_vec())
        };
        let check = |mode| {
            let all = run(mode);
            (0..m).try_for_each(|t| {
                let range = t * k..(t + 1) * k;
                let logits = &logits[t * experts..(t + 1) * experts];
                check_route(&row(&all, t), &ids[range.clone()], &weights[range], logits)
                    .map_err(|e| format!("token {t}: {e}"))
            })
        };
        check(RouterMode::SoftmaxAfterTopK).unwrap_or_else(|e| panic!("layer {layer}, {e}"));
        // Planted: softmax over all experts, before the choice (the same if all are chosen); sigmoids.
        let before = check(RouterMode::SoftmaxThenTopK { renormalize: false });
        assert_eq!(before.is_ok(), experts == k, "layer {layer}");
        check(RouterMode::Sigmoid { renormalize: true }).unwrap_err();
    }
}

/// `norm` rows times a projection, in f64: what goes into the rotation.
fn project(trace: &Trace, layer: usize, projection: &str) -> Vec<f64> {
    let x = trace.golden.real("x");
    let gain = trace.weight(layer, "input_layernorm.weight");
    let weight = trace.weight(layer, &format!("self_attn.{projection}_proj.weight"));
    let bias = trace.weight(layer, &format!("self_attn.{projection}_proj.bias"));
    let k = gain.len();
    x.chunks(k)
        .flat_map(|row| {
            let mean = row.iter().map(|x| x * x).sum::<f64>() / k as f64;
            let norm: Vec<f64> = row.iter().zip(&gain).map(|(x, g)| x / (mean + 1e-5).sqrt() * g).collect();
            let dot = |(w, b): (&[f64], &f64)| w.iter().zip(&norm).map(|(w, x)| w * x).sum::<f64>() + b;
            weight.chunks(k).zip(&bias).map(dot).collect::<Vec<_>>()
        })
        .collect()
}

#[test]
fn rope_matches_the_trace() {
    let trace = Trace::open();
    let (m, head_dim) = (trace.tokens(), uint(&trace.config, "head_dim"));
    let positions: Vec<u32> = (0..m as u32).collect();
    let scaling = |truncate, concentration| RopeScaling::Yarn {
        factor: number(&trace.config, "rope_scaling_factor"),
        original_context: uint(&trace.config, "initial_context_length") as u32,
        beta_fast: number(&trace.config, "rope_ntk_beta"),
        beta_slow: number(&trace.config, "rope_ntk_alpha"),
        truncate,
        concentration,
    };
    for layer in trace.layers() {
        for (projection, output) in [("q", "q_rope"), ("k", "k_rope")] {
            let (exact, want) = (project(&trace, layer, projection), trace.real(layer, output));
            let heads = exact.len() / m / head_dim;
            let check = |scaling, pairs, positions: &[u32]| {
                let frequencies = RopeFrequencies::new(number(&trace.config, "rope_theta"), head_dim, scaling).unwrap();
                let mut table = RopeTable::default();
                table.fill(&frequencies, positions).unwrap();
                let mut y: Vec<f32> = exact.iter().map(|v| *v as f32).collect();
                table.apply(&Cpu::detect(), pairs, HeadsMut::new(&mut y, m, heads, head_dim).unwrap()).unwrap();
                // 3.01 u of the rotation and u of the input, of a pair no longer than its norm times the concentration;
                // sqrt(2) because |x cos| + |y sin| may exceed the norm that much. f64 sums add some 1e-15.
                judge(&y, &want, |i| {
                    let head = &exact[i / head_dim * head_dim..][..head_dim];
                    let (a, b) = (i % (head_dim / 2), i % (head_dim / 2) + head_dim / 2);
                    4.02 * U * 2f64.sqrt() * frequencies.concentration() * head[a].hypot(head[b]) + 1e-12
                })
            };
            let right = scaling(false, None);
            check(right, RopePairs::HalfSplit, &positions).unwrap_or_else(|e| panic!("layer {layer}, {output}: {e}"));
            // Planted: other pairs, positions off by one, a rounded ramp, no concentration, a linear scaling.
            check(right, RopePairs::Interleaved, &positions).unwrap_err();
            let shifted: Vec<u32> = positions.iter().map(|p| p + 1).collect();
            check(right, RopePairs::HalfSplit, &shifted).unwrap_err();
            check(scaling(true, None), RopePairs::HalfSplit, &positions).unwrap_err();
            check(scaling(false, Some(1.0)), RopePairs::HalfSplit, &positions).unwrap_err();
            check(RopeScaling::None, RopePairs::HalfSplit, &positions).unwrap_err();
        }
    }
}
