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
use trn_kernels::matmul::{Activations, MatmulOptions, PackedExperts, PackedMatrix, RowSource};
use trn_kernels::num::Fp8;
use trn_kernels::quant::{QuantizedMatrix, Scheme};
use trn_kernels::{Cpu, Isa, MatMut, MatRef, Parallelism, Workspace};

fn run(cpu: Cpu<'_>, x: &[bf16], m: usize, w: &PackedMatrix) -> Vec<u32> {
    run_any(cpu, MatRef::new(x, m, w.k()).unwrap().into(), w)
}

fn run_any(cpu: Cpu<'_>, x: Activations<'_>, w: &PackedMatrix) -> Vec<u32> {
    let mut y = vec![0.0f32; x.m() * w.n()];
    let out = MatMut::new(&mut y, x.m(), w.n()).unwrap();
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

/// Which shortcut keeps every bit is decided for a block of rows: a row that forbids it changes how the others are computed, not their
/// bits; nor do they change its own.
#[test]
fn rows_beside_what_is_no_number() {
    let mut rng = Rng(6);
    let specials = [1e-40, f32::MIN_POSITIVE, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 3e38, -3e38];
    for scheme in SCHEMES {
        let (n, k) = (35, 160);
        let w = RandomMatrix::new(&mut rng, scheme, n, k, 4);
        let ordinary = activations(&mut rng, 40 * k);
        // Codes: a scale of NaN, the least and the largest one.
        let codes = RandomMatrix::new(&mut rng, Scheme::Mxfp8(Fp8::E5M2), 40, k, 3);
        for cpu in tiers() {
            let packed = cpu.pack(&w.view()).unwrap();
            let each_alone = |x: &[bf16]| x.chunks(k).map(|x| run(cpu, x, 1, &packed)).collect::<Vec<_>>();
            let alone = each_alone(&ordinary);
            let in_f32 = |x: &[bf16]| {
                let f: Vec<f32> = x.iter().map(|v| v.to_f32()).collect();
                run_any(cpu, MatRef::new(&f, x.len() / k, k).unwrap().into(), &packed)
            };
            for (special, m) in specials.into_iter().flat_map(|special| [2, 9, 40].map(|m| (special, m))) {
                let mut x = ordinary[..m * k].to_vec();
                let row = rng.below(m);
                x[row * k + rng.below(k)] = bf16::from_f32(special);
                let mut want = alone[..m].to_vec();
                want[row] = run(cpu, &x[row * k..][..k], 1, &packed);
                let want = want.concat();
                // In one block of rows, and in blocks of which one holds the row.
                for cpu in [cpu, cpu.with_blocking(Blocking { rows: 5, ..Blocking::default() })] {
                    let what = format!("{scheme:?} on {}: {special:e} in row {row} of {m}", cpu.isa());
                    assert_eq!(run(cpu, &x, m, &packed), want, "{what}");
                }
                assert_eq!(in_f32(&x), want, "f32 x {scheme:?} on {}: {special:e} in row {row} of {m}", cpu.isa());
            }
            let view = codes.view();
            let whole = |rows: QuantizedMatrix<'_>| run_any(cpu, (&rows).into(), &packed);
            let alone: Vec<_> = (0..40).map(|row| whole(view.slice_n(row..row + 1).unwrap())).collect();
            for (scale, m) in [0, 254, 255].into_iter().flat_map(|scale| [2, 9, 40].map(|m| (scale, m))) {
                let row = rng.below(m);
                let mut codes = codes.clone();
                codes.scales[row * k / 32 + rng.below(k / 32)] = scale;
                let view = codes.view();
                let mut want = alone[..m].to_vec();
                want[row] = whole(view.slice_n(row..row + 1).unwrap());
                let what = format!("codes x {scheme:?} on {}: scale {scale} in row {row} of {m}", cpu.isa());
                assert_eq!(whole(view.slice_n(0..m).unwrap()), want.concat(), "{what}");
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
        (Scheme::Fp8Blockwise { element: Fp8::E4M3Fn, n: 128, k: 32 }, 4, 30),
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

/// Dense, grouped and gathered matmul of the same rows, one after the other, in one list of bits.
struct Calls {
    packed: PackedMatrix,
    experts: PackedExperts,
    x: Vec<bf16>,
    ids: Vec<u32>,
    offsets: Vec<u32>,
}

impl Calls {
    const M: usize = 20;
    const TOP_K: usize = 2;

    fn new(scheme: Scheme) -> Calls {
        let mut rng = Rng(7);
        let (n, k, experts) = (150, 160, 4);
        let packed: Vec<_> = (0..experts)
            .map(|_| Cpu::baseline().pack(&RandomMatrix::new(&mut rng, scheme, n, k, 4).view()).unwrap())
            .collect();
        Calls {
            packed: packed[0].clone(),
            experts: PackedExperts::new(packed).unwrap(),
            x: activations(&mut rng, Calls::M * k),
            ids: (0..Calls::M * Calls::TOP_K).map(|_| rng.below(experts) as u32).collect(),
            offsets: vec![0, 3, 3, 19, Calls::M as u32],
        }
    }

    fn run(&self, cpu: Cpu<'_>) -> Vec<u32> {
        let (m, n, k) = (Calls::M, self.packed.n(), self.packed.k());
        let (options, ws) = (MatmulOptions::default(), &mut Workspace::new());
        let x = MatRef::new(&self.x, m, k).unwrap();
        let mut bits = run(cpu, &self.x, m, &self.packed);
        bits.extend(run(cpu, &self.x[..k], 1, &self.packed));
        let mut y = vec![0.0f32; m * n];
        let out = MatMut::new(&mut y, m, n).unwrap();
        cpu.grouped_matmul(x, &self.experts, &self.offsets, out, &options, ws).unwrap();
        bits.extend(y.iter().map(|v| v.to_bits()));
        let mut y = vec![0.0f32; m * Calls::TOP_K * n];
        let out = MatMut::new(&mut y, m * Calls::TOP_K, n).unwrap();
        let (source, top_k) = (RowSource::Token, Calls::TOP_K);
        cpu.gather_matmul(x, source, &self.experts, &self.ids, top_k, out, &options, ws).unwrap();
        bits.extend(y.iter().map(|v| v.to_bits()));
        bits
    }
}

/// Whose thread a call comes from: a pool's own, another pool's, none's; and calls that meet in one pool.
#[test]
fn any_pool_from_any_thread() {
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let (own, foreign) = (pool(3), pool(2));
    for scheme in [Scheme::Mxfp4, Scheme::Fp8Blockwise { element: Fp8::E4M3Fn, n: 128, k: 32 }] {
        let calls = &Calls::new(scheme);
        for cpu in tiers() {
            let want = &calls.run(cpu);
            let forks = cpu.with_blocking(Blocking { fork: 0, tasks: 7, ..Blocking::default() });
            let on_own = forks.with_parallelism(Parallelism::Pool(&own));
            let current = forks.with_parallelism(Parallelism::CurrentPool);
            let check = |cpu: Cpu<'_>, from: &str| {
                assert!(calls.run(cpu) == *want, "{scheme:?} on {}, {from}", cpu.isa());
            };
            assert_eq!(own.install(|| current.parallelism().threads()), 3);
            own.install(|| check(current, "the current pool"));
            check(current, "the current pool of a thread of none, which is the global one");
            foreign.install(|| check(current, "the current pool, another one"));
            own.install(|| check(on_own, "its own pool"));
            foreign.install(|| check(on_own, "a pool from a thread of another"));
            // Calls that wait for each other's tasks, on threads of the pool and of none.
            std::thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| (0..3).for_each(|_| check(on_own, "a pool from two threads at the same time")));
                }
            });
            own.scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|_| check(current, "calls inside one pool at the same time"));
                    scope.spawn(|_| check(on_own, "calls of a pool inside itself at the same time"));
                }
            });
            // Each pool's threads wait for the other's.
            rayon::join(
                || foreign.install(|| check(on_own, "one pool from the other")),
                || own.install(|| check(forks.with_parallelism(Parallelism::Pool(&foreign)), "and the other way")),
            );
        }
    }
}
