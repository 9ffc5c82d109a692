//! The one error type. Every message names the operand, the axis, what was got and what is needed.
#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::fmt;

/// Name of an operand, tensor or file in a message.
pub type Name = Cow<'static, str>;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call was refused. Nothing has been written to any output when one is returned, unless the function says otherwise.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Error {
    /// A slice has another length than its extents need.
    Length {
        /// The slice.
        operand: Name,
        /// Its length, in elements.
        got: usize,
        /// The length needed, in elements.
        needed: usize,
    },
    /// Two operands disagree on an extent, or an extent has the wrong value.
    Extent {
        /// The operand that does not fit.
        operand: Name,
        /// The axis, by name (`n`, `k`, `num_qo_heads`...).
        axis: &'static str,
        /// The extent it has.
        got: usize,
        /// The extent needed.
        needed: usize,
    },
    /// An extent is not a multiple of what the format or kernel works in.
    Multiple {
        /// The operand.
        operand: Name,
        /// The axis.
        axis: &'static str,
        /// The extent.
        got: usize,
        /// What it must be a multiple of.
        of: usize,
    },
    /// A stride is smaller than what it steps over.
    Stride {
        /// The operand.
        operand: Name,
        /// The stride, in elements.
        got: usize,
        /// The smallest that does not overlap.
        needed: usize,
    },
    /// An index (expert id, page, token id, offset) is outside its range.
    Index {
        /// The operand that holds the index.
        operand: Name,
        /// Where in the operand.
        at: usize,
        /// The index.
        got: i64,
        /// One past the largest allowed.
        limit: usize,
    },
    /// The product or sum of extents does not fit `usize`, or the memory for it is not to be had.
    Overflow {
        /// The operand.
        operand: Name,
    },
    /// An axis that must hold something is empty.
    Empty {
        /// The operand.
        operand: Name,
        /// The axis.
        axis: &'static str,
    },
    /// A value is not legal where it stands (a NaN scale, a negative NVFP4 scale, a decreasing offset...).
    Value {
        /// The operand.
        operand: Name,
        /// Flat position of the value in the operand.
        at: usize,
        /// What it is.
        got: String,
        /// What is needed.
        needed: &'static str,
    },
    /// A required operand is missing.
    Missing {
        /// The operand or tensor.
        operand: Name,
        /// What needs it.
        needed_by: Name,
    },
    /// An operand was given that the call has no use for.
    Unexpected {
        /// The operand.
        operand: Name,
        /// Why it is not wanted.
        because: Name,
    },
    /// The combination is understood and not served.
    Unsupported {
        /// What was asked.
        what: String,
        /// Why it is refused.
        because: String,
    },
    /// A page pool has no free page left.
    OutOfPages {
        /// Pages asked for.
        needed: usize,
        /// Pages free.
        free: usize,
    },
    /// A checkpoint file or tensor is not what its format says.
    Checkpoint {
        /// File or tensor.
        at: String,
        /// What is wrong.
        problem: String,
    },
    /// A device program was refused or stopped.
    Program {
        /// Where and why.
        problem: String,
    },
    /// A device kernel does not serve this call: a constraint of its manifest entry does not hold.
    Constraint {
        /// The kernel.
        kernel: String,
        /// The constraint.
        constraint: String,
        /// What the constraint is about, as it is in the call.
        got: String,
        /// What is needed: the constraint's text.
        needed: String,
    },
    /// A kernel manifest is not what it must be.
    Manifest {
        /// The kernel and the part of its entry.
        at: String,
        /// What is wrong.
        problem: String,
    },
    /// The device or its runtime refused, failed or is not there.
    Device {
        /// What happened, and with what.
        problem: String,
    },
    /// The operating system refused.
    Io {
        /// The path.
        path: String,
        /// Its answer.
        kind: std::io::ErrorKind,
        /// Its message.
        message: String,
    },
}

impl Error {
    /// An I/O error with its path.
    pub fn io(path: impl AsRef<std::path::Path>, e: &std::io::Error) -> Self {
        Error::Io { path: path.as_ref().display().to_string(), kind: e.kind(), message: e.to_string() }
    }

    /// An index, which may be beyond what `i64` counts, that is not below `limit`.
    pub(crate) fn index(operand: impl Into<Name>, at: usize, got: usize, limit: usize) -> Self {
        Error::Index { operand: operand.into(), at, got: i64::try_from(got).unwrap_or(i64::MAX), limit }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Length { operand, got, needed } => {
                write!(f, "{operand}: the slice has {got} elements, its extents need {needed}")
            }
            Error::Extent { operand, axis, got, needed } => {
                write!(f, "{operand}: axis {axis} is {got}, needed {needed}")
            }
            Error::Multiple { operand, axis, got, of } => {
                write!(f, "{operand}: axis {axis} is {got}, needed a multiple of {of}")
            }
            Error::Stride { operand, got, needed } => {
                write!(f, "{operand}: the row stride is {got} elements, needed at least {needed}")
            }
            Error::Index { operand, at, got, limit } => {
                write!(f, "{operand}[{at}]: index {got} is out of range, needed 0 <= index < {limit}")
            }
            Error::Overflow { operand } => {
                write!(f, "{operand}: the product of its extents does not fit in usize or in memory")
            }
            Error::Empty { operand, axis } => write!(f, "{operand}: axis {axis} is empty, needed at least 1"),
            Error::Value { operand, at, got, needed } => write!(f, "{operand}[{at}]: got {got}, needed {needed}"),
            Error::Missing { operand, needed_by } => write!(f, "{operand}: missing, needed by {needed_by}"),
            Error::Unexpected { operand, because } => write!(f, "{operand}: given but not wanted: {because}"),
            Error::Unsupported { what, because } => write!(f, "{what} is not supported: {because}"),
            Error::OutOfPages { needed, free } => write!(f, "kv pool: {needed} pages needed, {free} free"),
            Error::Checkpoint { at, problem } => write!(f, "{at}: {problem}"),
            Error::Program { problem } | Error::Device { problem } => write!(f, "{problem}"),
            Error::Constraint { kernel, constraint, got, needed } => {
                write!(f, "{constraint}: got {got}, needed {needed} ({kernel})")
            }
            Error::Manifest { at, problem } => write!(f, "{at}: {problem}"),
            Error::Io { path, message, .. } => write!(f, "{path}: {message}"),
        }
    }
}

impl std::error::Error for Error {}

/// `a * b` for extents of `operand`.
pub(crate) fn mul(operand: &'static str, a: usize, b: usize) -> Result<usize> {
    a.checked_mul(b).ok_or(Error::Overflow { operand: operand.into() })
}

/// Asks that an extent be exactly `needed`.
pub(crate) fn extent(operand: &'static str, axis: &'static str, got: usize, needed: usize) -> Result<()> {
    if got == needed { Ok(()) } else { Err(Error::Extent { operand: operand.into(), axis, got, needed }) }
}

/// Asks that a slice hold exactly `needed` elements.
pub(crate) fn length(operand: &'static str, got: usize, needed: usize) -> Result<()> {
    if got == needed { Ok(()) } else { Err(Error::Length { operand: operand.into(), got, needed }) }
}

/// Asks that an extent be a multiple of `of`.
pub(crate) fn multiple(operand: &'static str, axis: &'static str, got: usize, of: usize) -> Result<()> {
    if got.is_multiple_of(of) { Ok(()) } else { Err(Error::Multiple { operand: operand.into(), axis, got, of }) }
}

/// Room for `len` elements of `operand`, or an error where `Vec` would abort.
pub(crate) fn reserve<T>(operand: &'static str, v: &mut Vec<T>, len: usize) -> Result<()> {
    v.try_reserve_exact(len).map_err(|_| Error::Overflow { operand: operand.into() })
}

/// `len` zeros, or an error where `vec!` would abort. Asks first and lets go again: `vec!` gets memory that costs nothing until
/// it is touched.
pub(crate) fn zeros(operand: &'static str, len: usize) -> Result<Vec<f64>> {
    reserve::<f64>(operand, &mut Vec::new(), len)?;
    Ok(vec![0.0; len])
}
