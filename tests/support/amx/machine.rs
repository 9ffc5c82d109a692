//! Tiles of one thread, and what the instructions do to them.

use std::cell::UnsafeCell;

/// What an instruction does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    LoadConfig,
    Release,
    Zero,
    Load,
    Store,
    Product,
}

/// A decoded instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Instruction {
    pub(crate) operation: Operation,
    /// Destination (or the tile stored), left and right operand.
    tiles: [usize; 3],
    address: u64,
    stride: u64,
}

impl Instruction {
    /// The AMX instruction at the beginning of `code`, and its length; registers have the given values.
    pub(crate) fn decode(code: &[u8], value: impl Fn(u8) -> u64) -> Option<(Instruction, usize)> {
        // Three-byte VEX, map 0F38, W = 0, L = 0 (Intel SDM vol. 2A, 2.3).
        let [0xC4, first, second, opcode, modrm, ..] = *code else { return None };
        if first & 31 != 2 || second & 0x84 != 0 {
            return None;
        }
        let extended = |bit: u8| if first & bit == 0 { 8 } else { 0 };
        let (r, x, b) = (extended(0x80), extended(0x40), extended(0x20));
        let third = usize::from(!(second >> 3) & 15);
        let (mode, reg, rm) = (modrm >> 6, modrm >> 3 & 7, modrm & 7);
        let none = Instruction { operation: Operation::Release, tiles: [0; 3], address: 0, stride: 0 };
        let registers_only = mode == 3;
        let operation = match (opcode, second & 3, registers_only) {
            (0x49, 0, false) => Operation::LoadConfig,
            (0x49, 0, true) if modrm == 0xC0 => return Some((none, 5)),
            (0x49, 3, true) => Operation::Zero,
            (0x4B, 3, false) => Operation::Load,
            (0x4B, 2, false) => Operation::Store,
            (0x5C, 2, true) => Operation::Product,
            _ => return None,
        };
        let tiles = [usize::from(reg + r), usize::from(rm + b), third];
        let instruction = Instruction { operation, tiles, ..none };
        if registers_only {
            return tiles.iter().all(|t| *t < 8 || operation == Operation::Zero).then_some((instruction, 5));
        }
        let (mut at, mut base, mut stride) = (5, rm + b, 0);
        if rm == 4 {
            let sib = code[at];
            at += 1;
            base = (sib & 7) + b;
            let index = (sib >> 3 & 7) + x;
            stride = if index == 4 { 0 } else { value(index) << (sib >> 6) };
        } else if operation != Operation::LoadConfig {
            return None;
        }
        let displacement = match mode {
            0 if base & 7 == 5 => return None,
            0 => 0,
            1 => i64::from(code[at] as i8),
            _ => i64::from(i32::from_le_bytes(code[at..at + 4].try_into().ok()?)),
        };
        let length = at + [0, 1, 4][usize::from(mode)];
        let address = value(base).wrapping_add_signed(displacement);
        Some((Instruction { address, stride, ..instruction }, length))
    }
}

#[derive(Clone, Copy)]
struct Tile {
    rows: usize,
    row_bytes: usize,
    data: [[u8; 64]; 16],
}

const EMPTY: Tile = Tile { rows: 0, row_bytes: 0, data: [[0; 64]; 16] };

thread_local! {
    static TILES: UnsafeCell<[Tile; 8]> = const { UnsafeCell::new([EMPTY; 8]) };
}

/// Does what the instruction does, to this thread's tiles.
///
/// # Safety
/// What the instruction reads and writes is readable and writable.
pub(crate) unsafe fn execute(i: Instruction) -> Result<(), String> {
    let Instruction { operation, tiles: [a, b, c], address, stride } = i;
    let line = |row: usize| (address.wrapping_add(stride.wrapping_mul(row as u64))) as *mut u8;
    TILES.with(|tiles| {
        // SAFETY: this thread's alone, and a signal handler for a synchronous fault does not meet itself here.
        let tiles = unsafe { &mut *tiles.get() };
        if !matches!(operation, Operation::LoadConfig | Operation::Release) && tiles[a].rows == 0 {
            return Err(format!("{operation:?} of tile {a}, which is not configured"));
        }
        match operation {
            Operation::Release => *tiles = [EMPTY; 8],
            Operation::LoadConfig => {
                // SAFETY: the caller's promise.
                let config = unsafe { address_as_bytes(address, 64) };
                if config[0] != 1 || config[1] != 0 || config[2..16].iter().chain(&config[32..48]).any(|b| *b != 0) {
                    return Err(format!("LDTILECFG of {config:?}"));
                }
                for (t, tile) in tiles.iter_mut().enumerate() {
                    let row_bytes = usize::from(u16::from_le_bytes([config[16 + 2 * t], config[17 + 2 * t]]));
                    let rows = usize::from(config[48 + t]);
                    if rows > 16 || row_bytes > 64 || (rows == 0) != (row_bytes == 0) {
                        return Err(format!("LDTILECFG: tile {t} of {rows} rows of {row_bytes} bytes"));
                    }
                    *tile = Tile { rows, row_bytes, ..EMPTY };
                }
            }
            Operation::Zero => tiles[a].data = EMPTY.data,
            Operation::Load => {
                let tile = &mut tiles[a];
                tile.data = EMPTY.data;
                for row in 0..tile.rows {
                    // SAFETY: the caller's promise.
                    let bytes = unsafe { address_as_bytes(line(row) as u64, tile.row_bytes) };
                    tile.data[row][..tile.row_bytes].copy_from_slice(bytes);
                }
            }
            Operation::Store => {
                let tile = &tiles[a];
                for row in 0..tile.rows {
                    // SAFETY: the caller's promise.
                    unsafe { line(row).copy_from_nonoverlapping(tile.data[row].as_ptr(), tile.row_bytes) };
                }
            }
            Operation::Product => {
                let (x, w) = (tiles[b], tiles[c]);
                let y = &mut tiles[a];
                let distinct = a != b && a != c && b != c;
                if !distinct || x.rows != y.rows || x.row_bytes != 4 * w.rows || w.row_bytes != y.row_bytes {
                    return Err(format!("TDPBF16PS of tiles {a}, {b}, {c}, whose shapes do not fit"));
                }
                // SAFETY: a machine with AVX-512, which this emulator needs, has FMA.
                unsafe { product(&x, &w, y) };
            }
        }
        Ok(())
    })
}

/// # Safety
/// So many bytes are readable there.
unsafe fn address_as_bytes<'a>(address: u64, bytes: usize) -> &'a [u8] {
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(address as *const u8, bytes) }
}

fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

/// Each element: sums of even and of odd k, each fused, subnormals in and out read as zero; then their sum, then the old value.
#[target_feature(enable = "fma")] // without it each multiply-add is a call of the library
fn product(x: &Tile, w: &Tile, y: &mut Tile) {
    let columns = y.row_bytes / 4;
    let value = |low: u8, high: u8| flush(f32::from_bits(u32::from(u16::from_le_bytes([low, high])) << 16));
    for row in 0..y.rows {
        let mut chains = [[0f32; 16]; 2];
        for pair in 0..w.rows {
            for (odd, chains) in chains.iter_mut().enumerate() {
                let at = 4 * pair + 2 * odd;
                let x = value(x.data[row][at], x.data[row][at + 1]);
                for (column, chain) in chains.iter_mut().enumerate().take(columns) {
                    let at = 4 * column + 2 * odd;
                    *chain = flush(x.mul_add(value(w.data[pair][at], w.data[pair][at + 1]), *chain));
                }
            }
        }
        for (column, sum) in y.data[row].as_chunks_mut::<4>().0.iter_mut().enumerate().take(columns) {
            let old = flush(f32::from_le_bytes(*sum));
            *sum = flush(old + flush(chains[0][column] + chains[1][column])).to_le_bytes();
        }
    }
}
