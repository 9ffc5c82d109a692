//! The checksum of packed weights in files.
#![forbid(unsafe_code)]

use crate::cpu::LINE;

/// Eight 64-bit lanes over lines of 64 bytes; what a lane holds is mixed with every word it takes in.
///
/// It is against accidents: a damaged disk, a copy cut short and filled up, two files mixed up. Whatever changes within one aligned
/// word of eight bytes is noticed for certain, for [`mix`] gives different words different results; any other accident but for one
/// in about 2^64. Whoever wants to can make bytes to any checksum.
#[derive(Clone, Copy)]
pub(super) struct Checksum([u64; 8]);

/// Multiplied twice, high bits folded down between: once would let a change of the top bit through as that one bit, for the next word
/// to undo.
#[inline(always)]
fn mix(x: u64) -> u64 {
    let x = x.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (x ^ x >> 32).wrapping_mul(0xD6E8_FEB8_6659_FD93)
}

impl Checksum {
    pub(super) fn new() -> Self {
        Checksum(std::array::from_fn(|lane| lane as u64 + 1))
    }

    /// Takes bytes in, the last line filled up with zeros.
    pub(super) fn take(&mut self, bytes: &[u8]) {
        let (lines, rest) = bytes.as_chunks::<LINE>();
        let mut last = [0; LINE];
        last[..rest.len()].copy_from_slice(rest);
        for line in lines.iter().chain((!rest.is_empty()).then_some(&last)) {
            for (lane, word) in self.0.iter_mut().zip(line.as_chunks::<8>().0) {
                *lane = mix(*lane ^ u64::from_le_bytes(*word));
            }
        }
    }

    pub(super) fn finish(self) -> u64 {
        self.0.iter().fold(0, |sum, lane| mix(sum ^ lane))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u64 {
        let mut sum = Checksum::new();
        sum.take(bytes);
        sum.finish()
    }

    fn contents() -> [[u8; 3 * LINE]; 3] {
        let mut x = 1u64;
        let random = std::array::from_fn(|i| {
            x = mix(x + i as u64);
            (x >> 56) as u8
        });
        [[0; 3 * LINE], [0xFF; 3 * LINE], random]
    }

    fn flip(bytes: &mut [u8], bit: usize) {
        bytes[bit / 8] ^= 1 << (bit % 8);
    }

    /// All pairs of bits of three lines: within a word, in neighbouring words, in the next word of the same lane and the one after.
    #[test]
    fn two_bits() {
        for contents in contents() {
            let good = sum(&contents);
            for one in 0..8 * contents.len() {
                let mut changed = contents;
                flip(&mut changed, one);
                assert_ne!(sum(&changed), good, "bit {one}");
                for other in 0..one {
                    flip(&mut changed, other);
                    assert_ne!(sum(&changed), good, "bits {other} and {one}");
                    flip(&mut changed, other);
                }
            }
        }
    }

    /// What one mixed bit might become, undone in the next word of the lane: the same bit, a neighbour, or both halves of a word.
    #[test]
    fn a_bit_and_two() {
        for contents in contents() {
            let good = sum(&contents);
            for one in 0..64 {
                let mut changed = contents;
                flip(&mut changed, one);
                for a in 0..64 {
                    for b in 0..a {
                        let mut changed = changed;
                        flip(&mut changed, 8 * LINE + a);
                        flip(&mut changed, 8 * LINE + b);
                        assert_ne!(sum(&changed), good, "bits {one}, {a} and {b}");
                    }
                }
            }
        }
    }

    /// Lines and lanes that changed places, and bytes put in front.
    #[test]
    fn order() {
        let random = contents()[2];
        for (i, j) in [(0, 64), (0, 8), (0, 128), (8, 120)] {
            let mut changed = random;
            for byte in 0..8 {
                changed.swap(i + byte, j + byte);
            }
            assert_ne!(sum(&changed), sum(&random), "words {i} and {j}");
        }
        assert_ne!(sum(&[0; 64]), sum(&[0; 128]));
        assert_ne!(sum(&[]), sum(&[0; 64]));
    }
}
