//! Loads a gpt-oss checkpoint as it is on disk, runs prefill and decode through this crate, and prints the tokens.
//!
//! `cargo run --release --example generate` runs the tiny model that is shipped with the tests; `--help` shows the rest.

mod gpt_oss;

use clap::{Parser, ValueEnum};
use gpt_oss::{Model, Session};
use half::bf16;
use indicatif::{ProgressBar, ProgressStyle};
use safetensors::tensor::{Dtype, TensorView};
use std::error::Error;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;
use trn_kernels::backend::{Backend, CpuBackend, NeuronBackend, NeuronOptions, OracleBackend};
use trn_kernels::checkpoint::{Checkpoint, GptOss, GptOssConfig};
use trn_kernels::kv::KvFormat;
use trn_kernels::neuron::kernels::KernelSet;
use trn_kernels::neuron::{Library, LoadOptions, Runtime, RuntimeOptions};
use trn_kernels::num::{Fp8, Real};
use trn_kernels::{Cpu, Parallelism, layer};

/// Why it ended early; may cross threads, because a pool's thread generates.
type Failure = Box<dyn Error + Send + Sync>;

/// Most threads that are started: beyond this a number is a slip of the keyboard.
const MAX_THREADS: usize = 1024;

/// Generate tokens from a gpt-oss checkpoint on the CPU, greedily.
///
/// Generated token ids go to standard output, separated by spaces; everything else goes to standard error. The checkpoint is
/// memory mapped: its files must not be changed while this runs.
#[derive(Parser)]
struct Args {
    /// Folder with config.json and safetensors, in Hugging Face or original naming
    #[arg(long, value_name = "DIR", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tiny-gpt-oss"))]
    model: PathBuf,

    /// Prompt as token ids, separated by commas [default: the model folder's reference prompt, if it has one]
    #[arg(long, value_name = "IDS", value_delimiter = ',', conflicts_with = "tokens_file")]
    tokens: Option<Vec<u32>>,

    /// Prompt from a text file of token ids, separated by commas or white space
    #[arg(long, value_name = "FILE")]
    tokens_file: Option<PathBuf>,

    /// Tokens to generate
    #[arg(long, default_value_t = 16)]
    steps: usize,

    /// Stop after generating one of these token ids
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    stop: Vec<u32>,

    /// What enters a matmul: f32 as it is, rounded to bf16, or quantized to MXFP8 (router excepted)
    #[arg(long, value_enum, default_value_t = Acts::F32)]
    acts: Acts,

    /// Format of the KV cache [default: f32 with f32 activations, else bf16]
    #[arg(long, value_enum)]
    kv: Option<Kv>,

    /// Who computes matmuls and attention: the CPU kernels, the f64 oracle that defines them (slow), or a NeuronCore
    #[arg(long, value_enum, default_value_t = On::Cpu)]
    backend: On,

    /// With --backend neuron: folder of compiled kernels, as kernels/build.py makes it
    #[arg(long, value_name = "DIR", required_if_eq("backend", "neuron"))]
    kernels: Option<PathBuf>,

    /// With --backend neuron: the libnrt to load [default: searched for, see docs/neuron.md]
    #[arg(long, value_name = "FILE")]
    libnrt: Option<PathBuf>,

    /// Threads [default: all cores]; results do not depend on it
    #[arg(long)]
    threads: Option<usize>,

    /// Prompt tokens to run at a time; results do not depend on it
    #[arg(long, value_name = "N", default_value_t = 512)]
    prefill_chunk: usize,

    /// Write a safetensors file: `logits` f32 [T, V] of every prompt position, `generated` i64
    #[arg(long, value_name = "OUT")]
    logits: Option<PathBuf>,
}

impl Args {
    fn kv_format(&self) -> KvFormat {
        self.kv.unwrap_or(if self.acts == Acts::F32 { Kv::F32 } else { Kv::Bf16 }).format()
    }
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Acts {
    F32,
    Bf16,
    Mxfp8,
}

#[derive(Clone, Copy, ValueEnum)]
enum On {
    Cpu,
    Oracle,
    Neuron,
}

fn backend<'w>(args: &Args, cpu: Cpu<'w>) -> Result<Box<dyn Backend<'w> + 'w>, Failure> {
    Ok(match args.backend {
        On::Cpu => Box::new(CpuBackend::new(cpu)),
        On::Oracle => Box::new(OracleBackend::new()),
        On::Neuron => {
            let folder = args.kernels.as_ref().ok_or("--backend neuron: needs --kernels DIR")?;
            let kernels = KernelSet::open(folder)?;
            let options = args.libnrt.clone().map_or_else(LoadOptions::default, LoadOptions::path);
            let runtime = Runtime::init(&Library::open(&options)?, &RuntimeOptions::default())?;
            let options = NeuronOptions { parallelism: cpu.parallelism(), ..NeuronOptions::default() };
            Box::new(NeuronBackend::new(&kernels.on(&runtime, 0), options))
        }
    })
}

#[derive(Clone, Copy, ValueEnum)]
enum Kv {
    F32,
    Bf16,
    Fp8,
    Mxfp8,
    Mxfp4,
    Nvfp4,
}

impl Kv {
    fn format(self) -> KvFormat {
        match self {
            Kv::F32 => KvFormat::F32,
            Kv::Bf16 => KvFormat::Bf16,
            Kv::Fp8 => KvFormat::Fp8(Fp8::E4M3Fn),
            Kv::Mxfp8 => KvFormat::Mxfp8(Fp8::E4M3Fn),
            Kv::Mxfp4 => KvFormat::Mxfp4,
            Kv::Nvfp4 => KvFormat::Nvfp4,
        }
    }
}

fn main() {
    if let Err(e) = run(&Args::parse()) {
        eprintln!("error: {e}");
        std::process::exit(1);
    }
}

fn run(args: &Args) -> Result<(), Failure> {
    let threads = match args.threads {
        Some(threads) => threads,
        None => std::thread::available_parallelism()?.get(),
    };
    if !(1..=MAX_THREADS).contains(&threads) {
        return Err(format!("--threads: got {threads}, needed 1 to {MAX_THREADS}").into());
    }
    if args.prefill_chunk == 0 {
        return Err("--prefill-chunk: got 0, needed at least 1".into());
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    let cpu = Cpu::detect().with_parallelism(Parallelism::Pool(&pool));

    // SAFETY: nobody may change the files while they are mapped. This program does not; its user is told so by --help.
    let checkpoint = unsafe { Checkpoint::map(&args.model) }?;
    let source = GptOss::new(&checkpoint)?;
    let prompt = prompt(args, source.config().vocab_size)?;
    check_blocks(args, source.config())?;
    // Opened before the long work, so that a path that cannot be written costs nothing.
    let output = args.logits.as_deref().map(LogitsFile::create).transpose()?;

    // From a thread of the pool: it works along, where one outside would have to wake the pool for every call and wait.
    pool.install(|| match args.acts {
        Acts::F32 => generate::<f32>(args, cpu, &source, &prompt, output),
        Acts::Bf16 | Acts::Mxfp8 => generate::<bf16>(args, cpu, &source, &prompt, output),
    })
}

/// Refuses formats whose blocks do not divide the model's axes, before the long work.
fn check_blocks(args: &Args, config: &GptOssConfig) -> Result<(), Failure> {
    let (kv, width) = (args.kv_format(), config.num_attention_heads * config.head_dim);
    if !config.head_dim.is_multiple_of(kv.block()) {
        return Err(format!("--kv {kv:?}: head_dim is {}, needed a multiple of {}", config.head_dim, kv.block()).into());
    }
    if args.acts == Acts::Mxfp8 && !width.is_multiple_of(32) {
        return Err(format!("--acts mxfp8: the heads' width is {width}, needed a multiple of 32").into());
    }
    Ok(())
}

/// Prefill in chunks, then one token at a time.
fn generate<T: Real>(
    args: &Args,
    cpu: Cpu<'_>,
    source: &GptOss<'_>,
    prompt: &[u32],
    output: Option<LogitsFile>,
) -> Result<(), Failure> {
    let mut backend = backend(args, cpu)?;
    let bar = progress(source.config().num_hidden_layers, "packing layers");
    let clock = Instant::now();
    let model = Model::load::<T>(&mut *backend, source, args.acts == Acts::Mxfp8, || bar.inc(1))?;
    bar.finish_and_clear();
    eprintln!("packed the checkpoint for the {} in {:.2} s", backend.name(), clock.elapsed().as_secs_f64());

    let room = prompt.len().checked_add(args.steps).ok_or("--steps: too many to count together with the prompt")?;
    let mut session = Session::<T>::new(&model, &mut *backend, cpu, args.kv_format(), room)?;
    let vocab = model.config.vocab_size;
    let (mut logits, mut all_logits) = (vec![], vec![]);

    let clock = Instant::now();
    let bar = progress(prompt.len(), "prefill");
    for chunk in prompt.chunks(args.prefill_chunk) {
        session.step(chunk)?;
        if output.is_some() {
            session.logits(chunk.len(), &mut logits)?;
            all_logits.extend_from_slice(&logits);
        }
        bar.inc(chunk.len() as u64);
    }
    session.logits(1, &mut logits)?;
    bar.finish_and_clear();
    rate("prefill", prompt.len(), clock);

    let clock = Instant::now();
    let mut generated = vec![];
    let mut out = std::io::stdout().lock();
    while generated.len() < args.steps {
        let token = layer::argmax(&logits)? as u32;
        write!(out, "{}{token}", if generated.is_empty() { "" } else { " " })?;
        out.flush()?;
        generated.push(token);
        if args.stop.contains(&token) || generated.len() == args.steps {
            break;
        }
        session.step(&[token])?;
        session.logits(1, &mut logits)?;
    }
    writeln!(out)?;
    rate("decode", generated.len().saturating_sub(1), clock);
    eprintln!("peak KV cache: {} bytes", session.peak_kv_bytes());
    if let Some(output) = output {
        output.write(&all_logits, prompt.len(), vocab, &generated)?;
    }
    Ok(())
}

/// The prompt, every id checked against the vocabulary.
fn prompt(args: &Args, vocab: usize) -> Result<Vec<u32>, Failure> {
    let ids = match (&args.tokens, &args.tokens_file) {
        (Some(ids), _) => ids.clone(),
        (None, Some(file)) => parse_ids(file)?,
        (None, None) => reference_prompt(&args.model)?,
    };
    if ids.is_empty() {
        return Err("the prompt is empty: at least one token is needed".into());
    }
    match ids.iter().position(|id| *id as usize >= vocab) {
        Some(at) => Err(format!("prompt[{at}]: token {} is out of vocabulary, needed below {vocab}", ids[at]).into()),
        None => Ok(ids),
    }
}

fn parse_ids(file: &Path) -> Result<Vec<u32>, Failure> {
    let text = std::fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))?;
    let words = text.split(|c: char| c == ',' || c.is_whitespace()).filter(|word| !word.is_empty());
    words.map(|w| w.parse().map_err(|e| format!("{}: token id {w:?}: {e}", file.display()).into())).collect()
}

/// `prompt` of `reference.safetensors`, which test models carry.
fn reference_prompt(model: &Path) -> Result<Vec<u32>, Failure> {
    let path = model.join("reference.safetensors");
    if !path.exists() {
        return Err(format!("no prompt: give --tokens or --tokens-file ({} has no reference)", model.display()).into());
    }
    let reference = Checkpoint::read(&path)?;
    let prompt = reference.tensor("prompt")?;
    let ids =
        prompt.bytes.chunks_exact(8).map(|id| u32::try_from(i64::from_le_bytes(id.try_into().unwrap_or_default())));
    Ok(ids.collect::<Result<_, _>>()?)
}

/// A bar on standard error; silent when that is not a terminal.
fn progress(len: usize, what: &'static str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:14} [{bar:40}] {pos}/{len} {per_sec} eta {eta}");
    ProgressBar::new(len as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())).with_message(what)
}

fn rate(what: &str, tokens: usize, clock: Instant) {
    let seconds = clock.elapsed().as_secs_f64();
    eprintln!("{what}: {tokens} tokens in {seconds:.3} s, {:.1} tokens/s", tokens as f64 / seconds.max(1e-9));
}

/// A file that appears under its name only once it is whole.
struct LogitsFile {
    temporary: tempfile::NamedTempFile,
    path: PathBuf,
}

impl LogitsFile {
    fn create(path: &Path) -> Result<Self, Failure> {
        if path.is_dir() {
            return Err(format!("{}: is a folder, needed a file", path.display()).into());
        }
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let temporary = tempfile::NamedTempFile::new_in(folder).map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(LogitsFile { temporary, path: path.into() })
    }

    fn write(self, logits: &[f32], tokens: usize, vocab: usize, generated: &[u32]) -> Result<(), Failure> {
        let logits: Vec<u8> = logits.iter().flat_map(|v| v.to_le_bytes()).collect();
        let ids: Vec<u8> = generated.iter().flat_map(|id| i64::from(*id).to_le_bytes()).collect();
        let tensors = [
            ("logits", TensorView::new(Dtype::F32, vec![tokens, vocab], &logits)?),
            ("generated", TensorView::new(Dtype::I64, vec![generated.len()], &ids)?),
        ];
        safetensors::serialize_to_file(tensors, None, self.temporary.path())?;
        self.temporary.persist(&self.path).map_err(|e| format!("{}: {}", self.path.display(), e.error))?;
        eprintln!("wrote {}", self.path.display());
        Ok(())
    }
}
