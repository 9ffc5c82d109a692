//! `kv-rows/1`: a paged KV cache as rows that a kernel gathers.
#![forbid(unsafe_code)]

use super::halve::{doubled, halve, halved};
use super::{RowElement, check_name, zeros};
use crate::cpu::{Parallelism, for_each_zip};
use crate::error::{Error, Result, extent, length, mul};
use crate::kv::{KvFormat, KvPlane, KvScale, KvShape, PagedKv};
use crate::num::{BridgeReport, Fp8};
use std::borrow::Cow;
use std::fmt;

/// Bytes that a thread copies at a time.
const CHUNK: usize = 1 << 16;
/// Tokens that a thread takes at a time.
const TOKENS: usize = 512;

/// How the kv heads of a token lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum KvHeads {
    /// One row holds all heads of a token: `[1, slots, num_kv_heads * head_dim]`, the bytes of this crate's caches.
    #[default]
    Together,
    /// One plane for each head: `[num_kv_heads, slots, head_dim]`, for kernels that take one kv head a call.
    Apart,
}

/// `kv-rows/1`: K and V, each `[G, slots, R]` elements; `slots = num_pages * page_size`, token row = `page * page_size + offset`.
///
/// `docs/layouts.md` section 4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvRowsLayout {
    shape: KvShape,
    element: RowElement,
    heads: KvHeads,
    halves: bool,
}

/// K and V of a paged cache in [`KvRowsLayout`]; borrowed where no byte moves.
#[derive(Debug, Clone)]
pub struct PackedKvRows<'a> {
    layout: KvRowsLayout,
    planes: [Cow<'a, [u8]>; 2],
    scales: [Vec<f32>; 2],
}

impl KvRowsLayout {
    /// Name and version.
    pub const NAME: &'static str = "kv-rows/1";

    /// The layout of a cache of `shape` on a device that reads `element`.
    ///
    /// Served: bf16 as bf16, FP8 as the same FP8, E4M3FN as E4M3 IEEE by halving.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for other combinations; [`Error::Empty`], [`Error::Multiple`], [`Error::Overflow`] for the shape.
    pub fn new(shape: KvShape, element: RowElement, heads: KvHeads) -> Result<Self> {
        shape.check()?;
        let halves = match (shape.format, element) {
            (KvFormat::Bf16, RowElement::Bf16) => false,
            (KvFormat::Fp8(Fp8::E4M3Fn), RowElement::Fp8(Fp8::E4M3Ieee)) => true,
            (KvFormat::Fp8(from), RowElement::Fp8(to)) if from == to && to != Fp8::E3M4 => false,
            (format, element) => {
                return Err(Error::Unsupported {
                    what: format!("a {format:?} cache read as {element:?} in layout {}", Self::NAME),
                    because: "the device kernels read bf16 and fp8 rows as they lie; only E4M3FN becomes E4M3 IEEE, by halving"
                        .into(),
                });
            }
        };
        Ok(KvRowsLayout { shape, element, heads, halves })
    }

    /// Format and extents of the cache.
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// What the device reads.
    pub fn element(&self) -> RowElement {
        self.element
    }

    /// How heads lie.
    pub fn heads(&self) -> KvHeads {
        self.heads
    }

    /// Whether codes are halved and scales doubled.
    pub fn halves(&self) -> bool {
        self.halves
    }

    /// Rows: slots of all pages.
    pub fn slots(&self) -> usize {
        self.shape.num_pages * self.shape.page_size
    }

    /// `[G, slots, R]` of K, in elements.
    pub fn k_shape(&self) -> [usize; 3] {
        self.plane_shape(self.shape.head_dim_qk)
    }

    /// `[G, slots, R]` of V, in elements.
    pub fn v_shape(&self) -> [usize; 3] {
        self.plane_shape(self.shape.head_dim_vo)
    }

    fn plane_shape(&self, head_dim: usize) -> [usize; 3] {
        match self.heads {
            KvHeads::Together => [1, self.slots(), self.shape.num_kv_heads * head_dim],
            KvHeads::Apart => [self.shape.num_kv_heads, self.slots(), head_dim],
        }
    }

    /// The row of a token; `None` outside the cache.
    pub fn row(&self, page: usize, offset: usize) -> Option<usize> {
        let inside = page < self.shape.num_pages && offset < self.shape.page_size;
        inside.then(|| page * self.shape.page_size + offset)
    }

    /// Flat index, in elements, of the first element of a head's key; `None` outside the cache. `row` as [`KvRowsLayout::row`].
    pub fn k_index(&self, row: usize, head: usize) -> Option<usize> {
        self.index(row, head, self.shape.head_dim_qk)
    }

    /// As [`KvRowsLayout::k_index`], for values.
    pub fn v_index(&self, row: usize, head: usize) -> Option<usize> {
        self.index(row, head, self.shape.head_dim_vo)
    }

    fn index(&self, row: usize, head: usize, head_dim: usize) -> Option<usize> {
        let vector = match self.heads {
            KvHeads::Together => row.checked_mul(self.shape.num_kv_heads)?.checked_add(head)?,
            KvHeads::Apart => head.checked_mul(self.slots())?.checked_add(row)?,
        };
        (row < self.slots() && head < self.shape.num_kv_heads).then(|| vector * head_dim)
    }

    /// Packs a cache. Codes of unused slots are packed, and counted in the report, like any others.
    ///
    /// # Errors
    /// [`Error::Extent`] or [`Error::Unsupported`] for a cache of another shape; [`Error::Value`] for a scale that cannot be
    /// doubled; [`Error::Unsupported`] without memory.
    pub fn pack<'a>(
        &self,
        cache: &'a PagedKv<'a>,
        parallelism: Parallelism<'_>,
    ) -> Result<(PackedKvRows<'a>, BridgeReport)> {
        cache.shape().expect(&self.shape)?;
        let scales = self.scales(cache)?;
        let layout = *self;
        if self.heads == KvHeads::Together && !self.halves {
            let planes = [cache.k(), cache.v()].map(|plane| Cow::Borrowed(plane.codes));
            return Ok((PackedKvRows { layout, planes, scales }, self.report(cache, 0)));
        }
        let (mut k, mut v) = (zeros("packed k", cache.k().codes.len())?, zeros("packed v", cache.v().codes.len())?);
        let report = self.pack_into(cache, parallelism, [&mut k, &mut v])?;
        Ok((PackedKvRows { layout, planes: [Cow::Owned(k), Cow::Owned(v)], scales }, report))
    }

    /// Packs the codes into the caller's memory: `[k, v]` of as many bytes as the cache has. Scales are not part of it:
    /// [`KvRowsLayout::scales`].
    ///
    /// # Errors
    /// [`Error::Extent`] or [`Error::Unsupported`] for a cache of another shape; [`Error::Length`]. Nothing is written then.
    pub fn pack_into(
        &self,
        cache: &PagedKv<'_>,
        parallelism: Parallelism<'_>,
        [k, v]: [&mut [u8]; 2],
    ) -> Result<BridgeReport> {
        cache.shape().expect(&self.shape)?;
        length("packed k", k.len(), cache.k().codes.len())?;
        length("packed v", v.len(), cache.v().codes.len())?;
        let mut rounded = self.pack_plane(cache.k().codes, k, self.shape.head_dim_qk, parallelism);
        rounded += self.pack_plane(cache.v().codes, v, self.shape.head_dim_vo, parallelism);
        Ok(self.report(cache, rounded))
    }

    fn report(&self, cache: &PagedKv<'_>, rounded: usize) -> BridgeReport {
        halved((cache.k().codes.len() + cache.v().codes.len()) / self.element.bytes(), rounded)
    }

    /// `[1]` or `[num_kv_heads]` multipliers of K and of V; none for bf16. Doubled where codes are halved.
    ///
    /// # Errors
    /// [`Error::Extent`] or [`Error::Unsupported`] for a cache of another shape; [`Error::Value`] for a scale that cannot be
    /// doubled.
    pub fn scales(&self, cache: &PagedKv<'_>) -> Result<[Vec<f32>; 2]> {
        cache.shape().expect(&self.shape)?;
        Ok([self.plane_scales(cache.k())?, self.plane_scales(cache.v())?])
    }

    fn plane_scales(&self, plane: &KvPlane<'_>) -> Result<Vec<f32>> {
        if !self.shape.format.has_scale() {
            return Ok(Vec::new());
        }
        let mut scales = match &plane.scale {
            KvScale::One => vec![1.0],
            KvScale::Tensor(scale) => vec![*scale],
            KvScale::Head(scales) => scales.to_vec(),
        };
        if self.halves {
            doubled("kv scale", &mut scales)?;
        }
        Ok(scales)
    }

    /// The plane in this layout; how many of its codes rounded.
    fn pack_plane(&self, codes: &[u8], out: &mut [u8], head_dim: usize, parallelism: Parallelism<'_>) -> usize {
        let vector = head_dim * self.element.bytes();
        let token = self.shape.num_kv_heads * vector;
        if codes.is_empty() {
            return 0;
        }
        let finish = |out: &mut [u8]| if self.halves { halve(out) } else { 0 };
        if self.heads == KvHeads::Together {
            let mut rounded = vec![0; out.len().div_ceil(CHUNK)];
            for_each_zip(parallelism, (out, CHUNK), (&mut rounded, 1), |i, out, rounded| {
                out.copy_from_slice(&codes[i * CHUNK..][..out.len()]);
                rounded[0] = finish(out);
            });
            return rounded.iter().sum();
        }
        // Tokens are read in order, all heads of each: every plane is then written in order too.
        let mut strips: Vec<Vec<&mut [u8]>> = (0..self.slots().div_ceil(TOKENS)).map(|_| Vec::new()).collect();
        for plane in out.chunks_exact_mut(self.slots() * vector) {
            strips.iter_mut().zip(plane.chunks_mut(TOKENS * vector)).for_each(|(strip, part)| strip.push(part));
        }
        let mut rounded = vec![0; strips.len()];
        for_each_zip(parallelism, (&mut strips, 1), (&mut rounded, 1), |i, strips, rounded| {
            for heads in strips {
                let at = i * TOKENS * token;
                let width = heads.first().map_or(0, |head| head.len() / vector * token);
                for (slot, token) in codes[at..at + width].chunks_exact(token).enumerate() {
                    for (head, vector) in heads.iter_mut().zip(token.chunks_exact(vector)) {
                        head[slot * vector.len()..][..vector.len()].copy_from_slice(vector);
                    }
                }
                rounded[0] += heads.iter_mut().map(|head| finish(head)).sum::<usize>();
            }
        });
        rounded.iter().sum()
    }
}

impl<'a> PackedKvRows<'a> {
    /// Takes tensors that lie in this layout already (read back from the device): `name` is the layout they were packed in.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another layout or version; [`Error::Length`] for a tensor; [`Error::Extent`] for scales that are
    /// neither `[1]` nor `[num_kv_heads]` (none for bf16).
    pub fn from_parts(
        name: &str,
        layout: KvRowsLayout,
        [k, v]: [Cow<'a, [u8]>; 2],
        scales: [Vec<f32>; 2],
    ) -> Result<Self> {
        check_name(name, KvRowsLayout::NAME)?;
        for (operand, plane, shape) in [("packed k", &k, layout.k_shape()), ("packed v", &v, layout.v_shape())] {
            let elements = mul(operand, mul(operand, shape[0], shape[1])?, shape[2])?;
            length(operand, plane.len(), mul(operand, elements, layout.element.bytes())?)?;
        }
        for scales in &scales {
            match layout.shape.format.has_scale() {
                false => extent("kv scales", "heads", scales.len(), 0)?,
                true if scales.len() == 1 => {}
                true => extent("kv scales", "heads", scales.len(), layout.shape.num_kv_heads)?,
            }
        }
        Ok(PackedKvRows { layout, planes: [k, v], scales })
    }

    /// The layout.
    pub fn layout(&self) -> &KvRowsLayout {
        &self.layout
    }

    /// Keys, `[G, slots, R]` elements, little-endian.
    pub fn k(&self) -> &[u8] {
        &self.planes[0]
    }

    /// Values, `[G, slots, R]` elements, little-endian.
    pub fn v(&self) -> &[u8] {
        &self.planes[1]
    }

    /// f32 multipliers of K and of V: `[1]` or `[num_kv_heads]`; none for bf16.
    pub fn scales(&self) -> [&[f32]; 2] {
        [&self.scales[0], &self.scales[1]]
    }

    /// The codes of K and V, as the device reads them, in this crate's order `[num_pages, page_size, num_kv_heads, head_dim]`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] without memory for them.
    pub fn unpack(&self, parallelism: Parallelism<'_>) -> Result<[Vec<u8>; 2]> {
        let mut out = [zeros("k codes", self.k().len())?, zeros("v codes", self.v().len())?];
        let [k, v] = &mut out;
        self.unpack_into(parallelism, [k, v])?;
        Ok(out)
    }

    /// As [`PackedKvRows::unpack`], into the caller's memory: `[k, v]` of as many bytes as the packed planes.
    ///
    /// # Errors
    /// [`Error::Length`]. Nothing is written then.
    pub fn unpack_into(&self, parallelism: Parallelism<'_>, out: [&mut [u8]; 2]) -> Result<()> {
        let KvShape { num_kv_heads, head_dim_qk, head_dim_vo, .. } = self.layout.shape;
        for (operand, out, plane) in [("k codes", &out[0], self.k()), ("v codes", &out[1], self.v())] {
            length(operand, out.len(), plane.len())?;
        }
        for ((out, plane), head_dim) in out.into_iter().zip(&self.planes).zip([head_dim_qk, head_dim_vo]) {
            let vector = head_dim * self.layout.element.bytes();
            let (token, head) = (num_kv_heads * vector, self.layout.slots() * vector);
            if plane.is_empty() {
                continue;
            }
            let chunk = match self.layout.heads {
                KvHeads::Together => CHUNK,
                KvHeads::Apart => TOKENS * token,
            };
            let mut nothing = vec![(); out.len().div_ceil(chunk)];
            for_each_zip(parallelism, (out, chunk), (&mut nothing, 1), |i, out, _| match self.layout.heads {
                KvHeads::Together => out.copy_from_slice(&plane[i * chunk..][..out.len()]),
                KvHeads::Apart => {
                    for (slot, token) in (i * TOKENS..).zip(out.chunks_exact_mut(token)) {
                        for (at, out) in (slot * vector..).step_by(head).zip(token.chunks_exact_mut(vector)) {
                            out.copy_from_slice(&plane[at..at + vector]);
                        }
                    }
                }
            });
        }
        Ok(())
    }
}

impl fmt::Display for KvRowsLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let KvShape { num_pages, page_size, num_kv_heads, .. } = self.shape;
        let at = match self.heads {
            KvHeads::Together => "[0, page * page_size + offset, head * head_dim + d]",
            KvHeads::Apart => "[head, page * page_size + offset, d]",
        };
        writeln!(f, "{}: {num_pages} pages of {page_size} tokens, {num_kv_heads} kv heads", Self::NAME)?;
        let halved = if self.halves { ", codes halved, scales doubled" } else { "" };
        write!(f, "  k {:?}, v {:?} {:?}: {at}{halved}", self.k_shape(), self.v_shape(), self.element)
    }
}
