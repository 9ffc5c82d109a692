//! Why the device said no, or why it was not asked.
#![forbid(unsafe_code)]

use super::{Status, StatusClass, Usage, Version};
use std::fmt;

/// `Result` of this module.
pub type Result<T, E = NeuronError> = std::result::Result<T, E>;

/// What went wrong. All but [`NeuronError::Call`], [`NeuronError::Answer`] and [`NeuronError::ProcessMustRestart`] are found
/// before the library is called.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum NeuronError {
    /// `TRN_KERNELS_NEURON=0`.
    Disabled,
    /// libnrt exists for 64-bit Linux only.
    NotLinux,
    /// No library anywhere.
    LibraryNotFound {
        /// Where it was looked for, in order.
        tried: Vec<String>,
    },
    /// There is a file, and it cannot be loaded.
    LibraryUnloadable {
        /// The file.
        path: String,
        /// What the dynamic linker says.
        dlerror: String,
    },
    /// It loaded, and it is not a libnrt this crate can use.
    MissingSymbols {
        /// The file.
        path: String,
        /// Every required function that it lacks.
        names: Vec<&'static str>,
    },
    /// The library answered with another status than success.
    Call {
        /// The function.
        op: &'static str,
        /// Its answer.
        status: Status,
    },
    /// The library reported success and gave something that cannot be.
    Answer {
        /// The function.
        op: &'static str,
        /// What is wrong with what it gave.
        problem: String,
    },
    /// `NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS` is set: execute would return before the outputs are there.
    AsyncExecution {
        /// The variable's value.
        value: String,
    },
    /// This process already has a runtime: clone that one.
    AlreadyInitialized,
    /// Another copy of libnrt is initialised in this process: the two would fight over the cores.
    AnotherLibrary {
        /// The file of the other.
        path: String,
    },
    /// The process was forked after the library was initialised; the device's state is not inherited.
    ForkedChild,
    /// An earlier call found the device dead or in an unknown state.
    Poisoned {
        /// What that call answered.
        status: Status,
    },
    /// The runtime was closed or lost, and the library cannot be initialised again in this process.
    ProcessMustRestart,
    /// Something still holds the runtime; it closes when the last holder is dropped.
    InUse,
    /// The bytes are not a NEFF.
    Neff {
        /// What is wrong.
        problem: String,
    },
    /// A name that cannot be given to the library.
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Nothing to allocate or to view.
    Empty {
        /// The tensor.
        tensor: String,
    },
    /// More bytes than this runtime can serve, or than there can be.
    TooLarge {
        /// The tensor.
        tensor: String,
        /// Bytes asked for.
        bytes: u64,
        /// The most there may be.
        limit: u64,
    },
    /// A range that leaves its tensor.
    OutOfBounds {
        /// The tensor.
        tensor: String,
        /// First byte.
        offset: usize,
        /// Bytes.
        len: usize,
        /// Bytes of the tensor.
        size: usize,
    },
    /// A copy within one piece of memory onto itself.
    Overlap {
        /// The source.
        from: String,
        /// The destination.
        to: String,
    },
    /// A core that this process does not have.
    NoSuchCore {
        /// The core, counted within the visible ones.
        core: u32,
        /// How many are visible.
        visible: u32,
    },
    /// Two things that must be on one core are not.
    WrongCore {
        /// The tensor or set.
        tensor: String,
        /// Its core.
        got: u32,
        /// The core needed.
        needed: u32,
    },
    /// A tensor or set of another runtime.
    OtherRuntime {
        /// The tensor or set.
        tensor: String,
    },
    /// A name that the model or set does not have.
    NoSuchTensor {
        /// The name.
        tensor: String,
        /// As what.
        usage: Option<Usage>,
        /// The names there are.
        known: Vec<String>,
    },
    /// A model's tensor that is not in the set.
    MissingTensor {
        /// The name.
        tensor: String,
        /// As what.
        usage: Usage,
    },
    /// Another number of bytes than the model has.
    SizeMismatch {
        /// The name.
        tensor: String,
        /// Bytes given.
        got: u64,
        /// Bytes needed.
        needed: u64,
    },
    /// An in-place pair that is not bound to one tensor.
    NotAliased {
        /// Name of the input; the output is the same without its suffix.
        input: String,
    },
    /// A failed execution was to write these bytes; nobody has since.
    Untrusted {
        /// The tensor.
        tensor: String,
    },
}

impl NeuronError {
    /// What the status that caused this asks of the caller, if a status did.
    pub fn class(&self) -> Option<StatusClass> {
        self.status().map(Status::class)
    }

    /// The status that caused this, if one did.
    pub fn status(&self) -> Option<Status> {
        match self {
            NeuronError::Call { status, .. } | NeuronError::Poisoned { status } => Some(*status),
            _ => None,
        }
    }
}

impl fmt::Display for NeuronError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use NeuronError as E;
        match self {
            E::Disabled => f.write_str("the Neuron device is switched off by TRN_KERNELS_NEURON=0"),
            E::NotLinux => f.write_str("libnrt exists for 64-bit Linux only"),
            E::LibraryNotFound { tried } => write!(f, "no libnrt.so.1 found; tried {}", tried.join(", ")),
            E::LibraryUnloadable { path, dlerror } => write!(f, "{path} cannot be loaded: {dlerror}"),
            E::MissingSymbols { path, names } => write!(f, "{path} lacks {}", names.join(", ")),
            E::Call { op, status } => {
                write!(f, "{op}: {status}; the cause is in the runtime's log only: rerun with NEURON_RT_LOG_LEVEL=INFO")
            }
            E::Answer { op, problem } => write!(f, "{op} answered success, but {problem}"),
            E::AsyncExecution { value } => write!(
                f,
                "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS={value}: execute would return before the outputs are there; \
                 unset it"
            ),
            E::AlreadyInitialized => f.write_str("this process already has a Neuron runtime: clone that one"),
            E::AnotherLibrary { path } => {
                write!(f, "{path} is initialised in this process already, and two libnrt would fight over the cores")
            }
            E::ForkedChild => f.write_str(
                "this process was forked after the Neuron runtime was initialised; start workers with spawn or exec",
            ),
            E::Poisoned { status } => write!(f, "the device was lost ({status}): restart this process"),
            E::ProcessMustRestart => {
                f.write_str("the Neuron runtime cannot be initialised again: restart this process")
            }
            E::InUse => f.write_str("the runtime is still held; it closes when the last holder is dropped"),
            E::Neff { problem } => write!(f, "NEFF: {problem}"),
            E::Name { name, problem } => write!(f, "name {name:?}: {problem}"),
            E::Empty { tensor } => write!(f, "{tensor}: 0 bytes, needed at least 1"),
            E::TooLarge { tensor, bytes, limit } => write!(
                f,
                "{tensor}: {bytes} bytes, at most {limit} with this runtime (4 GiB and more need {})",
                Version::RECOMMENDED
            ),
            E::OutOfBounds { tensor, offset, len, size } => {
                write!(f, "{tensor}: {len} bytes at {offset} leave its {size} bytes")
            }
            E::Overlap { from, to } => write!(f, "{from} to {to}: the ranges overlap"),
            E::NoSuchCore { core, visible } => write!(f, "core {core}: this process has {visible}, counted from 0"),
            E::WrongCore { tensor, got, needed } => write!(f, "{tensor}: on core {got}, needed on core {needed}"),
            E::OtherRuntime { tensor } => write!(f, "{tensor}: belongs to another runtime"),
            E::NoSuchTensor { tensor, usage, known } => {
                let what = usage.map_or("tensor", Usage::name);
                write!(f, "{tensor}: no such {what}; there are {}", known.join(", "))
            }
            E::MissingTensor { tensor, usage } => write!(f, "{tensor}: {} not in the set", usage.name()),
            E::SizeMismatch { tensor, got, needed } => write!(f, "{tensor}: {got} bytes, needed {needed}"),
            E::NotAliased { input } => {
                write!(f, "{input}: updated in place, so the same tensor must be bound to the output of that name")
            }
            E::Untrusted { tensor } => {
                write!(f, "{tensor}: a failed execution was to write these bytes, and nothing has written them since")
            }
        }
    }
}

impl std::error::Error for NeuronError {}

impl From<NeuronError> for crate::Error {
    fn from(e: NeuronError) -> Self {
        crate::Error::Device { problem: e.to_string() }
    }
}

/// Runs `call` up to `attempts` times (at least once) while it fails with a [retryable](StatusClass::Retryable) status: a full
/// queue. Waits 50 us before the second attempt and twice as long before each further one, 10 ms at most.
///
/// # Errors
/// The first error of another kind, or the last.
pub fn retry<T>(attempts: u32, mut call: impl FnMut() -> Result<T>) -> Result<T> {
    let mut pause = std::time::Duration::from_micros(50);
    for _ in 1..attempts {
        match call() {
            Err(e) if e.class() == Some(StatusClass::Retryable) => std::thread::sleep(pause),
            done => return done,
        }
        pause = (pause * 2).min(std::time::Duration::from_millis(10));
    }
    call()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> NeuronError {
        NeuronError::Call { op: "nrt_execute", status: Status::QUEUE_FULL }
    }

    #[test]
    fn retry_stops_at_success_at_other_errors_and_at_its_bound() {
        let run = |attempts, answers: &[Result<u32>]| {
            let mut calls = 0;
            let got = retry(attempts, || {
                calls += 1;
                answers[calls - 1].clone()
            });
            (got, calls)
        };
        let other = NeuronError::Call { op: "nrt_execute", status: Status::RESOURCE };
        assert_eq!(run(3, &[Err(full()), Ok(5), Ok(6)]), (Ok(5), 2));
        assert_eq!(run(3, &[Err(full()), Err(other.clone()), Ok(6)]), (Err(other), 2));
        assert_eq!(run(3, &[Err(full()), Err(full()), Err(full())]), (Err(full()), 3));
        assert_eq!(run(0, &[Err(full())]), (Err(full()), 1));
    }

    #[test]
    fn a_failed_call_says_where_its_cause_is() {
        let text = NeuronError::Call { op: "nrt_init", status: Status::FAILURE }.to_string();
        assert!(text.starts_with("nrt_init: NRT_FAILURE (1)") && text.contains("NEURON_RT_LOG_LEVEL=INFO"), "{text}");
    }
}
