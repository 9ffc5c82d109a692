//! The KV cache: page tables, pool, sequences, appending.
#![forbid(unsafe_code)]

use half::bf16;
use proptest::prelude::*;
use trn_kernels::kv::{
    KvConfig, KvFormat, KvPlane, KvPool, KvScale, KvSequence, KvShape, PageTable, PagedKv, append_kv,
};
use trn_kernels::num::Fp8;
use trn_kernels::quant::ScaleRule;
use trn_kernels::{Error, HeadsRef};

const FORMATS: [KvFormat; 8] = [
    KvFormat::F32,
    KvFormat::Bf16,
    KvFormat::F16,
    KvFormat::Fp8(Fp8::E4M3Fn),
    KvFormat::Fp8(Fp8::E5M2),
    KvFormat::Mxfp8(Fp8::E4M3Fn),
    KvFormat::Mxfp4,
    KvFormat::Nvfp4,
];
const HEADS: usize = 2;
const DIM: usize = 32;

fn pool(format: KvFormat, num_pages: usize, page_size: usize) -> KvPool {
    let config = KvConfig::new(format, 2, num_pages, page_size, HEADS, DIM);
    let mut pool = KvPool::new(KvConfig { rule: ScaleRule::Even, ..config }).unwrap();
    if format.has_scale() {
        for layer in 0..2 {
            pool.set_scales(layer, KvScale::Tensor(0.5), KvScale::Head(vec![0.25, 3.0].into())).unwrap();
        }
    }
    pool
}

fn values(tokens: usize, salt: usize) -> Vec<f32> {
    (0..tokens * HEADS * DIM).map(|i| ((i * 7919 + salt) % 1009) as f32 / 128.0 - 3.9).collect()
}

fn heads(x: &[f32]) -> HeadsRef<'_, f32> {
    HeadsRef::new(x, x.len() / (HEADS * DIM), HEADS, DIM).unwrap()
}

/// Appends rows `from..to` of the values to the sequence.
fn append(pool: &mut KvPool, sequence: &mut KvSequence, all: (&[f32], &[f32]), new: usize) {
    let rows = sequence.len() * HEADS * DIM..(sequence.len() + new) * HEADS * DIM;
    sequence.grow(pool, new).unwrap();
    let table = PageTable::from_sequences([&*sequence]).unwrap();
    append_kv(pool, 1, &table, &[0, new], heads(&all.0[rows.clone()]), heads(&all.1[rows])).unwrap();
}

fn bytes(pool: &KvPool, layer: usize) -> [Vec<u8>; 4] {
    let kv = pool.layer(layer).unwrap();
    [kv.k().codes, kv.k().block_scales, kv.v().codes, kv.v().block_scales].map(<[u8]>::to_vec)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_chunking_gives_the_same_bytes(
        format in 0..FORMATS.len(),
        page_size in 1usize..9,
        chunks in prop::collection::vec(0usize..12, 1..12),
    ) {
        let tokens: usize = chunks.iter().sum();
        let (k, v) = (values(tokens, 3), values(tokens, 11));
        let pages = tokens.div_ceil(page_size) + 1;
        let run = |chunks: &[usize]| {
            let mut pool = pool(FORMATS[format], pages, page_size);
            let mut sequence = KvSequence::new(&pool);
            for &new in chunks {
                append(&mut pool, &mut sequence, (&k, &v), new);
            }
            (bytes(&pool, 1), bytes(&pool, 0))
        };
        let (whole, other_layer) = run(&[tokens]);
        prop_assert_eq!(&whole, &run(&chunks).0);
        prop_assert_eq!(&whole, &run(&vec![1; tokens]).0);
        // Only the layer that was named is written, and it is.
        prop_assert!(other_layer.iter().flatten().all(|b| *b == 0));
        prop_assert!(tokens == 0 || whole.iter().flatten().any(|b| *b != 0));
    }

    /// Nothing a caller may put into a page table panics; what is accepted holds together.
    #[test]
    fn page_tables_of_anything(
        page_size in 0usize..5,
        indptr in prop::collection::vec(0usize..6, 0..5),
        indices in prop::collection::vec(any::<u32>(), 0..6),
        last in prop::collection::vec(0usize..7, 0..5),
        huge in prop::bool::weighted(0.1),
        orderly in prop::bool::weighted(0.7),
    ) {
        let page_size = if huge { usize::MAX - page_size } else { page_size };
        let (mut indptr, mut last) = (indptr, last);
        if orderly {
            // Nearly right, so that most get past the first checks.
            indptr.iter_mut().for_each(|i| *i = (*i).min(indices.len()));
            indptr.extend([0, indices.len()]);
            indptr.sort_unstable();
            last.resize(indptr.len() - 1, 1);
            for (last, ends) in last.iter_mut().zip(indptr.windows(2)) {
                *last = if ends[0] == ends[1] { 0 } else { (*last).max(1) };
            }
        }
        let mut pool = pool(KvFormat::Mxfp4, 4, 2);
        if let Ok(table) = PageTable::new(page_size, indptr, indices, last) {
            for b in 0..table.num_sequences() {
                prop_assert!(table.seq_len(b) <= table.pages(b).len().saturating_mul(page_size));
                prop_assert_eq!(table.seq_len(b) == 0, table.pages(b).is_empty());
            }
            let none = HeadsRef::<f32>::new(&[], 0, HEADS, DIM).unwrap();
            let new = vec![0; table.num_sequences() + 1];
            // No page is allocated: only a table without pages may pass.
            prop_assert_eq!(
                append_kv(&mut pool, 0, &table, &new, none, none).is_ok(),
                table.indices().is_empty() && page_size == 2
            );
        }
    }
}

/// What is stored is what the format says.
#[test]
fn stored_bytes() {
    let x: Vec<f32> = (0..HEADS * DIM).map(|i| i as f32 / 8.0 - 2.0).collect();
    let stored = |format| {
        let mut pool = pool(format, 1, 1);
        let mut sequence = KvSequence::new(&pool);
        append(&mut pool, &mut sequence, (&x, &x), 1);
        bytes(&pool, 1)
    };
    let [k, scales, ..] = stored(KvFormat::Bf16);
    let want: Vec<u8> = x.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
    assert_eq!((k, scales.len()), (want, 0));
    let [k, _, v, _] = stored(KvFormat::Fp8(Fp8::E4M3Fn));
    let values = Fp8::E4M3Fn.values();
    for (i, &x) in x.iter().enumerate() {
        // x / 0.5 has few enough bits to be exact; V's second head is divided by 3.
        let v_scale = [0.25, 3.0][i / DIM];
        assert!((values[k[i] as usize] * 0.5 - x).abs() <= x.abs() / 16.0 + 1e-3, "k {i}");
        assert!((values[v[i] as usize] * v_scale - x).abs() <= x.abs() / 16.0 + v_scale * 1e-3, "v {i}");
    }
    let [k, scales, ..] = stored(KvFormat::Mxfp4);
    // Head 0 reaches 2, head 1 reaches 5.875: scales 2^(1 - 2) and 2^(2 - 2), for 5.875 = 1.47 x 4 is below EVEN's 1.75.
    assert_eq!(scales, [126, 127]);
    assert_eq!(k[0] & 15, 0b1110, "-2 is -4 x 0.5, in the low nibble");
    assert_eq!(k.len(), HEADS * DIM / 2);
}

#[test]
fn what_is_not_finite_never_becomes_a_number() {
    for format in FORMATS {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = values(1, 0);
            x[5] = bad;
            let mut pool = pool(format, 1, 1);
            let mut sequence = KvSequence::new(&pool);
            append(&mut pool, &mut sequence, (&x, &x), 1);
            let [k, scales, ..] = bytes(&pool, 1);
            let kept = match format {
                KvFormat::F32 => !f32::from_le_bytes(k[20..24].try_into().unwrap()).is_finite(),
                KvFormat::Bf16 => !bf16::from_le_bytes([k[10], k[11]]).is_finite(),
                KvFormat::F16 => !half::f16::from_le_bytes([k[10], k[11]]).is_finite(),
                KvFormat::Fp8(element) => element.values()[k[5] as usize].is_nan(),
                KvFormat::Mxfp8(_) | KvFormat::Mxfp4 => scales[0] == 255 && scales[1] != 255,
                KvFormat::Nvfp4 => scales[0] == 0x7F && scales[1] != 0x7F,
            };
            assert!(kept, "{format:?} {bad}");
        }
    }
}

#[test]
fn pages_come_and_go() {
    let mut pool = pool(KvFormat::Mxfp8(Fp8::E4M3Fn), 3, 4);
    // 4 tokens x 2 heads x (32 codes + 1 scale) x K and V x 2 layers.
    assert_eq!(pool.page_bytes(), 4 * 2 * 33 * 2 * 2);
    assert_eq!(pool.capacity_bytes(), 3 * pool.page_bytes());
    let mut a = KvSequence::new(&pool);
    a.grow(&mut pool, 5).unwrap();
    assert_eq!((a.len(), a.pages().len(), pool.bytes()), (5, 2, 2 * pool.page_bytes()));
    a.grow(&mut pool, 3).unwrap();
    assert_eq!(a.pages().len(), 2, "the last page had room");
    let mut b = KvSequence::new(&pool);
    assert_eq!(b.grow(&mut pool, 5), Err(Error::OutOfPages { needed: 2, free: 1 }));
    assert!(b.is_empty() && b.pages().is_empty(), "all or nothing");
    a.truncate(&mut pool, 4).unwrap();
    assert_eq!((a.len(), pool.free_pages()), (4, 2));
    b.grow(&mut pool, 5).unwrap();
    assert_eq!(pool.peak_bytes(), 3 * pool.page_bytes());
    a.free(&mut pool).unwrap();
    b.free(&mut pool).unwrap();
    assert_eq!((pool.used_pages(), pool.bytes(), pool.peak_bytes()), (0, 0, 3 * pool.page_bytes()));
    assert_eq!(
        KvSequence::new(&pool).grow(&mut pool, usize::MAX),
        Err(Error::OutOfPages { needed: usize::MAX.div_ceil(4), free: 3 })
    );
}

#[test]
fn refusals_of_the_pool() {
    let mut pool = pool(KvFormat::Bf16, 2, 4);
    assert_eq!(pool.free(2).unwrap_err().to_string(), "kv page[0]: index 2 is out of range, needed 0 <= index < 2");
    let page = pool.alloc().unwrap();
    pool.free(page).unwrap();
    assert_eq!(pool.free(page).unwrap_err().to_string(), "kv page[0]: got a free page, needed an allocated page");
    assert_eq!(
        pool.layer(2).unwrap_err().to_string(),
        "kv pool layer[0]: index 2 is out of range, needed 0 <= index < 2"
    );
    assert_eq!(
        pool.set_scales(0, KvScale::Tensor(1.0), KvScale::One).unwrap_err().to_string(),
        "k scale: given but not wanted: Bf16 stores no f32 scale; use KvScale::One"
    );
    let mut fp8 = self::pool(KvFormat::Fp8(Fp8::E4M3Fn), 2, 4);
    for bad in [f32::NAN, f32::INFINITY, 0.0, -1.0, 1e-40] {
        let error = fp8.set_scales(0, KvScale::Head(vec![1.0, bad].into()), KvScale::One).unwrap_err();
        assert_eq!(error.to_string(), format!("k scale[1]: got {bad}, needed a positive normal scale"));
    }
    assert_eq!(
        fp8.set_scales(0, KvScale::One, KvScale::Head(vec![1.0].into())).unwrap_err().to_string(),
        "v scale: the slice has 1 elements, its extents need 2"
    );
    let new = |format, layers, pages, size, heads, dim| {
        KvPool::new(KvConfig::new(format, layers, pages, size, heads, dim)).unwrap_err().to_string()
    };
    let huge = usize::MAX / 2;
    assert_eq!(new(KvFormat::Bf16, 0, 1, 1, 1, 1), "kv pool: axis num_layers is empty, needed at least 1");
    assert_eq!(new(KvFormat::Bf16, 1, 0, 1, 1, 1), "kv pool: axis num_pages is empty, needed at least 1");
    assert_eq!(new(KvFormat::Bf16, 1, 1, 0, 1, 1), "kv cache: axis page_size is empty, needed at least 1");
    assert_eq!(new(KvFormat::Bf16, 1, 1, 1, 1, 0), "kv cache: axis head_dim_qk is empty, needed at least 1");
    assert_eq!(new(KvFormat::Mxfp4, 1, 1, 1, 1, 48), "kv cache: axis head_dim_qk is 48, needed a multiple of 32");
    assert_eq!(
        new(KvFormat::F32, 1, 2, huge, 1, 1),
        "kv cache: the product of its extents does not fit in usize or in memory"
    );
    assert_eq!(
        new(KvFormat::Fp8(Fp8::E4M3Fn), huge, 8, 8, 8, 8),
        "kv pool: the product of its extents does not fit in usize or in memory"
    );
    assert!(new(KvFormat::Fp8(Fp8::E4M3Fn), 1 << 40, 1 << 10, 8, 8, 8).contains("is not supported"));
    assert!(new(KvFormat::Fp8(Fp8::E4M3Fn), 1, 1 << 33, 1, 1, 1).contains("pages are numbered with 32 bits"));
}

#[test]
fn refusals_of_page_tables() {
    let new = |size, indptr: &[usize], indices: &[u32], last: &[usize]| {
        PageTable::new(size, indptr.into(), indices.into(), last.into()).unwrap_err().to_string()
    };
    assert_eq!(new(0, &[0, 0], &[], &[0]), "page table: axis page_size is empty, needed at least 1");
    assert_eq!(new(4, &[0], &[], &[]), "page table indptr: axis batch is empty, needed at least 1");
    assert_eq!(
        new(4, &[0, 2, 1], &[0], &[1, 1]),
        "page table indptr[2]: got 1, needed an offset not below the one before"
    );
    assert_eq!(new(4, &[0, 1], &[0], &[]), "page table last_page_len: the slice has 0 elements, its extents need 1");
    assert_eq!(
        new(4, &[0, 1], &[0], &[5]),
        "page table last_page_len[0]: got 5, needed 1 to page_size tokens in the last page"
    );
    assert_eq!(new(4, &[0, 0], &[], &[1]), "page table last_page_len[0]: got 1, needed 0 for a sequence without pages");
    assert_eq!(
        new(usize::MAX, &[0, 1], &[0], &[1]),
        "page table: the product of its extents does not fit in usize or in memory"
    );
    let block = |table: &[i32], pages, lens: &[usize]| {
        PageTable::from_block_table(4, table, pages, lens).unwrap_err().to_string()
    };
    assert_eq!(block(&[0, -1], 2, &[5]), "block table[1]: index -1 is out of range, needed 0 <= index < 2147483647");
    assert_eq!(block(&[0, 1], 2, &[9]), "block table row 0: axis max_pages is 2, needed 3");
    assert_eq!(block(&[0, 1], 3, &[9]), "block table: the slice has 2 elements, its extents need 3");
    let table = PageTable::from_block_table(4, &[7, -1, 2, 3], 2, &[4, 5]).unwrap();
    assert_eq!((table.indices(), table.indptr(), table.last_page_len()), (&[7, 2, 3][..], &[0, 1, 3][..], &[4, 1][..]));
    assert_eq!((table.seq_len(0), table.seq_len(1), table.seq_len(2)), (4, 5, 0));
    assert_eq!(
        PageTable::from_sequences([]).unwrap_err().to_string(),
        "page table: axis batch is empty, needed at least 1"
    );
}

/// Tables that would let one sequence write what another shows.
#[test]
fn refusals_of_append_write_nothing() {
    let mut pool = pool(KvFormat::Bf16, 4, 4);
    for _ in 0..3 {
        pool.alloc().unwrap();
    }
    let before = bytes(&pool, 0);
    let (k, v) = (values(6, 1), values(6, 2));
    let mut refused = |indptr: &[usize], pages: &[u32], last: &[usize], new: &[usize]| {
        let table = PageTable::new(4, indptr.into(), pages.into(), last.into()).unwrap();
        let tokens = *new.last().unwrap() * HEADS * DIM;
        let error = append_kv(&mut pool, 0, &table, new, heads(&k[..tokens]), heads(&v[..tokens])).unwrap_err();
        assert_eq!(bytes(&pool, 0), before);
        error.to_string()
    };
    let shared = ": got page 1 a second time, needed that no other place of the table show a slot this append writes";
    // Both write page 1.
    assert_eq!(refused(&[0, 1, 2], &[1, 1], &[1, 2], &[0, 1, 2]), format!("page table indices[1]{shared}"));
    // Sequence 0 writes slot 1 of page 1, which sequence 1 shows.
    assert_eq!(refused(&[0, 1, 2], &[1, 1], &[2, 2], &[0, 1, 1]), format!("page table indices[1]{shared}"));
    // One sequence has the page twice and writes its second place.
    assert_eq!(refused(&[0, 2], &[1, 1], &[1], &[0, 1]), format!("page table indices[0]{shared}"));
    assert_eq!(
        refused(&[0, 1], &[3], &[1], &[0, 1]),
        "page table indices[0]: got page 3, which is free, needed an allocated page"
    );
    assert_eq!(
        refused(&[0, 1], &[4], &[1], &[0, 1]),
        "page table indices[0]: index 4 is out of range, needed 0 <= index < 4"
    );
    assert_eq!(refused(&[0, 1], &[0], &[2], &[0, 3]), "tokens appended to sequence 0: axis tokens is 3, needed 2");
    assert_eq!(refused(&[0, 1], &[0], &[2], &[0, 1, 2]), "append_indptr: axis batch is 2, needed 1");

    // A shared prefix that nobody writes is fine: sequence 1 forks from slot 1 of a page of its own.
    let table = PageTable::new(4, vec![0, 2, 4], vec![0, 1, 0, 2], vec![1, 1]).unwrap();
    append_kv(&mut pool, 0, &table, &[0, 1, 2], heads(&k[..2 * 64]), heads(&v[..2 * 64])).unwrap();
    // A full page shown whole by two, written by one beyond what the other shows.
    let table = PageTable::new(4, vec![0, 1, 2], vec![0, 0], vec![4, 3]).unwrap();
    append_kv(&mut pool, 0, &table, &[0, 1, 1], heads(&k[..64]), heads(&v[..64])).unwrap();
    let wrong = HeadsRef::new(&k[..64], 2, 1, DIM).unwrap();
    let error = append_kv(&mut pool, 0, &table, &[0, 1, 1], wrong, wrong).unwrap_err();
    assert_eq!(error.to_string(), "k: axis num_kv_heads is 1, needed 2");
    let error = append_kv(&mut pool, 9, &table, &[0, 1, 1], heads(&k[..64]), heads(&v[..64])).unwrap_err();
    assert_eq!(error.to_string(), "kv pool layer[0]: index 9 is out of range, needed 0 <= index < 2");
}

#[test]
fn refusals_of_borrowed_caches() {
    let shape = KvShape {
        format: KvFormat::Mxfp4,
        num_pages: 1,
        page_size: 2,
        num_kv_heads: 1,
        head_dim_qk: 32,
        head_dim_vo: 64,
    };
    let plane =
        |codes: &'static [u8], block_scales: &'static [u8]| KvPlane { codes, block_scales, scale: KvScale::One };
    let good = (plane(&[0; 32], &[0; 2]), plane(&[0; 64], &[0; 4]));
    let new = |k: &KvPlane<'_>, v: &KvPlane<'_>, used: &[bool]| {
        PagedKv::with_used(shape, k.clone(), v.clone(), used).map(|_| ()).map_err(|e| e.to_string())
    };
    assert_eq!(new(&good.0, &good.1, &[]), Ok(()));
    let error = |s: &str| Err(s.to_string());
    assert_eq!(
        new(&plane(&[0; 31], &[0; 2]), &good.1, &[]),
        error("k cache: the slice has 31 elements, its extents need 32")
    );
    assert_eq!(
        new(&good.0, &plane(&[0; 64], &[0; 3]), &[]),
        error("v block scales: the slice has 3 elements, its extents need 4")
    );
    assert_eq!(new(&good.0, &good.1, &[true; 2]), error("page flags: the slice has 2 elements, its extents need 1"));
}
