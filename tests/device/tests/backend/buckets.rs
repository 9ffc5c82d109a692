//! Shapes that were not compiled: padded to one that was, or cut into several, with the bits of the row alone.

use crate::Device;
use crate::bits::random;
use crate::conformance::ExpertData;
use crate::random::{RandomMatrix, Rng};
use device_tests::registry;
use half::bf16;
use trn_kernels::attention::AttentionSpec;
use trn_kernels::backend::{ActivationTerms, Backend, Element, ExpertWeights, Inner, Problem};
use trn_kernels::kv::{KvConfig, KvFormat, KvShape, PageTable};
use trn_kernels::layer::{GateLayout, SwigluSpec};
use trn_kernels::neuron::kernels::KernelSet;
use trn_kernels::quant::{QuantizedExperts, Scheme};
use trn_kernels::{Error, HeadsMut, HeadsRef, MatMut, MatRef};

const TWO: ActivationTerms = ActivationTerms::Two;

/// The bits of results, so that NaN is equal to itself.
fn bits(y: &[f32]) -> Vec<u32> {
    y.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn rows_do_not_depend_on_their_batch() {
    const N: usize = 48;
    const K: usize = 96;
    let (device, rng) = (Device::new(), &mut Rng(51));
    let w = RandomMatrix::new(rng, Scheme::Mxfp4, N, K, 3);
    let mut backend = device.backend(TWO, None);
    let id = backend.load_matrix(&w.view(), &[]).unwrap();
    let mut run = |x: &[bf16]| {
        let m = x.len() / K;
        let mut y = vec![0f32; m * N];
        backend
            .matmul(id, MatRef::new(x, m, K).unwrap().into(), MatMut::new(&mut y, m, N).unwrap().into(), false)
            .unwrap();
        bits(&y)
    };
    let x = random(rng, 27 * K);
    let alone: Vec<Vec<u32>> = x.chunks(K).map(&mut run).collect();
    // 1: exact; 2, 7: padded; 8: exact; 9, 17, 27: several pieces, the last of one row, padded or whole.
    for m in [0, 1, 2, 7, 8, 9, 16, 17, 27] {
        // Rows of padding hold what was there last, if anybody leaves it: the largest number, whose sums overflow.
        run(&vec![bf16::MAX; 8 * K]);
        run(&vec![bf16::MAX; 16 * K]);
        assert!(run(&x[..m * K]) == alone[..m].concat(), "{m} rows");
    }
    drop(backend);
    device.end();
}

#[test]
fn tokens_of_experts_do_not_depend_on_their_batch() {
    const H: usize = 64;
    let (device, rng) = (Device::new(), &mut Rng(52));
    let data = ExpertData::new(rng, Scheme::Mxfp4, 4, H, 32);
    let gate_up = QuantizedExperts::new(data.gate_up.iter().map(RandomMatrix::view).collect()).unwrap();
    let down = QuantizedExperts::new(data.down.iter().map(RandomMatrix::view).collect()).unwrap();
    let mut backend = device.backend(TWO, None);
    let id = backend
        .load_experts(&ExpertWeights {
            gate_up: &gate_up,
            gate_up_bias: &data.gate_up_bias,
            down: &down,
            down_bias: &data.down_bias,
            swiglu: SwigluSpec::GPT_OSS,
            gates: GateLayout::Interleaved,
            inner: Inner::Bf16,
        })
        .unwrap();
    for top_k in [1, 3, 4] {
        let mut run = |x: &[bf16], ids: &[u32]| {
            let mut y = vec![0f32; ids.len() * H];
            let (tokens, out) = (x.len() / H, MatMut::new(&mut y, ids.len(), H).unwrap());
            backend.moe(id, MatRef::new(x, tokens, H).unwrap().into(), ids, top_k, out).unwrap();
            bits(&y)
        };
        let (x, ids) = (random(rng, 11 * H), (0..11 * top_k).map(|_| rng.below(4) as u32).collect::<Vec<_>>());
        let alone: Vec<Vec<u32>> = x.chunks(H).zip(ids.chunks(top_k)).map(|(x, ids)| run(x, ids)).collect();
        for tokens in [1, 2, 3, 4, 5, 9, 11] {
            run(&[bf16::MAX; 4 * H], &vec![1; 4 * top_k]);
            let all = run(&x[..tokens * H], &ids[..tokens * top_k]);
            assert!(all == alone[..tokens].concat(), "{tokens} tokens of {top_k}");
            // Every token to one expert, which needs the most rows of it.
            let one = vec![3; tokens * top_k];
            let each: Vec<u32> = x[..tokens * H].chunks(H).flat_map(|x| run(x, &one[..top_k])).collect();
            assert!(run(&x[..tokens * H], &one) == each, "{tokens} tokens of one expert");
        }
    }
    drop(backend);
    device.end();
}

/// A cache of 9 pages of 8 tokens, 2 heads of 32.
struct Kv<'d> {
    backend: trn_kernels::backend::NeuronBackend<'static>,
    attention: trn_kernels::backend::AttentionId,
    cache: trn_kernels::backend::CacheId,
    _device: &'d Device,
}

impl<'d> Kv<'d> {
    fn new(device: &'d Device, format: KvFormat, sinks: &[f32]) -> Self {
        let mut backend = device.backend(TWO, None);
        let attention = backend.load_attention(&AttentionSpec::new(4, 2, 32), sinks).unwrap();
        let cache = backend.create_cache(&KvConfig::new(format, 1, 9, 8, 2, 32)).unwrap();
        Kv { backend, attention, cache, _device: device }
    }

    /// Appends everything that the table has.
    fn append(&mut self, table: &PageTable, k: &[bf16], v: &[bf16]) -> trn_kernels::Result<()> {
        let mut indptr = vec![0];
        for b in 0..table.num_sequences() {
            indptr.push(indptr[b] + table.seq_len(b));
        }
        let tokens = indptr[indptr.len() - 1];
        let heads = |x| HeadsRef::new(x, tokens, 2, 32).unwrap().into();
        self.backend.append(self.cache, 0, table, &indptr, heads(k), heads(v))
    }

    /// One query for each sequence.
    fn decode(&mut self, table: &PageTable, q: &[bf16]) -> Vec<u16> {
        let sequences = table.num_sequences();
        let mut out = vec![bf16::NAN; q.len()];
        let view = HeadsMut::new(&mut out, sequences, 4, 32).unwrap();
        let q = HeadsRef::new(q, sequences, 4, 32).unwrap();
        self.backend.decode(self.attention, self.cache, 0, table, q.into(), view.into()).unwrap();
        out.into_iter().map(bf16::to_bits).collect()
    }

    fn prefill(&mut self, table: &PageTable, q: &[bf16], indptr: &[usize]) -> Vec<u16> {
        let tokens = indptr[indptr.len() - 1];
        let mut out = vec![bf16::NAN; q.len()];
        let view = HeadsMut::new(&mut out, tokens, 4, 32).unwrap();
        let q = HeadsRef::new(q, tokens, 4, 32).unwrap();
        self.backend.prefill(self.attention, self.cache, 0, table, q.into(), indptr, view.into()).unwrap();
        out.into_iter().map(bf16::to_bits).collect()
    }
}

const ROW: usize = 2 * 32;
const Q: usize = 4 * 32;

#[test]
fn sequences_do_not_depend_on_their_batch_or_their_pages() {
    let (device, rng) = (Device::new(), &mut Rng(53));
    for format in [KvFormat::Bf16, KvFormat::Fp8(trn_kernels::num::Fp8::E4M3Fn)] {
        let sinks = rng.wide(4, 0..=0);
        // Six sequences: through shapes of four, and of one or four.
        let lens = [3usize, 8, 9, 1, 16, 5];
        let pages: [&[u32]; 6] = [&[8], &[0], &[4, 2], &[7], &[3, 1], &[6]];
        let tokens: usize = lens.iter().sum();
        let (k, v, q) = (random(rng, tokens * ROW), random(rng, tokens * ROW), random(rng, 6 * Q));
        let table = |which: std::ops::Range<usize>| {
            let mut indptr = vec![0];
            which.clone().for_each(|b| indptr.push(indptr[indptr.len() - 1] + pages[b].len()));
            let last = which.clone().map(|b| (lens[b] - 1) % 8 + 1).collect();
            PageTable::new(8, indptr, pages[which].concat(), last).unwrap()
        };
        let mut kv = Kv::new(&device, format, &sinks);
        kv.append(&table(0..6), &k, &v).unwrap();
        let alone: Vec<Vec<u16>> = (0..6).map(|b| kv.decode(&table(b..b + 1), &q[b * Q..(b + 1) * Q])).collect();
        for which in [0..2, 0..3, 1..5, 0..5, 0..6, 5..6] {
            let got = kv.decode(&table(which.clone()), &q[which.start * Q..which.end * Q]);
            assert!(got == alone[which.clone()].concat(), "{format:?} sequences {which:?}");
        }
        // Other pages, and appended token by token instead of at once.
        let mut other = Kv::new(&device, format, &sinks);
        let at = (k.chunks(ROW).skip(11).take(9), v.chunks(ROW).skip(11).take(9));
        for (t, (k, v)) in at.0.zip(at.1).enumerate() {
            let table =
                PageTable::new(8, vec![0, 1 + t / 8], vec![5, 0][..1 + t / 8].to_vec(), vec![t % 8 + 1]).unwrap();
            let heads = |x| HeadsRef::new(x, 1, 2, 32).unwrap().into();
            other.backend.append(other.cache, 0, &table, &[0, 1], heads(k), heads(v)).unwrap();
        }
        let table = PageTable::new(8, vec![0, 2], vec![5, 0], vec![1]).unwrap();
        assert!(other.decode(&table, &q[2 * Q..3 * Q]) == alone[2], "{format:?}: other pages");
    }
    device.end();
}

/// A prompt at once (16 queries to a shape, the rest after them) and in chunks of any size.
#[test]
fn queries_that_see_the_same_do_not_depend_on_their_neighbours() {
    let (device, rng) = (Device::new(), &mut Rng(54));
    let mut kv = Kv::new(&device, KvFormat::Bf16, &rng.wide(4, 0..=0));
    let (k, v, q) = (random(rng, 30 * ROW), random(rng, 30 * ROW), random(rng, 30 * Q));
    let table = |len: usize| {
        let pages = [5, 2, 7, 1][..len.div_ceil(8)].to_vec();
        PageTable::new(8, vec![0, pages.len()], pages, vec![(len - 1) % 8 + 1]).unwrap()
    };
    kv.append(&table(30), &k, &v).unwrap();
    // The same chunk, padded by another amount, after a call that left large numbers where its padding lies.
    let whole = kv.prefill(&table(16), &q[..16 * Q], &[0, 16]);
    for len in [1, 7, 15] {
        kv.prefill(&table(16), &vec![bf16::from_f32(1048576.0); 16 * Q], &[0, 16]);
        let part = kv.prefill(&table(len), &q[..len * Q], &[0, len]);
        assert!(part == whole[..len * Q], "{len} queries");
    }
    // Two sequences in one call are two calls.
    let both = PageTable::new(8, vec![0, 2, 3], vec![5, 2, 5], vec![8, 8]).unwrap();
    let mixed = [&q[..16 * Q], &q[..8 * Q]].concat();
    assert!(kv.prefill(&both, &mixed, &[0, 16, 24]) == [&whole[..], &whole[..8 * Q]].concat());
    drop(kv);
    device.end();
}

/// A page that comes back to the pool keeps what was in it. A sequence that takes it next must not see it.
#[test]
fn what_a_freed_page_holds_reaches_no_result() {
    let (device, rng) = (Device::new(), &mut Rng(55));
    let (k, v, q) = (random(rng, 5 * ROW), random(rng, 5 * ROW), random(rng, 5 * Q));
    let table = |page, len| PageTable::new(8, vec![0, 1], vec![page], vec![len]).unwrap();
    for format in [KvFormat::Bf16, KvFormat::Fp8(trn_kernels::num::Fp8::E5M2)] {
        let sinks = rng.wide(4, 0..=0);
        let mut clean = Kv::new(&device, format, &sinks);
        clean.append(&table(3, 5), &k, &v).unwrap();
        let mut used = Kv::new(&device, format, &sinks);
        // Every page, full of the largest keys that are taken.
        let largest = bf16::from_f32(if format == KvFormat::Bf16 { 1048576.0 } else { 57344.0 });
        for (page, value) in (0..9).zip([largest, -largest].into_iter().cycle()) {
            let garbage = vec![value; 8 * ROW];
            used.append(&table(page, 8), &garbage, &garbage).unwrap();
        }
        used.append(&table(3, 5), &k, &v).unwrap();
        assert!(used.decode(&table(3, 5), &q[..Q]) == clean.decode(&table(3, 5), &q[..Q]), "decode, {format:?}");
        if format == KvFormat::Bf16 {
            assert!(used.prefill(&table(3, 5), &q, &[0, 5]) == clean.prefill(&table(3, 5), &q, &[0, 5]), "prefill");
        }
        // Larger ones could be seen through the mask.
        if format == KvFormat::Bf16 {
            let mut spoiled = k.clone();
            spoiled[77] = bf16::from_f32(1056768.0);
            assert!(matches!(used.append(&table(3, 5), &spoiled, &v), Err(Error::Value { at: 77, .. })));
        }
        // What is no number would spoil whoever shares the cache: the append is refused, and the cache is as it was.
        for bad in [bf16::NAN, bf16::INFINITY] {
            let mut spoiled = v.clone();
            spoiled[77] = bad;
            let said = used.append(&table(3, 5), &k, &spoiled).unwrap_err();
            assert!(matches!(&said, Error::Value { operand, .. } if operand == "v"), "{said:?}");
            let said = used.append(&table(3, 5), &spoiled, &v).unwrap_err();
            assert!(matches!(&said, Error::Value { operand, .. } if operand == "k"), "{said:?}");
        }
        assert!(
            used.decode(&table(3, 5), &q[..Q]) == clean.decode(&table(3, 5), &q[..Q]),
            "after refusals, {format:?}"
        );
    }
    device.end();
}

/// The set that `generate` runs on: it opens, its kernels load, and it serves what its header says.
#[test]
fn the_tiny_models_set_serves_its_calls() {
    let device = Device::of("tiny-gpt-oss-programs");
    let mut backend = device.backend(TWO, None);
    let rng = &mut Rng(56);
    for (n, k, bias) in [(256, 128, true), (64, 128, true), (128, 256, true), (8, 128, true), (512, 128, false)] {
        let problem = Problem::Matmul { scheme: Scheme::Bf16, n, k, m: 70, bias, activations: Element::Bf16 };
        backend.supports(&problem).unwrap();
        let w = RandomMatrix::new(rng, Scheme::Bf16, n, k, 0);
        let bias = if bias { rng.wide(n, 0..=0) } else { vec![] };
        let id = backend.load_matrix(&w.view(), &bias).unwrap();
        // One token, and a prompt cut in two.
        let x = random(rng, 70 * k);
        let mut run = |m: usize| {
            let mut y = vec![0f32; m * n];
            let x = MatRef::new(&x[..m * k], m, k).unwrap();
            backend.matmul(id, x.into(), MatMut::new(&mut y, m, n).unwrap().into(), false).unwrap();
            bits(&y)
        };
        let (one, all) = (run(1), run(70));
        assert!(one[..] == all[..n]);
    }
    let cache = KvShape {
        format: KvFormat::Bf16,
        num_pages: 8,
        page_size: 16,
        num_kv_heads: 2,
        head_dim_qk: 32,
        head_dim_vo: 32,
    };
    for window_left in [None, Some(15)] {
        let spec = AttentionSpec { window_left, ..AttentionSpec::new(8, 2, 32) };
        let (sinks, element, tokens) = (true, Element::Bf16, 100);
        backend.supports(&Problem::Prefill { spec, sinks, cache, queries: 100, tokens, element }).unwrap();
        backend.supports(&Problem::Decode { spec, sinks, cache, sequences: 1, tokens, element }).unwrap();
    }
    backend.supports(&Problem::Append { cache, tokens: 100, element: Element::Bf16 }).unwrap();
    drop(backend);
    device.end();
}

/// Folders that are not what their manifest says.
#[test]
fn folders_that_were_tampered_with_are_refused() {
    let folder = registry::neffs("device-programs");
    let session = device_tests::Session::open();
    let set = KernelSet::open(folder.path()).unwrap();
    let file = |words: &[&str]| {
        let fits = |k: &&trn_kernels::neuron::kernels::CompiledKernel| words.iter().all(|w| k.describe().contains(w));
        folder.path().join(set.kernels().iter().find(fits).unwrap().file())
    };
    let changed = file(&["matmul_mx", "x bfloat16 [1, 96]", "bias float32", "x_terms 2"]);
    let mut bytes = std::fs::read(&changed).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&changed, bytes).unwrap();
    let gone = file(&["matmul_mx", "x bfloat16 [4, 64]", "x_terms 2", "w_element e5m2"]);
    std::fs::remove_file(&gone).unwrap();
    let set = KernelSet::open(folder.path()).unwrap().on(&session.runtime, 0);
    let mut backend = trn_kernels::backend::NeuronBackend::new(&set, trn_kernels::backend::NeuronOptions::default());
    let rng = &mut Rng(57);
    let w = RandomMatrix::new(rng, Scheme::Mxfp4, 48, 96, 1);
    let hit = changed.file_name().unwrap().to_str().unwrap();
    match backend.load_matrix(&w.view(), &[0.5; 48]).map(drop).unwrap_err() {
        Error::Manifest { at, problem } => assert!(at == hit && problem.contains("sha256"), "{at}: {problem}"),
        other => panic!("{other:?}"),
    }
    // Kernels beside it are as good as before.
    backend.load_matrix(&w.view(), &[]).unwrap();
    let w = RandomMatrix::new(rng, Scheme::Mxfp8(trn_kernels::num::Fp8::E5M2), 40, 64, 1);
    assert!(matches!(backend.load_matrix(&w.view(), &[]), Err(Error::Io { .. })));
    drop((backend, set));
    session.end();
}
