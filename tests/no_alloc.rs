//! The hot path allocates nothing: a counting allocator watches repeated calls.

#[path = "support/random.rs"]
mod random;
#[path = "support/tiers.rs"]
mod tiers;

use half::bf16;
use random::{RandomMatrix, Rng, SCHEMES};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use trn_kernels::layer::{
    GateLayout, RopeFrequencies, RopePairs, RopeScaling, RopeTable, RouterMode, SwigluSpec, add, combine_experts,
    rms_norm, rms_norm_quantize, route_top_k, swiglu,
};
use trn_kernels::matmul::{MatmulOptions, PackedExperts, RowSource};
use trn_kernels::num::Fp8;
use trn_kernels::quant::{QuantizeOptions, QuantizedMatrixBuf, Scheme, quantize_into};
use trn_kernels::{Cpu, HeadsMut, MatMut, MatRef, Workspace};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

fn count() {
    ALLOCATIONS.with(|n| n.set(n.get() + 1));
}

// SAFETY: every call is passed on to the system allocator unchanged; counting allocates nothing (a const-initialised Cell).
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
