//! Many rows of x: some steps of two panels are decoded to tiles once, in the first-level cache, and meet all rows, 32 at a time.

use super::codes::{Coded, Constants, TileCode, fp8_tile, load_constants, mxfp4_tile, mxfp8_tile, nvfp4_tile};
use super::config::TileConfig;
use super::{Steps, TILE};
use crate::cpu::isa::AmxToken;
#[cfg(target_arch = "x86_64")]
use std::arch::asm;
use std::mem::MaybeUninit;

/// Decodes steps of a panel to tiles.
pub(crate) struct Decoded<'a> {
    pub(crate) coded: &'a Coded,
    pub(crate) steps: Steps,
    /// Packed bytes of the panel from the first group on.
    pub(crate) data: &'a [u8],
    /// Bytes ahead of the loads that are prefetched.
    pub(crate) ahead: usize,
    /// A tile for each step.
    pub(crate) tiles: &'a mut [[u8; TILE]],
}

/// What the decoding loop reads; fields are named by offset in the assembly.
#[repr(C)]
struct DecodeArgs {
    /// 0: groups, the first one, bytes of one.
    groups: usize,
    data: *const u8,
    group_bytes: usize,
    /// 24: bytes from a group to its codes, in the last group, and steps of the last group.
    area: usize,
    last_area: usize,
    last_steps: usize,
    /// 48: tiles, constants, prefetch distance.
    tiles: *mut u8,
    constants: *const Constants,
    ahead: usize,
}

impl Decoded<'_> {
    /// Writes the tiles. bf16 has none: its packed lines are tiles.
    pub(crate) fn run(self, token: AmxToken) {
        let Decoded { coded: Coded { code, constants }, steps, data, ahead, tiles } = self;
        if steps.count == 0 {
            return;
        }
        assert!(steps.fit(*code));
        let data = &data[..steps.bytes()];
        let tiles = &mut tiles[..steps.count];
        let args = DecodeArgs {
            groups: steps.groups(),
            data: data.as_ptr(),
            group_bytes: steps.group_bytes,
            area: steps.area,
            last_area: steps.last_area,
            last_steps: steps.last_steps(),
            tiles: tiles.as_mut_ptr().cast(),
            constants,
            ahead,
        };
        let _: AmxToken = token;
        #[cfg(target_arch = "x86_64")]
        {
            let run: unsafe fn(&DecodeArgs) = match code {
                TileCode::Mxfp4 => decode_mxfp4,
                TileCode::Nvfp4 => decode_nvfp4,
                TileCode::Fp8(_) => decode_fp8,
                TileCode::Mxfp8(_) => decode_mxfp8,
                TileCode::Bf16 => return,
            };
            // SAFETY: the token proves the features; `args` describes the slices above: the loop reads scales and
            // codes up to `steps.bytes()` bytes from `data` and writes one tile for each of `count` steps.
            unsafe { run(&args) }
        }
    }
}

macro_rules! decode {
    ($name:ident, $step:literal, $scales:literal, $tile:ident) => {
        /// # Safety
        /// The CPU has what `AmxToken` proves; `args` describes readable and writable memory as [`Decoded::run`] makes it.
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
        unsafe fn $name(args: &DecodeArgs) {
            // SAFETY: by this function's contract. The block names every register it changes and leaves the stack alone. Prefetches
            // fault nowhere.
            unsafe {
                asm!(
                    "mov rsi, [r13 + 56]",
                    load_constants!(),
                    "mov rax, [r13]",
                    "mov r8, [r13 + 8]",
                    "mov r11, [r13 + 48]",
                    "mov r15, [r13 + 64]",
                    "2:",
                    "mov ecx, 4",
                    "mov rsi, [r13 + 24]",
                    "cmp rax, 1",
                    "cmove rcx, [r13 + 40]",
                    "cmove rsi, [r13 + 32]",
                    "add rsi, r8",
                    "mov rdi, r8",
                    "3:",
                    $tile!(0),
                    ".irp line, 0, 1, 2, 3, 4, 5, 6, 7",
                    concat!(r".if 64 * \line < ", $step),
                    r"prefetcht0 [rsi + r15 + 64 * \line]",
                    ".endif",
                    ".endr",
                    concat!("add rsi, ", $step),
                    concat!("add rdi, ", $scales),
                    "add r11, 1024",
                    "dec rcx",
                    "jnz 3b",
                    "add r8, [r13 + 16]",
                    "dec rax",
                    "jnz 2b",
                    in("r13") args,
                    out("rax") _, out("rcx") _, out("rsi") _, out("rdi") _, out("r8") _, out("r11") _, out("r15") _,
                    out("k1") _, out("k2") _,
                    out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _, out("zmm20") _, out("zmm21") _,
                    out("zmm22") _, out("zmm23") _, out("zmm24") _, out("zmm25") _, out("zmm26") _, out("zmm27") _,
                    out("zmm28") _, out("zmm29") _, out("zmm30") _, out("zmm31") _,
                    options(nostack),
                );
            }
        }
    };
}

decode!(decode_mxfp4, "256", "16", mxfp4_tile);
decode!(decode_nvfp4, "256", "32", nvfp4_tile);
decode!(decode_fp8, "512", "0", fp8_tile);
decode!(decode_mxfp8, "512", "16", mxfp8_tile);

/// f32 scales that change along k: sums between them are apart, and join by `sum = fma(part, of_row * of_panel, sum)`.
#[derive(Clone, Copy)]
pub(crate) struct Scaled<'a> {
    /// Steps between scales; divides the steps of the call.
    pub(crate) run: usize,
    /// `[run][rows]`.
    pub(crate) of_rows: &'a [f32],
    /// `[run][panel]` of 16 lanes, always for two panels.
    pub(crate) of_panels: &'a [[[f32; 16]; 2]],
}

/// Operands of [`ManyRows::run`].
pub(crate) struct ManyRows<'a> {
    /// Steps multiplied.
    pub(crate) steps: usize,
    /// Tiles of w: panel p's step s is the 1024 bytes from `p * panel_stride + 1024 s` on.
    pub(crate) w: &'a [u8],
    pub(crate) panel_stride: usize,
    /// 1 or 2.
    pub(crate) panels: usize,
    /// x in tiles of 16 rows, the last one perhaps shorter: `[tile][pitch][row][32]` bf16, and the first step.
    pub(crate) x: &'a [u16],
    pub(crate) pitch: usize,
    pub(crate) first_step: usize,
    pub(crate) rows: usize,
    pub(crate) scaled: Option<Scaled<'a>>,
    /// Packed bytes that are decoded next, in two panels `next_panel` bytes apart: asked for into L2 while products are under way.
    pub(crate) next: &'a [u8],
    pub(crate) next_panel: usize,
    pub(crate) next_bytes: usize,
    /// Bytes from a step of x to a line of what is multiplied after all panels have met these steps: asked for into L2, and the line
    /// half a tile further, for each tile of rows. 0 asks for what is there.
    pub(crate) x_ahead: usize,
    /// Whether sums begin at zero, whatever they hold; not with scales.
    pub(crate) fresh: bool,
    /// `[panel][row]` of 16 sums, `rows` rows each: what is added to.
    pub(crate) sums: &'a mut [[f32; 16]],
}

/// What the loop reads and counts in; fields are named by offset in the assembly.
#[repr(C, align(64))]
struct Args {
    config: TileConfig,
    /// 64: blocks of rows, runs, steps of a run.
    blocks: usize,
    runs: usize,
    steps: usize,
    /// 88: x of the first tile of rows, from there to the second; bytes of a step in the first and in the second; from a block to the
    /// next.
    x: *const u16,
    x_second: usize,
    x_step: [usize; 2],
    x_block: usize,
    /// 128: w and bytes from a panel to the next.
    w: *const u8,
    w_panel: usize,
    /// 144: sums, and bytes from a panel's to the next.
    sums: *mut f32,
    sums_panel: usize,
    /// 160: scales of rows, bytes from a run's to the next; scales of panels.
    of_rows: *const f32,
    of_rows_run: usize,
    of_panels: *const f32,
    /// 184: room for the sums of a run, `[tile of rows][panel]`, twice.
    parts: *mut u8,
    /// 192: rows of the first and of the second tile.
    rows: [usize; 2],
    /// 208: the two addresses of parts, added: what one is taken from to get the other.
    both_parts: usize,
    /// 216: kept by the loop while registers are few: x, w, scales of panels, whether sums wait to be scaled.
    kept: [usize; 5],
    /// 256: what to prefetch, how far on for the next time, and bytes to the other panel.
    next: *const u8,
    next_step: usize,
    next_panel: usize,
    /// 280: bytes from x to what is asked for of it.
    x_ahead: usize,
    /// 288: runs of a block whose sums are not added yet, and whether sums begin at zero.
    to_add: usize,
    fresh: usize,
}

const _: () = {
    use std::mem::offset_of;
    assert!(offset_of!(DecodeArgs, ahead) == 64 && offset_of!(DecodeArgs, area) == 24);
    assert!(offset_of!(Args, blocks) == 64 && offset_of!(Args, x) == 88 && offset_of!(Args, x_step) == 104);
    assert!(offset_of!(Args, w) == 128 && offset_of!(Args, sums) == 144 && offset_of!(Args, of_rows) == 160);
    assert!(offset_of!(Args, parts) == 184 && offset_of!(Args, both_parts) == 208 && offset_of!(Args, kept) == 216);
    assert!(offset_of!(Args, next) == 256 && offset_of!(Args, x_ahead) == 280 && offset_of!(Args, to_add) == 288);
    assert!(offset_of!(Args, fresh) == 296);
};

/// Sums of two runs of a block: written by the loops with scales before they are read.
#[repr(C, align(64))]
struct Parts([[u8; TILE]; 8]);

impl ManyRows<'_> {
    /// `sums += x . panels`, in the canonical order, subnormals flushed.
    pub(crate) fn run(self, token: AmxToken) {
        let ManyRows {
            steps,
            w,
            panel_stride,
            panels,
            x,
            pitch,
            first_step,
            rows,
            scaled,
            next,
            next_panel,
            next_bytes,
            x_ahead,
            fresh,
            sums,
        } = self;
        if steps == 0 || rows == 0 {
            return;
        }
        // What the loop reads and writes, as slices: these stop the call if a caller counted wrong.
        assert!((1..=2).contains(&panels) && !(fresh && scaled.is_some()) && first_step + steps <= pitch);
        let w = &w[..(panels - 1) * panel_stride + steps * TILE];
        let x = &x[..rows * pitch * 32];
        let sums = &mut sums[..panels * rows];
        let run = scaled.map_or(steps, |s| s.run);
        assert!(run >= 1 && steps % run == 0);
        let runs = steps / run;
        if let Some(s) = &scaled {
            assert!(s.of_rows.len() >= runs * rows && s.of_panels.len() >= runs);
        }
        let mut parts = MaybeUninit::<Parts>::uninit();
        let parts = parts.as_mut_ptr().cast::<u8>();
        let sums = sums.as_mut_ptr();
        let mut first = 0;
        while first < rows {
            // Whole blocks of 32 rows, then what is left.
            let (blocks, of) = match rows - first {
                left @ 32.. => (left / 32, [16, 16]),
                left => (1, [left.min(16), left.saturating_sub(16)]),
            };
            let tile_of_x = |row: usize| x.as_ptr().wrapping_add(row * pitch * 32);
            let step_of_x = |h: usize| first_step * h * 32;
            let x0 = tile_of_x(first).wrapping_add(step_of_x(of[0]));
            let x1 = tile_of_x(first + 16).wrapping_add(step_of_x(of[1]));
            let h = of.map(|h| h as u8);
            let most = if scaled.is_some() { 2 * 64 } else { 64 };
            let mut args = Args {
                config: TileConfig::new([h[0], h[0], h[1], h[1], h[0], h[1], 16, 16]),
                blocks,
                runs,
                steps: run,
                x: x0,
                x_second: (x1 as usize).wrapping_sub(x0 as usize),
                x_step: of.map(|h| h * 64),
                x_block: 32 * pitch * 64,
                w: w.as_ptr(),
                w_panel: panel_stride,
                sums: sums.wrapping_add(first).cast(),
                sums_panel: rows * 64,
                of_rows: scaled.map_or(std::ptr::null(), |s| s.of_rows.as_ptr().wrapping_add(first)),
                of_rows_run: rows * 4,
                of_panels: scaled.map_or(std::ptr::null(), |s| s.of_panels.as_ptr().cast()),
                parts,
                rows: of,
                both_parts: (2 * parts as usize).wrapping_add(4 * TILE),
                kept: [0; 5],
                next: next.as_ptr(),
                // Beyond a line a time some lines would be left out: few rows have no time for more.
                next_step: next_bytes.div_ceil(blocks * if scaled.is_some() { runs } else { steps }).min(most),
                next_panel,
                x_ahead,
                to_add: runs,
                fresh: usize::from(fresh),
            };
            let _: AmxToken = token;
            #[cfg(target_arch = "x86_64")]
            {
                let run: unsafe fn(&mut Args) = match (panels, of[1] > 0, scaled.is_some()) {
                    (1, false, false) => rows_16_panels_1,
                    (1, true, false) => rows_32_panels_1,
                    (_, false, false) => rows_16_panels_2,
                    (_, true, false) => rows_32_panels_2,
                    (1, false, true) => scaled_rows_16_panels_1,
                    (1, true, true) => scaled_rows_32_panels_1,
                    (_, false, true) => scaled_rows_16_panels_2,
                    (_, true, true) => scaled_rows_32_panels_2,
                };
                // SAFETY: the token proves the features. `args` describes the slices above, which live until the
                // call has returned, for rows `first..first + blocks * (of[0] + of[1])`, which `rows` bounds: x's tiles of `of[i]` rows
                // are followed by each other, every one of `pitch` steps of `of[i] * 64` bytes, from the tile's `first_step` on; w's
                // panels have `runs * run = steps` tiles; sums, parts and scales are as long as was just asked for.
                unsafe { run(&mut args) }
            }
            first += blocks * (of[0] + of[1]);
        }
    }
}

/// The products of a step for all steps at rsi, rdi (x) and r9 (w), rcx of them. Sums are `[tile of rows][panel]` from tmm0 on. x comes
/// from the second-level cache: whole blocks ask for it two steps ahead. `$more` is done once a step.
macro_rules! multiply {
    (1, 1, $more:expr) => {
        concat!(
            r"
        3:
        tileloadd tmm4, [rsi + rdx * 1]
        tileloadd tmm6, [r9 + rdx * 1]
        tdpbf16ps tmm0, tmm4, tmm6
        add rsi, [r13 + 104]
        add r9, 1024
        ",
            $more,
            "dec rcx\njnz 3b\n"
        )
    };
    (1, 2, $more:expr) => {
        concat!(
            r"
        mov r15, r9
        add r15, [r13 + 136]
        3:
        tileloadd tmm4, [rsi + rdx * 1]
        tileloadd tmm6, [r9 + rdx * 1]
        tdpbf16ps tmm0, tmm4, tmm6
        tileloadd tmm7, [r15 + rdx * 1]
        tdpbf16ps tmm1, tmm4, tmm7
        add rsi, [r13 + 104]
        add r9, 1024
        add r15, 1024
        ",
            $more,
            "dec rcx\njnz 3b\n"
        )
    };
    (2, 1, $more:expr) => {
        concat!(
            r"
        3:
        tileloadd tmm4, [rsi + rdx * 1]
        tileloadd tmm6, [r9 + rdx * 1]
        tdpbf16ps tmm0, tmm4, tmm6
        tileloadd tmm5, [rdi + rdx * 1]
        tdpbf16ps tmm2, tmm5, tmm6
        add rsi, [r13 + 104]
        add rdi, [r13 + 112]
        add r9, 1024
        ",
            $more,
            "dec rcx\njnz 3b\n"
        )
    };
    (2, 2, $more:expr) => {
        concat!(
            r"
        mov r15, r9
        add r15, [r13 + 136]
        3:
        tileloadd tmm4, [rsi + rdx * 1]
        tileloadd tmm6, [r9 + rdx * 1]
        tdpbf16ps tmm0, tmm4, tmm6
        .irp row, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        prefetcht0 [rsi + 2048 + 64 * \row]
        .endr
        tileloadd tmm7, [r15 + rdx * 1]
        tdpbf16ps tmm1, tmm4, tmm7
        tileloadd tmm5, [rdi + rdx * 1]
        tdpbf16ps tmm2, tmm5, tmm6
        .irp row, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        prefetcht0 [rdi + 2048 + 64 * \row]
        .endr
        tdpbf16ps tmm3, tmm5, tmm7
        add rsi, [r13 + 104]
        add rdi, [r13 + 112]
        add r9, 1024
        add r15, 1024
        ",
            $more,
            "dec rcx\njnz 3b\n"
        )
    };
}

/// Asks for x of the steps to come; x's pointers are a step on.
macro_rules! x_ahead {
    (1) => {
        "prefetcht1 [rsi + r11 - 1024]\nprefetcht1 [rsi + r11 - 512]\n"
    };
    (2) => {
        concat!(x_ahead!(1), "prefetcht1 [rdi + r11 - 1024]\nprefetcht1 [rdi + r11 - 512]\n")
    };
}

/// `$op` of each sum; at r10 is the first panel's, r11 becomes the second's.
macro_rules! each_sum {
    (load, $rows:tt, $panels:tt) => {
        each_sum!(
            "tileloadd tmm",
            "0, [r10 + rdx * 1]",
            "1, [r11 + rdx * 1]",
            "2, [r10 + rdx * 1 + 1024]",
            "3, [r11 + rdx * 1 + 1024]",
            $rows,
            $panels
        )
    };
    (store, $rows:tt, $panels:tt) => {
        each_sum!(
            "tilestored ",
            "[r10 + rdx * 1], tmm0",
            "[r11 + rdx * 1], tmm1",
            "[r10 + rdx * 1 + 1024], tmm2",
            "[r11 + rdx * 1 + 1024], tmm3",
            $rows,
            $panels
        )
    };
    (zero, $rows:tt, $panels:tt) => {
        each_sum!("tilezero tmm", "0", "1", "2", "3", $rows, $panels)
    };
    // To the buffer at r11.
    (put, $rows:tt, $panels:tt) => {
        each_sum!(
            "tilestored ",
            "[r11 + rdx * 1], tmm0",
            "[r11 + rdx * 1 + 1024], tmm1",
            "[r11 + rdx * 1 + 2048], tmm2",
            "[r11 + rdx * 1 + 3072], tmm3",
            $rows,
            $panels
        )
    };
    ($op:literal, $a:literal, $b:literal, $c:literal, $d:literal, 1, 1) => {
        concat!($op, $a, "\n")
    };
    ($op:literal, $a:literal, $b:literal, $c:literal, $d:literal, 1, 2) => {
        concat!($op, $a, "\n", $op, $b, "\n")
    };
    ($op:literal, $a:literal, $b:literal, $c:literal, $d:literal, 2, 1) => {
        concat!($op, $a, "\n", $op, $c, "\n")
    };
    ($op:literal, $a:literal, $b:literal, $c:literal, $d:literal, 2, 2) => {
        concat!($op, $a, "\n", $op, $b, "\n", $op, $c, "\n", $op, $d, "\n")
    };
}

macro_rules! many_rows {
    ($name:ident, $rows:tt, $panels:tt) => {
        /// # Safety
        /// The CPU has what `AmxToken` proves; `args` describes readable and writable memory as [`ManyRows::run`] makes it.
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
        unsafe fn $name(args: &mut Args) {
            // SAFETY: by this function's contract. The block names every register it changes, leaves the stack alone, configures the
            // tiles itself and releases them at its end; tiles are loaded before they are read.
            unsafe {
                asm!(
                    "ldtilecfg [r13]",
                    "mov rax, [r13 + 64]",
                    "mov r8, [r13 + 88]",
                    "mov r10, [r13 + 144]",
                    "mov r12, [r13 + 256]",
                    "mov r14, [r13 + 272]",
                    "mov edx, 64",
                    // A block of rows.
                    "2:",
                    "mov rsi, r8",
                    "mov rdi, r8",
                    "add rdi, [r13 + 96]",
                    "mov r9, [r13 + 128]",
                    "mov rcx, [r13 + 80]",
                    "mov r11, r10",
                    "add r11, [r13 + 152]",
                    "cmp qword ptr [r13 + 296], 0",
                    "jne 4f",
                    each_sum!(load, $rows, $panels),
                    "jmp 5f",
                    "4:",
                    each_sum!(zero, $rows, $panels),
                    "5:",
                    "mov r11, [r13 + 280]",
                    multiply!(
                        $rows,
                        $panels,
                        concat!("prefetcht1 [r12]\nprefetcht1 [r12 + r14]\nadd r12, [r13 + 264]\n", x_ahead!($rows))
                    ),
                    "mov r11, r10",
                    "add r11, [r13 + 152]",
                    each_sum!(store, $rows, $panels),
                    "add r8, [r13 + 120]",
                    "add r10, 2048",
                    "dec rax",
                    "jnz 2b",
                    "tilerelease",
                    in("r13") args,
                    out("rax") _, out("rcx") _, out("rdx") _, out("rsi") _, out("rdi") _, out("r8") _, out("r9") _, out("r10") _,
                    out("r11") _, out("r12") _, out("r14") _, out("r15") _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _,
                    out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

many_rows!(rows_16_panels_1, 1, 1);
many_rows!(rows_16_panels_2, 1, 2);
many_rows!(rows_32_panels_1, 2, 1);
many_rows!(rows_32_panels_2, 2, 2);

/// Adds a scaled tile row to the sums, of one panel or of two: rdx is at the row's scale, rsi at its part, rdi and r9 at its sums.
macro_rules! add_row {
    (1) => {
        r"
        vmulps zmm18, zmm16, dword ptr [rdx]{{1to16}}
        vmovups zmm20, zmmword ptr [rdi]
        vfmadd231ps zmm20, zmm18, zmmword ptr [rsi]
        vmovups zmmword ptr [rdi], zmm20
        "
    };
    (2) => {
        r"
        vmulps zmm18, zmm16, dword ptr [rdx]{{1to16}}
        vmulps zmm19, zmm17, dword ptr [rdx]{{1to16}}
        vmovups zmm20, zmmword ptr [rdi]
        vmovups zmm21, zmmword ptr [r9]
        vfmadd231ps zmm20, zmm18, zmmword ptr [rsi]
        vfmadd231ps zmm21, zmm19, zmmword ptr [rsi + 1024]
        vmovups zmmword ptr [rdi], zmm20
        vmovups zmmword ptr [r9], zmm21
        "
    };
}

/// Adds the parts of a run, at r11, to a block's sums, tile of rows by tile of rows; `$label` begins a row.
macro_rules! add_tile {
    ($panels:tt, $rows:literal, $second:literal, $part:literal) => {
        concat!(
            "mov rcx, [r13 + ",
            $rows,
            "]\n",
            "lea rdx, [r14 + ",
            $second,
            " / 16]\n",
            "lea rsi, [r11 + ",
            $part,
            "]\n",
            "lea rdi, [r10 + ",
            $second,
            "]\n",
            "mov r9, rdi\n",
            "add r9, [r13 + 152]\n",
            "6:\n",
            add_row!($panels),
            "add rdx, 4\n",
            "add rsi, 64\n",
            "add rdi, 64\n",
            "add r9, 64\n",
            "dec rcx\n",
            "jnz 6b\n",
        )
    };
}

macro_rules! add_tiles {
    (1, $panels:tt) => {
        add_tile!($panels, "192", "0", "0")
    };
    (2, $panels:tt) => {
        concat!(add_tile!($panels, "192", "0", "0"), add_tile!($panels, "200", "1024", "2048"))
    };
}

/// Asks for x of the steps to come, four steps of each tile of rows; a run's end is in what is kept.
macro_rules! run_ahead {
    ($kept:literal) => {
        concat!(
            "mov rcx, [r13 + ",
            $kept,
            r"]
            add rcx, [r13 + 280]
            .irp half, 8, 7, 6, 5, 4, 3, 2, 1
            prefetcht1 [rcx - 512 * \half]
            .endr
            "
        )
    };
    (1,) => {
        run_ahead!("216")
    };
    (2,) => {
        concat!(run_ahead!("216"), run_ahead!("224"))
    };
}

/// The same where scales change along k. While the products of one run are under way, the sums of the run before, be it of the block
/// before, are scaled and added, from two buffers that take turns.
macro_rules! scaled_rows {
    ($name:ident, $rows:tt, $panels:tt) => {
        /// # Safety
        /// The CPU has what `AmxToken` proves; `args` describes readable and writable memory as [`ManyRows::run`] makes it.
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2")]
        unsafe fn $name(args: &mut Args) {
            // SAFETY: by this function's contract. The block names every register it changes, leaves the stack alone, configures the
            // tiles itself and releases them at its end; tiles are zeroed or loaded before they are read.
            unsafe {
                asm!(
                    "ldtilecfg [r13]",
                    "mov rax, [r13 + 64]",
                    "mov r8, [r13 + 88]",
                    "mov r10, [r13 + 144]",
                    "mov r11, [r13 + 184]",
                    "mov r14, [r13 + 160]",
                    "mov rcx, [r13 + 176]",
                    "mov [r13 + 240], rcx",
                    "mov edx, 64",
                    // A block of rows.
                    "2:",
                    "mov rsi, r8",
                    "mov rdi, r8",
                    "add rdi, [r13 + 96]",
                    "mov r9, [r13 + 128]",
                    "mov r12, [r13 + 72]",
                    // A run: products, then the sums of the one before.
                    "4:",
                    "mov rcx, [r13 + 80]",
                    each_sum!(zero, $rows, $panels),
                    multiply!($rows, $panels, ""),
                    "mov [r13 + 216], rsi",
                    "mov [r13 + 224], rdi",
                    "mov [r13 + 232], r9",
                    "cmp qword ptr [r13 + 248], 0",
                    "je 5f",
                    "7:",
                    "mov rcx, [r13 + 240]",
                    "vmovups zmm16, zmmword ptr [rcx]",
                    "vmovups zmm17, zmmword ptr [rcx + 64]",
                    "sub rcx, -128",
                    "mov [r13 + 240], rcx",
                    "mov rcx, [r13 + 256]",
                    "prefetcht1 [rcx]",
                    "prefetcht1 [rcx + 64]",
                    "mov rdx, rcx",
                    "add rdx, [r13 + 272]",
                    "prefetcht1 [rdx]",
                    "prefetcht1 [rdx + 64]",
                    "add rcx, [r13 + 264]",
                    "mov [r13 + 256], rcx",
                    run_ahead!($rows,),
                    add_tiles!($rows, $panels),
                    "add r14, [r13 + 168]",
                    "dec qword ptr [r13 + 288]",
                    "jnz 9f",
                    // Sums of the next block come next.
                    "add r10, 2048",
                    "sub qword ptr [r13 + 160], -128",
                    "mov r14, [r13 + 160]",
                    "mov rcx, [r13 + 176]",
                    "mov [r13 + 240], rcx",
                    "mov rcx, [r13 + 72]",
                    "mov [r13 + 288], rcx",
                    "9:",
                    "test r12, r12",
                    "jz 8f",
                    "5:",
                    "neg r11",
                    "add r11, [r13 + 208]",
                    "mov edx, 64",
                    each_sum!(put, $rows, $panels),
                    "mov qword ptr [r13 + 248], 1",
                    "mov rsi, [r13 + 216]",
                    "mov rdi, [r13 + 224]",
                    "mov r9, [r13 + 232]",
                    "dec r12",
                    "jnz 4b",
                    "add r8, [r13 + 120]",
                    "dec rax",
                    "jnz 2b",
                    // The last run's; r12 is zero.
                    "jmp 7b",
                    "8:",
                    "tilerelease",
                    in("r13") args,
                    out("rax") _, out("rcx") _, out("rdx") _, out("rsi") _, out("rdi") _, out("r8") _, out("r9") _, out("r10") _,
                    out("r11") _, out("r12") _, out("r14") _, out("r15") _,
                    out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _, out("zmm20") _, out("zmm21") _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _,
                    out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

scaled_rows!(scaled_rows_16_panels_1, 1, 1);
scaled_rows!(scaled_rows_16_panels_2, 1, 2);
scaled_rows!(scaled_rows_32_panels_1, 2, 1);
scaled_rows!(scaled_rows_32_panels_2, 2, 2);
