//! What a chip would take for an exported device program, engine by engine.
//!
//!     cargo run --release --features emulator --example cost -- kernels/programs/matmul_mx.mxfp4.json [--chip trn3] [--path]
//!
//! `python kernels/trace.py --large DIR` makes programs of large shapes.

use clap::Parser;
use std::path::PathBuf;
use trn_kernels::trainium::Chip;
use trn_kernels::trainium::cost::estimate;
use trn_kernels::trainium::emulator::{Limits, Program};

#[derive(Parser)]
#[command(about = "Model the time of a device program from documented constants")]
struct Args {
    /// Programs (JSON).
    #[arg(required = true)]
    programs: Vec<PathBuf>,
    /// trn1, trn2 or trn3; the program's own target if not given.
    #[arg(long)]
    chip: Option<String>,
    /// Print the instructions that determine the time.
    #[arg(long)]
    path: bool,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    for file in &args.programs {
        let program = Program::from_json(&std::fs::read(file)?, &Limits::default())?;
        let chip = match &args.chip {
            Some(name) => Chip::named(name).ok_or_else(|| format!("no chip {name:?}; there are trn1, trn2, trn3"))?,
            None => program.target().chip(),
        };
        let cost = estimate(&program, &chip);
        println!("{} {} on a core of {}: {cost}", program.kernel(), program.example(), chip.name);
        if args.path {
            for i in cost.critical_path() {
                let (span, name) = (&cost.spans[i], program.instructions()[i].name());
                println!("  {:>9.3} us  {:<7} {name} (instruction {i})", 1e6 * span.start, span.engine.name());
            }
        }
    }
    Ok(())
}
