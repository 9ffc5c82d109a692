//! Reduction registers: one f32 for each partition and engine.
#![forbid(unsafe_code)]

use super::super::alu::Alu;
use super::super::args::{Command, Slot};
use super::super::fault::{Result, Rule, fault};
use super::super::machine::Execution;
use super::super::op::{Reduce, Unit};

/// Folds `values` into `start`, in ascending order.
pub(super) fn fold(op: Alu, start: f32, values: &[f32]) -> f32 {
    values.iter().fold(start, |sum, &v| op.apply(sum, v))
}

/// Does what an instruction asks of its engine's registers: `values` are its results, partition by partition, and `data` is
/// the operand whose partitions they belong to.
pub(super) fn reduce(
    x: &mut Execution<'_, '_>,
    r: &Reduce,
    data: Slot,
    values: &[f32],
    init: Option<&[f32]>,
) -> Result<()> {
    let first = x.start_partition(data);
    let (partitions, free) = (x.access(data).partitions(), x.access(data).free());
    let registers = x.machine.accumulators(r.unit);
    if r.command == Command::Idle && r.unit == Unit::Vector {
        registers.fill(None);
    }
    for (p, row) in values.chunks_exact(free).enumerate() {
        let Some(register) = registers.get_mut(first + p) else {
            return fault(Rule::Bounds, "a partition beyond the last");
        };
        let start = match r.command {
            Command::Idle => continue,
            Command::Reset | Command::ResetReduce => r.op.identity(),
            Command::LoadReduce => init.and_then(|i| i.get(p).copied()),
            Command::Reduce => *register,
        };
        let Some(start) = start else {
            return fault(Rule::Reduction, format!("the register of partition {} was never set", first + p));
        };
        *register = Some(if r.command == Command::Reset { start } else { fold(r.op, start, row) });
    }
    let Some(result) = r.result else { return Ok(()) };
    let held: Option<Vec<f32>> = (first..first + partitions).map(|p| registers.get(p).copied().flatten()).collect();
    match held {
        Some(held) => {
            let read: Vec<f32> = held.into_iter().map(|v| if r.negate { -v } else { v }).collect();
            x.store_values(result, &read)
        }
        None => fault(Rule::Reduction, "reduce_res: a register was never set"),
    }
}
