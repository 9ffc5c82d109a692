//! `trnk`: the command line of trn-kernels. Each subcommand is a file of its own.
#![forbid(unsafe_code)]

mod bench;
mod chip;
mod cost;
mod failure;
mod probe;
mod problem;
mod program;
mod shape;
mod timeline;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use std::process::ExitCode;

/// Low-precision inference kernels for AWS Trainium.
#[derive(Parser)]
#[command(name = "trnk", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// How fast this machine runs kernels on its CPU, beside what the machine can do, both measured
    Bench(bench::Args),
    /// What a device kernel would take on a chip, engine by engine: a model from documented constants, not a measurement
    Cost(cost::Args),
    /// Whether this machine can run kernels on a NeuronCore, what there is, and what to do next
    Probe(probe::Args),
}

fn main() -> ExitCode {
    let command = Cli::command().mut_subcommand("cost", |c| c.after_long_help(cost::long_help()));
    let command = command.mut_subcommand("probe", |c| c.after_long_help(probe::LONG_HELP));
    let cli = Cli::from_arg_matches(&command.get_matches()).unwrap_or_else(|e| e.exit());
    let done = match cli.command {
        Command::Bench(args) => bench::run(&args),
        Command::Cost(args) => cost::run(&args),
        Command::Probe(args) => probe::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("error: {}", failure.message);
            ExitCode::from(failure.code)
        }
    }
}
