//! The hot path allocates nothing: a counting allocator watches repeated calls.

#[path = "support/random.rs"]
mod random;
#[path = "support/tiers.rs"]
mod tiers;

use half::{bf16, f16};
use random::{RandomMatrix, Rng, SCHEMES};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use trn_kernels::cpu::Blocking;
use trn_kernels::layer::{
    GateLayout, RopeFrequencies, RopePairs, RopeScaling, RopeTable, RouterMode, SwigluSpec, add, combine_experts,
    rms_norm, rms_norm_quantize, route_top_k, swiglu,
};
use trn_kernels::matmul::{Activation, Activations, MatmulOptions, Output, PackedExperts, PackedMatrix, RowSource};
use trn_kernels::num::Fp8;
use trn_kernels::quant::{QuantizeOptions, QuantizedMatrixBuf, Scheme, quantize_into};
use trn_kernels::{Cpu, HeadsMut, MatMut, MatRef, Parallelism, Workspace};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
    /// Whether this thread counts for the pool under test: others run other tests at the same time.
    static IN_POOL: Cell<bool> = const { Cell::new(false) };
}

/// Allocations of all threads that are [`IN_POOL`].
static OF_POOL: AtomicUsize = AtomicUsize::new(0);

fn count() {
    ALLOCATIONS.with(|n| n.set(n.get() + 1));
    if IN_POOL.get() {
        OF_POOL.fetch_add(1, Relaxed);
    }
}

// SAFETY: every call is passed on to the system allocator unchanged; counting allocates nothing (const-initialised Cells).
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises about `layout` are the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `alloc` or `realloc` above, so from the system allocator, with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as `dealloc`; the caller vouches for `size`.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of this thread while `f` runs.
fn allocations(f: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.with(Cell::get);
    f();
    ALLOCATIONS.with(Cell::get) - before
}

#[test]
fn the_counter_counts() {
    assert!(allocations(|| drop(std::hint::black_box(vec![1u8; 100]))) > 0);
}

#[test]
fn layer_operations_allocate_nothing() {
    let mut rng = Rng(2);
    // More rows than one part of the work holds.
    let (m, k) = (24, 4096);
    let cpu = Cpu::detect();
    let x = rng.wide(m * k, 0..=0);
    let (x, weight) = (MatRef::new(&x, m, k).unwrap(), vec![1.0f32; k]);
    let (mut y, mut ids, mut weights) = (vec![0.0f32; m * k], vec![0u32; m * 4], vec![0.0f32; m * 4]);
    let frequencies = RopeFrequencies::new(10_000.0, 64, RopeScaling::None).unwrap();
    let positions: Vec<u32> = (0..m as u32).collect();
    let mut table = RopeTable::default();
    let (mut quantized, mut ws) = (QuantizedMatrixBuf::new(), Workspace::new());
    let mut all = || {
        rms_norm(&cpu, x, &weight, 1e-5, MatMut::new(&mut y, m, k).unwrap()).unwrap();
        let mxfp8 = (Scheme::Mxfp8(Fp8::E4M3Fn), &QuantizeOptions::default());
        rms_norm_quantize(&cpu, x, &weight, 1e-5, mxfp8, &mut quantized, &mut ws).unwrap();
        add(&cpu, x, MatMut::new(&mut y, m, k).unwrap()).unwrap();
        table.fill(&frequencies, &positions).unwrap();
        table.apply(&cpu, RopePairs::HalfSplit, HeadsMut::new(&mut y, m, k / 64, 64).unwrap()).unwrap();
        let (i, w) = (MatMut::new(&mut ids, m, 4).unwrap(), MatMut::new(&mut weights, m, 4).unwrap());
        route_top_k(RouterMode::SoftmaxAfterTopK, x, i, w).unwrap();
        let w = MatRef::new(&weights[..m], m / 4, 4).unwrap();
        combine_experts(&cpu, x, w, false, MatMut::new(&mut y[..m / 4 * k], m / 4, k).unwrap()).unwrap();
        let out = MatMut::new(&mut y[..m * k / 2], m, k / 2).unwrap();
        swiglu(&cpu, SwigluSpec::GPT_OSS, GateLayout::Interleaved, x, out).unwrap();
    };
    all();
    assert_eq!(allocations(all), 0);
}

#[test]
fn matmul_allocates_nothing() {
    let mut rng = Rng(1);
    let (m, n, k) = (25, 40, 256);
    let x = rng.wide(m * k, 0..=0);
    let bf16s: Vec<bf16> = x.iter().map(|v| bf16::from_f32(*v)).collect();
    let (x, in_bf16) = (MatRef::new(&x, m, k).unwrap(), MatRef::new(&bf16s, m, k).unwrap());
    let mut y = vec![0.0f32; m * n];
    let options = MatmulOptions::default();
    for (cpu, scheme) in tiers::tiers().flat_map(|cpu| SCHEMES.map(|scheme| (cpu, scheme))) {
        let mut ws = Workspace::new();
        let w = RandomMatrix::new(&mut rng, scheme, n, k, 2);
        let packed = cpu.pack(&w.view()).unwrap();
        let experts = PackedExperts::new(vec![packed.clone(), packed.clone()]).unwrap();
        let quantized = RandomMatrix::new(&mut rng, scheme, m, k, 2);
        let quantized = quantized.view();
        let mut all = || {
            macro_rules! out {
                () => {
                    MatMut::new(&mut y, m, n).unwrap()
                };
            }
            cpu.matmul(x, &packed, out!(), &options, &mut ws).unwrap();
            cpu.matmul(in_bf16, &packed, out!(), &options, &mut ws).unwrap();
            cpu.matmul(&quantized, &packed, out!(), &options, &mut ws).unwrap();
            cpu.grouped_matmul(x, &experts, &[0, 4, 25], out!(), &options, &mut ws).unwrap();
            cpu.grouped_matmul(in_bf16, &experts, &[0, 4, 25], out!(), &options, &mut ws).unwrap();
            let ids: [u32; 25] = std::array::from_fn(|i| (i % 3 % 2) as u32);
            cpu.gather_matmul(x, RowSource::Slot, &experts, &ids, 1, out!(), &options, &mut ws).unwrap();
        };
        all();
        assert_eq!(allocations(all), 0, "{scheme:?} on {}", cpu.isa());
    }
}

/// Operands of dense, grouped and gathered matmuls of a few shapes, activations and outputs, and where results go.
struct Matmuls {
    experts: PackedExperts,
    packed: PackedMatrix,
    f: Vec<f32>,
    b: Vec<bf16>,
    h: Vec<f16>,
    bias: Vec<f32>,
    in_f32: Vec<f32>,
    in_bf16: Vec<bf16>,
    ids: Vec<u32>,
    workspace: Workspace,
}

impl Matmuls {
    /// Most rows.
    const M: usize = 64;
    /// Calls of a run.
    const CALLS: usize = 4 * 2 * 3 * 2 * 3;

    fn new(scheme: Scheme) -> Matmuls {
        let (n, k, mut rng) = (70, 160, Rng(3));
        let mut pack = || Cpu::baseline().pack(&RandomMatrix::new(&mut rng, scheme, n, k, 2).view()).unwrap();
        let packed = pack();
        let experts = PackedExperts::new(vec![packed.clone(), pack()]).unwrap();
        let f = rng.wide(Matmuls::M * k, 0..=0);
        Matmuls {
            b: f.iter().map(|v| bf16::from_f32(*v)).collect(),
            h: f.iter().map(|v| f16::from_f32(*v)).collect(),
            bias: rng.wide(2 * n, 0..=0),
            in_f32: vec![0.0; Matmuls::M * n],
            in_bf16: vec![bf16::ZERO; Matmuls::M * n],
            ids: (0..Matmuls::M as u32).map(|i| i % 3 % 2).collect(),
            workspace: Workspace::new(),
            experts,
            packed,
            f,
        }
    }

    fn run(&mut self, cpu: Cpu<'_>) {
        let Matmuls { experts, packed, f, b, h, bias, in_f32, in_bf16, ids, workspace } = self;
        let (n, k) = (packed.n(), packed.k());
        for (m, plain) in [1, 4, 16, Matmuls::M].into_iter().flat_map(|m| [(m, true), (m, false)]) {
            let options = |bias| match plain {
                true => MatmulOptions::default(),
                false => MatmulOptions { bias: Some(bias), alpha: 0.5, accumulate: true, activation: Activation::Silu },
            };
            let (dense, of_experts) = (options(&bias[..n]), options(&bias[..]));
            let xs: [Activations<'_>; 3] = [
                MatRef::new(&f[..m * k], m, k).unwrap().into(),
                MatRef::new(&b[..m * k], m, k).unwrap().into(),
                MatRef::new(&h[..m * k], m, k).unwrap().into(),
            ];
            for (x, of_f32) in xs.into_iter().flat_map(|x| [(x, true), (x, false)]) {
                let mut y = |call: &mut dyn FnMut(Output<'_>)| match of_f32 {
                    true => call(MatMut::new(&mut in_f32[..m * n], m, n).unwrap().into()),
                    false => call(MatMut::new(&mut in_bf16[..m * n], m, n).unwrap().into()),
                };
                y(&mut |y| cpu.matmul(x, packed, y, &dense, workspace).unwrap());
                let offsets = [0, m as u32 / 3, m as u32];
                y(&mut |y| cpu.grouped_matmul(x, experts, &offsets, y, &of_experts, workspace).unwrap());
                let (ids, source) = (&ids[..m], RowSource::Slot);
                y(&mut |y| cpu.gather_matmul(x, source, experts, ids, 1, y, &of_experts, workspace).unwrap());
            }
        }
    }
}

/// Few rows and many, each plain type of activations, two outputs, with and without an epilogue, on each tier: in one workspace, so
/// that one shape after another takes it.
#[test]
fn shapes_and_epilogues_allocate_nothing() {
    for scheme in SCHEMES {
        let mut matmuls = Matmuls::new(scheme);
        for cpu in tiers::tiers() {
            matmuls.run(cpu);
            assert_eq!(allocations(|| matmuls.run(cpu)), 0, "{scheme:?} on {}", cpu.isa());
        }
    }
}

/// On a warmed-up pool: a call from a thread of the pool allocates nothing on any thread; one from outside is handed in through
/// rayon's queue, whose blocks of 63 entries are rayon's to allocate. Nothing else is.
#[test]
fn pools_allocate_the_queue_of_calls_alone() {
    IN_POOL.set(true);
    for threads in [1, 3] {
        let builder = rayon::ThreadPoolBuilder::new().num_threads(threads).start_handler(|_| IN_POOL.set(true));
        let pool = builder.build().unwrap();
        // A thread that first looks for others' work is registered for it, which allocates.
        pool.broadcast(|_| while rayon::yield_now() == Some(rayon::Yield::Executed) {});
        let of_pool = |f: &mut (dyn FnMut() + Send)| {
            let before = OF_POOL.load(Relaxed);
            f();
            OF_POOL.load(Relaxed) - before
        };
        for scheme in [Scheme::Mxfp4, Scheme::Fp8Blockwise { element: Fp8::E4M3Fn, n: 24, k: 128 }] {
            let mut matmuls = Matmuls::new(scheme);
            for cpu in tiers::tiers() {
                // Small matrices fork too.
                let cpu = cpu.with_blocking(Blocking { fork: 0, ..Blocking::default() });
                let lent = cpu.with_parallelism(Parallelism::Pool(&pool));
                let what = format!("{scheme:?} on {}, {threads} threads", cpu.isa());
                matmuls.run(lent);
                let outside = of_pool(&mut || matmuls.run(lent));
                assert!(outside <= Matmuls::CALLS / 63 + 1, "{what}: {outside} for calls from outside");
                pool.install(|| {
                    let current = cpu.with_parallelism(Parallelism::CurrentPool);
                    for cpu in [lent, current] {
                        assert_eq!(of_pool(&mut || matmuls.run(cpu)), 0, "{what}: calls from inside");
                    }
                });
            }
        }
    }
}

/// A decode step of one layer: page table, append, plan, decode; and a prefill of contiguous tokens.
#[test]
fn attention_allocates_nothing() {
    use trn_kernels::attention::{AttentionOut, AttentionSpec, Queries, RaggedKv, plan_decode};
    use trn_kernels::kv::{KvConfig, KvFormat, KvPool, KvSequence, PageTable, append_kv};
    use trn_kernels::num::Fp8;
    use trn_kernels::{HeadsMut, HeadsRef};

    let spec = AttentionSpec::new(4, 2, 32);
    let cpu = Cpu::detect();
    let x = Rng(2).wide(40 * 4 * 32, 0..=0);
    let sinks = [0.5; 4];
    for format in [KvFormat::Bf16, KvFormat::Fp8(Fp8::E4M3Fn), KvFormat::Mxfp4, KvFormat::Nvfp4] {
        let mut pool = KvPool::new(KvConfig::new(format, 1, 8, 16, 2, 32)).unwrap();
        let mut sequences = [KvSequence::new(&pool), KvSequence::new(&pool)];
        sequences.iter_mut().for_each(|s| s.grow(&mut pool, 30).unwrap());
        let mut table = PageTable::from_sequences(&sequences).unwrap();
        let (mut out, mut lse) = (vec![0.0f32; 40 * 4 * 32], vec![0.0f32; 40 * 4]);
        let mut ws = Workspace::new();
        let mut step = || {
            table.refill(&sequences).unwrap();
            let new = HeadsRef::new(&x[..2 * 64], 2, 2, 32).unwrap();
            append_kv(&mut pool, 0, &table, &[0, 1, 2], new, new).unwrap();
            let kv = pool.layer(0).unwrap();
            let plan = plan_decode(&spec, &kv, &table).unwrap();
            let q = HeadsRef::new(&x[..2 * 128], 2, 4, 32).unwrap();
            let heads = HeadsMut::new(&mut out[..2 * 128], 2, 4, 32).unwrap();
            let output = AttentionOut { out: heads, lse: Some(&mut lse[..8]) };
            cpu.decode(&plan, q, &kv, Some(&sinks), output, &mut ws).unwrap();

            let q = HeadsRef::new(&x, 40, 4, 32).unwrap();
            let k = HeadsRef::new(&x[..40 * 64], 40, 2, 32).unwrap();
            let queries = Queries { q, indptr: &[0, 40], sinks: None };
            let output = AttentionOut { out: HeadsMut::new(&mut out, 40, 4, 32).unwrap(), lse: Some(&mut lse) };
            cpu.prefill(&spec, queries, RaggedKv { k, v: k, indptr: &[0, 40] }, output, &mut ws).unwrap();
        };
        step();
        assert_eq!(allocations(step), 0, "{format:?}");
    }
}

#[test]
fn quantizing_activations_again_allocates_nothing() {
    let mut rng = Rng(2);
    let (m, k) = (9, 256);
    let x = rng.wide(m * k, 0..=0);
    let x = MatRef::new(&x, m, k).unwrap();
    for scheme in SCHEMES {
        let mut out = QuantizedMatrixBuf::new();
        let mut quantize = || {
            quantize_into(x, scheme, &QuantizeOptions::default(), &mut out).unwrap();
            assert_eq!(out.view().n(), m);
        };
        quantize();
        assert_eq!(allocations(quantize), 0, "{scheme:?}");
    }
}
