//! Where the operands of the AMX prefill loop are found: its addresses, walked through models of the first and second level. What
//! docs/performance.md section 6 says of caches is computed here.
#![forbid(unsafe_code)]

use super::load::pitch;
use crate::cpu::{Blocking, Caches, LINE};

/// Sets of lines, each in order of use.
struct Cache {
    sets: Vec<Vec<usize>>,
    ways: usize,
}

impl Cache {
    fn new(bytes: usize, ways: usize) -> Cache {
        Cache { sets: vec![vec![]; bytes / ways / LINE], ways }
    }

    /// Whether a line is there; it is from now on.
    fn finds(&mut self, address: usize) -> bool {
        let line = address / LINE;
        let count = self.sets.len();
        let set = &mut self.sets[line % count];
        let found = set.iter().position(|l| *l == line);
        if let Some(at) = found.or((set.len() == self.ways).then_some(0)) {
            set.remove(at);
        }
        set.push(line);
        found.is_some()
    }

    /// How many of `bytes` from an address on are there, in lines.
    fn finds_all(&mut self, address: usize, bytes: usize) -> usize {
        (0..bytes).step_by(LINE).filter(|at| self.finds(address + at)).count()
    }
}

/// Of a CPU with AMX.
const L1: (usize, usize) = (48 << 10, 12);
const L2: (usize, usize) = (2 << 20, 16);

const TILE: usize = 1 << 10;
const BLOCKS: usize = 512 / 32;
/// Bytes of the sums of a block of rows with a panel.
const SUMS: usize = 32 * LINE;

/// Addresses apart enough, each at the beginning of a large page.
const W: usize = 1 << 30;
const X: usize = 2 << 30;
const Y: usize = 3 << 30;

/// Share of decoded weights that are in L1 when a block of rows needs them, if so many steps are decoded at a time.
fn weights_in_l1(steps: usize, k: usize) -> f64 {
    let mut l1 = Cache::new(L1.0, L1.1);
    let (mut found, mut all) = (0, 0);
    for pair in 0..4 {
        l1.finds_all(W, 2 * steps * TILE);
        for block in 0..BLOCKS {
            let sums = |panel: usize| Y + ((2 * pair + panel) * BLOCKS + block) * SUMS;
            (0..2).for_each(|panel| _ = l1.finds_all(sums(panel), SUMS));
            for step in 0..steps {
                for i in 0..2 {
                    let x = X + (2 * block + i) * pitch(k / 32) * TILE + step * TILE;
                    l1.finds_all(x, TILE);
                    l1.finds_all(x + 2 * TILE, TILE);
                    found += l1.finds_all(W + (i * steps + step) * TILE, TILE);
                    all += TILE / LINE;
                }
            }
            (0..2).for_each(|panel| _ = l1.finds_all(sums(panel), SUMS));
        }
    }
    found as f64 / all as f64
}

/// Share of x that is in L2 when the panels of a set after the first two need it, its tiles of rows being so many steps apart.
fn x_in_l2(pitch: usize, steps: usize, sums: usize) -> f64 {
    let mut l2 = Cache::new(L2.0, L2.1);
    let (mut found, mut all) = (0, 0);
    for pair in 0..sums / (2 * BLOCKS * SUMS) {
        for block in 0..BLOCKS {
            for panel in 0..2 {
                l2.finds_all(Y + ((2 * pair + panel) * BLOCKS + block) * SUMS, SUMS);
            }
            for tile in 2 * block..2 * block + 2 {
                let here = l2.finds_all(X + tile * pitch * TILE, steps * TILE);
                if pair > 0 {
                    (found, all) = (found + here, all + steps * TILE / LINE);
                }
            }
        }
    }
    found as f64 / all as f64
}

#[test]
fn decoded_weights_stay_in_l1() {
    let usual = Blocking::of(Caches { l1: L1.0, l2: L2.0 }).tile_steps;
    for k in [2048, 2880, 4096, 14336] {
        let found = [4, 8, 10, 12, 16].map(|steps| weights_in_l1(steps, k));
        println!("k = {k}: 4, 8, 10, 12 and 16 steps: {found:.2?}");
        assert!(weights_in_l1(usual, k) > 0.85, "k = {k}");
        assert!(weights_in_l1(2 * usual, k) < 0.1, "the model tells nothing");
    }
}

#[test]
fn x_stays_in_l2() {
    let usual = Blocking::of(Caches { l1: L1.0, l2: L2.0 });
    for k in [2048, 2880, 4096, 8192, 14336] {
        let steps = k / 32;
        let found = [steps, pitch(steps)].map(|pitch| x_in_l2(pitch, usual.tile_steps, usual.tile_sums));
        println!("k = {k}: pitch of {steps} and of {} steps: {found:.2?}", pitch(steps));
        assert!(found[1] > 0.95, "k = {k}");
    }
    assert!(x_in_l2(128, usual.tile_steps, usual.tile_sums) < 0.05, "the model tells nothing");
}
