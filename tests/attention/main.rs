//! Attention: the normative order to the bit, the oracle's bound, invariance, what must not leak, states, refusals, planted bugs.

mod normative;
mod paged;
mod planted;
mod refusals;

#[path = "../support/random.rs"]
mod random;

use half::{bf16, f16};
use random::Rng;
use trn_kernels::attention::oracle::{self, Reference};
use trn_kernels::attention::{
    AttentionOut, AttentionSpec, KV_SECTION, PartialState, Queries, RaggedKv, apply_sinks, merge_states,
};
use trn_kernels::num::Real;
use trn_kernels::{Cpu, HeadsMut, HeadsRef, Parallelism, Workspace};

/// Contiguous operands of a ragged batch.
#[derive(Clone)]
struct Case<T> {
    spec: AttentionSpec,
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    qo_indptr: Vec<usize>,
    kv_indptr: Vec<usize>,
    sinks: Option<Vec<f32>>,
}

impl<T: Real> Case<T> {
    /// Sequences of (queries, tokens); values about normal times 2^e, e in `exponents`.
    fn new(seed: u64, spec: AttentionSpec, lens: &[(usize, usize)], exponents: std::ops::RangeInclusive<i32>) -> Self {
        let mut rng = Rng(seed);
        let (mut qo_indptr, mut kv_indptr) = (vec![0], vec![0]);
        for (b, (queries, tokens)) in lens.iter().enumerate() {
            qo_indptr.push(qo_indptr[b] + queries);
            kv_indptr.push(kv_indptr[b] + tokens);
        }
        let (tq, tk) = (qo_indptr[lens.len()], kv_indptr[lens.len()]);
        let mut values = |n| rng.wide(n, exponents.clone()).into_iter().map(T::from_f32).collect();
        Case {
            q: values(tq * spec.num_qo_heads * spec.head_dim_qk),
            k: values(tk * spec.num_kv_heads * spec.head_dim_qk),
            v: values(tk * spec.num_kv_heads * spec.head_dim_vo),
            spec,
            qo_indptr,
            kv_indptr,
            sinks: None,
        }
    }

    fn with_sinks(mut self) -> Self {
        self.sinks = Some((0..self.spec.num_qo_heads).map(|h| 1.5 - h as f32 * 0.7).collect());
        self
    }

    fn tokens(&self) -> usize {
        *self.qo_indptr.last().unwrap()
    }

    fn queries(&self) -> Queries<'_, T> {
        Queries {
            q: HeadsRef::new(&self.q, self.tokens(), self.spec.num_qo_heads, self.spec.head_dim_qk).unwrap(),
            indptr: &self.qo_indptr,
            sinks: self.sinks.as_deref(),
        }
    }

    fn kv(&self) -> RaggedKv<'_, T> {
        let tokens = *self.kv_indptr.last().unwrap();
        RaggedKv {
            k: HeadsRef::new(&self.k, tokens, self.spec.num_kv_heads, self.spec.head_dim_qk).unwrap(),
            v: HeadsRef::new(&self.v, tokens, self.spec.num_kv_heads, self.spec.head_dim_vo).unwrap(),
            indptr: &self.kv_indptr,
        }
    }

    fn run_on(&self, cpu: Cpu<'_>) -> Outputs {
        Outputs::of(&self.spec, self.tokens(), |o| {
            cpu.prefill(&self.spec, self.queries(), self.kv(), o, &mut Workspace::new())
        })
    }

    fn run(&self) -> Outputs {
        self.run_on(Cpu::detect())
    }

    fn oracle(&self) -> Reference {
        oracle::prefill(&self.spec, self.queries(), self.kv()).unwrap()
    }
}

#[derive(Debug, Clone)]
struct Outputs {
    out: Vec<f32>,
    lse: Vec<f32>,
}

impl Outputs {
    fn of(
        spec: &AttentionSpec,
        tokens: usize,
        call: impl FnOnce(AttentionOut<'_, f32>) -> trn_kernels::Result<()>,
    ) -> Outputs {
        let mut out = vec![7.0; tokens * spec.num_qo_heads * spec.head_dim_vo];
        let mut lse = vec![7.0; tokens * spec.num_qo_heads];
        let heads = HeadsMut::new(&mut out, tokens, spec.num_qo_heads, spec.head_dim_vo).unwrap();
        call(AttentionOut { out: heads, lse: Some(&mut lse) }).unwrap();
        Outputs { out, lse }
    }

    fn bits(&self) -> (Vec<u32>, Vec<u32>) {
        (self.out.iter().map(|x| x.to_bits()).collect(), self.lse.iter().map(|x| x.to_bits()).collect())
    }

    /// Whether every output and log-sum-exp is within the bound; NaN only where the oracle has NaN.
    fn within(&self, r: &Reference) -> bool {
        let near = |got: f32, want: f64, bound: f64| match (f64::from(got), want) {
            (got, want) if want.is_nan() => got.is_nan(),
            (got, want) if want.is_infinite() => got == want,
            (got, want) => (got - want).abs() <= bound,
        };
        assert_eq!((self.out.len(), self.lse.len()), (r.out.len(), r.lse.len()));
        (0..r.out.len()).all(|i| near(self.out[i], r.out[i], r.out_bound[i]))
            && (0..r.lse.len()).all(|i| near(self.lse[i], r.lse[i], r.lse_bound[i]))
    }
}

/// A spec with everything: groups, window, cap, unlike head dims.
fn rich(window_left: Option<usize>, cap: Option<f32>) -> AttentionSpec {
    AttentionSpec { window_left, logits_soft_cap: cap, head_dim_vo: 40, ..AttentionSpec::new(6, 2, 72) }
}

#[test]
fn within_the_bound() {
    let lens = [(1, 1), (7, 40), (2, KV_SECTION + 3)];
    for (seed, exponents) in [(1, -1..=0), (2, 0..=3), (3, -20..=-3), (4, -70..=-50), (5, -3..=4)] {
        for (window, cap) in [(None, None), (Some(20), Some(2.5))] {
            let spec = rich(window, cap);
            let case = Case::<f32>::new(seed, spec, &lens, exponents.clone()).with_sinks();
            assert!(case.run().within(&case.oracle()), "f32 {exponents:?}");
            let case = Case::<bf16>::new(seed, spec, &lens, exponents.clone());
            assert!(case.run().within(&case.oracle()), "bf16 {exponents:?}");
            let case = Case::<f16>::new(seed, spec, &lens, exponents.clone()).with_sinks();
            assert!(case.run().within(&case.oracle()), "f16 {exponents:?}");
        }
    }
}

/// The bound is worth having: of the size of f32's accuracy for f32, of bf16's where weights are rounded to it.
#[test]
fn the_bound_is_tight_enough_to_mean_something() {
    let spec = AttentionSpec::new(4, 2, 64);
    let lens = [(8, 300)];
    let largest = |r: &Reference| r.out_bound.iter().fold(0.0, |m: f64, b| m.max(*b));
    assert!(largest(&Case::<f32>::new(1, spec, &lens, 0..=0).oracle()) < 1e-3);
    assert!(largest(&Case::<bf16>::new(1, spec, &lens, 0..=0).oracle()) < 4.0 / 256.0 + 1e-3);
}

#[test]
fn threads_give_the_same_bits() {
    let case =
        Case::<bf16>::new(8, rich(Some(70), None), &[(90, 130), (1, 200), (0, 10), (33, 33)], -1..=1).with_sinks();
    let serial = case.run().bits();
    for threads in 1..=8 {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let cpu = Cpu::detect().with_parallelism(Parallelism::Pool(&pool));
        assert_eq!(case.run_on(cpu).bits(), serial, "{threads} threads");
    }
}

#[test]
fn a_sequence_has_the_same_bits_at_any_place_of_a_batch() {
    let spec = rich(None, None);
    let alone = Case::<bf16>::new(9, spec, &[(20, 100)], 0..=0);
    let other = Case::<bf16>::new(10, spec, &[(3, 77)], 0..=0);
    let join = |a: &Case<bf16>, b: &Case<bf16>| {
        let ends = |a: &[usize], b: &[usize]| vec![0, a[1], a[1] + b[1]];
        let both = |a: &[bf16], b: &[bf16]| [a, b].concat();
        Case {
            spec,
            q: both(&a.q, &b.q),
            k: both(&a.k, &b.k),
            v: both(&a.v, &b.v),
            qo_indptr: ends(&a.qo_indptr, &b.qo_indptr),
            kv_indptr: ends(&a.kv_indptr, &b.kv_indptr),
            sinks: None,
        }
    };
    let (want, _) = alone.run().bits();
    let (first, _) = join(&alone, &other).run().bits();
    let (second, _) = join(&other, &alone).run().bits();
    assert_eq!(want[..], first[..want.len()]);
    assert_eq!(want[..], second[second.len() - want.len()..]);
}

/// NaN and infinity in tokens a query does not see change nothing.
#[test]
fn invisible_tokens_do_not_leak() {
    let spec = rich(Some(30), None);
    let clean = Case::<bf16>::new(11, spec, &[(60, 100)], 0..=0).with_sinks();
    let want = clean.run();
    // Query 20 stands at 60 and sees tokens 30..=60.
    for (poison, tokens) in [(bf16::NAN, 61..100), (bf16::INFINITY, 61..100), (bf16::NAN, 0..30)] {
        let mut dirty = clean.clone();
        for (x, dim) in [(&mut dirty.k, spec.head_dim_qk), (&mut dirty.v, spec.head_dim_vo)] {
            let row = spec.num_kv_heads * dim;
            x[tokens.start * row..tokens.end * row].fill(poison);
        }
        let got = dirty.run();
        let row = spec.num_qo_heads * spec.head_dim_vo;
        assert_eq!(got.out[20 * row..21 * row], want.out[20 * row..21 * row], "{tokens:?}");
        assert_eq!(got.lse[20 * 6..21 * 6], want.lse[20 * 6..21 * 6], "{tokens:?}");
        assert!(got.out.iter().any(|x| x.is_nan()), "the poison is seen by some query");
    }
}

#[test]
fn visible_nan_stays_nan() {
    let spec = AttentionSpec::new(2, 1, 32);
    let clean = Case::<f32>::new(12, spec, &[(1, 40)], 0..=0);
    let poisoned = |change: &dyn Fn(&mut Case<f32>)| {
        let mut case = clean.clone();
        change(&mut case);
        let got = case.run();
        assert!(got.within(&case.oracle()), "the oracle says where");
        got
    };
    let k = poisoned(&|c| c.k[7 * 32 + 3] = f32::NAN);
    assert!(k.out.iter().chain(&k.lse).all(|x| x.to_bits() == f32::NAN.to_bits()));
    let q = poisoned(&|c| c.q[3] = f32::NAN);
    assert!(q.out[..32].iter().all(|x| x.is_nan()) && q.out[32..].iter().all(|x| x.is_finite()));
    let v = poisoned(&|c| c.v[39 * 32 + 5] = f32::NAN);
    assert!(v.out.iter().enumerate().all(|(i, x)| x.is_nan() == (i % 32 == 5)), "one column of V, one of the output");
    assert!(v.lse.iter().all(|x| x.is_finite()));
    let sink = poisoned(&|c| c.sinks = Some(vec![f32::NAN, 0.0]));
    assert!(sink.out[..32].iter().all(|x| x.is_nan()) && sink.out[32..].iter().all(|x| x.is_finite()));
    assert!(sink.lse.iter().all(|x| x.is_finite()), "the sink is not in lse");
    poisoned(&|c| c.k[7 * 32 + 3] = f32::INFINITY);
    poisoned(&|c| c.sinks = Some(vec![f32::INFINITY, f32::NEG_INFINITY]));
}

/// A score of -inf weighs nothing, even where a whole tile or section has no other.
#[test]
fn scores_of_minus_infinity_weigh_nothing() {
    let spec = AttentionSpec::new(1, 1, 32);
    let mut case = Case::<f32>::new(13, spec, &[(1, KV_SECTION + 80)], 0..=0);
    case.q.fill(1.0);
    for token in case.k.chunks_mut(32).take(KV_SECTION + 70) {
        token[0] = f32::NEG_INFINITY;
    }
    let got = case.run();
    assert!(got.out.iter().chain(&got.lse).all(|x| x.is_finite()));
    assert!(got.within(&case.oracle()));
}

#[test]
fn a_query_that_sees_nothing_gives_zero() {
    let spec = AttentionSpec::new(2, 1, 32);
    // An empty sequence, and three queries over one token: the first two stand before it.
    let case = Case::<bf16>::new(14, spec, &[(2, 0), (3, 1)], 0..=0).with_sinks();
    let got = case.run();
    assert!(got.out[..4 * 64].iter().all(|x| x.to_bits() == 0));
    assert!(got.lse[..8].iter().all(|x| *x == f32::NEG_INFINITY));
    assert!(got.out[4 * 64..].iter().all(|x| *x != 0.0) && got.lse[8..].iter().all(|x| x.is_finite()));
    assert!(got.within(&case.oracle()));
}

/// Two halves of the tokens, merged, are the whole; sinks may come after.
#[test]
fn merged_states_are_the_whole() {
    let spec = AttentionSpec { causal: false, ..AttentionSpec::new(4, 2, 32) };
    let whole = Case::<f32>::new(15, spec, &[(3, 200)], 0..=1).with_sinks();
    let part = |tokens: std::ops::Range<usize>| {
        let rows = tokens.start * 64..tokens.end * 64;
        let (k, v) = (whole.k[rows.clone()].to_vec(), whole.v[rows].to_vec());
        Case { k, v, kv_indptr: vec![0, tokens.len()], sinks: None, ..whole.clone() }
    };
    for split in [0, 1, 64, 130, 200] {
        let (a, b) = (part(0..split), part(split..200));
        let (ra, rb) = (a.run(), b.run());
        fn view(out: &[f32]) -> HeadsRef<'_, f32> {
            HeadsRef::new(out, 3, 4, 32).unwrap()
        }
        let mut got = Outputs::of(&spec, 3, |o| {
            let a = PartialState { out: view(&ra.out), lse: &ra.lse };
            merge_states(a, PartialState { out: view(&rb.out), lse: &rb.lse }, o)
        });
        // Each part has its own bound; the merge adds 2^-21 of a weight.
        let mut reference = Case { sinks: None, ..whole.clone() }.oracle();
        let (bound_a, bound_b) = (a.oracle(), b.oracle());
        let loosen = |reference: &mut Reference| {
            for i in 0..reference.out.len() {
                let size = bound_a.out[i].abs() + bound_b.out[i].abs();
                let lse = bound_a.lse_bound[i / 32] + bound_b.lse_bound[i / 32];
                reference.out_bound[i] = bound_a.out_bound[i] + bound_b.out_bound[i] + size * (lse + 2f64.powi(-21));
            }
            for i in 0..reference.lse.len() {
                let size = 1.0 + reference.lse[i].abs();
                reference.lse_bound[i] = bound_a.lse_bound[i] + bound_b.lse_bound[i] + size * 2f64.powi(-21);
            }
        };
        loosen(&mut reference);
        assert!(got.within(&reference), "split at {split}");
        let sinks = whole.sinks.clone().unwrap();
        apply_sinks(HeadsMut::new(&mut got.out, 3, 4, 32).unwrap(), &got.lse, &sinks).unwrap();
        let mut reference = whole.oracle();
        loosen(&mut reference);
        assert!(got.within(&reference), "split at {split}, sinks");
    }
}

#[test]
fn merging_nothing_gives_nothing() {
    let spec = AttentionSpec::new(1, 1, 4);
    let out = [0.0f32; 4];
    let state = PartialState { out: HeadsRef::new(&out, 1, 1, 4).unwrap(), lse: &[f32::NEG_INFINITY] };
    let mut got = Outputs::of(&spec, 1, |o| merge_states(state, state, o));
    assert!(got.out.iter().all(|x| x.to_bits() == 0) && got.lse == [f32::NEG_INFINITY]);
    apply_sinks(HeadsMut::new(&mut got.out, 1, 1, 4).unwrap(), &got.lse, &[f32::NEG_INFINITY]).unwrap();
    assert!(got.out.iter().all(|x| x.to_bits() == 0));
}
