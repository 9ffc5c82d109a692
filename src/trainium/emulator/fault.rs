//! Why a program was refused or stopped.
#![forbid(unsafe_code)]

use crate::Error;
use std::fmt;

/// The rule that was broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Rule {
    /// The text is not a program: not JSON, an unknown field or name, a missing or superfluous operand.
    Malformed,
    /// A tensor, register or port that does not exist.
    Reference,
    /// An access outside its tensor, or an element written twice by one instruction.
    Bounds,
    /// More memory, elements or work than the caller's [`Limits`](super::Limits) allow, or than the chip has.
    Limit,
    /// An operand that the instruction does not take: buffer, shape, dtype, start partition, target.
    Operand,
    /// Arithmetic on, or output of, bytes that nothing has written.
    Uninitialised,
    /// A matmul accumulates onto something else than a matmul's result.
    Accumulate,
    /// A value that has no defined result: FP8 overflow, NaN to an integer, a function outside its documented range.
    Value,
    /// An engine's reduction registers are read or continued without having been set.
    Reduction,
}

/// A refused program or a stopped run. Nothing has been given out when one is returned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Position and name of the instruction at fault; `None` if it is the program as a whole.
    pub at: Option<(usize, String)>,
    /// The rule that was broken.
    pub rule: Rule,
    /// What was got and what is needed, naming the operand.
    pub message: String,
}

/// `Result` with a [`Fault`].
pub type Result<T> = std::result::Result<T, Fault>;

/// A fault without a place; [`Fault::within`] adds it.
pub(super) fn fault<T>(rule: Rule, message: impl Into<String>) -> Result<T> {
    Err(Fault { at: None, rule, message: message.into() })
}

impl Fault {
    /// The fault with the instruction it belongs to.
    pub(super) fn within(mut self, index: usize, name: &str) -> Self {
        self.at.get_or_insert_with(|| (index, name.into()));
        self
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.at {
            Some((index, name)) => write!(f, "instruction {index} ({name}): {}", self.message),
            None => write!(f, "program: {}", self.message),
        }
    }
}

impl std::error::Error for Fault {}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        Error::Program { problem: fault.to_string() }
    }
}
