//! A NeuronCore as a backend: compiled kernels of a [`KernelSet`](crate::neuron::kernels::KernelSet), weights and KV pages on the
//! device.
#![forbid(unsafe_code)]

use super::cpu::{all_pages, append, load_attention};
use super::store::Store;
use super::{
    AttentionId, Backend, CacheId, Element, ExpertWeights, ExpertsId, HeadsIn, HeadsOut, Inner, MatrixId, Problem,
    check_bias, of_expert,
};
use crate::attention::AttentionSpec;
use crate::cpu::Parallelism;
use crate::error::{Error, Result, extent, mul};
use crate::kv::{KvConfig, KvFormat, KvPool, KvShape, PageTable, check_indptr};
use crate::layer::{GateLayout, SwigluSpec};
use crate::matmul::{Activations, Output};
use crate::neuron::Traffic;
use crate::neuron::kernels::{
    AppendKernel, DecodeKernel, DeviceKernels, ExpertTensors, MatmulFp8Kernel, MatmulMxKernel, MoeKernel, PrefillKernel,
};
use crate::num::{Fp8, Real, rounded};
use crate::quant::{QuantizeOptions, QuantizedMatrix, QuantizedMatrixBuf, ScaleRule, Scheme, quantize};
use crate::trainium::{Dtype, Target};
use crate::view::{HeadsMut, HeadsRef, MatMut, MatRef};
use half::bf16;
use std::sync::Arc;

/// How bf16 activations enter an MX matmul on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ActivationTerms {
    /// As two MXFP8 terms that add up to the bf16 value (exactly, but for elements below 2^-13 of the largest in their 32).
    #[default]
    Two,
    /// Rounded to MXFP8.
    One,
}

impl ActivationTerms {
    fn count(self) -> usize {
        match self {
            ActivationTerms::Two => 2,
            ActivationTerms::One => 1,
        }
    }
}

/// How a [`NeuronBackend`] computes.
#[derive(Debug, Clone, Copy, Default)]
pub struct NeuronOptions<'p> {
    /// How bf16 activations enter MX matmuls.
    pub terms: ActivationTerms,
    /// Scheme of the activations that FP8 matmuls will get; one for all matrices.
    pub fp8_activations: Option<Scheme>,
    /// Threads that pack weights.
    pub parallelism: Parallelism<'p>,
}

/// Compiled kernels on a NeuronCore behind the trait.
///
/// Weights are packed and written once, KV pages live on the device; a call moves activations (and page numbers) only, which
/// [`NeuronBackend::traffic`] counts. bf16 weights, for which there is no kernel, are carried as two MXFP8 terms side by side along
/// k: `[high | low]` with activations `[x | x]`, exact but for weights below 2^-13 of the largest in their 32.
///
/// Values that the device's documents leave open are refused with [`Error::Value`]: activations of MX matmuls, keys, values and
/// queries that are no finite numbers, and keys or queries above 2^20. Scaled attention scores of 2^13 and more are beyond the
/// kernels (kernels/attention_decode.md) and not checked.
#[derive(Debug)]
pub struct NeuronBackend<'p> {
    device: Arc<DeviceKernels>,
    options: NeuronOptions<'p>,
    matrices: Store<Matrix>,
    experts: Store<Experts>,
    attentions: Store<(AttentionSpec, Vec<f32>)>,
    caches: Store<Cache>,
    /// Rows of `[x | x]`.
    doubled: Vec<bf16>,
}

#[derive(Debug, Clone, Copy)]
struct Shape {
    scheme: Scheme,
    n: usize,
    k: usize,
    bias: bool,
}

#[derive(Debug)]
struct Matrix {
    shape: Shape,
    kernel: MatrixKernel,
}

#[derive(Debug)]
enum MatrixKernel {
    Mx(MatmulMxKernel),
    /// bf16 weights in two terms.
    Terms(MatmulMxKernel),
    Fp8(MatmulFp8Kernel),
}

#[derive(Debug, Clone, Copy)]
struct ExpertsShape {
    scheme: Scheme,
    experts: usize,
    hidden: usize,
    intermediate: usize,
    swiglu: SwigluSpec,
    inner: Inner,
}

#[derive(Debug)]
struct Experts {
    shape: ExpertsShape,
    kernel: MoeKernel,
}

/// The KV pages of all layers, and the attentions that were run over them.
#[derive(Debug)]
struct Cache {
    config: KvConfig,
    /// The shape that lies on the device.
    compiled: KvShape,
    dtype: Dtype,
    layers: Vec<AppendKernel>,
    /// By layer and attention, made when first needed.
    decode: Vec<((usize, AttentionId), DecodeKernel)>,
    prefill: Vec<((usize, AttentionId), PrefillKernel)>,
    /// One page of host memory, where tokens are sealed before they are moved.
    staging: Option<KvPool>,
}

impl Cache {
    fn layer(&self, layer: usize) -> Result<&AppendKernel> {
        self.layers.get(layer).ok_or_else(|| Error::index("kv pool layer", 0, layer, self.layers.len()))
    }
}

fn refused<T>(what: String, because: &str) -> Result<T> {
    Err(Error::Unsupported { what, because: because.into() })
}

impl<'p> NeuronBackend<'p> {
    /// On these kernels.
    pub fn new(device: &Arc<DeviceKernels>, options: NeuronOptions<'p>) -> Self {
        NeuronBackend {
            device: Arc::clone(device),
            options,
            matrices: Store::default(),
            experts: Store::default(),
            attentions: Store::default(),
            caches: Store::default(),
            doubled: Vec::new(),
        }
    }

    /// Bytes that passed between host and device so far, and calls made.
    pub fn traffic(&self) -> Traffic {
        self.device.runtime().traffic()
    }

    /// The compiled kernels.
    pub fn kernels(&self) -> &DeviceKernels {
        &self.device
    }

    fn matrix_served(&self, Shape { scheme, n, k, bias }: Shape) -> Result<()> {
        let terms = self.options.terms.count();
        match scheme {
            Scheme::Mxfp4 | Scheme::Mxfp8(_) => MatmulMxKernel::served(&self.device, scheme, n, k, bias, terms),
            Scheme::Bf16 => {
                let k = mul("weight terms", k, 2)?;
                MatmulMxKernel::served(&self.device, Scheme::Mxfp8(Fp8::E4M3Fn), n, k, bias, terms)
            }
            Scheme::Nvfp4 => {
                refused(format!("{scheme:?} weights"), "no Trainium instruction takes E4M3 scales of 16 elements")
            }
            _ => match self.options.fp8_activations {
                Some(x) => MatmulFp8Kernel::served(&self.device, scheme, n, k, bias, x),
                None => refused(
                    format!("{scheme:?} weights"),
                    "NeuronOptions::fp8_activations does not say in which scheme their activations will come",
                ),
            },
        }
    }

    fn activations_served(&self, scheme: Scheme, activations: Element) -> Result<()> {
        let (needed, served) = match scheme {
            Scheme::Mxfp4 | Scheme::Mxfp8(_) | Scheme::Bf16 | Scheme::Nvfp4 => {
                ("the kernel takes bf16", activations == Element::Bf16)
            }
            _ => (
                "the kernel takes FP8 of NeuronOptions::fp8_activations",
                matches!(activations, Element::Quantized(x) if Some(x) == self.options.fp8_activations),
            ),
        };
        if served { Ok(()) } else { refused(format!("{activations:?} activations with {scheme:?} weights"), needed) }
    }

    /// The cache that is compiled for one of this shape: its element type, and its pages, which may be more.
    fn cache_served(&self, cache: &KvShape) -> Result<(Dtype, KvShape)> {
        if cache.head_dim_qk != cache.head_dim_vo {
            return refused("keys and values of different head dims".into(), "the device kernels have one head_dim");
        }
        let trn3 = self.device.set().kernels().iter().all(|k| k.target() == Target::Trn3);
        let dtype = match cache.format {
            KvFormat::Bf16 => Dtype::Bfloat16,
            KvFormat::Fp8(Fp8::E4M3Fn) if trn3 => Dtype::Float8E4M3Fn,
            KvFormat::Fp8(Fp8::E4M3Ieee) => Dtype::Float8E4M3,
            KvFormat::Fp8(Fp8::E5M2) => Dtype::Float8E5M2,
            format => {
                return refused(format!("a {format:?} cache"), "attention_decode reads bf16 and the device's FP8");
            }
        };
        Ok((dtype, AppendKernel::served(&self.device, cache, dtype)?))
    }

    fn experts_served(&self, shape: &ExpertsShape, top_k: usize) -> Result<()> {
        let (needed, because) = match self.options.terms {
            ActivationTerms::Two => (Inner::Bf16, "with two terms the kernel keeps bf16"),
            ActivationTerms::One => (Inner::Mxfp8(ScaleRule::Trainium), "with one term the kernel rounds to MXFP8"),
        };
        if shape.inner != needed {
            return refused(format!("experts with {:?} between their matmuls", shape.inner), because);
        }
        let ExpertsShape { scheme, experts, hidden, intermediate, swiglu, .. } = shape;
        let terms = self.options.terms.count();
        MoeKernel::served(&self.device, *scheme, *experts, *hidden, *intermediate, swiglu, terms, top_k)
    }
}

/// `[high | low]` of bf16 weights, `[n, 2 k]`: two MXFP8 terms that add up to each weight.
fn weight_terms(weight: &QuantizedMatrix<'_>) -> Result<QuantizedMatrixBuf> {
    let (n, k) = (weight.n(), weight.k());
    let count = mul("weight terms", n, k)?;
    let mut values = vec![bf16::ZERO; count];
    weight.dequantize_bf16(&mut values)?;
    let mut both = vec![bf16::ZERO; mul("weight terms", count, 2)?];
    for (both, row) in both.chunks_exact_mut((2 * k).max(1)).zip(values.chunks_exact(k.max(1))) {
        let (high, low) = both.split_at_mut(k);
        for ((high, low), w) in high.iter_mut().zip(low).zip(row) {
            // The last four bits of the mantissa are the second term: bf16 has eight significant bits, E4M3 four.
            *high = bf16::from_bits(w.to_bits() & 0xFFF0);
            *low = bf16::from_f32(w.to_f32() - high.to_f32());
        }
    }
    let options = QuantizeOptions { rule: ScaleRule::Trainium, ..QuantizeOptions::default() };
    quantize(MatRef::new(&both, n, 2 * k)?, Scheme::Mxfp8(Fp8::E4M3Fn), &options)
}

impl<'w> Backend<'w> for NeuronBackend<'_> {
    fn name(&self) -> &'static str {
        "neuron"
    }

    fn supports(&self, problem: &Problem) -> Result<()> {
        match *problem {
            Problem::Matmul { scheme, n, k, bias, activations, .. } => {
                self.matrix_served(Shape { scheme, n, k, bias })?;
                self.activations_served(scheme, activations)
            }
            Problem::Moe { scheme, experts, hidden, intermediate, swiglu, inner, top_k, activations, .. } => {
                let shape = ExpertsShape { scheme, experts, hidden, intermediate, swiglu, inner };
                self.experts_served(&shape, top_k)?;
                self.activations_served(scheme, activations)
            }
            Problem::Append { cache, .. } => self.cache_served(&cache).map(|_| ()),
            Problem::Prefill { spec, sinks, cache, queries, tokens, element } => {
                let (dtype, _) = self.cache_served(&cache)?;
                attention_element(element)?;
                PrefillKernel::served(&self.device, &spec, sinks, dtype, queries, tokens)
            }
            Problem::Decode { spec, sinks, cache, tokens, element, .. } => {
                let (dtype, cache) = self.cache_served(&cache)?;
                attention_element(element)?;
                DecodeKernel::served(&self.device, &spec, sinks, &cache, dtype, tokens)
            }
        }
    }

    fn load_matrix(&mut self, weight: &QuantizedMatrix<'w>, bias: &[f32]) -> Result<MatrixId> {
        check_bias(bias, weight.n())?;
        let shape = Shape { scheme: weight.scheme(), n: weight.n(), k: weight.k(), bias: !bias.is_empty() };
        self.matrix_served(shape)?;
        weight.check_finite()?;
        let (device, terms, threads) = (&self.device, self.options.terms.count(), self.options.parallelism);
        let kernel = match (shape.scheme, self.options.fp8_activations) {
            (Scheme::Mxfp4 | Scheme::Mxfp8(_), _) => {
                MatrixKernel::Mx(MatmulMxKernel::new(device, weight, bias, terms, threads)?)
            }
            (Scheme::Bf16, _) => {
                let both = weight_terms(weight)?;
                MatrixKernel::Terms(MatmulMxKernel::new(device, &both.view(), bias, terms, threads)?)
            }
            (_, Some(x)) => MatrixKernel::Fp8(MatmulFp8Kernel::new(device, weight, bias, x, threads)?),
            (scheme, None) => return refused(format!("{scheme:?} weights"), "their activations have no scheme"),
        };
        Ok(self.matrices.add(Matrix { shape, kernel }))
    }

    fn load_experts(&mut self, experts: &ExpertWeights<'w, '_>) -> Result<ExpertsId> {
        experts.check()?;
        let shape = ExpertsShape {
            scheme: experts.gate_up.scheme(),
            experts: experts.gate_up.len(),
            hidden: experts.gate_up.k(),
            intermediate: experts.down.k(),
            swiglu: experts.swiglu,
            inner: experts.inner,
        };
        self.experts_served(&shape, 1)?;
        if experts.gates != GateLayout::Interleaved {
            return refused("gate and up in two halves".into(), "the packer takes interleaved rows");
        }
        for (stack, weights) in [("gate_up", experts.gate_up), ("down", experts.down)] {
            for (e, weight) in weights.iter().enumerate() {
                weight.check_finite().map_err(of_expert(stack, e))?;
            }
        }
        let tensors = ExpertTensors {
            gate_up: experts.gate_up,
            gate_up_bias: experts.gate_up_bias,
            down: experts.down,
            down_bias: experts.down_bias,
        };
        let (terms, threads) = (self.options.terms.count(), self.options.parallelism);
        let kernel = MoeKernel::new(&self.device, &tensors, &experts.swiglu, experts.gates, terms, threads)?;
        Ok(self.experts.add(Experts { shape, kernel }))
    }

    fn load_attention(&mut self, spec: &AttentionSpec, sinks: &[f32]) -> Result<AttentionId> {
        load_attention(&mut self.attentions, spec, sinks)
    }

    fn create_cache(&mut self, config: &KvConfig) -> Result<CacheId> {
        let (dtype, compiled) = self.cache_served(&config.shape)?;
        let mut layers = Vec::new();
        for _ in 0..config.num_layers {
            layers.push(AppendKernel::new(&self.device, &config.shape, dtype)?);
        }
        let (decode, prefill) = (Vec::new(), Vec::new());
        Ok(self.caches.add(Cache { config: *config, compiled, dtype, layers, decode, prefill, staging: None }))
    }

    fn matmul(&mut self, w: MatrixId, x: Activations<'_>, y: Output<'_>, accumulate: bool) -> Result<()> {
        let Matrix { shape, kernel } = self.matrices.get(w)?;
        extent("activations", "k", x.k(), shape.k)?;
        extent("output", "m", y.m(), x.m())?;
        extent("output", "n", y.n(), shape.n)?;
        self.activations_served(shape.scheme, (&x).into())?;
        let mut sink = Sink { y, accumulate };
        let store = |i: usize, row: &mut dyn Iterator<Item = f32>| sink.row(i, row);
        match (kernel, x) {
            (MatrixKernel::Mx(kernel), Activations::Bf16(x)) => kernel.run(x, store),
            (MatrixKernel::Terms(kernel), Activations::Bf16(x)) => {
                self.doubled.clear();
                for i in 0..x.rows() {
                    let row = x.row(i).unwrap_or_default();
                    self.doubled.extend_from_slice(row);
                    self.doubled.extend_from_slice(row);
                }
                kernel.run(MatRef::new(&self.doubled, x.rows(), 2 * shape.k)?, store)
            }
            (MatrixKernel::Fp8(kernel), Activations::Quantized(x)) => kernel.run(x, store),
            (_, x) => refused(format!("{:?} activations", Element::from(&x)), "the matrix was loaded for others"),
        }
    }

    fn moe(&mut self, w: ExpertsId, x: Activations<'_>, ids: &[u32], top_k: usize, y: MatMut<'_, f32>) -> Result<()> {
        let Experts { shape, kernel } = self.experts.get(w)?;
        self.activations_served(shape.scheme, (&x).into())?;
        match x {
            Activations::Bf16(x) => kernel.run(x, ids, top_k, y),
            x => refused(format!("{:?} activations", Element::from(&x)), "the kernel takes bf16"),
        }
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
        let cache = self.caches.get_mut(cache)?;
        cache.layer(layer)?;
        let (shape, tokens) = (cache.config.shape, k.tokens());
        let slots = slots(&shape, table, append_indptr, tokens)?;
        if tokens == 0 {
            return Ok(());
        }
        // Tokens are sealed by the very code that seals them in host memory, in one page there, and moved.
        let staging = match cache.staging.take() {
            Some(pool) if pool.shape().page_size >= tokens => pool,
            _ => {
                let page_size = tokens.checked_next_power_of_two().unwrap_or(tokens);
                let page = KvShape { num_pages: 1, page_size, ..shape };
                all_pages(&KvConfig { shape: page, num_layers: 1, ..cache.config })?
            }
        };
        let staging = cache.staging.insert(staging);
        let page = PageTable::new(staging.shape().page_size, vec![0, 1], vec![0], vec![tokens])?;
        append(staging, 0, &page, &[0, tokens], k, v)?;
        let (sealed, kernel) = (staging.layer(0)?, &cache.layers[layer]);
        let bytes = tokens * kernel.row_bytes();
        let (k, v) = (&sealed.k().codes[..bytes], &sealed.v().codes[..bytes]);
        check_numbers("k", shape.format, k, LARGEST)?;
        check_numbers("v", shape.format, v, f32::MAX)?;
        kernel.run(k, v, &slots)
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
        let (spec, sinks) = self.attentions.get(attention)?;
        let cache = self.caches.get_mut(cache)?;
        cache.config.shape.check_table(table, &[])?;
        let HeadsIn::Bf16(q) = q else { return attention_element((&q).into()) };
        check_queries(&q)?;
        let key = (layer, attention);
        if !cache.prefill.iter().any(|(k, _)| *k == key) {
            let (shape, caches) = (&cache.compiled, cache.layer(layer)?);
            let kernel = PrefillKernel::new(&self.device, spec, sinks, shape, cache.dtype, caches)?;
            cache.prefill.push((key, kernel));
        }
        match cache.prefill.iter().find(|(k, _)| *k == key) {
            Some((_, kernel)) => bf16_output(out, |out| kernel.run(q, indptr, table, out)),
            None => Err(Error::Missing { operand: "a prefill kernel".into(), needed_by: "prefill".into() }),
        }
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
        let (spec, sinks) = self.attentions.get(attention)?;
        let cache = self.caches.get_mut(cache)?;
        cache.config.shape.check_table(table, &[])?;
        let HeadsIn::Bf16(q) = q else { return attention_element((&q).into()) };
        check_queries(&q)?;
        let key = (layer, attention);
        if !cache.decode.iter().any(|(k, _)| *k == key) {
            let (shape, caches) = (&cache.compiled, cache.layer(layer)?);
            let kernel = DecodeKernel::new(&self.device, spec, sinks, shape, cache.dtype, caches)?;
            cache.decode.push((key, kernel));
        }
        match cache.decode.iter().find(|(k, _)| *k == key) {
            Some((_, kernel)) => bf16_output(out, |out| kernel.run(q, table, out)),
            None => Err(Error::Missing { operand: "a decode kernel".into(), needed_by: "decode".into() }),
        }
    }
}

fn attention_element(element: Element) -> Result<()> {
    if element == Element::Bf16 {
        return Ok(());
    }
    refused(format!("attention of {element:?} queries"), "the device kernels take bf16")
}

/// Runs with a bf16 output, or with one that becomes another type afterwards.
fn bf16_output(out: HeadsOut<'_>, run: impl FnOnce(HeadsMut<'_, bf16>) -> Result<()>) -> Result<()> {
    fn widened<T: Real>(mut out: HeadsMut<'_, T>, run: impl FnOnce(HeadsMut<'_, bf16>) -> Result<()>) -> Result<()> {
        let (tokens, heads, dim) = (out.tokens(), out.heads(), out.head_dim());
        let mut half = vec![bf16::ZERO; mul("attention output", mul("attention output", tokens, heads)?, dim)?];
        run(HeadsMut::new(&mut half, tokens, heads, dim)?)?;
        let mut values = half.iter();
        for t in 0..tokens {
            for h in 0..heads {
                for (y, value) in out.head_mut(t, h).unwrap_or_default().iter_mut().zip(&mut values) {
                    *y = rounded(value.to_f32());
                }
            }
        }
        Ok(())
    }
    match out {
        HeadsOut::Bf16(out) => run(out),
        HeadsOut::F32(out) => widened(out, run),
        HeadsOut::F16(out) => widened(out, run),
    }
}

/// Largest magnitude of keys and queries. `attention_decode` hides a key by adding -2^60 to its score and keeps maxima above -2^50,
/// so what is hidden stays so while |q k| is below 2^49: at head_dim 128 that is 2^21 for each. Larger ones in one sequence's page
/// would otherwise show in the results of another that takes the page next.
const LARGEST: f32 = 1048576.0; // 2^20

/// Asks that the codes of keys or values be numbers of at most `most`. What a query does not see is multiplied by zero, so that a
/// NaN in a page would be every sequence's that has the page later.
fn check_numbers(operand: &'static str, format: KvFormat, codes: &[u8], most: f32) -> Result<()> {
    let refused = |v: f32| v.is_nan() || v.abs() > most;
    let found = match format {
        KvFormat::Fp8(element) => {
            let mut values = codes.iter().map(|code| element.values()[usize::from(*code)]);
            values.position(refused).map(|at| (at, element.values()[usize::from(codes[at])]))
        }
        _ => {
            let values = || codes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32());
            values().enumerate().find(|(_, v)| refused(*v))
        }
    };
    found.map_or(Ok(()), |(at, value)| Err(too_large(operand, at, value)))
}

/// Asks the same of queries.
fn check_queries(q: &HeadsRef<'_, bf16>) -> Result<()> {
    for at in 0..q.tokens() * q.heads() {
        let head = q.head(at / q.heads(), at % q.heads()).unwrap_or_default();
        let found = head.iter().position(|v| v.is_nan() || v.to_f32().abs() > LARGEST);
        if let Some(d) = found {
            return Err(too_large("q", at * q.head_dim() + d, head[d].to_f32()));
        }
    }
    Ok(())
}

fn too_large(operand: &'static str, at: usize, value: f32) -> Error {
    let needed = "a finite number that the device's attention can hide (keys and queries: at most 2^20)";
    Error::Value { operand: operand.into(), at, got: value.to_string(), needed }
}

/// Slots of the tokens of an append, in the order of their rows.
fn slots(shape: &KvShape, table: &PageTable, append_indptr: &[usize], tokens: usize) -> Result<Vec<i32>> {
    shape.check_table(table, &[])?;
    check_indptr("append_indptr", append_indptr, tokens)?;
    extent("append_indptr", "batch", append_indptr.len() - 1, table.num_sequences())?;
    let mut slots = Vec::new();
    for (b, rows) in append_indptr.windows(2).enumerate() {
        let (new, len) = (rows[1] - rows[0], table.seq_len(b));
        if new > len {
            let operand = format!("tokens appended to sequence {b}").into();
            return Err(Error::Extent { operand, axis: "tokens", got: new, needed: len });
        }
        for t in len - new..len {
            let page = table.pages(b).get(t / shape.page_size).copied().unwrap_or(u32::MAX) as usize;
            let slot = page.checked_mul(shape.page_size).and_then(|first| first.checked_add(t % shape.page_size));
            let slot = slot.and_then(|slot| i32::try_from(slot).ok());
            slots.push(slot.ok_or(Error::Overflow { operand: "kv cache".into() })?);
        }
    }
    let mut seen = slots.clone();
    seen.sort_unstable();
    if let Some(twice) = seen.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::Value {
            operand: "page table indices".into(),
            at: 0,
            got: format!("slot {} for two tokens", twice[0]),
            needed: "that no two sequences append to one slot",
        });
    }
    Ok(slots)
}

/// Where rows of y go.
struct Sink<'a> {
    y: Output<'a>,
    accumulate: bool,
}

impl Sink<'_> {
    fn row(&mut self, i: usize, values: &mut dyn Iterator<Item = f32>) {
        fn put<T: Real>(row: &mut [T], values: &mut dyn Iterator<Item = f32>, accumulate: bool) {
            for (y, value) in row.iter_mut().zip(values) {
                *y = rounded(if accumulate { value + y.to_f32() } else { value });
            }
        }
        match &mut self.y {
            Output::F32(y) => put(y.row_mut(i).unwrap_or_default(), values, self.accumulate),
            Output::Bf16(y) => put(y.row_mut(i).unwrap_or_default(), values, self.accumulate),
            Output::F16(y) => put(y.row_mut(i).unwrap_or_default(), values, self.accumulate),
        }
    }
}
