//! A borrowed paged cache of one layer.
#![forbid(unsafe_code)]

use super::{KvFormat, KvScale, PageTable};
use crate::error::{Error, Result, extent, length};

/// Format and extents of a paged cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// How elements are stored.
    pub format: KvFormat,
    /// Pages.
    pub num_pages: usize,
    /// Tokens of a page.
    pub page_size: usize,
    /// KV heads.
    pub num_kv_heads: usize,
    /// Elements of a key.
    pub head_dim_qk: usize,
    /// Elements of a value.
    pub head_dim_vo: usize,
}

impl KvShape {
    /// Asks for extents that are not empty, head dims that are multiples of the format's block, and byte counts that fit.
    pub(crate) fn check(&self) -> Result<()> {
        for (got, axis) in [(self.page_size, "page_size"), (self.num_kv_heads, "num_kv_heads")] {
            if got == 0 {
                return Err(Error::Empty { operand: "kv cache".into(), axis });
            }
        }
        self.format.check_head_dim("head_dim_qk", self.head_dim_qk)?;
        self.format.check_head_dim("head_dim_vo", self.head_dim_vo)?;
        for head_dim in [self.head_dim_qk, self.head_dim_vo] {
            self.plane_bytes(head_dim)?;
        }
        Ok(())
    }

    /// Bytes of codes and of block scales of K (`head_dim_qk`) or V (`head_dim_vo`).
    pub(crate) fn plane_bytes(&self, head_dim: usize) -> Result<(usize, usize)> {
        let bytes = || {
            let slots = self.num_pages.checked_mul(self.page_size)?;
            // A token's bytes by themselves: they must fit also where there is no page.
            let codes = self.num_kv_heads.checked_mul(self.format.code_bytes(head_dim)?)?;
            let scales = self.num_kv_heads.checked_mul(self.format.scale_bytes(head_dim))?;
            // Vectors are numbered over all heads.
            slots.checked_mul(self.num_kv_heads)?;
            Some((slots.checked_mul(codes)?, slots.checked_mul(scales)?))
        };
        bytes().ok_or(Error::Overflow { operand: "kv cache".into() })
    }

    /// Bytes of one head vector's codes and block scales; fits because [`KvShape::check`] passed.
    pub(crate) fn vector_bytes(&self, head_dim: usize) -> (usize, usize) {
        (self.format.code_bytes(head_dim).unwrap_or(0), self.format.scale_bytes(head_dim))
    }

    /// Number of head vectors before that of (page, slot, head).
    pub(crate) fn vector(&self, page: usize, slot: usize, head: usize) -> usize {
        (page * self.page_size + slot) * self.num_kv_heads + head
    }

    /// Asks that a cache have exactly this shape.
    pub(crate) fn expect(&self, needed: &KvShape) -> Result<()> {
        if self.format != needed.format {
            return Err(Error::Unsupported {
                what: format!("a {:?} kv cache under a plan made for {:?}", self.format, needed.format),
                because: "a plan serves caches of the shape it was made for".into(),
            });
        }
        for (axis, got, needed) in [
            ("num_pages", self.num_pages, needed.num_pages),
            ("page_size", self.page_size, needed.page_size),
            ("num_kv_heads", self.num_kv_heads, needed.num_kv_heads),
            ("head_dim_qk", self.head_dim_qk, needed.head_dim_qk),
            ("head_dim_vo", self.head_dim_vo, needed.head_dim_vo),
        ] {
            extent("kv cache", axis, got, needed)?;
        }
        Ok(())
    }

    /// Asks that every page of the table lie inside the cache and be allocated (`used[page]`; an empty `used`: all are).
    pub(crate) fn check_table(&self, table: &PageTable, used: &[bool]) -> Result<()> {
        if table.num_sequences() == 0 {
            return Err(Error::Empty { operand: "page table".into(), axis: "batch" });
        }
        extent("page table", "page_size", table.page_size(), self.page_size)?;
        for (at, &page) in table.indices().iter().enumerate() {
            if page as usize >= self.num_pages {
                let operand = "page table indices".into();
                return Err(Error::Index { operand, at, got: page.into(), limit: self.num_pages });
            }
            if used.get(page as usize) == Some(&false) {
                return Err(Error::Value {
                    operand: "page table indices".into(),
                    at,
                    got: format!("page {page}, which is free"),
                    needed: "an allocated page",
                });
            }
        }
        Ok(())
    }
}

/// K or V of a paged cache.
#[derive(Debug, Clone)]
pub struct KvPlane<'a> {
    /// Codes: `[num_pages, page_size, num_kv_heads, head_dim]` elements as bytes, little-endian; FP4 packs two to a byte, low
    /// nibble first.
    pub codes: &'a [u8],
    /// Block scales: `[num_pages, page_size, num_kv_heads, head_dim / block]` E8M0 (MX) or E4M3FN (NVFP4) codes; empty for
    /// formats without.
    pub block_scales: &'a [u8],
    /// The f32 scale.
    pub scale: KvScale<'a>,
}

/// A borrowed paged cache of one layer: K and V of all pages.
///
/// Slots that no page table names are never read: they may hold anything.
#[derive(Debug, Clone)]
pub struct PagedKv<'a> {
    shape: KvShape,
    k: KvPlane<'a>,
    v: KvPlane<'a>,
    used: &'a [bool],
}

impl<'a> PagedKv<'a> {
    /// Borrows caches that lie elsewhere; all pages count as allocated.
    ///
    /// # Errors
    /// [`Error::Empty`], [`Error::Multiple`], [`Error::Overflow`] for the shape; [`Error::Length`] for a plane;
    /// [`Error::Unexpected`] for a scale on a format without; [`Error::Value`] for a scale that is not positive and normal.
    pub fn new(shape: KvShape, k: KvPlane<'a>, v: KvPlane<'a>) -> Result<Self> {
        Self::with_used(shape, k, v, &[])
    }

    /// As [`PagedKv::new`], with a flag for each page: whether it is allocated. Reading through a free page is refused.
    ///
    /// # Errors
    /// As [`PagedKv::new`], and [`Error::Length`] unless `used` holds `num_pages` flags (or none: all are allocated).
    pub fn with_used(shape: KvShape, k: KvPlane<'a>, v: KvPlane<'a>, used: &'a [bool]) -> Result<Self> {
        shape.check()?;
        let names = [("k cache", "k block scales", "k scale"), ("v cache", "v block scales", "v scale")];
        for ((plane, head_dim), name) in [(&k, shape.head_dim_qk), (&v, shape.head_dim_vo)].into_iter().zip(names) {
            let (codes, scales) = shape.plane_bytes(head_dim)?;
            length(name.0, plane.codes.len(), codes)?;
            length(name.1, plane.block_scales.len(), scales)?;
            plane.scale.check(name.2, shape.format, shape.num_kv_heads)?;
        }
        if !used.is_empty() {
            length("page flags", used.len(), shape.num_pages)?;
        }
        Ok(PagedKv { shape, k, v, used })
    }

    /// Format and extents.
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// The keys.
    pub fn k(&self) -> &KvPlane<'a> {
        &self.k
    }

    /// The values.
    pub fn v(&self) -> &KvPlane<'a> {
        &self.v
    }

    /// Asks that every page of the table be readable.
    pub(crate) fn check_table(&self, table: &PageTable) -> Result<()> {
        self.shape.check_table(table, self.used)
    }

    /// Codes and block scales of one head vector of `plane`; page, slot and head are inside the shape.
    pub(crate) fn vector(&self, plane: &KvPlane<'a>, dim: usize, at: (usize, usize, usize)) -> (&'a [u8], &'a [u8]) {
        let (codes, scales) = self.shape.vector_bytes(dim);
        let n = self.shape.vector(at.0, at.1, at.2);
        (&plane.codes[n * codes..][..codes], &plane.block_scales[n * scales..][..scales])
    }
}
