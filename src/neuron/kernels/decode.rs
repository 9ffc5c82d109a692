//! `attention_decode`: one query a sequence over paged caches that stay on the device.
#![forbid(unsafe_code)]

use super::bytes;
use super::device::DeviceKernels;
use super::family::Family;
use super::{AppendKernel, CompiledKernel};
use crate::attention::AttentionSpec;
use crate::error::{Error, Result, extent};
use crate::kv::{KvShape, PageTable};
use crate::trainium::Dtype;
use crate::view::{HeadsMut, HeadsRef};
use half::bf16;
use std::sync::Arc;

/// Decode attention of one layer through `kernels/attention_decode.py`.
#[derive(Debug)]
pub struct DecodeKernel {
    family: Family,
    spec: AttentionSpec,
    /// Most pages of a sequence.
    max_pages: usize,
}

/// What no device attention computes.
pub(super) fn check_spec(spec: &AttentionSpec) -> Result<()> {
    let refused = |what: &str, because: &str| Err(Error::Unsupported { what: what.into(), because: because.into() });
    if spec.logits_soft_cap.is_some() {
        return refused("a logits soft cap", "the device kernels have none");
    }
    if !spec.causal {
        return refused("attention that is not causal over a cache", "the compiled kernels are causal");
    }
    if spec.head_dim_qk != spec.head_dim_vo {
        return refused("keys and values of different head dims", "the device kernels have one head_dim");
    }
    Ok(())
}

/// Whether a compiled kernel has this mask and factor.
pub(super) fn same_mask(kernel: &CompiledKernel, spec: &AttentionSpec, sinks: bool) -> bool {
    // The kernel's window counts the query itself; 0 is none.
    let window = spec.window_left.map_or(0, |left| left.saturating_add(1));
    kernel.real("sm_scale").is_some_and(|scale| scale as f32 == spec.sm_scale)
        && kernel.int("window").unwrap_or(0) == i64::try_from(window).unwrap_or(-1)
        && kernel.has("sinks") == sinks
}

/// What was asked, for a refusal.
pub(super) fn wanted(spec: &AttentionSpec, sinks: bool) -> String {
    let window = spec.window_left.map_or(0, |left| left.saturating_add(1));
    format!(
        "{} query and {} kv heads of {}, sm_scale {}, window {window}, sinks {sinks}",
        spec.num_qo_heads, spec.num_kv_heads, spec.head_dim_qk, spec.sm_scale
    )
}

impl DecodeKernel {
    fn compiled<'d>(
        device: &'d DeviceKernels,
        spec: &AttentionSpec,
        sinks: bool,
        cache: &KvShape,
        dtype: Dtype,
    ) -> Result<Vec<&'d CompiledKernel>> {
        check_spec(spec)?;
        let shape = [cache.num_pages, cache.page_size, spec.num_kv_heads, spec.head_dim_qk];
        let wanted = format!("{}, a {} cache {shape:?}", wanted(spec, sinks), dtype.name());
        let found = device.set().family("attention_decode", "B", &wanted, |kernel| {
            kernel.dim("HQ") == spec.num_qo_heads
                && kernel.input("k_cache").is_some_and(|t| t.shape == shape && t.dtype == dtype)
                && same_mask(kernel, spec, sinks)
        })?;
        // Shapes of one family share the block table's width: the widest there is.
        let widest = found.iter().map(|k| k.dim("M")).max().unwrap_or(0);
        Ok(found.into_iter().filter(|k| k.dim("M") == widest).collect())
    }

    /// Asks whether such an attention is compiled for sequences of up to `tokens`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with what is compiled.
    pub fn served(
        device: &DeviceKernels,
        spec: &AttentionSpec,
        sinks: bool,
        cache: &KvShape,
        dtype: Dtype,
        tokens: usize,
    ) -> Result<()> {
        let kernels = Self::compiled(device, spec, sinks, cache, dtype)?;
        check_pages(tokens.div_ceil(cache.page_size.max(1)), kernels.first().map_or(0, |k| k.dim("M")))
    }

    /// `sinks`: `[num_qo_heads]`, or empty for none. `cache` and `append` are the caches it reads. Scales of FP8 caches are 1.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if no such kernel is compiled; [`Error::Device`].
    pub fn new(
        device: &Arc<DeviceKernels>,
        spec: &AttentionSpec,
        sinks: &[f32],
        cache: &KvShape,
        dtype: Dtype,
        append: &AppendKernel,
    ) -> Result<Self> {
        let kernels = Self::compiled(device, spec, !sinks.is_empty(), cache, dtype)?;
        let [k, v] = append.caches();
        let mut resident = vec![("k_cache", Arc::clone(k)), ("v_cache", Arc::clone(v))];
        if !sinks.is_empty() {
            resident.push(("sinks", device.resident(&bytes::of_f32(sinks), "sinks")?));
        }
        if kernels.iter().any(|k| k.has("k_scale")) {
            let one = device.resident(&bytes::of_f32(&[1.0]), "kv scale")?;
            resident.extend([("k_scale", Arc::clone(&one)), ("v_scale", one)]);
        }
        let max_pages = kernels.first().map_or(0, |k| k.dim("M"));
        Ok(DecodeKernel { family: Family::new(device, &kernels, "B", &resident)?, spec: *spec, max_pages })
    }

    /// Row b of `q` (`[sequences, num_qo_heads, head_dim]`) is the last token of the table's sequence b.
    ///
    /// # Errors
    /// [`Error::Extent`]; [`Error::Unsupported`] for a sequence of more pages than compiled; [`Error::Device`]. `out` is untouched
    /// but after [`Error::Device`].
    pub fn run(&self, q: HeadsRef<'_, bf16>, table: &PageTable, mut out: HeadsMut<'_, bf16>) -> Result<()> {
        let AttentionSpec { num_qo_heads: heads, head_dim_qk: dim, .. } = self.spec;
        for (operand, tokens, got) in [
            ("q", q.tokens(), [q.heads(), q.head_dim()]),
            ("attention output", out.tokens(), [out.heads(), out.head_dim()]),
        ] {
            extent(operand, "tokens", tokens, table.num_sequences())?;
            extent(operand, "num_qo_heads", got[0], heads)?;
            extent(operand, "head_dim", got[1], dim)?;
        }
        for b in 0..table.num_sequences() {
            check_pages(table.pages(b).len(), self.max_pages)?;
        }
        let pieces = self.family.pieces(q.tokens());
        let family = &self.family;
        let (mut sent, mut got) = (Vec::new(), Vec::new());
        family.run(
            &pieces,
            |piece| {
                sent.clear();
                let (mut pages, mut lens) = (vec![-1; piece.size * self.max_pages], vec![0; piece.size]);
                for i in 0..piece.len {
                    let b = piece.start + i;
                    (0..heads).for_each(|h| bytes::put_bf16(&mut sent, q.head(b, h).unwrap_or_default()));
                    for (slot, page) in pages[i * self.max_pages..].iter_mut().zip(table.pages(b)) {
                        *slot = i32::try_from(*page).unwrap_or(-1);
                    }
                    lens[i] = i32::try_from(table.seq_len(b)).unwrap_or(0);
                }
                sent.resize(piece.size * heads * dim * size_of::<bf16>(), 0);
                family.tensor(piece, "q")?.write(0, &sent)?;
                family.tensor(piece, "block_table")?.write(0, &bytes::of_i32(&pages))?;
                Ok(family.tensor(piece, "context_lens")?.write(0, &bytes::of_i32(&lens))?)
            },
            |piece| {
                got.resize(piece.len * heads * dim * size_of::<bf16>(), 0);
                family.tensor(piece, "output_0")?.read(0, &mut got)?;
                store(&got, piece.start, (heads, dim), &mut out);
                Ok(())
            },
        )
    }
}

fn check_pages(pages: usize, compiled: usize) -> Result<()> {
    if pages <= compiled {
        return Ok(());
    }
    Err(Error::Unsupported {
        what: format!("a sequence of {pages} pages"),
        because: format!("the kernel was compiled for block tables of {compiled}"),
    })
}

/// Rows of heads from the device to `out`, from token `first` on.
pub(super) fn store(bytes: &[u8], first: usize, (heads, dim): (usize, usize), out: &mut HeadsMut<'_, bf16>) {
    let mut values = bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b));
    for t in first..first + bytes.len() / (heads * dim * size_of::<bf16>()).max(1) {
        for h in 0..heads {
            for (y, value) in out.head_mut(t, h).unwrap_or_default().iter_mut().zip(&mut values) {
                *y = value;
            }
        }
    }
}
