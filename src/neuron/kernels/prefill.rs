//! `attention_prefill`: a chunk of queries whose keys are in paged caches that stay on the device.
#![forbid(unsafe_code)]

use super::decode::{check_spec, same_mask, store, wanted};
use super::device::DeviceKernels;
use super::family::Family;
use super::{AppendKernel, CompiledKernel, bytes};
use crate::attention::AttentionSpec;
use crate::error::{Error, Result, extent};
use crate::kv::{KvShape, PageTable};
use crate::neuron::Tensor;
use crate::trainium::Dtype;
use crate::view::{HeadsMut, HeadsRef};
use half::bf16;
use std::sync::Arc;

/// Prefill attention of one layer through `kernels/attention_prefill.py`.
///
/// The kernel reads a chunk's keys and those before it from contiguous memory. They are copied there from the pages, on the
/// device: nothing but queries and outputs passes the host.
#[derive(Debug)]
pub struct PrefillKernel {
    /// Chunks with nothing before them.
    first: Option<Family>,
    /// Chunks with prior keys.
    later: Option<Family>,
    spec: AttentionSpec,
    cache: KvShape,
    /// Slots for prior keys.
    prior: usize,
    k: Arc<Tensor>,
    v: Arc<Tensor>,
    /// Bytes of a token's keys.
    row: usize,
}

/// Kernels without and with prior keys.
type Compiled<'d> = [Vec<&'d CompiledKernel>; 2];

impl PrefillKernel {
    fn compiled<'d>(device: &'d DeviceKernels, spec: &AttentionSpec, sinks: bool) -> Result<Compiled<'d>> {
        check_spec(spec)?;
        let family = |prior: bool| {
            let wanted = format!("{}{}", wanted(spec, sinks), if prior { ", prior keys" } else { "" });
            device.set().family("attention_prefill", "SQ", &wanted, |kernel| {
                kernel.dim("B") == 1
                    && kernel.dim("HQ") == spec.num_qo_heads
                    && kernel.dim("HKV") == spec.num_kv_heads
                    && kernel.dim("D") == spec.head_dim_qk
                    && kernel.truth("causal")
                    && same_mask(kernel, spec, sinks)
                    && kernel.has("k_prior") == prior
            })
        };
        match (family(false), family(true)) {
            (Err(e), Err(_)) => Err(e),
            (first, later) => {
                let later = later.unwrap_or_default();
                // One family has one room for prior keys: the largest there is.
                let most = later.iter().map(|k| k.dim("SP")).max().unwrap_or(0);
                let later = later.into_iter().filter(|k| k.dim("SP") == most).collect();
                Ok([first.unwrap_or_default(), later])
            }
        }
    }

    /// Asks whether such an attention is compiled for `queries` at the end of `tokens`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with what is compiled.
    pub fn served(
        device: &DeviceKernels,
        spec: &AttentionSpec,
        sinks: bool,
        dtype: Dtype,
        queries: usize,
        tokens: usize,
    ) -> Result<()> {
        check_cache(dtype)?;
        let [first, later] = Self::compiled(device, spec, sinks)?;
        let largest = |kernels: &[&CompiledKernel]| kernels.last().map_or(0, |k| k.dim("SQ"));
        let prior = later.first().map_or(0, |k| k.dim("SP"));
        plan(spec, [largest(&first), largest(&later)], prior, queries, tokens).map(|_| ())
    }

    /// `sinks`: `[num_qo_heads]`, or empty for none. `cache` and `append` are the caches it reads, of bf16.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if no such kernel is compiled, and for FP8 caches; [`Error::Device`].
    pub fn new(
        device: &Arc<DeviceKernels>,
        spec: &AttentionSpec,
        sinks: &[f32],
        cache: &KvShape,
        dtype: Dtype,
        append: &AppendKernel,
    ) -> Result<Self> {
        check_cache(dtype)?;
        let [first, later] = Self::compiled(device, spec, !sinks.is_empty())?;
        let mut resident = vec![];
        if !sinks.is_empty() {
            resident.push(("sinks", device.resident(&bytes::of_f32(sinks), "sinks")?));
        }
        let family = |kernels: &[&CompiledKernel]| -> Result<Option<Family>> {
            let some = !kernels.is_empty();
            some.then(|| Family::new(device, kernels, "SQ", &resident)).transpose()
        };
        let [k, v] = append.caches().map(Arc::clone);
        Ok(PrefillKernel {
            prior: later.first().map_or(0, |k| k.dim("SP")),
            first: family(&first)?,
            later: family(&later)?,
            spec: *spec,
            cache: *cache,
            k,
            v,
            row: append.row_bytes(),
        })
    }

    /// Rows `indptr[b]..indptr[b + 1]` of `q` (`[tokens, num_qo_heads, head_dim]`) are the last tokens of the table's sequence b,
    /// whose keys and values are in the caches already.
    ///
    /// # Errors
    /// [`Error::Extent`]; [`Error::Unsupported`] for more tokens than compiled; [`Error::Device`]. `out` is untouched but after
    /// [`Error::Device`].
    pub fn run(
        &self,
        q: HeadsRef<'_, bf16>,
        indptr: &[usize],
        table: &PageTable,
        mut out: HeadsMut<'_, bf16>,
    ) -> Result<()> {
        let AttentionSpec { num_qo_heads: heads, head_dim_qk: dim, .. } = self.spec;
        crate::kv::check_indptr("qo_indptr", indptr, q.tokens())?;
        extent("qo_indptr", "batch", indptr.len() - 1, table.num_sequences())?;
        extent("attention output", "tokens", out.tokens(), q.tokens())?;
        for (operand, got) in [("q", [q.heads(), q.head_dim()]), ("attention output", [out.heads(), out.head_dim()])] {
            extent(operand, "num_qo_heads", got[0], heads)?;
            extent(operand, "head_dim", got[1], dim)?;
        }
        let largest = [&self.first, &self.later].map(|f| f.as_ref().map_or(0, Family::largest));
        let mut chunks = Vec::new();
        for (b, rows) in indptr.windows(2).enumerate() {
            let (queries, tokens) = (rows[1] - rows[0], table.seq_len(b));
            for chunk in plan(&self.spec, largest, self.prior, queries, tokens)? {
                chunks.push((b, rows[0], chunk));
            }
        }
        for (b, row, chunk) in chunks {
            self.chunk(q, row + chunk.query, table, b, &chunk, &mut out)?;
        }
        Ok(())
    }

    /// One chunk: rows `row..` of q and out.
    fn chunk(
        &self,
        q: HeadsRef<'_, bf16>,
        row: usize,
        table: &PageTable,
        b: usize,
        chunk: &Chunk,
        out: &mut HeadsMut<'_, bf16>,
    ) -> Result<()> {
        let AttentionSpec { num_qo_heads: heads, head_dim_qk: dim, .. } = self.spec;
        let family = if chunk.prior > 0 { &self.later } else { &self.first };
        let family = family.as_ref().or(self.later.as_ref());
        let family = family
            .ok_or(Error::Missing { operand: "a compiled kernel".into(), needed_by: "attention_prefill".into() })?;
        let pieces = family.pieces(chunk.len);
        let mut bytes = Vec::new();
        let mut got = Vec::new();
        family.run(
            &pieces,
            |piece| {
                for i in 0..piece.len {
                    let token = row + piece.start + i;
                    (0..heads).for_each(|h| bytes::put_bf16(&mut bytes, q.head(token, h).unwrap_or_default()));
                }
                bytes.resize(piece.size * heads * dim * size_of::<bf16>(), 0);
                family.tensor(piece, "q")?.write(0, &bytes)?;
                let before = chunk.position - chunk.prior..chunk.position;
                let own = chunk.position..chunk.position + chunk.len;
                for (cache, new, prior) in [(&self.k, "k", "k_prior"), (&self.v, "v", "v_prior")] {
                    self.gather(cache, table, b, own.clone(), &*family.tensor(piece, new)?)?;
                    if !before.is_empty() {
                        self.gather(cache, table, b, before.clone(), &*family.tensor(piece, prior)?)?;
                    }
                }
                if self.prior > 0 && family.has(piece, "prior_len") {
                    let len = i32::try_from(chunk.prior).unwrap_or(0);
                    family.tensor(piece, "prior_len")?.write(0, &len.to_le_bytes())?;
                }
                Ok(())
            },
            |piece| {
                got.resize(piece.len * heads * dim * size_of::<bf16>(), 0);
                family.tensor(piece, "output_0")?.read(0, &mut got)?;
                store(&got, row + piece.start, (heads, dim), out);
                Ok(())
            },
        )
    }

    /// Copies the rows of tokens from pages to the start of `to`, on the device; neighbouring pages in one go.
    fn gather(
        &self,
        cache: &Tensor,
        table: &PageTable,
        b: usize,
        tokens: std::ops::Range<usize>,
        to: &Tensor,
    ) -> Result<()> {
        let (size, pages) = (self.cache.page_size, table.pages(b));
        let slot = |t: usize| Some(*pages.get(t / size)? as usize * size + t % size);
        let missing = || Error::index("page table", b, tokens.end, pages.len() * size);
        let mut at = tokens.start;
        while at < tokens.end {
            let first = slot(at).ok_or_else(missing)?;
            let mut len = 1;
            while at + len < tokens.end && slot(at + len) == Some(first + len) {
                len += 1;
            }
            cache.copy_to(first * self.row, to, (at - tokens.start) * self.row, len * self.row)?;
            at += len;
        }
        Ok(())
    }
}

/// A run of queries that one compiled shape takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Chunk {
    /// First, counted from the sequence's first query.
    query: usize,
    len: usize,
    /// Position of the first query.
    position: usize,
    /// Tokens before it that it reads.
    prior: usize,
}

/// Cuts the queries at the end of `tokens` into chunks. `largest`: queries of the largest shape without and with prior keys.
fn plan(spec: &AttentionSpec, largest: [usize; 2], room: usize, queries: usize, tokens: usize) -> Result<Vec<Chunk>> {
    if queries > tokens {
        return Err(Error::Extent { operand: "q".into(), axis: "queries of a sequence", got: queries, needed: tokens });
    }
    let (mut chunks, mut query) = (Vec::new(), 0);
    while query < queries {
        let position = tokens - queries + query;
        // What no query of the chunk sees need not be there.
        let prior = spec.window_left.map_or(position, |left| position.min(left));
        let most = if prior == 0 && largest[0] > 0 { largest[0] } else { largest[1] };
        if prior > room || most == 0 {
            return Err(Error::Unsupported {
                what: format!("a prefill of {queries} queries at the end of {tokens} tokens"),
                because: match room {
                    0 => format!("compiled: {} queries and nothing before them", largest[0]),
                    room => format!("compiled: up to {room} tokens before a chunk, here {prior}"),
                },
            });
        }
        let len = most.min(queries - query);
        chunks.push(Chunk { query, len, position, prior });
        query += len;
    }
    Ok(chunks)
}

fn check_cache(dtype: Dtype) -> Result<()> {
    if dtype == Dtype::Bfloat16 {
        return Ok(());
    }
    Err(Error::Unsupported {
        what: format!("prefill over a cache of {}", dtype.name()),
        because: "attention_prefill reads bf16 keys and values; use a bf16 cache".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_the_queries() {
        let full = AttentionSpec::new(4, 2, 32);
        let cut = |spec, largest, room, queries, tokens| {
            let chunks = plan(spec, largest, room, queries, tokens).unwrap();
            chunks.iter().map(|c| (c.query, c.len, c.position, c.prior)).collect::<Vec<_>>()
        };
        assert_eq!(cut(&full, [64, 0], 0, 48, 48), [(0, 48, 0, 0)]);
        assert_eq!(cut(&full, [64, 32], 128, 100, 100), [(0, 64, 0, 0), (64, 32, 64, 64), (96, 4, 96, 96)]);
        assert_eq!(cut(&full, [64, 64], 128, 3, 100), [(0, 3, 97, 97)]);
        let window = AttentionSpec { window_left: Some(15), ..full };
        assert_eq!(cut(&window, [64, 64], 16, 70, 200), [(0, 64, 130, 15), (64, 6, 194, 15)]);
        assert!(plan(&full, [64, 64], 128, 10, 200).is_err(), "more before the chunk than there is room for");
        assert!(plan(&full, [64, 0], 0, 65, 65).is_err(), "a second chunk, and no kernel with prior keys");
        assert!(plan(&full, [64, 64], 128, 5, 4).is_err());
    }
}
