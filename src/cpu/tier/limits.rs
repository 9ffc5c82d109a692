//! Loops that do nothing but use one resource of the machine: what [`crate::cpu::limits`] times.
#![allow(unsafe_code)] // calls of functions compiled for a detected target feature, CPUID, prefetch, AMX by inline assembly

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use crate::cpu::isa::AmxToken;
use std::hint::black_box;

/// What a read is made of: 256 bytes.
pub(crate) type Block = [u64; 32];

/// Reads all of `data` as `S` sequential streams in step, asking for each block `ahead` blocks early (0: not at all). The exclusive
/// or of all words, which shows that they were read.
pub(crate) fn read<const S: usize>(data: &[Block], ahead: usize) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: AVX2 was just detected.
        return unsafe { read_avx2::<S>(data, ahead) };
    }
    read_body::<S>(data, ahead)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn read_avx2<const S: usize>(data: &[Block], ahead: usize) -> u64 {
    read_body::<S>(data, ahead)
}

#[inline(always)]
fn read_body<const S: usize>(data: &[Block], ahead: usize) -> u64 {
    let mut sum = [0; 32];
    let stream = data.len() / S;
    for i in 0..stream {
        for s in 0..S {
            let block = &data[s * stream + i];
            if ahead > 0 {
                prefetch(block, ahead);
            }
            // One sum for each lane: nothing is carried from one to the other, so that the loads alone take time.
            sum.iter_mut().zip(block).for_each(|(sum, value)| *sum ^= value);
        }
    }
    for block in &data[S * stream..] {
        sum.iter_mut().zip(block).for_each(|(sum, value)| *sum ^= value);
    }
    sum.into_iter().fold(0, |all, sum| all ^ sum)
}

/// Asks for the block `ahead` blocks after this one.
#[inline(always)]
fn prefetch(block: &Block, ahead: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..size_of::<Block>() / 64 {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let address = std::ptr::from_ref(block).wrapping_add(ahead).cast::<i8>().wrapping_add(64 * line);
        // SAFETY: a prefetch is a hint for which every address is allowed, mapped or not; SSE is part of x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (block, ahead);
}

/// A loop of fused multiply-adds, or of products of pairs or tiles, that this machine was found to have. Only detection makes one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Loop {
    run: fn(usize) -> f32,
    /// Floating-point operations of a turn.
    pub(crate) flops: usize,
}

impl Loop {
    /// f32 by 256-bit registers.
    pub(crate) fn avx2() -> Result<Loop, &'static str> {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
            // SAFETY: AVX2 and FMA were just detected.
            return Ok(Loop { run: |turns| unsafe { fma_avx2(turns) }, flops: 12 * 8 * 2 });
        }
        Err("this CPU lacks AVX2 or FMA")
    }

    /// f32 by 512-bit registers.
    pub(crate) fn avx512() -> Result<Loop, &'static str> {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: AVX-512F was just detected.
            return Ok(Loop { run: |turns| unsafe { fma_avx512(turns) }, flops: 24 * 16 * 2 });
        }
        Err("this CPU lacks AVX-512F")
    }

    /// Pairs of bf16 by 512-bit registers.
    pub(crate) fn avx512_bf16() -> Result<Loop, &'static str> {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx512f") && std::arch::is_x86_feature_detected!("avx512bf16") {
            // SAFETY: AVX-512F and AVX-512 BF16 were just detected.
            return Ok(Loop { run: |turns| unsafe { pairs_avx512(turns) }, flops: 24 * 16 * 4 });
        }
        Err("this CPU lacks AVX-512 BF16")
    }

    /// bf16 by AMX tiles, registers only.
    pub(crate) fn amx() -> Result<Loop, &'static str> {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        return AmxToken::detect().map(|_| Loop { run: amx::products, flops: 4 * 16 * 16 * 32 * 2 });
        #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
        return Err("AMX is asked for on Linux on x86-64 only");
    }

    /// Turns the loop. The sum of all accumulators: each product is a half, in AMX tiles zero.
    pub(crate) fn run(self, turns: usize) -> f32 {
        (self.run)(turns)
    }
}

/// Twelve chains hide a latency of 4 (5 on older) cycles at two a cycle, and leave registers for the operands.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn fma_avx2(turns: usize) -> f32 {
    use std::arch::x86_64::{__m256, _mm256_fmadd_ps, _mm256_set1_ps, _mm256_setzero_ps};
    let (a, b) = (black_box(_mm256_set1_ps(1.0)), black_box(_mm256_set1_ps(0.5)));
    let mut chains = black_box([_mm256_setzero_ps(); 12]);
    for _ in 0..turns {
        chains.iter_mut().for_each(|c| *c = _mm256_fmadd_ps(a, b, *c));
    }
    chains.iter().map(|c| bytemuck::cast::<__m256, [f32; 8]>(*c).iter().sum::<f32>()).sum()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn fma_avx512(turns: usize) -> f32 {
    use std::arch::x86_64::{_mm512_fmadd_ps, _mm512_reduce_add_ps, _mm512_set1_ps, _mm512_setzero_ps};
    let (a, b) = (black_box(_mm512_set1_ps(1.0)), black_box(_mm512_set1_ps(0.5)));
    let mut chains = black_box([_mm512_setzero_ps(); 24]);
    for _ in 0..turns {
        chains.iter_mut().for_each(|c| *c = _mm512_fmadd_ps(a, b, *c));
    }
    chains.iter().map(|c| _mm512_reduce_add_ps(*c)).sum()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn pairs_avx512(turns: usize) -> f32 {
    use std::arch::x86_64::{
        _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps, _mm512_reduce_add_ps, _mm512_set1_ps, _mm512_setzero_ps,
    };
    let pairs = |x: f32| _mm512_cvtne2ps_pbh(black_box(_mm512_set1_ps(x)), _mm512_set1_ps(x));
    let (a, b) = (pairs(1.0), pairs(0.5));
    let mut chains = black_box([_mm512_setzero_ps(); 24]);
    for _ in 0..turns {
        chains.iter_mut().for_each(|c| *c = _mm512_dpbf16_ps(*c, a, b));
    }
    chains.iter().map(|c| _mm512_reduce_add_ps(*c)).sum()
}

/// AMX by inline assembly: its intrinsics are not stable.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx {
    use super::AmxToken;
    use std::arch::asm;

    /// What `ldtilecfg` reads: palette 1, eight tiles of 16 rows of 64 bytes (Intel SDM vol. 1, 18.2).
    #[repr(C, align(64))]
    struct TileConfig {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }

    static CONFIG: TileConfig = TileConfig {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
        rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
    };

    /// `turns` times four products into four accumulators, all in registers.
    pub(super) fn products(turns: usize) -> f32 {
        if turns == 0 || AmxToken::detect().is_err() {
            return 0.0;
        }
        // SAFETY: the CPU has AMX-BF16 and the process may use it, as the token proves. CONFIG is 64 bytes, aligned, valid for palette 1;
        // its eight tiles are zeroed before they are read; every product names three different tiles of 16 x 64 bytes. No other
        // memory is touched, the counter ends at zero, and tiles are released, so that no tile state leaves the block.
        unsafe {
            asm!(
                "ldtilecfg [{config}]",
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {turns}",
                "jnz 2b",
                "tilerelease",
                config = in(reg) &raw const CONFIG,
                turns = inout(reg) turns => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, readonly),
            );
        }
        0.0
    }
}

/// The name that the CPU gives itself, with its family and model, which a cloud's name does not tell.
#[allow(unused_unsafe)] // CPUID is safe in newer toolchains
pub(crate) fn cpu_name() -> String {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::__cpuid;
        // SAFETY: every x86-64 CPU has CPUID and leaf 0x80000000, which tells the highest extended leaf.
        let highest = unsafe { __cpuid(0x8000_0000) }.eax;
        // SAFETY: every x86-64 CPU has leaf 1.
        let version = unsafe { __cpuid(1) }.eax;
        let (mut family, mut model) = (version >> 8 & 15, version >> 4 & 15);
        if family == 6 || family == 15 {
            model |= version >> 12 & 0xF0;
        }
        if family == 15 {
            family += version >> 20 & 0xFF;
        }
        let mut name = vec![];
        for leaf in 0x8000_0002..=highest.min(0x8000_0004) {
            // SAFETY: the leaf is not above the highest.
            let r = unsafe { __cpuid(leaf) };
            [r.eax, r.ebx, r.ecx, r.edx].iter().for_each(|word| name.extend(word.to_le_bytes()));
        }
        let name: String = name.into_iter().map(char::from).filter(|c| (' '..='~').contains(c)).collect();
        let name = name.split_whitespace().collect::<Vec<_>>().join(" ");
        format!("{name} (family {family}, model {model})")
    }
    #[cfg(not(target_arch = "x86_64"))]
    format!("{} CPU", std::env::consts::ARCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_leaves_no_word_out() {
        for len in [0, 1, 15, 16, 17, 50] {
            // Word i is a number of its own in a hashed order, so that a word left out or read twice changes the answer.
            let word = |i: usize| (i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            let data: Vec<Block> = (0..len).map(|b| std::array::from_fn(|w| word(32 * b + w))).collect();
            let all = (0..32 * len).fold(0, |all, i| all ^ word(i));
            for ahead in [0, 1, 16, 64] {
                let found = [
                    read::<1>(&data, ahead),
                    read::<2>(&data, ahead),
                    read::<4>(&data, ahead),
                    read::<8>(&data, ahead),
                    read::<16>(&data, ahead),
                ];
                assert_eq!(found, [all; 5], "{len} blocks, {ahead} ahead");
            }
        }
    }

    #[test]
    fn a_loop_does_the_operations_that_it_counts() {
        for work in [Loop::avx2(), Loop::avx512(), Loop::avx512_bf16()].into_iter().flatten() {
            // A multiply-add is two operations and adds a half.
            for turns in [0, 1, 1000] {
                assert_eq!(work.run(turns), (work.flops * turns) as f32 / 4.0);
            }
        }
        for work in Loop::amx().into_iter() {
            assert_eq!((work.run(0), work.run(100)), (0.0, 0.0));
        }
    }
}
