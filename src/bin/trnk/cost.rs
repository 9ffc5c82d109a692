//! `trnk cost`: the modelled time of a kernel at a shape, beside the roofline of the problem.
#![forbid(unsafe_code)]

use crate::failure::Failure;
use crate::{chip, problem, program, shape, timeline};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use trn_kernels::trainium::Chip;
use trn_kernels::trainium::cost::{Cost, estimate};
use trn_kernels::trainium::emulator::{Engine, Program};
use trn_kernels::trainium::roofline::{Bound, Roofline};

/// Arguments of `trnk cost`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The kernel (--help lists them)
    #[arg(required_unless_present = "program")]
    kernel: Option<String>,

    /// Its shape, NAME=VALUE separated by commas: m=2048,n=2048,k=2048
    #[arg(required_unless_present = "program")]
    shape: Option<String>,

    /// The chip, one core of it [default: the newest that the kernel serves, or the program's own]
    #[arg(long, value_name = "CHIP", value_parser = ["trn1", "trn2", "trn3"])]
    chip: Option<String>,

    /// A chip that you fill in, TOML or JSON: based_on = "trn3" and whatever differs
    #[arg(long, value_name = "FILE", conflicts_with = "chip")]
    chip_file: Option<PathBuf>,

    /// A program that kernels/trace.py has made, in place of KERNEL and SHAPE
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "shape"])]
    program: Option<PathBuf>,

    /// Draw the timeline by engine
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,

    /// Print the instructions that determine the time
    #[arg(long)]
    path: bool,

    /// The folder of the device kernels [default: ./kernels, or that of the build]
    #[arg(long, value_name = "DIR")]
    kernels: Option<PathBuf>,

    /// The Python that traces kernels at new shapes
    #[arg(long, value_name = "FILE", env = "TRNK_PYTHON", default_value = "python3")]
    python: PathBuf,
}

/// What `--help` adds: examples, kernels, chip files.
pub(crate) fn long_help() -> String {
    format!(
        "\
Examples:
  trnk cost matmul_mx m=2048,n=2048,k=2048
  trnk cost matmul_fp8 m=4,n=4096,k=4096 --chip trn2 --svg timeline.svg
  trnk cost attention_decode b=4,hq=64,hkv=8,d=64,m=256 --chip trn2 --path
  trnk cost grouped_matmul_mx b=4,r=64,h=2880,i=2880,e=4 --chip-file my-trainium4.toml
  trnk cost --program kernels/programs/matmul_mx.mxfp4.json --chip trn1

Kernels and what their shapes say (names as in the kernel's docstring; in brackets what may be left out, with its default or
its default first):
{}
Shapes of kernels/programs/large are there already; others are traced on the simulator in kernels/sim, which needs
python3 with the packages of kernels/requirements.txt and takes seconds to minutes.

A chip file, for example for Trainium4, of which nothing is published (the constants are those of trainium::Chip):
  name = \"my Trainium4\"
  based_on = \"trn3\"          # whose programs it runs, and its other constants
  hbm_bandwidth = 9.6e12     # bytes a second, the chip
  tensor.clock = 2.8e9       # Hz
  dma.fixed = 1.0e-6         # seconds

Exit codes: 0 done, 1 refused (the kernel's constraint is printed) or failed, 2 bad command line.

Every figure is a model from documented constants; nothing was measured, on any chip.",
        shape::help()
    )
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let (program, chip) = resolve(args)?;
    let cost = estimate(&program, &chip);
    let (counted, roofline) = problem::roofline(&program, &cost, &chip);
    let mut text = report(&program, &chip, &cost, counted, roofline);
    if args.path {
        path(&mut text, &program, &cost);
    }
    if let Some(file) = &args.svg {
        let svg = timeline::svg(&program, &chip.name, &cost)?;
        std::fs::write(file, svg).map_err(|e| Failure::refused(format!("{}: {e}", file.display())))?;
    }
    // A reader that has seen enough (`| head`) is no failure.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
    Ok(())
}

/// The program and the chip that are asked about.
fn resolve(args: &Args) -> Result<(Program, Chip), Failure> {
    let asked = match (&args.chip_file, &args.chip) {
        (Some(file), _) => Some(chip::from_file(file)?),
        (None, Some(name)) => Some(chip::named(name)?),
        (None, None) => None,
    };
    match (&args.program, &args.kernel, &args.shape) {
        (Some(file), ..) => {
            let program = program::open(file)?;
            let chip = asked.map_or_else(|| program.target().chip(), |a| a.chip);
            Ok((program, chip))
        }
        (None, Some(kernel), Some(shape)) => {
            let dims = shape::parse(kernel, shape)?;
            let newest = shape::targets(kernel).pop().unwrap_or_default();
            let asked = asked.map_or_else(|| chip::named(&newest), Ok)?;
            let folder = program::kernels(args.kernels.as_deref());
            let program = program::of_shape(kernel, &dims, asked.target, &folder, &args.python)?;
            Ok((program, asked.chip))
        }
        _ => Err(Failure::usage("name a kernel and its shape, or --program FILE")),
    }
}

/// What is printed.
fn report(
    program: &Program,
    chip: &Chip,
    cost: &Cost,
    counted: &str,
    roofline: trn_kernels::Result<Roofline>,
) -> String {
    let mut out = format!(
        "{} {} on one core of {}: a program of {} instructions for {}\n",
        program.kernel(),
        program.example(),
        chip.name,
        program.instructions().len(),
        program.target().name()
    );
    let _ = writeln!(out, "A model from documented constants, not a measurement.\n\n{cost}");
    let path = cost.critical_path();
    let on = |engine: Engine| path.iter().map(|&i| &cost.spans[i]).filter(move |s| s.engine == engine).map(|s| s.work);
    let parts = Engine::ALL.into_iter().map(|e| (e, on(e).sum::<f64>())).filter(|(_, seconds)| *seconds > 0.0);
    let parts: Vec<_> = parts.collect();
    let waits = cost.seconds - parts.iter().map(|(_, seconds)| seconds).sum::<f64>();
    let named: Vec<_> = parts.iter().map(|(e, seconds)| format!("{} {:.2} us", e.name(), 1e6 * seconds)).collect();
    let _ = writeln!(
        out,
        "  critical path: {} instructions: {}, latencies {:.2} us",
        path.len(),
        named.join(", "),
        1e6 * waits.max(0.0)
    );
    match roofline {
        Ok(roofline) => {
            let bound = if roofline.bound() == Bound::Compute { "compute" } else { "memory" };
            let _ = writeln!(
                out,
                "\nroofline of the problem ({counted})\n  {:.3} GFLOP at {:.1} TFLOP/s ({:?}) {:.2} us, {:.3} MB at {:.1} GB/s {:.2} us: bound by {bound}\n  \
                 {:.2} FLOP a byte, ridge {:.2}\n  the program runs at {:.1} % of it",
                roofline.flops / 1e9,
                roofline.peak_flops / 1e12,
                roofline.mode,
                1e6 * roofline.compute_seconds(),
                roofline.bytes / 1e6,
                roofline.bandwidth / 1e9,
                1e6 * roofline.memory_seconds(),
                roofline.intensity(),
                roofline.ridge(),
                100.0 * roofline.seconds() / cost.seconds
            );
        }
        Err(error) => {
            let _ = writeln!(out, "\nno roofline of the problem: {error}");
        }
    }
    out
}

/// The critical path, an instruction a line.
fn path(out: &mut String, program: &Program, cost: &Cost) {
    let _ = writeln!(out, "\ncritical path, from first to last");
    for i in cost.critical_path() {
        let (span, name) = (&cost.spans[i], program.instructions()[i].name());
        let (start, engine) = (1e6 * span.start, span.engine.name());
        let _ = writeln!(out, "  {start:>10.3} us  {engine:<7} {name} (instruction {i})");
    }
}
