//! What passes between host and device: weights once, then activations only, to the byte; and in which order.

use crate::Device;
use crate::bits::random;
use crate::conformance::ExpertData;
use crate::random::{RandomMatrix, Rng};
use device_tests::{Kind, flag};
use half::bf16;
use trn_kernels::attention::AttentionSpec;
use trn_kernels::backend::{ActivationTerms, Backend, ExpertWeights, Inner, NeuronBackend};
use trn_kernels::kv::{KvConfig, KvFormat, PageTable};
use trn_kernels::layer::{GateLayout, SwigluSpec};
use trn_kernels::neuron::Traffic;
use trn_kernels::num::Fp8;
use trn_kernels::quant::{QuantizedExperts, Scheme};
use trn_kernels::trainium::layout::MxLayout;
use trn_kernels::{HeadsMut, HeadsRef, MatMut, MatRef};

const BF16: u64 = 2;
const F32: u64 = 4;
const I32: u64 = 4;

/// What a call moved.
fn moved(backend: &mut NeuronBackend<'_>, call: impl FnOnce(&mut NeuronBackend<'_>)) -> Traffic {
    let before = backend.traffic();
    call(backend);
    let after = backend.traffic();
    Traffic {
        to_device: after.to_device - before.to_device,
        from_device: after.from_device - before.from_device,
        calls: after.calls - before.calls,
    }
}

fn traffic(to_device: u64, from_device: u64, calls: u64) -> Traffic {
    Traffic { to_device, from_device, calls }
}

#[test]
fn matmul_weights_are_written_once_and_calls_move_activations() {
    const N: u64 = 48;
    const K: u64 = 96;
    let (device, rng) = (Device::new(), &mut Rng(61));
    let w = RandomMatrix::new(rng, Scheme::Mxfp4, N as usize, K as usize, 3);
    let mut backend = device.backend(ActivationTerms::Two, None);
    let bias = rng.wide(N as usize, 0..=0);
    let mut id = None;
    let loaded = moved(&mut backend, |b| id = Some(b.load_matrix(&w.view(), &bias).unwrap()));
    let layout = MxLayout::of(&w.view()).unwrap();
    let columns = layout.columns().count() as u64;
    let packed = (layout.data_bytes() + layout.scale_bytes()) as u64;
    assert_eq!(loaded, traffic(packed + columns * F32, 0, 0));
    let loads = device.session.emulated.calls("nrt_load");
    let tensors = device.session.emulated.live(Kind::Tensors);
    for (m, rows, pieces) in [(1u64, 1u64, 1u64), (5, 8, 1), (8, 8, 1), (9, 9, 2), (27, 32, 4), (0, 0, 0), (5, 8, 1)] {
        let x = random(rng, (m * K) as usize);
        let mut y = vec![0f32; (m * N) as usize];
        let call = moved(&mut backend, |b| {
            let x = MatRef::new(&x, m as usize, K as usize).unwrap();
            b.matmul(id.unwrap(), x.into(), MatMut::new(&mut y, m as usize, N as usize).unwrap().into(), false)
                .unwrap();
        });
        // x in the rows of the compiled shapes, y without their padding.
        assert_eq!(call, traffic(rows * K * BF16, m * N * F32, pieces), "{m} rows");
    }
    assert_eq!(device.session.emulated.calls("nrt_load"), loads, "a call loads nothing");
    assert_eq!(device.session.emulated.live(Kind::Tensors), tensors, "a call allocates nothing");
    // Another matrix of the shape shares the loaded kernels and moves its weights only.
    let loaded = moved(&mut backend, |b| id = Some(b.load_matrix(&w.view(), &bias).unwrap()));
    assert_eq!(loaded, traffic(packed + columns * F32, 0, 0));
    assert_eq!(device.session.emulated.calls("nrt_load"), loads);
    drop(backend);
    device.end();
}

#[test]
fn experts_stay_and_calls_move_tokens_and_routes() {
    const H: u64 = 64;
    let (device, rng) = (Device::new(), &mut Rng(62));
    let data = ExpertData::new(rng, Scheme::Mxfp4, 4, H as usize, 32);
    let gate_up = QuantizedExperts::new(data.gate_up.iter().map(RandomMatrix::view).collect()).unwrap();
    let down = QuantizedExperts::new(data.down.iter().map(RandomMatrix::view).collect()).unwrap();
    let mut backend = device.backend(ActivationTerms::Two, None);
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
    // Shapes: 1 token in 4 blocks of 1 row; 4 tokens in 10 blocks of 2.
    let shape = |x: u64, blocks: u64, rows: u64| x * H * BF16 + 2 * blocks * rows * I32 + blocks * I32;
    let (one, four) = (shape(1, 4, 1), shape(4, 10, 2));
    for (tokens, top_k, bytes, pieces) in [(1u64, 4u64, one, 1), (1, 1, one, 1), (3, 2, four, 1), (5, 4, four + one, 2)]
    {
        let (x, ids) = (random(rng, (tokens * H) as usize), vec![2; (tokens * top_k) as usize]);
        let mut y = vec![0f32; (tokens * top_k * H) as usize];
        let call = moved(&mut backend, |b| {
            let x = MatRef::new(&x, tokens as usize, H as usize).unwrap();
            let y = MatMut::new(&mut y, ids.len(), H as usize).unwrap();
            b.moe(id, x.into(), &ids, top_k as usize, y).unwrap();
        });
        assert_eq!(call, traffic(bytes, tokens * top_k * H * F32, pieces), "{tokens} tokens of {top_k}");
    }
    drop(backend);
    device.end();
}

#[test]
fn the_cache_stays_and_calls_move_new_tokens_and_queries() {
    const ROW: u64 = 2 * 32;
    const Q: u64 = 4 * 32;
    let (device, rng) = (Device::new(), &mut Rng(63));
    for (format, size) in [(KvFormat::Bf16, BF16), (KvFormat::Fp8(Fp8::E4M3Fn), 1)] {
        let mut backend = device.backend(ActivationTerms::Two, None);
        let attention = backend.load_attention(&AttentionSpec::new(4, 2, 32), &rng.wide(4, 0..=0)).unwrap();
        let mut cache = None;
        let config = KvConfig::new(format, 2, 9, 8, 2, 32);
        let made = moved(&mut backend, |b| cache = Some(b.create_cache(&config).unwrap()));
        assert_eq!(made, traffic(0, 0, 0), "pages are cleared where they are");
        let cache = cache.unwrap();
        let table = |len: usize| PageTable::new(8, vec![0, 2], vec![4, 1], vec![len - 8]).unwrap();
        // Eleven tokens: a shape of eight, and one of eight again for three.
        let (k, v) = (random(rng, 11 * ROW as usize), random(rng, 11 * ROW as usize));
        let append = moved(&mut backend, |b| {
            let heads = |x| HeadsRef::new(x, 11, 2, 32).unwrap().into();
            b.append(cache, 1, &table(11), &[0, 11], heads(&k), heads(&v)).unwrap();
        });
        // Tokens without padding; slots with theirs, which says that nothing goes there.
        assert_eq!(append, traffic(11 * 2 * ROW * size + 16 * I32, 0, 2), "{format:?}");
        let (k, v) = (random(rng, ROW as usize), random(rng, ROW as usize));
        let append = moved(&mut backend, |b| {
            let heads = |x| HeadsRef::new(x, 1, 2, 32).unwrap().into();
            b.append(cache, 1, &table(12), &[0, 1], heads(&k), heads(&v)).unwrap();
        });
        assert_eq!(append, traffic(2 * ROW * size + I32, 0, 1));
        let q = random(rng, (5 * Q) as usize);
        let mut out = vec![bf16::ZERO; (5 * Q) as usize];
        let mut decode = |b: &mut NeuronBackend<'_>| {
            let out = HeadsMut::new(&mut out[..Q as usize], 1, 4, 32).unwrap();
            let q = HeadsRef::new(&q[..Q as usize], 1, 4, 32).unwrap();
            b.decode(attention, cache, 1, &table(12), q.into(), out.into()).unwrap();
        };
        decode(&mut backend); // the first also writes what stays: sinks, scales
        let call = moved(&mut backend, decode);
        // The query, nine page numbers, a length.
        assert_eq!(call, traffic(Q * BF16 + 9 * I32 + I32, Q * BF16, 1));
        if format == KvFormat::Bf16 {
            let mut prefill = |b: &mut NeuronBackend<'_>| {
                let out = HeadsMut::new(&mut out, 5, 4, 32).unwrap();
                b.prefill(
                    attention,
                    cache,
                    1,
                    &table(12),
                    HeadsRef::new(&q, 5, 4, 32).unwrap().into(),
                    &[0, 5],
                    out.into(),
                )
                .unwrap();
            };
            prefill(&mut backend);
            let copies = device.session.emulated.calls("nrt_tensor_copy");
            let call = moved(&mut backend, prefill);
            // Queries of a shape of 16 and how many keys lie before them; keys and values go from the pages on the device.
            assert_eq!(call, traffic(16 * Q * BF16 + I32, 5 * Q * BF16, 1));
            assert!(device.session.emulated.calls("nrt_tensor_copy") > copies);
        }
    }
    device.end();
}

/// While a piece executes, the next is written and the one before is read: seen in the library's own log, where an execution stands
/// when it ends.
#[test]
fn pieces_overlap() {
    let (device, rng) = (Device::new(), &mut Rng(64));
    let w = RandomMatrix::new(rng, Scheme::Mxfp4, 48, 96, 3);
    let mut backend = device.backend(ActivationTerms::Two, None);
    let id = backend.load_matrix(&w.view(), &[]).unwrap();
    let x = random(rng, 27 * 96);
    let mut run = |m: usize| {
        let mut y = vec![0f32; m * 48];
        let x = MatRef::new(&x[..m * 96], m, 96).unwrap();
        backend.matmul(id, x.into(), MatMut::new(&mut y, m, 48).unwrap().into(), false).unwrap();
        y
    };
    let quick = run(27);
    let calls = device.session.emulated.log().len();
    device.session.emulated.set_flags(flag::SLOW_EXEC);
    device.session.emulated.set_delay_ms(300);
    let slow = run(27);
    assert_eq!(slow, quick);
    let log = device.session.emulated.log();
    let order: Vec<&str> = log[calls..].iter().map(|(name, _)| name.trim_start_matches("nrt_")).collect();
    let (write, execute, read) = ("tensor_write", "execute", "tensor_read");
    // Serially it would be (write, execute, read) four times.
    let mut writes_before_ends = vec![];
    let mut written = 0;
    for name in &order {
        written += usize::from(*name == write);
        if *name == execute {
            writes_before_ends.push(written);
        }
    }
    assert_eq!(
        writes_before_ends,
        [2, 3, 4, 4],
        "each next piece is written before the one that executes ends: {order:?}"
    );
    let reads = |upto: &str, nth: usize| {
        let end = order.iter().enumerate().filter(|(_, n)| **n == upto).nth(nth).unwrap().0;
        order[..end].iter().filter(|n| **n == read).count()
    };
    assert_eq!([1, 2, 3].map(|nth| reads(execute, nth)), [1, 2, 3], "each is read while the next executes: {order:?}");
    assert_eq!(order.len(), 12);
    drop(backend);
    device.end();
}
