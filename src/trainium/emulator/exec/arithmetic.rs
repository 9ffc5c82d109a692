//! Element-wise arithmetic and reductions of VectorE, ScalarE and GpSimdE.
#![forbid(unsafe_code)]

use super::super::alu::Alu;
use super::super::args::Slot;
use super::super::fault::{Result, Rule, fault};
use super::super::machine::Execution;
use super::super::memory::{Elements, Psum};
use super::super::op::{BitOther, BitStep, Op, Other, Step};
use super::reduce::{fold, reduce};

pub(in super::super) fn execute(x: &mut Execution<'_, '_>) -> Result<()> {
    match &x.instruction.op {
        Op::Activation { dst, data, function, scale, bias, subtract, reduce: r } => {
            let mut values = x.values(*data)?;
            let (partitions, free) = (x.access(*data).partitions(), x.access(*data).free());
            let scale = x.factor(*scale, partitions)?;
            let bias = bias.map(|b| x.factor(b, partitions)).transpose()?;
            let init = r.init.map(|i| x.factor(i, partitions)).transpose()?;
            for (p, row) in values.chunks_exact_mut(free).enumerate() {
                for v in row {
                    *v *= scale[p];
                    match &bias {
                        Some(b) if *subtract => *v -= b[p],
                        Some(b) => *v += b[p],
                        None => {}
                    }
                    *v = function.apply(*v)?;
                }
            }
            x.store_values(*dst, &values)?;
            reduce(x, r, *data, &values, init.as_deref())
        }
        Op::Activate2 { dst, data, function, steps, reduce: r } => {
            let mut values = x.values(*data)?;
            let (partitions, free) = (x.access(*data).partitions(), x.access(*data).free());
            for step in steps {
                apply(x, step, &mut values, partitions, free)?;
            }
            for v in &mut values {
                *v = function.apply(*v)?;
            }
            x.store_values(*dst, &values)?;
            reduce(x, r, *data, &values, None)
        }
        Op::BitReduce { dst, data, op, across } => bit_reduce(x, *dst, *data, *op, *across),
        Op::Elementwise { dst, data, steps, reduce: r } => {
            let mut values = x.values(*data)?;
            let (partitions, free) = (x.access(*data).partitions(), x.access(*data).free());
            let init = r.and_then(|r| r.init).map(|i| x.factor(i, partitions)).transpose()?;
            for step in steps {
                apply(x, step, &mut values, partitions, free)?;
            }
            x.store_values(*dst, &values)?;
            r.as_ref().map_or(Ok(()), |r| reduce(x, r, *data, &values, init.as_deref()))
        }
        Op::Bitwise { dst, data, steps } => bitwise(x, *dst, *data, steps),
        Op::ExactInteger { dst, a, b, op } => exact(x, *dst, *a, *b, *op),
        Op::TensorReduce { dst, data, op, negate } => {
            let values = x.values(*data)?;
            let kept = x.access(*dst).count();
            let Some(start) = op.identity() else { return fault(Rule::Operand, "not a reduction") };
            let sums = values.chunks_exact(values.len() / kept).map(|row| fold(*op, start, row));
            let sums: Vec<f32> = sums.map(|s| if *negate { -s } else { s }).collect();
            x.store_values(*dst, &sums)
        }
        Op::PartitionReduce { dst, data, op } => {
            let values = x.values(*data)?;
            let free = x.access(*data).free();
            let Some(start) = op.identity() else { return fault(Rule::Operand, "not a reduction") };
            let mut sums = vec![start; free];
            for row in values.chunks_exact(free) {
                sums.iter_mut().zip(row).for_each(|(s, &v)| *s = op.apply(*s, v));
            }
            x.store_values(*dst, &sums)
        }
        _ => Ok(()),
    }
}

fn apply(x: &mut Execution<'_, '_>, step: &Step, values: &mut [f32], partitions: usize, free: usize) -> Result<()> {
    let op = |v: f32, other: f32| if step.reverse { step.op.apply(other, v) } else { step.op.apply(v, other) };
    match step.other {
        Other::None => values.iter_mut().for_each(|v| *v = step.op.apply(*v, 0.0)),
        Other::Factor(factor) => {
            let factor = x.factor(factor, partitions)?;
            for (row, &f) in values.chunks_exact_mut(free).zip(&factor) {
                row.iter_mut().for_each(|v| *v = op(*v, f));
            }
        }
        Other::Tile(slot) => {
            let tile = x.values(slot)?;
            values.iter_mut().zip(&tile).for_each(|(v, &t)| *v = op(*v, t));
        }
    }
    Ok(())
}

fn bitwise(x: &mut Execution<'_, '_>, dst: Slot, data: Slot, steps: &[BitStep]) -> Result<()> {
    let dtype = x.dtype(data);
    let width = 8 * dtype.size() as u32;
    let signed = dtype.range().is_some_and(|(low, _)| low < 0);
    let mut bits = x.bits(data)?;
    let free = x.access(data).free();
    for step in steps {
        let other = match step.other {
            BitOther::None => vec![],
            BitOther::Bits(b) => vec![b; bits.len()],
            BitOther::Column(slot) => x.bits(slot)?.into_iter().flat_map(|b| std::iter::repeat_n(b, free)).collect(),
            BitOther::Tile(slot) => x.bits(slot)?,
        };
        for (i, b) in bits.iter_mut().enumerate() {
            let y = other.get(i).copied().unwrap_or(0);
            let (first, second) = if step.reverse && step.other != BitOther::None { (y, *b) } else { (*b, y) };
            *b = step.op.apply_bits(first, second, width, signed)?;
        }
    }
    x.store(dst, &Elements::defined(bits), None, Psum::Other)
}

/// A bitwise reduction of each stretch of free elements, or across partitions.
fn bit_reduce(x: &mut Execution<'_, '_>, dst: Slot, data: Slot, op: Alu, across: bool) -> Result<()> {
    let bits = x.bits(data)?;
    let (kept, width) = (x.access(dst).count(), 8 * x.dtype(data).size() as u32);
    let per = bits.len() / kept.max(1);
    let mut out = Vec::with_capacity(kept);
    for i in 0..kept {
        let place = |j: usize| if across { j * kept + i } else { i * per + j };
        let mut word = bits[place(0)];
        for j in 1..per {
            word = op.apply_bits(word, bits[place(j)], width, false)?;
        }
        out.push(word);
    }
    x.store(dst, &Elements::defined(out), None, Psum::Other)
}

/// 32-bit integers, exactly; a result outside the type has no documented value.
fn exact(x: &mut Execution<'_, '_>, dst: Slot, a: Slot, b: Slot, op: Alu) -> Result<()> {
    let (first, second, target) = (x.dtype(a), x.dtype(b), x.dtype(dst));
    let (left, right) = (x.bits(a)?, x.bits(b)?);
    let Some((low, high)) = target.range() else { return fault(Rule::Operand, "dst is not an integer") };
    let mut out = Vec::with_capacity(left.len());
    for (&l, &r) in left.iter().zip(&right) {
        let value = op.apply_integer(first.integer(l), second.integer(r))?;
        if !(low..=high).contains(&value) {
            return fault(Rule::Value, format!("dst: {value} does not fit {}", target.name()));
        }
        out.push(value as u32);
    }
    x.store(dst, &Elements::defined(out), None, Psum::Other)
}
