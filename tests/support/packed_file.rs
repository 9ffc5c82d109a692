//! Packed weights as files, changed by hand: the format's checksums written down a second time.
#![allow(dead_code, unreachable_pub)] // each user uses its part

/// Bytes of the header; the last eight are its checksum.
pub const HEADER: usize = 128;
/// Where the checksum of the rest stands.
pub const CONTENTS_SUM: usize = 72;

/// Bytes that begin so many after a multiple of 64, as a map of a file or of a part of one would.
pub struct Map(Vec<u8>, usize, usize);

impl Map {
    pub fn new(bytes: &[u8], offset: usize) -> Map {
        let mut memory = vec![0; bytes.len() + 128];
        let start = memory.as_ptr().align_offset(64) + offset;
        memory[start..start + bytes.len()].copy_from_slice(bytes);
        Map(memory, start, bytes.len())
    }
}

impl AsRef<[u8]> for Map {
    fn as_ref(&self) -> &[u8] {
        &self.0[self.1..self.1 + self.2]
    }
}

fn mix(x: u64) -> u64 {
    let x = x.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (x ^ x >> 32).wrapping_mul(0xD6E8_FEB8_6659_FD93)
}

/// The checksum of bytes.
pub fn checksum(bytes: &[u8]) -> u64 {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().next_multiple_of(64), 0);
    let lane = |lane: usize| {
        let words = bytes.chunks(8).skip(lane).step_by(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
        words.fold(lane as u64 + 1, |state, word| mix(state ^ word))
    };
    (0..8).map(lane).fold(0, |sum, lane| mix(sum ^ lane))
}

/// Puts a number into the header.
pub fn set(file: &mut [u8], at: usize, value: u64) {
    file[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// Makes both checksums right, of a file that has a header.
pub fn repair(file: &mut [u8]) {
    if file.len() >= HEADER {
        let contents = checksum(&file[HEADER..]);
        set(file, CONTENTS_SUM, contents);
        let header = checksum(&file[..HEADER - 8]);
        set(file, HEADER - 8, header);
    }
}
