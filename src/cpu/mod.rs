//! Machines: what this CPU has, its compiled tiers, threads, scratch memory. Primitives only; algorithms live elsewhere.

mod flush;
mod isa;
mod parallel;
mod tier;
mod workspace;

pub use isa::Isa;
pub use parallel::Parallelism;
pub use workspace::Workspace;

pub(crate) use flush::{Smallest, flush_free};
pub(crate) use parallel::for_each_zip;
pub(crate) use tier::portable::{Kernel, LANES, PanelDot, STEP, Tier, flush};

/// The CPU: the handle that runs kernels.
///
/// Cheap to copy. Serial until given threads with [`Cpu::with_parallelism`]; results do not depend on the number of threads.
#[derive(Debug, Clone, Copy)]
pub struct Cpu<'pool> {
    tier: Tier,
    parallelism: Parallelism<'pool>,
}

impl Cpu<'static> {
    /// The best tier this machine can run, serial.
    pub fn detect() -> Self {
        Cpu { tier: Tier::detect(), parallelism: Parallelism::Serial }
    }

    /// The tier compiled without any CPU feature beyond the target's baseline, serial. Same bits, slower: for tests.
    pub fn baseline() -> Self {
        Cpu { tier: Tier::baseline(), parallelism: Parallelism::Serial }
    }
}

impl<'pool> Cpu<'pool> {
    /// The same tier with these threads.
    pub fn with_parallelism<'p>(self, parallelism: Parallelism<'p>) -> Cpu<'p> {
        Cpu { tier: self.tier, parallelism }
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.tier.isa()
    }

    /// The threads in use.
    pub fn parallelism(&self) -> Parallelism<'pool> {
        self.parallelism
    }

    pub(crate) fn tier(&self) -> Tier {
        self.tier
    }
}
