//! Machines: what this CPU has, its compiled tiers, threads, scratch memory. Primitives only; algorithms live elsewhere.

mod dot;
mod flush;
mod handout;
mod isa;
pub mod knobs;
#[cfg(feature = "limits")]
pub mod limits;
mod parallel;
mod simd;
mod tier;
mod workspace;

pub use isa::{Caches, Isa, assume_amx};
pub use knobs::Blocking;
pub use parallel::Parallelism;
pub use workspace::Workspace;

pub(crate) use dot::{PanelDot, flushed};
pub(crate) use flush::{Range, Smallest, flush, flush_free};
pub(crate) use handout::Handout;
pub(crate) use isa::{AmxToken, Bf16Token};
pub(crate) use parallel::{for_each, for_each_zip};
pub(crate) use simd::{FP4_HEADROOM, Fp8Bits, LANES, LINE, Pairs, STEP, Simd};
pub(crate) use tier::{Kernel, PairKernel, Tier, amx};
pub(crate) use workspace::{Lines, Scratch};

use crate::error::Result;

/// The CPU: the handle that runs kernels.
///
/// Cheap to copy. Serial until given threads with [`Cpu::with_parallelism`]; results do not depend on the number of threads, on
/// the tier, or on how loops are cut.
#[derive(Debug, Clone, Copy)]
pub struct Cpu<'pool> {
    tier: Tier,
    parallelism: Parallelism<'pool>,
    blocking: Blocking,
}

impl Cpu<'static> {
    /// The best tier this machine can run, or the one that `TRN_KERNELS_ISA` names, serial.
    ///
    /// If the variable names no tier or one that the host lacks it is as if it were not set: results are the same on all. Programs
    /// that want to hear of it call [`Cpu::try_detect`].
    pub fn detect() -> Self {
        // The variable first: under a lower cap AMX is not even asked for.
        match Isa::from_env().map(|isa| isa.map(Cpu::with_isa)) {
            Ok(Some(Ok(cpu))) => cpu,
            _ => Cpu::of(Tier::of(Isa::best()).unwrap_or(Tier::Baseline)),
        }
    }

    /// As [`Cpu::detect`], with the refusals of `TRN_KERNELS_ISA`.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) if the variable names no tier; [`Error::Unsupported`](crate::Error::Unsupported) if
    /// the host lacks the tier.
    pub fn try_detect() -> Result<Self> {
        Isa::from_env()?.map_or_else(|| Cpu::with_isa(Isa::best()), Cpu::with_isa)
    }

    /// This tier, serial, whatever `TRN_KERNELS_ISA` says.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) if the host lacks the tier.
    pub fn with_isa(isa: Isa) -> Result<Self> {
        Ok(Cpu::of(Tier::of(isa.needed()?).unwrap_or(Tier::Baseline)))
    }

    /// The tier compiled without any CPU feature beyond the target's baseline, serial. Same bits, slower: for tests.
    pub fn baseline() -> Self {
        Cpu::of(Tier::Baseline)
    }

    fn of(tier: Tier) -> Self {
        Cpu { tier, parallelism: Parallelism::Serial, blocking: Blocking::default() }
    }
}

impl<'pool> Cpu<'pool> {
    /// The same tier with these threads.
    pub fn with_parallelism<'p>(self, parallelism: Parallelism<'p>) -> Cpu<'p> {
        Cpu { tier: self.tier, parallelism, blocking: self.blocking }
    }

    /// The same with loops cut another way: for tuning, and for tests that cross every edge with small matrices.
    pub fn with_blocking(self, blocking: Blocking) -> Self {
        Cpu { blocking: blocking.sane(), ..self }
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.tier.isa()
    }

    /// The threads in use.
    pub fn parallelism(&self) -> Parallelism<'pool> {
        self.parallelism
    }

    /// How loops are cut.
    pub fn blocking(&self) -> Blocking {
        self.blocking
    }

    /// The same, but serial if so many multiply-adds are too few for a fork.
    pub(crate) fn for_work(self, multiply_adds: usize) -> Self {
        if multiply_adds < self.blocking.fork { Cpu { parallelism: Parallelism::Serial, ..self } } else { self }
    }

    pub(crate) fn tier(&self) -> Tier {
        self.tier
    }
}
