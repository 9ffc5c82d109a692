//! Attention over any spec, ragged batch, page table and cache.

use crate::{EXTENTS, NUMBERS, about, number, survives};
use proptest::prelude::*;
use trn_kernels::attention::{
    AttentionOut, AttentionSpec, PartialState, Queries, RaggedKv, apply_sinks, merge_states, oracle, plan_decode,
};
use trn_kernels::kv::{KvFormat, KvPlane, KvScale, KvShape, PageTable, PagedKv};
use trn_kernels::{Cpu, Error, HeadsMut, HeadsRef, Result, Workspace};

/// Runs `call` on outputs of `tokens` tokens; if it is refused, they must be what they were.
#[track_caller]
fn attend(
    name: std::fmt::Arguments<'_>,
    (tokens, spec, lse): (usize, &AttentionSpec, usize),
    call: impl FnOnce(AttentionOut<'_, f32>) -> Result<()>,
) -> Result<()> {
    let len = spec.num_qo_heads.checked_mul(spec.head_dim_vo).and_then(|n| n.checked_mul(tokens));
    let mut out = vec![-7.25f32; len.filter(|n| *n < 1 << 16).unwrap_or(0)];
    let mut lse = vec![-7.25f32; lse.min(1 << 16)];
    let result = match HeadsMut::new(&mut out, tokens, spec.num_qo_heads, spec.head_dim_vo) {
        Ok(heads) => survives(name, || call(AttentionOut { out: heads, lse: Some(&mut lse) })),
        Err(e) => Err(e),
    };
    assert!(result.is_ok() || out.iter().chain(&lse).all(|x| *x == -7.25), "{name} was refused and wrote");
    result
}

/// Batches without a token: any heads and head dims fit the empty slice.
#[test]
fn specs_of_any_extents() {
    let none = &[0.0f32; 0][..];
    let cpu = Cpu::baseline();
    for qo in EXTENTS {
        for kv_heads in [0, 1, 2, 33, qo, usize::MAX] {
            for (qk, vo) in EXTENTS.into_iter().flat_map(|d| [(d, d), (1, d), (d, 1)]) {
                let name = format_args!("attention of {qo} over {kv_heads} heads, dims {qk} and {vo}");
                let spec = survives(name, || AttentionSpec {
                    head_dim_vo: vo,
                    window_left: Some(usize::MAX),
                    ..AttentionSpec::new(qo, kv_heads, qk)
                });
                let (Ok(q), Ok(k), Ok(v)) = (
                    HeadsRef::new(none, 0, qo, qk),
                    HeadsRef::new(none, 0, kv_heads, qk),
                    HeadsRef::new(none, 0, kv_heads, vo),
                ) else {
                    continue;
                };
                let valid = survives(name, || (spec.validate(), spec.group_size())).0;
                let extents = [qo, kv_heads, qk, vo];
                assert_eq!(valid.is_ok(), !extents.contains(&0) && qo % kv_heads == 0, "{name}");
                let queries = Queries { q, indptr: &[0, 0], sinks: None };
                let kv = RaggedKv { k, v, indptr: &[0, 0] };
                let mut ws = Workspace::new();
                let result = attend(name, (0, &spec, 0), |out| cpu.prefill(&spec, queries, kv, out, &mut ws));
                assert!(result.is_err() || valid.is_ok());
                let _ = survives(name, || oracle::prefill(&spec, queries, kv));
                let shape = KvShape {
                    format: KvFormat::Bf16,
                    num_pages: 0,
                    page_size: usize::MAX,
                    num_kv_heads: kv_heads,
                    head_dim_qk: qk,
                    head_dim_vo: vo,
                };
                let plane = || KvPlane { codes: &[], block_scales: &[], scale: KvScale::One };
                let Ok(cache) = survives(name, || PagedKv::new(shape, plane(), plane())) else { continue };
                let table = PageTable::new(usize::MAX, vec![0, 0], vec![], vec![0]).unwrap();
                let result =
                    attend(name, (0, &spec, 0), |out| cpu.prefill_paged(&spec, queries, &cache, &table, out, &mut ws));
                assert_eq!(result.is_ok(), valid.is_ok() && spec.num_qo_heads.checked_mul(vo).is_some(), "{name}");
                let _ = survives(name, || oracle::paged(&spec, queries, &cache, &table));
                if let Ok(plan) = survives(name, || plan_decode(&spec, &cache, &table)) {
                    assert_eq!((plan.num_sequences(), *plan.spec()), (1, spec));
                    let result = attend(name, (0, &spec, 0), |out| cpu.decode(&plan, q, &cache, None, out, &mut ws));
                    assert!(result.is_err(), "{name}: one sequence has one query");
                }
            }
        }
    }
}

/// The oracle makes its own outputs: extents that memory cannot hold are refused, not taken.
#[test]
fn oracle_outputs_beyond_memory() {
    let (one, none) = ([1.0f32], [0.0f32; 0]);
    for vo in [usize::MAX >> 14, usize::MAX / 64, usize::MAX / 2, usize::MAX] {
        let spec = AttentionSpec { head_dim_vo: vo, ..AttentionSpec::new(1, 1, 1) };
        let q = HeadsRef::new(&one[..], 1, 1, 1).unwrap();
        let (k, v) = (HeadsRef::new(&none[..], 0, 1, 1).unwrap(), HeadsRef::new(&none[..], 0, 1, vo).unwrap());
        let queries = Queries { q, indptr: &[0, 1], sinks: None };
        let kv = RaggedKv { k, v, indptr: &[0, 0] };
        let result = survives(format_args!("oracle of {vo} outputs"), || oracle::prefill(&spec, queries, kv));
        assert!(matches!(result, Err(Error::Overflow { .. })));
    }
    // One page, named so often that its tokens exceed what memory holds.
    let shape = KvShape {
        format: KvFormat::Fp8(trn_kernels::num::Fp8::E5M2),
        num_pages: 1,
        page_size: 1 << 22,
        num_kv_heads: 1,
        head_dim_qk: 1,
        head_dim_vo: 1,
    };
    let codes = vec![0u8; 1 << 22];
    let plane = || KvPlane { codes: &codes, block_scales: &[], scale: KvScale::One };
    let cache = PagedKv::new(shape, plane(), plane()).unwrap();
    let table = PageTable::new(1 << 22, vec![0, 1 << 22], vec![0; 1 << 22], vec![1]).unwrap();
    let queries = Queries { q: HeadsRef::new(&one[..], 1, 1, 1).unwrap(), indptr: &[0, 1], sinks: None };
    let spec = AttentionSpec::new(1, 1, 1);
    let result = survives(format_args!("oracle of 2^44 tokens"), || oracle::paged(&spec, queries, &cache, &table));
    assert!(matches!(result, Err(Error::Overflow { .. })));
}

#[test]
fn parameters_that_are_not_numbers() {
    for x in NUMBERS {
        let scaled = AttentionSpec { sm_scale: x, ..AttentionSpec::new(1, 1, 1) };
        assert_eq!(scaled.validate().is_ok(), x.is_finite());
        let capped = AttentionSpec { logits_soft_cap: Some(x), ..AttentionSpec::new(1, 1, 1) };
        assert_eq!(capped.validate().is_ok(), x.is_finite() && x > 0.0);
    }
}

#[derive(Debug, Clone)]
struct Batch {
    spec: AttentionSpec,
    q: (usize, Vec<usize>),
    kv: (usize, Vec<usize>),
    sinks: Option<usize>,
    numbers: Vec<f32>,
    lse: usize,
}

/// Offsets of these lengths, one of them perhaps wrong.
fn offsets(lens: Vec<usize>, wrong: Option<(usize, usize)>) -> (usize, Vec<usize>) {
    let mut indptr = vec![0];
    indptr.extend(lens.iter().scan(0, |end, len| {
        *end += len;
        Some(*end)
    }));
    let total = lens.iter().sum();
    if let Some((at, value)) = wrong {
        let at = at % indptr.len();
        indptr[at] = value;
    }
    (total, indptr)
}

fn batch() -> impl Strategy<Value = Batch> {
    let wrong = || prop::option::weighted(0.1, (0usize..5, proptest::sample::select(&EXTENTS[..])));
    let lens =
        (1usize..4).prop_flat_map(|b| (prop::collection::vec(0usize..5, b), prop::collection::vec(0usize..9, b)));
    let spec = (
        prop_oneof![Just((2usize, 1usize)), Just((1, 1)), Just((4, 2)), Just((3, 2)), Just((0, 1)), Just((2, 0))],
        (prop_oneof![Just(16usize), Just(3), Just(0)], prop_oneof![Just(5usize), Just(17), Just(0)]),
        (number(), any::<bool>()),
        prop::option::of(prop_oneof![0usize..4, proptest::sample::select(&EXTENTS[..])]),
        prop::option::of(number()),
    );
    (spec, lens, (wrong(), wrong()), prop::option::of(0usize..5), prop::collection::vec(number(), 1024), about(7))
        .prop_map(|(spec, (q, kv), wrong, sinks, numbers, lse)| {
            let ((qo, heads), (qk, vo), (sm_scale, causal), window_left, logits_soft_cap) = spec;
            let spec = AttentionSpec {
                num_qo_heads: qo,
                num_kv_heads: heads,
                head_dim_qk: qk,
                head_dim_vo: vo,
                sm_scale,
                causal,
                window_left,
                logits_soft_cap,
            };
            let (q, kv) = (offsets(q, wrong.0), offsets(kv, wrong.1));
            // Mostly right: one log-sum-exp a query and head.
            let lse = if lse == 7 { q.0 * qo } else { lse };
            Batch { spec, q, kv, sinks, numbers, lse }
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_ragged_batch(b in batch()) {
        let spec = b.spec;
        let view = |tokens: usize, heads: usize, dim: usize| {
            let numbers = b.numbers.iter().copied().cycle().take(tokens * heads * dim);
            numbers.collect::<Vec<f32>>()
        };
        let q = view(b.q.0, spec.num_qo_heads, spec.head_dim_qk);
        let (k, v) = (view(b.kv.0, spec.num_kv_heads, spec.head_dim_qk), view(b.kv.0, spec.num_kv_heads, spec.head_dim_vo));
        let sinks = b.sinks.map(|n| view(1, 1, n));
        let queries = Queries {
            q: HeadsRef::new(&q, b.q.0, spec.num_qo_heads, spec.head_dim_qk).unwrap(),
            indptr: &b.q.1,
            sinks: sinks.as_deref(),
        };
        let kv = RaggedKv {
            k: HeadsRef::new(&k, b.kv.0, spec.num_kv_heads, spec.head_dim_qk).unwrap(),
            v: HeadsRef::new(&v, b.kv.0, spec.num_kv_heads, spec.head_dim_vo).unwrap(),
            indptr: &b.kv.1,
        };
        let mut ws = Workspace::new();
        let result = attend(format_args!("prefill"), (b.q.0, &spec, b.lse), |out| {
            Cpu::detect().prefill(&spec, queries, kv, out, &mut ws)
        });
        let right = |(total, indptr): &(usize, Vec<usize>)| {
            indptr[0] == 0 && indptr.is_sorted() && indptr.last() == Some(total)
        };
        let fits = spec.validate().is_ok()
            && right(&b.q)
            && right(&b.kv)
            && b.sinks.is_none_or(|n| n == spec.num_qo_heads);
        prop_assert_eq!(result.is_ok(), fits && b.lse == b.q.0 * spec.num_qo_heads);
        let reference = survives(format_args!("oracle"), || oracle::prefill(&spec, queries, kv));
        prop_assert_eq!(reference.is_ok(), fits);
        if let Ok(reference) = reference {
            let _ = (reference.tolerance::<f32>(usize::MAX), reference.tolerance::<half::f16>(0));
        }
    }

    #[test]
    fn any_partial_states(
        (tokens, heads, dim) in (about(2), about(3), about(4)),
        lens in (about(6), about(6), about(6)),
        (lse, x, sinks) in (prop::collection::vec(number(), 64), prop::collection::vec(number(), 64), about(3)),
    ) {
        let len = tokens.checked_mul(heads).and_then(|n| n.checked_mul(dim)).unwrap_or(0).min(64);
        let Ok(view) = HeadsRef::new(&x[..len], tokens, heads, dim) else { return Ok(()) };
        let state = |n: usize| PartialState { out: view, lse: &lse[..n.min(64)] };
        let spec = AttentionSpec { head_dim_vo: dim, ..AttentionSpec::new(heads, 1, 1) };
        let result = attend(format_args!("merge_states"), (tokens, &spec, lens.2), |out| {
            merge_states(state(lens.0), state(lens.1), out)
        });
        let rows = tokens.checked_mul(heads);
        prop_assert!(result.is_err() || rows == Some(lens.0.min(64)) && rows == Some(lens.1.min(64)));
        let _ = attend(format_args!("apply_sinks"), (tokens, &spec, 0), |out| {
            apply_sinks(out.out, &lse[..lens.0.min(64)], &x[..sinks.min(64)])
        });
    }
}
