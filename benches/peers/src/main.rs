//! Peers beside trn-kernels, call by call, each call after a look at the machine's limits. Rust peers are called in this process,
//! Python ones in one of their own ([`child`]).
//!
//! `cd benches/peers && RAYON_NUM_THREADS=2 cargo run --release -- --help`. A workspace of its own: the crate's own build does
//! not wait for candle. The folder's cargo configuration compiles for this CPU, because candle chooses its SIMD code then.

#[allow(dead_code)] // what `trnk bench` uses and this does not
#[path = "../../../src/bin/trnk/bench/case.rs"]
mod case;
mod child;
#[allow(dead_code)]
#[path = "../../../src/bin/trnk/bench/machine.rs"]
mod machine;
mod peer;
#[allow(dead_code)]
#[path = "../../../src/bin/trnk/bench/sample.rs"]
mod sample;
#[allow(dead_code)]
#[path = "../../../src/bin/trnk/bench/table.rs"]
mod table;

use candle_core::quantized::GgmlDType;
use case::{Acts, Cold, Dense, Shape, Values, Weights};
use child::ChildPeer;
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use peer::{CandleBf16, CandleQuantized, GemmF32, Operands, Ours, Peer};
use rayon::ThreadPool;
use sample::{Contender, Limits, Sampling, measure};
use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;
use table::{COLUMNS, Origin, Row};
use trn_kernels::cpu::limits::{StreamRead, name};
use trn_kernels::{Cpu, Parallelism};

/// trn-kernels and its Rust peers on the same data. Threads: RAYON_NUM_THREADS, which candle obeys too.
#[derive(Parser)]
struct Args {
    /// Weight shapes, NxK
    #[arg(long, value_delimiter = ',', default_value = "4096x4096")]
    shapes: Vec<Shape>,

    /// Rows of activations
    #[arg(long, value_delimiter = ',', default_value = "1,16,512")]
    m: Vec<usize>,

    /// Calls of each contestant [default: as many as fit into three seconds for all contestants together]
    #[arg(long)]
    repeat: Option<usize>,

    /// Python that has torch: measures PyTorch's bf16 linear too
    #[arg(long, value_name = "PYTHON")]
    torch: Option<PathBuf>,

    /// Python that has llama-cpp-python: measures llama.cpp too
    #[arg(long, value_name = "PYTHON")]
    llama: Option<PathBuf>,

    /// Which comparisons: mxfp4, fp8-block, bf16 [default: all]
    #[arg(long, value_delimiter = ',')]
    schemes: Vec<String>,

    /// Write the results as CSV
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// Who meets whom: codes of as many bits, and the dense types.
const COMPARISONS: [(&str, &str); 3] = [
    ("mxfp4", "4 bits: candle and llama.cpp turn activations into 8-bit blocks; gemm reads dequantized f32"),
    ("fp8-block", "8 bits: candle and llama.cpp turn activations into 8-bit blocks"),
    ("bf16", "bf16"),
];

fn main() -> Result<(), String> {
    let args = Args::parse();
    if let Some(unknown) = args.schemes.iter().find(|s| COMPARISONS.iter().all(|(known, _)| known != s)) {
        return Err(format!("--schemes: got {unknown:?}, need mxfp4, fp8-block or bf16"));
    }
    if args.m.contains(&0) {
        return Err("--m: got 0, need at least 1".into());
    }
    let threads = candle_core::utils::get_num_threads();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().map_err(|e| e.to_string())?;
    let cpu = Cpu::try_detect().map_err(|e| e.to_string())?.with_parallelism(Parallelism::Pool(&pool));
    let read = StreamRead::new(&pool).map_err(|e| e.to_string())?;
    let mut limits = Limits { pool: &pool, read };
    limits.read.tune(&pool, 3);
    let origin = Origin { date: machine::today(), cpu: name(), threads, tier: cpu.isa() };
    println!("{}, {} threads, tier {}, {}", origin.cpu, origin.threads, origin.tier, origin.date);
    println!("{}  {:>9}", table::header(true), "error");
    let mut csv = args.out.as_ref().map(std::fs::File::create).transpose().map_err(|e| e.to_string())?;
    let mut write =
        |line: &str| csv.as_mut().map_or(Ok(()), |file| writeln!(file, "{line}")).map_err(|e| e.to_string());
    write(COLUMNS)?;
    let budget = Duration::from_secs(3);
    let wanted = |scheme: &str| args.schemes.is_empty() || args.schemes.iter().any(|s| s == scheme);
    let comparisons: Vec<_> = COMPARISONS.into_iter().filter(|(scheme, _)| wanted(scheme)).collect();
    let bar = ProgressBar::new((comparisons.len() * args.shapes.len() * args.m.len()) as u64);
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} {eta}").map_err(|e| e.to_string())?;
    bar.set_style(style);
    for (scheme, what) in comparisons {
        bar.suspend(|| println!("-- {what}"));
        for &shape in &args.shapes {
            let weights = Weights::random(case::scheme(scheme)?, shape, 3);
            let mut w = vec![0.0; shape.n * shape.k];
            weights.view().and_then(|view| view.dequantize_f32(&mut w)).map_err(|e| e.to_string())?;
            let cold = Cold::new(&cpu, weights, case::cold_bytes())?;
            for &m in &args.m {
                bar.set_message(format!("{scheme} {shape} m = {m}"));
                let on = Operands { shape, m, x: peer::activations(m, shape.k), w: w.clone() };
                let exact = on.first_row();
                let mut peers = contestants(&pool, cpu, &cold, &on)?;
                let numbers = [shape.n, shape.k, m, threads];
                let mut child = |python: &Option<PathBuf>, script, format| match python {
                    Some(python) => {
                        ChildPeer::start(python, script, numbers, format).map(|peer| peers.push(Box::new(peer)))
                    }
                    None => Ok(()),
                };
                match scheme {
                    "mxfp4" => child(&args.llama, "llama_peer.py", Some("mxfp4"))?,
                    "fp8-block" => child(&args.llama, "llama_peer.py", Some("q8_0"))?,
                    _ => (),
                }
                child(&args.torch, "torch_peer.py", None)?;
                let peak = machine::peak(origin.tier, Acts::Bf16);
                let flops = 2.0 * m as f64 * shape.n as f64 * shape.k as f64;
                let mut contenders: Vec<Contender<'_>> = peers
                    .iter_mut()
                    .map(|p| Contender { name: p.name(), bytes: p.bytes(), flops, call: Box::new(|| p.call()) })
                    .collect();
                let sampling = Sampling { repeat: args.repeat, budget };
                let outcomes = measure(&mut limits, peak, &mut contenders, sampling)?;
                drop(contenders);
                for (outcome, peer) in outcomes.into_iter().zip(&peers) {
                    let error = match peer.first_row() {
                        Some(row) => format!("{:.1e}", relative_error(&row?, &exact)),
                        None => "-".into(),
                    };
                    let row = Row { scheme: scheme.into(), acts: Acts::Bf16, m, shape, experts: None, peak, outcome };
                    bar.suspend(|| println!("{}  {error:>9}", table::line(&row, true)));
                    write(&table::record(&row, &origin))?;
                }
                bar.inc(1);
            }
        }
    }
    bar.finish_and_clear();
    Ok(())
}

/// Ours first: the others' times are given as multiples of it.
fn contestants<'a>(
    pool: &'a ThreadPool,
    cpu: Cpu<'a>,
    cold: &'a Cold,
    on: &'a Operands,
) -> Result<Vec<Box<dyn Peer + 'a>>, String> {
    let caches = case::cold_bytes();
    let scheme = case::scheme_name(cold.weights.scheme);
    let ours = |acts: Acts| {
        let mut dense = Dense::new(cold, acts, on.m);
        if acts == Acts::F32 {
            dense.x = Values::F32(on.x.clone());
        }
        Box::new(Ours { name: format!("{scheme} {}", acts.name()), pool, cpu, dense, n: on.shape.n })
    };
    let mut peers: Vec<Box<dyn Peer + 'a>> = vec![ours(Acts::Bf16)];
    match scheme {
        "mxfp4" => {
            peers.push(ours(Acts::F32));
            peers.push(Box::new(CandleQuantized::new(GgmlDType::Q4_0, on, caches)?));
            peers.push(Box::new(GemmF32::new(pool, on, caches)));
        }
        "bf16" => peers.push(Box::new(CandleBf16::new(on, caches)?)),
        _ => peers.push(Box::new(CandleQuantized::new(GgmlDType::Q8_0, on, caches)?)),
    }
    Ok(peers)
}

/// Root mean square of the error as a share of that of the exact values. For candle's formats this holds the loss of quantizing
/// the weights once more.
fn relative_error(got: &[f32], exact: &[f64]) -> f64 {
    let square = |v: f64| v * v;
    let error: f64 = got.iter().zip(exact).map(|(g, e)| square(f64::from(*g) - e)).sum();
    (error / exact.iter().map(|e| square(*e)).sum::<f64>()).sqrt()
}
