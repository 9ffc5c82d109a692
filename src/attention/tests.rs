//! Small tiles and sections, so that small tests cross every edge: the same bits however the tokens come.
#![forbid(unsafe_code)]

use super::decode::decode_walk;
use super::prefill::{prefill_paged_walk, prefill_walk};
use super::spec::Walk;
use super::{AttentionOut, AttentionSpec, Queries, RaggedKv, plan_decode};
use crate::cpu::{Cpu, Workspace};
use crate::kv::{KvConfig, KvFormat, KvPool, KvScale, KvSequence, KvShape, PageTable, append_kv};
use crate::num::{Fp8, Real};
use crate::quant::ScaleRule;
use crate::view::{HeadsMut, HeadsRef};
use half::{bf16, f16};
use proptest::prelude::*;

const WALK: Walk = Walk { tile: 32, section: 64 };
const LAYERS: usize = 2;
const LAYER: usize = 1;

const FORMATS: [KvFormat; 11] = [
    KvFormat::F32,
    KvFormat::Bf16,
    KvFormat::F16,
    KvFormat::Fp8(Fp8::E4M3Fn),
    KvFormat::Fp8(Fp8::E4M3Ieee),
    KvFormat::Fp8(Fp8::E5M2),
    KvFormat::Fp8(Fp8::E3M4),
    KvFormat::Mxfp8(Fp8::E4M3Fn),
    KvFormat::Mxfp8(Fp8::E5M2),
    KvFormat::Mxfp4,
    KvFormat::Nvfp4,
];

/// Bits of outputs and log-sum-exps of some tokens, token by token.
#[derive(Debug, Default, Clone, PartialEq)]
struct Bits {
    out: Vec<u32>,
    lse: Vec<u32>,
}

/// Sequences and how to attend over them.
#[derive(Debug, Clone)]
struct Scenario {
    spec: AttentionSpec,
    format: KvFormat,
    page_size: usize,
    sinks: Option<Vec<f32>>,
    /// Tokens of each sequence.
    lens: Vec<usize>,
    seed: u64,
}

/// A number from where it stands, about normal, now and then far larger or smaller.
fn noise(seed: u64, at: usize) -> f32 {
    let mut z = seed.wrapping_add((at as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    let x = (z >> 40) as f32 / (1u32 << 22) as f32 - 2.0;
    match z % 64 {
        0 => x * 32.0,
        1 => x * 2f32.powi(-40),
        2 => 0.0,
        _ => x,
    }
}

impl Scenario {
    /// `[len, heads, dim]` values of sequence `b`; `what` tells q, k and v apart.
    fn values(&self, b: usize, what: u64, heads: usize, dim: usize) -> Vec<f32> {
        let seed = self.seed.wrapping_mul(31).wrapping_add(b as u64 * 3 + what);
        (0..self.lens[b] * heads * dim).map(|i| noise(seed, i)).collect()
    }

    fn q(&self, b: usize) -> Vec<bf16> {
        let q = self.values(b, 0, self.spec.num_qo_heads, self.spec.head_dim_qk);
        q.into_iter().map(bf16::from_f32).collect()
    }

    fn k(&self, b: usize) -> Vec<f32> {
        self.values(b, 1, self.spec.num_kv_heads, self.spec.head_dim_qk)
    }

    fn v(&self, b: usize) -> Vec<f32> {
        self.values(b, 2, self.spec.num_kv_heads, self.spec.head_dim_vo)
    }

    fn pool(&self) -> KvPool {
        let shape = KvShape {
            format: self.format,
            num_pages: self.lens.iter().map(|len| len.div_ceil(self.page_size)).sum::<usize>() + 1,
            page_size: self.page_size,
            num_kv_heads: self.spec.num_kv_heads,
            head_dim_qk: self.spec.head_dim_qk,
            head_dim_vo: self.spec.head_dim_vo,
        };
        let mut pool = KvPool::new(KvConfig { shape, num_layers: LAYERS, rule: ScaleRule::Even }).unwrap();
        if self.format.has_scale() {
            let heads: Vec<f32> = (0..shape.num_kv_heads).map(|h| 0.3 + 0.1 * h as f32).collect();
            pool.set_scales(LAYER, KvScale::Tensor(0.37), KvScale::Head(heads.into())).unwrap();
        }
        pool
    }

    /// The sequences in steps: step s makes sequence b `steps[s][b]` tokens longer. One query a step and sequence goes through
    /// decode if `decode`. Gives each sequence's bits, and the bytes of the cache if every step had one sequence.
    fn run(&self, cpu: Cpu<'_>, steps: &[Vec<usize>], decode: bool) -> Vec<Bits> {
        let mut pool = self.pool();
        let mut sequences: Vec<KvSequence> = self.lens.iter().map(|_| KvSequence::new(&pool)).collect();
        let (q, k, v): (Vec<_>, Vec<_>, Vec<_>) = (
            (0..self.lens.len()).map(|b| self.q(b)).collect(),
            (0..self.lens.len()).map(|b| self.k(b)).collect(),
            (0..self.lens.len()).map(|b| self.v(b)).collect(),
        );
        let mut all = vec![Bits::default(); self.lens.len()];
        let ws = &mut Workspace::new();
        for step in steps {
            let (mut new_q, mut new_k, mut new_v, mut indptr) = (vec![], vec![], vec![], vec![0]);
            for (b, &new) in step.iter().enumerate() {
                let rows = |x: usize| sequences[b].len() * x..(sequences[b].len() + new) * x;
                new_q.extend_from_slice(&q[b][rows(self.spec.num_qo_heads * self.spec.head_dim_qk)]);
                new_k.extend_from_slice(&k[b][rows(self.spec.num_kv_heads * self.spec.head_dim_qk)]);
                new_v.extend_from_slice(&v[b][rows(self.spec.num_kv_heads * self.spec.head_dim_vo)]);
                indptr.push(indptr[b] + new);
                sequences[b].grow(&mut pool, new).unwrap();
            }
            let tokens = *indptr.last().unwrap();
            let spec = &self.spec;
            let table = PageTable::from_sequences(&sequences).unwrap();
            let new_k = HeadsRef::new(&new_k, tokens, spec.num_kv_heads, spec.head_dim_qk).unwrap();
            let new_v = HeadsRef::new(&new_v, tokens, spec.num_kv_heads, spec.head_dim_vo).unwrap();
            append_kv(&mut pool, LAYER, &table, &indptr, new_k, new_v).unwrap();
            let q = HeadsRef::new(&new_q, tokens, spec.num_qo_heads, spec.head_dim_qk).unwrap();
            let kv = pool.layer(LAYER).unwrap();
            let sinks = self.sinks.as_deref();
            let (out, lse) = outputs(spec, tokens, |output| {
                if decode {
                    let plan = plan_decode(spec, &kv, &table)?;
                    decode_walk(cpu, WALK, &plan, q, &kv, sinks, output, ws)
                } else {
                    let queries = Queries { q, indptr: &indptr, sinks };
                    prefill_paged_walk(cpu, WALK, spec, queries, (&kv, &table), output, ws)
                }
            });
            let row = spec.num_qo_heads * spec.head_dim_vo;
            for (b, bits) in all.iter_mut().enumerate() {
                bits.out.extend(out[indptr[b] * row..indptr[b + 1] * row].iter().map(|x| x.to_bits()));
                let lse = &lse[indptr[b] * spec.num_qo_heads..indptr[b + 1] * spec.num_qo_heads];
                bits.lse.extend(lse.iter().map(|x| x.to_bits()));
            }
        }
        for sequence in sequences {
            sequence.free(&mut pool).unwrap();
        }
        assert_eq!(pool.used_pages(), 0);
        all
    }

    /// All tokens of all sequences at once.
    fn whole(&self) -> Vec<Vec<usize>> {
        vec![self.lens.clone()]
    }

    /// Steps of 1 to `longest` tokens.
    fn chunks(&self, longest: usize) -> Vec<Vec<usize>> {
        let mut left = self.lens.clone();
        let mut steps = vec![];
        while left.iter().any(|&l| l > 0) {
            let step = |(b, left): (usize, &mut usize)| {
                let new = (1 + (self.seed as usize + 7 * b + 13 * steps.len()) % longest).min(*left);
                *left -= new;
                new
            };
            steps.push(left.iter_mut().enumerate().map(step).collect());
        }
        steps
    }

    /// Contiguous prefill over `T` keys and values.
    fn ragged<T: Real>(&self) -> Vec<Bits> {
        let spec = &self.spec;
        let batch = self.lens.len();
        let indptr: Vec<usize> = (0..=batch).map(|b| self.lens[..b].iter().sum()).collect();
        let tokens = indptr[batch];
        let all = |f: &dyn Fn(usize) -> Vec<f32>| -> Vec<T> { (0..batch).flat_map(f).map(T::from_f32).collect() };
        let (k, v) = (all(&|b| self.k(b)), all(&|b| self.v(b)));
        let q: Vec<bf16> = (0..batch).flat_map(|b| self.q(b)).collect();
        let queries = Queries {
            q: HeadsRef::new(&q, tokens, spec.num_qo_heads, spec.head_dim_qk).unwrap(),
            indptr: &indptr,
            sinks: self.sinks.as_deref(),
        };
        let kv = RaggedKv {
            k: HeadsRef::new(&k, tokens, spec.num_kv_heads, spec.head_dim_qk).unwrap(),
            v: HeadsRef::new(&v, tokens, spec.num_kv_heads, spec.head_dim_vo).unwrap(),
            indptr: &indptr,
        };
        let (out, lse) = outputs(spec, tokens, |output| {
            prefill_walk(Cpu::detect(), WALK, spec, queries, kv, output, &mut Workspace::new())
        });
        let cut = |x: &[f32], row: usize, b: usize| {
            x[indptr[b] * row..indptr[b + 1] * row].iter().map(|x| x.to_bits()).collect()
        };
        let bits =
            |b| Bits { out: cut(&out, spec.num_qo_heads * spec.head_dim_vo, b), lse: cut(&lse, spec.num_qo_heads, b) };
        (0..batch).map(bits).collect()
    }
}

fn outputs(
    spec: &AttentionSpec,
    tokens: usize,
    call: impl FnOnce(AttentionOut<'_, f32>) -> crate::Result<()>,
) -> (Vec<f32>, Vec<f32>) {
    let mut out = vec![7.0; tokens * spec.num_qo_heads * spec.head_dim_vo];
    let mut lse = vec![7.0; tokens * spec.num_qo_heads];
    let heads = HeadsMut::new(&mut out, tokens, spec.num_qo_heads, spec.head_dim_vo).unwrap();
    call(AttentionOut { out: heads, lse: Some(&mut lse) }).unwrap();
    (out, lse)
}

fn scenarios() -> impl Strategy<Value = Scenario> {
    let heads = (1usize..=3, 1usize..=3);
    let dims = prop_oneof![Just((32, 32)), Just((64, 32)), Just((32, 96))];
    let mask = (prop_oneof![Just(None), (0usize..100).prop_map(Some)], prop_oneof![Just(None), Just(Some(3.5f32))]);
    let lens = prop::collection::vec(prop_oneof![0usize..=3, 20usize..150], 1..=3);
    (heads, dims, mask, lens, (1usize..=20, any::<bool>(), 0..FORMATS.len(), any::<u32>())).prop_map(
        |((kv_heads, group), (qk, vo), (window_left, logits_soft_cap), lens, (page_size, sinks, format, seed))| {
            let spec = AttentionSpec {
                head_dim_vo: vo,
                window_left,
                logits_soft_cap,
                ..AttentionSpec::new(kv_heads * group, kv_heads, qk)
            };
            let sinks = sinks.then(|| (0..kv_heads * group).map(|h| h as f32 - 1.5).collect());
            Scenario { spec, format: FORMATS[format], page_size, sinks, lens, seed: seed.into() }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// One prefill, chunks of any size, one token at a time through decode: the same bits, whatever the format.
    #[test]
    fn prefill_chunked_prefill_and_decode_agree(s in scenarios(), longest in 1usize..70) {
        let cpu = Cpu::detect();
        let whole = s.run(cpu, &s.whole(), false);
        prop_assert!(whole.iter().zip(&s.lens).all(|(bits, len)| bits.lse.len() == len * s.spec.num_qo_heads));
        prop_assert_eq!(&whole, &s.run(cpu, &s.chunks(longest), false));
        // Decode takes one query of every sequence, so one sequence at a time here.
        let alone = Scenario { lens: vec![s.lens[0]], ..s.clone() };
        prop_assert_eq!(&whole[..1], &alone.run(cpu, &vec![vec![1]; s.lens[0]], true)[..]);
    }

    /// Contiguous K and V of a plain type and a cache of that type.
    #[test]
    fn contiguous_and_paged_agree(s in scenarios()) {
        for (format, ragged) in [
            (KvFormat::F32, s.ragged::<f32>()),
            (KvFormat::Bf16, s.ragged::<bf16>()),
            (KvFormat::F16, s.ragged::<f16>()),
        ] {
            let s = Scenario { format, ..s.clone() };
            prop_assert_eq!(ragged, s.run(Cpu::detect(), &s.whole(), false));
        }
    }

    /// The tier without FMA gives the same bits as the best.
    #[test]
    fn tiers_agree(s in scenarios()) {
        prop_assert_eq!(s.run(Cpu::baseline(), &s.whole(), false), s.run(Cpu::detect(), &s.whole(), false));
    }
}

/// Every format goes through the comparison at least once, whatever proptest draws: sinks, window, cap and groups at once, over
/// several sections.
#[test]
fn every_format_decodes_as_it_prefills() {
    for format in FORMATS {
        let spec = AttentionSpec {
            window_left: Some(75),
            logits_soft_cap: Some(20.0),
            head_dim_vo: 64,
            ..AttentionSpec::new(6, 2, 32)
        };
        let sinks = Some(vec![0.5, -1.0, 2.0, f32::NEG_INFINITY, 0.0, 3.0]);
        let s = Scenario { spec, format, page_size: 16, sinks, lens: vec![140], seed: 5 };
        let whole = s.run(Cpu::detect(), &s.whole(), false);
        assert!(whole[0].out.iter().all(|bits| f32::from_bits(*bits).is_finite()), "{format:?}");
        assert_eq!(whole, s.run(Cpu::detect(), &vec![vec![1]; 140], true), "{format:?}");
        assert_eq!(whole, s.run(Cpu::detect(), &s.chunks(50), false), "{format:?}");
    }
}

/// Decode steps of a batch: each sequence has the bits it has alone.
#[test]
fn a_batch_decodes_as_its_sequences_alone() {
    let s = Scenario {
        spec: AttentionSpec::new(4, 2, 32),
        format: KvFormat::Mxfp4,
        page_size: 3,
        sinks: None,
        lens: vec![70, 70, 70],
        seed: 9,
    };
    let together = s.run(Cpu::detect(), &vec![vec![1, 1, 1]; 70], true);
    assert_eq!(together, s.run(Cpu::detect(), &s.whole(), false));
    assert_ne!(together[0], together[1], "sequences hold different data");
}
