//! `trnk bench`: how fast this machine's kernels are, beside what the machine can do.
#![forbid(unsafe_code)]

mod case;
mod machine;
mod pack;
mod roofline;
mod sample;
mod table;

use crate::failure::Failure;
use case::{Acts, Cold, ColdExperts, Dense, Moe, SCHEMES, Shape, Weights};
use indicatif::{ProgressBar, ProgressStyle};
use pack::Pack;
use rayon::ThreadPool;
use sample::{Contender, Limits, Sampling, measure, timed};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;
use table::{COLUMNS, Origin, Row};
use trn_kernels::cpu::limits::{self, Peak, StreamRead};
use trn_kernels::quant::Scheme;
use trn_kernels::{Cpu, Parallelism};

/// Arguments of `trnk bench`.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Matmul of every scheme: decode in GB/s, prefill in GFLOP/s, as shares of this machine's limits
    #[command(after_long_help = LONG_HELP)]
    Matmul(Matmul),
    /// Packing of every scheme in GB/s, beside a copy of the same bytes
    #[command(after_long_help = pack::LONG_HELP)]
    Pack(Pack),
}

/// Who runs the calls, and how often.
#[derive(clap::Args)]
struct Run {
    /// Threads [default: all that this process may use]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

    /// Seconds for each case; three calls at least, fewer if they take four times this [default: 0.4; with matmul --full 1.5]
    #[arg(long, value_name = "S", value_parser = seconds, conflicts_with = "repeat")]
    seconds: Option<Duration>,

    /// Calls of each case, in place of a time
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    repeat: Option<u32>,
}

impl Run {
    fn pool(&self) -> Result<ThreadPool, Failure> {
        let all = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = self.threads.map_or_else(all, usize::from);
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().map_err(Failure::refused)
    }

    /// The CPU on a pool. A tier asked for by TRN_KERNELS_ISA that is not there is refused, not replaced by another.
    fn cpu<'p>(&self, pool: &'p ThreadPool) -> Result<(Cpu<'p>, Origin), Failure> {
        let cpu = Cpu::try_detect().map_err(Failure::refused)?.with_parallelism(Parallelism::Pool(pool));
        let threads = pool.current_num_threads();
        Ok((cpu, Origin { date: machine::today(), cpu: limits::name(), threads, tier: cpu.isa() }))
    }

    fn sampling(&self, budget: Duration) -> Sampling {
        Sampling { repeat: self.repeat.map(|repeat| repeat as usize), budget: self.seconds.unwrap_or(budget) }
    }
}

#[derive(clap::Args)]
struct Matmul {
    /// Weight shapes, NxK separated by commas [default: 4096x4096; --full adds 14336x4096,2880x2880,5760x2880; --moe:
    /// 5760x2880,2880x2880]
    #[arg(long, value_name = "NxK,...", value_delimiter = ',')]
    shapes: Vec<Shape>,

    /// Rows of activations; tokens with --moe [default: 1,16,512; --moe: 1,16; --full: 1,4,16,64,512,2048; both: 1,16,256,2048]
    #[arg(long, value_name = "M,...", value_delimiter = ',', value_parser = count)]
    m: Vec<usize>,

    /// Schemes: mxfp4, nvfp4, mxfp8, fp8-tensor, fp8-channel, fp8-block (128x128), bf16 [default: mxfp4,nvfp4,fp8-block;
    /// --full: all]
    #[arg(long, value_name = "SCHEME,...", value_delimiter = ',', value_parser = case::scheme)]
    schemes: Vec<Scheme>,

    /// Type of activations and outputs
    #[arg(long, value_name = "TYPE,...", value_delimiter = ',', default_value = "bf16")]
    acts: Vec<Acts>,

    #[command(flatten)]
    run: Run,

    /// A mixture of experts (gather_matmul) in place of a dense matmul
    #[arg(long)]
    moe: bool,

    /// Experts of a mixture
    #[arg(long, value_name = "E", default_value = "32", value_parser = count)]
    experts: usize,

    /// Experts that a token meets
    #[arg(long, value_name = "K", default_value = "4", value_parser = count)]
    top_k: usize,

    /// Every shape, m and scheme; without --moe the mixture of experts too
    #[arg(long)]
    full: bool,

    /// Write the results as CSV. In a folder that exists they are added to CPU/DATE.csv
    #[arg(long, value_name = "FILE|DIR")]
    out: Option<PathBuf>,

    /// Draw the roofline
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

const LONG_HELP: &str = "\
Examples:
  trnk bench matmul                                       two minutes at most
  trnk bench matmul --full --out benches/record --svg roofline.svg
  trnk bench matmul --shapes 4096x14336 --m 1,32 --schemes mxfp4,bf16 --threads 1
  trnk bench matmul --moe --m 1 --schemes mxfp4
  TRN_KERNELS_ISA=avx2 trnk bench matmul --m 512 --acts bf16,f32

How it measures. Before every call the machine's limits are measured anew: reading memory by the best pattern found at the
start, and the fastest arithmetic that the kernel's tier has, both on the same threads. Each figure is the median over calls;
each share is the median of the ratios of a call to the limits just before it, so that a machine whose speed drifts or is
shared can be measured. Weights rotate over copies larger than four times the last-level caches. One product is checked against
the oracle.

Columns:
  GB/s      bytes of codes and scales read in a second (not activations, not outputs)
  of read   GB/s as a share of the memory bandwidth
  GFLOP/s   2 m n k floating-point operations in a second
  of peak   GFLOP/s as a share of the peak arithmetic
  bound     which of the two limits is nearer for this shape: the share that counts
  calls     calls that were timed

Exit codes: 0 done, 1 could not be done, 2 bad command line. More: docs/performance.md.";

/// Largest number of rows, tokens or experts.
const COUNT: usize = 1 << 20;

fn seconds(text: &str) -> Result<Duration, String> {
    let number = text.parse().ok().filter(|s: &f64| (0.0..=3600.0).contains(s));
    number.map(Duration::from_secs_f64).ok_or_else(|| format!("got {text:?}, need seconds from 0 to 3600"))
}

fn count(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|v| (1..=COUNT).contains(v));
    number.ok_or_else(|| format!("got {text:?}, need a number from 1 to {COUNT}"))
}

/// What to measure for one weight matrix: dense, or a mixture of experts.
struct Group {
    scheme: Scheme,
    shape: Shape,
    /// Number of experts and how many a token meets.
    experts: Option<(usize, usize)>,
    m: Vec<usize>,
}

impl Matmul {
    fn groups(&self) -> Result<Vec<Group>, Failure> {
        if self.top_k > self.experts {
            let (top_k, experts) = (self.top_k, self.experts);
            return Err(Failure::usage(format!("--top-k: got {top_k}, need at most --experts, {experts}")));
        }
        let shapes = |text: &[(usize, usize)]| text.iter().map(|&(n, k)| Shape { n, k }).collect::<Vec<_>>();
        let or = |given: &[usize], default: &[usize]| if given.is_empty() { default } else { given }.to_vec();
        let given = |default: &[(usize, usize)]| match self.shapes.is_empty() {
            true => shapes(default),
            false => self.shapes.clone(),
        };
        let schemes: Vec<Scheme> = match (self.schemes.is_empty(), self.full) {
            (false, _) => self.schemes.clone(),
            (true, true) => SCHEMES.map(|(_, scheme)| scheme).to_vec(),
            (true, false) => {
                ["mxfp4", "nvfp4", "fp8-block"].iter().filter_map(|name| case::scheme(name).ok()).collect()
            }
        };
        let dense: &[(usize, usize)] = match self.full {
            true => &[(4096, 4096), (14336, 4096), (2880, 2880), (5760, 2880)],
            false => &[(4096, 4096)],
        };
        let rows = or(&self.m, if self.full { &[1, 4, 16, 64, 512, 2048] } else { &[1, 16, 512] });
        let tokens = or(&self.m, if self.full { &[1, 16, 256, 2048] } else { &[1, 16] });
        let experts = Some((self.experts, self.top_k));
        let mut groups = vec![];
        for &scheme in &schemes {
            let group = |shape, experts, m: &[usize]| Group { scheme, shape, experts, m: m.to_vec() };
            if !self.moe {
                groups.extend(given(dense).into_iter().map(|shape| group(shape, None, &rows)));
            }
            if self.moe || self.full {
                let both = given(&[(5760, 2880), (2880, 2880)]);
                groups.extend(both.into_iter().map(|shape| group(shape, experts, &tokens)));
            }
        }
        for Group { scheme, shape, .. } in &groups {
            case::check_blocks(*scheme, *shape).map_err(Failure::usage)?;
        }
        Ok(groups)
    }

    /// Refuses what memory cannot hold, before anything is allocated.
    fn check_memory(&self, groups: &[Group], cold: f64) -> Result<(), Failure> {
        groups.iter().try_for_each(|group| {
            let Shape { n, k } = group.shape;
            let matrix = case::estimated_bytes(group.scheme, group.shape);
            let (experts, top_k) = group.experts.unwrap_or((2, 1));
            let rows = group.m.iter().copied().max().unwrap_or(1) as f64;
            // The source, its packed copies, activations and outputs (as f32 first), and what reads memory.
            let weights = 2.0 * matrix + (cold + matrix * experts as f64);
            check_memory(group.scheme, group.shape, weights + 8.0 * rows * (k + n * top_k) as f64 + 2.5 * cold)
        })
    }
}

/// Refuses to measure a matrix if that takes more memory than is available, as far as is known.
fn check_memory(scheme: Scheme, shape: Shape, need: f64) -> Result<(), Failure> {
    match machine::available_memory() {
        Some(have) if need > have => Err(Failure::refused(format!(
            "{} {shape}: needs {:.1} GB of memory, {:.1} GB are available",
            case::scheme_name(scheme),
            need / 1e9,
            have / 1e9
        ))),
        _ => Ok(()),
    }
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    match &args.what {
        What::Matmul(args) => matmul(args),
        What::Pack(args) => pack::run(args),
    }
}

fn matmul(args: &Matmul) -> Result<(), Failure> {
    let groups = args.groups()?;
    let cold = case::cold_bytes();
    args.check_memory(&groups, cold as f64)?;
    let pool = args.run.pool()?;
    let (cpu, origin) = args.run.cpu(&pool)?;
    // Files are opened first: a run of minutes must not end at a path that cannot be written. What a picture of that name holds stays
    // until there is another.
    let mut svg = args.svg.as_deref().map(|path| open(path, true)).transpose()?;
    let mut csv = args.out.as_deref().map(|path| record(path, &origin)).transpose()?;

    let read = StreamRead::new(&pool).map_err(Failure::refused)?;
    let mut limits = Limits { pool: &pool, read };
    say(&pool.install(|| preamble(&mut limits, &origin)));
    say(&table::header(false));
    let cells = groups.iter().map(|group| group.m.len() * args.acts.len()).sum::<usize>();
    let bar = progress(cells);
    let sampling = args.run.sampling(Duration::from_millis(if args.full { 1500 } else { 400 }));
    let mut rows = vec![];
    for group in &groups {
        let note = |what: &str| bar.set_message(format!("{} {} {what}", case::scheme_name(group.scheme), group.shape));
        note("packing");
        let weights = Weights::random(group.scheme, group.shape, 3);
        let store = match group.experts {
            Some((experts, _)) => ColdExperts::new(&cpu, weights, experts, cold).map(Store::Experts),
            None => Cold::new(&cpu, weights, cold).map(Store::Dense),
        };
        let store = store.map_err(Failure::refused)?;
        for (&m, &acts) in group.m.iter().flat_map(|m| args.acts.iter().map(move |acts| (m, acts))) {
            note(&format!("m = {m}"));
            let peak = machine::peak(origin.tier, acts);
            // From a thread of the pool, as a runtime would: it works along instead of waking one more.
            let outcome = pool.install(|| cell(&cpu, &mut limits, &store, (m, acts, args.top_k), peak, sampling));
            let outcome = outcome.map_err(Failure::refused)?;
            let (scheme, shape, experts) = (case::scheme_name(group.scheme).into(), group.shape, group.experts);
            let row = Row { scheme, acts, m, shape, experts, peak, outcome };
            bar.suspend(|| say(&table::line(&row, false)));
            csv.as_mut().map_or(Ok(()), |csv| write(csv, &format!("{}\n", table::record(&row, &origin))))?;
            bar.inc(1);
            rows.push(row);
        }
    }
    bar.finish_and_clear();
    say(&summary(&rows));
    let Some(svg) = &mut svg else { return Ok(()) };
    let picture = roofline::svg(&rows, &origin)?;
    // Pipes and devices have no length.
    if svg.1.metadata().is_ok_and(|file| file.is_file()) {
        svg.1.set_len(0).map_err(|e| Failure::refused(format!("{}: {e}", svg.0.display())))?;
    }
    write(svg, &picture)
}

/// A bar on standard error, where that is a terminal.
fn progress(cases: usize) -> ProgressBar {
    let bar = ProgressBar::new(cases as u64);
    match ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} {eta}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// Packed weights of a group.
enum Store {
    Dense(Cold),
    Experts(ColdExperts),
}

/// Measures one case and checks what it computed.
fn cell(
    cpu: &Cpu<'_>,
    limits: &mut Limits<'_>,
    store: &Store,
    (m, acts, top_k): (usize, Acts, usize),
    peak: Option<Peak>,
    sampling: Sampling,
) -> Result<sample::Outcome, String> {
    let mut only = |bytes, flops, call: &mut dyn FnMut() -> trn_kernels::Result<()>| {
        let call = Box::new(|| timed(&mut *call));
        let mut ours = [Contender { name: "trn-kernels".into(), bytes, flops, call }];
        let outcomes = measure(limits, peak, &mut ours, sampling)?;
        outcomes.into_iter().next().ok_or_else(|| "nothing was measured".to_owned())
    };
    match store {
        Store::Dense(cold) => {
            let mut dense = Dense::new(cold, acts, m);
            let outcome = only(dense.bytes(), dense.flops(), &mut || dense.call(cpu))?;
            dense.check().map(|()| outcome)
        }
        Store::Experts(cold) => {
            let mut moe = Moe::new(cold, acts, m, top_k);
            let outcome = only(moe.bytes(), moe.flops(), &mut || moe.call(cpu))?;
            moe.check().map(|()| outcome)
        }
    }
}

/// Where and when, and the limits at the start. Settles how memory is read.
fn preamble(limits: &mut Limits<'_>, origin: &Origin) -> String {
    let found = limits.read.tune(limits.pool, 3);
    let best = found.iter().map(|(_, rate)| *rate).fold(0.0, f64::max) / 1e9;
    let single = found.first().map_or(0.0, |(_, rate)| rate / 1e9);
    let mut text = format!(
        "{origin}\nread: {best:.1} GB/s by {} ({single:.1} by one stream without prefetch; \
         {} MiB read, last-level caches {} MiB)\n",
        limits.read.pattern(),
        limits.read.bytes() >> 20,
        limits::last_level_caches() >> 20
    );
    for peak in Peak::ALL {
        // The first runs let the clock settle and the scheduler give each thread a core: they are not counted.
        let mut rates: Vec<f64> = (0..32).filter_map(|_| peak.rate(limits.pool, 5e-3)).skip(8).collect();
        let middle = limits::median(&mut rates) / 1e9;
        let (least, most) = (rates.first().map_or(0.0, |r| r / 1e9), rates.last().map_or(0.0, |r| r / 1e9));
        text += &match peak.missing() {
            None => format!("{peak}: {middle:.1} GFLOP/s (runs of 5 ms: {least:.1} to {most:.1})\n"),
            Some(reason) => format!("{peak}: skipped, {reason}\n"),
        };
    }
    text
}

/// The share that counts, by scheme: least and greatest.
fn summary(rows: &[Row]) -> String {
    let mut text = String::from("\nshare of the nearer limit, least to greatest\n");
    for (name, _) in SCHEMES {
        let of = |bound: bool| {
            let rows = rows.iter().filter(move |row| row.scheme == name && row.outcome.compute_bound() == bound);
            let shares: Vec<f64> = rows.map(|row| row.outcome.of_limit()).collect();
            let (low, high) = shares.iter().fold((f64::INFINITY, 0.0f64), |(l, h), s| (l.min(*s), h.max(*s)));
            (!shares.is_empty()).then(|| format!("{low:.2} to {high:.2}"))
        };
        let (memory, compute) = (of(false), of(true));
        if memory.is_some() || compute.is_some() {
            let or_none = |range: Option<String>| range.unwrap_or_else(|| "-".into());
            text += &format!("  {name:<12} memory {:<14} compute {}\n", or_none(memory), or_none(compute));
        }
    }
    text.truncate(text.trim_end().len());
    text
}

/// The file that `--out` means, its first line written: a new one, or in a folder the day's, which may hold earlier runs.
fn record(given: &Path, origin: &Origin) -> Result<Sink, Failure> {
    if !given.is_dir() {
        let mut sink = open(given, false)?;
        return write(&mut sink, &format!("{COLUMNS}\n")).map(|()| sink);
    }
    let path = given.join(machine::slug(&origin.cpu)).join(format!("{}.csv", origin.date));
    let mut sink = open(&path, true)?;
    let length = sink.1.metadata().map_err(|e| Failure::refused(format!("{}: {e}", path.display())))?.len();
    if length == 0 {
        write(&mut sink, &format!("{COLUMNS}\n"))?;
    }
    Ok(sink)
}

/// A file to write later, and its path for messages.
struct Sink(PathBuf, std::fs::File);

/// The file, in a folder that is made if need be; what it holds is kept or not.
fn open(path: &Path, keep: bool) -> Result<Sink, Failure> {
    let refused = |e: std::io::Error| Failure::refused(format!("{}: {e}", path.display()));
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).map_err(refused)?;
    }
    let mut options = std::fs::OpenOptions::new();
    let options = if keep { options.append(true) } else { options.write(true).truncate(true) };
    Ok(Sink(path.to_owned(), options.create(true).open(path).map_err(refused)?))
}

fn write(Sink(path, file): &mut Sink, text: &str) -> Result<(), Failure> {
    file.write_all(text.as_bytes()).map_err(|e| Failure::refused(format!("{}: {e}", path.display())))
}

/// A line on standard output. A reader that has seen enough (`| head`) is no failure.
fn say(line: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{line}");
}
