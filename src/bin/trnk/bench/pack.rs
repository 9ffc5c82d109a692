//! `trnk bench pack`: how fast weights go from a checkpoint's order to the kernels', beside a copy of the same bytes.
#![forbid(unsafe_code)]

use super::case::{self, SCHEMES, Shape, Weights, copies};
use super::sample::{Contender, Limits, Sampling, measure, timed};
use super::{Run, say};
use crate::failure::Failure;
use rayon::ThreadPool;
use std::hint::black_box;
use std::time::Duration;
use trn_kernels::Cpu;
use trn_kernels::cpu::limits::StreamRead;
use trn_kernels::quant::Scheme;

/// Arguments of `trnk bench pack`.
#[derive(clap::Args)]
pub(super) struct Pack {
    /// Weight shapes, NxK separated by commas
    #[arg(long, value_name = "NxK,...", value_delimiter = ',', default_value = "4096x4096,14336x4096")]
    shapes: Vec<Shape>,

    /// Schemes: mxfp4, nvfp4, mxfp8, fp8-tensor, fp8-channel, fp8-block (128x128), bf16 [default: all]
    #[arg(long, value_name = "SCHEME,...", value_delimiter = ',', value_parser = case::scheme)]
    schemes: Vec<Scheme>,

    #[command(flatten)]
    run: Run,
}

pub(super) const LONG_HELP: &str = "\
Packing and copying take turns, each into memory just allocated and on the same threads, from sources that rotate over more than
four times the last-level caches. Figures are medians.

Columns:
  GB/s     bytes of codes and scales packed in a second
  of read  GB/s as a share of the memory bandwidth just before; what is written comes on top of what is read
  copy     GB/s of the copy
  of copy  speed of packing as a share of copying's, median over pairs
  larger   packed bytes as a multiple of the source's";

/// Runs the command.
pub(super) fn run(args: &Pack) -> Result<(), Failure> {
    let schemes = match args.schemes.is_empty() {
        true => SCHEMES.map(|(_, scheme)| scheme).to_vec(),
        false => args.schemes.clone(),
    };
    let cold = case::cold_bytes();
    let cases: Vec<_> = schemes.iter().flat_map(|scheme| args.shapes.iter().map(|shape| (*scheme, *shape))).collect();
    for &(scheme, shape) in &cases {
        case::check_blocks(scheme, shape).map_err(Failure::usage)?;
        // Sources, what is packed and what is copied, and what reads memory.
        super::check_memory(scheme, shape, 3.5 * cold as f64 + 4.0 * case::estimated_bytes(scheme, shape))?;
    }
    let pool = args.run.pool()?;
    let (cpu, origin) = args.run.cpu(&pool)?;
    let read = StreamRead::new(&pool).map_err(Failure::refused)?;
    let mut limits = Limits { pool: &pool, read };
    pool.install(|| limits.read.tune(&pool, 3));
    say(&origin.to_string());
    say(&format!(
        "{:<12}{:>13}{:>11}{:>8}{:>9}{:>8}{:>9}{:>8}{:>7}",
        "scheme", "n x k", "time", "GB/s", "of read", "copy", "of copy", "larger", "calls"
    ));
    let sampling = args.run.sampling(Duration::from_millis(400));
    let bar = super::progress(cases.len());
    for (scheme, shape) in cases {
        bar.set_message(format!("{} {shape}", case::scheme_name(scheme)));
        let line = pool.install(|| line(&cpu, &mut limits, scheme, shape, cold, sampling));
        let line = line.map_err(Failure::refused)?;
        bar.suspend(|| say(&line));
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(())
}

fn line(
    cpu: &Cpu<'_>,
    limits: &mut Limits<'_>,
    scheme: Scheme,
    shape: Shape,
    cold: usize,
    sampling: Sampling,
) -> Result<String, String> {
    let weights = Weights::random(scheme, shape, 3);
    let bytes = weights.bytes();
    let sources = vec![weights; copies(bytes, cold)];
    let views =
        sources.iter().map(Weights::view).collect::<trn_kernels::Result<Vec<_>>>().map_err(|e| e.to_string())?;
    let packed = views.first().map_or(Ok(0), |view| cpu.pack(view).map(|p| p.bytes())).map_err(|e| e.to_string())?;
    let (pool, mut packs, mut copied) = (limits.pool, views.iter().cycle(), sources.iter().cycle());
    let mut pack = || packs.next().map_or(Ok(()), |view| cpu.pack(view).map(|packed| drop(black_box(packed))));
    let mut copy = || {
        copied.next().into_iter().flat_map(Weights::parts).for_each(|part| copy(pool, part));
        Ok::<(), String>(())
    };
    let mut both = [
        Contender { name: "copy".into(), bytes, flops: 0.0, call: Box::new(|| timed(&mut copy)) },
        Contender { name: "pack".into(), bytes, flops: 0.0, call: Box::new(|| timed(&mut pack)) },
    ];
    let outcomes = measure(limits, None, &mut both, sampling)?;
    let [copy, pack] = &outcomes[..] else { return Err("nothing was measured".into()) };
    Ok(format!(
        "{:<12}{:>13}{:>11}{:>8.2}{:>9.2}{:>8.2}{:>9.2}{:>8.3}{:>7}",
        case::scheme_name(scheme),
        shape.to_string(),
        super::table::duration(pack.seconds),
        pack.bytes_per_second() / 1e9,
        pack.of_read,
        copy.bytes_per_second() / 1e9,
        1.0 / pack.times_first,
        packed as f64 / bytes as f64,
        pack.calls
    ))
}

/// Copies bytes into memory of their own, on every thread of the pool.
fn copy(pool: &ThreadPool, from: &[u8]) {
    let mut to = vec![0; from.len()];
    let share = from.len().div_ceil(pool.current_num_threads()).max(1);
    pool.scope(|scope| {
        for (to, from) in to.chunks_mut(share).zip(from.chunks(share)) {
            scope.spawn(|_| to.copy_from_slice(from));
        }
    });
    black_box(to);
}
