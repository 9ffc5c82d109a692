//! The AMX tier: that tiles are taken where they are to be, and that a tile product is what docs/numerics.md section 2 says. Bits are
//! compared in tests/tiers_agree.rs. Runs on an emulator of the instructions where the machine has none.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

#[path = "support/random.rs"]
mod random;
#[path = "support/tiers.rs"]
mod tiers;

use half::bf16;
use random::{RandomMatrix, Rng, SCHEMES};
use std::arch::asm;
use std::sync::Mutex;
use tiers::amx;
use trn_kernels::matmul::{Activations, MatmulOptions, MatmulProblem};
use trn_kernels::num::Fp8;
use trn_kernels::quant::Scheme;
use trn_kernels::{Cpu, Isa, MatMut, MatRef, Workspace};

/// Products are counted, so one test runs at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// The bits of a matmul.
fn bits(cpu: Cpu<'_>, x: Activations<'_>, w: &RandomMatrix) -> Vec<u32> {
    let (m, n) = (x.m(), w.view().n());
    let mut y = vec![0f32; m * n];
    let packed = cpu.pack(&w.view()).unwrap();
    let out = MatMut::new(&mut y, m, n).unwrap();
    cpu.matmul(x, &packed, out, &MatmulOptions::default(), &mut Workspace::new()).unwrap();
    y.iter().map(|v| v.to_bits()).collect()
}

/// Tile products of a matmul, whose bits are compared too; `None` if the machine itself has AMX, which does not count.
fn products(x: Activations<'_>, w: &RandomMatrix) -> Option<u64> {
    let before = amx::products();
    let y = bits(Cpu::with_isa(Isa::Amx).unwrap(), x, w);
    let after = amx::products();
    assert!(y == bits(Cpu::with_isa(Isa::Avx512).unwrap(), x, w), "AMX and AVX-512 differ");
    Some(after? - before.unwrap_or(0))
}

/// Where the machine itself has AMX nobody counts products: there this is that the plan says tiles and bits are the same.
#[test]
fn tiles_are_taken() {
    if !amx::available() {
        return eprintln!("skipped: neither AMX nor AVX-512 with VBMI and VBMI2");
    }
    let _alone = ALONE.lock().unwrap();
    // A first product, so that "none counted" means that the machine does not count.
    one_product(&[[0x3F80; 32]; 16], &[[0x3F80; 32]; 16], &mut [[0.0; 16]; 16]);
    if amx::products().is_none() {
        eprintln!("skipped in part: this machine has AMX, so tile products are not counted");
    }
    let mut rng = Rng(1);
    let tiled = Scheme::Fp8Blockwise { element: Fp8::E4M3Fn, n: 128, k: 128 };
    for scheme in SCHEMES.into_iter().chain([tiled]) {
        for (m, n, k) in [(1, 16, 32), (4, 100, 288), (16, 64, 256), (17, 33, 160), (70, 130, 1088)] {
            let w = RandomMatrix::new(&mut rng, scheme, n, k, 1);
            let f = rng.wide(m * k, -3..=3);
            let b: Vec<bf16> = f.iter().map(|v| bf16::from_f32(*v)).collect();
            // Scales that change inside a group of four steps are left to AVX-512.
            let odd_tiles = matches!(scheme, Scheme::Fp8Blockwise { k: tile, .. } if tile % 128 != 0 && tile < k);
            let all = m.div_ceil(16) * n.div_ceil(16) * k / 32;
            let wanted = |n: usize| amx::products().map(|_| n as u64);
            let what = format!("{scheme:?} {m}x{n}x{k}");
            let text = Cpu::with_isa(Isa::Amx).unwrap().explain(&MatmulProblem { scheme, m, n, k }).unwrap();
            let kernel = if m <= 16 { "AMX decode kernel" } else { "AMX prefill kernel" };
            assert_eq!(text.contains(kernel), !odd_tiles, "{what}: {text}");
            let of_bf16 = products(MatRef::new(&b, m, k).unwrap().into(), &w);
            assert_eq!(of_bf16, wanted(if odd_tiles { 0 } else { all }), "{what}");
            let q = RandomMatrix::new(&mut rng, Scheme::Mxfp8(Fp8::E5M2), m, k, 1);
            assert_eq!(products((&q.view()).into(), &w), wanted(if odd_tiles { 0 } else { all }), "MXFP8 x {what}");
            // What bf16 does not hold, what may be flushed, and what is no number.
            assert_eq!(products(MatRef::new(&f, m, k).unwrap().into(), &w), wanted(0), "f32 x {what}");
            for odd in [f32::from_bits(0x0080_0000), f32::INFINITY, f32::NAN] {
                let mut b = b.clone();
                b[m * k / 2] = bf16::from_f32(odd);
                assert_eq!(products(MatRef::new(&b, m, k).unwrap().into(), &w), wanted(0), "{odd:e} in x, {what}");
            }
        }
    }
}

/// `c += a b` by one instruction, the machine's or the emulator's.
fn one_product(a: &[[u16; 32]; 16], b: &[[u16; 32]; 16], c: &mut [[f32; 16]; 16]) {
    let mut config = [0u8; 64];
    config[0] = 1;
    for tile in 0..3 {
        (config[16 + 2 * tile], config[48 + tile]) = (64, 16);
    }
    // SAFETY: the caller has seen that AMX's instructions are executed; the config is valid; each tile is 16 rows of 64 bytes, all
    // inside the arrays; tiles are released.
    unsafe {
        asm!(
            "ldtilecfg [{config}]",
            "tileloadd tmm0, [{c} + {line} * 1]",
            "tileloadd tmm1, [{a} + {line} * 1]",
            "tileloadd tmm2, [{b} + {line} * 1]",
            "tdpbf16ps tmm0, tmm1, tmm2",
            "tilestored [{c} + {line} * 1], tmm0",
            "tilerelease",
            config = in(reg) config.as_ptr(),
            a = in(reg) a.as_ptr(),
            b = in(reg) b.as_ptr(),
            c = in(reg) c.as_mut_ptr(),
            line = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _,
            options(nostack),
        );
    }
}

fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

/// On a machine with AMX this is what the crate relies on, measured; elsewhere it tests the emulator. Regimes of exponents: one
/// where subnormals arise in every product, one where sums overflow and infinities meet.
#[test]
fn a_product_is_a_step() {
    if !amx::available() {
        return eprintln!("skipped: neither AMX nor AVX-512 with VBMI and VBMI2");
    }
    let _alone = ALONE.lock().unwrap();
    let mut rng = Rng(2);
    for (exponents, rounds) in [(-3..=3, 40), (-63..=-60, 40), (40..=62, 40), (60..=90, 40)] {
        for _ in 0..rounds {
            let mut bits = || {
                let values = rng.wide(512, exponents.clone());
                let mut tile = [[0u16; 32]; 16];
                let of_value = |v: &f32| bf16::from_f32(*v).to_bits();
                tile.as_flattened_mut().iter_mut().zip(&values).for_each(|(bits, v)| *bits = of_value(v));
                tile
            };
            let (a, b) = (bits(), bits());
            let mut c = [[0f32; 16]; 16];
            let start = (*exponents.start() * 2).min(110);
            c.as_flattened_mut().iter_mut().zip(rng.wide(256, start - 2..=start + 8)).for_each(|(c, v)| *c = v);
            let before = c;
            one_product(&a, &b, &mut c);
            let value = |bits: u16| flush(bf16::from_bits(bits).to_f32());
            for (i, j) in (0..16).flat_map(|i| (0..16).map(move |j| (i, j))) {
                let mut chains = [0f32; 2];
                for k in 0..32 {
                    chains[k % 2] = flush(value(a[i][k]).mul_add(value(b[k / 2][2 * j + k % 2]), chains[k % 2]));
                }
                let want = flush(flush(before[i][j]) + flush(chains[0] + chains[1]));
                let same = c[i][j].to_bits() == want.to_bits() || (c[i][j].is_nan() && want.is_nan());
                assert!(same, "{exponents:?} [{i}][{j}]: {:e}, needed {want:e}", c[i][j]);
            }
        }
    }
}

/// From now on a filter of system calls answers EPERM to whoever asks for tiles on this thread; `false` if the kernel takes no filters.
fn refuse_tiles() -> bool {
    let step = |code: u32, k: u32, yes: u8, no: u8| libc::sock_filter { code: code as u16, jt: yes, jf: no, k };
    let (load, equal, answer) =
        (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, libc::BPF_JMP | libc::BPF_JEQ, libc::BPF_RET);
    // Offsets in seccomp_data: the number of the call, then the low half of its first argument.
    let mut steps = [
        step(load, 0, 0, 0),
        step(equal, libc::SYS_arch_prctl as u32, 0, 3),
        step(load, 16, 0, 0),
        step(equal, REQUEST as u32, 0, 1),
        step(answer, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32, 0, 0),
        step(answer, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    let program = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    // SAFETY: numbers alone.
    let alone = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    // SAFETY: the program and its steps live until the call, which copies them, returns.
    alone == 0 && unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) } == 0
}

/// ARCH_REQ_XCOMP_PERM.
const REQUEST: libc::c_long = 0x1023;

/// A process that is refused tiles goes on without: this test runs itself again under a filter. Where AMX is missing detection does
/// not come as far as to ask, and this tests that a filter harms nothing and that the text says what is missing.
#[test]
fn a_refusal_is_survived() {
    const SELF: &str = "a_refusal_is_survived";
    if std::env::var_os("AMX_CHILD").is_some() {
        if !refuse_tiles() {
            return println!("no filters");
        }
        // SAFETY: two numbers; the answer is a number.
        let answer = unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, 18) };
        let error = std::io::Error::last_os_error().raw_os_error();
        assert_eq!((answer, error), (-1, Some(libc::EPERM)), "the filter does not work");
        let cpu = Cpu::detect();
        assert!(cpu.isa() < Isa::Amx && cpu.isa() == Isa::best() && !Isa::Amx.available());
        let problem = MatmulProblem { scheme: Scheme::Mxfp4, m: 20, n: 64, k: 128 };
        println!("{}{}", cpu.explain(&problem).unwrap(), Cpu::with_isa(Isa::Amx).unwrap_err());
        let mut rng = Rng(3);
        let w = RandomMatrix::new(&mut rng, problem.scheme, problem.n, problem.k, 1);
        let x: Vec<bf16> = rng.wide(problem.m * problem.k, -3..=3).iter().map(|v| bf16::from_f32(*v)).collect();
        let x: Activations<'_> = MatRef::new(&x, problem.m, problem.k).unwrap().into();
        assert!(bits(cpu, x, &w) == bits(Cpu::baseline(), x, &w));
        return;
    }
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", SELF, "--nocapture"]).env("AMX_CHILD", "1").env_remove("TRN_KERNELS_ISA");
    let output = child.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    if text.contains("no filters") {
        return eprintln!("skipped: this system takes no filters of system calls");
    }
    assert!(text.contains("not amx: ") && text.contains("tier amx is not supported"), "{text}");
    // What the machine runs itself, without the filter and whatever is emulated.
    if Isa::best() == Isa::Amx {
        let why = "a filter of system calls refuses this process AMX tiles (arch_prctl: EPERM or ENOSYS)";
        assert!(text.contains("on avx512") && text.matches(why).count() == 2, "{text}");
    } else {
        eprintln!("skipped in part: this machine has no AMX to refuse");
        assert!(!text.contains("a filter"), "{text}");
    }
}
