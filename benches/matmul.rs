//! Matmul beside this machine's read bandwidth, in one run: `cargo bench --bench matmul`.
//!
//! Decode (m = 1) is reported in bytes of codes and scales read, prefill (m = 64) in floating-point operations. Decode weights
//! rotate over copies that together exceed the last-level cache. The portable tier makes no claim of speed: this shows where it is.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use std::hint::black_box;
use trn_kernels::matmul::MatmulOptions;
use trn_kernels::num::Fp8;
use trn_kernels::quant::QuantizedMatrix;
use trn_kernels::{Cpu, MatMut, MatRef, Workspace};

/// gpt-oss's hidden size.
const N: usize = 2880;
const K: usize = 2880;
/// More than the last-level cache of most machines.
const COLD: usize = 192 << 20;

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| (i.wrapping_mul(0x9E37_79B1) >> 13) as u8 & 0x77).collect()
}

fn read_bandwidth(c: &mut Criterion) {
    let data: Vec<u64> = (0..COLD as u64 / 8).collect();
    let mut group = c.benchmark_group("limit");
    group.throughput(Throughput::Bytes(COLD as u64)).sample_size(10);
    group.bench_function("read, one stream", |b| b.iter(|| black_box(&data).iter().fold(0u64, |s, x| s ^ x)));
    group.finish();
}

fn matmul(c: &mut Criterion) {
    let (codes4, scales, codes8) = (pattern(N * K / 2), vec![120u8; N * K / 32], pattern(N * K));
    let weights = [
        ("mxfp4", QuantizedMatrix::mxfp4(N, K, &codes4, &scales)),
        ("mxfp8 e4m3", QuantizedMatrix::mxfp8(Fp8::E4M3Fn, N, K, &codes8, &scales)),
        ("fp8 per channel", QuantizedMatrix::fp8_per_channel(Fp8::E4M3Fn, N, K, &codes8, vec![0.01; N])),
    ];
    let cpu = Cpu::detect();
    let mut ws = Workspace::new();
    for (name, w) in weights {
        let w = w.expect("shapes fit");
        let packed = cpu.pack(&w).expect("supported");
        let copies: Vec<_> = (0..COLD.div_ceil(packed.bytes())).map(|_| packed.clone()).collect();
        let mut group = c.benchmark_group(name);
        group.sample_size(10);
        for m in [1, 64] {
            let x = vec![bf16::from_f32(0.5); m * K];
            let mut y = vec![bf16::ZERO; m * N];
            group.throughput(match m {
                1 => Throughput::Bytes(packed.bytes() as u64),
                _ => Throughput::Elements((2 * m * N * K) as u64),
            });
            let mut next = copies.iter().cycle();
            group.bench_function(format!("m = {m}"), |b| {
                b.iter(|| {
                    let w = next.next().expect("a cycle has no end");
                    let (x, y) = (MatRef::new(&x, m, K).expect("fits"), MatMut::new(&mut y, m, N).expect("fits"));
                    cpu.matmul(x, w, y, &MatmulOptions::default(), &mut ws).expect("fits");
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, read_bandwidth, matmul);
criterion_main!(benches);
