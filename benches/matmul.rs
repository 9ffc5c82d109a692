//! Matmul call by call under criterion: `cargo bench --bench matmul`. For shares of the machine's limits, measured beside every
//! call, and the roofline: `trnk bench matmul`, from which the cases here come.
//!
//! Decode (m = 1) is reported in bytes of codes and scales read, prefill (m = 512) in floating-point operations. Decode weights
//! rotate over copies that together exceed four times the last-level caches.

#[allow(dead_code)] // the cases of `trnk bench` that this bench has no use for
#[path = "../src/bin/trnk/bench/case.rs"]
mod case;

use case::{Acts, Cold, Dense, Shape, Weights};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::time::Duration;
use trn_kernels::cpu::limits::{Peak, StreamRead};
use trn_kernels::{Cpu, Parallelism};

/// gpt-oss's hidden size.
const SHAPE: Shape = Shape { n: 2880, k: 2880 };
const PREFILL: usize = 512;
/// Seconds that a peak is run for.
const PEAK: f64 = 0.02;

fn pool() -> rayon::ThreadPool {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads start")
}

/// What the machine can do, in this run.
fn limits(c: &mut Criterion) {
    let pool = pool();
    let mut read = StreamRead::new(&pool).expect("memory for four times the last-level caches");
    read.tune(&pool, 3);
    let mut group = c.benchmark_group("limit");
    group.sample_size(10).throughput(Throughput::Bytes(read.bytes() as u64));
    let name = format!("read, {}", read.pattern());
    // The measurement itself says how long a read took: the time until threads wake is not the memory's.
    group.bench_function(name, |b| {
        b.iter_custom(|calls| {
            let seconds: f64 = (0..calls).map(|_| read.bytes() as f64 / read.rate(&pool, read.bytes())).sum();
            Duration::from_secs_f64(seconds)
        });
    });
    for peak in Peak::ALL {
        if let Some(reason) = peak.missing() {
            println!("limit/{peak}: skipped, {reason}");
            continue;
        }
        let flop = 1e9;
        group.throughput(Throughput::Elements(flop as u64));
        group.bench_function(peak.name(), |b| {
            b.iter_custom(|calls| {
                let seconds = peak.rate(&pool, PEAK).map_or(0.0, |rate| flop / rate);
                Duration::from_secs_f64(seconds * calls as f64)
            });
        });
    }
    group.finish();
}

fn matmul(c: &mut Criterion) {
    let pool = pool();
    let cpu = Cpu::try_detect()
        .expect("TRN_KERNELS_ISA names a tier of this host")
        .with_parallelism(Parallelism::Pool(&pool));
    for (name, scheme) in case::SCHEMES {
        let weights = Weights::random(scheme, SHAPE, 3);
        let cold = Cold::new(&cpu, weights, case::cold_bytes()).expect("supported");
        let mut group = c.benchmark_group(name);
        group.sample_size(10);
        for m in [1, PREFILL] {
            let mut dense = Dense::new(&cold, Acts::Bf16, m);
            group.throughput(match m {
                1 => Throughput::Bytes(dense.bytes() as u64),
                _ => Throughput::Elements(dense.flops() as u64),
            });
            // From a thread of the pool, as a runtime would call.
            group.bench_function(format!("m = {m}"), |b| pool.install(|| b.iter(|| dense.call(&cpu).expect("fits"))));
            dense.check().expect("within the bound of the oracle");
        }
        group.finish();
    }
}

criterion_group!(benches, limits, matmul);
criterion_main!(benches);
