//! Packed weights of any bytes, as they are and with their checksums made right: what is read is written back as it was and gives
//! the same bits on every tier of the host.
#![no_main]
#![forbid(unsafe_code)]

#[path = "../../tests/support/packed_file.rs"]
mod packed_file;
#[path = "../../tests/support/random.rs"]
mod random;

use packed_file::{HEADER, Map, repair};
use random::Rng;
use trn_kernels::matmul::{MatmulOptions, PackedMatrix};
use trn_kernels::{Cpu, Isa, MatMut, MatRef, Workspace};

/// Rows past those of a tile, so that every kernel is taken.
const ROWS: [usize; 3] = [1, 5, 18];
/// Without codes a few bytes may stand for any number of rows.
const MOST: usize = 1 << 14;

fn product(cpu: Cpu<'_>, x: &[f32], m: usize, w: &PackedMatrix) -> Vec<u32> {
    let mut y = vec![0.0f32; m * w.n()];
    let out = MatMut::new(&mut y, m, w.n()).expect("as long as its extents");
    let x = MatRef::new(x, m, w.k()).expect("as long as its extents");
    match cpu.matmul(x, w, out, &MatmulOptions::default(), &mut Workspace::new()) {
        Ok(()) => y.iter().map(|y| if y.is_nan() { f32::NAN.to_bits() } else { y.to_bits() }).collect(),
        Err(e) => panic!("a matrix that was read is refused: {e}"),
    }
}

fn exercise(file: &[u8]) {
    let Ok(w) = PackedMatrix::from_bytes(Map::new(file, 0)) else { return };
    assert_eq!(w.written_bytes(), file.len());
    let mut again = vec![];
    w.write_to(&mut again).expect("memory");
    assert_eq!(again[HEADER..], file[HEADER..]);
    if w.n() > MOST || w.k() > MOST {
        return;
    }
    for m in ROWS {
        // Numbers alike, numbers of all sizes, and numbers with others among them.
        for kind in 0..3 {
            let mut rng = Rng(file.len() as u64);
            let mut x = if kind == 0 { rng.wide(m * w.k(), 0..=0) } else { rng.wide(m * w.k(), -149..=126) };
            if kind == 2 {
                let others = [f32::NAN, f32::INFINITY, -0.0, f32::from_bits(1)];
                x.iter_mut().skip(3).step_by(29).zip(others).for_each(|(x, other)| *x = other);
            }
            let y = product(Cpu::baseline(), &x, m, &w);
            for cpu in Isa::ALL.into_iter().filter_map(|isa| Cpu::with_isa(isa).ok()) {
                assert_eq!(product(cpu, &x, m, &w), y, "{m} rows, x of kind {kind}, {} on {}", w.layout(), cpu.isa());
            }
        }
    }
}

libfuzzer_sys::fuzz_target!(|file: &[u8]| {
    exercise(file);
    let mut right = file.to_vec();
    repair(&mut right);
    if right != file {
        exercise(&right);
    }
});
