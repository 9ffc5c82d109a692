//! Bytes in device memory.
#![forbid(unsafe_code)]

use super::error::{NeuronError, Result};
use super::runtime::{TensorHandle, read_batch, write_batch};
use super::{Runtime, sys};
use std::ffi::CString;

/// Bytes in the memory of one core. What they mean is the kernel's business: the library sees none of FP4 or FP8.
///
/// Every method takes `&self` and locks: of two calls on one tensor, or on two views of one allocation, the second waits. An
/// execution that uses the tensor takes no lock: writing meanwhile tears the bytes it reads, and reading meanwhile what it writes.
///
/// After a failed execution the bytes it was to write cannot be read, copied or run on ([`NeuronError::Untrusted`]) until
/// something writes them.
#[derive(Debug)]
pub struct Tensor {
    pub(super) handle: TensorHandle,
    core: u32,
}

/// Bytes to write, for [`Runtime::write_batch`].
#[derive(Debug, Clone, Copy)]
pub struct Write<'a> {
    /// Where to.
    pub tensor: &'a Tensor,
    /// First byte within it.
    pub offset: usize,
    /// What.
    pub bytes: &'a [u8],
}

/// Bytes to read, for [`Runtime::read_batch`].
#[derive(Debug)]
pub struct Read<'a> {
    /// Where from.
    pub tensor: &'a Tensor,
    /// First byte within it.
    pub offset: usize,
    /// Filled whole.
    pub into: &'a mut [u8],
}

impl Runtime {
    /// Allocates `bytes` of a core's memory. The contents are whatever was there. The name is for the runtime's log only.
    ///
    /// # Errors
    /// [`NeuronError::Empty`], [`NeuronError::TooLarge`] (4 GiB and more before 2.30.50, where the size overflowed silently),
    /// [`NeuronError::NoSuchCore`], [`NeuronError::Name`]; [`NeuronError::Call`]: out of memory is
    /// [`Status::RESOURCE`](super::Status::RESOURCE). What [`Runtime::usable`] says.
    pub fn allocate(&self, core: u32, bytes: usize, name: &str) -> Result<Tensor> {
        let c_name = c_name(name)?;
        if bytes == 0 {
            return Err(NeuronError::Empty { tensor: name.into() });
        }
        let limit = self.version().max_tensor_bytes().unwrap_or(isize::MAX as u64);
        if bytes as u64 > limit {
            return Err(NeuronError::TooLarge { tensor: name.into(), bytes: bytes as u64, limit });
        }
        let handle = TensorHandle::allocate(&self.inner, core, bytes, name.into(), &c_name)?;
        Ok(Tensor { handle, core })
    }

    /// Several writes, in one call to the library if it has one for it (from SDK 2.26 or so). All are checked before any is made;
    /// after an error of the library some may have been.
    ///
    /// # Errors
    /// As [`Tensor::write`], and [`NeuronError::OtherRuntime`].
    pub fn write_batch(&self, writes: &[Write<'_>]) -> Result<()> {
        write_batch(&self.inner, writes)
    }

    /// Several reads, in one call to the library if it has one for it. All are checked before any is made; after an error of the
    /// library some may have been.
    ///
    /// # Errors
    /// As [`Tensor::read`], and [`NeuronError::OtherRuntime`].
    pub fn read_batch(&self, reads: &mut [Read<'_>]) -> Result<()> {
        read_batch(&self.inner, reads)
    }
}

impl Tensor {
    /// Writes `bytes` from byte `offset` on. Returns when they are there.
    ///
    /// # Errors
    /// [`NeuronError::OutOfBounds`] before anything is written; [`NeuronError::Call`]; what [`Runtime::usable`] says.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<()> {
        self.handle.write(offset, bytes)
    }

    /// Fills `into` with the bytes from byte `offset` on.
    ///
    /// # Errors
    /// [`NeuronError::OutOfBounds`] and [`NeuronError::Untrusted`] before anything is read; [`NeuronError::Call`], after which
    /// `into` holds no one knows what; what [`Runtime::usable`] says.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> Result<()> {
        self.handle.read(offset, into)
    }

    /// Sets every byte.
    ///
    /// # Errors
    /// [`NeuronError::Call`]; what [`Runtime::usable`] says.
    pub fn fill(&self, byte: u8) -> Result<()> {
        self.handle.fill(byte)
    }

    /// A view of `len` bytes from byte `offset` on: the same memory, a tensor of its own. Either may be dropped first.
    ///
    /// # Errors
    /// [`NeuronError::Empty`], [`NeuronError::OutOfBounds`], [`NeuronError::Name`], [`NeuronError::Call`]; what
    /// [`Runtime::usable`] says.
    pub fn slice(&self, offset: usize, len: usize, name: &str) -> Result<Tensor> {
        let c_name = c_name(name)?;
        if len == 0 {
            return Err(NeuronError::Empty { tensor: name.into() });
        }
        Ok(Tensor { handle: self.handle.slice(offset, len, name.into(), &c_name)?, core: self.core })
    }

    /// Copies `len` bytes to another tensor of the same core, on the device.
    ///
    /// # Errors
    /// [`NeuronError::OtherRuntime`], [`NeuronError::WrongCore`], [`NeuronError::OutOfBounds`], [`NeuronError::Overlap`] (within
    /// one allocation), [`NeuronError::Untrusted`] before anything is copied; [`NeuronError::Call`]; what [`Runtime::usable`]
    /// says.
    pub fn copy_to(&self, offset: usize, to: &Tensor, to_offset: usize, len: usize) -> Result<()> {
        if !std::sync::Arc::ptr_eq(self.handle.runtime(), to.handle.runtime()) {
            return Err(NeuronError::OtherRuntime { tensor: to.name().into() });
        }
        if self.core != to.core {
            return Err(NeuronError::WrongCore { tensor: to.name().into(), got: to.core, needed: self.core });
        }
        self.handle.copy(offset, &to.handle, to_offset, len)
    }

    /// Where devices see it, for registration with a network card; `None` if the library does not say. Not an address of
    /// this process.
    ///
    /// # Errors
    /// What [`Runtime::usable`] says.
    pub fn device_address(&self) -> Result<Option<u64>> {
        self.handle.device_address()
    }

    /// Bytes; never 0.
    #[allow(clippy::len_without_is_empty)] // it never is
    pub fn len(&self) -> usize {
        self.handle.len()
    }

    /// The core whose memory it is in, counted within the visible ones.
    pub fn core(&self) -> u32 {
        self.core
    }

    /// The name it was given.
    pub fn name(&self) -> &str {
        self.handle.name()
    }
}

/// A name as C wants it.
pub(super) fn c_name(name: &str) -> Result<CString> {
    let refused = |problem| NeuronError::Name { name: name.into(), problem };
    if name.len() > sys::TENSOR_NAME_MAX {
        return Err(refused("more than 256 bytes"));
    }
    CString::new(name).map_err(|_| refused("a NUL in it"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        assert_eq!(c_name("x:0/y").unwrap().to_bytes(), b"x:0/y");
        assert!(matches!(c_name("a\0b"), Err(NeuronError::Name { problem: "a NUL in it", .. })));
        assert!(c_name(&"n".repeat(256)).is_ok() && c_name(&"n".repeat(257)).is_err());
    }

    /// Compile-time: what may cross threads.
    #[test]
    fn threads() {
        fn both<T: Send + Sync>() {}
        fn send<T: Send>() {}
        both::<Runtime>();
        both::<super::super::Model>();
        both::<Tensor>();
        both::<super::super::Library>();
        send::<super::super::TensorSet>();
    }
}
