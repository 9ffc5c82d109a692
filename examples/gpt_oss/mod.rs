//! A gpt-oss runtime on top of the crate: what to multiply with what, and in which order. Everything else is linked.
//!
//! Shapes: T tokens of a step, H hidden size, V vocabulary, E experts, K of them for each token, I expert width.

use std::time::{Duration, Instant};
use trn_kernels::attention::AttentionSpec;
use trn_kernels::backend::{AttentionId, Backend, CacheId, ExpertWeights, ExpertsId, Inner, MatrixId};
use trn_kernels::checkpoint::{Dense, GptOss, GptOssConfig};
use trn_kernels::kv::{KvConfig, KvFormat, KvSequence, PageAllocator, PageTable};
use trn_kernels::layer::{
    GateLayout, RopeFrequencies, RopePairs, RopeScaling, RopeTable, RouterMode, SwigluSpec, combine_experts, embed,
    rms_norm, route_top_k,
};
use trn_kernels::matmul::Activations;
use trn_kernels::num::{Fp8, Real};
use trn_kernels::quant::{QuantizeOptions, QuantizedMatrix, QuantizedMatrixBuf, ScaleRule, Scheme, quantize_into};
use trn_kernels::{Cpu, Error, HeadsMut, HeadsRef, MatMut, MatRef, Result};

/// Tokens of a KV page.
const PAGE_SIZE: usize = 16;

/// Weights of a layer: the norms, and where the backend keeps the rest.
struct Layer {
    attn_norm: Vec<f32>,
    q: MatrixId,
    k: MatrixId,
    v: MatrixId,
    o: MatrixId,
    attention: AttentionId,
    mlp_norm: Vec<f32>,
    router: MatrixId,
    experts: ExpertsId,
}

/// A model whose weights a backend has; the embedding stays in the checkpoint.
pub(crate) struct Model<'w> {
    pub(crate) config: GptOssConfig,
    embedding: QuantizedMatrix<'w>,
    layers: Vec<Layer>,
    final_norm: Vec<f32>,
    lm_head: MatrixId,
    frequencies: RopeFrequencies,
    /// Whether what enters a matmul (the router's excepted) is rounded to MXFP8 first.
    quantize: bool,
}

/// How activations of type `T` leave the swiglu.
fn inner<T: Real>(quantize: bool) -> Inner {
    match T::NAME {
        _ if quantize => Inner::Mxfp8(ScaleRule::Trainium),
        "f32" => Inner::F32,
        _ => Inner::Bf16,
    }
}

/// Says which weight a backend refused.
fn named<T>(name: String, result: Result<T>) -> Result<T> {
    result.map_err(|e| Error::Checkpoint { at: name, problem: e.to_string() })
}

impl<'w> Model<'w> {
    /// Gives a checkpoint to a backend layer by layer, for activations of type `T`; `progress` hears of each one done.
    pub(crate) fn load<T: Real>(
        backend: &mut dyn Backend<'w>,
        source: &GptOss<'w>,
        quantize: bool,
        mut progress: impl FnMut(),
    ) -> Result<Self> {
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
            let spec = AttentionSpec {
                // A window counts the token itself, window_left does not.
                window_left: layer.window.map(|window| window - 1),
                ..AttentionSpec::new(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
            };
            let mut matrix = |dense: &Dense<'w>, part: &str| {
                named(format!("layer {i}, {part}"), backend.load_matrix(&dense.weight, &dense.bias))
            };
            let [q, k, v] = [matrix(&layer.q, "q")?, matrix(&layer.k, "k")?, matrix(&layer.v, "v")?];
            let [o, router] = [matrix(&layer.o, "o")?, matrix(&layer.router, "router")?];
            let experts = ExpertWeights {
                gate_up: &layer.gate_up.weight,
                gate_up_bias: &layer.gate_up.bias,
                down: &layer.down.weight,
                down_bias: &layer.down.bias,
                swiglu: SwigluSpec { limit: Some(config.swiglu_limit as f32), ..SwigluSpec::GPT_OSS },
                gates: GateLayout::Interleaved,
                inner: inner::<T>(quantize),
            };
            layers.push(Layer {
                attention: backend.load_attention(&spec, &layer.sinks)?,
                experts: named(format!("layer {i}, experts"), backend.load_experts(&experts))?,
                attn_norm: layer.attn_norm,
                mlp_norm: layer.mlp_norm,
                q,
                k,
                v,
                o,
                router,
            });
            progress();
        }
        Ok(Model {
            embedding: source.embedding()?,
            layers,
            final_norm: source.final_norm()?,
            lm_head: named("lm_head".into(), backend.load_matrix(&source.lm_head()?, &[]))?,
            frequencies: RopeFrequencies::new(config.rope_theta, config.head_dim, scaling)?,
            quantize,
            config,
        })
    }
}

/// One conversation: its KV pages, scratch memory, and what activations are.
pub(crate) struct Session<'s, 'w, T> {
    model: &'s Model<'w>,
    backend: &'s mut dyn Backend<'w>,
    /// Runs what lies between a backend's calls: norms, rope, routing.
    cpu: Cpu<'s>,
    cache: CacheId,
    pages: PageAllocator,
    /// Bytes of a page, all layers.
    page_bytes: usize,
    sequence: KvSequence,
    rope: RopeTable,
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
    experts_out: Vec<f32>,
}

impl<'s, 'w, T: Real> Session<'s, 'w, T> {
    /// An empty conversation with room for `max_tokens`, on the backend that has the model's weights.
    pub(crate) fn new(
        model: &'s Model<'w>,
        backend: &'s mut dyn Backend<'w>,
        cpu: Cpu<'s>,
        kv: KvFormat,
        max_tokens: usize,
    ) -> Result<Self> {
        let config = &model.config;
        let num_pages = max_tokens.div_ceil(PAGE_SIZE);
        let heads = config.num_key_value_heads;
        let cache = KvConfig::new(kv, config.num_hidden_layers, num_pages, PAGE_SIZE, heads, config.head_dim);
        let pages = PageAllocator::new(num_pages, PAGE_SIZE)?;
        Ok(Session {
            cache: backend.create_cache(&cache)?,
            page_bytes: cache.page_bytes()?,
            sequence: KvSequence::new(&pages),
            model,
            backend,
            cpu,
            pages,
            rope: RopeTable::default(),
            quantized: QuantizedMatrixBuf::new(),
            buffers: Buffers::default(),
            attention_time: Duration::ZERO,
            experts_time: Duration::ZERO,
        })
    }

    /// Most bytes that KV pages have taken.
    pub(crate) fn peak_kv_bytes(&self) -> usize {
        self.pages.peak_pages() * self.page_bytes
    }

    /// Runs `tokens` behind those already seen. Afterwards [`Session::logits`] gives the logits of any of them.
    pub(crate) fn step(&mut self, tokens: &[u32]) -> Result<()> {
        let start = self.sequence.len();
        self.sequence.grow(&mut self.pages, tokens.len())?;
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
        let quantized = quantize(model.quantize, MatRef::new(&b.normed, t, h)?, &mut self.quantized)?;
        let x = quantized.as_ref().map_or(MatRef::new(&b.normed, t, h)?.into(), Activations::from);
        for (id, heads, out) in [(layer.q, qo, &mut b.q), (layer.k, kv, &mut b.k), (layer.v, kv, &mut b.v)] {
            self.backend.matmul(id, x, matrix(out, t, heads * d)?.into(), false)?;
        }
        self.rope.apply(cpu, RopePairs::HalfSplit, HeadsMut::new(&mut b.q, t, qo, d)?)?;
        self.rope.apply(cpu, RopePairs::HalfSplit, HeadsMut::new(&mut b.k, t, kv, d)?)?;
        let (k, v) = (HeadsRef::new(&b.k, t, kv, d)?, HeadsRef::new(&b.v, t, kv, d)?);
        self.backend.append(self.cache, i, table, &[0, t], k.into(), v.into())?;

        let q = HeadsRef::new(&b.q, t, qo, d)?.into();
        b.context.resize(t * qo * d, T::default());
        let out = HeadsMut::new(&mut b.context, t, qo, d)?.into();
        if t == 1 {
            self.backend.decode(layer.attention, self.cache, i, table, q, out)?;
        } else {
            self.backend.prefill(layer.attention, self.cache, i, table, q, &[0, t], out)?;
        }
        let context = MatRef::new(&b.context, t, qo * d)?;
        let quantized = quantize(model.quantize, context, &mut self.quantized)?;
        let x = quantized.as_ref().map_or(context.into(), Activations::from);
        self.backend.matmul(layer.o, x, MatMut::new(&mut b.residual, t, h)?.into(), true)?;
        self.attention_time += clock.elapsed();
        Ok(())
    }

    /// residual += sum of the chosen experts of the normed residual.
    fn experts(&mut self, i: usize, t: usize) -> Result<()> {
        let clock = Instant::now();
        let (model, cpu, b) = (self.model, &self.cpu, &mut self.buffers);
        let (config, layer) = (&model.config, &model.layers[i]);
        let (h, experts, top_k) = (config.hidden_size, config.num_experts, config.experts_per_token);
        let slots = t * top_k;
        let residual = MatRef::new(&b.residual, t, h)?;
        rms_norm(cpu, residual, &layer.mlp_norm, config.rms_norm_eps as f32, matrix(&mut b.normed, t, h)?)?;
        // The router is never quantized: a swapped expert costs more than it saves.
        let normed = MatRef::new(&b.normed, t, h)?;
        let logits = matrix(&mut b.router_logits, t, experts)?;
        self.backend.matmul(layer.router, normed.into(), logits.into(), false)?;
        b.expert_ids.resize(slots, 0);
        b.expert_weights.resize(slots, 0.0);
        route_top_k(
            RouterMode::SoftmaxAfterTopK,
            MatRef::new(&b.router_logits, t, experts)?,
            MatMut::new(&mut b.expert_ids, t, top_k)?,
            MatMut::new(&mut b.expert_weights, t, top_k)?,
        )?;
        let quantized = quantize(model.quantize, normed, &mut self.quantized)?;
        let x = quantized.as_ref().map_or(normed.into(), Activations::from);
        self.backend.moe(layer.experts, x, &b.expert_ids, top_k, matrix(&mut b.experts_out, slots, h)?)?;
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
        let y = matrix(out, rows, model.config.vocab_size)?;
        self.backend.matmul(model.lm_head, x.into(), y.into(), false)
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
