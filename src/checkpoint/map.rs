//! Memory-mapped opening: the only unsafe code of the module.
#![allow(unsafe_code)] // a mapped file is memory that others can change; only the caller can promise that they do not

use super::bytes::{Bytes, regular};
use super::{Checkpoint, Gguf};
use crate::error::{Error, Result};
use memmap2::Mmap;
use std::fs::File;
use std::path::Path;

/// Maps a regular file for reading.
///
/// # Safety
/// Nobody may modify or truncate the file while the map lives.
unsafe fn map_file(path: &Path) -> Result<Bytes> {
    regular(path)?;
    let file = File::open(path).map_err(|e| Error::io(path, &e))?;
    // SAFETY: `Mmap::map` asks that the file's bytes do not change and that it is not truncated while the map lives, since
    // the map is handed out as `&[u8]`. That is this function's own contract, which our caller has taken on. The map is
    // private to `Bytes`, which hands out only shared slices that borrow from it, so none outlives it.
    let map = unsafe { Mmap::map(&file) };
    map.map(Bytes::new).map_err(|e| Error::io(path, &e))
}

impl Checkpoint {
    /// Opens a checkpoint as [`Checkpoint::read`] does, but maps the files: tensors are paged in when they are touched, and
    /// a 20B checkpoint costs no memory of its own.
    ///
    /// # Safety
    /// Until the returned value is dropped, nobody (in this process or another) may modify or truncate a file of the
    /// checkpoint: tensors are slices of the files themselves, changing under a shared slice is undefined behaviour, and
    /// touching a page beyond a truncated end raises a signal. Deleting or replacing a file by name (rename) is fine.
    ///
    /// # Errors
    /// As [`Checkpoint::read`].
    pub unsafe fn map(path: impl AsRef<Path>) -> Result<Self> {
        Checkpoint::open(path.as_ref(), |file| {
            // SAFETY: the caller promises for every file of the checkpoint, and `file` is one of them.
            unsafe { map_file(file) }
        })
    }
}

impl Gguf {
    /// Opens a GGUF file as [`Gguf::read`] does, but maps it.
    ///
    /// # Safety
    /// As [`Checkpoint::map`]: nobody may modify or truncate the file until the returned value is dropped.
    ///
    /// # Errors
    /// As [`Gguf::read`].
    pub unsafe fn map(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        // SAFETY: the caller promises what `map_file` asks, for this very file.
        let bytes = unsafe { map_file(path) }?;
        Gguf::parse(path.display().to_string(), bytes)
    }
}
