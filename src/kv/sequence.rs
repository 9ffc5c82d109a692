//! One growing sequence and the pages it owns.
#![forbid(unsafe_code)]

use super::PageAllocator;
use crate::error::{Error, Result, extent};

/// Pages and length of one sequence in a [`KvPool`](super::KvPool), or of whatever a [`PageAllocator`] counts. It owns its pages: give them back with [`KvSequence::free`]; dropping it
/// leaves them allocated.
///
/// ```
/// # use trn_kernels::kv::*;
/// # fn main() -> trn_kernels::Result<()> {
/// # let mut pool = KvPool::new(KvConfig::new(KvFormat::Bf16, 1, 8, 16, 2, 64))?;
/// let mut sequence = KvSequence::new(&pool);
/// sequence.grow(&mut pool, 20)?; // the next 20 tokens are its own: append them
/// let table = PageTable::from_sequences([&sequence])?;
/// assert_eq!((table.seq_len(0), pool.used_pages()), (20, 2));
/// sequence.free(&mut pool)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, PartialEq, Eq)]
pub struct KvSequence {
    page_size: usize,
    pages: Vec<u32>,
    len: usize,
}

impl KvSequence {
    /// An empty sequence with the pool's page size.
    pub fn new(pool: &impl AsRef<PageAllocator>) -> Self {
        KvSequence { page_size: pool.as_ref().page_size(), pages: Vec::new(), len: 0 }
    }

    /// Tokens.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds no token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens of a page.
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// Its pages, in order.
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// Makes the sequence `tokens` longer and takes the pages they need. The new tokens hold nothing until
    /// [`append_kv`](super::append_kv) writes them. All or nothing.
    ///
    /// # Errors
    /// [`Error::OutOfPages`]; [`Error::Overflow`]; [`Error::Extent`] for a pool of another page size.
    pub fn grow(&mut self, pool: &mut impl AsMut<PageAllocator>, tokens: usize) -> Result<()> {
        let pool = pool.as_mut();
        extent("kv sequence", "page_size", self.page_size, pool.page_size())?;
        let len = self.len.checked_add(tokens).ok_or(Error::Overflow { operand: "kv sequence".into() })?;
        let needed = len.div_ceil(self.page_size) - self.pages.len();
        if needed > pool.free_pages() {
            return Err(Error::OutOfPages { needed, free: pool.free_pages() });
        }
        for _ in 0..needed {
            self.pages.push(pool.alloc()?);
        }
        self.len = len;
        Ok(())
    }

    /// Forgets all tokens from `len` on and gives back the pages that held only them.
    ///
    /// # Errors
    /// [`Error::Index`] if the sequence is shorter than `len`; [`Error::Value`] if the pool says a page is free or foreign.
    pub fn truncate(&mut self, pool: &mut impl AsMut<PageAllocator>, len: usize) -> Result<()> {
        let pool = pool.as_mut();
        if len > self.len {
            return Err(Error::index("kv sequence length", 0, len, self.len.saturating_add(1)));
        }
        extent("kv sequence", "page_size", self.page_size, pool.page_size())?;
        let keep = len.div_ceil(self.page_size.max(1));
        while let Some(&page) = self.pages.get(keep..).and_then(<[u32]>::last) {
            pool.free(page)?;
            self.pages.pop();
            self.len = self.len.min(self.pages.len() * self.page_size);
        }
        self.len = len;
        Ok(())
    }

    /// Gives all pages back.
    ///
    /// # Errors
    /// As [`KvSequence::truncate`].
    pub fn free(mut self, pool: &mut impl AsMut<PageAllocator>) -> Result<()> {
        self.truncate(pool, 0)
    }
}
