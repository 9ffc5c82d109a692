//! One call over several compiled shapes.
#![forbid(unsafe_code)]

use super::CompiledKernel;
use super::device::{DeviceKernels, Loaded};
use crate::error::{Error, Result};
use crate::neuron::{Tensor, TensorSet, retry};
use std::sync::{Arc, Mutex, PoisonError};

/// Executions tried while the queue is full: about 30 ms in all.
const ATTEMPTS: u32 = 10;

/// The compiled shapes of one problem, ascending, with the tensors that stay.
#[derive(Debug)]
pub(super) struct Family {
    device: Arc<DeviceKernels>,
    buckets: Vec<Bucket>,
}

#[derive(Debug)]
struct Bucket {
    loaded: Arc<Loaded>,
    size: usize,
    slots: [Mutex<Slot>; 2],
}

#[derive(Debug)]
struct Slot {
    inputs: TensorSet,
    outputs: TensorSet,
}

/// A part of a call: rows `start..start + len` through one compiled shape.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    bucket: usize,
    slot: usize,
    pub(super) start: usize,
    pub(super) len: usize,
    /// Rows of the compiled shape.
    pub(super) size: usize,
}

impl Piece {
    /// Number of its shape in the family.
    pub(super) fn bucket(&self) -> usize {
        self.bucket
    }
}

impl Family {
    /// Loads the kernels; `by` is the dimension that calls vary in.
    pub(super) fn new(
        device: &Arc<DeviceKernels>,
        kernels: &[&CompiledKernel],
        by: &str,
        resident: &[(&str, Arc<Tensor>)],
    ) -> Result<Family> {
        let mut buckets = Vec::new();
        for kernel in kernels {
            let loaded = device.load(kernel)?;
            let slot = |slot| -> Result<Mutex<Slot>> {
                let [inputs, outputs] = loaded.sets(device, slot, resident)?;
                Ok(Mutex::new(Slot { inputs, outputs }))
            };
            let slots = [slot(0)?, slot(1)?];
            buckets.push(Bucket { slots, size: kernel.dim(by), loaded });
        }
        Ok(Family { device: Arc::clone(device), buckets })
    }

    /// Cuts `rows` into pieces: the smallest shape that holds what is left, else the largest.
    pub(super) fn pieces(&self, rows: usize) -> Vec<Piece> {
        let sizes: Vec<usize> = self.buckets.iter().map(|b| b.size).collect();
        self.pieces_within(rows, &sizes)
    }

    /// As [`Family::pieces`], with at most `caps[i]` rows through shape i; one cap at least is not 0.
    pub(super) fn pieces_within(&self, rows: usize, caps: &[usize]) -> Vec<Piece> {
        let largest = (0..caps.len()).max_by_key(|i| caps[*i]).unwrap_or(0);
        let (mut pieces, mut start) = (Vec::new(), 0);
        while start < rows {
            let left = rows - start;
            let bucket = caps.iter().position(|cap| *cap >= left).unwrap_or(largest);
            let (cap, size) = (caps.get(bucket).copied().unwrap_or(0), self.buckets.get(bucket).map_or(0, |b| b.size));
            if cap == 0 {
                break;
            }
            let len = cap.min(left);
            pieces.push(Piece { bucket, slot: pieces.len() % 2, start, len, size });
            start += len;
        }
        pieces
    }

    /// Rows of the largest shape.
    pub(super) fn largest(&self) -> usize {
        self.buckets.last().map_or(0, |b| b.size)
    }

    /// Whether the kernel of a piece has such an input or output.
    pub(super) fn has(&self, piece: &Piece, name: &str) -> bool {
        self.buckets.get(piece.bucket).is_some_and(|b| b.loaded.has(name))
    }

    /// The call's own tensor of a piece.
    pub(super) fn tensor(&self, piece: &Piece, name: &str) -> Result<Arc<Tensor>> {
        let missing = || Error::index("compiled shape", 0, piece.bucket, self.buckets.len());
        self.buckets.get(piece.bucket).ok_or_else(missing)?.loaded.io(&self.device, name, piece.slot)
    }

    fn execute(&self, piece: &Piece) -> Result<()> {
        let missing = || Error::index("compiled shape", 0, piece.bucket, self.buckets.len());
        let bucket = self.buckets.get(piece.bucket).ok_or_else(missing)?;
        let mut slot = bucket.slots[piece.slot].lock().unwrap_or_else(PoisonError::into_inner);
        let Slot { inputs, outputs } = &mut *slot;
        Ok(retry(ATTEMPTS, || bucket.loaded.model.execute(inputs, outputs))?)
    }

    /// Writes, executes and reads every piece. While one executes, the next is written and the one before is read.
    pub(super) fn run(
        &self,
        pieces: &[Piece],
        mut write: impl FnMut(&Piece) -> Result<()>,
        mut read: impl FnMut(&Piece) -> Result<()>,
    ) -> Result<()> {
        let _turn = self.device.turn();
        if let [piece] = pieces {
            write(piece)?;
            self.execute(piece)?;
            return read(piece);
        }
        std::thread::scope(|scope| {
            let mut before = None;
            for piece in pieces {
                write(piece)?;
                let done = finish(before.take())?;
                before = Some((piece, scope.spawn(|| self.execute(piece))));
                done.map_or(Ok(()), &mut read)?;
            }
            finish(before)?.map_or(Ok(()), &mut read)
        })
    }
}

/// Waits for a piece that executes.
fn finish<'a>(
    running: Option<(&'a Piece, std::thread::ScopedJoinHandle<'_, Result<()>>)>,
) -> Result<Option<&'a Piece>> {
    let Some((piece, thread)) = running else { return Ok(None) };
    let panicked = |_| Err(Error::Device { problem: "the thread that executed a kernel panicked".into() });
    thread.join().unwrap_or_else(panicked)?;
    Ok(Some(piece))
}
