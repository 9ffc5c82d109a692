//! One trait over host slices for whoever computes: the [oracle](OracleBackend), the [CPU](CpuBackend), a device.
//!
//! A runtime loads weights once, keeps the ids it gets, and lends slices for each call. A backend owns what it made of the weights
//! and the KV pages; which pages a sequence has is the runtime's business ([`PageAllocator`](crate::kv::PageAllocator)). A call
//! that a backend does not serve is refused with the reason, before anything is computed: nothing falls back to another device or
//! another precision. [`Backend::supports`] gives the same answer ahead of time.
#![forbid(unsafe_code)]

mod cpu;
mod heads;
#[cfg(feature = "neuron")]
mod neuron;
mod oracle;
mod store;

pub use cpu::CpuBackend;
pub use heads::{HeadsIn, HeadsOut};
#[cfg(feature = "neuron")]
pub use neuron::{ActivationTerms, NeuronBackend, NeuronOptions};
pub use oracle::OracleBackend;
pub use store::{AttentionId, CacheId, ExpertsId, MatrixId};

use crate::attention::AttentionSpec;
use crate::error::{Error, Result, extent, length, mul};
use crate::kv::{KvConfig, KvShape, PageTable};
use crate::layer::{GateLayout, SwigluSpec};
use crate::matmul::{Activations, Output};
use crate::quant::{QuantizedExperts, QuantizedMatrix, ScaleRule, Scheme};
use crate::view::MatMut;

/// What the product of gate and up is rounded to on its way into the down projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inner {
    /// Not at all.
    F32,
    /// To bf16.
    Bf16,
    /// To bf16, and then to MXFP8 E4M3FN in groups of 32.
    Mxfp8(ScaleRule),
}

/// A layer's experts: `down(swiglu(gate_up(x)))` of each.
#[derive(Debug, Clone, Copy)]
pub struct ExpertWeights<'w, 'a> {
    /// `[2 i, h]` for each expert, its rows in the order of `gates`.
    pub gate_up: &'a QuantizedExperts<'w>,
    /// `[experts, 2 i]`.
    pub gate_up_bias: &'a [f32],
    /// `[h, i]` for each expert.
    pub down: &'a QuantizedExperts<'w>,
    /// `[experts, h]`.
    pub down_bias: &'a [f32],
    /// The activation between them.
    pub swiglu: SwigluSpec,
    /// Where gate and up lie in `gate_up`.
    pub gates: GateLayout,
    /// What enters the down projection.
    pub inner: Inner,
}

impl ExpertWeights<'_, '_> {
    /// Asks that the two stacks belong together.
    fn check(&self) -> Result<()> {
        let (up, down) = (self.gate_up, self.down);
        extent("down experts", "expert", down.len(), up.len())?;
        extent("down experts", "n", down.n(), up.k())?;
        extent("gate_up experts", "n", up.n(), mul("gate_up experts", down.k(), 2)?)?;
        if up.scheme() != down.scheme() {
            return Err(Error::Unsupported {
                what: format!("experts with {:?} gate_up and {:?} down", up.scheme(), down.scheme()),
                because: "both stacks of a layer share one scheme".into(),
            });
        }
        length("gate_up bias", self.gate_up_bias.len(), mul("gate_up bias", up.len(), up.n())?)?;
        length("down bias", self.down_bias.len(), mul("down bias", down.len(), down.n())?)
    }
}

/// Says in which expert of which stack a weight was refused.
fn of_expert(stack: &'static str, expert: usize) -> impl Fn(Error) -> Error {
    move |e| match e {
        Error::Value { operand, at, got, needed } => {
            Error::Value { operand: format!("{stack} of expert {expert}, {operand}").into(), at, got, needed }
        }
        other => other,
    }
}

/// Asks that a bias be there for each channel, or not at all.
fn check_bias(bias: &[f32], n: usize) -> Result<()> {
    if bias.is_empty() { Ok(()) } else { length("bias", bias.len(), n) }
}

/// Element types of activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// f32.
    F32,
    /// bf16.
    Bf16,
    /// f16.
    F16,
    /// Codes and scales.
    Quantized(Scheme),
}

impl From<&Activations<'_>> for Element {
    fn from(x: &Activations<'_>) -> Self {
        match x {
            Activations::F32(_) => Element::F32,
            Activations::Bf16(_) => Element::Bf16,
            Activations::F16(_) => Element::F16,
            Activations::Quantized(x) => Element::Quantized(x.scheme()),
        }
    }
}

impl From<&HeadsIn<'_>> for Element {
    fn from(x: &HeadsIn<'_>) -> Self {
        match x {
            HeadsIn::F32(_) => Element::F32,
            HeadsIn::Bf16(_) => Element::Bf16,
            HeadsIn::F16(_) => Element::F16,
        }
    }
}

/// A call, by its shape: what [`Backend::supports`] judges.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Problem {
    /// [`Backend::matmul`].
    Matmul {
        /// Of the weights `[n, k]`.
        scheme: Scheme,
        /// Output channels.
        n: usize,
        /// Contraction.
        k: usize,
        /// Rows of x.
        m: usize,
        /// Whether it has a bias.
        bias: bool,
        /// Of x.
        activations: Element,
    },
    /// [`Backend::moe`].
    Moe {
        /// Of both weights.
        scheme: Scheme,
        /// Experts.
        experts: usize,
        /// Hidden size h.
        hidden: usize,
        /// Width i of an expert.
        intermediate: usize,
        /// The activation between the two products.
        swiglu: SwigluSpec,
        /// What enters the down projection.
        inner: Inner,
        /// Rows of x.
        tokens: usize,
        /// Experts of a token.
        top_k: usize,
        /// Of x.
        activations: Element,
    },
    /// [`Backend::append`].
    Append {
        /// The cache.
        cache: KvShape,
        /// Tokens appended.
        tokens: usize,
        /// Of k and v.
        element: Element,
    },
    /// [`Backend::prefill`].
    Prefill {
        /// The attention.
        spec: AttentionSpec,
        /// Whether it has sinks.
        sinks: bool,
        /// The cache.
        cache: KvShape,
        /// Most queries of a sequence.
        queries: usize,
        /// Most tokens of a sequence, its queries' own included.
        tokens: usize,
        /// Of the queries.
        element: Element,
    },
    /// [`Backend::decode`].
    Decode {
        /// The attention.
        spec: AttentionSpec,
        /// Whether it has sinks.
        sinks: bool,
        /// The cache.
        cache: KvShape,
        /// Sequences.
        sequences: usize,
        /// Most tokens of a sequence.
        tokens: usize,
        /// Of the queries.
        element: Element,
    },
}

/// Who computes. Object safe; `'w` is how long the weights lent to it live (a backend may keep borrowing them).
///
/// Ids belong to the backend that gave them; an id it does not have is [`Error::Index`].
pub trait Backend<'w> {
    /// A word for messages: `oracle`, `cpu`, `neuron`.
    fn name(&self) -> &'static str;

    /// Whether a call of this shape would be served.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the reason, the same that the call itself would give.
    fn supports(&self, problem: &Problem) -> Result<()>;

    /// Takes a matrix `[n, k]` and its bias (`[n]`, or empty for none).
    ///
    /// # Errors
    /// [`Error::Length`] for the bias; [`Error::Value`] for a weight that is not a number
    /// (damage in a checkpoint would make NaN of every token); [`Error::Unsupported`].
    fn load_matrix(&mut self, weight: &QuantizedMatrix<'w>, bias: &[f32]) -> Result<MatrixId>;

    /// Takes the experts of a layer.
    ///
    /// # Errors
    /// As [`Backend::load_matrix`]; [`Error::Extent`] if the two stacks do not belong together.
    fn load_experts(&mut self, experts: &ExpertWeights<'w, '_>) -> Result<ExpertsId>;

    /// Takes an attention: its spec and its `sinks` (`[num_qo_heads]`, or empty for none).
    ///
    /// # Errors
    /// As [`AttentionSpec::validate`]; [`Error::Length`] for the sinks.
    fn load_attention(&mut self, spec: &AttentionSpec, sinks: &[f32]) -> Result<AttentionId>;

    /// Makes the KV pages of all layers. f32 scales are 1.
    ///
    /// # Errors
    /// As [`KvPool::new`](crate::kv::KvPool::new); [`Error::Unsupported`].
    fn create_cache(&mut self, config: &KvConfig) -> Result<CacheId>;

    /// `y = x w^T + bias`, added to what y holds if `accumulate`. x: `[m, k]`, y: `[m, n]`.
    ///
    /// # Errors
    /// As [`Cpu::matmul`](crate::Cpu::matmul); [`Error::Unsupported`]. y is untouched then.
    fn matmul(&mut self, w: MatrixId, x: Activations<'_>, y: Output<'_>, accumulate: bool) -> Result<()>;

    /// The grouped matmuls of a mixture of experts: slot s = `token * top_k + j` is row `s` of y `[tokens * top_k, h]`, expert
    /// `ids[s]`'s `down(swiglu(gate_up(x)))` of row `token` of x `[tokens, h]`. Not yet weighted
    /// ([`combine_experts`](crate::layer::combine_experts)).
    ///
    /// # Errors
    /// As [`Cpu::gather_matmul`](crate::Cpu::gather_matmul); [`Error::Unsupported`]. y is untouched then.
    fn moe(&mut self, w: ExpertsId, x: Activations<'_>, ids: &[u32], top_k: usize, y: MatMut<'_, f32>) -> Result<()>;

    /// Appends keys and values of new tokens, as [`append_kv`](crate::kv::append_kv): `table` is the state after it.
    ///
    /// # Errors
    /// As [`append_kv`](crate::kv::append_kv); [`Error::Unsupported`].
    fn append(
        &mut self,
        cache: CacheId,
        layer: usize,
        table: &PageTable,
        append_indptr: &[usize],
        k: HeadsIn<'_>,
        v: HeadsIn<'_>,
    ) -> Result<()>;

    /// Attention of a ragged batch over a cache that already holds the queries' own tokens; see
    /// [`Cpu::prefill_paged`](crate::Cpu::prefill_paged).
    ///
    /// # Errors
    /// As [`Cpu::prefill_paged`](crate::Cpu::prefill_paged); [`Error::Unsupported`].
    #[allow(clippy::too_many_arguments)] // the operands of attention, each once
    fn prefill(
        &mut self,
        attention: AttentionId,
        cache: CacheId,
        layer: usize,
        table: &PageTable,
        q: HeadsIn<'_>,
        indptr: &[usize],
        out: HeadsOut<'_>,
    ) -> Result<()>;

    /// One decode step of one layer: row b of q is the last token of sequence b; see [`Cpu::decode`](crate::Cpu::decode).
    ///
    /// # Errors
    /// As [`Cpu::decode`](crate::Cpu::decode); [`Error::Unsupported`].
    fn decode(
        &mut self,
        attention: AttentionId,
        cache: CacheId,
        layer: usize,
        table: &PageTable,
        q: HeadsIn<'_>,
        out: HeadsOut<'_>,
    ) -> Result<()>;
}
