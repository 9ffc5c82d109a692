//! What bounds a problem on one NeuronCore: arithmetic or memory.
//!
//! **A model from documented constants ([`Chip`]), not a measurement.** A problem costs its floating-point operations at TensorE's
//! peak for the operands' mode, and its operands' bytes once through [`Chip::core_bandwidth`]; the two overlap perfectly and
//! nothing else takes time. So it is a lower bound on time for the same chip constants: padding, fills, drains, PSUM eviction and
//! the other engines come on top. (Williams, Waterman, Patterson: Roofline, CACM 2009.)
#![forbid(unsafe_code)]

use super::chip::{Chip, MatmulMode};
use crate::error::{Error, Result};
use crate::kv::KvFormat;
use crate::num::Fp8;
use crate::quant::Scheme;
use std::fmt;

/// `y[m, n] = x[m, k] w[n, k]^T` with y in bf16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MatmulProblem {
    /// Rows of x: tokens.
    pub m: usize,
    /// Output channels.
    pub n: usize,
    /// The contraction axis.
    pub k: usize,
    /// What the weights are.
    pub weights: Scheme,
    /// What x is in HBM. bf16 beside MX weights is quantized on the device.
    pub activations: Scheme,
}

/// Attention of one new token for each sequence over a paged cache; q and the output in bf16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeProblem {
    /// Sequences: query tokens.
    pub sequences: usize,
    /// Tokens read from the cache, over all sequences (a window counts what it leaves visible).
    pub kv_tokens: usize,
    /// Query heads.
    pub num_qo_heads: usize,
    /// KV heads.
    pub num_kv_heads: usize,
    /// Elements of a key.
    pub head_dim_qk: usize,
    /// Elements of a value.
    pub head_dim_vo: usize,
    /// What the cache holds: bf16 or FP8.
    pub format: KvFormat,
}

/// Attention of a chunk of new tokens for each sequence, over the chunk and what came before it; everything in bf16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefillProblem {
    /// Sequences.
    pub sequences: usize,
    /// New queries of a sequence.
    pub queries: usize,
    /// New keys of a sequence; as many as queries if causal.
    pub keys: usize,
    /// Keys of a sequence before the chunk.
    pub prior: usize,
    /// Query heads.
    pub num_qo_heads: usize,
    /// KV heads.
    pub num_kv_heads: usize,
    /// Elements of a key and of a value.
    pub head_dim: usize,
    /// Whether a query sees no later key.
    pub causal: bool,
    /// Keys that a query sees at most, itself included; 0 means all. Only with `causal`.
    pub window: usize,
}

/// The experts' MLPs of a mixture-of-experts layer on sorted rows: gate and up, an activation, down. Rows are bf16 and
/// quantized on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertsProblem {
    /// Token-expert pairs.
    pub rows: usize,
    /// Experts that have rows: their weights are read.
    pub experts: usize,
    /// Hidden size.
    pub hidden: usize,
    /// Intermediate size.
    pub intermediate: usize,
    /// What the weights are.
    pub weights: Scheme,
}

/// Which of the two takes longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bound {
    /// TensorE.
    Compute,
    /// HBM and DMA.
    Memory,
}

/// A problem on the roofline of one core. Seconds, bytes and operations of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Roofline {
    /// How TensorE multiplies.
    pub mode: MatmulMode,
    /// Floating-point operations of the problem; padding is not counted.
    pub flops: f64,
    /// Bytes of the operands and of the result, each once.
    pub bytes: f64,
    /// TensorE's peak in that mode, operations a second.
    pub peak_flops: f64,
    /// Bytes a second.
    pub bandwidth: f64,
}

impl Roofline {
    /// Operations for each byte.
    pub fn intensity(&self) -> f64 {
        self.flops / self.bytes
    }

    /// The intensity from which on a problem is bound by arithmetic.
    pub fn ridge(&self) -> f64 {
        self.peak_flops / self.bandwidth
    }

    /// Seconds of arithmetic at peak.
    pub fn compute_seconds(&self) -> f64 {
        self.flops / self.peak_flops
    }

    /// Seconds of memory traffic at full bandwidth.
    pub fn memory_seconds(&self) -> f64 {
        self.bytes / self.bandwidth
    }

    /// The longer of the two: no kernel is faster.
    pub fn seconds(&self) -> f64 {
        self.compute_seconds().max(self.memory_seconds())
    }

    /// What takes longer.
    pub fn bound(&self) -> Bound {
        if self.compute_seconds() >= self.memory_seconds() { Bound::Compute } else { Bound::Memory }
    }

    /// The share of TensorE's peak that is in reach: 1 when bound by arithmetic.
    pub fn compute_share(&self) -> f64 {
        self.compute_seconds() / self.seconds()
    }

    /// The share of the bandwidth in use: 1 when bound by memory.
    pub fn memory_share(&self) -> f64 {
        self.memory_seconds() / self.seconds()
    }

    /// A problem of so many operations and bytes on one core of a chip.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a mode that the chip lacks; [`Error::Value`] for a chip whose figures are not positive.
    pub fn new(chip: &Chip, mode: MatmulMode, flops: f64, bytes: f64) -> Result<Self> {
        let Some(peak_flops) = chip.tensor.peak_flops(mode) else {
            return Err(unsupported(format!("{mode:?} matmul on {}", chip.name), "TensorE does not have the mode"));
        };
        let bandwidth = chip.core_bandwidth();
        for (at, value) in [peak_flops, bandwidth].into_iter().enumerate() {
            if !(value.is_finite() && value > 0.0) {
                let (operand, needed) = ("peak and bandwidth of the chip".into(), "a positive number");
                return Err(Error::Value { operand, at, got: value.to_string(), needed });
            }
        }
        Ok(Roofline { mode, flops, bytes, peak_flops, bandwidth })
    }
}

impl fmt::Display for Roofline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bound = match self.bound() {
            Bound::Compute => "compute",
            Bound::Memory => "memory",
        };
        writeln!(f, "model, not a measurement: bound by {bound}, {:.3e} s", self.seconds())?;
        let (gflop, share) = (self.flops / 1e9, 100.0 * self.compute_share());
        writeln!(
            f,
            "  {gflop:.3} GFLOP at {:.1} TFLOP/s ({:?}): {share:.1} % of peak in reach",
            self.peak_flops / 1e12,
            self.mode
        )?;
        let (mb, share) = (self.bytes / 1e6, 100.0 * self.memory_share());
        writeln!(f, "  {mb:.3} MB at {:.1} GB/s: {share:.1} % of bandwidth in use", self.bandwidth / 1e9)?;
        write!(f, "  {:.2} FLOP a byte, ridge {:.2}", self.intensity(), self.ridge())
    }
}

impl MatmulProblem {
    /// The problem on one core of a chip.
    ///
    /// The mode: MX weights use `nc_matmul_mx` where the chip has it and are widened to bf16 on chip where not; FP8 weights with FP8
    /// activations use double-row if no f32 scale changes within 256 k, plain FP8 if one does; everything else is bf16.
    ///
    /// # Errors
    /// [`Error::Empty`] for an extent of 0; [`Error::Unsupported`] for NVFP4, for E3M4, for FP8 with MX operands, and for a mode that
    /// the chip lacks; [`Error::Value`] for a chip whose figures are not positive.
    pub fn on(&self, chip: &Chip) -> Result<Roofline> {
        not_empty("matmul", &[("m", self.m), ("n", self.n), ("k", self.k)])?;
        let mode = mode(self.weights, self.activations, chip)?;
        let (m, n, k) = (self.m as f64, self.n as f64, self.k as f64);
        let bytes = matrix_bytes(self.weights, n, k) + matrix_bytes(self.activations, m, k) + 2.0 * m * n;
        Roofline::new(chip, mode, 2.0 * m * n * k, bytes)
    }
}

impl DecodeProblem {
    /// The problem on one core of a chip. TensorE multiplies in bf16: FP8 keys and values are widened on chip.
    ///
    /// # Errors
    /// [`Error::Empty`] for an extent of 0; [`Error::Unsupported`] for a cache that is neither bf16 nor FP8; [`Error::Value`] for a
    /// chip whose figures are not positive.
    pub fn on(&self, chip: &Chip) -> Result<Roofline> {
        not_empty(
            "decode attention",
            &[
                ("sequences", self.sequences),
                ("kv_tokens", self.kv_tokens),
                ("num_qo_heads", self.num_qo_heads),
                ("num_kv_heads", self.num_kv_heads),
                ("head_dim_qk", self.head_dim_qk),
                ("head_dim_vo", self.head_dim_vo),
            ],
        )?;
        let element = match self.format {
            KvFormat::Bf16 => 2.0,
            KvFormat::Fp8(_) => 1.0,
            format => {
                return Err(unsupported(format!("a {format:?} cache"), "the device kernels read bf16 and FP8 caches"));
            }
        };
        let dims = self.head_dim_qk as f64 + self.head_dim_vo as f64;
        let qo = self.num_qo_heads as f64 * dims;
        let kv = self.num_kv_heads as f64 * dims;
        let bytes = self.kv_tokens as f64 * kv * element + self.sequences as f64 * qo * 2.0;
        Roofline::new(chip, MatmulMode::Bf16, 2.0 * self.kv_tokens as f64 * qo, bytes)
    }
}

impl PrefillProblem {
    /// The problem on one core of a chip. Keys before every query's window are not read.
    ///
    /// # Errors
    /// [`Error::Empty`] for an extent of 0 but `prior` and `window`; [`Error::Value`] for a chip whose figures are not positive.
    pub fn on(&self, chip: &Chip) -> Result<Roofline> {
        not_empty(
            "prefill attention",
            &[
                ("sequences", self.sequences),
                ("queries", self.queries),
                ("keys", self.keys),
                ("num_qo_heads", self.num_qo_heads),
                ("num_kv_heads", self.num_kv_heads),
                ("head_dim", self.head_dim),
            ],
        )?;
        let (sequences, queries, keys) = (self.sequences as f64, self.queries as f64, self.keys as f64);
        let qo = self.num_qo_heads as f64 * self.head_dim as f64;
        let kv = self.num_kv_heads as f64 * self.head_dim as f64;
        let windowed = self.causal && self.window > 0;
        let prior = if windowed { self.prior.min(self.window - 1) } else { self.prior } as f64;
        let flops = 4.0 * sequences * self.visible() * qo;
        Roofline::new(chip, MatmulMode::Bf16, flops, 2.0 * sequences * (2.0 * queries * qo + 2.0 * (keys + prior) * kv))
    }

    /// Pairs of a query and a key that it sees, in one sequence and head.
    fn visible(&self) -> f64 {
        let (queries, prior) = (self.queries as f64, self.prior as f64);
        if !self.causal {
            return queries * (self.keys as f64 + prior);
        }
        // Query i sees prior + i + 1 keys until the window is full.
        let window = if self.window > 0 { self.window as f64 } else { f64::INFINITY };
        let growing = (window - prior - 1.0).clamp(0.0, queries);
        let full = if growing < queries { (queries - growing) * window } else { 0.0 };
        growing * prior + growing * (growing + 1.0) / 2.0 + full
    }
}

impl ExpertsProblem {
    /// The problem on one core of a chip. Biases are not counted.
    ///
    /// # Errors
    /// As for [`MatmulProblem::on`].
    pub fn on(&self, chip: &Chip) -> Result<Roofline> {
        not_empty(
            "experts",
            &[
                ("rows", self.rows),
                ("experts", self.experts),
                ("hidden", self.hidden),
                ("intermediate", self.intermediate),
            ],
        )?;
        let mode = mode(self.weights, Scheme::Bf16, chip)?;
        let (rows, hidden, inter) = (self.rows as f64, self.hidden as f64, self.intermediate as f64);
        let expert = matrix_bytes(self.weights, 2.0 * inter, hidden) + matrix_bytes(self.weights, hidden, inter);
        let bytes = self.experts as f64 * expert + 2.0 * 2.0 * rows * hidden;
        Roofline::new(chip, mode, 2.0 * rows * 3.0 * hidden * inter, bytes)
    }
}

fn not_empty(operand: &'static str, extents: &[(&'static str, usize)]) -> Result<()> {
    match extents.iter().find(|(_, extent)| *extent == 0) {
        Some((axis, _)) => Err(Error::Empty { operand: operand.into(), axis }),
        None => Ok(()),
    }
}

fn unsupported(what: String, because: &str) -> Error {
    Error::Unsupported { what, because: because.into() }
}

/// Bytes of codes and scales of a matrix `[rows, k]`.
fn matrix_bytes(scheme: Scheme, rows: f64, k: f64) -> f64 {
    let codes = rows * k * scheme.bits() as f64 / 8.0;
    let scales = match scheme {
        Scheme::Bf16 => 0.0,
        Scheme::Mxfp4 | Scheme::Mxfp8(_) | Scheme::Nvfp4 => rows * k / scheme.block() as f64,
        Scheme::Fp8PerTensor(_) => 4.0,
        Scheme::Fp8PerChannel(_) => 4.0 * rows,
        Scheme::Fp8Blockwise { n, k: tile, .. } => {
            4.0 * (rows / n.max(1) as f64).ceil() * (k / tile.max(1) as f64).ceil()
        }
    };
    codes + scales
}

fn mode(weights: Scheme, activations: Scheme, chip: &Chip) -> Result<MatmulMode> {
    for scheme in [weights, activations] {
        if scheme == Scheme::Nvfp4 {
            return Err(unsupported("Nvfp4".into(), "no Trainium instruction takes E4M3 scales of 16 elements"));
        }
        if scheme.fp8() == Some(Fp8::E3M4) {
            return Err(unsupported(format!("{scheme:?}"), "NKI has no E3M4 dtype"));
        }
    }
    let is_mx = |scheme| matches!(scheme, Scheme::Mxfp4 | Scheme::Mxfp8(_));
    Ok(match (weights, activations) {
        (w, Scheme::Bf16) if is_mx(w) && chip.tensor.mx => MatmulMode::Mx,
        (w, x) if is_mx(w) && is_mx(x) && chip.tensor.mx => MatmulMode::Mx,
        (Scheme::Bf16, _) | (_, Scheme::Bf16) => MatmulMode::Bf16,
        (w, x) if is_mx(w) && is_mx(x) => MatmulMode::Bf16,
        (w, x) if is_mx(w) != is_mx(x) => {
            let what = format!("{w:?} weights with {x:?} activations");
            return Err(unsupported(what, "both operands of an MX matmul have block scales"));
        }
        (w, x) if chip.tensor.double_row && constant_over(w, 256) && constant_over(x, 256) => MatmulMode::Fp8DoubleRow,
        _ => MatmulMode::Fp8,
    })
}

/// Whether no f32 scale changes inside `chunk` elements along k.
fn constant_over(scheme: Scheme, chunk: usize) -> bool {
    match scheme {
        Scheme::Fp8Blockwise { k, .. } => k.is_multiple_of(chunk),
        _ => true,
    }
}
