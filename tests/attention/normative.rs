//! docs/numerics-attention.md word by word, against the kernel bit by bit.
#![forbid(unsafe_code)]

use crate::{Case, rich};
use half::{bf16, f16};
use trn_kernels::attention::{AttentionSpec, KV_SECTION, KV_TILE};
use trn_kernels::num::{Real, math};

fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0.0f32.copysign(x) } else { x }
}

/// The canonical dot, counted from `first`: steps and chains by absolute index.
fn canonical(first: usize, pairs: &[(f32, f32)]) -> f32 {
    let mut acc = 0.0f32;
    let mut i = 0;
    while i < pairs.len() {
        let step = (first + i) / 32;
        let mut chains = [0.0f32; 2];
        while i < pairs.len() && (first + i) / 32 == step {
            let chain = &mut chains[(first + i) % 2];
            *chain = flush(flush(pairs[i].0).mul_add(flush(pairs[i].1), *chain));
            i += 1;
        }
        acc = flush(acc + flush(chains[0] + chains[1]));
    }
    acc
}

/// docs/numerics.md, word by word, for one query head over tokens `lo..` whose keys and values are given: shares nothing with the
/// kernel but `exp`, `tanh` and `ln`.
struct Normative<'a> {
    spec: &'a AttentionSpec,
    lo: usize,
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
    round: bool,
}

impl Normative<'_> {
    fn row(&self, q: &[f32], sink: Option<f32>) -> (Vec<f32>, f32) {
        let dim = self.spec.head_dim_vo;
        let base = |m: f32| if m == f32::NEG_INFINITY { 0.0 } else { m };
        let (mut max, mut sum, mut acc) = (f32::NEG_INFINITY, 0.0f32, vec![0.0f32; dim]);
        let hi = self.lo + self.k.len();
        for section in self.lo / KV_SECTION..hi.div_ceil(KV_SECTION) {
            let (mut part_max, mut part_sum, mut part_acc) = (f32::NEG_INFINITY, 0.0f32, vec![0.0f32; dim]);
            let tiles = KV_SECTION / KV_TILE;
            for tile in section * tiles..(section + 1) * tiles {
                let (from, to) = (self.lo.max(tile * KV_TILE), hi.min((tile + 1) * KV_TILE));
                if from >= to {
                    continue;
                }
                let score = |j: usize| {
                    let pairs: Vec<_> = q.iter().copied().zip(self.k[j - self.lo].iter().copied()).collect();
                    let s = canonical(0, &pairs) * self.spec.sm_scale;
                    self.spec.logits_soft_cap.map_or(s, |c| c * math::tanh(s / c))
                };
                let scores: Vec<f32> = (from..to).map(score).collect();
                let new = scores.iter().fold(part_max, |m, &s| if s > m { s } else { m });
                let correction = math::softmax_exp(part_max - base(new));
                let p: Vec<f32> = scores.iter().map(|s| math::softmax_exp(s - base(new))).collect();
                let ones: Vec<_> = p.iter().map(|p| (*p, 1.0)).collect();
                part_sum = part_sum.mul_add(correction, canonical(from, &ones));
                part_max = new;
                for (d, acc) in part_acc.iter_mut().enumerate() {
                    let weight = |p: f32| if self.round { bf16::from_f32(p).to_f32() } else { p };
                    let pairs: Vec<_> = (from..to).map(|j| (weight(p[j - from]), self.v[j - self.lo][d])).collect();
                    *acc = acc.mul_add(correction, canonical(from, &pairs));
                }
            }
            let new = if part_max > max { part_max } else { max };
            let (a, b) = (math::softmax_exp(max - base(new)), math::softmax_exp(part_max - base(new)));
            sum = sum.mul_add(a, part_sum * b);
            max = new;
            for (x, y) in acc.iter_mut().zip(part_acc) {
                *x = x.mul_add(a, y * b);
            }
        }
        let lse = max + math::ln(sum);
        let factor = match sink {
            None => 1.0 / sum,
            Some(sink) => {
                let new = if sink > max { sink } else { max };
                let a = math::softmax_exp(max - base(new));
                a / sum.mul_add(a, math::softmax_exp(sink - base(new)))
            }
        };
        (acc.into_iter().map(|x| x * factor + 0.0).collect(), lse)
    }
}

fn normative_check<T: Real>(case: &Case<T>, round: bool) {
    let spec = &case.spec;
    let got = case.run();
    let mut rows = 0;
    for b in 0..case.qo_indptr.len() - 1 {
        let (queries, tokens) = (case.qo_indptr[b + 1] - case.qo_indptr[b], case.kv_indptr[b + 1] - case.kv_indptr[b]);
        for i in 0..queries {
            let p = tokens - queries + i;
            let hi = if spec.causal { p + 1 } else { tokens };
            let lo = spec.window_left.map_or(0, |w| p.saturating_sub(w));
            for h in 0..spec.num_qo_heads {
                let kv_head = h / (spec.num_qo_heads / spec.num_kv_heads);
                let of = |x: &[T], dim: usize| -> Vec<Vec<f32>> {
                    let row = |j: usize| ((case.kv_indptr[b] + j) * spec.num_kv_heads + kv_head) * dim;
                    (lo..hi).map(|j| x[row(j)..row(j) + dim].iter().map(|x| x.to_f32()).collect()).collect()
                };
                let normative =
                    Normative { spec, lo, k: of(&case.k, spec.head_dim_qk), v: of(&case.v, spec.head_dim_vo), round };
                let at = (case.qo_indptr[b] + i) * spec.num_qo_heads + h;
                let q = &case.q[at * spec.head_dim_qk..(at + 1) * spec.head_dim_qk];
                let q: Vec<f32> = q.iter().map(|x| x.to_f32()).collect();
                let (out, lse) = normative.row(&q, case.sinks.as_ref().map(|s| s[h]));
                let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                let got_out = &got.out[at * spec.head_dim_vo..(at + 1) * spec.head_dim_vo];
                assert_eq!(bits(got_out), bits(&out), "sequence {b} query {i} head {h}");
                assert_eq!(got.lse[at].to_bits(), lse.to_bits(), "sequence {b} query {i} head {h}");
                rows += 1;
            }
        }
    }
    assert_eq!(rows, got.lse.len());
}

#[test]
fn normative_bits() {
    let lens = [(5, 5), (1, 90), (9, 150), (3, KV_SECTION + 70)];
    normative_check(&Case::<bf16>::new(1, rich(None, None), &lens, -1..=1).with_sinks(), true);
    normative_check(&Case::<f32>::new(2, rich(Some(99), None), &lens, -1..=1), false);
    normative_check(&Case::<f16>::new(3, rich(Some(KV_SECTION), Some(4.0)), &lens, -1..=1).with_sinks(), false);
    let open = AttentionSpec { causal: false, ..rich(Some(3), None) };
    normative_check(&Case::<bf16>::new(4, open, &lens, 0..=2), true);
}

/// Scores and values at the edge of f32's normal range: the flush decides many sums.
#[test]
fn normative_bits_at_the_subnormal_edge() {
    for exponents in [-70..=-55, -75..=-40, -126..=-110] {
        normative_check(&Case::<bf16>::new(5, rich(None, None), &[(4, 80)], exponents.clone()), true);
        normative_check(&Case::<f32>::new(6, rich(None, None), &[(4, 80)], exponents), false);
    }
}
