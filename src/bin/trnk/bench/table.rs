//! Results as lines of a table and as records of a CSV file.
#![forbid(unsafe_code)]

use super::case::{Acts, Shape};
use super::sample::Outcome;
use std::fmt;
use trn_kernels::Isa;
use trn_kernels::cpu::limits::Peak;

/// One measured call, of one contender.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub(crate) scheme: String,
    pub(crate) acts: Acts,
    /// Rows of activations; tokens of a mixture of experts.
    pub(crate) m: usize,
    pub(crate) shape: Shape,
    /// Number of experts and how many a token meets; `None` for a dense matmul.
    pub(crate) experts: Option<(usize, usize)>,
    pub(crate) peak: Option<Peak>,
    pub(crate) outcome: Outcome,
}

/// Where and when rows were measured.
#[derive(Debug, Clone)]
pub(crate) struct Origin {
    pub(crate) date: String,
    pub(crate) cpu: String,
    pub(crate) threads: usize,
    pub(crate) tier: Isa,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Origin { date, cpu, threads, tier } = self;
        write!(f, "{cpu}, {threads} threads, tier {tier}, {date}")
    }
}

/// What stands above the columns of [`line()`].
pub(crate) fn header(peers: bool) -> String {
    let mut text = if peers { format!("{:<29}", "who") } else { String::new() };
    text += &format!(
        "{:<12}{:<5}{:>6} {:>17} {:>11} {:>7} {:>8} {:>9} {:>8}  {:<7}{:>5}",
        "scheme", "acts", "m", "n x k", "time", "GB/s", "of read", "GFLOP/s", "of peak", "bound", "calls"
    );
    if peers {
        text += &format!("{:>9}", "x ours");
    }
    text
}

/// A row for people: medians, and the share of the limits measured beside each call.
pub(crate) fn line(row: &Row, peers: bool) -> String {
    let o = &row.outcome;
    let shape = match row.experts {
        Some((experts, top_k)) => format!("{top_k}/{experts} of {}", row.shape),
        None => row.shape.to_string(),
    };
    let mut text = if peers { format!("{:<29}", o.name) } else { String::new() };
    text += &format!(
        "{:<12}{:<5}{:>6} {:>17} {:>11} {:>7.2} {:>8.2} {:>9.1} {:>8}  {:<7}{:>5}",
        row.scheme,
        row.acts.name(),
        row.m,
        shape,
        duration(o.seconds),
        o.bytes_per_second() / 1e9,
        o.of_read,
        o.flops_per_second() / 1e9,
        o.of_peak.map_or("-".into(), |share| format!("{share:.3}")),
        if o.compute_bound() { "compute" } else { "memory" },
        o.calls
    );
    if peers {
        text += &format!("{:>9.2}", o.times_first);
    }
    text
}

/// Seconds in the unit that shows three or more digits.
pub(crate) fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 1e-3 => format!("{:.1} us", 1e6 * s),
        s if s < 1.0 => format!("{:.2} ms", 1e3 * s),
        s => format!("{s:.2} s"),
    }
}

/// The columns of [`record`].
pub(crate) const COLUMNS: &str = "date,cpu,threads,tier,version,who,scheme,acts,m,n,k,experts,top_k,calls,seconds_median,\
    seconds_fastest,weight_bytes,flop,gb_per_s,gflop_per_s,limit_read_gb_per_s,limit_peak,limit_peak_gflop_per_s,of_read,of_peak,\
    bound,times_ours";

/// A row for programs: one line of CSV. Units are in the names of the columns; what does not apply is empty.
pub(crate) fn record(row: &Row, origin: &Origin) -> String {
    let o = &row.outcome;
    let (experts, top_k) = row.experts.map_or_else(Default::default, |(e, t)| (e.to_string(), t.to_string()));
    let optional = |value: Option<f64>| value.map_or_else(String::new, |v| format!("{v:.4}"));
    let fields = [
        origin.date.clone(),
        quoted(&origin.cpu),
        origin.threads.to_string(),
        origin.tier.to_string(),
        trn_kernels::cpu::limits::VERSION.into(),
        quoted(&o.name),
        quoted(&row.scheme),
        row.acts.name().into(),
        row.m.to_string(),
        row.shape.n.to_string(),
        row.shape.k.to_string(),
        experts,
        top_k,
        o.calls.to_string(),
        format!("{:.9}", o.seconds),
        format!("{:.9}", o.fastest),
        o.bytes.to_string(),
        o.flops.to_string(),
        format!("{:.3}", o.bytes_per_second() / 1e9),
        format!("{:.3}", o.flops_per_second() / 1e9),
        format!("{:.3}", o.read / 1e9),
        row.peak.map_or_else(String::new, |peak| quoted(peak.name())),
        optional(o.peak.map(|peak| peak / 1e9)),
        format!("{:.4}", o.of_read),
        optional(o.of_peak),
        if o.compute_bound() { "compute" } else { "memory" }.into(),
        format!("{:.4}", o.times_first),
    ];
    fields.join(",")
}

/// A field that may hold commas or quotes (RFC 4180).
fn quoted(text: &str) -> String {
    if text.contains([',', '"', '\n']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text.to_owned() }
}
