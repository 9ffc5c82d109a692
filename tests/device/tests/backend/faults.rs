//! Statuses in the middle of a backend's calls: typed errors, no result that is none, and what comes after.

use crate::Device;
use crate::bits::random;
use crate::random::{RandomMatrix, Rng};
use device_tests::flag;
use half::bf16;
use trn_kernels::attention::AttentionSpec;
use trn_kernels::backend::{ActivationTerms, AttentionId, Backend, CacheId, MatrixId, NeuronBackend};
use trn_kernels::kv::{KvConfig, KvFormat, PageTable};
use trn_kernels::matmul::Activations;
use trn_kernels::neuron::{Status, StatusClass};
use trn_kernels::num::Fp8;
use trn_kernels::quant::Scheme;
use trn_kernels::{Error, HeadsMut, HeadsRef, MatMut, MatRef, Result};

const N: usize = 48;
const K: usize = 96;
/// Four pieces of eight rows.
const M: usize = 32;

/// The text of a device's error.
fn problem(result: Result<()>) -> String {
    match result.unwrap_err() {
        Error::Device { problem } => problem,
        other => panic!("not a device's error: {other:?}"),
    }
}

fn matmul(backend: &mut NeuronBackend<'_>, id: MatrixId, x: &[bf16], y: &mut [f32]) -> Result<()> {
    let m = x.len() / K;
    backend.matmul(id, MatRef::new(x, m, K).unwrap().into(), MatMut::new(y, m, N).unwrap().into(), false)
}

/// Every status in every call of a matmul of four pieces, at the second of them.
#[test]
fn a_matmul_that_fails_halfway_says_so() {
    let rng = &mut Rng(71);
    let (w, x) = (RandomMatrix::new(rng, Scheme::Mxfp4, N, K, 3), random(rng, M * K));
    for op in ["nrt_tensor_write", "nrt_execute", "nrt_tensor_read"] {
        let mut device = Device::new();
        let mut made = load(&device, &w);
        let mut wanted = vec![0f32; M * N];
        matmul(&mut made.0, made.1, &x, &mut wanted).unwrap();
        for status in Status::ALL.iter().filter(|s| !s.is_success()) {
            device.session.emulated.inject(op, status.0, 1, u32::MAX);
            let mut y = vec![f32::NAN; M * N];
            let said = problem(matmul(&mut made.0, made.1, &x, &mut y));
            device.session.emulated.inject(op, 0, 0, 0);
            assert!(said.contains(op) && said.contains(status.name().unwrap()), "{op} {status}: {said}");
            // Rows that were delivered before it are right; the rest was not touched.
            for (row, wanted) in y.chunks(N).zip(wanted.chunks(N)) {
                assert!(row == wanted || row.iter().all(|v| v.is_nan()), "{op} {status}: a row that is no result");
            }
            assert!(y[8 * N..].iter().all(|v| v.is_nan()), "{op} {status}: results after the fault");
            let again = matmul(&mut made.0, made.1, &x, &mut y);
            if status.class() == StatusClass::Poison {
                let said = problem(again);
                assert!(said.contains(status.name().unwrap()), "{op} {status}, afterwards: {said}");
                assert!(problem(made.0.load_matrix(&w.view(), &[]).map(drop)).contains(status.name().unwrap()));
                device.session.emulated.assert_no_violation();
                device = Device::new();
                made = load(&device, &w);
            } else {
                again.unwrap_or_else(|e| panic!("{op} after {status}: {e}"));
                assert_eq!(y, wanted, "{op} after {status}");
            }
        }
        drop(made);
        device.end();
    }
}

fn load(device: &Device, w: &RandomMatrix) -> (NeuronBackend<'static>, MatrixId) {
    let mut backend = device.backend(ActivationTerms::Two, None);
    let id = backend.load_matrix(&w.view(), &[]).unwrap();
    (backend, id)
}

#[test]
fn a_full_queue_is_waited_for_a_bounded_number_of_times() {
    let (device, rng) = (Device::new(), &mut Rng(72));
    let (w, x) = (RandomMatrix::new(rng, Scheme::Mxfp4, N, K, 3), random(rng, K));
    let (mut backend, id) = load(&device, &w);
    device.session.emulated.inject("nrt_execute", 7, 0, 3);
    let mut y = vec![0f32; N];
    matmul(&mut backend, id, &x, &mut y).unwrap();
    assert_eq!(device.session.emulated.calls("nrt_execute"), 4);
    device.session.emulated.inject("nrt_execute", 7, 0, u32::MAX);
    assert!(problem(matmul(&mut backend, id, &x, &mut y)).contains("NRT_QUEUE_FULL"));
    assert!(device.session.emulated.calls("nrt_execute") < 100, "for ever is too long");
    drop(backend);
    device.end();
}

/// A load that fails at any call leaves nothing behind, and the next works.
#[test]
fn loads_that_fail_halfway_leave_nothing() {
    let (device, rng) = (Device::new(), &mut Rng(73));
    let w = RandomMatrix::new(rng, Scheme::Mxfp4, N, K, 3);
    let mut backend = device.backend(ActivationTerms::Two, None);
    for op in [
        "nrt_load",
        "nrt_tensor_allocate",
        "nrt_tensor_write",
        "nrt_tensor_memset",
        "nrt_allocate_tensor_set",
        "nrt_add_tensor_to_tensor_set",
    ] {
        for skip in 0..3 {
            // What an earlier load left are loaded kernels and their tensors: they stay for the next.
            let before = device.session.emulated.calls(op);
            device.session.emulated.inject(op, 4, skip, 1);
            let loaded = backend.load_matrix(&w.view(), &[0.25; N]).map(drop);
            if device.session.emulated.calls(op) - before > u64::from(skip) {
                assert!(problem(loaded).contains("NRT_RESOURCE"), "{op} after {skip}");
            }
            device.session.emulated.inject(op, 0, 0, 0);
        }
    }
    let id = backend.load_matrix(&w.view(), &[0.25; N]).unwrap();
    matmul(&mut backend, id, &random(rng, 3 * K), &mut [0.0; 3 * N]).unwrap();
    drop(backend);
    device.end();
}

/// A cache with one sequence of five tokens on page 3.
struct Kv {
    backend: NeuronBackend<'static>,
    attention: AttentionId,
    cache: CacheId,
    table: PageTable,
}

impl Kv {
    fn new(device: &Device) -> Kv {
        let mut backend = device.backend(ActivationTerms::Two, None);
        let attention = backend.load_attention(&AttentionSpec::new(4, 2, 32), &[0.5; 4]).unwrap();
        let cache = backend.create_cache(&KvConfig::new(KvFormat::Bf16, 1, 9, 8, 2, 32)).unwrap();
        Kv { backend, attention, cache, table: PageTable::new(8, vec![0, 1], vec![3], vec![5]).unwrap() }
    }

    fn append(&mut self, x: &[bf16]) -> Result<()> {
        let heads = || HeadsRef::new(x, 5, 2, 32).unwrap().into();
        self.backend.append(self.cache, 0, &self.table, &[0, 5], heads(), heads())
    }

    fn decode(&mut self, q: &[bf16], out: &mut [bf16]) -> Result<()> {
        let out = HeadsMut::new(out, 1, 4, 32).unwrap();
        let q = HeadsRef::new(q, 1, 4, 32).unwrap();
        self.backend.decode(self.attention, self.cache, 0, &self.table, q.into(), out.into())
    }
}

#[test]
fn a_decode_that_fails_gives_nothing_and_the_next_is_right() {
    let (device, rng) = (Device::new(), &mut Rng(74));
    let (x, q) = (random(rng, 5 * 64), random(rng, 4 * 32));
    let mut kv = Kv::new(&device);
    kv.append(&x).unwrap();
    let mut wanted = vec![bf16::ZERO; 4 * 32];
    kv.decode(&q, &mut wanted).unwrap();
    for op in ["nrt_tensor_write", "nrt_execute", "nrt_tensor_read"] {
        for status in [1, 2, 4, 1002, 1003, 1004, 1006, 1204] {
            device.session.emulated.inject(op, status, 0, 1);
            let mut out = vec![bf16::NAN; 4 * 32];
            assert!(problem(kv.decode(&q, &mut out)).contains(op));
            assert!(out.iter().all(|v| v.is_nan()), "{op} {status}: something was taken for a result");
            kv.decode(&q, &mut out).unwrap();
            assert_eq!(out, wanted, "after {op} {status}");
        }
    }
    drop(kv);
    device.end();
}

/// An append that fails in the middle leaves pages of which nobody knows what they hold: nothing is computed from them, and the
/// cache has to be made anew.
#[test]
fn an_append_that_fails_in_place_ends_its_cache() {
    let (device, rng) = (Device::new(), &mut Rng(75));
    let (x, q) = (random(rng, 5 * 64), random(rng, 4 * 32));
    let mut kv = Kv::new(&device);
    kv.append(&x).unwrap();
    let mut wanted = vec![bf16::ZERO; 4 * 32];
    kv.decode(&q, &mut wanted).unwrap();
    // It did not run: nothing is in doubt.
    device.session.emulated.inject("nrt_execute", 2, 0, 1);
    assert!(problem(kv.append(&x)).contains("NRT_INVALID"));
    let mut out = vec![bf16::NAN; 4 * 32];
    // Which statuses mean that nothing ran is not documented but for a full queue, so that any other counts as run.
    let said = problem(kv.decode(&q, &mut out));
    assert!(said.contains("k_cache") && said.contains("failed execution"), "{said}");
    assert!(out.iter().all(|v| v.is_nan()));
    assert!(problem(kv.append(&x)).contains("failed execution"));
    // Another cache is another matter.
    let mut fresh = Kv::new(&device);
    fresh.append(&x).unwrap();
    fresh.decode(&q, &mut out).unwrap();
    assert_eq!(out, wanted);
    drop((kv, fresh));
    device.end();
}

/// A runtime that reports NaN (before 2.27.23, or when asked to): the call fails, and what holds NaN is no result.
#[test]
fn nan_that_the_runtime_reports_is_an_error() {
    let (device, rng) = (Device::new(), &mut Rng(76));
    let scheme = Scheme::Fp8PerTensor(Fp8::E4M3Fn);
    let (w, mut x) = (RandomMatrix::new(rng, scheme, N, K, 0), RandomMatrix::new(rng, scheme, 3, K, 0));
    let mut backend = device.backend(ActivationTerms::Two, Some(scheme));
    let id = backend.load_matrix(&w.view(), &[]).unwrap();
    let mut run = |x: &RandomMatrix| {
        let mut y = vec![0f32; 3 * N];
        let out = MatMut::new(&mut y, 3, N).unwrap().into();
        backend.matmul(id, Activations::Quantized(&x.view()), out, false).map(|()| y)
    };
    device.session.emulated.set_version([2, 26, 42, 0]);
    let wanted = run(&x).unwrap();
    let code = std::mem::replace(&mut x.codes[K + 5], 0x7F);
    assert!(problem(run(&x).map(drop)).contains("NUM_ERR"));
    // A runtime that does not: NaN is what the formula gives, in every output of that row and in no other.
    device.session.emulated.set_version([2, 34, 10, 0]);
    let y = run(&x).unwrap();
    assert!(y[N..2 * N].iter().all(|v| v.is_nan()));
    assert_eq!((&y[..N], &y[2 * N..]), (&wanted[..N], &wanted[2 * N..]));
    x.codes[K + 5] = code;
    assert_eq!(run(&x).unwrap(), wanted);
    drop(backend);
    device.end();
}

/// What `quantize_mx` makes of NaN is not documented: it is not asked.
#[test]
fn activations_that_are_no_numbers_are_refused() {
    let (device, rng) = (Device::new(), &mut Rng(78));
    let (w, mut x) = (RandomMatrix::new(rng, Scheme::Mxfp4, N, K, 3), random(rng, 3 * K));
    let (mut backend, id) = load(&device, &w);
    for bad in [bf16::NAN, bf16::INFINITY] {
        x[K + 5] = bad;
        let calls = device.session.emulated.log();
        let mut y = vec![7f32; 3 * N];
        let said = matmul(&mut backend, id, &x, &mut y).unwrap_err();
        assert!(matches!(&said, Error::Value { at, .. } if *at == K + 5), "{said:?}");
        assert!(y.iter().all(|v| *v == 7.0));
        assert_eq!(device.session.emulated.log(), calls);
    }
    drop(backend);
    device.end();
}

#[test]
fn a_kernel_that_panics_is_a_failed_call() {
    let (device, rng) = (Device::new(), &mut Rng(77));
    let (w, x) = (RandomMatrix::new(rng, Scheme::Mxfp4, N, K, 3), random(rng, M * K));
    let (mut backend, id) = load(&device, &w);
    device.session.emulated.set_flags(flag::EXEC_PANICS);
    assert!(problem(matmul(&mut backend, id, &x, &mut [0.0; M * N])).contains("1004"));
    device.session.emulated.set_flags(0);
    matmul(&mut backend, id, &x, &mut [0.0; M * N]).unwrap();
    drop(backend);
    device.end();
}
