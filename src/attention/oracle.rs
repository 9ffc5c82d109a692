//! The definition in f64, and how far a kernel may be from it.
//!
//! Slow and plain: one query row at a time, every score kept, softmax in two passes, exact values of every code.
#![forbid(unsafe_code)]

use super::bound::Row;
use super::driver::check_queries;
use super::prefill::{Queries, check_cache, check_ragged};
use super::source::{KvSource, PagedSource, RaggedKv};
use super::spec::AttentionSpec;
use crate::error::{Result, extent, mul, reserve, zeros};
use crate::kv::{KvFormat, PageTable, PagedKv, check_indptr, nvfp4_scale};
use crate::num::{E8M0, F4E2M1x2, Real};
use half::{bf16, f16};
use std::ops::Range;

/// Results of the oracle: exact but for f64, with the error a kernel of this crate may have.
#[derive(Debug, Clone, PartialEq)]
pub struct Reference {
    /// `[tokens, num_qo_heads, head_dim_vo]`
    pub out: Vec<f64>,
    /// `[tokens, num_qo_heads]` natural log-sum-exps without the sink; -inf where nothing is visible.
    pub lse: Vec<f64>,
    /// Largest error of each output before it is rounded to its type, as derived in docs/numerics.md.
    pub out_bound: Vec<f64>,
    /// Largest error of each log-sum-exp, its rounding to f32 included.
    pub lse_bound: Vec<f64>,
}

impl Reference {
    /// Largest error of output `i` once rounded to `O`; 0 outside the extents.
    pub fn tolerance<O: Real>(&self, i: usize) -> f64 {
        let (Some(out), Some(bound)) = (self.out.get(i), self.out_bound.get(i)) else { return 0.0 };
        let (relative, absolute) = match O::NAME {
            // Half an ulp: relative where normal, half the smallest subnormal below.
            "bf16" => (2f64.powi(-8), 2f64.powi(-134)),
            "f16" => (2f64.powi(-11), 2f64.powi(-25)),
            // Already f32.
            _ => (0.0, 0.0),
        };
        bound + relative * (out.abs() + bound) + absolute
    }
}

/// Attention over contiguous K and V; see [`Cpu::prefill`](crate::Cpu::prefill).
///
/// # Errors
/// As [`Cpu::prefill`](crate::Cpu::prefill); [`Error::Overflow`](crate::Error::Overflow) if results do not fit in memory.
pub fn prefill<T: Real, K: Real>(
    spec: &AttentionSpec,
    queries: Queries<'_, T>,
    kv: RaggedKv<'_, K>,
) -> Result<Reference> {
    check_queries(spec, &queries.q, queries.sinks)?;
    check_ragged(spec, &kv)?;
    let head = |seq: usize, head: usize| {
        let tokens = kv.indptr[seq]..kv.indptr[seq + 1];
        let rows = |x: &crate::HeadsRef<'_, K>| {
            let row = |t| x.head(t, head).unwrap_or_default().iter().map(|x| f64::from(x.to_f32())).collect();
            collect(tokens.clone(), row)
        };
        Ok(Head { k: rows(&kv.k)?, v: rows(&kv.v)? })
    };
    batch(spec, queries, &kv, kv.indptr.len() - 1, head)
}

/// Attention over a paged cache; see [`Cpu::prefill_paged`](crate::Cpu::prefill_paged). Decode is the case of one query a sequence.
///
/// # Errors
/// As [`Cpu::prefill_paged`](crate::Cpu::prefill_paged); [`Error::Overflow`](crate::Error::Overflow) if results, or a sequence's
/// decoded keys and values, do not fit in memory.
pub fn paged<T: Real>(
    spec: &AttentionSpec,
    queries: Queries<'_, T>,
    kv: &PagedKv<'_>,
    table: &PageTable,
) -> Result<Reference> {
    check_queries(spec, &queries.q, queries.sinks)?;
    check_cache(spec, kv)?;
    kv.check_table(table)?;
    let shape = *kv.shape();
    let source = PagedSource { kv, table };
    let head = |seq: usize, head: usize| {
        let scales = source.scales(head);
        let rows = |plane, dim, scale: f32| {
            let row = |t: usize| {
                let at = (table.pages(seq)[t / shape.page_size] as usize, t % shape.page_size, head);
                let (codes, block_scales) = kv.vector(plane, dim, at);
                (0..dim).map(|d| element(shape.format, codes, block_scales, d) * f64::from(scale)).collect()
            };
            collect(0..source.len(seq), row)
        };
        Ok(Head { k: rows(kv.k(), shape.head_dim_qk, scales.0)?, v: rows(kv.v(), shape.head_dim_vo, scales.1)? })
    };
    batch(spec, queries, &source, table.num_sequences(), head)
}

/// The exact value of element `d` of a head vector, without the f32 scale.
fn element(format: KvFormat, codes: &[u8], block_scales: &[u8], d: usize) -> f64 {
    let block_scale = || block_scales[d / format.block()];
    let nibble = || F4E2M1x2::from_bits(codes[d / 2]).to_f32()[d % 2];
    let value = match format {
        KvFormat::F32 => f32::from_le_bytes([codes[4 * d], codes[4 * d + 1], codes[4 * d + 2], codes[4 * d + 3]]),
        KvFormat::Bf16 => bf16::from_le_bytes([codes[2 * d], codes[2 * d + 1]]).to_f32(),
        KvFormat::F16 => f16::from_le_bytes([codes[2 * d], codes[2 * d + 1]]).to_f32(),
        KvFormat::Fp8(element) | KvFormat::Mxfp8(element) => element.values()[codes[d] as usize],
        KvFormat::Mxfp4 | KvFormat::Nvfp4 => nibble(),
    };
    let scale = match format {
        KvFormat::Mxfp8(_) | KvFormat::Mxfp4 => E8M0::from_bits(block_scale()).to_f32(),
        KvFormat::Nvfp4 => nvfp4_scale(block_scale()),
        _ => 1.0,
    };
    f64::from(value) * f64::from(scale)
}

/// Exact keys and values of one kv head of one sequence: `[len][head_dim]`.
struct Head {
    k: Vec<Vec<f64>>,
    v: Vec<Vec<f64>>,
}

/// The vectors of all tokens. A table may name a page often, so no memory of the caller's bounds their number.
fn collect(tokens: Range<usize>, row: impl Fn(usize) -> Vec<f64>) -> Result<Vec<Vec<f64>>> {
    let mut rows = Vec::new();
    reserve("keys and values", &mut rows, tokens.len())?;
    rows.extend(tokens.map(row));
    Ok(rows)
}

fn batch<T: Real, S: KvSource>(
    spec: &AttentionSpec,
    queries: Queries<'_, T>,
    source: &S,
    sequences: usize,
    head: impl Fn(usize, usize) -> Result<Head>,
) -> Result<Reference> {
    let Queries { q, indptr, sinks } = queries;
    check_indptr("qo_indptr", indptr, q.tokens())?;
    extent("qo_indptr", "batch", indptr.len() - 1, sequences)?;
    let rows = mul("q", q.tokens(), spec.num_qo_heads)?;
    let outs = mul("attention output", rows, spec.head_dim_vo)?;
    let (values, lses) = (|| zeros("attention output", outs), || zeros("lse", rows));
    let mut all = Reference { out: values()?, lse: lses()?, out_bound: values()?, lse_bound: lses()? };
    for seq in 0..sequences {
        let len = source.len(seq);
        if indptr[seq] == indptr[seq + 1] {
            // Without a query no memory bounds the number of heads: do not walk them.
            continue;
        }
        for kv_head in 0..spec.num_kv_heads {
            let Head { k, v } = head(seq, kv_head)?;
            for token in indptr[seq]..indptr[seq + 1] {
                let position = len as i64 - indptr[seq + 1] as i64 + token as i64;
                let (lo, hi) = spec.visible(position, len);
                for h in kv_head * spec.group_size()..(kv_head + 1) * spec.group_size() {
                    let q = q.head(token, h).unwrap_or_default();
                    let row = Row {
                        spec,
                        q: q.iter().map(|x| f64::from(x.to_f32())).collect(),
                        k: &k[lo..hi],
                        v: &v[lo..hi],
                        first: lo,
                        sink: sinks.and_then(|s| s.get(h)).map(|s| f64::from(*s)),
                        scales: source.scales(kv_head),
                        rounds_weights: source.rounds_weights(),
                    };
                    let at = token * spec.num_qo_heads + h;
                    row.attend(&mut all, at);
                }
            }
        }
    }
    Ok(all)
}
