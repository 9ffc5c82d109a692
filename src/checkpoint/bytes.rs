//! The bytes of a file, wherever they live.
#![forbid(unsafe_code)]

use super::bad;
use crate::error::{Error, Result};
use half::{bf16, f16};
use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;

/// A file's bytes: a memory map, a vector, or a caller's own buffer.
pub(super) struct Bytes(Box<dyn AsRef<[u8]> + Send + Sync>);

impl Bytes {
    pub(super) fn new(bytes: impl AsRef<[u8]> + Send + Sync + 'static) -> Self {
        Bytes(Box::new(bytes))
    }

    /// Reads a regular file into memory.
    pub(super) fn read(path: &Path) -> Result<Self> {
        regular(path)?;
        std::fs::read(path).map(Bytes::new).map_err(|e| Error::io(path, &e))
    }

    pub(super) fn all(&self) -> &[u8] {
        (*self.0).as_ref()
    }

    /// A range that was checked when the file was opened; refused all the same if the caller's buffer has shrunk since.
    pub(super) fn get(&self, at: &str, range: Range<usize>) -> Result<&[u8]> {
        self.all().get(range).ok_or_else(|| bad(at, "the buffer became shorter after it was opened"))
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.all().len())
    }
}

/// Refuses folders, pipes and devices: reading one could block for ever or never end.
pub(super) fn regular(path: &Path) -> Result<()> {
    let meta = std::fs::metadata(path).map_err(|e| Error::io(path, &e))?;
    if meta.is_file() { Ok(()) } else { Err(bad(path.display().to_string(), "not a regular file")) }
}

/// Little-endian f32: borrowed where aligned, copied where not.
pub(super) fn f32s(bytes: &[u8]) -> Cow<'_, [f32]> {
    if cfg!(target_endian = "little")
        && let Ok(values) = bytemuck::try_cast_slice(bytes)
    {
        return Cow::Borrowed(values);
    }
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// Little-endian bf16 as f32 (exact).
pub(super) fn bf16s(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect()
}

/// Little-endian f16 as f32 (exact).
pub(super) fn f16s(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect()
}
