//! Packing weights and caches for the device, and unpacking them, beside a plain copy: `cargo bench --bench layout [-- NAME]`.
//!
//! One line for each layout and direction: gigabytes written a second by one `copy_from_slice` of as many bytes, by the operation
//! on one thread and on all, and the last as a share of the copy. Every operation reads about as many bytes as it writes, so
//! bytes written measure both alike. Samples of the three take turns, and the best of each counts: what else the machine does
//! meets all of them and is left out of all. Operands exceed the last-level cache; outputs are reused, so no page is touched for the first time.

use std::hint::black_box;
use std::time::Instant;
use trn_kernels::kv::{KvFormat, KvPlane, KvScale, KvShape, PagedKv};
use trn_kernels::num::Fp8;
use trn_kernels::quant::{QuantizedMatrix, QuantizedMatrixBuf};
use trn_kernels::trainium::layout::{ColumnOrder, GateUp, KvHeads, KvRowsLayout, MxLayout, RowElement, RowsLayout};
use trn_kernels::{Parallelism, Parallelism::Serial};

/// Eight experts of gpt-oss, one after the other.
const N: usize = 8 * 5760;
const K: usize = 2880;

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| (i.wrapping_mul(0x9E37_79B1) >> 13) as u8 & 0x77).collect()
}

/// Prints a line. `f` runs the operation, which writes `bytes` bytes.
fn line(name: &str, pool: &rayon::ThreadPool, samples: usize, bytes: usize, mut f: impl FnMut(Parallelism<'_>)) {
    if std::env::args().skip(1).any(|a| !a.starts_with('-') && !name.contains(&a)) {
        return;
    }
    let (source, mut copy) = (pattern(bytes), vec![1u8; bytes]);
    f(Serial); // touches its output
    let mut times: [Vec<f64>; 3] = Default::default();
    for _ in 0..samples {
        for (way, times) in times.iter_mut().enumerate() {
            let start = Instant::now();
            match way {
                0 => black_box(&mut copy).copy_from_slice(black_box(&source)),
                1 => f(Serial),
                _ => f(Parallelism::Pool(pool)),
            }
            times.push(start.elapsed().as_secs_f64());
        }
    }
    let [copy, serial, all] = times.map(|t| bytes as f64 / t.into_iter().fold(f64::INFINITY, f64::min) / 1e9);
    println!("{name:34} {copy:8.2} {serial:8.2} {all:8.2} {:7.2}", all / copy);
}

fn main() {
    // `cargo test --benches` asks for a short run.
    let samples = if std::env::args().any(|a| a == "--bench") { 15 } else { 1 };
    let (fp4, fp8, bf16) = (pattern(N * K / 2), pattern(N * K), pattern(N * K * 2));
    let scales = vec![120u8; N * K / 32];
    let pool = rayon::ThreadPoolBuilder::new().build().expect("threads");
    println!("{:34} {:>8} {:>8} {:>8} {:>7}", "GB/s written", "copy", "1 thread", pool.current_num_threads(), "share");

    let mxfp4 = QuantizedMatrix::mxfp4(N, K, &fp4, &scales).expect("fits");
    let mxfp8 = QuantizedMatrix::mxfp8(Fp8::E4M3Fn, N, K, &fp8, &scales).expect("fits");
    let mut back = QuantizedMatrixBuf::new();
    for (name, w, order) in [
        ("mx-quads mxfp4", &mxfp4, (GateUp::Together, ColumnOrder::Natural)),
        ("mx-quads mxfp4 split, quads", &mxfp4, (GateUp::Split, ColumnOrder::Quads)),
        ("mx-quads mxfp8", &mxfp8, (GateUp::Together, ColumnOrder::Natural)),
        ("mx-quads mxfp8 split, quads", &mxfp8, (GateUp::Split, ColumnOrder::Quads)),
    ] {
        let layout = MxLayout::new(w.scheme(), N, K, order.0, order.1).expect("served");
        let (mut data, mut blocks) = (vec![0; layout.data_bytes()], vec![0; layout.scale_bytes()]);
        line(&format!("pack {name}"), &pool, samples, data.len() + blocks.len(), |parallelism| {
            layout.pack_into(w, parallelism, &mut data, &mut blocks).expect("fits");
        });
        let packed = layout.pack(w, Parallelism::Pool(&pool)).expect("fits");
        line(&format!("unpack {name}"), &pool, samples, w.bytes(), |parallelism| {
            packed.unpack_into(parallelism, &mut back).expect("fits");
        });
    }
    let channel = QuantizedMatrix::fp8_per_channel(Fp8::E4M3Fn, N, K, &fp8, vec![0.01; N]).expect("fits");
    let dense = QuantizedMatrix::bf16(N, K, &bf16).expect("fits");
    for (name, w, element) in [
        ("rows-128 fp8", &channel, RowElement::Fp8(Fp8::E4M3Fn)),
        ("rows-128 fp8 halved", &channel, RowElement::Fp8(Fp8::E4M3Ieee)),
        ("rows-128 bf16", &dense, RowElement::Bf16),
    ] {
        let layout = RowsLayout::of(w, element).expect("served");
        let mut data = vec![0; layout.data_bytes()];
        line(&format!("pack {name}"), &pool, samples, data.len(), |parallelism| {
            layout.pack_into(w, parallelism, &mut data).expect("fits");
        });
        let (packed, _) = layout.pack(w, Parallelism::Pool(&pool)).expect("fits");
        line(&format!("unpack {name}"), &pool, samples, w.bytes(), |parallelism| {
            packed.unpack_into(parallelism, &mut back).expect("fits");
        });
    }
    for (name, format, element, heads) in [
        ("kv-rows bf16 apart", KvFormat::Bf16, RowElement::Bf16, KvHeads::Apart),
        ("kv-rows fp8 apart", KvFormat::Fp8(Fp8::E4M3Fn), RowElement::Fp8(Fp8::E4M3Fn), KvHeads::Apart),
        ("kv-rows fp8 halved", KvFormat::Fp8(Fp8::E4M3Fn), RowElement::Fp8(Fp8::E4M3Ieee), KvHeads::Together),
    ] {
        // 8 kv heads of 64, as gpt-oss; pages of 16 tokens.
        let shape =
            KvShape { format, num_pages: 4096, page_size: 16, num_kv_heads: 8, head_dim_qk: 64, head_dim_vo: 64 };
        let bytes = 4096 * 16 * 8 * 64 * element.bytes();
        let plane = |from: usize| KvPlane { codes: &bf16[from..from + bytes], block_scales: &[], scale: KvScale::One };
        let cache = PagedKv::new(shape, plane(0), plane(bytes)).expect("fits");
        let layout = KvRowsLayout::new(shape, element, heads).expect("served");
        let (mut k, mut v) = (vec![0; bytes], vec![0; bytes]);
        line(&format!("pack {name}"), &pool, samples, 2 * bytes, |parallelism| {
            layout.pack_into(&cache, parallelism, [&mut k, &mut v]).expect("fits");
        });
        let (packed, _) = layout.pack(&cache, Serial).expect("fits");
        line(&format!("unpack {name}"), &pool, samples, 2 * bytes, |parallelism| {
            packed.unpack_into(parallelism, [&mut k, &mut v]).expect("fits");
        });
    }
}
