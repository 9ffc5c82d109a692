//! What the machine has, as data, and the tokens that prove it.
#![forbid(unsafe_code)]

/// Instruction sets the tiers are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// The compilation target's baseline.
    Baseline,
    /// The portable code compiled with AVX2 and FMA.
    Fma,
}

/// Proof that this CPU has AVX2 and FMA: only detection makes one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FmaToken(());

impl FmaToken {
    /// Asks the CPU (and the operating system's saved state) once; std caches the answer.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn detect() -> Option<Self> {
        (std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma"))
            .then_some(FmaToken(()))
    }

    /// Other architectures: the baseline is all there is (on aarch64 it has fused multiply-add).
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn detect() -> Option<Self> {
        None
    }
}
