//! Packing weights for the device beside a plain copy of as many bytes, in one run: `cargo bench --bench layout`.
//!
//! Throughput counts the bytes of the packed tensors (codes, scales and padding), for the copy the same number. Source and
//! destination together exceed the last-level cache of most machines, so both are bound by memory.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use trn_kernels::Parallelism;
use trn_kernels::num::Fp8;
use trn_kernels::quant::QuantizedMatrix;
use trn_kernels::trainium::layout::{ColumnOrder, GateUp, MxLayout, RowElement, RowsLayout};

/// Eight experts of gpt-oss, one after the other.
const N: usize = 8 * 5760;
const K: usize = 2880;

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| (i.wrapping_mul(0x9E37_79B1) >> 13) as u8 & 0x77).collect()
}

fn layouts(c: &mut Criterion) {
    let (fp4, fp8, bf16) = (pattern(N * K / 2), pattern(N * K), pattern(N * K * 2));
    let scales = vec![120u8; N * K / 32];
    let pool = rayon::ThreadPoolBuilder::new().build().expect("threads");
    let mut group = c.benchmark_group("pack");
    group.sample_size(10);

    let mut bench = |name: &str, bytes: usize, f: &mut dyn FnMut(Parallelism<'_>, &mut [u8])| {
        let mut out = vec![0u8; bytes];
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_function(BenchmarkId::new(name, "copy"), |b| {
            b.iter(|| out.copy_from_slice(black_box(&bf16[..bytes])))
        });
        group.bench_function(BenchmarkId::new(name, "serial"), |b| b.iter(|| f(Parallelism::Serial, &mut out)));
        group.bench_function(BenchmarkId::new(name, "pool"), |b| b.iter(|| f(Parallelism::Pool(&pool), &mut out)));
    };

    let mxfp4 = QuantizedMatrix::mxfp4(N, K, &fp4, &scales).expect("fits");
    let mxfp8 = QuantizedMatrix::mxfp8(Fp8::E4M3Fn, N, K, &fp8, &scales).expect("fits");
    for (name, w, order) in [
        ("mxfp4", &mxfp4, (GateUp::Together, ColumnOrder::Natural)),
        ("mxfp4 split, quads", &mxfp4, (GateUp::Split, ColumnOrder::Quads)),
        ("mxfp8", &mxfp8, (GateUp::Together, ColumnOrder::Natural)),
    ] {
        let layout = MxLayout::new(w.scheme(), N, K, order.0, order.1).expect("served");
        bench(name, layout.data_bytes() + layout.scale_bytes(), &mut |parallelism, out| {
            let (data, scales) = out.split_at_mut(layout.data_bytes());
            layout.pack_into(w, parallelism, data, scales).expect("fits");
        });
    }
    let channel = QuantizedMatrix::fp8_per_channel(Fp8::E4M3Fn, N, K, &fp8, vec![0.01; N]).expect("fits");
    let dense = QuantizedMatrix::bf16(N, K, &bf16).expect("fits");
    for (name, w, element) in [
        ("fp8", &channel, RowElement::Fp8(Fp8::E4M3Fn)),
        ("fp8 halved", &channel, RowElement::Fp8(Fp8::E4M3Ieee)),
        ("bf16", &dense, RowElement::Bf16),
    ] {
        let layout = RowsLayout::of(w, element).expect("served");
        bench(name, layout.data_bytes(), &mut |parallelism, out| {
            layout.pack_into(w, parallelism, out).expect("fits");
        });
    }
    group.finish();
}

criterion_group!(benches, layouts);
criterion_main!(benches);
