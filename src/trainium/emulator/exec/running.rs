//! Instructions whose elements depend on those before them in the partition: scans, running reductions, statistics.
#![forbid(unsafe_code)]

use super::super::alu::Alu;
use super::super::args::{Command, Slot};
use super::super::fault::{Result, Rule, fault};
use super::super::machine::Execution;
use super::super::op::{Op, Other, Reduce, Step, Unit};

/// Elements of one group of statistics: count, mean, variance x count.
const GROUP: usize = 3;

pub(in super::super) fn execute(x: &mut Execution<'_, '_>) -> Result<()> {
    match &x.instruction.op {
        Op::Scan { dst, data, initial, steps } => {
            let (first, second) = (x.values(data[0])?, x.values(data[1])?);
            let (partitions, free) = (x.access(data[0]).partitions(), x.access(data[0]).free());
            let initial = x.factor(*initial, partitions)?;
            let mut out = Vec::with_capacity(first.len());
            for ((a, b), start) in first.chunks_exact(free).zip(second.chunks_exact(free)).zip(initial) {
                let mut state = start;
                for (a, b) in a.iter().zip(b) {
                    state = ordered(steps[0], *a, state);
                    state = ordered(steps[1], state, *b);
                    out.push(state);
                }
            }
            x.store_values(*dst, &out)
        }
        Op::Cumulative { dst, src, step, reduce } => cumulative(x, *dst, *src, step, reduce),
        Op::BnStats { dst, data } => {
            let (values, free) = (x.values(*data)?, x.access(*data).free());
            let stats: Vec<f32> =
                values.chunks_exact(free).flat_map(|row| [0, 1].map(|odd| group(row, odd))).flatten().collect();
            x.store_values(*dst, &stats)
        }
        Op::BnAggr { dst, data } => {
            let (values, free) = (x.values(*data)?, x.access(*data).free());
            let mut moments = Vec::new();
            for row in values.chunks_exact(free) {
                let sum = |f: &dyn Fn(&[f32]) -> f64| row.chunks_exact(GROUP).map(f).sum::<f64>();
                let wide = f64::from;
                let count = sum(&|g| wide(g[0]));
                if count.is_nan() || count <= 0.0 {
                    return fault(Rule::Value, format!("data: statistics of {count} elements have no mean"));
                }
                let mean = sum(&|g| wide(g[0]) * wide(g[1])) / count;
                let spread = sum(&|g| wide(g[2]) + wide(g[0]) * (wide(g[1]) - mean).powi(2));
                moments.extend([mean as f32, (spread / count) as f32]);
            }
            x.store_values(*dst, &moments)
        }
        _ => Ok(()),
    }
}

/// The operator with its inputs in the order that the step asks for.
fn ordered((op, reverse): (Alu, bool), x: f32, y: f32) -> f32 {
    if reverse { op.apply(y, x) } else { op.apply(x, y) }
}

/// Count, mean and variance x count of the even or the odd elements; sums in f64, as the order of the device's is not documented.
fn group(row: &[f32], odd: usize) -> [f32; GROUP] {
    let values = || row.iter().skip(odd).step_by(2).map(|v| f64::from(*v));
    let count = values().count() as f64;
    let mean = values().sum::<f64>() / count;
    [count as f32, mean as f32, values().map(|v| (v - mean).powi(2)).sum::<f64>() as f32]
}

/// `register = op1(op0(element), register)`, each stored; the registers are those of VectorE's reductions.
fn cumulative(x: &mut Execution<'_, '_>, dst: Slot, src: Slot, step: &Step, r: &Reduce) -> Result<()> {
    let mut values = x.values(src)?;
    let (partitions, free) = (x.access(src).partitions(), x.access(src).free());
    let other = match step.other {
        Other::Factor(factor) => x.factor(factor, partitions)?,
        _ => vec![0.0; partitions],
    };
    let init = r.init.map(|i| x.factor(i, partitions)).transpose()?;
    let first = x.start_partition(src);
    for (p, row) in values.chunks_exact_mut(free).enumerate() {
        let Some(register) = x.machine.accumulators(Unit::Vector).get_mut(first + p) else {
            return fault(Rule::Bounds, "a partition beyond the last");
        };
        let start = match r.command {
            Command::ResetReduce if r.op == Alu::Subtract => Some(0.0),
            Command::ResetReduce => r.op.identity(),
            Command::LoadReduce => init.as_ref().and_then(|i| i.get(p).copied()),
            _ => *register,
        };
        let Some(mut state) = start else {
            return fault(Rule::Reduction, format!("the register of partition {} was never set", first + p));
        };
        for v in row {
            state = r.op.apply(ordered((step.op, step.reverse), *v, other[p]), state);
            *v = state;
        }
        *register = Some(state);
    }
    x.store_values(dst, &values)
}
