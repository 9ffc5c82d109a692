//! The caller's memory: every read and write through a pointer that came from C.
//!
//! Null, misaligned and absurdly long are answered; that a pointer is otherwise what the header says is the caller's promise.

use crate::abi::{NAME_MAX, status};
use crate::calls::{Outcome, refuse, violate};
use std::ffi::{c_char, c_void};

fn check<T>(pointer: *const T, what: &str) -> Outcome<()> {
    if pointer.is_null() {
        return violate(status::INVALID, format!("{what} is null"));
    }
    if !pointer.is_aligned() {
        return violate(status::INVALID, format!("{what} is not aligned"));
    }
    Ok(())
}

/// Writes a result.
///
/// # Safety
/// `out` is null, misaligned or valid for writing one `T`.
pub(crate) unsafe fn put<T>(out: *mut T, value: T, what: &str) -> Outcome<()> {
    check(out, what)?;
    // SAFETY: `check` excluded null and misaligned, so by this function's contract it is valid for one write.
    unsafe { out.write(value) };
    Ok(())
}

/// Reads a value.
///
/// # Safety
/// `from` is null, misaligned or valid for reading one initialised `T`.
pub(crate) unsafe fn get<T: Copy>(from: *const T, what: &str) -> Outcome<T> {
    check(from, what)?;
    // SAFETY: `check` excluded null and misaligned, so by this function's contract it is valid for one read.
    Ok(unsafe { from.read() })
}

/// The caller's bytes, to read. An empty piece may have any pointer.
///
/// # Safety
/// `from` is null or valid for reading `len` bytes that nobody changes while the slice is in use.
pub(crate) unsafe fn bytes<'a>(from: *const c_void, len: usize, what: &str) -> Outcome<&'a [u8]> {
    if len == 0 {
        return Ok(&[]);
    }
    check(from.cast::<u8>(), what)?;
    if isize::try_from(len).is_err() {
        return violate(status::INVALID, format!("{what}: {len} bytes are more than memory has"));
    }
    // SAFETY: not null, u8 needs no alignment, at most isize::MAX long, and readable by this function's contract.
    Ok(unsafe { std::slice::from_raw_parts(from.cast(), len) })
}

/// Copies bytes to the caller. Nothing is written if `out` is null and there is something to write.
///
/// # Safety
/// `out` is null or valid for writing `from.len()` bytes, and does not overlap `from`.
pub(crate) unsafe fn copy_out(from: &[u8], out: *mut c_void, what: &str) -> Outcome<()> {
    if from.is_empty() {
        return Ok(());
    }
    check(out.cast::<u8>(), what)?;
    // SAFETY: `from` is readable as a slice; `out` is not null and so writable and apart by this function's contract.
    unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), out.cast(), from.len()) };
    Ok(())
}

/// A C string's bytes, without the NUL: at most 255, as every name of libnrt.
///
/// # Safety
/// `from` is null or points to bytes that are readable up to and including the first NUL, or 256 of them.
pub(crate) unsafe fn name(from: *const c_char, what: &str) -> Outcome<Vec<u8>> {
    check(from, what)?;
    let mut name = vec![];
    for i in 0..NAME_MAX {
        let at = from.wrapping_add(i);
        // SAFETY: `i` is below 256 and no NUL was met before it, so by this function's contract the byte is readable.
        match unsafe { at.read() } {
            0 => return Ok(name),
            c => name.push(c as u8),
        }
    }
    refuse(status::INVALID, format!("{what} is longer than {} bytes", NAME_MAX - 1))
}
