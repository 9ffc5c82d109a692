//! What is refused, in which words; outputs stay untouched.
#![forbid(unsafe_code)]

use crate::Case;
use crate::paged::Paged;
use half::bf16;
use trn_kernels::attention::{
    AttentionOut, AttentionSpec, PartialState, Queries, RaggedKv, apply_sinks, merge_states, oracle, plan_decode,
};
use trn_kernels::kv::{KvFormat, PageTable, PagedKv};
use trn_kernels::{Cpu, Error, HeadsMut, HeadsRef, Workspace};

/// Message of the refusal of a call, which must leave the outputs alone.
fn refused(tokens: usize, call: impl FnOnce(AttentionOut<'_, f32>) -> trn_kernels::Result<()>) -> String {
    let mut out = vec![7.0f32; tokens * 64];
    let mut lse = vec![7.0f32; tokens * 2];
    let heads = HeadsMut::new(&mut out, tokens, 2, 32).unwrap();
    let error = call(AttentionOut { out: heads, lse: Some(&mut lse) }).unwrap_err();
    assert!(out.iter().chain(&lse).all(|x| *x == 7.0), "outputs were touched");
    error.to_string()
}

#[test]
fn refusals_of_prefill() {
    let spec = AttentionSpec::new(2, 1, 32);
    let case = Case::<f32>::new(41, spec, &[(2, 5), (1, 4)], 0..=0).with_sinks();
    let with = |change: &dyn Fn(&mut Case<f32>)| {
        let mut case = case.clone();
        change(&mut case);
        // Views of the data as it was made, so that only the call can refuse.
        let q = HeadsRef::new(&case.q, 3, 2, 32).unwrap();
        let k = HeadsRef::new(&case.k, 9, 1, 32).unwrap();
        let v = HeadsRef::new(&case.v, 9, 1, 32).unwrap();
        refused(3, |o| {
            let queries = Queries { q, indptr: &case.qo_indptr, sinks: case.sinks.as_deref() };
            Cpu::detect().prefill(
                &case.spec,
                queries,
                RaggedKv { k, v, indptr: &case.kv_indptr },
                o,
                &mut Workspace::new(),
            )
        })
    };
    for (message, change) in [
        (
            "attention spec: axis head_dim_vo is empty, needed at least 1",
            (&|c: &mut Case<f32>| c.spec.head_dim_vo = 0) as &dyn Fn(&mut Case<f32>),
        ),
        ("attention spec: axis num_qo_heads is 2, needed a multiple of 3", &|c| c.spec.num_kv_heads = 3),
        ("sm_scale[0]: got NaN, needed a finite factor", &|c| c.spec.sm_scale = f32::NAN),
        ("logits_soft_cap[0]: got -1, needed a finite cap above zero, or none", &|c| {
            c.spec.logits_soft_cap = Some(-1.0)
        }),
        ("q: axis num_qo_heads is 2, needed 4", &|c| c.spec.num_qo_heads = 4),
        ("q: axis head_dim_qk is 32, needed 16", &|c| c.spec.head_dim_qk = 16),
        ("k: axis num_kv_heads is 1, needed 2", &|c| c.spec.num_kv_heads = 2),
        ("attention output: axis head_dim_vo is 32, needed 16", &|c| c.spec.head_dim_vo = 16),
        ("sinks: the slice has 1 elements, its extents need 2", &|c| c.sinks = Some(vec![0.0])),
        ("qo_indptr[0]: got 1, needed 0, the first offset", &|c| c.qo_indptr[0] = 1),
        ("qo_indptr[2]: got 4, needed the number of rows (the end of what it divides)", &|c| c.qo_indptr[2] = 4),
        ("kv_indptr[2]: got 9, needed an offset not below the one before", &|c| c.kv_indptr[1] = 10),
        ("qo_indptr: axis batch is empty, needed at least 1", &|c| c.qo_indptr = vec![0]),
        ("kv_indptr[0]: got nothing, needed 0, the first offset", &|c| c.kv_indptr.clear()),
        ("qo_indptr: axis batch is 1, needed 2", &|c| c.qo_indptr = vec![0, 3]),
    ] {
        assert_eq!(with(change), message);
    }
}

#[test]
fn refusals_of_decode() {
    let paged = Paged::new(KvFormat::Mxfp4);
    let kv = paged.view();
    let plan =
        |spec: &AttentionSpec, table: &PageTable| plan_decode(spec, &kv, table).map(|_| ()).unwrap_err().to_string();
    let far = PageTable::new(8, vec![0, 2], vec![3, 12], vec![1]).unwrap();
    assert_eq!(plan(&paged.spec, &far), "page table indices[1]: index 12 is out of range, needed 0 <= index < 12");
    let other = PageTable::new(16, vec![0, 1], vec![3], vec![1]).unwrap();
    assert_eq!(plan(&paged.spec, &other), "page table: axis page_size is 16, needed 8");
    let narrow = AttentionSpec { head_dim_vo: 32, ..paged.spec };
    assert_eq!(plan(&narrow, &paged.table), "kv cache: axis head_dim_vo is 64, needed 32");

    let mut used = [true; 12];
    used[7] = false;
    let (k, v) = (kv.k().clone(), kv.v().clone());
    let freed = PagedKv::with_used(paged.shape, k, v, &used).unwrap();
    let message = "page table indices[4]: got page 7, which is free, needed an allocated page";
    assert_eq!(plan_decode(&paged.spec, &freed, &paged.table).unwrap_err().to_string(), message);
    // Freed after the plan was made.
    let made = plan_decode(&paged.spec, &kv, &paged.table).unwrap();
    let mut out = vec![7.0f32; 256];
    let mut call = |kv: &PagedKv<'_>, q: HeadsRef<'_, bf16>| {
        let out = HeadsMut::new(&mut out, 1, 4, 64).unwrap();
        let error = Cpu::detect().decode(&made, q, kv, None, AttentionOut { out, lse: None }, &mut Workspace::new());
        error.unwrap_err().to_string()
    };
    assert_eq!(call(&freed, paged.heads()), message);
    let nvfp4 = Paged::new(KvFormat::Nvfp4);
    assert_eq!(
        call(&nvfp4.view(), paged.heads()),
        "a Nvfp4 kv cache under a plan made for Mxfp4 is not supported: a plan serves caches of the shape it was made for"
    );
    assert_eq!(call(&kv, HeadsRef::new(&[], 0, 4, 64).unwrap()), "attention output: axis tokens is 1, needed 0");
    assert!(out.iter().all(|x| *x == 7.0));
}

#[test]
fn refusals_of_merge() {
    let out = [0.0f32; 8];
    let state = |heads, lse| PartialState { out: HeadsRef::new(&out, 1, heads, 8 / heads).unwrap(), lse };
    let mut merged = [0.0f32; 8];
    let mut merge = |a, b| {
        let out = HeadsMut::new(&mut merged, 1, 2, 4).unwrap();
        merge_states(a, b, AttentionOut { out, lse: None }).unwrap_err()
    };
    let lse = [0.0f32; 2];
    assert_eq!(merge(state(2, &lse), state(1, &lse)).to_string(), "state b: axis num_qo_heads is 1, needed 2");
    assert_eq!(
        merge(state(2, &lse), state(2, &lse[..1])),
        Error::Length { operand: "lse of state b".into(), got: 1, needed: 2 }
    );
    let sinks = apply_sinks(HeadsMut::new(&mut merged, 1, 2, 4).unwrap(), &lse, &[0.0]).unwrap_err();
    assert_eq!(sinks.to_string(), "sinks: the slice has 1 elements, its extents need 2");
}

/// Extents that no memory backs do not overflow or panic.
#[test]
fn absurd_extents_are_refused_or_do_nothing() {
    let huge = usize::MAX / 2;
    let spec = AttentionSpec { head_dim_qk: huge, head_dim_vo: huge, ..AttentionSpec::new(1, 1, 1) };
    let empty: &[f32] = &[];
    let heads = HeadsRef::new(empty, 0, 1, huge).unwrap();
    let queries = Queries { q: heads, indptr: &[0, 0], sinks: None };
    let kv = RaggedKv { k: heads, v: heads, indptr: &[0, 0] };
    let out = AttentionOut { out: HeadsMut::new(&mut [] as &mut [f32], 0, 1, huge).unwrap(), lse: None };
    assert_eq!(Cpu::detect().prefill(&spec, queries, kv, out, &mut Workspace::new()), Ok(()));
    assert!(oracle::prefill(&spec, queries, kv).unwrap().out.is_empty());

    // Values of no token take no memory however wide they are; the oracle's results would.
    let spec = AttentionSpec { head_dim_vo: huge, ..AttentionSpec::new(1, 1, 1) };
    let queries = Queries { q: HeadsRef::new(&[1.0f32], 1, 1, 1).unwrap(), indptr: &[0, 1], sinks: None };
    let kv = RaggedKv { k: HeadsRef::new(empty, 0, 1, 1).unwrap(), v: heads, indptr: &[0, 0] };
    assert!(matches!(oracle::prefill(&spec, queries, kv), Err(Error::Overflow { .. })));
}
