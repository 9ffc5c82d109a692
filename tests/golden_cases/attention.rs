//! attention_prefill, attention_paged, attention_varlen: kernel and oracle against the reference, within the derived bound.

use crate::support::{Golden, flag, number, text, uint};
use half::bf16;
use serde_json::Value;
use trn_kernels::attention::oracle::{self, Reference};
use trn_kernels::attention::{AttentionOut, AttentionSpec, Queries, RaggedKv, plan_decode};
use trn_kernels::kv::{KvFormat, KvPlane, KvScale, KvShape, PageTable, PagedKv};
use trn_kernels::num::{Fp8, Real};
use trn_kernels::{Cpu, HeadsMut, HeadsRef, Workspace};

/// What the reference says of the rows that are compared.
struct Expected {
    out: Vec<f64>,
    lse: Vec<f64>,
}

impl Expected {
    fn of(golden: &Golden, prefix: &str) -> Expected {
        Expected { out: golden.f64(&format!("{prefix}.out")), lse: golden.f64(&format!("{prefix}.lse")) }
    }

    /// The oracle agrees to f64's accuracy.
    fn check_oracle(&self, name: &str, oracle: &Reference) {
        assert_eq!(self.lse.len(), oracle.lse.len(), "{name}");
        assert_eq!(self.out.len(), oracle.out.len(), "{name}");
        // The only difference allowed is that sm_scale is an f32 here: its part of the bound is one of 20 roundings or more.
        for (i, (&want, &got)) in self.out.iter().zip(&oracle.out).enumerate() {
            let bound = oracle.out_bound[i];
            assert!(near(want, got, bound / 4.0 + 1e-12), "{name}: oracle out {i}: {got} for {want}");
        }
        for (i, (&want, &got)) in self.lse.iter().zip(&oracle.lse).enumerate() {
            let bound = oracle.lse_bound[i];
            assert!(near(want, got, bound / 4.0 + 1e-12), "{name}: oracle lse {i}: {got} for {want}");
        }
    }

    fn check<O: Real>(&self, name: &str, bounds: &Reference, out: &[O], lse: &[f32]) {
        assert!(!self.out.is_empty() && !self.lse.is_empty(), "{name}: nothing to compare");
        for (i, (&want, got)) in self.out.iter().zip(out).enumerate() {
            let (got, bound) = (f64::from(got.to_f32()), bounds.tolerance::<O>(i));
            assert!(near(want, got, bound), "{name}: out {i}: {got} for {want}, bound {bound}");
        }
        for (i, (&want, &got)) in self.lse.iter().zip(lse).enumerate() {
            let bound = bounds.lse_bound[i];
            assert!(near(want, f64::from(got), bound), "{name}: lse {i}: {got} for {want}, bound {bound}");
        }
    }
}

/// Within the bound; the lse of a query that sees no token is -inf, which has no distance from itself.
fn near(want: f64, got: f64, bound: f64) -> bool {
    want == got || (want - got).abs() <= bound
}

/// A window of W tokens counts the query itself; 0 is none.
fn window_left(case: &Value) -> Option<usize> {
    uint(case, "window").checked_sub(1)
}

fn spec(case: &Value, causal: bool) -> AttentionSpec {
    let cap = number(case, "softcap") as f32;
    AttentionSpec {
        sm_scale: number(case, "scale") as f32,
        causal,
        window_left: window_left(case),
        logits_soft_cap: (cap > 0.0).then_some(cap),
        ..AttentionSpec::new(uint(case, "Hq"), uint(case, "Hkv"), uint(case, "D"))
    }
}

fn sinks(golden: &Golden, case: &Value, prefix: &str) -> Option<Vec<f32>> {
    flag(case, "sinks").then(|| golden.bf16(&format!("{prefix}.sinks")).into_iter().map(f32::from).collect())
}

/// Runs `call` on outputs of type `O` that hold garbage first.
fn outputs<O: Real>(
    spec: &AttentionSpec,
    tokens: usize,
    call: impl FnOnce(AttentionOut<'_, O>) -> trn_kernels::Result<()>,
) -> (Vec<O>, Vec<f32>) {
    let (heads, dim) = (spec.num_qo_heads, spec.head_dim_vo);
    let mut out = vec![O::from_f32(f32::NAN); tokens * heads * dim];
    let mut lse = vec![f32::NAN; tokens * heads];
    let heads = HeadsMut::new(&mut out, tokens, heads, dim).unwrap();
    call(AttentionOut { out: heads, lse: Some(&mut lse) }).unwrap();
    (out, lse)
}

#[test]
fn prefill() {
    let golden = Golden::open("attention_prefill");
    for case in golden.cases() {
        let prefix = format!("c{}", uint(case, "case"));
        let spec = spec(case, flag(case, "causal"));
        let (tq, tk, offset) = (uint(case, "Tq"), uint(case, "Tk"), uint(case, "q_offset"));
        // The reference places query 0 at q_offset; here queries are the last tokens. More queries behind them, whose results are
        // not looked at, move them to their place. Without a mask no query has a place, and there may be more of them than keys.
        let masked = spec.causal || spec.window_left.is_some();
        let within = || tk.checked_sub(offset).filter(|&all| all >= tq).expect("queries stand within the keys");
        let padded = if masked { within() } else { tq };
        let mut q = golden.bf16(&format!("{prefix}.q"));
        q.resize(padded * spec.num_qo_heads * spec.head_dim_qk, bf16::ONE);
        let (k, v) = (golden.bf16(&format!("{prefix}.k")), golden.bf16(&format!("{prefix}.v")));
        let sinks = sinks(&golden, case, &prefix);
        let queries = Queries {
            q: HeadsRef::new(&q, padded, spec.num_qo_heads, spec.head_dim_qk).unwrap(),
            indptr: &[0, padded],
            sinks: sinks.as_deref(),
        };
        let kv = RaggedKv {
            k: HeadsRef::new(&k, tk, spec.num_kv_heads, spec.head_dim_qk).unwrap(),
            v: HeadsRef::new(&v, tk, spec.num_kv_heads, spec.head_dim_vo).unwrap(),
            indptr: &[0, tk],
        };
        let mut bounds = oracle::prefill(&spec, queries, kv).unwrap();
        let expected = Expected::of(&golden, &prefix);
        bounds.out.truncate(expected.out.len());
        bounds.lse.truncate(expected.lse.len());
        expected.check_oracle(&prefix, &bounds);
        let ws = &mut Workspace::new();
        let (out, lse) = outputs::<f32>(&spec, padded, |o| Cpu::detect().prefill(&spec, queries, kv, o, ws));
        expected.check(&prefix, &bounds, &out, &lse);
        let (out, lse) = outputs::<bf16>(&spec, padded, |o| Cpu::detect().prefill(&spec, queries, kv, o, ws));
        expected.check(&prefix, &bounds, &out, &lse);
    }
}

#[test]
fn varlen() {
    let golden = Golden::open("attention_varlen");
    for case in golden.cases() {
        let prefix = format!("v{}", uint(case, "case"));
        let spec = spec(case, true);
        let (q, k, v) = (
            golden.bf16(&format!("{prefix}.q")),
            golden.bf16(&format!("{prefix}.k")),
            golden.bf16(&format!("{prefix}.v")),
        );
        let indptr = |name| -> Vec<usize> {
            golden.i32(&format!("{prefix}.{name}")).into_iter().map(|x| usize::try_from(x).unwrap()).collect()
        };
        let (cu_q, cu_k) = (indptr("cu_q"), indptr("cu_k"));
        let (tq, tk) = (*cu_q.last().unwrap(), *cu_k.last().unwrap());
        let sinks = sinks(&golden, case, &prefix);
        let queries = Queries {
            q: HeadsRef::new(&q, tq, spec.num_qo_heads, spec.head_dim_qk).unwrap(),
            indptr: &cu_q,
            sinks: sinks.as_deref(),
        };
        let kv = RaggedKv {
            k: HeadsRef::new(&k, tk, spec.num_kv_heads, spec.head_dim_qk).unwrap(),
            v: HeadsRef::new(&v, tk, spec.num_kv_heads, spec.head_dim_vo).unwrap(),
            indptr: &cu_k,
        };
        let bounds = oracle::prefill(&spec, queries, kv).unwrap();
        let expected = Expected::of(&golden, &prefix);
        expected.check_oracle(&prefix, &bounds);
        let ws = &mut Workspace::new();
        let (out, lse) = outputs::<f32>(&spec, tq, |o| Cpu::detect().prefill(&spec, queries, kv, o, ws));
        expected.check(&prefix, &bounds, &out, &lse);
    }
}

/// The cache of a case, borrowed from golden bytes.
struct Cache {
    shape: KvShape,
    planes: [(Vec<u8>, Vec<u8>, KvScale<'static>); 2],
}

impl Cache {
    fn of(golden: &Golden, case: &Value) -> Cache {
        let kind = text(case, "kv");
        let format = match kind {
            "bf16" => KvFormat::Bf16,
            "fp8_tensor" | "fp8_head" => KvFormat::Fp8(Fp8::E4M3Fn),
            "fp8_ieee" => KvFormat::Fp8(Fp8::E4M3Ieee),
            "fp8_e5m2" => KvFormat::Fp8(Fp8::E5M2),
            "mxfp8" => KvFormat::Mxfp8(Fp8::E4M3Fn),
            "mxfp4" => KvFormat::Mxfp4,
            other => panic!("kv cache {other}"),
        };
        let prefix = format!("p{}.{kind}", uint(case, "config"));
        let shape = KvShape {
            format,
            num_pages: golden.shape(&format!("{prefix}.k_cache"))[0],
            page_size: uint(case, "block_size"),
            num_kv_heads: uint(case, "Hkv"),
            head_dim_qk: uint(case, "D"),
            head_dim_vo: uint(case, "D"),
        };
        let plane = |x: &str| {
            let scales = if format.block() > 1 { golden.u8(&format!("{prefix}.{x}_scale_mx")) } else { vec![] };
            let scale = match (format.has_scale(), kind) {
                (false, _) => KvScale::One,
                (true, "fp8_head") => KvScale::Head(golden.f32(&format!("{prefix}.{x}_scale")).into()),
                (true, _) => KvScale::Tensor(golden.f32(&format!("{prefix}.{x}_scale"))[0]),
            };
            (golden.bytes(&format!("{prefix}.{x}_cache")), scales, scale)
        };
        Cache { shape, planes: [plane("k"), plane("v")] }
    }

    fn view(&self) -> PagedKv<'_> {
        let [k, v] = &self.planes;
        PagedKv::new(
            self.shape,
            KvPlane { codes: &k.0, block_scales: &k.1, scale: k.2.clone() },
            KvPlane { codes: &v.0, block_scales: &v.1, scale: v.2.clone() },
        )
        .unwrap()
    }
}

/// A paged case: what decode needs.
struct Paged {
    spec: AttentionSpec,
    cache: Cache,
    table: PageTable,
    q: Vec<bf16>,
    sinks: Option<Vec<f32>>,
    expected: Expected,
}

impl Paged {
    fn of(golden: &Golden, case: &Value) -> Paged {
        let config = format!("p{}", uint(case, "config"));
        let lens: Vec<usize> =
            golden.i32(&format!("{config}.context_lens")).into_iter().map(|x| usize::try_from(x).unwrap()).collect();
        let blocks = golden.i32(&format!("{config}.block_table"));
        let width = golden.shape(&format!("{config}.block_table"))[1];
        Paged {
            spec: spec(case, true),
            cache: Cache::of(golden, case),
            table: PageTable::from_block_table(uint(case, "block_size"), &blocks, width, &lens).unwrap(),
            q: golden.bf16(&format!("{config}.q")),
            sinks: sinks(golden, case, &config),
            expected: Expected::of(golden, &format!("{config}.{}", text(case, "kv"))),
        }
    }

    fn batch(&self) -> usize {
        self.table.num_sequences()
    }

    fn heads(&self) -> HeadsRef<'_, bf16> {
        HeadsRef::new(&self.q, self.batch(), self.spec.num_qo_heads, self.spec.head_dim_qk).unwrap()
    }
}

#[test]
fn paged() {
    let golden = Golden::open("attention_paged");
    for case in golden.cases() {
        let name = format!("p{}.{}", uint(case, "config"), text(case, "kv"));
        let paged = Paged::of(&golden, case);
        let Paged { spec, table, sinks, expected, .. } = &paged;
        let kv = paged.cache.view();
        let indptr: Vec<usize> = (0..=paged.batch()).collect();
        let queries = Queries { q: paged.heads(), indptr: &indptr, sinks: sinks.as_deref() };
        let bounds = oracle::paged(spec, queries, &kv, table).unwrap();
        expected.check_oracle(&name, &bounds);
        let plan = plan_decode(spec, &kv, table).unwrap();
        let ws = &mut Workspace::new();
        let decode = |o: AttentionOut<'_, f32>, ws: &mut Workspace| {
            Cpu::detect().decode(&plan, paged.heads(), &kv, sinks.as_deref(), o, ws)
        };
        let (out, lse) = outputs::<f32>(spec, paged.batch(), |o| decode(o, ws));
        expected.check(&name, &bounds, &out, &lse);
        let (out, lse) = outputs::<bf16>(spec, paged.batch(), |o| {
            Cpu::detect().decode(&plan, paged.heads(), &kv, sinks.as_deref(), o, ws)
        });
        expected.check(&name, &bounds, &out, &lse);
    }
}
