//! Handles: numbers that look like pointers and are never followed.
//!
//! Their address is not canonical, so a client that follows one dies at once instead of reading something. A number is never
//! given out twice, and each loaded copy of the library marks its own, so a stale, foreign or confused handle is known as such.
#![forbid(unsafe_code)]

use std::ffi::c_void;
use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::OnceLock;

/// What a handle stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Model = 1,
    Tensor = 2,
    Set = 3,
}

impl Kind {
    /// Its word in messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Model => "model",
            Kind::Tensor => "tensor",
            Kind::Set => "tensor set",
        }
    }
}

/// A handle: tag, kind, mark of this copy of the library, serial number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Handle(u64);

const TAG: u64 = 0x5A;
const SERIAL_BITS: u32 = 28;
/// Handles are as aligned as pointers from malloc would be.
const ALIGN_BITS: u32 = 4;

/// 16 random bits that tell this copy of the library from others.
fn mark() -> u64 {
    static MARK: OnceLock<u64> = OnceLock::new();
    *MARK.get_or_init(|| RandomState::new().build_hasher().finish() & 0xFFFF)
}

/// What is wrong with a pointer that should have been a live handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wrong {
    Null,
    Foreign,
    OtherCopy,
    Kind(u64),
    Stale,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Wrong::Null => f.write_str("null"),
            Wrong::Foreign => f.write_str("not a handle of this library"),
            Wrong::OtherCopy => f.write_str("a handle of another copy of this library"),
            Wrong::Kind(1) => f.write_str("the handle of a model"),
            Wrong::Kind(2) => f.write_str("the handle of a tensor"),
            Wrong::Kind(_) => f.write_str("the handle of a tensor set"),
            Wrong::Stale => f.write_str("stale: freed before, or of an earlier nrt_init"),
        }
    }
}

impl Handle {
    /// The handle with this serial number; `None` when numbers have run out.
    pub(crate) fn new(kind: Kind, serial: u64) -> Option<Handle> {
        let fits = serial < 1 << SERIAL_BITS;
        let serial = serial << ALIGN_BITS;
        fits.then_some(Handle(TAG << 56 | (kind as u64) << 48 | mark() << 32 | serial))
    }

    /// As the client sees it.
    pub(crate) fn pointer(self) -> *mut c_void {
        // usize is u64 here: libnrt exists for 64-bit Linux only.
        std::ptr::without_provenance_mut(self.0 as usize)
    }

    /// The handle behind a client's pointer, of the kind that is needed. It may be stale.
    pub(crate) fn from_pointer(pointer: *const c_void, kind: Kind) -> Result<Handle, Wrong> {
        let bits = pointer.addr() as u64;
        let aligned = bits & ((1 << ALIGN_BITS) - 1) == 0;
        let found = (bits >> 48) & 0xFF;
        if bits == 0 {
            Err(Wrong::Null)
        } else if bits >> 56 != TAG || !aligned || !(1..=3).contains(&found) {
            Err(Wrong::Foreign)
        } else if (bits >> 32) & 0xFFFF != mark() {
            Err(Wrong::OtherCopy)
        } else if found != kind as u64 {
            Err(Wrong::Kind(found))
        } else {
            Ok(Handle(bits))
        }
    }
}
