//! Prefill: many queries a sequence, over contiguous K and V or over a paged cache.
#![forbid(unsafe_code)]

use super::core::Call;
use super::driver::{AttentionOut, QueryRows, check_output, check_queries, run};
use super::source::{KvSource, PagedSource, RaggedKv};
use super::spec::{AttentionSpec, Walk};
use crate::cpu::{Cpu, Workspace};
use crate::error::{Result, extent};
use crate::kv::{PageTable, PagedKv, check_indptr};
use crate::num::Real;
use crate::view::HeadsRef;

/// Queries of a ragged batch.
#[derive(Debug, Clone, Copy)]
pub struct Queries<'a, T> {
    /// `[tokens, num_qo_heads, head_dim_qk]`
    pub q: HeadsRef<'a, T>,
    /// `[batch + 1]` offsets of each sequence's queries, from 0 to `tokens`.
    pub indptr: &'a [usize],
    /// `[num_qo_heads]`: one learned logit for each head that joins the softmax's denominator: not scaled, not capped, without a
    /// value. -inf is no sink; NaN makes the head's outputs NaN.
    pub sinks: Option<&'a [f32]>,
}

impl Cpu<'_> {
    /// Attention of a ragged batch over contiguous K and V. See [`AttentionSpec`] for what is computed.
    ///
    /// Queries are the last tokens of their sequence (bottom-right alignment). Softmax weights are rounded to bf16 for the product
    /// with V if K and V are bf16. `workspace` grows to what the call needs; a serial call that finds it large enough allocates
    /// nothing.
    ///
    /// # Errors
    /// [`Error::Empty`](crate::Error::Empty), [`Error::Multiple`](crate::Error::Multiple) and
    /// [`Error::Value`](crate::Error::Value) for the spec (see [`AttentionSpec::validate`]) and for a batch of no sequences;
    /// [`Error::Extent`](crate::Error::Extent) or [`Error::Length`](crate::Error::Length) for an operand that does not fit;
    /// [`Error::Value`](crate::Error::Value) for an `indptr` that is not one. Outputs are untouched then.
    pub fn prefill<T: Real, K: Real, O: Real>(
        &self,
        spec: &AttentionSpec,
        queries: Queries<'_, T>,
        kv: RaggedKv<'_, K>,
        output: AttentionOut<'_, O>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        prefill_walk(*self, Walk::DEFAULT, spec, queries, kv, output, workspace)
    }

    /// Attention of a ragged batch over a paged cache that already holds the queries' own tokens: prefill, one chunk of it, or the
    /// verification of drafted tokens. Sequence b has the tokens of the table's sequence b.
    ///
    /// # Errors
    /// As [`Cpu::prefill`]; [`Error::Index`](crate::Error::Index) or [`Error::Value`](crate::Error::Value) for a page outside the
    /// cache or a free one.
    pub fn prefill_paged<T: Real, O: Real>(
        &self,
        spec: &AttentionSpec,
        queries: Queries<'_, T>,
        kv: &PagedKv<'_>,
        table: &PageTable,
        output: AttentionOut<'_, O>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        prefill_paged_walk(*self, Walk::DEFAULT, spec, queries, (kv, table), output, workspace)
    }
}

/// [`Cpu::prefill`] with tiles and sections of any length.
pub(super) fn prefill_walk<T: Real, K: Real, O: Real>(
    cpu: Cpu<'_>,
    walk: Walk,
    spec: &AttentionSpec,
    queries: Queries<'_, T>,
    kv: RaggedKv<'_, K>,
    output: AttentionOut<'_, O>,
    workspace: &mut Workspace,
) -> Result<()> {
    check_queries(spec, &queries.q, queries.sinks)?;
    check_output(spec, queries.q.tokens(), &output)?;
    check_ragged(spec, &kv)?;
    batch(cpu, walk, spec, queries, &kv, kv.indptr.len() - 1, output, workspace)
}

/// [`Cpu::prefill_paged`] with tiles and sections of any length.
pub(super) fn prefill_paged_walk<T: Real, O: Real>(
    cpu: Cpu<'_>,
    walk: Walk,
    spec: &AttentionSpec,
    queries: Queries<'_, T>,
    (kv, table): (&PagedKv<'_>, &PageTable),
    output: AttentionOut<'_, O>,
    workspace: &mut Workspace,
) -> Result<()> {
    check_queries(spec, &queries.q, queries.sinks)?;
    check_output(spec, queries.q.tokens(), &output)?;
    check_cache(spec, kv)?;
    kv.check_table(table)?;
    let source = PagedSource { kv, table };
    batch(cpu, walk, spec, queries, &source, table.num_sequences(), output, workspace)
}

#[allow(clippy::too_many_arguments)] // the operands of attention, each once
fn batch<T: Real, S: KvSource, O: Real>(
    cpu: Cpu<'_>,
    walk: Walk,
    spec: &AttentionSpec,
    queries: Queries<'_, T>,
    source: &S,
    sequences: usize,
    output: AttentionOut<'_, O>,
    workspace: &mut Workspace,
) -> Result<()> {
    check_indptr("qo_indptr", queries.indptr, queries.q.tokens())?;
    extent("qo_indptr", "batch", queries.indptr.len() - 1, sequences)?;
    let sinks = queries.sinks.unwrap_or_default();
    let call = Call { tier: cpu.tier(), spec, walk, q: queries.q, source, sinks };
    run(&call, cpu.parallelism(), QueryRows::Ragged(queries.indptr), output, workspace)
}

/// Asks that contiguous K and V have the spec's heads and head dims and agree.
pub(super) fn check_ragged<K: Real>(spec: &AttentionSpec, kv: &RaggedKv<'_, K>) -> Result<()> {
    extent("k", "num_kv_heads", kv.k.heads(), spec.num_kv_heads)?;
    extent("k", "head_dim_qk", kv.k.head_dim(), spec.head_dim_qk)?;
    extent("v", "num_kv_heads", kv.v.heads(), spec.num_kv_heads)?;
    extent("v", "head_dim_vo", kv.v.head_dim(), spec.head_dim_vo)?;
    extent("v", "tokens", kv.v.tokens(), kv.k.tokens())?;
    check_indptr("kv_indptr", kv.indptr, kv.k.tokens())
}

/// Asks that a paged cache have the spec's heads and head dims.
pub(super) fn check_cache(spec: &AttentionSpec, kv: &PagedKv<'_>) -> Result<()> {
    let shape = kv.shape();
    extent("kv cache", "num_kv_heads", shape.num_kv_heads, spec.num_kv_heads)?;
    extent("kv cache", "head_dim_qk", shape.head_dim_qk, spec.head_dim_qk)?;
    extent("kv cache", "head_dim_vo", shape.head_dim_vo, spec.head_dim_vo)
}
