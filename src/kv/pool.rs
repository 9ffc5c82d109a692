//! The pool that owns the pages of all layers.
#![forbid(unsafe_code)]

use super::{KvFormat, KvPlane, KvScale, KvShape, PageAllocator, PagedKv};
use crate::error::{Error, Result};
use crate::quant::ScaleRule;

/// What a [`KvPool`] is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvConfig {
    /// Format and extents of one layer.
    pub shape: KvShape,
    /// Layers. A page number means the same page in each of them.
    pub num_layers: usize,
    /// How MX formats choose block scales when tokens are appended; other formats do not look at it.
    pub rule: ScaleRule,
}

impl KvConfig {
    /// A pool with keys and values of one `head_dim`. MX scales: MXFP8 by [`ScaleRule::Trainium`], what the device's own quantizer
    /// does (it never clamps a maximum), MXFP4 by [`ScaleRule::Even`] (which clamps fewer than OCP's); set [`KvConfig::rule`] for another.
    pub fn new(
        format: KvFormat,
        num_layers: usize,
        num_pages: usize,
        page_size: usize,
        num_kv_heads: usize,
        head_dim: usize,
    ) -> Self {
        let (head_dim_qk, head_dim_vo) = (head_dim, head_dim);
        let shape = KvShape { format, num_pages, page_size, num_kv_heads, head_dim_qk, head_dim_vo };
        let rule = if format == KvFormat::Mxfp4 { ScaleRule::Even } else { ScaleRule::Trainium };
        KvConfig { shape, num_layers, rule }
    }

    /// Bytes of one page: codes and block scales of K and V, all layers.
    ///
    /// # Errors
    /// [`Error::Empty`], [`Error::Multiple`] or [`Error::Overflow`] for the extents.
    pub fn page_bytes(&self) -> Result<usize> {
        let page = KvShape { num_pages: 1, ..self.shape };
        page.check()?;
        let (k, v) = (page.plane_bytes(page.head_dim_qk)?, page.plane_bytes(page.head_dim_vo)?);
        let layer = [k.0, k.1, v.0, v.1].iter().try_fold(0usize, |sum, part| sum.checked_add(*part));
        let bytes = layer.and_then(|layer| layer.checked_mul(self.num_layers));
        bytes.ok_or(Error::Overflow { operand: "kv pool".into() })
    }
}

/// K or V of one layer.
#[derive(Debug)]
pub(super) struct OwnedPlane {
    pub(super) codes: Vec<u8>,
    pub(super) block_scales: Vec<u8>,
    pub(super) scale: KvScale<'static>,
}

impl OwnedPlane {
    fn new(shape: &KvShape, head_dim: usize) -> Result<Self> {
        let (codes, scales) = shape.plane_bytes(head_dim)?;
        Ok(OwnedPlane { codes: vec![0; codes], block_scales: vec![0; scales], scale: KvScale::One })
    }

    fn view(&self) -> KvPlane<'_> {
        KvPlane { codes: &self.codes, block_scales: &self.block_scales, scale: self.scale.as_ref() }
    }
}

/// Asks the allocator for so much: `vec![0; n]`, which gets zeroed memory that costs nothing until touched, aborts on failure.
fn can_allocate(bytes: usize) -> Result<()> {
    Vec::<u8>::new()
        .try_reserve_exact(bytes)
        .map_err(|e| Error::Unsupported { what: format!("a kv pool of {bytes} bytes"), because: e.to_string() })
}

/// Owned pages for all layers. Pages are handed out by number; each holds `page_size` tokens of K and V in every layer.
///
/// Reading or appending through a page that is not allocated is refused.
#[derive(Debug)]
pub struct KvPool {
    config: KvConfig,
    pub(super) layers: Vec<[OwnedPlane; 2]>,
    pages: PageAllocator,
    /// For each page, while an append is checked: 1 + the first slot it writes, 0 for none. All zero between calls.
    pub(super) writes: Vec<usize>,
}

impl KvPool {
    /// A pool of free pages.
    ///
    /// # Errors
    /// [`Error::Empty`], [`Error::Multiple`] or [`Error::Overflow`] for the extents; [`Error::Unsupported`] for more pages than
    /// 32 bits number or more memory than the system gives.
    pub fn new(config: KvConfig) -> Result<Self> {
        let KvConfig { shape, num_layers, .. } = config;
        shape.check()?;
        for (got, axis) in [(num_layers, "num_layers"), (shape.num_pages, "num_pages")] {
            if got == 0 {
                return Err(Error::Empty { operand: "kv pool".into(), axis });
            }
        }
        PageAllocator::check(shape.num_pages, shape.page_size)?;
        let (k, v) = (shape.plane_bytes(shape.head_dim_qk)?, shape.plane_bytes(shape.head_dim_vo)?);
        let layer = [k.0, k.1, v.0, v.1].iter().try_fold(0usize, |sum, part| sum.checked_add(*part));
        let layer = layer.and_then(|bytes| bytes.checked_add(size_of::<[OwnedPlane; 2]>()));
        // Flag, place in the free list and mark of each page.
        let page = size_of::<bool>() + size_of::<u32>() + size_of::<usize>();
        let parts = layer.and_then(|bytes| bytes.checked_mul(num_layers)).zip(shape.num_pages.checked_mul(page));
        let total = parts.and_then(|(layers, pages)| layers.checked_add(pages));
        // Ask for all of it once, so that too many layers or pages are refused before the first is made.
        can_allocate(total.ok_or(Error::Overflow { operand: "kv pool".into() })?)?;
        let mut layers = Vec::new();
        for _ in 0..num_layers {
            layers.push([OwnedPlane::new(&shape, shape.head_dim_qk)?, OwnedPlane::new(&shape, shape.head_dim_vo)?]);
        }
        Ok(KvPool {
            config,
            layers,
            pages: PageAllocator::new(shape.num_pages, shape.page_size)?,
            writes: vec![0; shape.num_pages],
        })
    }

    /// What it was made of.
    pub fn config(&self) -> &KvConfig {
        &self.config
    }

    /// Format and extents of one layer.
    pub fn shape(&self) -> &KvShape {
        &self.config.shape
    }

    /// Sets the f32 scales of a layer's K and V, for [`KvFormat::Fp8`] and [`KvFormat::Nvfp4`]. Tokens already appended are
    /// read with the new scales: set them before the first append.
    ///
    /// # Errors
    /// [`Error::Index`] for the layer; [`Error::Length`], [`Error::Unexpected`] or [`Error::Value`] for a scale.
    pub fn set_scales(&mut self, layer: usize, k: KvScale<'_>, v: KvScale<'_>) -> Result<()> {
        let KvShape { format, num_kv_heads, .. } = self.config.shape;
        k.check("k scale", format, num_kv_heads)?;
        v.check("v scale", format, num_kv_heads)?;
        self.check_layer(layer)?;
        let [k_plane, v_plane] = &mut self.layers[layer];
        k_plane.scale = k.into_owned();
        v_plane.scale = v.into_owned();
        Ok(())
    }

    pub(super) fn check_layer(&self, layer: usize) -> Result<()> {
        let limit = self.layers.len();
        if layer < limit {
            return Ok(());
        }
        Err(Error::index("kv pool layer", 0, layer, limit))
    }

    /// One layer's cache, to read.
    ///
    /// # Errors
    /// [`Error::Index`] for the layer.
    pub fn layer(&self, layer: usize) -> Result<PagedKv<'_>> {
        self.check_layer(layer)?;
        let [k, v] = &self.layers[layer];
        PagedKv::with_used(self.config.shape, k.view(), v.view(), self.pages.used())
    }

    /// Which pages are taken.
    pub fn pages(&self) -> &PageAllocator {
        &self.pages
    }

    /// Takes a free page. What it holds is arbitrary until it is appended to.
    ///
    /// # Errors
    /// [`Error::OutOfPages`].
    pub fn alloc(&mut self) -> Result<u32> {
        self.pages.alloc()
    }

    /// Gives a page back.
    ///
    /// # Errors
    /// As [`PageAllocator::free`].
    pub fn free(&mut self, page: u32) -> Result<()> {
        self.pages.free(page)
    }

    /// For each page, whether it is allocated.
    pub(super) fn used(&self) -> &[bool] {
        self.pages.used()
    }

    /// Pages allocated now.
    pub fn used_pages(&self) -> usize {
        self.pages.used_pages()
    }

    /// Pages free now.
    pub fn free_pages(&self) -> usize {
        self.pages.free_pages()
    }

    /// Bytes of one page: codes and block scales of K and V, all layers.
    pub fn page_bytes(&self) -> usize {
        self.capacity_bytes() / self.config.shape.num_pages
    }

    /// Bytes of the pages allocated now.
    pub fn bytes(&self) -> usize {
        self.used_pages() * self.page_bytes()
    }

    /// Largest [`KvPool::bytes`] so far.
    pub fn peak_bytes(&self) -> usize {
        self.pages.peak_pages() * self.page_bytes()
    }

    /// Bytes of all pages, allocated or free.
    pub fn capacity_bytes(&self) -> usize {
        self.layers.iter().flatten().map(|plane| plane.codes.len() + plane.block_scales.len()).sum()
    }
}

impl AsRef<PageAllocator> for KvPool {
    fn as_ref(&self) -> &PageAllocator {
        &self.pages
    }
}

impl AsMut<PageAllocator> for KvPool {
    fn as_mut(&mut self) -> &mut PageAllocator {
        &mut self.pages
    }
}
