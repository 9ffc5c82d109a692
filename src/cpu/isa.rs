//! What the machine has, as data, and the tokens that prove it.
#![allow(unsafe_code)] // CPUID, nothing else

use super::knobs;
use crate::error::{Error, Result};
use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

/// Instruction sets the kernels are compiled for, each better than the one before. Bits of results are the same on all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// Plain Rust: any CPU. Compiled twice, for the target's baseline and with AVX2 and FMA where the CPU has them, because
    /// without the feature `f32::mul_add` is a library call some 20 times slower.
    Portable,
    /// x86-64 with AVX2, FMA and F16C: 256-bit registers.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL: 512-bit registers.
    Avx512,
    /// x86-64 with AMX tiles and BF16. No kernel is compiled for it yet, so no machine has it.
    Amx,
}

impl Isa {
    /// All of them, ascending.
    pub const ALL: [Isa; 4] = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Amx];

    /// Name, as `TRN_KERNELS_ISA` takes it.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Amx => "amx",
        }
    }

    /// Whether this machine runs kernels compiled for it. Does not look at `TRN_KERNELS_ISA`.
    pub fn available(self) -> bool {
        match self {
            Isa::Portable => true,
            Isa::Avx2 => Avx2Token::detect().is_some(),
            Isa::Avx512 => Avx512Token::detect().is_some(),
            Isa::Amx => false,
        }
    }

    /// The best that this machine runs.
    pub fn best() -> Isa {
        Isa::ALL.into_iter().rev().find(|isa| isa.available()).unwrap_or(Isa::Portable)
    }

    /// What is missing, in words; `None` if it is available.
    pub(crate) fn missing(self) -> Option<&'static str> {
        (!self.available()).then_some(match self {
            Isa::Portable => "nothing",
            Isa::Avx2 => "this CPU lacks AVX2, FMA or F16C",
            Isa::Avx512 => "this CPU lacks AVX-512 F, BW, DQ or VL",
            Isa::Amx => "no kernel of this crate is compiled for it yet",
        })
    }

    /// The tier that `TRN_KERNELS_ISA` asks for, `None` if it is not set.
    ///
    /// # Errors
    /// [`Error::Value`] if it names no tier; [`Error::Unsupported`] if this host lacks the tier.
    pub fn from_env() -> Result<Option<Isa>> {
        static ASKED: OnceLock<Result<Option<Isa>>> = OnceLock::new();
        ASKED.get_or_init(|| knobs::env(knobs::ISA).map(|name| Isa::from_str(&name)?.needed()).transpose()).clone()
    }

    /// This tier, if the host has it.
    pub(crate) fn needed(self) -> Result<Isa> {
        match self.missing() {
            None => Ok(self),
            Some(because) => Err(Error::Unsupported { what: format!("tier {self}"), because: because.into() }),
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Isa {
    type Err = Error;

    /// The tier of this name, in any case.
    fn from_str(name: &str) -> Result<Isa> {
        Isa::ALL.into_iter().find(|isa| name.trim().eq_ignore_ascii_case(isa.name())).ok_or_else(|| Error::Value {
            operand: knobs::ISA.into(),
            at: 0,
            got: name.chars().take(32).collect(),
            needed: "portable, avx2, avx512 or amx",
        })
    }
}

/// Asks the CPU (and the operating system's saved state) for features; std caches the answer. Never on other architectures.
macro_rules! detected {
    ($($feature:tt),+) => {{
        #[cfg(target_arch = "x86_64")]
        { $(std::arch::is_x86_feature_detected!($feature))&&+ }
        #[cfg(not(target_arch = "x86_64"))]
        { false }
    }};
}

/// Proof that this CPU has AVX2, FMA and F16C: only detection makes one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx2Token(());

impl Avx2Token {
    pub(crate) fn detect() -> Option<Self> {
        detected!("avx2", "fma", "f16c").then_some(Avx2Token(()))
    }
}

/// Proof that this CPU has AVX-512 F, BW, DQ and VL, and what [`Avx2Token`] proves: only detection makes one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Avx512Token(());

impl Avx512Token {
    pub(crate) fn detect() -> Option<Self> {
        detected!("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl").then_some(Avx512Token(()))
    }
}

/// Data caches of one core, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caches {
    /// First level, data.
    pub l1: usize,
    /// Second level.
    pub l2: usize,
}

impl Caches {
    /// Where the CPU does not tell: the smallest of the last ten years.
    pub const FALLBACK: Caches = Caches { l1: 32 << 10, l2: 256 << 10 };

    /// As CPUID tells (leaf 4 on Intel, 0x8000001D on AMD: the same fields), [`Caches::FALLBACK`] for what it does not.
    pub fn detect() -> Caches {
        static CACHES: OnceLock<Caches> = OnceLock::new();
        *CACHES.get_or_init(|| Caches {
            l1: level(1).unwrap_or(Caches::FALLBACK.l1),
            l2: level(2).unwrap_or(Caches::FALLBACK.l2),
        })
    }
}

/// Size of the data or unified cache of a level, if it is told and believable.
#[cfg(target_arch = "x86_64")]
#[allow(unused_unsafe)] // safe in newer toolchains
fn level(level: u32) -> Option<usize> {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    // SAFETY: every x86-64 CPU has CPUID; leaf 0 and leaf 0x80000000 tell which others there are.
    let (highest, extended) = unsafe { (__cpuid(0).eax, __cpuid(0x8000_0000).eax) };
    [(0x8000_001D, extended), (4, highest)].into_iter().filter(|(leaf, last)| leaf <= last).find_map(|(leaf, _)| {
        (0..8).find_map(|index| {
            // SAFETY: the leaf was just seen to exist; any sub-leaf may be asked for.
            let r = unsafe { __cpuid_count(leaf, index) };
            // Type 1 is data, 3 unified (Intel SDM vol. 2A, CPUID leaf 4).
            let wanted = matches!(r.eax & 31, 1 | 3) && r.eax >> 5 & 7 == level;
            let (ways, partitions, line) = ((r.ebx >> 22) + 1, (r.ebx >> 12 & 0x3FF) + 1, (r.ebx & 0xFFF) + 1);
            let bytes = [ways, partitions, line].iter().try_fold(r.ecx as usize + 1, |n, f| n.checked_mul(*f as usize));
            bytes.filter(|bytes| wanted && (4 << 10..=256 << 20).contains(bytes))
        })
    })
}

#[cfg(not(target_arch = "x86_64"))]
fn level(_: u32) -> Option<usize> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for isa in Isa::ALL {
            assert_eq!(isa.to_string().parse(), Ok(isa));
        }
        assert_eq!(" AVX2 ".parse(), Ok(Isa::Avx2));
        let e = "sse9".parse::<Isa>().unwrap_err().to_string();
        assert_eq!(e, "TRN_KERNELS_ISA[0]: got sse9, needed portable, avx2, avx512 or amx");
        assert!(Isa::Portable.available() && Isa::best().available());
        assert!(Isa::Amx.needed().is_err());
    }

    #[test]
    fn caches_are_believable() {
        let caches = Caches::detect();
        assert!(caches.l1 >= 4 << 10 && caches.l2 >= caches.l1, "{caches:?}");
    }
}
