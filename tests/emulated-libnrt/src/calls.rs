//! What is remembered about calls: their log, the violations, and the statuses that are to be injected.
#![forbid(unsafe_code)]

use crate::abi::status_name;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::sync::OnceLock;

/// Why a call was not obeyed.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) status: u32,
    pub(crate) reason: String,
    /// Whether the client did what the documents forbid, or no client can do knowingly.
    pub(crate) violation: bool,
}

/// The result of a call's work.
pub(crate) type Outcome<T> = Result<T, Refusal>;

/// A refusal that a correct client may meet.
pub(crate) fn refuse<T>(status: u32, reason: impl Into<String>) -> Outcome<T> {
    Err(Refusal { status, reason: reason.into(), violation: false })
}

/// A refusal that no correct client meets.
pub(crate) fn violate<T>(status: u32, reason: impl Into<String>) -> Outcome<T> {
    Err(Refusal { status, reason: reason.into(), violation: true })
}

/// Calls kept in the log; later ones are counted only.
const LOG_LIMIT: usize = 1 << 18;

struct Injection {
    function: &'static str,
    status: u32,
    skip: u32,
    times: u32,
}

/// The record of all calls since the last reset.
#[derive(Default)]
pub(crate) struct Calls {
    log: Vec<(&'static str, u32)>,
    counts: BTreeMap<&'static str, u64>,
    pub(crate) violations: Vec<String>,
    pub(crate) last_reason: String,
    injections: Vec<Injection>,
}

impl Calls {
    /// Notes a finished call.
    pub(crate) fn note(&mut self, function: &'static str, refusal: Option<&Refusal>) {
        let status = refusal.map_or(0, |r| r.status);
        *self.counts.entry(function).or_default() += 1;
        if self.log.len() < LOG_LIMIT {
            self.log.push((function, status));
        }
        if let Some(refusal) = refusal {
            self.last_reason = format!("{function}: {}", refusal.reason);
            if refusal.violation {
                self.violation(function, &refusal.reason);
            }
        }
        trace(|| match refusal {
            None => format!("{function} 0"),
            Some(refusal) => {
                format!("{function} {status} {}: {}", status_name(status).to_string_lossy(), refusal.reason)
            }
        });
    }

    /// Notes something forbidden that a call did without being refused for it.
    pub(crate) fn violation(&mut self, function: &'static str, reason: &str) {
        trace(|| format!("violation {function}: {reason}"));
        self.violations.push(format!("{function}: {reason}"));
    }

    /// Calls of a function so far.
    pub(crate) fn count(&self, function: &str) -> u64 {
        self.counts.get(function).copied().unwrap_or(0)
    }

    /// The log, a line `function status` for each call.
    pub(crate) fn text(&self) -> String {
        self.log.iter().map(|(function, status)| format!("{function} {status}\n")).collect()
    }

    /// After `skip` more calls of a function, its next `times` give `status`; 0 times takes earlier orders back.
    pub(crate) fn inject(&mut self, function: &'static str, status: u32, skip: u32, times: u32) {
        if times == 0 {
            self.injections.retain(|i| i.function != function);
        } else {
            self.injections.push(Injection { function, status, skip, times });
        }
    }

    /// The status that this call of a function is to give, if one was ordered.
    pub(crate) fn injected(&mut self, function: &str) -> Option<u32> {
        let at = self.injections.iter().position(|i| i.function == function)?;
        let order = &mut self.injections[at];
        if order.skip > 0 {
            order.skip -= 1;
            return None;
        }
        let status = order.status;
        order.times = if order.times == u32::MAX { u32::MAX } else { order.times - 1 };
        if order.times == 0 {
            self.injections.remove(at);
        }
        Some(status)
    }
}

/// Where the trace goes: a file that forked children share, or standard error.
enum Sink {
    File(File),
    Stderr,
}

/// Set once, so that it can be read without a lock, also in a forked child.
static SINK: OnceLock<Option<Sink>> = OnceLock::new();

/// Opens the trace that `EMUNRT_LOG` names (`-` is standard error), once.
pub(crate) fn open_trace() {
    SINK.get_or_init(|| {
        let path = std::env::var_os("EMUNRT_LOG")?;
        if path == "-" {
            return Some(Sink::Stderr);
        }
        File::options().create(true).append(true).open(path).ok().map(Sink::File)
    });
}

/// Writes a line to the trace, if there is one, after the number of the process.
pub(crate) fn trace(text: impl Fn() -> String) {
    let line = || format!("{} {}\n", std::process::id(), text());
    // A trace that cannot be written must not change what the client sees.
    let _ = match SINK.get() {
        Some(Some(Sink::File(file))) => (&mut &*file).write_all(line().as_bytes()),
        Some(Some(Sink::Stderr)) => std::io::stderr().write_all(line().as_bytes()),
        _ => Ok(()),
    };
}
