//! Splits a call into items, runs them on the caller's threads, writes the results out.
#![forbid(unsafe_code)]

use super::core::{Call, Extents, Item, block_queries};
use super::source::KvSource;
use super::spec::AttentionSpec;
use crate::cpu::{Parallelism, Workspace, for_each_zip};
use crate::error::{Error, Result, extent, length, mul};
use crate::num::Real;
use crate::view::{HeadsMut, HeadsRef};

/// Items in flight for each thread: enough that blocks of unlike cost even out, few enough that their results stay small.
const ITEMS_PER_THREAD: usize = 8;

/// Where attention writes.
#[derive(Debug)]
pub struct AttentionOut<'a, O> {
    /// `[tokens, num_qo_heads, head_dim_vo]`, one row for each query, rounded once to `O`.
    pub out: HeadsMut<'a, O>,
    /// `[tokens, num_qo_heads]`: natural log-sum-exp of the visible scores, without the sink; -inf where a query sees no token.
    pub lse: Option<&'a mut [f32]>,
}

/// Which rows are the queries of which sequence.
#[derive(Debug, Clone, Copy)]
pub(super) enum QueryRows<'a> {
    /// Sequence b has rows `indptr[b]..indptr[b + 1]`.
    Ragged(&'a [usize]),
    /// Sequence b has row b.
    OneEach(usize),
}

impl QueryRows<'_> {
    fn sequences(&self) -> usize {
        match self {
            QueryRows::Ragged(indptr) => indptr.len().saturating_sub(1),
            QueryRows::OneEach(count) => *count,
        }
    }

    fn of(&self, seq: usize) -> (usize, usize) {
        match self {
            QueryRows::Ragged(indptr) => (indptr[seq], indptr[seq + 1]),
            QueryRows::OneEach(_) => (seq, seq + 1),
        }
    }
}

fn items(spec: &AttentionSpec, rows: QueryRows<'_>) -> impl Iterator<Item = Item> {
    let (block, kv_heads) = (block_queries(spec), spec.num_kv_heads);
    (0..rows.sequences()).flat_map(move |seq| {
        let (row, end) = rows.of(seq);
        let of = end - row;
        (0..of).step_by(block).flat_map(move |first| {
            (0..kv_heads).map(move |kv_head| Item { seq, first, queries: block.min(of - first), kv_head, row, of })
        })
    })
}

/// Asks that queries and sinks fit a valid spec.
pub(super) fn check_queries<T>(spec: &AttentionSpec, q: &HeadsRef<'_, T>, sinks: Option<&[f32]>) -> Result<()> {
    spec.validate()?;
    extent("q", "num_qo_heads", q.heads(), spec.num_qo_heads)?;
    extent("q", "head_dim_qk", q.head_dim(), spec.head_dim_qk)?;
    sinks.map_or(Ok(()), |sinks| length("sinks", sinks.len(), spec.num_qo_heads))
}

/// Asks that outputs and log-sum-exps fit the spec and the number of query tokens.
pub(super) fn check_output<O>(spec: &AttentionSpec, tokens: usize, output: &AttentionOut<'_, O>) -> Result<()> {
    extent("attention output", "tokens", output.out.tokens(), tokens)?;
    extent("attention output", "num_qo_heads", output.out.heads(), spec.num_qo_heads)?;
    extent("attention output", "head_dim_vo", output.out.head_dim(), spec.head_dim_vo)?;
    match &output.lse {
        Some(lse) => length("lse", lse.len(), mul("lse", tokens, spec.num_qo_heads)?),
        None => Ok(()),
    }
}

/// Runs a checked call.
pub(super) fn run<T: Real, S: KvSource, O: Real>(
    call: &Call<'_, T, S>,
    parallelism: Parallelism<'_>,
    rows: QueryRows<'_>,
    mut output: AttentionOut<'_, O>,
    workspace: &mut Workspace,
) -> Result<()> {
    let mut items = items(call.spec, rows).peekable();
    if items.peek().is_none() {
        return Ok(());
    }
    let extents = Extents::new(call.spec, call.walk);
    let floats = extents.floats()?;
    let wave = match parallelism.threads() {
        1 => 1,
        // No more slots than items: blocks of all sequences for all kv heads.
        threads => threads.saturating_mul(ITEMS_PER_THREAD).min(call.q.tokens().saturating_mul(call.spec.num_kv_heads)),
    };
    let total = floats.checked_mul(wave).ok_or(Error::Overflow { operand: "attention scratch".into() })?;
    let (memory, words) = workspace.take(total, wave * Item::WORDS);
    while items.peek().is_some() {
        let mut used = 0;
        for (slot, item) in words.chunks_exact_mut(Item::WORDS).zip(&mut items) {
            slot.copy_from_slice(&item.to_words());
            used += 1;
        }
        let words = &mut words[..used * Item::WORDS];
        let memory = &mut memory[..used * floats];
        for_each_zip(parallelism, (memory, floats), (words, Item::WORDS), |_, memory, words| {
            if let (Some(item), Some(mut scratch)) = (Item::from_words(words), extents.split(memory)) {
                call.attend(&item, &extents, &mut scratch);
            }
        });
        for (memory, words) in memory.chunks_exact_mut(floats).zip(words.chunks_exact(Item::WORDS)) {
            if let (Some(item), Some(scratch)) = (Item::from_words(words), extents.split(memory)) {
                write(call.spec, &item, scratch.acc.chunks_exact(extents.width()).zip(&*scratch.lse), &mut output);
            }
        }
    }
    Ok(())
}

/// Writes an item's rows to their places.
fn write<'a, O: Real>(
    spec: &AttentionSpec,
    item: &Item,
    rows: impl Iterator<Item = (&'a [f32], &'a f32)>,
    output: &mut AttentionOut<'_, O>,
) {
    let group = spec.group_size();
    for (r, (acc, &lse)) in rows.take(item.queries * group).enumerate() {
        let (token, head) = (item.row + item.first + r / group, item.kv_head * group + r % group);
        for (y, &x) in output.out.head_mut(token, head).into_iter().flatten().zip(acc) {
            *y = O::from_f32(x);
        }
        if let Some(to) = output.lse.as_deref_mut().and_then(|all| all.get_mut(token * spec.num_qo_heads + head)) {
            *to = lse;
        }
    }
}
