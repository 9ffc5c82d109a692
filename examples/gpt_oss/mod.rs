//! A gpt-oss runtime on top of the crate: what to multiply with what, and in which order. Everything else is linked.
//!
//! Shapes: T tokens of a step, H hidden size, V vocabulary, E experts, K of them for each token, I expert width.

use std::time::{Duration, Instant};
use trn_kernels::attention::{AttentionOut, AttentionSpec, Queries, plan_decode};
use trn_kernels::checkpoint::{Dense, Experts, GptOss, GptOssConfig};
use trn_kernels::kv::{KvConfig, KvFormat, KvPool, KvSequence, PageTable, append_kv};
use trn_kernels::layer::{
    GateLayout, RopeFrequencies, RopePairs, RopeScaling, RopeTable, RouterMode, SwigluSpec, combine_experts, embed,
    rms_norm, route_top_k, swiglu,
};
use trn_kernels::matmul::{Activations, MatmulOptions, PackedExperts, PackedMatrix, RowSource};
use trn_kernels::num::{Fp8, Real};
use trn_kernels::quant::{QuantizeOptions, QuantizedMatrix, QuantizedMatrixBuf, ScaleRule, Scheme, quantize_into};
use trn_kernels::{Cpu, Error, HeadsMut, HeadsRef, MatMut, MatRef, Result, Workspace};

/// Tokens of a KV page.
const PAGE_SIZE: usize = 16;

/// A matrix with its bias.
struct Linear {
    weight: PackedMatrix,
    bias: Vec<f32>,
}

impl Linear {
    fn pack(cpu: &Cpu<'_>, dense: &Dense<'_>, name: &str) -> Result<Self> {
        Ok(Linear { weight: pack(cpu, &dense.weight, name)?, bias: dense.bias.clone() })
    }
}

/// The experts of a layer.
struct ExpertLinear {
    weight: PackedExperts,
    bias: Vec<f32>,
}

impl ExpertLinear {
    fn pack(cpu: &Cpu<'_>, experts: &Experts<'_>, name: &str) -> Result<Self> {
        let packed =
            experts.weight.iter().enumerate().map(|(e, weight)| pack(cpu, weight, &format!("{name} of expert {e}")));
        Ok(ExpertLinear { weight: PackedExperts::new(packed.collect::<Result<_>>()?)?, bias: experts.bias.clone() })
    }
}

/// Packs a weight that must be all numbers: a NaN in a checkpoint is damage, and would make NaN of every token.
fn pack(cpu: &Cpu<'_>, weight: &QuantizedMatrix<'_>, name: &str) -> Result<PackedMatrix> {
    let packed = cpu.pack(weight)?;
    if !packed.is_finite() {
        let problem =
            weight.check_finite().map_or_else(|e| e.to_string(), |()| "a weight is beyond bf16's range".into());
        return Err(Error::Checkpoint { at: name.into(), problem });
    }
    Ok(packed)
}

struct Layer {
    attn_norm: Vec<f32>,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    sinks: Vec<f32>,
    attention: AttentionSpec,
    mlp_norm: Vec<f32>,
    router: Linear,
    gate_up: ExpertLinear,
    down: ExpertLinear,
}

/// Packed weights; the embedding stays in the checkpoint.
pub(crate) struct Model<'a> {
    pub(crate) config: GptOssConfig,
    embedding: QuantizedMatrix<'a>,
    layers: Vec<Layer>,
    final_norm: Vec<f32>,
    lm_head: PackedMatrix,
    frequencies: RopeFrequencies,
    swiglu: SwigluSpec,
}

impl<'a> Model<'a> {
    /// Packs a checkpoint layer by layer; `progress` hears of each one done.
    pub(crate) fn load(cpu: &Cpu<'_>, source: &GptOss<'a>, mut progress: impl FnMut()) -> Result<Self> {
        let config = source.config().clone();
        let scaling = match &config.yarn {
            None => RopeScaling::None,
            Some(yarn) => RopeScaling::Yarn {
                factor: yarn.factor,
                original_context: u32::try_from(yarn.original_context).map_err(|_| Error::Value {
                    operand: "rope original context".into(),
                    at: 0,
                    got: yarn.original_context.to_string(),
                    needed: "a number of tokens below 2^32",
                })?,
                beta_fast: yarn.beta_fast,
                beta_slow: yarn.beta_slow,
                truncate: yarn.truncate,
                concentration: None,
            },
        };
        let mut layers = vec![];
        for i in 0..config.num_hidden_layers {
            let layer = source.layer(i)?;
            let name = |part: &str| format!("layer {i}, {part}");
            layers.push(Layer {
                attention: AttentionSpec {
                    num_qo_heads: config.num_attention_heads,
                    num_kv_heads: config.num_key_value_heads,
                    head_dim_qk: config.head_dim,
                    head_dim_vo: config.head_dim,
                    sm_scale: 1.0 / (config.head_dim as f32).sqrt(),
                    causal: true,
                    // A window counts the token itself, window_left does not.
                    window_left: layer.window.map(|window| window - 1),
                    logits_soft_cap: None,
                },
                q: Linear::pack(cpu, &layer.q, &name("q"))?,
                k: Linear::pack(cpu, &layer.k, &name("k"))?,
                v: Linear::pack(cpu, &layer.v, &name("v"))?,
                o: Linear::pack(cpu, &layer.o, &name("o"))?,
                router: Linear::pack(cpu, &layer.router, &name("router"))?,
                gate_up: ExpertLinear::pack(cpu, &layer.gate_up, &name("gate_up"))?,
                down: ExpertLinear::pack(cpu, &layer.down, &name("down"))?,
                attn_norm: layer.attn_norm,
                mlp_norm: layer.mlp_norm,
                sinks: layer.sinks,
            });
            progress();
        }
        Ok(Model {
            embedding: source.embedding()?,
            layers,
            final_norm: source.final_norm()?,
            lm_head: pack(cpu, &source.lm_head()?, "lm_head")?,
            frequencies: RopeFrequencies::new(config.rope_theta, config.head_dim, scaling)?,
            swiglu: SwigluSpec { limit: Some(config.swiglu_limit as f32), ..SwigluSpec::GPT_OSS },
            config,
        })
    }
}

/// One conversation: its KV pages, scratch memory, and what activations are.
pub(crate) struct Session<'m, T> {
    model: &'m Model<'m>,
    cpu: Cpu<'m>,
    /// Whether what enters a quantized-activation matmul is rounded to MXFP8 first.
    quantize: bool,
    pool: KvPool,
    sequence: KvSequence,
    rope: RopeTable,
    workspace: Workspace,
    quantized: QuantizedMatrixBuf,
    buffers: Buffers<T>,
    /// Time spent in attention and in experts, for those who wonder.
    pub(crate) attention_time: Duration,
    pub(crate) experts_time: Duration,
}

/// Activations of a step. The residual stream is f32; what enters a matmul is `T`.
#[derive(Default)]
struct Buffers<T> {
    residual: Vec<f32>,
    normed: Vec<T>,
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    context: Vec<T>,
    router_logits: Vec<f32>,
    expert_ids: Vec<u32>,
    expert_weights: Vec<f32>,
    gate_up: Vec<f32>,
    gated: Vec<T>,
    experts_out: Vec<f32>,
}

impl<'m, T: Real> Session<'m, T> {
    /// An empty conversation with room for `max_tokens`.
    pub(crate) fn new(
        model: &'m Model<'m>,
        cpu: Cpu<'m>,
        quantize: bool,
        kv: KvFormat,
        max_tokens: usize,
    ) -> Result<Self> {
        let config = &model.config;
        let pages = max_tokens.div_ceil(PAGE_SIZE);
        let heads = config.num_key_value_heads;
        let pool = KvConfig::new(kv, config.num_hidden_layers, pages, PAGE_SIZE, heads, config.head_dim);
        let pool = KvPool::new(pool)?;
        Ok(Session {
            sequence: KvSequence::new(&pool),
            model,
            cpu,
            quantize,
            pool,
            rope: RopeTable::default(),
            workspace: Workspace::new(),
            quantized: QuantizedMatrixBuf::new(),
            buffers: Buffers::default(),
            attention_time: Duration::ZERO,
            experts_time: Duration::ZERO,
        })
    }

    /// Most bytes that KV pages have taken.
    pub(crate) fn peak_kv_bytes(&self) -> usize {
        self.pool.peak_bytes()
    }

    /// Runs `tokens` behind those already seen. Afterwards [`Session::logits`] gives the logits of any of them.
    pub(crate) fn step(&mut self, tokens: &[u32]) -> Result<()> {
        let start = self.sequence.len();
        self.sequence.grow(&mut self.pool, tokens.len())?;
        let table = PageTable::from_sequences([&self.sequence])?;
        let positions: Vec<u32> = (start as u32..).take(tokens.len()).collect();
        self.rope.fill(&self.model.frequencies, &positions)?;
        let (t, h) = (tokens.len(), self.model.config.hidden_size);
        embed(&self.model.embedding, tokens, matrix(&mut self.buffers.residual, t, h)?)?;
        for i in 0..self.model.layers.len() {
            self.attention(i, t, &table)?;
            self.experts(i, t)?;
        }
        Ok(())
    }

    /// residual += o(attention(rope(q), rope(k), v)) of the normed residual.
    fn attention(&mut self, i: usize, t: usize, table: &PageTable) -> Result<()> {
        let clock = Instant::now();
        let (model, cpu, b) = (self.model, &self.cpu, &mut self.buffers);
        let (config, layer) = (&model.config, &model.layers[i]);
        let (h, d) = (config.hidden_size, config.head_dim);
        let (qo, kv) = (config.num_attention_heads, config.num_key_value_heads);
        let residual = MatRef::new(&b.residual, t, h)?;
        rms_norm(cpu, residual, &layer.attn_norm, config.rms_norm_eps as f32, matrix(&mut b.normed, t, h)?)?;
        let quantized = quantize(self.quantize, MatRef::new(&b.normed, t, h)?, &mut self.quantized)?;
        let x = quantized.as_ref().map_or(MatRef::new(&b.normed, t, h)?.into(), Activations::from);
        for (linear, out) in [(&layer.q, &mut b.q), (&layer.k, &mut b.k), (&layer.v, &mut b.v)] {
            let options = MatmulOptions { bias: Some(&linear.bias), ..MatmulOptions::default() };
            cpu.matmul(x, &linear.weight, matrix(out, t, linear.weight.n())?, &options, &mut self.workspace)?;
        }
        self.rope.apply(cpu, RopePairs::HalfSplit, HeadsMut::new(&mut b.q, t, qo, d)?)?;
        self.rope.apply(cpu, RopePairs::HalfSplit, HeadsMut::new(&mut b.k, t, kv, d)?)?;
        let (k, v) = (HeadsRef::new(&b.k, t, kv, d)?, HeadsRef::new(&b.v, t, kv, d)?);
        append_kv(&mut self.pool, i, table, &[0, t], k, v)?;

        let cache = self.pool.layer(i)?;
        let q = HeadsRef::new(&b.q, t, qo, d)?;
        b.context.resize(t * qo * d, T::default());
        let out = AttentionOut { out: HeadsMut::new(&mut b.context, t, qo, d)?, lse: None };
        if t == 1 {
            let plan = plan_decode(&layer.attention, &cache, table)?;
            cpu.decode(&plan, q, &cache, Some(&layer.sinks), out, &mut self.workspace)?;
        } else {
            let queries = Queries { q, indptr: &[0, t], sinks: Some(&layer.sinks) };
            cpu.prefill_paged(&layer.attention, queries, &cache, table, out, &mut self.workspace)?;
        }
        let context = MatRef::new(&b.context, t, qo * d)?;
        let quantized = quantize(self.quantize, context, &mut self.quantized)?;
        let x = quantized.as_ref().map_or(context.into(), Activations::from);
        let options = MatmulOptions { bias: Some(&layer.o.bias), accumulate: true, ..MatmulOptions::default() };
        cpu.matmul(x, &layer.o.weight, MatMut::new(&mut b.residual, t, h)?, &options, &mut self.workspace)?;
        self.attention_time += clock.elapsed();
        Ok(())
    }

    /// residual += sum of the chosen experts of the normed residual.
    fn experts(&mut self, i: usize, t: usize) -> Result<()> {
        let clock = Instant::now();
        let (model, cpu, b) = (self.model, &self.cpu, &mut self.buffers);
        let (config, layer) = (&model.config, &model.layers[i]);
        let (h, experts, top_k) = (config.hidden_size, config.num_experts, config.experts_per_token);
        let (slots, width) = (t * top_k, config.intermediate_size);
        let residual = MatRef::new(&b.residual, t, h)?;
        rms_norm(cpu, residual, &layer.mlp_norm, config.rms_norm_eps as f32, matrix(&mut b.normed, t, h)?)?;
        // The router is never quantized: a swapped expert costs more than it saves.
        let normed = MatRef::new(&b.normed, t, h)?;
        let options = MatmulOptions { bias: Some(&layer.router.bias), ..MatmulOptions::default() };
        let logits = matrix(&mut b.router_logits, t, experts)?;
        cpu.matmul(normed, &layer.router.weight, logits, &options, &mut self.workspace)?;
        b.expert_ids.resize(slots, 0);
        b.expert_weights.resize(slots, 0.0);
        route_top_k(
            RouterMode::SoftmaxAfterTopK,
            MatRef::new(&b.router_logits, t, experts)?,
            MatMut::new(&mut b.expert_ids, t, top_k)?,
            MatMut::new(&mut b.expert_weights, t, top_k)?,
        )?;
        let quantized = quantize(self.quantize, normed, &mut self.quantized)?;
        let x = quantized.as_ref().map_or(normed.into(), Activations::from);
        let options = MatmulOptions { bias: Some(&layer.gate_up.bias), ..MatmulOptions::default() };
        let (weight, out) = (&layer.gate_up.weight, matrix(&mut b.gate_up, slots, 2 * width)?);
        cpu.gather_matmul(x, RowSource::Token, weight, &b.expert_ids, top_k, out, &options, &mut self.workspace)?;
        let gate_up = MatRef::new(&b.gate_up, slots, 2 * width)?;
        swiglu(cpu, model.swiglu, GateLayout::Interleaved, gate_up, matrix(&mut b.gated, slots, width)?)?;
        let gated = MatRef::new(&b.gated, slots, width)?;
        let quantized = quantize(self.quantize, gated, &mut self.quantized)?;
        let x = quantized.as_ref().map_or(gated.into(), Activations::from);
        let options = MatmulOptions { bias: Some(&layer.down.bias), ..MatmulOptions::default() };
        let (weight, out) = (&layer.down.weight, matrix(&mut b.experts_out, slots, h)?);
        cpu.gather_matmul(x, RowSource::Slot, weight, &b.expert_ids, top_k, out, &options, &mut self.workspace)?;
        let weights = MatRef::new(&b.expert_weights, t, top_k)?;
        let out = MatMut::new(&mut b.residual, t, h)?;
        combine_experts(cpu, MatRef::new(&b.experts_out, slots, h)?, weights, true, out)?;
        self.experts_time += clock.elapsed();
        Ok(())
    }

    /// The residual stream `[T, H]` behind the last layer of the last step.
    #[allow(dead_code)] // the golden tests read it
    pub(crate) fn residual(&self) -> &[f32] {
        &self.buffers.residual
    }

    /// Logits `[rows, V]` of the last `rows` tokens of the last step.
    pub(crate) fn logits(&mut self, rows: usize, out: &mut Vec<f32>) -> Result<()> {
        let (model, b) = (self.model, &mut self.buffers);
        let h = model.config.hidden_size;
        let skip = b.residual.len().checked_sub(rows * h).ok_or(Error::Overflow { operand: "logit rows".into() })?;
        let residual = MatRef::new(&b.residual[skip..], rows, h)?;
        let eps = model.config.rms_norm_eps as f32;
        rms_norm(&self.cpu, residual, &model.final_norm, eps, matrix(&mut b.normed, rows, h)?)?;
        let x = MatRef::new(&b.normed, rows, h)?;
        let y = matrix(out, rows, model.lm_head.n())?;
        self.cpu.matmul(x, &model.lm_head, y, &MatmulOptions::default(), &mut self.workspace)
    }
}

/// `data` made `rows` x `cols` large, as a matrix.
fn matrix<T: Real>(data: &mut Vec<T>, rows: usize, cols: usize) -> Result<MatMut<'_, T>> {
    data.resize(rows * cols, T::default());
    MatMut::new(data, rows, cols)
}

/// `x` in MXFP8, with the rule of the device's own quantizer, if wanted.
fn quantize<'b, T: Real>(
    wanted: bool,
    x: MatRef<'_, T>,
    buffer: &'b mut QuantizedMatrixBuf,
) -> Result<Option<QuantizedMatrix<'b>>> {
    if !wanted {
        return Ok(None);
    }
    let options = QuantizeOptions { rule: ScaleRule::Trainium, ..QuantizeOptions::default() };
    quantize_into(x, Scheme::Mxfp8(Fp8::E4M3Fn), &options, buffer)?;
    Ok(Some(buffer.view()))
}
