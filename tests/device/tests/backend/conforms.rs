//! The conformance suite of `tests/backend.rs` on the Neuron backend, with bounds derived for the device.

use crate::Device;
use crate::conformance::{self, Attended, AttentionCase, ExpertData, Rules, Served};
use crate::random::{RandomMatrix, Rng};
use trn_kernels::Cpu;
use trn_kernels::attention::AttentionSpec;
use trn_kernels::backend::{ActivationTerms, CpuBackend, Inner};
use trn_kernels::kv::KvFormat;
use trn_kernels::num::Fp8;
use trn_kernels::quant::{ScaleRule, Scheme};

/// How far two MXFP8 terms of a bf16 value may be from it, as a share of the largest magnitude in its 32. With e that magnitude's
/// exponent, `quantize_mx` scales by 2^(e - 7): the high term keeps bits down to 2^(e - 16), the low one, whose group tops at
/// 2^(e - 4), down to 2^(e - 20); half a step of each is lost at most (kernels/matmul_mx.md, "Two terms").
const TWO_TERMS: f64 = 1.0 / (1u32 << 17) as f64 + 1.0 / (1u32 << 21) as f64;
/// The same of one term: E4M3 holds 4 significant bits, so half a step is 2^-4 of the value and no value is above the largest. The
/// scale leaves a factor of two above it, so that nothing saturates; subnormals' half step, 2^-10 of 2^7, is less.
const ONE_TERM: f64 = 1.0 / 16.0;

/// Key slots of the largest compiled attention: 9 pages of 8 tokens, or 16 keys of a chunk and 64 before them.
const SLOTS: usize = 80;

/// How far the device's attention may be from the exact result, once stored as bf16.
///
/// With w the exact softmax weights (they sum to at most 1) and v the values:
/// * Logits: a sum of `head_dim` exact products in f32, in any order, is within head_dim 2^-24 of the sum of magnitudes (`reach`).
///   Scaling and subtracting the running maximum add 4 roundings of numbers of at most twice `reach` + |sink|.
/// * Weights: each is off by exp's factor of that error, by 2^-20 of `exp` itself for its tile and again for each tile's rescaling,
///   with 4 f32 roundings each, and by 2^-8 as it is rounded to bf16 for the product with V: a factor 1 + delta, |delta| <= d. In
///   numerator and denominator, so the quotient is off by 2 d / (1 - d) of `spread`, the sum of w |v|.
/// * The f32 sums over all key slots (masked ones add zeros) and the rescaled tiles: (slots + 4 tiles + 8) 2^-24 of `spread`, twice.
/// * The result's own rounding: 2^-8.
///
/// Tiles hold at least 128 key slots, and a prefill has one more for what is before the chunk. As kernels/tests/attention_bounds.py
/// has it for the Python reference; 2^-20 is what the kernels ask of the device's `exp`.
fn device_attention(a: &Attended<'_>) -> f64 {
    const F32: f64 = 1.0 / (1u64 << 24) as f64;
    const BF16: f64 = 1.0 / 256.0;
    const EXP: f64 = 1.0 / (1u64 << 20) as f64;
    let tiles = (2 + SLOTS / 128) as f64;
    let logit = (a.head_dim + 4) as f64 * F32 * 2.0 * (a.reach + a.sink.abs());
    let d = logit.exp_m1() + BF16 + (tiles + 1.0) * (EXP + 4.0 * F32);
    assert!(d < 0.5, "the logits are too large for this bound to say anything");
    let error = 2.0 * d / (1.0 - d) * a.spread + 2.0 * (SLOTS as f64 + 4.0 * tiles + 8.0) * F32 * a.spread;
    error + BF16 * (a.exact.out[a.i].abs() + error) + f64::from(f32::MIN_POSITIVE)
}

const fn spec(window_left: Option<usize>) -> AttentionSpec {
    AttentionSpec {
        num_qo_heads: 4,
        num_kv_heads: 2,
        head_dim_qk: 32,
        head_dim_vo: 32,
        sm_scale: 0.176_776_69, // 1 / sqrt(32)
        causal: true,
        window_left,
        logits_soft_cap: None,
    }
}

const fn case(format: KvFormat, window_left: Option<usize>, chunks: &'static [usize], steps: usize) -> AttentionCase {
    let sinks = window_left.is_none();
    AttentionCase { spec: spec(window_left), format, num_pages: 9, page_size: 8, chunks, steps, sinks }
}

/// Served: in one chunk and several, across pages that are no neighbours, and token by token. FP8 caches: decode only.
const CASES: [AttentionCase; 6] = [
    case(KvFormat::Bf16, None, &[23, 1, 16, 5], 4),
    case(KvFormat::Bf16, Some(8), &[30, 9], 3),
    case(KvFormat::Fp8(Fp8::E4M3Fn), None, &[1, 1, 11], 5),
    case(KvFormat::Fp8(Fp8::E5M2), Some(8), &[1, 9], 12),
    // Refused, each with its reason.
    case(KvFormat::Fp8(Fp8::E4M3Ieee), None, &[3], 1),
    case(KvFormat::Mxfp4, None, &[3], 1),
];

fn conforms(terms: ActivationTerms, rules: &Rules<'_>) -> Served {
    let device = Device::new();
    let rng = &mut Rng(11);
    let mxfp8 = Scheme::Mxfp8(Fp8::E4M3Fn);
    let matrices: Vec<(Scheme, RandomMatrix, usize, usize, usize)> = [
        (Scheme::Mxfp4, 1, 48, 96),
        (Scheme::Mxfp4, 5, 48, 96),
        (Scheme::Mxfp4, 19, 48, 96),
        (mxfp8, 3, 40, 64),
        (Scheme::Mxfp8(Fp8::E5M2), 4, 40, 64),
        (Scheme::Bf16, 7, 24, 64),
        // Not compiled, or of a scheme that no kernel takes.
        (Scheme::Mxfp4, 2, 47, 96),
        (Scheme::Nvfp4, 2, 48, 96),
        (Scheme::Fp8PerTensor(Fp8::E4M3Fn), 2, 48, 96),
    ]
    .into_iter()
    .map(|(scheme, m, n, k)| (scheme, RandomMatrix::new(rng, scheme, n, k, 2), m, n, k))
    .collect();
    let experts = [(Scheme::Mxfp4, 4), (mxfp8, 4), (Scheme::Mxfp4, 3)].map(|(s, e)| ExpertData::new(rng, s, e, 64, 32));
    let mut backend = device.backend(terms, None);
    let served = &mut Served::default();
    for (scheme, matrix, m, n, k) in &matrices {
        conformance::matmul(&mut backend, matrix, (*scheme, *m, *n, *k), rules, served);
    }
    for experts in &experts {
        for call in [(1, 3), (5, 2), (4, 4), (1, 4), (11, 1)] {
            conformance::moe(&mut backend, experts, call, rules, served);
        }
    }
    for case in &CASES {
        conformance::attention(&mut backend, case, rules, served);
    }
    conformance::foreign_ids(&mut backend, &mut CpuBackend::new(Cpu::detect()), &matrices[0].1.view());
    drop(backend);
    device.end();
    std::mem::take(served)
}

#[test]
fn with_activations_in_two_terms() {
    let rules = Rules {
        activations: TWO_TERMS,
        weights: TWO_TERMS,
        inner: Inner::Bf16,
        attention: &device_attention,
        seed: 21,
    };
    let Served { tried, served } = conforms(ActivationTerms::Two, &rules);
    assert!(served > 60 && tried > served, "{served} served of {tried}");
}

#[test]
fn with_activations_in_one_term() {
    let inner = Inner::Mxfp8(ScaleRule::Trainium);
    let rules = Rules { activations: ONE_TERM, weights: TWO_TERMS, inner, attention: &device_attention, seed: 22 };
    let Served { tried, served } = conforms(ActivationTerms::One, &rules);
    assert!(served > 60 && tried > served, "{served} served of {tried}");
}

/// Experts that round otherwise than the kernel does are refused, not rounded behind the caller's back.
#[test]
fn another_rounding_between_the_experts_matmuls_is_refused() {
    let device = Device::new();
    let data = ExpertData::new(&mut Rng(4), Scheme::Mxfp4, 4, 64, 32);
    for (terms, inner) in [
        (ActivationTerms::Two, Inner::Mxfp8(ScaleRule::Trainium)),
        (ActivationTerms::One, Inner::Bf16),
        (ActivationTerms::One, Inner::Mxfp8(ScaleRule::Floor)),
        (ActivationTerms::Two, Inner::F32),
    ] {
        let rules = Rules { activations: 0.0, weights: 0.0, inner, attention: &device_attention, seed: 23 };
        let served = &mut Served::default();
        conformance::moe(&mut device.backend(terms, None), &data, (1, 1), &rules, served);
        assert_eq!(*served, Served { tried: 1, served: 0 }, "{terms:?} {inner:?}");
    }
    device.end();
}
