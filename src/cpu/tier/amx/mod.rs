//! AMX: tiles of sixteen rows of 64 bytes, and their product of bf16 pairs, which is the canonical dot's step.
//!
//! Intrinsics are not stable, so this is inline assembly; each block configures tiles, loops, stores and releases them, because
//! nothing may be assumed of tile state between two blocks. What bf16 does not hold takes the AVX-512 tier.
//!
//! TDPBF16PS treats subnormals as zero and ignores MXCSR (docs/numerics.md, section 2). Callers come here only where no subnormal
//! arises, so even the sign of a flushed zero is that of the definition.

// On other architectures no token exists, so nothing here is ever called.
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code, unused))]

mod codes;
mod config;
mod few;
mod many;

pub(crate) use codes::{Coded, TileCode};
pub(crate) use few::{FewRows, PANELS};
pub(crate) use many::{Decoded, ManyRows, Scaled};

/// Bytes of a tile.
pub(crate) const TILE: usize = 1024;

/// Consecutive steps of a packed panel, from a group's start on: where codes lie.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Steps {
    /// How many.
    pub(crate) count: usize,
    /// Bytes of a group of four steps, of its scales, of the last group's scales, and of a step's codes.
    pub(crate) group_bytes: usize,
    pub(crate) area: usize,
    pub(crate) last_area: usize,
    pub(crate) step_bytes: usize,
}

impl Steps {
    /// Whether the bytes are those that the loops of a code walk: what their safety rests on.
    fn fit(&self, code: TileCode) -> bool {
        let (step, scales) = code.step_bytes();
        self.step_bytes == step
            && self.area >= 4 * scales
            && self.last_area >= self.last_steps() * scales
            && self.group_bytes >= self.area + 4 * step
    }

    /// Groups of four, the last one perhaps shorter.
    fn groups(&self) -> usize {
        self.count.div_ceil(4)
    }

    fn last_steps(&self) -> usize {
        self.count - (self.groups() - 1) * 4
    }

    /// Bytes from the first group's start to the last code's end; there is at least one step.
    fn bytes(&self) -> usize {
        (self.groups() - 1) * self.group_bytes + self.last_area + self.last_steps() * self.step_bytes
    }
}
