//! Calls on tensors.

use super::{Inner, lock};
use crate::neuron::error::{NeuronError, Result};
use crate::neuron::storage::{Ranges, Storage};
use crate::neuron::{Read, Write, sys};
use std::ffi::{CStr, c_void};
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A tensor in device memory, or a view of a part of one.
#[derive(Debug)]
pub(in crate::neuron) struct TensorHandle {
    runtime: Arc<Inner>,
    pointer: NonNull<sys::Tensor>,
    /// What this and its views lie in.
    storage: Arc<Storage>,
    /// First byte within the storage.
    start: usize,
    len: usize,
    name: String,
}

// SAFETY: a tensor belongs to the process and not to a thread; the guide writes, runs and reads from different threads.
unsafe impl Send for TensorHandle {}
// SAFETY: the guide promises nothing for two calls on one tensor at once: every call through a shared reference holds the lock of
// the tensor's storage, or `Inner::manage`, or (execution) is documented beside any other.
unsafe impl Sync for TensorHandle {}

impl TensorHandle {
    /// `len` is not 0 and within the version's limit: the caller has checked.
    pub(in crate::neuron) fn allocate(
        runtime: &Arc<Inner>,
        core: u32,
        len: usize,
        name: String,
        c_name: &CStr,
    ) -> Result<Self> {
        runtime.enter()?;
        let core = runtime.core(core)?;
        let alone = lock(&runtime.manage);
        let mut pointer = ptr::null_mut();
        // SAFETY: the library is initialised (`enter`, and `runtime` keeps it so); the name ends with a NUL and is needed
        // during the call only; the out-pointer is a variable of our own.
        let status = unsafe {
            (runtime.api().nrt_tensor_allocate)(sys::PLACEMENT_DEVICE, core, len, c_name.as_ptr(), &mut pointer)
        };
        runtime.check("nrt_tensor_allocate", status)?;
        let pointer = Inner::given("nrt_tensor_allocate", pointer)?;
        let tensor = TensorHandle {
            runtime: Arc::clone(runtime),
            pointer,
            storage: Arc::new(Storage::default()),
            start: 0,
            len,
            name,
        };
        drop(alone); // an early return below drops the tensor, and that locks
        tensor.large_enough()
    }

    /// A view of `len` (not 0) bytes of this tensor.
    pub(in crate::neuron) fn slice(&self, offset: usize, len: usize, name: String, c_name: &CStr) -> Result<Self> {
        let range = self.range(offset, len)?;
        self.runtime.enter()?;
        let alone = lock(&self.runtime.manage);
        let held = self.storage.lock();
        let mut pointer = ptr::null_mut();
        // SAFETY: the tensor is alive, as this value owns it, and the range is within it; nobody else uses its storage or
        // allocates now; the name ends with a NUL; the out-pointer is a variable of our own.
        let status = unsafe {
            (self.runtime.api().nrt_tensor_allocate_slice)(
                self.pointer.as_ptr(),
                offset,
                len,
                c_name.as_ptr(),
                &mut pointer,
            )
        };
        drop((held, alone));
        self.runtime.check("nrt_tensor_allocate_slice", status)?;
        let pointer = Inner::given("nrt_tensor_allocate_slice", pointer)?;
        let (runtime, storage) = (Arc::clone(&self.runtime), Arc::clone(&self.storage));
        TensorHandle { runtime, pointer, storage, start: range.start, len, name }.large_enough()
    }

    /// The tensor, if the library agrees that it holds its bytes.
    fn large_enough(self) -> Result<Self> {
        // SAFETY: the tensor is alive, as this value owns it, and new: nobody else has it.
        let size = unsafe { (self.runtime.api().nrt_tensor_get_size)(self.pointer.as_ptr()) };
        if size >= self.len {
            return Ok(self);
        }
        let problem = format!("{} holds {size} bytes, {} were asked for", self.name, self.len);
        Err(NeuronError::Answer { op: "nrt_tensor_get_size", problem })
    }

    pub(in crate::neuron) fn runtime(&self) -> &Arc<Inner> {
        &self.runtime
    }

    pub(super) fn pointer(&self) -> NonNull<sys::Tensor> {
        self.pointer
    }

    /// Whether the two have a byte in common.
    pub(in crate::neuron) fn overlaps(&self, other: &TensorHandle) -> bool {
        let (a, b) = (self.whole(), other.whole());
        Arc::ptr_eq(&self.storage, &other.storage) && a.start < b.end && b.start < a.end
    }

    /// Changes what is known of all its bytes.
    pub(super) fn change(&self, change: fn(&mut Ranges, Range<usize>)) {
        change(&mut self.storage.lock(), self.whole());
    }

    pub(in crate::neuron) fn name(&self) -> &str {
        &self.name
    }

    pub(in crate::neuron) fn len(&self) -> usize {
        self.len
    }

    /// A range of this tensor as one of its storage, if the tensor has it.
    fn range(&self, offset: usize, len: usize) -> Result<Range<usize>> {
        match offset.checked_add(len) {
            // `start + self.len` is within the storage, so the sums fit.
            Some(end) if end <= self.len => Ok(self.start + offset..self.start + end),
            _ => Err(NeuronError::OutOfBounds { tensor: self.name.clone(), offset, len, size: self.len }),
        }
    }

    fn whole(&self) -> Range<usize> {
        self.start..self.start + self.len
    }

    /// Asks that no failed execution was to write any of it.
    pub(super) fn trusted(&self) -> Result<()> {
        self.trusted_in(&self.storage.lock(), &self.whole())
    }

    fn trusted_in(&self, untrusted: &Ranges, range: &Range<usize>) -> Result<()> {
        if untrusted.overlaps(range) { Err(NeuronError::Untrusted { tensor: self.name.clone() }) } else { Ok(()) }
    }

    pub(in crate::neuron) fn write(&self, offset: usize, bytes: &[u8]) -> Result<()> {
        let range = self.range(offset, bytes.len())?;
        self.runtime.enter()?;
        if bytes.is_empty() {
            return Ok(());
        }
        let mut held = self.storage.lock();
        // SAFETY: the tensor is alive, as this value owns it; the range is within it; the bytes are ours for that length; the
        // call blocks until it has read them; nobody else uses the storage, as its lock is held.
        let status = unsafe {
            (self.runtime.api().nrt_tensor_write)(self.pointer.as_ptr(), bytes.as_ptr().cast(), offset, bytes.len())
        };
        self.runtime.check("nrt_tensor_write", status)?;
        held.remove(range);
        self.runtime.to_device.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    pub(in crate::neuron) fn read(&self, offset: usize, into: &mut [u8]) -> Result<()> {
        let range = self.range(offset, into.len())?;
        self.runtime.enter()?;
        if into.is_empty() {
            return Ok(());
        }
        let held = self.storage.lock();
        self.trusted_in(&held, &range)?;
        // SAFETY: the tensor is alive, as this value owns it; the range is within it; the buffer is ours alone for that length;
        // the call blocks until it is filled; nobody else uses the storage, as its lock is held.
        let status = unsafe {
            (self.runtime.api().nrt_tensor_read)(self.pointer.as_ptr(), into.as_mut_ptr().cast(), offset, into.len())
        };
        self.runtime.check("nrt_tensor_read", status)?;
        self.runtime.from_device.fetch_add(into.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    pub(in crate::neuron) fn fill(&self, byte: u8) -> Result<()> {
        self.runtime.enter()?;
        let mut held = self.storage.lock();
        // SAFETY: the tensor is alive, as this value owns it; all of it is filled; nobody else uses the storage.
        let status =
            unsafe { (self.runtime.api().nrt_tensor_memset)(self.pointer.as_ptr(), 0, i32::from(byte), self.len) };
        self.runtime.check("nrt_tensor_memset", status)?;
        held.remove(self.whole());
        Ok(())
    }

    /// Device to device. Both are on one core of this runtime: the caller has checked.
    pub(in crate::neuron) fn copy(&self, offset: usize, to: &TensorHandle, to_offset: usize, len: usize) -> Result<()> {
        let (from_range, to_range) = (self.range(offset, len)?, to.range(to_offset, len)?);
        self.runtime.enter()?;
        if len == 0 {
            return Ok(());
        }
        let one = Arc::ptr_eq(&self.storage, &to.storage);
        if one && from_range.start < to_range.end && to_range.start < from_range.end {
            return Err(NeuronError::Overlap { from: self.name.clone(), to: to.name.clone() });
        }
        let mut held = Storage::lock_all([&self.storage, &to.storage]);
        Storage::among(&mut held, &self.storage).map_or(Ok(()), |r| self.trusted_in(r, &from_range))?;
        // SAFETY: both tensors are alive, as the values own them; the ranges are within them and do not overlap; nobody else
        // uses either storage, as their locks are held.
        let status = unsafe {
            (self.runtime.api().nrt_tensor_copy)(self.pointer.as_ptr(), offset, to.pointer.as_ptr(), to_offset, len)
        };
        self.runtime.check("nrt_tensor_copy", status)?;
        if let Some(untrusted) = Storage::among(&mut held, &to.storage) {
            untrusted.remove(to_range);
        }
        Ok(())
    }

    /// Where the device sees it, for registration with a network card. Not an address of this process's memory.
    pub(in crate::neuron) fn device_address(&self) -> Result<Option<u64>> {
        self.runtime.enter()?;
        let _held = self.storage.lock();
        // SAFETY: the tensor is alive, as this value owns it; the answer is taken as a number and never followed.
        let address = unsafe { (self.runtime.api().nrt_tensor_get_va)(self.pointer.as_ptr()) };
        Ok(NonNull::new(address).map(|a| a.addr().get() as u64))
    }

    fn batch(&self, op: &sys::TensorBatchOp) -> sys::TensorBatch {
        sys::TensorBatch { tensor: self.pointer.as_ptr(), ops: op, num_ops: 1 }
    }
}

/// Several writes, in one call where the library has it. All are checked before any is made.
pub(in crate::neuron) fn write_batch(runtime: &Arc<Inner>, writes: &[Write<'_>]) -> Result<()> {
    let ranges: Vec<_> =
        writes.iter().map(|w| w.tensor.handle.range(w.offset, w.bytes.len())).collect::<Result<_>>()?;
    if let Some(w) = writes.iter().find(|w| !Arc::ptr_eq(&w.tensor.handle.runtime, runtime)) {
        return Err(NeuronError::OtherRuntime { tensor: w.tensor.name().into() });
    }
    let Some(call) = runtime.api().nrt_tensor_write_batch else {
        return writes.iter().try_for_each(|w| w.tensor.write(w.offset, w.bytes));
    };
    runtime.enter()?;
    let full = || writes.iter().filter(|w| !w.bytes.is_empty());
    let ops: Vec<_> = full().map(|w| batch_op(w.offset, w.bytes.len(), w.bytes.as_ptr().cast_mut().cast())).collect();
    let batches: Vec<_> = full().zip(&ops).map(|(w, op)| w.tensor.handle.batch(op)).collect();
    if batches.is_empty() {
        return Ok(());
    }
    let mut held = Storage::lock_all(writes.iter().map(|w| &w.tensor.handle.storage));
    // SAFETY: as many batches as passed, each with one operation that lives until the call returns; each tensor is alive, as it
    // is borrowed; each range is within its tensor; the bytes are only read; the locks of all storages are held;
    // `false` keeps the runtime's own wait for executions under way.
    let status = unsafe { call(batches.as_ptr(), batches.len() as u64, false) };
    runtime.check("nrt_tensor_write_batch", status)?;
    for (w, range) in writes.iter().zip(ranges) {
        if let Some(untrusted) = Storage::among(&mut held, &w.tensor.handle.storage) {
            untrusted.remove(range);
        }
    }
    let bytes: u64 = ops.iter().map(|op| op.size).sum();
    runtime.to_device.fetch_add(bytes, Ordering::Relaxed);
    Ok(())
}

/// Several reads, in one call where the library has it. All are checked before any is made.
pub(in crate::neuron) fn read_batch(runtime: &Arc<Inner>, reads: &mut [Read<'_>]) -> Result<()> {
    let ranges: Vec<_> = reads.iter().map(|r| r.tensor.handle.range(r.offset, r.into.len())).collect::<Result<_>>()?;
    if let Some(r) = reads.iter().find(|r| !Arc::ptr_eq(&r.tensor.handle.runtime, runtime)) {
        return Err(NeuronError::OtherRuntime { tensor: r.tensor.name().into() });
    }
    let Some(call) = runtime.api().nrt_tensor_read_batch else {
        return reads.iter_mut().try_for_each(|r| r.tensor.read(r.offset, r.into));
    };
    runtime.enter()?;
    let ops: Vec<_> = reads.iter_mut().map(|r| batch_op(r.offset, r.into.len(), r.into.as_mut_ptr().cast())).collect();
    let full = reads.iter().zip(&ops).filter(|(_, op)| op.size > 0);
    let batches: Vec<_> = full.map(|(r, op)| r.tensor.handle.batch(op)).collect();
    if batches.is_empty() {
        return Ok(());
    }
    let mut held = Storage::lock_all(reads.iter().map(|r| &r.tensor.handle.storage));
    for (r, range) in reads.iter().zip(&ranges) {
        Storage::among(&mut held, &r.tensor.handle.storage).map_or(Ok(()), |u| r.tensor.handle.trusted_in(u, range))?;
    }
    // SAFETY: as for writes; the buffers are ours alone, as `Read` borrows them mutably, so no two overlap.
    let status = unsafe { call(batches.as_ptr(), batches.len() as u64, false) };
    runtime.check("nrt_tensor_read_batch", status)?;
    let bytes: u64 = ops.iter().map(|op| op.size).sum();
    runtime.from_device.fetch_add(bytes, Ordering::Relaxed);
    Ok(())
}

fn batch_op(offset: usize, len: usize, buffer: *mut c_void) -> sys::TensorBatchOp {
    sys::TensorBatchOp { offset: offset as u64, size: len as u64, buffer }
}

impl Drop for TensorHandle {
    fn drop(&mut self) {
        if self.runtime.enter().is_err() {
            return;
        }
        let _alone = lock(&self.runtime.manage);
        let _held = self.storage.lock();
        let mut pointer = self.pointer.as_ptr();
        // SAFETY: allocated by the library, owned by this value alone, freed here once; no set names it, as sets hold an `Arc`
        // of their members until they are destroyed. Views and sources may go in any order: the library counts.
        unsafe { (self.runtime.api().nrt_tensor_free)(&mut pointer) };
    }
}
