//! What the handles of one piece of device memory share: a lock, and which bytes a failed execution left in doubt.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Byte ranges, disjoint and in no order. Nearly always none.
#[derive(Debug, Default)]
pub(super) struct Ranges(Vec<Range<usize>>);

impl Ranges {
    /// Whether any byte of `range` is in one.
    pub(super) fn overlaps(&self, range: &Range<usize>) -> bool {
        !range.is_empty() && self.0.iter().any(|r| r.start < range.end && range.start < r.end)
    }

    /// Adds a range.
    pub(super) fn add(&mut self, range: Range<usize>) {
        self.remove(range.clone());
        if !range.is_empty() {
            self.0.push(range);
        }
    }

    /// Takes a range out, from whatever it overlaps.
    pub(super) fn remove(&mut self, range: Range<usize>) {
        if !self.overlaps(&range) {
            return;
        }
        let pieces = std::mem::take(&mut self.0).into_iter().flat_map(|r| {
            let before = r.start..r.end.min(range.start);
            let behind = r.start.max(range.end)..r.end;
            [before, behind]
        });
        self.0 = pieces.filter(|r| !r.is_empty()).collect();
    }
}

/// One allocation in device memory. Its lock is held during every call on a tensor that lies in it.
#[derive(Debug, Default)]
pub(super) struct Storage(Mutex<Ranges>);

/// Locks of several storages.
pub(super) type Held<'a> = Vec<(*const Storage, MutexGuard<'a, Ranges>)>;

impl Storage {
    /// Waits for the lock.
    pub(super) fn lock(&self) -> MutexGuard<'_, Ranges> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks each storage once, all callers in the same order, so that none waits for another in a circle.
    pub(super) fn lock_all<'a>(storages: impl IntoIterator<Item = &'a Arc<Storage>>) -> Held<'a> {
        let mut all: Vec<&Storage> = storages.into_iter().map(|s| &**s).collect();
        all.sort_by_key(|s| std::ptr::from_ref(*s));
        all.dedup_by_key(|s| std::ptr::from_ref(*s));
        all.into_iter().map(|s| (std::ptr::from_ref(s), s.lock())).collect()
    }

    /// The ranges of one of the storages that are held.
    pub(super) fn among<'h>(held: &'h mut Held<'_>, storage: &Arc<Storage>) -> Option<&'h mut Ranges> {
        held.iter_mut().find(|(s, _)| *s == Arc::as_ptr(storage)).map(|(_, guard)| &mut **guard)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Against a flag for each byte.
        #[test]
        fn ranges_are_a_set_of_bytes(ops in prop::collection::vec((any::<bool>(), 0usize..40, 0usize..12), 0..30)) {
            let (mut ranges, mut bytes) = (Ranges::default(), [false; 64]);
            for (add, start, len) in ops {
                if add { ranges.add(start..start + len) } else { ranges.remove(start..start + len) }
                bytes[start..start + len].fill(add);
                for (at, byte) in bytes.iter().enumerate() {
                    prop_assert_eq!(ranges.overlaps(&(at..at + 1)), *byte);
                }
                prop_assert!(ranges.0.iter().all(|r| !r.is_empty()));
            }
        }
    }

    #[test]
    fn one_storage_twice_is_locked_once() {
        let (a, b) = (Arc::new(Storage::default()), Arc::new(Storage::default()));
        let mut held = Storage::lock_all([&b, &a, &b]);
        assert_eq!(held.len(), 2);
        assert!(Storage::among(&mut held, &a).is_some() && a.0.try_lock().is_err());
        drop(held);
        assert!(a.0.try_lock().is_ok());
    }
}
