//! Page tables of any numbers, used for appending and for a decode step over a small pool with freed pages: what is accepted is
//! consistent and can be walked, what is not is refused.
#![no_main]
#![forbid(unsafe_code)]

use trn_kernels::attention::{AttentionOut, AttentionSpec, plan_decode};
use trn_kernels::kv::{KvConfig, KvFormat, KvPool, PageTable, append_kv};
use trn_kernels::{Cpu, HeadsMut, HeadsRef, Workspace};

const PAGE_SIZE: usize = 4;
const HEAD_DIM: usize = 32;

/// Numbers out of bytes: mostly small ones, sometimes any.
struct Numbers<'a>(&'a [u8]);

impl Numbers<'_> {
    fn next(&mut self) -> usize {
        match self.0.split_first() {
            None => 0,
            Some((255, rest)) => match rest.split_first_chunk::<8>() {
                Some((word, rest)) => {
                    self.0 = rest;
                    u64::from_le_bytes(*word) as usize
                }
                None => {
                    self.0 = &[];
                    usize::MAX
                }
            },
            Some((byte, rest)) => {
                self.0 = rest;
                usize::from(*byte)
            }
        }
    }

    fn list(&mut self) -> Vec<usize> {
        let len = self.next() % 16;
        (0..len).map(|_| self.next()).collect()
    }
}

fn table(numbers: &mut Numbers<'_>) -> trn_kernels::Result<PageTable> {
    let page_size = if numbers.next() % 8 == 0 { numbers.next() } else { PAGE_SIZE };
    if numbers.next() % 2 == 0 {
        let (indptr, indices, last) = (numbers.list(), numbers.list(), numbers.list());
        return PageTable::new(page_size, indptr, indices.into_iter().map(|i| i as u32).collect(), last);
    }
    let (pages, lens) = (numbers.list(), numbers.list());
    let pages: Vec<i32> = pages.into_iter().map(|p| p as i32).collect();
    PageTable::from_block_table(page_size, &pages, numbers.next(), &lens)
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut numbers = Numbers(data);
    let Ok(table) = table(&mut numbers) else { return };
    let batch = table.num_sequences();
    assert_eq!((0..batch).map(|b| table.pages(b).len()).sum::<usize>(), table.indices().len());
    for b in 0..batch {
        let (pages, tokens) = (table.pages(b).len(), table.seq_len(b));
        assert_eq!(tokens.div_ceil(table.page_size()), pages);
    }
    assert!(table.pages(batch).is_empty() && table.pages(usize::MAX).is_empty() && table.seq_len(usize::MAX) == 0);

    // Eight pages, of which 2 and 5 have been freed again.
    let mut pool = KvPool::new(KvConfig::new(KvFormat::Bf16, 1, 8, PAGE_SIZE, 1, HEAD_DIM)).expect("a small pool");
    let pages: Vec<u32> = (0..8).map(|_| pool.alloc().expect("a page")).collect();
    for page in [pages[2], pages[5]] {
        pool.free(page).expect("an allocated page");
    }
    let bad = |page: &u32| ![0, 1, 3, 4, 6, 7].map(|i: usize| pages[i]).contains(page);
    let refusable = table.indices().iter().any(bad) || table.page_size() != PAGE_SIZE;

    let append = numbers.list();
    let tokens = append.last().copied().unwrap_or(0).min(64);
    let x = vec![1.0f32; tokens * HEAD_DIM];
    let heads = || HeadsRef::new(&x, tokens, 1, HEAD_DIM).expect("as long as its extents");
    let appended = append_kv(&mut pool, 0, &table, &append, heads(), heads());
    assert!(!(appended.is_ok() && refusable), "wrote through a page that is free or outside the pool");

    let kv = pool.layer(0).expect("layer 0");
    let spec = AttentionSpec::new(2, 1, HEAD_DIM);
    let plan = match plan_decode(&spec, &kv, &table) {
        Ok(plan) => plan,
        Err(e) => return assert!(refusable, "refused a good table: {e}"),
    };
    assert!(!refusable, "planned over a page that is free or outside the pool");
    let q = vec![1.0f32; batch * 2 * HEAD_DIM];
    let mut y = vec![f32::NAN; q.len()];
    let queries = HeadsRef::new(&q, batch, 2, HEAD_DIM).expect("as long as its extents");
    let out =
        AttentionOut { out: HeadsMut::new(&mut y, batch, 2, HEAD_DIM).expect("as long as its extents"), lse: None };
    Cpu::detect().decode(&plan, queries, &kv, None, out, &mut Workspace::new()).expect("a planned step runs");
    // The pool holds zeros and ones: their weighted mean lies between, but for weights rounded to bf16 (half an ulp is 2^-9).
    assert!(y.iter().all(|y| (0.0..=1.0 + 1.0 / 256.0).contains(y)), "{y:?}");
});
