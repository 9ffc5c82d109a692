//! Every environment variable the crate's CPU path reads and every constant that matmul's loops are tuned by: type, default, reason. Three
//! stand elsewhere: how many panels a code's decoding has registers for (`matmul/coding.rs`), with how many rows its loop is written
//! out (`matmul/terms.rs`), and a literal in assembly (`tier/amx/many.rs` asks for x two steps, 2 KiB, ahead of the products, which take
//! 128 cycles).
#![forbid(unsafe_code)]

use super::isa::Caches;

/// `TRN_KERNELS_ISA`: `portable`, `avx2`, `avx512`, `avx512bf16` or `amx`; not set by default. Chooses the tier that [`Cpu::detect`] takes, to
/// compare or measure tiers. Read once in a process.
///
/// [`Cpu::detect`]: super::Cpu::detect
pub const ISA: &str = "TRN_KERNELS_ISA";

/// The only place that reads the environment.
pub(super) fn env(name: &str) -> Option<String> {
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
}

/// How matmul's loops are cut. Results do not depend on it: every field may have any value (tests shrink them to cross every
/// edge with small matrices); zeros count as 1, and what memory is multiplied by has an upper bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocking {
    /// Panels of 16 columns walked in step by the decode kernel. Default 8: one sequential stream leaves 30 to 40 % of DRAM
    /// bandwidth unused, eight recover it; more cost TLB entries.
    pub streams: usize,
    /// Bytes ahead of the decode kernel's loads that it prefetches in each stream. Default 2048: with 8 streams 16 KiB are in
    /// flight, more than latency times bandwidth of a core and less than half of L1.
    pub prefetch: usize,
    /// Steps of 32 k decoded at a time for the prefill kernel. Default 4: 128 k of 3 panels are 24 KiB of f32 (12 of pairs), half of a 48
    /// KiB L1, the rest is for rows of x; 2 where L1 is smaller.
    pub chunk_steps: usize,
    /// k that the prefill kernel takes through all panels of a task before it goes on. Default: so many that a block of rows of
    /// x, in f32, fills half of L2, at least one chunk. A scale tile is never cut.
    pub k_block: usize,
    /// Steps that the AMX kernel decodes at a time, rounded up to groups of 4; twice as many for up to 128 rows. Default 8: two panels
    /// are then 16 KiB of tiles. They must stay in the first-level cache (48 KiB on every CPU with AMX) while 32 rows of x after the other,
    /// as many bytes, and 4 KiB of their sums pass through it; with 12 they do not (docs/performance.md, section 6).
    pub tile_steps: usize,
    /// Bytes of sums that a task takes through all of k, and stores, before it goes on with other columns. Default: a quarter of L2,
    /// so that sums are stored from there; x of a block of k fills as much.
    pub sums: usize,
    /// The same where AMX multiplies many rows. Default: half of L2: x is read again from beyond L2 for each such set of columns, and 512
    /// columns of 512 rows need 5 GB/s of it a core, of the 12 that the third level gives.
    pub tile_sums: usize,
    /// Most rows of x at a time. Default 512: a decoded weight is used 512 times, so decoding costs below 1 %, and sums and rows
    /// of x still fit L2 in blocks.
    pub rows: usize,
    /// Most f32 of the tasks' scratch memory at a time. Default 2^22: 16 MiB bound the workspace when experts are many.
    pub scratch: usize,
    /// Tasks for each thread. Default 4: a slow core then holds up the rest by an eighth of the work, and a fork stays cheap.
    pub tasks: usize,
    /// Elements of x or y that a thread loads or stores at a time, at least a row. Default 65536: they take what a fork costs, 10
    /// to 30 us.
    pub store: usize,
    /// Multiply-adds below which the calling thread does not fork. Default 2^21: they take about 30 us, what
    /// a fork costs.
    pub fork: usize,
}

impl Blocking {
    /// For these caches.
    pub fn of(caches: Caches) -> Blocking {
        let rows = 512;
        let chunk_steps = if caches.l1 >= 48 << 10 { 4 } else { 2 };
        Blocking {
            streams: 8,
            prefetch: 2048,
            chunk_steps,
            k_block: (caches.l2 / 2 / (rows * size_of::<f32>())).max(chunk_steps * 32),
            tile_steps: 8,
            sums: caches.l2 / 4,
            tile_sums: caches.l2 / 2,
            rows,
            scratch: 1 << 22,
            tasks: 4,
            store: 1 << 16,
            fork: 1 << 21,
        }
    }

    /// Rows of so many elements that a thread loads or stores at a time.
    pub(crate) fn part(&self, rows: usize, elements: usize) -> usize {
        let parts = rows.saturating_mul(elements) / self.store.max(1);
        rows.div_ceil(parts.max(1)).max(1)
    }

    /// Every field at least 1 and within bounds.
    pub(crate) fn sane(self) -> Blocking {
        Blocking {
            streams: self.streams.clamp(1, MAX_STREAMS),
            prefetch: self.prefetch,
            chunk_steps: self.chunk_steps.clamp(1, MAX_CHUNK_STEPS),
            k_block: self.k_block.max(1),
            tile_steps: self.tile_steps.clamp(1, MAX_CHUNK_STEPS),
            sums: self.sums.max(1),
            tile_sums: self.tile_sums.max(1),
            rows: self.rows.clamp(1, MAX_ROWS),
            scratch: self.scratch.max(1),
            tasks: self.tasks.clamp(1, MAX_TASKS),
            store: self.store.min(MAX_STORE),
            fork: self.fork,
        }
    }
}

impl Default for Blocking {
    /// For this machine's caches.
    fn default() -> Self {
        Blocking::of(Caches::detect())
    }
}

/// What of a matmul a tier holds in registers. Fixed when the crate is compiled: loops are unrolled by it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Registers {
    /// Rows and panels of the prefill kernel's block of sums.
    pub(crate) block: (usize, usize),
    /// Whether the block is of both chains at once, not of one and then the other.
    pub(crate) both: bool,
    /// Most rows the decode kernel takes; 0 where it does not pay.
    pub(crate) decode_rows: usize,
    /// Panels the decode kernel takes side by side with 1 to 8 rows.
    pub(crate) decode_panels: [usize; 8],
    /// Sums that fit beside what they are made of.
    pub(crate) chains: usize,
}

/// Plain Rust: so little that a compiler keeps it in any CPU's registers; decoding for few rows costs as much as for many.
pub(crate) const PORTABLE: Registers =
    Registers { block: (2, 1), both: false, decode_rows: 0, decode_panels: [1; 8], chains: 1 };

/// A chain of a panel and a row is two registers: of 16 a block takes 12 for 6 rows, 2 for weights and one for x. Decoding leaves room for one
/// panel with more than one row; beyond 4 rows decoding once for many rows is faster.
pub(crate) const AVX2: Registers =
    Registers { block: (6, 1), both: false, decode_rows: 4, decode_panels: [2, 1, 1, 1, 1, 1, 1, 1], chains: 4 };

/// Of 32 registers a block takes 24 sums, 3 of weights and one of x. Decoding has 16 sums, as many as cover the latency of FMA twice;
/// values, x, the table and the sums of steps have the other half. Up to 16 rows decode again what was decoded for the first 8.
pub(crate) const AVX512: Registers =
    Registers { block: (8, 3), both: false, decode_rows: 16, decode_panels: [4, 2, 2, 2, 2, 2, 2, 2], chains: 16 };

/// Pairs of bf16: half as many products are over sooner, so a block keeps both chains in its 24 registers, and what is between two steps is
/// one load and one store of each sum (one chain after the other stores 24 sums more: 1.03 to 1.09 of the time on Zen 5, prefill). Decoding
/// needs more registers and fewer chains: two panels in step, one with four rows or more.
pub(crate) const AVX512_BF16: Registers =
    Registers { block: (4, 3), both: true, decode_panels: [2, 2, 2, 1, 1, 1, 1, 1], ..AVX512 };

// Plans are made before it is known whether a block of rows takes pairs.
const _: () = assert!(AVX512_BF16.block.1 == AVX512.block.1 && AVX512_BF16.decode_rows == AVX512.decode_rows);

/// Most panels walked in step where pairs of bf16 are multiplied, on AMD's CPUs: with 4 in place of 8, two of them decoded side by side, FP8
/// took 0.85 of the time with one row, bf16 0.85 with four, MXFP4 the same (Zen 5).
pub(crate) const PAIR_STREAMS: usize = 4;

/// Most rows that the decode kernel multiplies while their sums are in registers: with two chains and a panel they are 16.
pub(crate) const DECODE_ROWS_AT_ONCE: usize = 8;

/// Rows that the epilogue finishes in step: a panel's sums of 8 rows are 512 consecutive bytes, and 8 rows of y are written from left to
/// right, which hardware prefetchers still follow.
pub(crate) const EPILOGUE_ROWS: usize = 8;

/// Most blocks of rows in a batch of a mixture of experts: they are listed on the stack, and 64 give enough tasks for 64 threads.
pub(crate) const BATCH_BLOCKS: usize = 64;

/// Bytes of a source row between what is packed and what is prefetched: 16 rows are read in step, 16 KiB are in flight.
pub(crate) const PACK_AHEAD: usize = 1024;

/// AMX, up to 16 rows: runs between f32 scales in one call for a whole tile of rows, more for less. 8 runs of 4 panels are 32 KiB of sums,
/// which the first-level cache (48 KiB) holds beside the tiles until they are scaled and added.
pub(crate) const TILE_RUNS: usize = 8;

/// AMX, many rows: blocks of 32 rows up to which twice [`Blocking::tile_steps`] are decoded at a time: decoded weights are then used so
/// seldom that to begin costs more than to read them from L2.
pub(crate) const FEW_BLOCKS: usize = 4;

/// Bounds of what scratch memory is multiplied by.
const MAX_STREAMS: usize = 64;
const MAX_CHUNK_STEPS: usize = 64;
const MAX_ROWS: usize = 1 << 16;
/// Bounds of what counts are multiplied by.
const MAX_TASKS: usize = 1 << 16;
const MAX_STORE: usize = 1 << 40;
