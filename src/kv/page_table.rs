//! Which pages hold which tokens.
#![forbid(unsafe_code)]

use super::KvSequence;
use crate::error::{Error, Result, length};

/// Pages of a batch of sequences, as FlashInfer lays them: sequence b owns pages `indices[indptr[b]..indptr[b + 1]]`; all are
/// full but the last, which holds `last_page_len[b]` tokens.
///
/// Token p of a sequence lies in its page `p / page_size`, slot `p % page_size`. A sequence of no tokens owns no pages and has
/// `last_page_len` 0. Validated when made; that pages lie inside a pool is checked by whoever reads or writes through it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageTable {
    page_size: usize,
    indptr: Vec<usize>,
    indices: Vec<u32>,
    last_page_len: Vec<usize>,
}

const TABLE: &str = "page table";

/// Asks that an `indptr` begin at 0, never decrease and end at `end`.
pub(crate) fn check_indptr(operand: &'static str, indptr: &[usize], end: usize) -> Result<()> {
    let wrong = |at: usize, needed: &'static str| {
        let got = indptr.get(at).map_or("nothing".into(), usize::to_string);
        Err(Error::Value { operand: operand.into(), at, got, needed })
    };
    if indptr.first() != Some(&0) {
        return wrong(0, "0, the first offset");
    }
    if indptr.len() < 2 {
        return Err(Error::Empty { operand: operand.into(), axis: "batch" });
    }
    if let Some(at) = indptr.windows(2).position(|w| w[0] > w[1]) {
        return wrong(at + 1, "an offset not below the one before");
    }
    if indptr.last() != Some(&end) {
        return wrong(indptr.len() - 1, "the number of rows (the end of what it divides)");
    }
    Ok(())
}

impl PageTable {
    /// A table from FlashInfer's three arrays. `indptr`: `[batch + 1]`; `indices`: `[indptr[batch]]` page numbers;
    /// `last_page_len`: `[batch]`, 1 to `page_size`, 0 for a sequence without pages.
    ///
    /// # Errors
    /// [`Error::Empty`] for no sequence or a page size of 0; [`Error::Value`] for an `indptr` that does not start at 0, decreases
    /// or does not end at the number of indices, or for a last page length out of range; [`Error::Length`];
    /// [`Error::Overflow`] if a sequence would hold more tokens than `i64` counts.
    pub fn new(page_size: usize, indptr: Vec<usize>, indices: Vec<u32>, last_page_len: Vec<usize>) -> Result<Self> {
        if page_size == 0 {
            return Err(Error::Empty { operand: TABLE.into(), axis: "page_size" });
        }
        check_indptr("page table indptr", &indptr, indices.len())?;
        length("page table last_page_len", last_page_len.len(), indptr.len() - 1)?;
        for (at, (ends, &last)) in indptr.windows(2).zip(&last_page_len).enumerate() {
            let wrong =
                |needed| Error::Value { operand: "page table last_page_len".into(), at, got: last.to_string(), needed };
            match ends[1] - ends[0] {
                0 if last != 0 => return Err(wrong("0 for a sequence without pages")),
                0 => {}
                _ if last == 0 || last > page_size => return Err(wrong("1 to page_size tokens in the last page")),
                pages => {
                    let tokens = pages.checked_mul(page_size).and_then(|t| i64::try_from(t).ok());
                    tokens.ok_or(Error::Overflow { operand: TABLE.into() })?;
                }
            }
        }
        Ok(PageTable { page_size, indptr, indices, last_page_len })
    }

    /// A table from vLLM's rectangular one. `block_table`: `[batch, max_pages]`, row-major, padded with -1; `lens`: `[batch]`
    /// tokens. Entries past a sequence's last page are not looked at.
    ///
    /// # Errors
    /// [`Error::Empty`]; [`Error::Length`] unless `block_table` holds `batch * max_pages`; [`Error::Extent`] if a sequence is
    /// longer than its row; [`Error::Index`] for a negative page inside a sequence; [`Error::Overflow`].
    pub fn from_block_table(page_size: usize, block_table: &[i32], max_pages: usize, lens: &[usize]) -> Result<Self> {
        if page_size == 0 {
            return Err(Error::Empty { operand: TABLE.into(), axis: "page_size" });
        }
        length("block table", block_table.len(), crate::error::mul("block table", lens.len(), max_pages)?)?;
        let (mut indptr, mut indices) = (vec![0], Vec::new());
        for (b, &len) in lens.iter().enumerate() {
            let pages = len.div_ceil(page_size);
            if pages > max_pages {
                let operand = format!("block table row {b}").into();
                return Err(Error::Extent { operand, axis: "max_pages", got: max_pages, needed: pages });
            }
            for (at, &page) in block_table.iter().enumerate().skip(b * max_pages).take(pages) {
                indices.push(u32::try_from(page).map_err(|_| Error::Index {
                    operand: "block table".into(),
                    at,
                    got: page.into(),
                    limit: 1 << 31,
                })?);
            }
            indptr.push(indices.len());
        }
        let last = lens.iter().map(|&len| last_page_len(len, page_size)).collect();
        Self::new(page_size, indptr, indices, last)
    }

    /// The table of these sequences, in this order.
    ///
    /// # Errors
    /// [`Error::Empty`] for no sequence; [`Error::Extent`] if their page sizes differ.
    pub fn from_sequences<'a>(sequences: impl IntoIterator<Item = &'a KvSequence>) -> Result<Self> {
        let mut table = PageTable { page_size: 0, indptr: Vec::new(), indices: Vec::new(), last_page_len: Vec::new() };
        table.refill(sequences)?;
        Ok(table)
    }

    /// Makes this the table of these sequences, keeping its memory. After an error the table is empty of sequences and every
    /// use of it is refused.
    ///
    /// # Errors
    /// As [`PageTable::from_sequences`].
    pub fn refill<'a>(&mut self, sequences: impl IntoIterator<Item = &'a KvSequence>) -> Result<()> {
        self.indptr.clear();
        self.indices.clear();
        self.last_page_len.clear();
        let mut page_size = None;
        for sequence in sequences {
            let needed = *page_size.get_or_insert(sequence.page_size());
            if sequence.page_size() != needed {
                self.indptr.clear();
                let operand = "kv sequence".into();
                return Err(Error::Extent { operand, axis: "page_size", got: sequence.page_size(), needed });
            }
            if self.indptr.is_empty() {
                self.indptr.push(0);
            }
            self.indices.extend_from_slice(sequence.pages());
            self.indptr.push(self.indices.len());
            self.last_page_len.push(last_page_len(sequence.len(), needed));
        }
        self.page_size = page_size.ok_or(Error::Empty { operand: TABLE.into(), axis: "batch" })?;
        Ok(())
    }

    /// Tokens of a page.
    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// Number of sequences.
    pub fn num_sequences(&self) -> usize {
        self.indptr.len().saturating_sub(1)
    }

    /// Offsets of each sequence's pages in [`PageTable::indices`]: `[num_sequences + 1]`.
    pub fn indptr(&self) -> &[usize] {
        &self.indptr
    }

    /// Pages of all sequences, one after the other.
    pub fn indices(&self) -> &[u32] {
        &self.indices
    }

    /// Tokens in each sequence's last page: `[num_sequences]`.
    pub fn last_page_len(&self) -> &[usize] {
        &self.last_page_len
    }

    /// Pages of sequence `b`; none outside the batch.
    pub fn pages(&self, b: usize) -> &[u32] {
        match (self.indptr.get(b), self.indptr.get(b.saturating_add(1))) {
            (Some(&from), Some(&to)) => &self.indices[from..to],
            _ => &[],
        }
    }

    /// Tokens of sequence `b`; 0 outside the batch.
    pub fn seq_len(&self, b: usize) -> usize {
        match (self.pages(b).len(), self.last_page_len.get(b)) {
            (pages @ 1.., Some(last)) => (pages - 1) * self.page_size + last,
            _ => 0,
        }
    }
}

fn last_page_len(len: usize, page_size: usize) -> usize {
    if len == 0 { 0 } else { (len - 1) % page_size + 1 }
}
