//! Which pages of a cache are taken: numbers only, wherever the pages lie.
#![forbid(unsafe_code)]

use crate::error::{Error, Result, reserve};

/// Hands out the page numbers of a cache. [`KvPool`](super::KvPool) holds one for pages in host memory; a cache that lies elsewhere
/// (a device) is allocated with one of its own.
#[derive(Debug)]
pub struct PageAllocator {
    page_size: usize,
    used: Vec<bool>,
    free: Vec<u32>,
    peak: usize,
}

impl PageAllocator {
    /// `num_pages` free pages of `page_size` tokens.
    ///
    /// # Errors
    /// [`Error::Empty`] for an extent of 0; [`Error::Unsupported`] for more pages than 32 bits number; [`Error::Overflow`] for more
    /// than there is memory to count.
    pub fn new(num_pages: usize, page_size: usize) -> Result<Self> {
        let pages = Self::check(num_pages, page_size)?;
        let (mut used, mut free) = (Vec::new(), Vec::new());
        reserve("page flags", &mut used, num_pages)?;
        reserve("free pages", &mut free, num_pages)?;
        used.resize(num_pages, false);
        free.extend((0..pages).rev());
        Ok(PageAllocator { page_size, used, free, peak: 0 })
    }

    /// The number of pages, if it is one.
    pub(super) fn check(num_pages: usize, page_size: usize) -> Result<u32> {
        for (got, axis) in [(num_pages, "num_pages"), (page_size, "page_size")] {
            if got == 0 {
                return Err(Error::Empty { operand: "kv pool".into(), axis });
            }
        }
        u32::try_from(num_pages).map_err(|_| Error::Unsupported {
            what: format!("a kv pool of {num_pages} pages"),
            because: "pages are numbered with 32 bits".into(),
        })
    }

    /// Tokens of a page.
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// Takes a free page.
    ///
    /// # Errors
    /// [`Error::OutOfPages`].
    pub fn alloc(&mut self) -> Result<u32> {
        let page = self.free.pop().ok_or(Error::OutOfPages { needed: 1, free: 0 })?;
        self.used[page as usize] = true;
        self.peak = self.peak.max(self.used_pages());
        Ok(page)
    }

    /// Gives a page back.
    ///
    /// # Errors
    /// [`Error::Index`] for a page that does not exist; [`Error::Value`] for one that is free already.
    pub fn free(&mut self, page: u32) -> Result<()> {
        let limit = self.used.len();
        match self.used.get_mut(page as usize) {
            None => Err(Error::Index { operand: "kv page".into(), at: 0, got: page.into(), limit }),
            Some(false) => Err(Error::Value {
                operand: "kv page".into(),
                at: page as usize,
                got: "a free page".into(),
                needed: "an allocated page",
            }),
            Some(used) => {
                *used = false;
                self.free.push(page);
                Ok(())
            }
        }
    }

    /// For each page, whether it is taken.
    pub fn used(&self) -> &[bool] {
        &self.used
    }

    /// Pages taken now.
    pub fn used_pages(&self) -> usize {
        self.used.len() - self.free.len()
    }

    /// Pages free now.
    pub fn free_pages(&self) -> usize {
        self.free.len()
    }

    /// Most pages taken at a time so far.
    pub fn peak_pages(&self) -> usize {
        self.peak
    }
}

impl AsRef<PageAllocator> for PageAllocator {
    fn as_ref(&self) -> &PageAllocator {
        self
    }
}

impl AsMut<PageAllocator> for PageAllocator {
    fn as_mut(&mut self) -> &mut PageAllocator {
        self
    }
}
