//! Where a kernel finds keys and values.
#![forbid(unsafe_code)]

use crate::cpu::{Smallest, flush};
use crate::kv::{KvFormat, PageTable, PagedKv};
use crate::num::Real;
use crate::view::HeadsRef;
use half::bf16;
use std::any::TypeId;
use std::ops::Range;

/// Keys and values of a batch of sequences, already checked: callers ask only for tokens and heads that exist.
pub(crate) trait KvSource: Sync {
    /// Tokens of sequence `seq`.
    fn len(&self, seq: usize) -> usize;
    /// Keys of `tokens`, f32 without the f32 scale, subnormals flushed: `[tokens, head_dim_qk]` into `out`.
    fn keys(&self, seq: usize, head: usize, tokens: Range<usize>, out: &mut [f32]);
    /// Values of `tokens`, as keys; each at a multiple of `stride` in `out`.
    fn values(&self, seq: usize, head: usize, tokens: Range<usize>, stride: usize, out: &mut [f32]);
    /// f32 scales of K and V for a kv head.
    fn scales(&self, head: usize) -> (f32, f32);
    /// Whether softmax weights are rounded to bf16 for these values.
    fn rounds_weights(&self) -> bool;
    /// Nothing seen yet of these elements.
    fn smallest(&self) -> Smallest;
}

/// Nothing seen yet of elements of `T`.
pub(crate) fn smallest_of<T: Real>() -> Smallest {
    if is_bf16::<T>() { Smallest::BF16 } else { Smallest::F32 }
}

fn is_bf16<T: Real>() -> bool {
    TypeId::of::<T>() == TypeId::of::<bf16>()
}

/// Contiguous K and V: sequence b owns tokens `indptr[b]..indptr[b + 1]`.
#[derive(Debug, Clone, Copy)]
pub struct RaggedKv<'a, T> {
    /// `[tokens, num_kv_heads, head_dim_qk]`
    pub k: HeadsRef<'a, T>,
    /// `[tokens, num_kv_heads, head_dim_vo]`
    pub v: HeadsRef<'a, T>,
    /// `[batch + 1]` offsets of each sequence's tokens, from 0 to `tokens`.
    pub indptr: &'a [usize],
}

impl<T: Real> KvSource for RaggedKv<'_, T> {
    fn len(&self, seq: usize) -> usize {
        self.indptr[seq + 1] - self.indptr[seq]
    }

    fn keys(&self, seq: usize, head: usize, tokens: Range<usize>, out: &mut [f32]) {
        load(&self.k, self.indptr[seq], head, tokens, self.k.head_dim(), out);
    }

    fn values(&self, seq: usize, head: usize, tokens: Range<usize>, stride: usize, out: &mut [f32]) {
        load(&self.v, self.indptr[seq], head, tokens, stride, out);
    }

    fn scales(&self, _: usize) -> (f32, f32) {
        (1.0, 1.0)
    }

    fn rounds_weights(&self) -> bool {
        is_bf16::<T>()
    }

    fn smallest(&self) -> Smallest {
        smallest_of::<T>()
    }
}

fn load<T: Real>(x: &HeadsRef<'_, T>, first: usize, head: usize, tokens: Range<usize>, stride: usize, out: &mut [f32]) {
    for (token, out) in tokens.zip(out.chunks_mut(stride)) {
        read(x.head(first + token, head).unwrap_or_default(), out);
    }
}

/// Values as f32, subnormals flushed.
pub(crate) fn read<T: Real>(from: &[T], to: &mut [f32]) {
    for (y, x) in to.iter_mut().zip(from) {
        *y = flush(x.to_f32());
    }
}

/// A paged cache and who owns which page.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PagedSource<'a> {
    pub(crate) kv: &'a PagedKv<'a>,
    pub(crate) table: &'a PageTable,
}

impl PagedSource<'_> {
    fn decode(&self, seq: usize, head: usize, tokens: Range<usize>, keys: bool, stride: usize, out: &mut [f32]) {
        let shape = self.kv.shape();
        let (plane, dim) = if keys { (self.kv.k(), shape.head_dim_qk) } else { (self.kv.v(), shape.head_dim_vo) };
        let pages = self.table.pages(seq);
        for (token, out) in tokens.zip(out.chunks_mut(stride)) {
            let page = pages[token / shape.page_size] as usize;
            let (codes, scales) = self.kv.vector(plane, dim, (page, token % shape.page_size, head));
            shape.format.decode(codes, scales, &mut out[..dim]);
        }
    }
}

impl KvSource for PagedSource<'_> {
    fn len(&self, seq: usize) -> usize {
        self.table.seq_len(seq)
    }

    fn keys(&self, seq: usize, head: usize, tokens: Range<usize>, out: &mut [f32]) {
        self.decode(seq, head, tokens, true, self.kv.shape().head_dim_qk, out);
    }

    fn values(&self, seq: usize, head: usize, tokens: Range<usize>, stride: usize, out: &mut [f32]) {
        self.decode(seq, head, tokens, false, stride, out);
    }

    fn scales(&self, head: usize) -> (f32, f32) {
        (self.kv.k().scale.of(head), self.kv.v().scale.of(head))
    }

    fn rounds_weights(&self) -> bool {
        self.kv.shape().format.rounds_weights()
    }

    fn smallest(&self) -> Smallest {
        match self.kv.shape().format {
            KvFormat::F32 | KvFormat::F16 => Smallest::F32,
            _ => Smallest::BF16,
        }
    }
}
