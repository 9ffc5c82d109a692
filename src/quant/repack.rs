//! The same codes in another memory order.
#![forbid(unsafe_code)]

use super::scheme::NibbleOrder;
use crate::error::{Error, Result, length, mul, multiple};
use crate::num::F4E2M1x2;

/// Bytes of a GGUF MXFP4 block (ggml type 39): one E8M0 code and 16 bytes of codes.
const GGUF_MXFP4: usize = 17;
/// Bytes of a GGUF NVFP4 super-block (ggml type 40): four UE4M3 codes and four times 8 bytes of codes.
const GGUF_NVFP4: usize = 36;

/// Copies FP4 codes from one [`NibbleOrder`] to the other, block by block. `block` is the elements of a block (32 MX, 16
/// NVFP4); `codes` and `out` hold `block / 2` bytes for each.
///
/// # Errors
/// [`Error::Empty`] for blocks without elements; [`Error::Multiple`] if `block` is odd or `codes` ends inside a block;
/// [`Error::Length`] if the slices differ in length.
pub fn repack_nibbles(from: NibbleOrder, to: NibbleOrder, block: usize, codes: &[u8], out: &mut [u8]) -> Result<()> {
    if block == 0 {
        return Err(Error::Empty { operand: "fp4 block".into(), axis: "k" });
    }
    multiple("fp4 block", "k", block, 2)?;
    multiple("fp4 codes", "bytes", codes.len(), block / 2)?;
    length("repacked fp4 codes", out.len(), codes.len())?;
    for (codes, out) in codes.chunks_exact(block / 2).zip(out.chunks_exact_mut(block / 2)) {
        repack_block(from, to, codes, out);
    }
    Ok(())
}

/// One block; the slices are as long as each other.
fn repack_block(from: NibbleOrder, to: NibbleOrder, codes: &[u8], out: &mut [u8]) {
    if from == to {
        out.copy_from_slice(codes);
        return;
    }
    for (j, byte) in out.iter_mut().enumerate() {
        let (low, high) = elements_of_byte(to, codes.len(), j);
        *byte = F4E2M1x2::from_codes(element(from, codes, low), element(from, codes, high)).to_bits();
    }
}

/// Which elements of a block of `bytes` bytes are the low and high nibble of byte `j`.
fn elements_of_byte(order: NibbleOrder, bytes: usize, j: usize) -> (usize, usize) {
    match order {
        NibbleOrder::Interleaved => (2 * j, 2 * j + 1),
        NibbleOrder::Halves => (j, j + bytes),
    }
}

/// The code of element `i` of a block.
fn element(order: NibbleOrder, codes: &[u8], i: usize) -> u8 {
    let (byte, high) = match order {
        NibbleOrder::Interleaved => (i / 2, i % 2),
        NibbleOrder::Halves => (i % codes.len(), i / codes.len()),
    };
    F4E2M1x2::from_bits(codes[byte]).codes()[high]
}

/// GGUF MXFP4 blocks (17 bytes each, ggml type 39) to planar MXFP4: `codes`, 16 bytes for each block, low nibble = even
/// element, and `scales`, one E8M0 code for each.
///
/// Bytes are kept as they are: scale code 255 is NaN in this crate, 2^128 in ggml.
///
/// # Errors
/// [`Error::Multiple`] unless `bytes` holds whole blocks; [`Error::Length`] for either output. Nothing is written then.
pub fn mxfp4_from_gguf(bytes: &[u8], codes: &mut [u8], scales: &mut [u8]) -> Result<()> {
    multiple("gguf mxfp4", "bytes", bytes.len(), GGUF_MXFP4)?;
    let blocks = bytes.len() / GGUF_MXFP4;
    length("mxfp4 codes", codes.len(), blocks * 16)?;
    length("mxfp4 scales", scales.len(), blocks)?;
    for ((block, codes), scale) in bytes.chunks_exact(GGUF_MXFP4).zip(codes.chunks_exact_mut(16)).zip(scales) {
        *scale = block[0];
        repack_block(NibbleOrder::Halves, NibbleOrder::Interleaved, &block[1..], codes);
    }
    Ok(())
}

/// Planar MXFP4 (`codes`: 16 bytes for each block, low nibble = even element; `scales`: one E8M0 code for each) to GGUF blocks
/// of 17 bytes (ggml type 39).
///
/// # Errors
/// [`Error::Length`] for `codes` or `bytes`, [`Error::Overflow`]; [`Error::Value`] for scale code 255, which ggml would read as
/// 2^128 and not as NaN. Nothing is written then.
pub fn mxfp4_to_gguf(codes: &[u8], scales: &[u8], bytes: &mut [u8]) -> Result<()> {
    length("mxfp4 codes", codes.len(), mul("mxfp4 codes", scales.len(), 16)?)?;
    length("gguf mxfp4", bytes.len(), mul("gguf mxfp4", scales.len(), GGUF_MXFP4)?)?;
    if let Some(at) = scales.iter().position(|&s| s == 255) {
        let (operand, got) = ("mxfp4 scales".into(), "E8M0 code 255 (NaN)".into());
        return Err(Error::Value { operand, at, got, needed: "a scale that ggml reads as this crate does" });
    }
    for ((block, codes), scale) in bytes.chunks_exact_mut(GGUF_MXFP4).zip(codes.chunks_exact(16)).zip(scales) {
        block[0] = *scale;
        repack_block(NibbleOrder::Interleaved, NibbleOrder::Halves, codes, &mut block[1..]);
    }
    Ok(())
}

/// GGUF NVFP4 super-blocks (64 elements in 36 bytes, ggml type 40) to planar NVFP4: `codes`, 32 bytes for each super-block, low
/// nibble = even element, and `scales`, four E4M3FN codes for each.
///
/// Scale code 0x7F, which ggml reads as zero and E4M3FN as NaN, becomes 0x00. The tensor's f32 scale is stored elsewhere
/// (`<name>.scale`).
///
/// # Errors
/// [`Error::Multiple`] unless `bytes` holds whole super-blocks; [`Error::Length`] for either output; [`Error::Value`] for a
/// scale with the sign bit. Nothing is written then.
pub fn nvfp4_from_gguf(bytes: &[u8], codes: &mut [u8], scales: &mut [u8]) -> Result<()> {
    multiple("gguf nvfp4", "bytes", bytes.len(), GGUF_NVFP4)?;
    let blocks = bytes.len() / GGUF_NVFP4;
    length("nvfp4 codes", codes.len(), blocks * 32)?;
    length("nvfp4 scales", scales.len(), blocks * 4)?;
    for (i, block) in bytes.chunks_exact(GGUF_NVFP4).enumerate() {
        if let Some(j) = block[..4].iter().position(|&s| s >= 0x80) {
            let (operand, got) = ("gguf nvfp4".into(), format!("UE4M3 code {:#04x}", block[j]));
            return Err(Error::Value { operand, at: i * GGUF_NVFP4 + j, got, needed: "a scale without the sign bit" });
        }
    }
    let outputs = codes.chunks_exact_mut(32).zip(scales.chunks_exact_mut(4));
    for (block, (codes, scales)) in bytes.chunks_exact(GGUF_NVFP4).zip(outputs) {
        for (to, &from) in scales.iter_mut().zip(&block[..4]) {
            *to = if from == 0x7F { 0 } else { from };
        }
        for (from, to) in block[4..].chunks_exact(8).zip(codes.chunks_exact_mut(8)) {
            repack_block(NibbleOrder::Halves, NibbleOrder::Interleaved, from, to);
        }
    }
    Ok(())
}
