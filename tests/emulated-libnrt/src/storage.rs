//! Device memory: bytes of one allocation, shared by its tensor and the slices of it.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// What fresh memory holds: the runtime promises nothing about it, so it is not zero.
const FRESH: u8 = 0xA5;
/// What an output holds after an execution that failed while running.
pub(crate) const SPOILT: u8 = 0x5A;

/// Bytes that one core uses.
pub(crate) type Meter = Arc<AtomicU64>;

/// One allocation.
pub(crate) struct Storage {
    /// Order in which locks are taken, and the address that `nrt_tensor_get_va` invents.
    pub(crate) id: u64,
    bytes: RwLock<Vec<u8>>,
    size: u64,
    meter: Meter,
}

impl Storage {
    /// Allocates; `None` if the core or the host has not that much.
    pub(crate) fn new(id: u64, size: usize, meter: &Meter, limit: u64) -> Option<Arc<Storage>> {
        let wanted = size as u64;
        let fits = |used: u64| used.checked_add(wanted).filter(|&n| n <= limit);
        meter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).ok()?;
        let mut bytes = Vec::new();
        let storage = |bytes| Storage { id, bytes: RwLock::new(bytes), size: wanted, meter: meter.clone() };
        if bytes.try_reserve_exact(size).is_err() {
            drop(storage(Vec::new())); // gives the metered bytes back
            return None;
        }
        bytes.resize(size, FRESH);
        Some(Arc::new(storage(bytes)))
    }

    /// The bytes, to read. Waits while an execution or copy writes them, as the runtime waits for in-flight use.
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, Vec<u8>> {
        self.bytes.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bytes, to write.
    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, Vec<u8>> {
        self.bytes.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        self.meter.fetch_sub(self.size, Ordering::Relaxed);
    }
}

/// Some bytes of an allocation; always inside it.
#[derive(Clone)]
pub(crate) struct Span {
    pub(crate) storage: Arc<Storage>,
    pub(crate) offset: usize,
    pub(crate) size: usize,
}

impl Span {
    /// `size` bytes at `offset` of this span, if they lie inside.
    pub(crate) fn part(&self, offset: u64, size: u64) -> Option<Span> {
        let end = offset.checked_add(size)?;
        if end > self.size as u64 {
            return None;
        }
        // Both are at most self.size, which is a usize.
        Some(Span { storage: self.storage.clone(), offset: self.offset + offset as usize, size: size as usize })
    }

    /// Its place in the storage.
    pub(crate) fn range(&self) -> std::ops::Range<usize> {
        self.offset..self.offset + self.size
    }

    /// Whether the two are the very same bytes.
    pub(crate) fn is(&self, other: &Span) -> bool {
        self.storage.id == other.storage.id && self.range() == other.range()
    }

    /// Whether the two share a byte.
    pub(crate) fn overlaps(&self, other: &Span) -> bool {
        self.storage.id == other.storage.id && self.offset < other.range().end && other.offset < self.range().end
    }

    /// Copies these bytes to `to`, which is as long.
    pub(crate) fn copy_to(&self, to: &Span) {
        if self.storage.id == to.storage.id {
            self.storage.write().copy_within(self.range(), to.offset);
        } else if self.storage.id < to.storage.id {
            let (from, mut into) = (self.storage.read(), to.storage.write());
            into[to.range()].copy_from_slice(&from[self.range()]);
        } else {
            // Locks are taken in the order of ids everywhere, so that two copies never wait for each other.
            let (mut into, from) = (to.storage.write(), self.storage.read());
            into[to.range()].copy_from_slice(&from[self.range()]);
        }
    }
}
