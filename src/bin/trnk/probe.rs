//! `trnk probe`: can this machine run kernels on a NeuronCore, what is there, and what to do next.
#![forbid(unsafe_code)]

use crate::failure::Failure;
use clap::Parser;
use std::path::PathBuf;
use trn_kernels::Cpu;
use trn_kernels::neuron::kernels::KernelSet;
use trn_kernels::neuron::{LoadOptions, ProbeOptions, Verdict, probe};

/// Arguments of `trnk probe`.
#[derive(Parser)]
pub(crate) struct Args {
    /// The libnrt to look at [default: searched for as docs/neuron.md says]
    #[arg(long, value_name = "FILE")]
    library: Option<PathBuf>,

    /// Look at the library even where there is no device node: an emulated libnrt needs none
    #[arg(long)]
    without_device: bool,

    /// A folder of compiled kernels (kernels/build.py) to check and list
    #[arg(long, value_name = "DIR")]
    kernels: Option<PathBuf>,

    /// Exit with 1 unless the runtime is ready
    #[arg(long)]
    require: bool,
}

/// What `--help` says at the end.
pub(crate) const LONG_HELP: &str = "\
Nothing is initialised and no core is taken. The exit code is 0 whatever the verdict, unless --require is given.

Examples:
  trnk probe
  trnk probe --require && run-my-service
  trnk probe --without-device --library target/debug/libemulated_libnrt.so
  trnk probe --kernels kernels-trn3/";

pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let options = ProbeOptions {
        library: args.library.clone().map_or_else(LoadOptions::default, LoadOptions::path),
        require_device_nodes: !args.without_device,
        ..ProbeOptions::default()
    };
    // Read before anything is printed: a folder that is none is the caller's mistake.
    let kernels = args.kernels.as_ref().map(KernelSet::open).transpose().map_err(Failure::refused)?;
    let report = probe(&options);
    print!("{report}");
    if report.devices.is_empty() {
        println!("devices: none in {}", options.dev_root.display());
    }
    if report.environment.is_empty() {
        println!("environment: no variable that matters is set");
    }
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    println!("cpu: {cpus} logical cores, tier {:?}; every kernel has a CPU path", Cpu::detect().isa());
    if let Some(kernels) = &kernels {
        println!("kernels: {} compiled in {}", kernels.kernels().len(), kernels.folder().display());
        kernels.kernels().iter().for_each(|kernel| println!("  {}", kernel.describe()));
    }
    println!("next: {}", next(&report.verdict, kernels.is_some()));
    if args.require && !report.verdict.is_ready() {
        return Err(Failure::refused(format!("--require: {}", report.verdict)));
    }
    Ok(())
}

/// The one step from here.
fn next(verdict: &Verdict, kernels: bool) -> &'static str {
    match (verdict, kernels) {
        (Verdict::Ready { .. }, false) => {
            "compile kernels (python kernels/build.py kernels/sets/SET.toml --out DIR), then trnk probe --kernels DIR"
        }
        (Verdict::Ready { .. }, true) => {
            "cargo run --release --example generate -- --backend neuron --kernels DIR --acts bf16 --model CHECKPOINT"
        }
        _ => "cargo run --release --example generate runs on this CPU; the remedy above comes first for the device",
    }
}
