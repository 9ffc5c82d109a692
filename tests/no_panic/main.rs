//! No public function panics, aborts for memory or loops without end, whatever it is given: extents that no memory backs, contents
//! that are not numbers, indices out of range. Where the documentation asks for a refusal the call is refused, and outputs stay as
//! they were. Hostile checkpoint *files* are in `checkpoint_hostile.rs`.
#![forbid(unsafe_code)]

mod attention;
mod checkpoint;
mod device;
mod kv;
mod layer;
mod matmul;
mod num;
mod quant;
mod trainium;
mod views;

use proptest::prelude::*;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::LazyLock;
use trn_kernels::cpu::Blocking;
use trn_kernels::{Cpu, Parallelism, Result};

/// Extents a slice can back, then extents none can: sums, products and round-ups of the latter leave `usize`.
const EXTENTS: [usize; 14] = [
    0,
    1,
    2,
    16,
    31,
    32,
    33,
    64,
    usize::MAX >> 14,
    usize::MAX / 64,
    usize::MAX / 2,
    usize::MAX - 31,
    usize::MAX - 1,
    usize::MAX,
];

/// Positions and counts that meet every edge of an axis of `extent`.
fn edges(extent: usize) -> [usize; 7] {
    [0, 1, extent / 2, extent.saturating_sub(1), extent, extent.saturating_add(1), usize::MAX]
}

/// Numbers that arithmetic stumbles over.
const NUMBERS: [f32; 14] = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e-45,
    -1e-40,
    f32::MIN_POSITIVE,
    f32::MAX,
    f32::MIN,
    1e20,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
    -f32::NAN,
];

/// What `call` gives; fails, with the name of the call, if it panics.
#[track_caller]
fn survives<T>(name: std::fmt::Arguments<'_>, call: impl FnOnce() -> T) -> T {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(value) => value,
        Err(_) => panic!("{name} panicked"),
    }
}

/// Runs `call` on an output of `len` elements; if it is refused, the output must be what it was.
#[track_caller]
fn untouched<T>(name: std::fmt::Arguments<'_>, len: usize, call: impl FnOnce(&mut [f32]) -> Result<T>) -> Result<T> {
    let mut out = vec![-7.25f32; len];
    let result = survives(name, || call(&mut out));
    if result.is_err() {
        assert!(out.iter().all(|x| *x == -7.25), "{name} was refused and wrote all the same");
    }
    result
}

/// Serial, and over three threads.
fn cpus() -> [Cpu<'static>; 2] {
    static POOL: LazyLock<rayon::ThreadPool> =
        LazyLock::new(|| rayon::ThreadPoolBuilder::new().num_threads(3).build().expect("three threads"));
    // Small work forks too.
    let blocking = Blocking { fork: 0, ..Blocking::default() };
    [Cpu::detect(), Cpu::baseline().with_parallelism(Parallelism::Pool(&POOL)).with_blocking(blocking)]
}

/// Ordinary numbers, and now and then one of [`NUMBERS`].
fn number() -> impl Strategy<Value = f32> + Clone {
    prop_oneof![4 => -4.0f32..4.0, 1 => proptest::sample::select(&NUMBERS[..])]
}

/// `n`, and now and then something else.
fn about(n: usize) -> impl Strategy<Value = usize> {
    prop_oneof![12 => Just(n), 1 => 0usize..40, 1 => proptest::sample::select(&EXTENTS[..])]
}

#[test]
fn the_checks_can_fail() {
    assert!(catch_unwind(|| survives(format_args!("a call"), || [0][NUMBERS.len()])).is_err());
    let writes = |out: &mut [f32]| {
        out[0] = 1.0;
        Err::<(), _>(trn_kernels::Error::Overflow { operand: "x".into() })
    };
    assert!(catch_unwind(|| untouched(format_args!("a call"), 1, writes)).is_err());
}
