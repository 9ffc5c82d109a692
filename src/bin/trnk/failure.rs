//! Why a command ended early, and its exit code.
#![forbid(unsafe_code)]

use std::fmt::Display;

/// One line for standard error and an exit code: 2 if the command line is at fault (as clap has it), 1 otherwise.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) code: u8,
    pub(crate) message: String,
}

impl Failure {
    /// What was typed cannot be meant.
    pub(crate) fn usage(message: impl Display) -> Self {
        Failure { code: 2, message: message.to_string() }
    }

    /// It was understood and cannot be done.
    pub(crate) fn refused(message: impl Display) -> Self {
        Failure { code: 1, message: message.to_string() }
    }
}
