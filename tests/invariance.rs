//! An output depends on its own row of x and its own row of w, and on nothing else: not on the other rows, on threads, on how loops
//! are cut, on how n is split, on who packed the weights.

#[path = "support/random.rs"]
mod random;
#[path = "support/tiers.rs"]
mod tiers;

use half::bf16;
use random::{RandomMatrix, Rng, SCHEMES};
use tiers::tiers;
use trn_kernels::cpu::{Blocking, Caches};
use trn_kernels::matmul::{MatmulOptions, PackedExperts, PackedMatrix, RowSource};
use trn_kernels::quant::Scheme;
use trn_kernels::{Cpu, Isa, MatMut, MatRef, Parallelism, Workspace};

fn run(cpu: Cpu<'_>, x: &[bf16], m: usize, w: &PackedMatrix) -> Vec<u32> {
    let mut y = vec![0.0f32; m * w.n()];
    let (x, out) = (MatRef::new(x, m, w.k()).unwrap(), MatMut::new(&mut y, m, w.n()).unwrap());
    cpu.matmul(x, w, out, &MatmulOptions::default(), &mut Workspace::new()).unwrap();
    y.iter().map(|v| v.to_bits()).collect()
}

fn activations(rng: &mut Rng, len: usize) -> Vec<bf16> {
    rng.wide(len, -3..=3).iter().map(|v| bf16::from_f32(*v)).collect()
}

/// Ways to cut loops: each field small, each field as large as it may be.
fn cuts() -> Vec<Blocking> {
    // Small matrices fork too.
    let usual = Blocking { fork: 0, ..Blocking::default() };
    let huge = usize::MAX;
    vec![
        usual,
        Blocking { streams: 1, prefetch: 0, ..usual },
        Blocking { streams: 3, prefetch: huge, ..usual },
        Blocking { chunk_steps: 3, k_block: 96, ..usual },
        Blocking { chunk_steps: huge, k_block: huge, ..usual },
        Blocking { rows: 5, sums: 1, tile_sums: 1, scratch: 1, ..usual },
        Blocking { tasks: 7, store: 1, ..usual },
        Blocking { tasks: huge, rows: huge, ..usual },
        Blocking { store: huge, fork: huge, ..usual },
        Blocking { tile_steps: 0, sums: 0, tile_sums: 0, rows: 17, ..usual },
        Blocking { tile_steps: huge, sums: huge, tile_sums: huge, ..usual },
        Blocking {
            streams: 0,
            prefetch: 0,
            chunk_steps: 0,
            k_block: 0,
            tile_steps: 0,
            rows: 0,
            sums: 0,
            tile_sums: 0,
            scratch: 0,
            tasks: 0,
            store: 0,
            fork: 0,
        },
        Blocking { fork: 1, ..Blocking::of(Caches { l1: 0, l2: 0 }) },
        Blocking::default(),
    ]
}

#[test]
fn rows_alone_or_in_a_batch() {
    let mut rng = Rng(1);
    for scheme in SCHEMES {
        let (m, n, k) = (21, 70, 288);
        let w = RandomMatrix::new(&mut rng, scheme, n, k, 4);
        let x = activations(&mut rng, m * k);
        for cpu in tiers() {
            let packed = cpu.pack(&w.view()).unwrap();
            let whole = run(cpu, &x, m, &packed);
            for (first, count) in [(0, 1), (20, 1), (3, 2), (4, 3), (9, 4), (7, 5), (1, 8), (2, 13)] {
                let part = run(cpu, &x[first * k..][..count * k], count, &packed);
                let what = format!("{scheme:?} on {}: rows {first}..{}", cpu.isa(), first + count);
                assert_eq!(part, whole[first * n..][..count * n], "{what}");
            }
        }
    }
}

#[test]
fn threads_and_cuts() {
    let mut rng = Rng(2);
    for scheme in SCHEMES {
        let (n, k) = (330, 416);
        let w = RandomMatrix::new(&mut rng, scheme, n, k, 4);
        let x = activations(&mut rng, 19 * k);
        let packed = Cpu::baseline().pack(&w.view()).unwrap();
        for m in [1, 4, 19] {
            let whole = run(Cpu::detect(), &x[..m * k], m, &packed);
            for threads in 1..=8 {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                for cpu in tiers().filter(|cpu| cpu.isa() > Isa::Portable || threads % 4 == 0) {
                    let cuts = cuts();
                    let cpu = cpu.with_parallelism(Parallelism::Pool(&pool)).with_blocking(cuts[threads % cuts.len()]);
                    let y = run(cpu, &x[..m * k], m, &packed);
                    assert_eq!(y, whole, "{scheme:?}, m {m}, {threads} threads, {}", cpu.isa());
                }
            }
            for (cut, cpu) in cuts().into_iter().flat_map(|cut| tiers().map(move |cpu| (cut, cpu))) {
                let y = run(cpu.with_blocking(cut), &x[..m * k], m, &packed);
                assert_eq!(y, whole, "{scheme:?}, m {m}, {cut:?} on {}", cpu.isa());
            }
        }
    }
}

#[test]
fn splits_of_n() {
    let mut rng = Rng(3);
    for scheme in SCHEMES {
        let (m, n, k) = (3, 144, 160);
        let w = RandomMatrix::new(&mut rng, scheme, n, k, 4);
        let (w, x) = (w.view(), activations(&mut rng, m * k));
        let tile = if let Scheme::Fp8Blockwise { n, .. } = scheme { n } else { 1 };
        for cpu in tiers() {
            let whole = run(cpu, &x, m, &cpu.pack(&w).unwrap());
            for split in
                [1, 16, 17, 48, 100].map(|at: usize| at.next_multiple_of(tile)).into_iter().filter(|at| *at < n)
            {
                for range in [0..split, split..n] {
                    let y = run(cpu, &x, m, &cpu.pack(&w.slice_n(range.clone()).unwrap()).unwrap());
                    for i in 0..m {
                        let whole = &whole[i * n..][range.clone()];
                        assert_eq!(&y[i * range.len()..][..range.len()], whole, "{scheme:?} rows {range:?}");
                    }
                }
            }
        }
    }
}

/// Who packs, and on how many threads, does not change a byte.
#[test]
fn packed_bytes() {
    let mut rng = Rng(4);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    for scheme in SCHEMES {
        let w = RandomMatrix::new(&mut rng, scheme, 150, 192, 4);
        let bytes = |cpu: Cpu<'_>| {
            let mut bytes = vec![];
            cpu.pack(&w.view()).unwrap().write_to(&mut bytes).unwrap();
            bytes
        };
        let baseline = bytes(Cpu::baseline());
        for cpu in tiers() {
            assert_eq!(bytes(cpu), baseline, "{scheme:?} on {}", cpu.isa());
            assert_eq!(bytes(cpu.with_parallelism(Parallelism::Pool(&pool))), baseline, "{scheme:?} on threads");
        }
    }
}

/// Experts on threads: rows sorted or gathered have the bits of each expert's own matmul, on every tier, with few experts and with
/// more than a batch takes, however loops are cut.
#[test]
fn experts_on_threads() {
    let mut rng = Rng(5);
    for (scheme, experts, tokens) in [
        (Scheme::Mxfp4, 4, 30),
        (Scheme::Mxfp4, 90, 60),
        (Scheme::Nvfp4, 4, 30),
        (Scheme::Fp8Blockwise { element: trn_kernels::num::Fp8::E4M3Fn, n: 128, k: 32 }, 4, 30),
    ] {
        let (n, k, top_k) = (100, 160, 3);
        let data: Vec<_> = (0..experts).map(|_| RandomMatrix::new(&mut rng, scheme, n, k, 4)).collect();
        let packed: Vec<_> = data.iter().map(|w| Cpu::detect().pack(&w.view()).unwrap()).collect();
        let stack = PackedExperts::new(packed.clone()).unwrap();
        let x = activations(&mut rng, tokens * k);
        let ids: Vec<u32> = (0..tokens * top_k).map(|_| rng.below(experts) as u32).collect();
        let row = |slot: usize| &x[slot / top_k * k..][..k];
        let alone: Vec<Vec<u32>> =
            ids.iter().enumerate().map(|(slot, id)| run(Cpu::detect(), row(slot), 1, &packed[*id as usize])).collect();
        // The same sorted.
        let mut order: Vec<usize> = (0..ids.len()).collect();
        order.sort_by_key(|slot| ids[*slot]);
        let sorted: Vec<bf16> = order.iter().flat_map(|slot| row(*slot)).copied().collect();
        let offsets: Vec<u32> =
            (0..=experts).map(|e| ids.iter().filter(|id| (**id as usize) < e).count() as u32).collect();
        for threads in [1, 3, 8] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for (cpu, cut) in tiers().flat_map(|cpu| cuts().into_iter().map(move |cut| (cpu, cut))) {
                let cpu = cpu.with_parallelism(Parallelism::Pool(&pool)).with_blocking(cut);
                let mut y = vec![0.0f32; ids.len() * n];
                let (options, ws) = (MatmulOptions::default(), &mut Workspace::new());
                let check = |y: &mut Vec<f32>, slot_at: &dyn Fn(usize) -> usize| {
                    for (at, y) in y.chunks_exact_mut(n).enumerate() {
                        let got: Vec<u32> = y.iter().map(|v| v.to_bits()).collect();
                        assert_eq!(got, alone[slot_at(at)], "{scheme:?} row {at} on {}, {cut:?}", cpu.isa());
                        y.fill(f32::NAN);
                    }
                };
                let out = MatMut::new(&mut y, ids.len(), n).unwrap();
                let rows = MatRef::new(&x, tokens, k).unwrap();
                cpu.gather_matmul(rows, RowSource::Token, &stack, &ids, top_k, out, &options, ws).unwrap();
                check(&mut y, &|at| at);
                let out = MatMut::new(&mut y, ids.len(), n).unwrap();
                let rows = MatRef::new(&sorted, ids.len(), k).unwrap();
                cpu.grouped_matmul(rows, &stack, &offsets, out, &options, ws).unwrap();
                check(&mut y, &|at| order[at]);
            }
        }
    }
}
