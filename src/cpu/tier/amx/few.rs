//! Up to 16 rows of x against up to four panels: each step of each panel is decoded to a tile and multiplied at once.
//!
//! Memory's limit: panels are walked in step, each a stream of its own. A tile is stored and loaded again while the next is
//! decoded; two buffers take turns, so that neither waits for the other's loads.

use super::codes::{Coded, Constants, TileCode, fp8_tile, load_constants, mxfp4_tile, mxfp8_tile, nvfp4_tile};
use super::config::TileConfig;
use super::{Steps, TILE};
use crate::cpu::isa::AmxToken;
#[cfg(target_arch = "x86_64")]
use std::arch::asm;

/// Most panels in step: an accumulator each, which leaves a tile for x and two for w.
pub(crate) const PANELS: usize = 4;

/// Operands of [`FewRows::run`].
pub(crate) struct FewRows<'a> {
    pub(crate) coded: &'a Coded,
    pub(crate) steps: Steps,
    /// Packed bytes from the first group of the first panel on, and bytes from a panel to the next.
    pub(crate) data: &'a [u8],
    pub(crate) panel_bytes: usize,
    /// 1 to [`PANELS`].
    pub(crate) panels: usize,
    /// `[step][row][32]` bf16: as many steps as `steps` counts, `rows` rows, 1 to 16.
    pub(crate) x: &'a [u16],
    pub(crate) rows: usize,
    /// Groups after which sums are stored and begin anew.
    pub(crate) run: usize,
    /// Bytes ahead of the loads that are prefetched in each panel, and from where on in the panel `ahead_next` is taken.
    pub(crate) ahead: usize,
    pub(crate) ahead_until: usize,
    pub(crate) ahead_next: usize,
    /// `[run][panel][row]` of 16 sums.
    pub(crate) sums: &'a mut [[f32; 16]],
    /// Two buffers of [`PANELS`] tiles.
    pub(crate) tiles: &'a mut [[u8; TILE]; 2 * PANELS],
}

/// What the loop reads and counts in; fields are named by offset in the assembly.
#[repr(C, align(64))]
struct Args {
    config: TileConfig,
    /// 64: groups to go, groups of the run to go, groups of a run.
    groups: usize,
    run: usize,
    run_groups: usize,
    /// 88: the first group of the first panel, bytes of a group and of a panel.
    data: *const u8,
    group_bytes: usize,
    panel_bytes: usize,
    /// 112: bytes from a group to its codes, in the last group, and steps of the last group.
    area: usize,
    last_area: usize,
    last_steps: usize,
    /// 136: prefetch: distance, distance from `end` on, `end`.
    ahead: usize,
    ahead_next: usize,
    end: *const u8,
    /// 160: x, and bytes of a step of it.
    x: *const u16,
    x_step: usize,
    /// 176: sums, and bytes of a panel's.
    sums: *mut f32,
    panel_sums: usize,
    /// 192: the buffer in use and the other.
    tiles: *mut u8,
    other: *mut u8,
    /// 208: what decoding needs.
    constants: *const Constants,
}

const _: () = {
    use std::mem::offset_of;
    assert!(offset_of!(Args, groups) == 64 && offset_of!(Args, data) == 88 && offset_of!(Args, area) == 112);
    assert!(offset_of!(Args, ahead) == 136 && offset_of!(Args, x) == 160 && offset_of!(Args, sums) == 176);
    assert!(offset_of!(Args, tiles) == 192 && offset_of!(Args, constants) == 208);
};

impl FewRows<'_> {
    /// `sums = x . panels` for each run, in the canonical order, subnormals flushed.
    pub(crate) fn run(self, token: AmxToken) {
        let FewRows {
            coded: Coded { code, constants },
            steps,
            data,
            panel_bytes,
            panels,
            x,
            rows,
            run,
            sums,
            tiles,
            ..
        } = self;
        let groups = steps.groups();
        if groups == 0 {
            sums.fill([0.0; 16]);
            return;
        }
        // What the loop reads and writes, as slices: these stop the call if a caller counted wrong.
        assert!((1..=16).contains(&rows) && (1..=PANELS).contains(&panels) && run >= 1 && steps.fit(*code));
        let data = &data[..(panels - 1) * panel_bytes + steps.bytes()];
        let x = &x[..steps.count * rows * 32];
        let sums = &mut sums[..groups.div_ceil(run) * panels * rows];
        let r = rows as u8;
        let (first, second) = tiles.split_at_mut(PANELS);
        let mut args = Args {
            config: TileConfig::new([r, r, r, r, r, r, 16, 16]),
            groups,
            run,
            run_groups: run,
            data: data.as_ptr(),
            group_bytes: steps.group_bytes,
            panel_bytes,
            area: steps.area,
            last_area: steps.last_area,
            last_steps: steps.last_steps(),
            ahead: self.ahead,
            ahead_next: self.ahead_next,
            end: data.as_ptr().wrapping_add(self.ahead_until),
            x: x.as_ptr(),
            x_step: rows * 64,
            sums: sums.as_mut_ptr().cast(),
            panel_sums: rows * 64,
            tiles: first.as_mut_ptr().cast(),
            other: second.as_mut_ptr().cast(),
            constants,
        };
        let _: AmxToken = token;
        #[cfg(target_arch = "x86_64")]
        {
            let run: [unsafe fn(&mut Args); PANELS] = match code {
                TileCode::Mxfp4 => [mxfp4_1, mxfp4_2, mxfp4_3, mxfp4_4],
                TileCode::Nvfp4 => [nvfp4_1, nvfp4_2, nvfp4_3, nvfp4_4],
                TileCode::Fp8(_) => [fp8_1, fp8_2, fp8_3, fp8_4],
                TileCode::Mxfp8(_) => [mxfp8_1, mxfp8_2, mxfp8_3, mxfp8_4],
                TileCode::Bf16 => [bf16_1, bf16_2, bf16_3, bf16_4],
            };
            let run = run[panels - 1];
            // SAFETY: the token proves the features. `args` describes the slices above, which live until the call
            // has returned: the loop takes `groups` groups of 4 steps (the last one `last_steps`), reads of each panel and group the
            // scales at its start and the codes `area` bytes on, up to `steps.bytes()` bytes from the panel's start by the definition of
            // `Steps`, and per step `x_step` bytes of x; it stores `panels` tiles of `rows` x 64 bytes at the end of each of
            // `div_ceil(groups, run)` runs; tiles go to the two buffers of four.
            unsafe { run(&mut args) }
        }
    }
}

/// The loop. `$decode` makes the tile of a step of each panel, with rsi and rdi at its codes and scales and moved on by the panel's
/// bytes after each; `$multiply` loads x's tile rows into tmm4 beforehand and adds the products.
macro_rules! few_rows {
    ($name:ident, $step:literal, $scales:literal, $decode:expr, $multiply:expr, $store:expr, $zero:expr) => {
        /// # Safety
        /// The CPU has what `AmxToken` proves; `args` describes readable and writable memory as [`FewRows::run`] makes it.
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
        unsafe fn $name(args: &mut Args) {
            // SAFETY: by this function's contract. The block names every register it changes, leaves the stack alone, configures the
            // tiles itself and releases them at its end; tiles are zeroed or loaded before they are read. Prefetches fault nowhere.
            unsafe {
                asm!(
                    "ldtilecfg [r13]",
                    "mov rsi, [r13 + 208]",
                    load_constants!(),
                    "mov rax, [r13 + 64]",
                    "mov r8, [r13 + 88]",
                    "mov r14, [r13 + 104]",
                    "mov r12, [r13 + 160]",
                    "mov r11, [r13 + 192]",
                    "mov edx, 64",
                    $zero,
                    // A group.
                    "2:",
                    "mov ecx, 4",
                    "mov r9, [r13 + 112]",
                    "cmp rax, 1",
                    "cmove rcx, [r13 + 128]",
                    "cmove r9, [r13 + 120]",
                    "add r9, r8",
                    "mov r10, r8",
                    "mov r15, [r13 + 136]",
                    "lea rsi, [r8 + r15]",
                    "cmp rsi, [r13 + 152]",
                    "cmovae r15, [r13 + 144]",
                    // A step: r9 and r10 are at its codes and scales in the first panel.
                    "3:",
                    "tileloadd tmm4, [r12 + rdx * 1]",
                    "mov rsi, r9",
                    "mov rdi, r10",
                    $decode,
                    $multiply,
                    "add r12, [r13 + 168]",
                    concat!("add r9, ", $step),
                    concat!("add r10, ", $scales),
                    // The buffers change places.
                    "mov rsi, [r13 + 200]",
                    "mov [r13 + 200], r11",
                    "mov r11, rsi",
                    "dec rcx",
                    "jnz 3b",
                    "add r8, [r13 + 96]",
                    "dec rax",
                    "jz 4f",
                    "dec qword ptr [r13 + 72]",
                    "jnz 2b",
                    // The end of a run.
                    "4:",
                    "mov rsi, [r13 + 176]",
                    $store,
                    "mov [r13 + 176], rsi",
                    $zero,
                    "mov rsi, [r13 + 80]",
                    "mov [r13 + 72], rsi",
                    "test rax, rax",
                    "jnz 2b",
                    "tilerelease",
                    in("r13") args,
                    out("rax") _, out("rcx") _, out("rdx") _, out("rsi") _, out("rdi") _, out("r8") _, out("r9") _, out("r10") _,
                    out("r11") _, out("r12") _, out("r14") _, out("r15") _, out("k1") _, out("k2") _,
                    out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _, out("zmm20") _, out("zmm21") _,
                    out("zmm22") _, out("zmm23") _, out("zmm24") _, out("zmm25") _, out("zmm26") _, out("zmm27") _,
                    out("zmm28") _, out("zmm29") _, out("zmm30") _, out("zmm31") _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _,
                    out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

/// Asks for the lines that this stream reads `r15` bytes on, and goes to the next panel.
macro_rules! on {
    (4) => {
        r"
        .irp line, 0, 1, 2, 3
        prefetcht0 [rsi + r15 + 64 * \line]
        .endr
        prefetcht0 [rdi + r15]
        add rsi, r14
        add rdi, r14
        "
    };
    (8) => {
        r"
        .irp line, 0, 1, 2, 3, 4, 5, 6, 7
        prefetcht0 [rsi + r15 + 64 * \line]
        .endr
        prefetcht0 [rdi + r15]
        add rsi, r14
        add rdi, r14
        "
    };
}

/// Decodes the step of so many panels.
macro_rules! decoded {
    (1, $tile:ident, $lines:tt) => {
        concat!($tile!(0), on!($lines))
    };
    (2, $tile:ident, $lines:tt) => {
        concat!(decoded!(1, $tile, $lines), $tile!(1024), on!($lines))
    };
    (3, $tile:ident, $lines:tt) => {
        concat!(decoded!(2, $tile, $lines), $tile!(2048), on!($lines))
    };
    (4, $tile:ident, $lines:tt) => {
        concat!(decoded!(3, $tile, $lines), $tile!(3072), on!($lines))
    };
}

/// Their tiles, in turn in tmm6 and tmm7, times x.
macro_rules! products {
    (1) => {
        r"
        tileloadd tmm6, [r11 + rdx * 1]
        tdpbf16ps tmm0, tmm4, tmm6
        "
    };
    (2) => {
        concat!(products!(1), "tileloadd tmm7, [r11 + rdx * 1 + 1024]\ntdpbf16ps tmm1, tmm4, tmm7\n")
    };
    (3) => {
        concat!(products!(2), "tileloadd tmm6, [r11 + rdx * 1 + 2048]\ntdpbf16ps tmm2, tmm4, tmm6\n")
    };
    (4) => {
        concat!(products!(3), "tileloadd tmm7, [r11 + rdx * 1 + 3072]\ntdpbf16ps tmm3, tmm4, tmm7\n")
    };
}

/// Their accumulators, which `$panels` lists, stored.
macro_rules! stores {
    ($panels:literal) => {
        concat!(
            ".irp panel, ",
            $panels,
            r"
            tilestored [rsi + rdx * 1], tmm\panel
            add rsi, [r13 + 184]
            .endr
            "
        )
    };
}

/// The same, zeroed.
macro_rules! zeros {
    ($panels:literal) => {
        concat!(".irp panel, ", $panels, "\ntilezero tmm\\panel\n.endr\n")
    };
}

/// A loop for each number of panels.
macro_rules! decoding_rows {
    ($tile:ident, $lines:tt, $step:literal, $scales:literal, $one:ident, $two:ident, $three:ident, $four:ident) => {
        few_rows!($one, $step, $scales, decoded!(1, $tile, $lines), products!(1), stores!("0"), zeros!("0"));
        few_rows!($two, $step, $scales, decoded!(2, $tile, $lines), products!(2), stores!("0, 1"), zeros!("0, 1"));
        few_rows!(
            $three,
            $step,
            $scales,
            decoded!(3, $tile, $lines),
            products!(3),
            stores!("0, 1, 2"),
            zeros!("0, 1, 2")
        );
        few_rows!(
            $four,
            $step,
            $scales,
            decoded!(4, $tile, $lines),
            products!(4),
            stores!("0, 1, 2, 3"),
            zeros!("0, 1, 2, 3")
        );
    };
}

decoding_rows!(mxfp4_tile, 4, "256", "16", mxfp4_1, mxfp4_2, mxfp4_3, mxfp4_4);
decoding_rows!(nvfp4_tile, 4, "256", "32", nvfp4_1, nvfp4_2, nvfp4_3, nvfp4_4);
decoding_rows!(fp8_tile, 8, "512", "0", fp8_1, fp8_2, fp8_3, fp8_4);
decoding_rows!(mxfp8_tile, 8, "512", "16", mxfp8_1, mxfp8_2, mxfp8_3, mxfp8_4);

/// bf16 needs no decoding: tiles come from the packed lines, in turn into tmm6 and tmm7.
macro_rules! lines {
    ($sums:literal, $tile:literal) => {
        concat!(
            "tileloadd ",
            $tile,
            r", [rsi + rdx * 1]
            .irp line, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
            prefetcht0 [rsi + r15 + 64 * \line]
            .endr
            add rsi, r14
            tdpbf16ps ",
            $sums,
            ", tmm4, ",
            $tile,
            "\n"
        )
    };
}

/// So many panels.
macro_rules! all_lines {
    (1) => {
        lines!("tmm0", "tmm6")
    };
    (2) => {
        concat!(all_lines!(1), lines!("tmm1", "tmm7"))
    };
    (3) => {
        concat!(all_lines!(2), lines!("tmm2", "tmm6"))
    };
    (4) => {
        concat!(all_lines!(3), lines!("tmm3", "tmm7"))
    };
}

few_rows!(bf16_1, "1024", "0", all_lines!(1), "", stores!("0"), zeros!("0"));
few_rows!(bf16_2, "1024", "0", all_lines!(2), "", stores!("0, 1"), zeros!("0, 1"));
few_rows!(bf16_3, "1024", "0", all_lines!(3), "", stores!("0, 1, 2"), zeros!("0, 1, 2"));
few_rows!(bf16_4, "1024", "0", all_lines!(4), "", stores!("0, 1, 2, 3"), zeros!("0, 1, 2, 3"));
