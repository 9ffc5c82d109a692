//! Caches, page tables and pools of any extents and contents.

use crate::{EXTENTS, NUMBERS, edges, number, survives};
use proptest::prelude::*;
use trn_kernels::kv::{
    KvConfig, KvFormat, KvPlane, KvPool, KvScale, KvSequence, KvShape, PageTable, PagedKv, append_kv,
};
use trn_kernels::num::Fp8;
use trn_kernels::{Error, HeadsRef};

const FORMATS: [KvFormat; 7] = [
    KvFormat::F32,
    KvFormat::Bf16,
    KvFormat::F16,
    KvFormat::Fp8(Fp8::E4M3Fn),
    KvFormat::Mxfp8(Fp8::E5M2),
    KvFormat::Mxfp4,
    KvFormat::Nvfp4,
];

#[test]
fn caches_of_any_extents() {
    let bytes = [0x11u8; 256];
    for format in FORMATS {
        let _ = survives(format_args!("{format:?}"), || (format.block(), format.has_scale()));
        for num_pages in EXTENTS {
            for page_size in EXTENTS {
                for (heads, dim) in [(0, 1), (1, 0), (1, 32), (2, 33), (usize::MAX, 32), (1, usize::MAX - 31)] {
                    let shape = KvShape {
                        format,
                        num_pages,
                        page_size,
                        num_kv_heads: heads,
                        head_dim_qk: dim,
                        head_dim_vo: dim,
                    };
                    for (codes, scales) in [(0, 0), (32, 1), (256, 8)] {
                        let plane =
                            || KvPlane { codes: &bytes[..codes], block_scales: &bytes[..scales], scale: KvScale::One };
                        let name = format_args!("PagedKv {shape:?}");
                        let kv = survives(name, || PagedKv::new(shape, plane(), plane()));
                        let product = num_pages as u128 * page_size as u128;
                        assert!(!kv.is_ok_and(|kv| kv.shape() != &shape || product > 256), "{name} was accepted");
                        let flagged = survives(name, || PagedKv::with_used(shape, plane(), plane(), &[true; 3]));
                        assert!(!flagged.is_ok_and(|_| num_pages != 3), "{name} was accepted");
                    }
                }
            }
        }
    }
}

/// Pools without memory behind them: a pool of a huge number of pages or layers is refused before it is made.
#[test]
fn pools_of_any_extents() {
    for format in FORMATS {
        for layers in EXTENTS {
            for pages in EXTENTS {
                for (size, heads, dim) in
                    [(1, 1, 32), (usize::MAX, 1, 32), (0, 1, 32), (4, 0, 32), (4, 1, 0), (4, 1, usize::MAX)]
                {
                    let config = KvConfig::new(format, layers, pages, size, heads, dim);
                    let name = format_args!("KvPool {config:?}");
                    let Ok(pool) = survives(name, || KvPool::new(config)) else { continue };
                    assert!(layers <= 64 && pages <= 64, "{name} was accepted");
                    for layer in edges(layers) {
                        assert_eq!(survives(name, || pool.layer(layer).is_ok()), layer < layers, "{name}");
                    }
                    assert_eq!(pool.page_bytes() * pages, pool.capacity_bytes());
                    assert_eq!(
                        (pool.bytes(), pool.peak_bytes(), pool.used_pages(), pool.free_pages()),
                        (0, 0, 0, pages)
                    );
                }
            }
        }
    }
}

#[test]
fn pool_misuse() {
    let mut pool = KvPool::new(KvConfig::new(KvFormat::Nvfp4, 2, 3, 4, 2, 16)).unwrap();
    for page in [0, 2, 3, u32::MAX] {
        assert!(survives(format_args!("free({page})"), || pool.free(page)).is_err());
    }
    for layer in [2, usize::MAX] {
        let error = survives(format_args!("layer({layer})"), || pool.layer(layer)).unwrap_err();
        assert!(!error.to_string().contains("index -"), "{error}");
        assert!(pool.set_scales(layer, KvScale::One, KvScale::One).is_err());
    }
    for x in NUMBERS {
        let good = x.is_normal() && x > 0.0;
        let set = survives(format_args!("scale {x}"), || pool.set_scales(0, KvScale::Tensor(x), KvScale::One));
        assert_eq!(set.is_ok(), good);
        let head = KvScale::Head(vec![1.0, x].into());
        assert_eq!(pool.set_scales(1, KvScale::One, head.clone().into_owned()).is_ok(), good);
    }
    assert!(pool.set_scales(0, KvScale::Head(vec![1.0; 3].into()), KvScale::One).is_err());
    let mut sequence = KvSequence::new(&pool);
    assert!(sequence.is_empty());
    for tokens in [13, usize::MAX / 2, usize::MAX] {
        assert!(survives(format_args!("grow by {tokens}"), || sequence.grow(&mut pool, tokens)).is_err());
        assert_eq!((sequence.len(), sequence.pages().len(), pool.free_pages()), (0, 0, 3));
    }
    sequence.grow(&mut pool, 5).unwrap();
    assert!(survives(format_args!("grow"), || sequence.grow(&mut pool, usize::MAX)).is_err());
    for len in [6, usize::MAX / 2 + 1, usize::MAX] {
        let error = survives(format_args!("truncate to {len}"), || sequence.truncate(&mut pool, len)).unwrap_err();
        assert!(!error.to_string().contains("index -"), "{error}");
    }
    // Another pool: other page sizes are refused, pages it never gave out too.
    let mut other = KvPool::new(KvConfig::new(KvFormat::Bf16, 1, 1, 8, 1, 16)).unwrap();
    assert!(sequence.grow(&mut other, 1).is_err() && sequence.truncate(&mut other, 0).is_err());
    let mut twin = KvPool::new(KvConfig::new(KvFormat::Bf16, 1, 1, 4, 1, 16)).unwrap();
    assert!(survives(format_args!("truncate"), || sequence.truncate(&mut twin, 0)).is_err());
    assert_eq!(sequence.len(), 5);
    // Pages freed behind the sequence's back.
    pool.free(sequence.pages()[0]).unwrap();
    assert!(survives(format_args!("truncate"), || sequence.truncate(&mut pool, 0)).is_err());
    assert_eq!((sequence.len(), sequence.pages().len()), (4, 1));
}

fn hostile() -> impl Strategy<Value = usize> + Clone {
    prop_oneof![6 => 0usize..4, 1 => proptest::sample::select(&EXTENTS[..])]
}

fn table(page_size: impl Strategy<Value = usize>) -> impl Strategy<Value = Result<PageTable, Error>> {
    let counts = prop::collection::vec(0usize..3, 1..4);
    let wrong = prop::option::weighted(0.2, (0usize..4, hostile()));
    (page_size, counts, prop::collection::vec(0u32..5, 9), prop::collection::vec(hostile(), 3), wrong).prop_map(
        |(page_size, counts, pages, last, wrong)| {
            let mut indptr = vec![0];
            for count in &counts {
                indptr.push(indptr.last().unwrap() + count);
            }
            let indices = pages[..*indptr.last().unwrap()].to_vec();
            // Lengths that mostly fit.
            let last = counts.iter().zip(&last).map(|(n, last)| if *n == 0 { 0 } else { (*last).max(1) }).collect();
            if let Some((at, value)) = wrong {
                let at = at % indptr.len();
                indptr[at] = value;
            }
            survives(format_args!("PageTable::new"), || PageTable::new(page_size, indptr, indices, last))
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_page_table(table in table(hostile())) {
        let Ok(table) = table else { return Ok(()) };
        let count = table.num_sequences();
        for b in edges(count) {
            let len = survives(format_args!("sequence {b} of {table:?}"), || (table.seq_len(b), table.pages(b).len()));
            prop_assert!(len.0.div_ceil(table.page_size()) == len.1);
            prop_assert!(b < count || len == (0, 0));
        }
        prop_assert_eq!((table.indptr().len(), table.last_page_len().len()), (count + 1, count));
        let again = PageTable::new(
            table.page_size(), table.indptr().to_vec(), table.indices().to_vec(), table.last_page_len().to_vec(),
        );
        prop_assert_eq!(again, Ok(table));
    }

    #[test]
    fn any_block_table(
        page_size in hostile(),
        entries in prop::collection::vec(prop_oneof![4 => 0i32..4, 1 => any::<i32>(), 1 => Just(-1)], 0..10),
        max_pages in hostile(),
        lens in prop::collection::vec(hostile(), 0..4),
    ) {
        let name = format_args!("from_block_table {page_size} {max_pages} {lens:?}");
        let table = survives(name, || PageTable::from_block_table(page_size, &entries, max_pages, &lens));
        if let Ok(table) = table {
            let got: Vec<usize> = (0..table.num_sequences()).map(|b| table.seq_len(b)).collect();
            prop_assert_eq!(got, lens);
        }
    }

    /// Appends through any table: refused whole, or written.
    #[test]
    fn any_append(
        format in proptest::sample::select(&FORMATS[..]),
        table in table(Just(2)),
        append in prop::collection::vec(hostile(), 0..5),
        fitting in any::<bool>(),
        (layer, tokens) in (hostile(), 0usize..5),
        x in prop::collection::vec(number(), 160),
    ) {
        let Ok(table) = table else { return Ok(()) };
        let mut pool = KvPool::new(KvConfig::new(format, 2, 4, 2, 1, 32)).unwrap();
        for _ in 0..3 {
            pool.alloc().unwrap();
        }
        // As many new tokens as each sequence has, or anything.
        let append = if fitting {
            let mut indptr = vec![0];
            indptr.extend((0..table.num_sequences()).scan(0, |end, b| {
                *end += table.seq_len(b).min(1);
                Some(*end)
            }));
            indptr
        } else {
            append
        };
        let tokens = if fitting { append.last().copied().unwrap_or(0) } else { tokens };
        let view = HeadsRef::new(&x[..tokens * 32], tokens, 1, 32).unwrap();
        let bytes = |pool: &KvPool| -> Vec<u8> {
            let layers = (0..2).map(|l| pool.layer(l).unwrap());
            layers.flat_map(|kv| [kv.k().codes, kv.k().block_scales, kv.v().codes, kv.v().block_scales].concat()).collect()
        };
        let before = bytes(&pool);
        let result = survives(format_args!("append_kv"), || append_kv(&mut pool, layer, &table, &append, view, view));
        if result.is_err() {
            prop_assert_eq!(bytes(&pool), before);
            // Nor has the refusal left a mark: the same call is refused for the same reason.
            prop_assert_eq!(append_kv(&mut pool, layer, &table, &append, view, view), result);
        }
    }
}
