//! Documented constants of the chips. Nobody on this project has measured any of them.
//!
//! Every figure is for one physical NeuronCore unless it says chip. Where AWS's pages disagree (by 2 to 18 %) the lower figure
//! stands, and effective DMA figures stand for theoretical ones. What is documented for
//! NeuronCore-v2 only is taken for v3 and v4 too, and said to be. The tables are plain data: a chip that is not here, or a
//! figure that you have measured, is a struct update away.
//!
//! Sources, in brackets: pages of the AWS Neuron SDK documentation of 2026-08 (`arch`: NKI architecture guides of Trainium 1, 2
//! and 3; `hardware`: hardware pages of the chips; `perf`: NKI performance guide; `dma`: NKI DMA bandwidth guide; `isa`: NKI ISA
//! reference).
#![forbid(unsafe_code)]

use super::layout::PARTITIONS;
use std::borrow::Cow;

/// How TensorE is asked to multiply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MatmulMode {
    /// f32 operands.
    F32,
    /// bf16, f16 or tf32 operands.
    Bf16,
    /// FP8 operands, one to a partition: the rate of bf16.
    Fp8,
    /// FP8 operands, two to a partition (`perf_mode=double_row`).
    Fp8DoubleRow,
    /// MX operands, four to a partition (`nc_matmul_mx`), FP8 and FP4 alike.
    Mx,
}

impl MatmulMode {
    /// All of them.
    pub const ALL: [MatmulMode; 5] =
        [MatmulMode::F32, MatmulMode::Bf16, MatmulMode::Fp8, MatmulMode::Fp8DoubleRow, MatmulMode::Mx];

    /// Elements of the contraction axis in one partition.
    pub const fn k_per_partition(self) -> usize {
        match self {
            MatmulMode::Fp8DoubleRow => 2,
            MatmulMode::Mx => 4,
            _ => 1,
        }
    }
}

/// TensorE.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "emulator", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub struct TensorEngine {
    /// Clock, Hz.
    pub clock: f64,
    /// Rows and columns of the array: partitions of the operands, and the largest stationary free size.
    pub side: usize,
    /// Passes of an f32 matmul: it takes so many times the cycles.
    pub f32_passes: f64,
    /// Passes of an f32 transpose.
    pub f32_transpose_passes: f64,
    /// Whether `double_row` exists.
    pub double_row: bool,
    /// Whether `nc_matmul_mx` exists.
    pub mx: bool,
    /// Cycles of a moving operand of N columns: `max(N, min_columns)`.
    pub min_columns: usize,
    /// Loading a stationary operand is so many times faster than moving one of the same free size.
    pub load_speedup: f64,
    /// Largest moving free size of one instruction, f32 results.
    pub max_moving: usize,
}

impl TensorEngine {
    /// Whether the mode exists.
    pub const fn has(&self, mode: MatmulMode) -> bool {
        match mode {
            MatmulMode::Fp8DoubleRow => self.double_row,
            MatmulMode::Mx => self.mx,
            _ => true,
        }
    }

    /// Cycles to move `columns` columns past a stationary operand.
    pub fn moving_cycles(&self, mode: MatmulMode, columns: usize) -> f64 {
        let passes = if mode == MatmulMode::F32 { self.f32_passes } else { 1.0 };
        columns.max(self.min_columns) as f64 * passes
    }

    /// Cycles to transpose a tile of `partitions` rows; `f32` if its elements have four bytes.
    pub fn transpose_cycles(&self, f32: bool, partitions: usize) -> f64 {
        let passes = if f32 { self.f32_transpose_passes } else { 1.0 };
        partitions.max(self.min_columns) as f64 * passes
    }

    /// Cycles to load a stationary operand of `columns` columns; hidden behind the matmul before it.
    pub fn load_cycles(&self, columns: usize) -> f64 {
        columns as f64 / self.load_speedup
    }

    /// Floating-point operations a second of an endless stream of full tiles; `None` if the mode does not exist.
    pub fn peak_flops(&self, mode: MatmulMode) -> Option<f64> {
        let passes = if mode == MatmulMode::F32 { self.f32_passes } else { 1.0 };
        let multiplies = (self.side as f64).powi(2) * mode.k_per_partition() as f64;
        self.has(mode).then(|| 2.0 * multiplies * self.clock / passes)
    }
}

/// VectorE, ScalarE or GpSimdE. Cycles are the engine's own.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "emulator", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub struct LaneEngine {
    /// Clock, Hz.
    pub clock: f64,
    /// Elements of one partition in a cycle, one input, any dtype.
    pub elements: f64,
    /// As `elements` for 16-bit floats, both sides in SBUF, contiguous.
    pub elements_16: f64,
    /// Cycles added to an instruction that is small or waits for the one before it.
    pub small: f64,
    /// Fewest cycles between two instructions.
    pub issue: f64,
}

/// The DMA engines that serve one core.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "emulator", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub struct Dma {
    /// Engines of a core.
    pub engines: usize,
    /// Bytes a second that one engine moves when rows are long.
    pub engine_bandwidth: f64,
    /// Seconds that a transfer takes beside its bytes.
    pub fixed: f64,
    /// Contiguous bytes of a partition below which bandwidth falls off.
    pub efficient_bytes: usize,
}

impl Dma {
    /// Bytes a second of all engines.
    pub fn bandwidth(&self) -> f64 {
        self.engines as f64 * self.engine_bandwidth
    }
}

/// A Trainium chip: documented constants, all public, so that an unknown one can be filled in.
///
/// ```
/// use trn_kernels::trainium::{Chip, MatmulMode};
/// // AWS has published nothing about Trainium4: a guess of one's own, to see what would bound a problem.
/// let mut guess = Chip { name: "my Trainium4".into(), hbm_bandwidth: 9.6e12, ..Chip::trn3() };
/// guess.tensor.clock = 2.8e9;
/// assert!(guess.tensor.peak_flops(MatmulMode::Mx) > Chip::trn3().tensor.peak_flops(MatmulMode::Mx));
/// ```
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "emulator", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub struct Chip {
    /// What to call it.
    pub name: Cow<'static, str>,
    /// Physical NeuronCores of a chip.
    pub cores: usize,
    /// HBM of a chip, bytes.
    pub hbm_bytes: u64,
    /// HBM bandwidth of a chip, bytes a second.
    pub hbm_bandwidth: f64,
    /// SBUF of one partition, bytes; there are 128.
    pub sbuf_partition_bytes: usize,
    /// PSUM banks of one partition.
    pub psum_banks: usize,
    /// Bytes of a PSUM bank of one partition.
    pub psum_bank_bytes: usize,
    /// Whether PSUM takes bf16 results of a matmul.
    pub psum_bf16: bool,
    /// TensorE.
    pub tensor: TensorEngine,
    /// VectorE.
    pub vector: LaneEngine,
    /// ScalarE.
    pub scalar: LaneEngine,
    /// GpSimdE.
    pub gpsimd: LaneEngine,
    /// DMA engines of one core.
    pub dma: Dma,
    /// Whether matmuls read OCP E4M3 (E4M3FN); all read E4M3 IEEE and E5M2.
    pub e4m3fn: bool,
}

/// VectorE and ScalarE: about 100 cycles for small or dependent instructions, 64 between two [perf, for v2].
const fn lanes(clock: f64, elements: f64, elements_16: f64) -> LaneEngine {
    LaneEngine { clock, elements, elements_16, small: 100.0, issue: 64.0 }
}

/// 128 x 128; f32 takes four passes, its transpose on v3 and v4 half as many [isa]; at least 64 cycles a matmul; loads four times as fast as moves [arch and perf, for v2].
const fn tensor(clock: f64, double_row: bool, mx: bool, max_moving: usize) -> TensorEngine {
    let (side, f32_passes, min_columns, load_speedup) = (PARTITIONS, 4.0, 64, 4.0);
    // The transpose mode came with `double_row`; before it a transpose is a matmul with the identity.
    let f32_transpose_passes = if double_row { f32_passes / 2.0 } else { f32_passes };
    TensorEngine {
        clock,
        side,
        f32_passes,
        f32_transpose_passes,
        double_row,
        mx,
        min_columns,
        load_speedup,
        max_moving,
    }
}

/// 16 engines a core; about 1300 ns a transfer; 2 KiB a partition is the recommended least [dma].
const fn dma(engine_bandwidth: f64) -> Dma {
    Dma { engines: 16, engine_bandwidth, fixed: 1300e-9, efficient_bytes: 2048 }
}

const GIB: u64 = 1 << 30;
const KIB: usize = 1 << 10;

impl Chip {
    /// Trainium1 (NeuronCore-v2).
    pub const fn trn1() -> Self {
        Chip {
            name: Cow::Borrowed("trn1"),
            cores: 2,                                 // [hardware]
            hbm_bytes: 32 * GIB,                      // [hardware]
            hbm_bandwidth: 820e9,                     // [hardware]
            sbuf_partition_bytes: 192 * KIB,          // 24 MiB [arch]
            psum_banks: 8,                            // [arch]
            psum_bank_bytes: 2 * KIB,                 // 512 f32 [arch]
            psum_bf16: false,                         // [isa]
            tensor: tensor(2.8e9, false, false, 512), // [arch, isa]
            vector: lanes(1.12e9, 1.0, 1.0),          // 128 elements a cycle over 128 partitions [arch]
            scalar: lanes(1.4e9, 1.0, 1.0),           // [arch]
            gpsimd: lanes(1.4e9, 1.0, 1.0),           // [arch]
            dma: dma(17e9),                           // effective, 272 GB/s a core [dma]
            e4m3fn: false,                            // [isa]
        }
    }

    /// Trainium2 (NeuronCore-v3).
    pub const fn trn2() -> Self {
        Chip {
            name: Cow::Borrowed("trn2"),
            cores: 8,                                // [hardware]
            hbm_bytes: 96 * GIB,                     // [hardware]
            hbm_bandwidth: 2.9e12,                   // [hardware]; the NKI guide says 3 TB/s: the lower one bounds
            sbuf_partition_bytes: 224 * KIB,         // 28 MiB [arch]
            psum_banks: 8,                           // [arch]
            psum_bank_bytes: 2 * KIB,                // [arch]
            psum_bf16: false,                        // [isa]
            tensor: tensor(2.4e9, true, false, 512), // [arch, isa]
            vector: lanes(0.96e9, 2.0, 4.0),         // 256 elements a cycle, 512 of 16 bits [arch]
            scalar: lanes(1.2e9, 1.0, 1.0),          // 128 a cycle [arch]
            gpsimd: lanes(1.2e9, 1.0, 1.0),          // 8 cores x 512 bits: 128 f32 a cycle [arch]
            dma: dma(23e9),                          // effective, 368 GB/s a core [dma]
            e4m3fn: false,                           // [isa]
        }
    }

    /// Trainium3 (NeuronCore-v4).
    pub const fn trn3() -> Self {
        Chip {
            name: Cow::Borrowed("trn3"),
            cores: 8,                                // [hardware]
            hbm_bytes: 144 * GIB,                    // [hardware]
            hbm_bandwidth: 4.7e12,                   // [arch]; the product page says 4.9 TB/s: the lower one bounds
            sbuf_partition_bytes: 256 * KIB,         // 32 MiB [arch]
            psum_banks: 8,                           // [arch]
            psum_bank_bytes: 2 * KIB,                // [arch]
            psum_bf16: true,                         // [isa]
            tensor: tensor(2.4e9, true, true, 4096), // [arch, isa]
            vector: lanes(1.2e9, 2.0, 4.0),          // 256 elements a cycle, 512 of 16 bits [arch]
            scalar: lanes(1.2e9, 1.0, 2.0),          // 128 a cycle, 256 of 16 bits [arch]
            gpsimd: lanes(1.2e9, 1.0, 1.0),          // 128 a cycle [arch]
            dma: dma(33e9),                          // effective, 528 GB/s a core [dma]
            e4m3fn: true,                            // [isa]
        }
    }

    /// Trainium1, 2 and 3.
    pub const fn documented() -> [Self; 3] {
        [Chip::trn1(), Chip::trn2(), Chip::trn3()]
    }

    /// The chip of that name; `None` unless it is `trn1`, `trn2` or `trn3`.
    pub fn named(name: &str) -> Option<Self> {
        Chip::documented().into_iter().find(|chip| chip.name == name)
    }

    /// Bytes a second that one core reads from HBM when all cores do: its share of the HBM or its DMA engines, whichever is less.
    pub fn core_bandwidth(&self) -> f64 {
        (self.hbm_bandwidth / self.cores as f64).min(self.dma.bandwidth())
    }

    /// SBUF of one core, bytes.
    pub const fn sbuf_bytes(&self) -> usize {
        self.sbuf_partition_bytes.saturating_mul(PARTITIONS)
    }

    /// PSUM of one core, bytes.
    pub const fn psum_bytes(&self) -> usize {
        self.psum_banks.saturating_mul(self.psum_bank_bytes).saturating_mul(PARTITIONS)
    }
}
