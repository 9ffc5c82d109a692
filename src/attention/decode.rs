//! Decode: one query a sequence over a paged cache. Planned once for a batch layout, run for each layer.
#![forbid(unsafe_code)]

use super::core::Call;
use super::driver::{AttentionOut, QueryRows, check_output, check_queries, run};
use super::prefill::check_cache;
use super::source::PagedSource;
use super::spec::{AttentionSpec, Walk};
use crate::cpu::{Cpu, Workspace};
use crate::error::{Result, extent};
use crate::kv::{KvShape, PageTable, PagedKv};
use crate::num::Real;
use crate::view::HeadsRef;

/// A decode step's batch layout, checked: one spec, one page table, caches of one shape.
#[derive(Debug, Clone, Copy)]
pub struct DecodePlan<'a> {
    spec: AttentionSpec,
    table: &'a PageTable,
    shape: KvShape,
}

/// Checks a batch layout for [`Cpu::decode`]. `kv` is any layer's cache.
///
/// # Errors
/// [`Error::Empty`](crate::Error::Empty), [`Error::Multiple`](crate::Error::Multiple), [`Error::Value`](crate::Error::Value) for
/// the spec; [`Error::Extent`](crate::Error::Extent) for a cache that does not fit it or another page size;
/// [`Error::Empty`](crate::Error::Empty) for a batch of no sequences; [`Error::Index`](crate::Error::Index) or
/// [`Error::Value`](crate::Error::Value) for a page outside the cache or a free one.
pub fn plan_decode<'a>(spec: &AttentionSpec, kv: &PagedKv<'_>, table: &'a PageTable) -> Result<DecodePlan<'a>> {
    spec.validate()?;
    check_cache(spec, kv)?;
    kv.check_table(table)?;
    Ok(DecodePlan { spec: *spec, table, shape: *kv.shape() })
}

impl DecodePlan<'_> {
    /// Sequences, so rows of `q`.
    pub fn num_sequences(&self) -> usize {
        self.table.num_sequences()
    }

    /// What is computed.
    pub fn spec(&self) -> &AttentionSpec {
        &self.spec
    }
}

impl Cpu<'_> {
    /// One decode step of one layer: row b of `q` is the last token of sequence b, whose keys and values are in the cache already.
    ///
    /// `q`: `[num_sequences, num_qo_heads, head_dim_qk]`; `sinks`: `[num_qo_heads]`, as in [`Queries`](super::Queries). A sequence
    /// without tokens gives 0. Same bits as [`Cpu::prefill_paged`] gives that token.
    ///
    /// # Errors
    /// [`Error::Extent`](crate::Error::Extent) or [`Error::Length`](crate::Error::Length) for an operand that does not fit the plan;
    /// [`Error::Unsupported`](crate::Error::Unsupported) for a cache of another format; [`Error::Value`](crate::Error::Value) for a
    /// page freed since the plan was made. Outputs are untouched then.
    pub fn decode<T: Real, O: Real>(
        &self,
        plan: &DecodePlan<'_>,
        q: HeadsRef<'_, T>,
        kv: &PagedKv<'_>,
        sinks: Option<&[f32]>,
        output: AttentionOut<'_, O>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        decode_walk(*self, Walk::DEFAULT, plan, q, kv, sinks, output, workspace)
    }
}

/// [`Cpu::decode`] with tiles and sections of any length.
#[allow(clippy::too_many_arguments)] // the operands of attention, each once
pub(super) fn decode_walk<T: Real, O: Real>(
    cpu: Cpu<'_>,
    walk: Walk,
    plan: &DecodePlan<'_>,
    q: HeadsRef<'_, T>,
    kv: &PagedKv<'_>,
    sinks: Option<&[f32]>,
    output: AttentionOut<'_, O>,
    workspace: &mut Workspace,
) -> Result<()> {
    let DecodePlan { spec, table, shape } = plan;
    check_queries(spec, &q, sinks)?;
    check_output(spec, q.tokens(), &output)?;
    kv.shape().expect(shape)?;
    // A page may have been freed since.
    kv.check_table(table)?;
    extent("q", "tokens", q.tokens(), table.num_sequences())?;
    let source = PagedSource { kv, table };
    let call = Call { tier: cpu.tier(), spec, walk, q, source: &source, sinks: sinks.unwrap_or_default() };
    run(&call, cpu.parallelism(), QueryRows::OneEach(table.num_sequences()), output, workspace)
}
