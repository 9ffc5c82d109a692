//! Interleaved timing: before every call of every contender the machine's limits are measured anew, and what is reported are
//! medians of the ratios of such neighbours. The machine's speed may then drift from call to call.
#![forbid(unsafe_code)]

use rayon::ThreadPool;
use std::fmt::Display;
use std::time::{Duration, Instant};
use trn_kernels::cpu::limits::{Peak, StreamRead, median};

/// Seconds for which a peak is run before a call: a quarter of the call before, within these.
const PEAK: std::ops::RangeInclusive<f64> = 2e-3..=2e-2;
/// Seconds for which threads are busy with the same before it counts, as they are in a runtime that goes from one call to the next:
/// those that sleep take long to wake, and those of another contender may have pushed two of them onto one core.
const AWAKE: f64 = 5e-3;
/// Calls after which nothing changes any more.
const MOST: usize = 400;

/// The limits of this machine, for the threads of a pool.
pub(crate) struct Limits<'p> {
    pub(crate) pool: &'p ThreadPool,
    pub(crate) read: StreamRead,
}

/// Something to call: ours, or a peer.
pub(crate) struct Contender<'a> {
    pub(crate) name: String,
    /// Bytes of weights that a call reads.
    pub(crate) bytes: usize,
    /// Floating-point operations of a call.
    pub(crate) flops: f64,
    /// Calls it once: seconds taken.
    pub(crate) call: Box<dyn FnMut() -> Result<f64, String> + 'a>,
}

/// Seconds that a call took.
pub(crate) fn timed<E: Display>(call: impl FnOnce() -> Result<(), E>) -> Result<f64, String> {
    let start = Instant::now();
    call().map_err(|e| e.to_string())?;
    Ok(start.elapsed().as_secs_f64().max(1e-9))
}

/// How long to go on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sampling {
    /// Exactly so many calls of each contender.
    pub(crate) repeat: Option<usize>,
    /// Else three or more, until this has passed; one may do if it takes longer than four times this.
    pub(crate) budget: Duration,
}

impl Sampling {
    fn enough(&self, calls: usize, spent: Duration) -> bool {
        match self.repeat {
            Some(repeat) => calls >= repeat,
            None => (calls >= 3 && spent >= self.budget) || spent >= 4 * self.budget || calls >= MOST,
        }
    }
}

/// What was found, medians over calls.
#[derive(Debug, Clone)]
pub(crate) struct Outcome {
    pub(crate) name: String,
    pub(crate) calls: usize,
    /// Seconds of a call.
    pub(crate) seconds: f64,
    /// Seconds of the fastest call.
    pub(crate) fastest: f64,
    pub(crate) bytes: usize,
    pub(crate) flops: f64,
    /// Bytes a second that the machine read, beside the calls.
    pub(crate) read: f64,
    /// Floating-point operations a second at its peak, beside the calls; `None` if no peak is known.
    pub(crate) peak: Option<f64>,
    /// Share of the read limit.
    pub(crate) of_read: f64,
    /// Share of the peak.
    pub(crate) of_peak: Option<f64>,
    /// Time of a call as a multiple of the first contender's in the same round.
    pub(crate) times_first: f64,
}

impl Outcome {
    pub(crate) fn bytes_per_second(&self) -> f64 {
        self.bytes as f64 / self.seconds
    }

    pub(crate) fn flops_per_second(&self) -> f64 {
        self.flops / self.seconds
    }

    /// Whether the peak, not memory, is the nearer limit.
    pub(crate) fn compute_bound(&self) -> bool {
        self.peak.is_some_and(|peak| self.flops / peak > self.bytes as f64 / self.read)
    }

    /// Share of the nearer limit.
    pub(crate) fn of_limit(&self) -> f64 {
        self.of_peak.filter(|_| self.compute_bound()).unwrap_or(self.of_read)
    }
}

/// What one call showed.
struct Call {
    read: f64,
    peak: Option<f64>,
    seconds: f64,
}

/// Calls the contenders in turn, each after a look at the limits and, if a call is short, some calls that are not counted.
pub(crate) fn measure(
    limits: &mut Limits<'_>,
    peak: Option<Peak>,
    contenders: &mut [Contender<'_>],
    sampling: Sampling,
) -> Result<Vec<Outcome>, String> {
    for contender in contenders.iter_mut() {
        (contender.call)()?;
    }
    let mut calls: Vec<Vec<Call>> = contenders.iter().map(|_| vec![]).collect();
    let (begin, mut rounds) = (Instant::now(), 0);
    while rounds == 0 || !sampling.enough(rounds, begin.elapsed()) {
        for (contender, calls) in contenders.iter_mut().zip(&mut calls) {
            Peak::Avx2F32.rate(limits.pool, AWAKE);
            let read = limits.read.rate(limits.pool, contender.bytes);
            let last = calls.last().map_or(0.0, |call| call.seconds);
            let peak = peak.and_then(|peak| peak.rate(limits.pool, (last / 4.0).clamp(*PEAK.start(), *PEAK.end())));
            let awake = Instant::now();
            while last < AWAKE && awake.elapsed().as_secs_f64() < AWAKE {
                (contender.call)()?;
            }
            calls.push(Call { read, peak, seconds: (contender.call)()? });
        }
        rounds += 1;
    }
    let first: Vec<f64> = calls.first().map_or(vec![], |calls| calls.iter().map(|c| c.seconds).collect());
    Ok(contenders.iter().zip(&calls).map(|(contender, calls)| outcome(contender, calls, &first)).collect())
}

fn outcome(contender: &Contender<'_>, calls: &[Call], first: &[f64]) -> Outcome {
    let middle = |f: &dyn Fn(&Call) -> f64| median(&mut calls.iter().map(f).collect::<Vec<_>>());
    let (bytes, flops) = (contender.bytes as f64, contender.flops);
    let has_peak = calls.iter().all(|c| c.peak.is_some());
    let peak = |c: &Call| c.peak.unwrap_or(f64::INFINITY);
    Outcome {
        name: contender.name.clone(),
        calls: calls.len(),
        seconds: middle(&|c| c.seconds),
        fastest: calls.iter().map(|c| c.seconds).fold(f64::INFINITY, f64::min),
        bytes: contender.bytes,
        flops,
        read: middle(&|c| c.read),
        peak: has_peak.then(|| middle(&peak)),
        of_read: middle(&|c| bytes / c.seconds / c.read),
        of_peak: has_peak.then(|| middle(&|c| flops / c.seconds / peak(c))),
        times_first: median(&mut calls.iter().zip(first).map(|(c, first)| c.seconds / first).collect::<Vec<_>>()),
    }
}
