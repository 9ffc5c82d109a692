//! What a matmul's speed is worth end to end: `cargo bench --bench generate [-- --help]`.
//!
//! Two layers as wide as gpt-oss-20b's, of its 24, and a twelfth of its vocabulary: the whole model reads twelve times as much for
//! a token. Weights are random MXFP4 and bf16, activations and KV cache bf16; the runtime is that of the example `generate`.
//! Contestants are called in turn, each after a look at the machine's limits: this machine's tier, the tiers below it, and its
//! own bf16 kernel on the same experts dequantized, which is what a runtime without MXFP4 kernels would do. All must give the
//! same logits, to the bit.

#[allow(dead_code)] // single matmuls are of no use here
#[path = "../src/bin/trnk/bench/case.rs"]
mod case;
#[allow(dead_code)]
#[path = "../examples/gpt_oss/mod.rs"]
mod gpt_oss;
#[allow(dead_code, unused_imports)]
#[path = "../src/bin/trnk/bench/machine.rs"]
mod machine;
#[allow(dead_code)]
#[path = "../src/bin/trnk/bench/sample.rs"]
mod sample;

use case::{Acts, Random};
use clap::Parser;
use gpt_oss::{Model, Session};
use half::bf16;
use safetensors::tensor::{Dtype, TensorView};
use sample::{Contender, Limits, Outcome, Sampling, measure, timed};
use serde_json::json;
use std::time::Duration;
use trn_kernels::attention::AttentionSpec;
use trn_kernels::backend::{
    AttentionId, Backend, CacheId, CpuBackend, ExpertWeights, ExpertsId, HeadsIn, HeadsOut, MatrixId, Problem,
};
use trn_kernels::checkpoint::{Checkpoint, GptOss, GptOssConfig};
use trn_kernels::cpu::limits::{StreamRead, name};
use trn_kernels::kv::{KvConfig, KvFormat, PageTable};
use trn_kernels::matmul::{Activations, Output};
use trn_kernels::quant::{QuantizedExperts, QuantizedMatrix};
use trn_kernels::{Cpu, Isa, MatMut, Parallelism, Result};

/// Layers and vocabulary of gpt-oss-20b are divided by this.
const PART: usize = 12;
const LAYERS: usize = 24 / PART;
const VOCABULARY: usize = 201_088 / PART;
/// Room in the KV cache for each token whose time counts: before it, others warm up.
const ROOM: usize = 16;
/// Tokens of a prompt.
const PROMPT: usize = 512;

/// Prefill and decode of two layers of gpt-oss-20b beside this machine's limits.
#[derive(Parser)]
struct Args {
    /// Threads [default: all that this process may use]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

    /// Tokens to decode
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u16).range(1..=4096))]
    steps: u16,

    /// What `cargo bench` passes
    #[arg(long, hide = true)]
    bench: bool,
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> std::result::Result<(), Failure> {
    let args = Args::parse();
    let threads = args.threads.map_or_else(|| std::thread::available_parallelism().map_or(1, usize::from), usize::from);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    // From a thread of the pool, as the example does: it works along instead of waking one more.
    pool.install(|| compare(usize::from(args.steps), &pool))
}

fn compare(steps: usize, pool: &rayon::ThreadPool) -> std::result::Result<(), Failure> {
    let cpu = Cpu::try_detect()?.with_parallelism(Parallelism::Pool(pool));
    let bytes = checkpoint()?;
    let checkpoint = Checkpoint::from_bytes("random", bytes)?.with_config("config.json", config().to_string())?;
    let source = GptOss::new(&checkpoint)?;
    let mut limits = Limits { pool, read: StreamRead::new(pool)? };
    limits.read.tune(pool, 3);

    eprintln!("packing the contestants");
    let mut contestants = vec![
        Contestant::new(cpu, Box::new(CpuBackend::new(cpu)), "mxfp4", &source)?,
        Contestant::new(cpu, Box::new(Dequantized(CpuBackend::new(cpu))), "bf16", &source)?,
    ];
    for isa in [Isa::Avx512, Isa::Avx2, Isa::Portable].into_iter().filter(|isa| *isa < cpu.isa()) {
        let cpu = Cpu::with_isa(isa)?.with_parallelism(Parallelism::Pool(pool));
        contestants.push(Contestant::new(cpu, Box::new(CpuBackend::new(cpu)), "mxfp4", &source)?);
    }
    println!("{}, {} threads, tier {}, {}", name(), pool.current_num_threads(), cpu.isa(), machine::today());
    println!(
        "gpt-oss-20b, {LAYERS} of 24 layers and {VOCABULARY} of 201088 tokens of vocabulary: {:.0} MB of weights a token",
        read_bytes(source.config(), 1, false) as f64 / 1e6
    );
    let peak = machine::peak(cpu.isa(), Acts::Bf16);

    let mut random = Random::new(11);
    let mut tokens = |count| (0..count).map(|_| (random.next() % VOCABULARY as u64) as u32).collect::<Vec<_>>();
    let prompt = tokens(PROMPT);
    let decoded = tokens(64);

    println!("{:<8}{:<10}{:>13}{:>9}{:>9}{:>8}", "experts", "tier", "prefill tok/s", "GFLOP/s", "of peak", "x ours");
    let mut logits = vec![vec![]; contestants.len()];
    let who: Vec<_> = contestants.iter().map(|c| (c.weights, c.cpu.isa())).collect();
    let calls = contestants.iter_mut().zip(&mut logits).map(|(contestant, logits)| {
        let flops = operations(source.config(), PROMPT);
        let bytes = read_bytes(source.config(), PROMPT, contestant.weights == "bf16");
        let Contestant { cpu, model, backend, .. } = contestant;
        let prompt = &prompt;
        let call = move || {
            let mut session = Session::<bf16>::new(model, &mut **backend, *cpu, KvFormat::Bf16, PROMPT)?;
            session.step(prompt)?;
            session.logits(1, logits)
        };
        contender(bytes, flops, call)
    });
    let sampling = Sampling { repeat: None, budget: Duration::from_secs(6) };
    let outcomes = measure(&mut limits, peak, &mut calls.collect::<Vec<_>>(), sampling)?;
    same(&logits)?;
    for ((weights, isa), outcome) in who.iter().zip(&outcomes) {
        let rate = PROMPT as f64 / outcome.seconds;
        let of_peak = outcome.of_peak.map_or("-".into(), |share| format!("{share:.2}"));
        let gflops = outcome.flops_per_second() / 1e9;
        println!(
            "{weights:<8}{:<10}{rate:>13.1}{gflops:>9.1}{of_peak:>9}{:>8.2}",
            isa.to_string(),
            outcome.times_first
        );
    }

    println!("{:<8}{:<10}{:>13}{:>9}{:>9}{:>8}", "experts", "tier", "decode tok/s", "GB/s", "of read", "x ours");
    let calls = contestants.iter_mut().zip(&mut logits).map(|(contestant, logits)| {
        let flops = operations(source.config(), 1);
        let bytes = read_bytes(source.config(), 1, contestant.weights == "bf16");
        let Contestant { cpu, model, backend, .. } = contestant;
        let mut unread = vec![];
        let mut session =
            Session::<bf16>::new(model, &mut **backend, *cpu, KvFormat::Bf16, PROMPT + ROOM * (steps + 1))?;
        session.step(&prompt)?;
        for token in decoded.iter().take(4) {
            session.step(&[*token])?;
        }
        session.logits(1, logits)?;
        let mut next = decoded.iter().cycle();
        Ok(contender(bytes, flops, move || {
            session.step(next.next().map_or(&[], std::slice::from_ref))?;
            session.logits(1, &mut unread)
        }))
    });
    let mut calls = calls.collect::<Result<Vec<_>>>()?;
    let sampling = Sampling { repeat: Some(steps), budget: Duration::ZERO };
    let outcomes = measure(&mut limits, peak, &mut calls, sampling)?;
    drop(calls);
    same(&logits)?;
    for ((weights, isa), o @ Outcome { seconds, .. }) in who.iter().zip(&outcomes) {
        let (rate, gb) = (1.0 / seconds, o.bytes_per_second() / 1e9);
        println!("{weights:<8}{:<10}{rate:>13.1}{gb:>9.2}{:>9.2}{:>8.2}", isa.to_string(), o.of_read, o.times_first);
    }
    Ok(())
}

fn contender<'a>(bytes: usize, flops: f64, mut call: impl FnMut() -> Result<()> + 'a) -> Contender<'a> {
    Contender { name: String::new(), bytes, flops, call: Box::new(move || timed(&mut call)) }
}

/// Asks that every contestant's logits have the same bits.
fn same(logits: &[Vec<f32>]) -> std::result::Result<(), Failure> {
    let bits = |logits: &[f32]| logits.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let all: Vec<_> = logits.iter().map(|logits| bits(logits)).collect();
    match all.windows(2).position(|pair| pair[0] != pair[1]) {
        Some(i) => Err(format!("contestants {i} and {} disagree: not measured", i + 1).into()),
        None if logits.iter().flatten().any(|x| !x.is_finite()) => Err("a logit is not a number: not measured".into()),
        None => Ok(()),
    }
}

/// Who generates.
struct Contestant<'p, 'w> {
    cpu: Cpu<'p>,
    /// What its experts are packed from.
    weights: &'static str,
    backend: Box<dyn Backend<'w> + 'p>,
    model: Model<'w>,
}

impl<'p, 'w> Contestant<'p, 'w> {
    fn new(
        cpu: Cpu<'p>,
        mut backend: Box<dyn Backend<'w> + 'p>,
        weights: &'static str,
        source: &GptOss<'w>,
    ) -> Result<Self> {
        let model = Model::load::<bf16>(&mut *backend, source, false, || ())?;
        Ok(Contestant { cpu, weights, backend, model })
    }
}

/// Weights that the layers hold for a token: those of attention and router, those of one expert.
fn layer_weights(c: &GptOssConfig) -> (usize, usize) {
    let heads = (2 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim;
    (c.hidden_size * (heads + c.num_experts), 3 * c.hidden_size * c.intermediate_size)
}

/// Bytes of weights that a step of `tokens` reads at least: all that is dense, and of the experts as many as its tokens can name.
fn read_bytes(c: &GptOssConfig, tokens: usize, dequantized: bool) -> usize {
    let (dense, expert) = layer_weights(c);
    let expert = if dequantized { 2 * expert } else { expert / 32 * 17 };
    let experts = c.num_experts.min(tokens * c.experts_per_token);
    c.num_hidden_layers * (2 * dense + experts * expert) + 2 * c.vocab_size * c.hidden_size
}

/// Floating-point operations of the matmuls of a step of `tokens` that wants one token's logits. Attention is timed, not counted.
fn operations(c: &GptOssConfig, tokens: usize) -> f64 {
    let (dense, expert) = layer_weights(c);
    let layers = tokens * c.num_hidden_layers * (dense + c.experts_per_token * expert);
    2.0 * (layers + c.vocab_size * c.hidden_size) as f64
}

fn config() -> serde_json::Value {
    json!({
        "model_type": "gpt_oss", "num_hidden_layers": LAYERS, "hidden_size": 2880, "intermediate_size": 2880,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": VOCABULARY,
        "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "rms_norm_eps": 1e-5,
        "swiglu_limit": 7.0, "rope_theta": 150_000.0, "tie_word_embeddings": false,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0,
            "beta_slow": 1.0, "truncate": false
        }
    })
}

/// The model of [`config`] as a safetensors file, random.
fn checkpoint() -> std::result::Result<Vec<u8>, Failure> {
    let c = GptOssConfig::from_json("config.json", config().to_string())?;
    let (h, i, e) = (c.hidden_size, c.intermediate_size, c.num_experts);
    let (queries, keys) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
    let mut random = Random::new(5);
    let mut bf16s = |shape: &[usize], middle: f32, spread: f32| {
        let values = (0..shape.iter().product()).map(|_| bf16::from_f32(middle + spread * random.unit()));
        (Dtype::BF16, shape.to_vec(), values.flat_map(bf16::to_le_bytes).collect::<Vec<_>>())
    };
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), bf16s(&[c.vocab_size, h], 0.0, 1.0)),
        ("lm_head.weight".to_owned(), bf16s(&[c.vocab_size, h], 0.0, 0.02)),
        ("model.norm.weight".to_owned(), bf16s(&[h], 1.0, 0.1)),
    ];
    for layer in 0..c.num_hidden_layers {
        let mut add = |name: &str, tensor| tensors.push((format!("model.layers.{layer}.{name}"), tensor));
        for (name, n, k) in [
            ("self_attn.q_proj", queries, h),
            ("self_attn.k_proj", keys, h),
            ("self_attn.v_proj", keys, h),
            ("self_attn.o_proj", h, queries),
            ("mlp.router", e, h),
        ] {
            add(&format!("{name}.weight"), bf16s(&[n, k], 0.0, 0.02));
            add(&format!("{name}.bias"), bf16s(&[n], 0.0, 0.02));
        }
        for name in ["input_layernorm.weight", "post_attention_layernorm.weight"] {
            add(name, bf16s(&[h], 1.0, 0.1));
        }
        add("self_attn.sinks", bf16s(&[c.num_attention_heads], 0.0, 1.0));
        for (name, n, k) in [("gate_up_proj", 2 * i, h), ("down_proj", h, i)] {
            let mut codes = Random::new((layer * 2 * i + n) as u64);
            let count = e * n * k / 32;
            let blocks = (0..2 * count).flat_map(|_| codes.next().to_le_bytes()).collect();
            // 2^-8 to 2^-5: sums of 2880 products of values up to 6 stay near 1.
            let scales = (0..count).map(|_| 119 + (codes.next() >> 62) as u8).collect();
            add(&format!("mlp.experts.{name}_blocks"), (Dtype::U8, vec![e, n, k / 32, 16], blocks));
            add(&format!("mlp.experts.{name}_scales"), (Dtype::U8, vec![e, n, k / 32], scales));
            add(&format!("mlp.experts.{name}_bias"), bf16s(&[e, n], 0.0, 0.02));
        }
    }
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| TensorView::new(*dtype, shape.clone(), bytes).map(|view| (name, view)));
    Ok(safetensors::serialize(views.collect::<std::result::Result<Vec<_>, _>>()?, None)?)
}

/// The CPU with its experts' weights dequantized to bf16, which is exact, before they are packed.
struct Dequantized<'p>(CpuBackend<'p>);

/// The codes of each expert as bf16, little endian.
fn dequantized(experts: &QuantizedExperts<'_>) -> Result<Vec<Vec<u8>>> {
    let mut values = vec![0.0; experts.n() * experts.k()];
    let one = |w: &QuantizedMatrix<'_>| {
        w.dequantize_f32(&mut values)?;
        Ok(values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect())
    };
    experts.iter().map(one).collect()
}

/// They as matrices.
fn matrices<'a>(like: &QuantizedExperts<'_>, bytes: &'a [Vec<u8>]) -> Result<QuantizedExperts<'a>> {
    let each = bytes.iter().map(|bytes| QuantizedMatrix::bf16(like.n(), like.k(), bytes));
    QuantizedExperts::new(each.collect::<Result<_>>()?)
}

impl<'w> Backend<'w> for Dequantized<'_> {
    fn name(&self) -> &'static str {
        "cpu, experts dequantized"
    }

    fn supports(&self, problem: &Problem) -> Result<()> {
        self.0.supports(problem)
    }

    fn load_matrix(&mut self, weight: &QuantizedMatrix<'w>, bias: &[f32]) -> Result<MatrixId> {
        self.0.load_matrix(weight, bias)
    }

    fn load_experts(&mut self, e: &ExpertWeights<'w, '_>) -> Result<ExpertsId> {
        let (gate_up, down) = (dequantized(e.gate_up)?, dequantized(e.down)?);
        let (gate_up, down) = (matrices(e.gate_up, &gate_up)?, matrices(e.down, &down)?);
        self.0.load_experts(&ExpertWeights {
            gate_up: &gate_up,
            gate_up_bias: e.gate_up_bias,
            down: &down,
            down_bias: e.down_bias,
            swiglu: e.swiglu,
            gates: e.gates,
            inner: e.inner,
        })
    }

    fn load_attention(&mut self, spec: &AttentionSpec, sinks: &[f32]) -> Result<AttentionId> {
        self.0.load_attention(spec, sinks)
    }

    fn create_cache(&mut self, config: &KvConfig) -> Result<CacheId> {
        self.0.create_cache(config)
    }

    fn matmul(&mut self, w: MatrixId, x: Activations<'_>, y: Output<'_>, accumulate: bool) -> Result<()> {
        self.0.matmul(w, x, y, accumulate)
    }

    fn moe(&mut self, w: ExpertsId, x: Activations<'_>, ids: &[u32], top_k: usize, y: MatMut<'_, f32>) -> Result<()> {
        self.0.moe(w, x, ids, top_k, y)
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
        self.0.append(cache, layer, table, append_indptr, k, v)
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
        self.0.prefill(attention, cache, layer, table, q, indptr, out)
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
        self.0.decode(attention, cache, layer, table, q, out)
    }
}
