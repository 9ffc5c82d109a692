//! What the machine has, as data, and the tokens that prove it.
#![allow(unsafe_code)] // CPUID, XGETBV, one system call, and the promise of a test that it stands in for AMX

use super::knobs;
use super::tier::pairs_in_order;
use crate::error::{Error, Result};
use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

/// Instruction sets the kernels are compiled for, each with more than the one before. Bits of results are the same on all.
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
    /// x86-64 with AVX-512 BF16 and VBMI beside. Matmul of operands that bf16 holds multiplies them in pairs, two multiply-adds a lane and
    /// instruction (docs/numerics.md, section 2), everything else takes what [`Isa::Avx512`] takes. Taken unasked on AMD's CPUs alone: on an
    /// Intel CPU with AMX the instruction was slower than FMA.
    Avx512Bf16,
    /// x86-64 with AMX tiles and BF16, AVX-512 VBMI and VBMI2 beside, on Linux, which must grant the tiles to the process: asked once. Matmul
    /// of operands that bf16 holds takes tiles, everything else what [`Isa::Avx512`] takes.
    Amx,
}

impl Isa {
    /// All of them, ascending.
    pub const ALL: [Isa; 5] = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16, Isa::Amx];

    /// Name, as `TRN_KERNELS_ISA` takes it.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512bf16",
            Isa::Amx => "amx",
        }
    }

    /// Whether this machine runs kernels compiled for it. Does not look at `TRN_KERNELS_ISA`.
    pub fn available(self) -> bool {
        match self {
            Isa::Portable => true,
            Isa::Avx2 => Avx2Token::detect().is_some(),
            Isa::Avx512 => Avx512Token::detect().is_some(),
            Isa::Avx512Bf16 => Bf16Token::detect().is_ok(),
            Isa::Amx => AmxToken::detect().is_ok(),
        }
    }

    /// The fastest that this machine itself runs.
    pub fn best() -> Isa {
        let own =
            |isa: &Isa| isa.declined().is_none() && isa.available() && (*isa != Isa::Amx || tiles_granted().is_ok());
        Isa::ALL.into_iter().rev().find(own).unwrap_or(Isa::Portable)
    }

    /// Why [`Isa::best`] does not take it although it is available.
    pub(crate) fn declined(self) -> Option<&'static str> {
        // An Intel CPU with AMX: 0.16 TFLOP/s by VDPBF16PS, 0.27 by FMA as measured with probes. Zen 5: twice FMA (docs/performance.md).
        (self == Isa::Avx512Bf16 && !amd()).then_some("on CPUs that are not AMD's its products may be slower than FMA")
    }

    /// What is missing, in words; `None` if it is available.
    pub(crate) fn missing(self) -> Option<&'static str> {
        match self {
            Isa::Amx => AmxToken::detect().err(),
            Isa::Avx512Bf16 => Bf16Token::detect().err(),
            _ if self.available() => None,
            Isa::Avx2 => Some("this CPU lacks AVX2, FMA or F16C"),
            _ => Some("this CPU lacks AVX-512 F, BW, DQ or VL"),
        }
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
            needed: "portable, avx2, avx512, avx512bf16 or amx",
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

/// Proof that this CPU has AVX-512 BF16, whose product of pairs sums in the order that docs/numerics.md needs, and VBMI, and what
/// [`Avx512Token`] proves.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bf16Token(Avx512Token);

impl Bf16Token {
    /// What AVX-512 proves.
    pub(crate) fn avx512(self) -> Avx512Token {
        self.0
    }

    /// The token, or what is missing.
    pub(crate) fn detect() -> Result<Self, &'static str> {
        static FOUND: OnceLock<Result<Bf16Token, &str>> = OnceLock::new();
        *FOUND.get_or_init(|| {
            let avx512 = Avx512Token::detect().ok_or("this CPU lacks AVX-512 F, BW, DQ or VL")?;
            if !detected!("avx512bf16", "avx512vbmi") {
                return Err("this CPU lacks AVX-512 BF16 or VBMI");
            }
            let token = Bf16Token(avx512);
            if pairs_in_order(token) { Ok(token) } else { Err("this CPU's VDPBF16PS sums in another order") }
        })
    }
}

/// Proof that this process may use AMX tiles with BF16, and that the CPU has AVX-512 VBMI and VBMI2 and what [`Avx512Token`] proves.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AmxToken(Avx512Token);

/// Whether a test has promised to stand in for AMX.
static ASSUMED: AtomicBool = AtomicBool::new(false);

/// Makes [`Isa::Amx`] available on a machine that has AVX-512 VBMI and VBMI2 but no AMX: for tests that execute its instructions
/// themselves, in a handler of SIGILL. Detection never chooses what is assumed. Not covered by semantic versioning.
///
/// # Safety
/// From now on until the process ends, on every thread, LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TILERELEASE and TDPBF16PS do
/// what the Intel SDM says, whoever does it.
#[doc(hidden)]
pub unsafe fn assume_amx() {
    ASSUMED.store(true, SeqCst);
}

impl AmxToken {
    /// What AVX-512 proves.
    pub(crate) fn avx512(self) -> Avx512Token {
        self.0
    }

    /// The token, or what is missing.
    pub(crate) fn detect() -> Result<Self, &'static str> {
        let avx512 = Avx512Token::detect().ok_or("this CPU lacks AVX-512 F, BW, DQ or VL")?;
        if !detected!("avx512vbmi", "avx512vbmi2") {
            return Err("this CPU lacks AVX-512 VBMI or VBMI2");
        }
        if !ASSUMED.load(SeqCst) {
            tiles_granted()?;
        }
        Ok(AmxToken(avx512))
    }
}

/// [`ask_for_tiles`], once in a process.
fn tiles_granted() -> Result<(), &'static str> {
    static ASKED: OnceLock<Result<(), &str>> = OnceLock::new();
    *ASKED.get_or_init(ask_for_tiles)
}

/// Asks the CPU for AMX-BF16 and the operating system for leave to use it.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[allow(unused_unsafe)] // CPUID is safe in newer toolchains
fn ask_for_tiles() -> Result<(), &'static str> {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    // SAFETY: every x86-64 CPU has CPUID; leaf 0 tells the highest.
    let highest = unsafe { __cpuid(0) }.eax;
    if highest < 7 {
        return Err("this CPU lacks AMX-BF16");
    }
    // SAFETY: leaf 7 was just seen to exist.
    let features = unsafe { __cpuid_count(7, 0) }.edx;
    let (bf16, tile) = (1 << 22, 1 << 24);
    if features & bf16 == 0 || features & tile == 0 {
        return Err("this CPU lacks AMX-BF16");
    }
    // SAFETY: as for leaf 0.
    let osxsave = unsafe { __cpuid(1) }.ecx & 1 << 27 != 0;
    let mut saved = 0u32;
    if osxsave {
        // SAFETY: with OSXSAVE, XGETBV of register 0 is allowed; it writes eax and edx alone.
        unsafe {
            std::arch::asm!("xgetbv", in("ecx") 0, out("eax") saved, out("edx") _, options(nomem, nostack, preserves_flags));
        }
    }
    // TILECFG and TILEDATA, bits 17 and 18 of XCR0 (Intel SDM vol. 1, 13.3).
    if saved & 0x6_0000 != 0x6_0000 {
        return Err("the operating system does not save AMX tiles");
    }
    // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), for the whole process: 0, or a negative errno.
    const ARCH_PRCTL: isize = 158;
    let answer: isize;
    // SAFETY: the call takes two numbers and touches no memory of ours; syscall itself clobbers rcx and r11.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => answer,
            in("rdi") 0x1023,
            in("rsi") 18,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    // Errors of Linux's x86 uapi: EPERM and ENOSYS come of filters, ENOSPC of a thread whose signal stack would not hold the tiles.
    match answer {
        0 => Ok(()),
        -28 => Err(
            "the alternate signal stack of a thread of this process is too small for AMX tiles (arch_prctl: ENOSPC)",
        ),
        -1 | -38 => Err("a filter of system calls refuses this process AMX tiles (arch_prctl: EPERM or ENOSYS)"),
        _ => Err("the kernel refuses this process AMX tiles (arch_prctl)"),
    }
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn ask_for_tiles() -> Result<(), &'static str> {
    Err("AMX is asked for on Linux on x86-64 only")
}

/// Whether the CPU calls itself one of AMD's.
#[cfg(target_arch = "x86_64")]
#[allow(unused_unsafe)] // CPUID is safe in newer toolchains
fn amd() -> bool {
    // SAFETY: every x86-64 CPU has CPUID and leaf 0.
    let vendor = unsafe { std::arch::x86_64::__cpuid(0) };
    [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).as_flattened() == b"AuthenticAMD"
}

#[cfg(not(target_arch = "x86_64"))]
fn amd() -> bool {
    false
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
    // SAFETY: every x86-64 CPU has CPUID; leaf 0 tells the highest.
    let highest = unsafe { __cpuid(0) }.eax;
    // SAFETY: as above; leaf 0x80000000 tells the highest of its kind.
    let extended = unsafe { __cpuid(0x8000_0000) }.eax;
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
        assert_eq!(e, "TRN_KERNELS_ISA[0]: got sse9, needed portable, avx2, avx512, avx512bf16 or amx");
        assert!(Isa::Portable.available() && Isa::best().available());
        assert_eq!(Isa::Amx.needed().is_ok(), Isa::Amx.available());
    }

    #[test]
    fn caches_are_believable() {
        let caches = Caches::detect();
        assert!(caches.l1 >= 4 << 10 && caches.l2 >= caches.l1, "{caches:?}");
    }
}
