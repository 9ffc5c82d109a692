//! Memory: scratch that the caller owns, and cache lines for packed weights.
#![allow(unsafe_code)] // advice to the kernel about pages

use super::simd::LINE;
use crate::error::{Error, Result};

/// Scratch memory for kernels. Make one for each thread that calls the crate and keep it: it grows to what the largest call
/// needed and then stays, so that repeated calls allocate nothing.
#[derive(Debug, Default)]
pub struct Workspace {
    scratch: Scratch,
    indices: Vec<usize>,
}

impl Workspace {
    /// Empty; grows on first use.
    pub const fn new() -> Self {
        Workspace { scratch: Scratch { floats: Vec::new(), claims: Vec::new() }, indices: Vec::new() }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let words = self.indices.capacity() + self.scratch.claims.capacity();
        self.scratch.floats.capacity() * size_of::<f32>() + words * size_of::<usize>()
    }

    /// `floats` and `indices` elements of scratch with arbitrary contents. The floats begin at a cache line.
    pub(crate) fn take(&mut self, floats: usize, indices: usize) -> (&mut [f32], &mut [usize]) {
        let (rest, indices) = self.take_indices(indices);
        (rest.take(floats, 0).0, indices)
    }

    /// `indices` elements of scratch with arbitrary contents, and where to take the rest from when its size is known.
    pub(crate) fn take_indices(&mut self, indices: usize) -> (&mut Scratch, &mut [usize]) {
        if self.indices.len() < indices {
            self.indices.resize(indices, 0);
        }
        (&mut self.scratch, &mut self.indices[..indices])
    }
}

/// What a [`Workspace`] holds beside indices.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    floats: Vec<f32>,
    claims: Vec<usize>,
}

impl Scratch {
    /// So many f32 from a cache line on, and claim words of a [`Handout`](super::Handout), with arbitrary contents.
    pub(crate) fn take(&mut self, floats: usize, claims: usize) -> (&mut [f32], &mut [usize]) {
        let room = floats + LINE / size_of::<f32>();
        if self.floats.len() < room {
            self.floats.resize(room, 0.0);
        }
        if self.claims.len() < claims {
            self.claims.resize(claims, 0);
        }
        let skip = self.floats.as_ptr().align_offset(LINE).min(room - floats);
        (&mut self.floats[skip..skip + floats], &mut self.claims[..claims])
    }
}

/// Bytes that begin at a cache line. Large ones begin at a huge page and ask the system for huge pages: packed weights are walked in
/// many streams at once, each of which needs a page entry of its own.
#[derive(Debug)]
pub(crate) struct Lines {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Lines {
    /// Zeros, as the system gives them: no page is touched before its first use, by whichever thread that is.
    ///
    /// # Errors
    /// [`Error::Overflow`] where the memory is not to be had.
    pub(crate) fn zeroed(operand: &'static str, len: usize) -> Result<Lines> {
        let refused = || Error::Overflow { operand: operand.into() };
        // Bytes and not lines: a standard allocator fills zeros in by hand where it is asked for an alignment.
        let room = len.checked_add(alignment(len)).ok_or_else(refused)?;
        let memory: Vec<u8> = bytemuck::allocation::try_zeroed_vec(room).map_err(|()| refused())?;
        let start = start(memory.as_ptr(), len);
        huge_pages(&memory[start..start + len]);
        Ok(Lines { memory, start, len })
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

impl Clone for Lines {
    fn clone(&self) -> Self {
        let mut memory = Vec::with_capacity(self.len + alignment(self.len));
        let start = start(memory.as_ptr(), self.len);
        huge_pages(&memory.spare_capacity_mut()[start..start + self.len]);
        memory.resize(start, 0);
        memory.extend_from_slice(self.bytes());
        Lines { memory, start, len: self.len }
    }
}

/// A huge page of x86-64.
const HUGE: usize = 2 << 20;

/// Where so many bytes should begin: what fills no huge page takes no place in one.
fn alignment(len: usize) -> usize {
    if len < HUGE { LINE } else { HUGE }
}

/// Where they begin in memory for so many and [`alignment`] more.
fn start(memory: *const u8, len: usize) -> usize {
    memory.align_offset(alignment(len)).min(alignment(len))
}

/// Advises Linux to back whole 2 MiB pages of `memory` by huge ones (madvise, MADV_HUGEPAGE). Refusal changes nothing but time.
#[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
fn huge_pages<T>(memory: &[T]) {
    const MADVISE: usize = 28;
    const MADV_HUGEPAGE: usize = 14;
    let range = memory.as_ptr_range();
    let (start, end) = ((range.start as usize).next_multiple_of(HUGE), range.end as usize / HUGE * HUGE);
    if start >= end {
        return;
    }
    // SAFETY: the system call touches no register but those named and no memory of this program: it marks whole pages that lie
    // inside `memory`, whose contents and protection stay as they are.
    unsafe {
        std::arch::asm!(
            "syscall",
            inout("rax") MADVISE => _,
            in("rdi") start,
            in("rsi") end - start,
            in("rdx") MADV_HUGEPAGE,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux", not(miri))))]
fn huge_pages<T>(_: &[T]) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_aligned_and_zero() {
        for bytes in [0, 1, 64, 65, HUGE - 1, 5 << 20] {
            let mut lines = Lines::zeroed("x", bytes).unwrap();
            assert!(lines.bytes().len() == bytes && lines.bytes().as_ptr().align_offset(LINE) == 0);
            assert!(lines.bytes().iter().all(|b| *b == 0));
            lines.bytes_mut().fill(7);
            assert_eq!(lines.clone().bytes(), lines.bytes());
        }
        assert!(Lines::zeroed("x", usize::MAX - 63).is_err());
    }

    #[test]
    fn scratch_begins_at_a_line() {
        let mut ws = Workspace::new();
        for floats in [1, 100, 3] {
            let (scratch, _) = ws.take(floats, 0);
            assert_eq!((scratch.len(), scratch.as_ptr().align_offset(LINE)), (floats, 0));
        }
    }
}
