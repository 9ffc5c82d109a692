//! A reading position in a byte slice. Nothing is believed: each read checks what is left.
#![forbid(unsafe_code)]

use super::bad;
use crate::error::Result;

/// Longest name of a key or tensor, in bytes: the specification's limit for keys.
const MAX_NAME: usize = 65535;

#[derive(Debug)]
pub(super) struct Cursor<'a> {
    /// The file, for messages.
    at: &'a str,
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(at: &'a str, bytes: &'a [u8]) -> Self {
        Cursor { at, bytes, position: 0 }
    }

    /// The same position, to look ahead from.
    pub(super) fn fork(&self) -> Self {
        Cursor { ..*self }
    }

    /// Bytes read so far.
    pub(super) fn position(&self) -> usize {
        self.position
    }

    /// Passes over `len` bytes.
    pub(super) fn skip(&mut self, len: usize) -> Result<()> {
        self.take(len as u64, "metadata").map(|_| ())
    }

    /// The next `len` bytes, `what` they are.
    pub(super) fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8]> {
        let rest = self.bytes.get(self.position..).unwrap_or_default();
        let taken = usize::try_from(len).ok().and_then(|len| rest.get(..len)).ok_or_else(|| {
            bad(self.at, format!("{what} of {len} bytes at byte {} ends outside the file", self.position))
        })?;
        self.position += taken.len();
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let bytes = self.take(N as u64, what)?;
        bytes.first_chunk().copied().ok_or_else(|| bad(self.at, format!("{what} is cut short")))
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A string: its length in bytes, then the bytes.
    pub(super) fn string(&mut self, what: &str) -> Result<&'a [u8]> {
        let len = self.u64(what)?;
        self.take(len, what)
    }

    /// The name of a key or tensor.
    pub(super) fn name(&mut self, what: &str) -> Result<&'a str> {
        let start = self.position;
        let bytes = self.string(what)?;
        if bytes.len() > MAX_NAME {
            return Err(bad(self.at, format!("{what} at byte {start} has {} bytes, at most {MAX_NAME}", bytes.len())));
        }
        std::str::from_utf8(bytes).map_err(|_| bad(self.at, format!("{what} at byte {start} is not UTF-8")))
    }

    /// A problem at this position.
    pub(super) fn problem<T>(&self, problem: impl Into<String>) -> Result<T> {
        Err(bad(self.at, problem))
    }
}
