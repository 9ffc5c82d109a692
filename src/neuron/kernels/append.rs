//! `kv_append`: new tokens into paged caches that stay on the device.
#![forbid(unsafe_code)]

use super::bytes;
use super::device::DeviceKernels;
use super::family::Family;
use crate::error::{Result, length, mul};
use crate::kv::KvShape;
use crate::neuron::Tensor;
use crate::trainium::Dtype;
use std::sync::Arc;

/// K and V of one layer on the device, `[num_pages, page_size, num_kv_heads, head_dim]`, changed in place through
/// `kernels/kv_append.py`.
#[derive(Debug)]
pub struct AppendKernel {
    family: Family,
    /// Bytes of a token's keys or values.
    row: usize,
    k: Arc<Tensor>,
    v: Arc<Tensor>,
}

impl AppendKernel {
    fn compiled<'d>(
        device: &'d DeviceKernels,
        cache: &KvShape,
        dtype: Dtype,
    ) -> Result<(Vec<&'d super::CompiledKernel>, KvShape)> {
        let KvShape { num_pages, page_size, num_kv_heads, head_dim_qk, .. } = *cache;
        let wanted = format!(
            "a {} cache of {num_pages} pages of {page_size} tokens, {num_kv_heads} kv heads of {head_dim_qk}",
            dtype.name()
        );
        let found = device.set().family("kv_append", "T", &wanted, |kernel| {
            kernel.dim("N") >= num_pages
                && kernel
                    .input("k_cache")
                    .is_some_and(|t| t.shape[1..] == [page_size, num_kv_heads, head_dim_qk] && t.dtype == dtype)
        })?;
        let num_pages = found.iter().map(|k| k.dim("N")).min().unwrap_or(num_pages);
        let kernels = found.into_iter().filter(|k| k.dim("N") == num_pages).collect();
        Ok((kernels, KvShape { num_pages, ..*cache }))
    }

    /// The smallest compiled cache that holds one of this shape: its pages may be more.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) with what is compiled.
    pub fn served(device: &DeviceKernels, cache: &KvShape, dtype: Dtype) -> Result<KvShape> {
        Self::compiled(device, cache, dtype).map(|(_, shape)| shape)
    }

    /// Allocates both caches, all zero (a page in use must hold numbers), with as many pages as the smallest compiled cache that
    /// holds `cache`.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) if no such kernel is compiled; [`Error::Device`](crate::Error::Device).
    pub fn new(device: &Arc<DeviceKernels>, cache: &KvShape, dtype: Dtype) -> Result<Self> {
        let (kernels, cache) = Self::compiled(device, cache, dtype)?;
        let row = mul("kv cache", mul("kv cache", cache.num_kv_heads, cache.head_dim_qk)?, dtype.size())?;
        let bytes = mul("kv cache", mul("kv cache", cache.num_pages, cache.page_size)?, row)?;
        let (k, v) = (device.zeroed(bytes, "k_cache")?, device.zeroed(bytes, "v_cache")?);
        let resident = [("k_cache", Arc::clone(&k)), ("v_cache", Arc::clone(&v))];
        Ok(AppendKernel { family: Family::new(device, &kernels, "T", &resident)?, row, k, v })
    }

    /// The caches.
    pub fn caches(&self) -> [&Arc<Tensor>; 2] {
        [&self.k, &self.v]
    }

    /// Bytes of a token's keys, or of its values.
    pub fn row_bytes(&self) -> usize {
        self.row
    }

    /// Writes rows `k` and `v` (`[T, num_kv_heads, head_dim]`, the cache's elements) to `slots` (`[T]`: page * page_size + offset,
    /// no two alike).
    ///
    /// # Errors
    /// [`Error::Length`](crate::Error::Length); [`Error::Device`](crate::Error::Device).
    pub fn run(&self, k: &[u8], v: &[u8], slots: &[i32]) -> Result<()> {
        length("k", k.len(), mul("k", slots.len(), self.row)?)?;
        length("v", v.len(), k.len())?;
        let pieces = self.family.pieces(slots.len());
        let family = &self.family;
        let mut numbers = Vec::new();
        family.run(
            &pieces,
            |piece| {
                let rows = piece.start * self.row..(piece.start + piece.len) * self.row;
                numbers.clear();
                numbers.extend_from_slice(&slots[piece.start..piece.start + piece.len]);
                // Padding: slots outside the cache are skipped.
                numbers.resize(piece.size, -1);
                family.tensor(piece, "k")?.write(0, &k[rows.clone()])?;
                family.tensor(piece, "v")?.write(0, &v[rows])?;
                Ok(family.tensor(piece, "slots")?.write(0, &bytes::of_i32(&numbers))?)
            },
            |_| Ok(()),
        )
    }
}
