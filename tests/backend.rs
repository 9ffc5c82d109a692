//! The conformance suite on the backends that every machine has, and what only they promise: the same bits as the CPU kernels.

#[path = "support/conformance.rs"]
mod conformance;
#[path = "support/random.rs"]
mod random;

use conformance::{AttentionCase, ExpertData, Rules, Served};
use random::{RandomMatrix, Rng, SCHEMES};
use trn_kernels::attention::AttentionSpec;
use trn_kernels::backend::{
    AttentionId, Backend, CacheId, CpuBackend, ExpertWeights, ExpertsId, HeadsIn, HeadsOut, Inner, MatrixId,
    OracleBackend, Problem,
};
use trn_kernels::kv::{KvConfig, KvFormat, PageTable};
use trn_kernels::layer::{GateLayout, SwigluSpec};
use trn_kernels::matmul::{Activations, Output};
use trn_kernels::num::Fp8;
use trn_kernels::quant::{QuantizedExperts, QuantizedMatrix, ScaleRule, Scheme};
use trn_kernels::{Cpu, Error, MatMut, Result};

const CASES: [AttentionCase; 3] = [
    AttentionCase {
        spec: spec(4, 2, 32, None),
        format: KvFormat::Bf16,
        num_pages: 9,
        page_size: 5,
        chunks: &[7, 1, 12],
        steps: 3,
        sinks: true,
    },
    AttentionCase {
        spec: spec(6, 3, 64, Some(8)),
        format: KvFormat::Fp8(Fp8::E4M3Fn),
        num_pages: 4,
        page_size: 16,
        chunks: &[33],
        steps: 2,
        sinks: false,
    },
    AttentionCase {
        spec: spec(8, 1, 32, Some(0)),
        format: KvFormat::Mxfp4,
        num_pages: 3,
        page_size: 16,
        chunks: &[16, 17],
        steps: 1,
        sinks: true,
    },
];

const fn spec(num_qo_heads: usize, num_kv_heads: usize, head_dim: usize, window_left: Option<usize>) -> AttentionSpec {
    AttentionSpec {
        num_qo_heads,
        num_kv_heads,
        head_dim_qk: head_dim,
        head_dim_vo: head_dim,
        sm_scale: 0.17,
        causal: true,
        window_left,
        logits_soft_cap: None,
    }
}

/// Everything, on a backend that serves everything.
fn conforms<'w>(backend: &mut dyn Backend<'w>, data: &'w Data) {
    let rules =
        Rules { activations: 0.0, weights: 0.0, inner: Inner::Bf16, attention: &conformance::cpu_attention, seed: 7 };
    let served = &mut Served::default();
    for (scheme, matrix, m, n, k) in &data.matrices {
        conformance::matmul(backend, matrix, (*scheme, *m, *n, *k), &rules, served);
    }
    for experts in &data.experts {
        for (tokens, top_k) in [(1, 3), (5, 2)] {
            conformance::moe(backend, experts, (tokens, top_k), &rules, served);
        }
    }
    for case in &CASES {
        conformance::attention(backend, case, &rules, served);
    }
    assert!(served.tried > 50 && served.served == served.tried, "{served:?}");
}

struct Data {
    matrices: Vec<(Scheme, RandomMatrix, usize, usize, usize)>,
    experts: Vec<ExpertData>,
}

fn data() -> Data {
    let rng = &mut Rng(3);
    let mut matrices = vec![];
    for scheme in SCHEMES {
        for (m, n, k) in [(1, 48, 384), (5, 17, 192)] {
            matrices.push((scheme, RandomMatrix::new(rng, scheme, n, k, 3), m, n, k));
        }
    }
    let schemes = [Scheme::Mxfp4, Scheme::Mxfp8(Fp8::E4M3Fn), Scheme::Bf16];
    let experts = schemes.map(|scheme| ExpertData::new(rng, scheme, 4, 96, 64)).into();
    Data { matrices, experts }
}

#[test]
fn cpu_conforms() {
    let data = data();
    conforms(&mut CpuBackend::new(Cpu::detect()), &data);
}

#[test]
fn oracle_conforms() {
    let data = data();
    conforms(&mut OracleBackend::new(), &data);
}

/// A backend with one bug.
struct Planted<'p> {
    inner: CpuBackend<'p>,
    bug: Bug,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Bug {
    DroppedBias,
    ForgottenAccumulate,
    NextExpert,
    GateUpSplit,
    UnroundedInner,
    KeysAsValues,
    DroppedSinks,
    WiderWindow,
    SilentRefusal,
}

impl<'w> Backend<'w> for Planted<'_> {
    fn name(&self) -> &'static str {
        "planted"
    }

    fn supports(&self, problem: &Problem) -> Result<()> {
        if self.bug == Bug::SilentRefusal {
            return Err(Error::Unsupported { what: "this".into(), because: "it says so, and then does it".into() });
        }
        self.inner.supports(problem)
    }

    fn load_matrix(&mut self, weight: &QuantizedMatrix<'w>, bias: &[f32]) -> Result<MatrixId> {
        Backend::load_matrix(&mut self.inner, weight, if self.bug == Bug::DroppedBias { &[] } else { bias })
    }

    fn load_experts(&mut self, experts: &ExpertWeights<'w, '_>) -> Result<ExpertsId> {
        let gates = if self.bug == Bug::GateUpSplit { GateLayout::Split } else { experts.gates };
        let inner = if self.bug == Bug::UnroundedInner { Inner::Mxfp8(ScaleRule::Trainium) } else { experts.inner };
        self.inner.load_experts(&ExpertWeights { gates, inner, ..*experts })
    }

    fn load_attention(&mut self, spec: &AttentionSpec, sinks: &[f32]) -> Result<AttentionId> {
        let wider = spec.window_left.map(|left| left + usize::from(self.bug == Bug::WiderWindow));
        let sinks = if self.bug == Bug::DroppedSinks { &[] } else { sinks };
        Backend::load_attention(&mut self.inner, &AttentionSpec { window_left: wider, ..*spec }, sinks)
    }

    fn create_cache(&mut self, config: &KvConfig) -> Result<CacheId> {
        Backend::create_cache(&mut self.inner, config)
    }

    fn matmul(&mut self, w: MatrixId, x: Activations<'_>, y: Output<'_>, accumulate: bool) -> Result<()> {
        Backend::matmul(&mut self.inner, w, x, y, accumulate && self.bug != Bug::ForgottenAccumulate)
    }

    fn moe(&mut self, w: ExpertsId, x: Activations<'_>, ids: &[u32], top_k: usize, y: MatMut<'_, f32>) -> Result<()> {
        let shift = u32::from(self.bug == Bug::NextExpert);
        let ids: Vec<u32> = ids.iter().map(|id| (id + shift) % 4).collect();
        Backend::moe(&mut self.inner, w, x, &ids, top_k, y)
    }

    fn append(
        &mut self,
        cache: CacheId,
        layer: usize,
        table: &PageTable,
        append_indptr: &[usize],
        k: HeadsIn<'_>,
        v: HeadsIn<'_>,
    ) -> Result<()> {
        let (k, v) = if self.bug == Bug::KeysAsValues { (v, k) } else { (k, v) };
        Backend::append(&mut self.inner, cache, layer, table, append_indptr, k, v)
    }

    fn prefill(
        &mut self,
        attention: AttentionId,
        cache: CacheId,
        layer: usize,
        table: &PageTable,
        q: HeadsIn<'_>,
        indptr: &[usize],
        out: HeadsOut<'_>,
    ) -> Result<()> {
        Backend::prefill(&mut self.inner, attention, cache, layer, table, q, indptr, out)
    }

    fn decode(
        &mut self,
        attention: AttentionId,
        cache: CacheId,
        layer: usize,
        table: &PageTable,
        q: HeadsIn<'_>,
        out: HeadsOut<'_>,
    ) -> Result<()> {
        Backend::decode(&mut self.inner, attention, cache, layer, table, q, out)
    }
}

#[test]
fn the_suite_catches_planted_bugs() {
    let data = data();
    let bugs = [
        Bug::DroppedBias,
        Bug::ForgottenAccumulate,
        Bug::NextExpert,
        Bug::GateUpSplit,
        Bug::UnroundedInner,
        Bug::KeysAsValues,
        Bug::DroppedSinks,
        Bug::WiderWindow,
        Bug::SilentRefusal,
    ];
    for bug in bugs {
        let run = || conforms(&mut Planted { inner: CpuBackend::new(Cpu::detect()), bug }, &data);
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err(), "{bug:?} goes unseen");
    }
}

#[test]
fn ids_of_another_backend_are_refused() {
    let data = data();
    let weights = data.matrices[0].1.view();
    conformance::foreign_ids(&mut CpuBackend::new(Cpu::detect()), &mut OracleBackend::new(), &weights);
    conformance::foreign_ids(&mut OracleBackend::new(), &mut CpuBackend::new(Cpu::detect()), &weights);
}

/// Biases and stacks that do not belong to their weights are refused when they are loaded, and so are weights that are no numbers.
#[test]
fn what_does_not_fit_is_refused_at_load() {
    let rng = &mut Rng(5);
    let matrix = RandomMatrix::new(rng, Scheme::Mxfp4, 8, 64, 2);
    let (gate_up, down) =
        (RandomMatrix::new(rng, Scheme::Mxfp4, 64, 64, 2), RandomMatrix::new(rng, Scheme::Mxfp4, 64, 32, 2));
    let mut spoiled = RandomMatrix::new(rng, Scheme::Mxfp4, 8, 64, 2);
    spoiled.scales[3] = 0xFF;
    let backends: [Box<dyn Backend<'_>>; 2] =
        [Box::new(CpuBackend::new(Cpu::detect())), Box::new(OracleBackend::new())];
    for mut backend in backends {
        let said = backend.load_matrix(&matrix.view(), &[0.0; 7]).unwrap_err();
        assert_eq!(said.to_string(), "bias: the slice has 7 elements, its extents need 8");
        let said = backend.load_matrix(&spoiled.view(), &[]).unwrap_err();
        assert_eq!(said.to_string(), "scales[96]: got code 0xff, needed a finite block scale");
        let (two, one) = (stack(&gate_up, 2), stack(&down, 1));
        let mut experts = ExpertWeights {
            gate_up: &two,
            gate_up_bias: &[0.0; 128],
            down: &one,
            down_bias: &[0.0; 128],
            swiglu: SwigluSpec::GPT_OSS,
            gates: GateLayout::Interleaved,
            inner: Inner::Bf16,
        };
        let said = backend.load_experts(&experts).unwrap_err();
        assert_eq!(said.to_string(), "down experts: axis expert is 1, needed 2");
        let two_down = stack(&down, 2);
        experts.down = &two_down;
        experts.down_bias = &[0.0; 127];
        let said = backend.load_experts(&experts).unwrap_err();
        assert_eq!(said.to_string(), "down bias: the slice has 127 elements, its extents need 128");
        let said = backend.load_attention(&spec(4, 2, 32, None), &[0.0; 3]).unwrap_err();
        assert_eq!(said.to_string(), "sinks: the slice has 3 elements, its extents need 4");
    }
}

fn stack(of: &RandomMatrix, count: usize) -> QuantizedExperts<'_> {
    QuantizedExperts::new(vec![of.view(); count]).unwrap()
}
