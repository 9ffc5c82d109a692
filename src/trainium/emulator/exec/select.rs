//! Masks: affine indices, ranges and predicates.
#![forbid(unsafe_code)]

use super::super::alu::compare_integers;
use super::super::args::{Factor, Slot};
use super::super::dtype::Dtype;
use super::super::fault::{Result, Rule, fault};
use super::super::machine::Execution;
use super::super::memory::{Elements, Psum};
use super::super::op::{Affine, Op};
use super::converted;
use super::reduce::reduce;

/// What `range_select` writes where a comparison fails: the smallest finite f32.
const FILL: f32 = f32::MIN;

pub(in super::super) fn execute(x: &mut Execution<'_, '_>) -> Result<()> {
    match &x.instruction.op {
        Op::Iota { dst, affine } => iota(x, *dst, affine),
        Op::AffineSelect { dst, on_true, affine, compare, on_false } => {
            let keep: Vec<bool> =
                indices(x, affine, *on_true)?.into_iter().map(|i| compare_integers(*compare, i, 0)).collect();
            let target = x.dtype(*dst);
            let fill = target.round(*on_false)?;
            let mut data = x.elements(*on_true)?;
            // What is not kept is neither converted nor undefined.
            for (i, &keep) in keep.iter().enumerate() {
                if !keep {
                    data.bits[i] = 0;
                    if let Some(u) = data.undefined.get_mut(i) {
                        *u = 0;
                    }
                }
            }
            let mut data = converted(&data, x.dtype(*on_true), target)?;
            data.bits.iter_mut().zip(&keep).filter(|(_, k)| !**k).for_each(|(b, _)| *b = fill);
            x.store(*dst, &data, None, Psum::Other)
        }
        Op::RangeSelect { dst, on_true, compare, bounds, start, reduce: r } => {
            let mut values = x.values(*on_true)?;
            let free = x.access(*on_true).free();
            let (low, high) = (x.values(bounds[0])?, x.values(bounds[1])?);
            for (p, row) in values.chunks_exact_mut(free).enumerate() {
                for (i, v) in row.iter_mut().enumerate() {
                    // At most 2^24: exact.
                    let index = (*start + i as i64) as f32;
                    if compare[0].apply(index, low[p]) == 0.0 || compare[1].apply(index, high[p]) == 0.0 {
                        *v = FILL;
                    }
                }
            }
            x.store_values(*dst, &values)?;
            reduce(x, r, *on_true, &values, None)
        }
        Op::SelectReduce { dst, predicate, on_true, on_false, reverse, reduce: r } => {
            let take: Vec<bool> = x.bits(*predicate)?.into_iter().map(|b| (b != 0) != *reverse).collect();
            let mut values = x.values(*on_true)?;
            let (partitions, free) = (x.access(*on_true).partitions(), x.access(*on_true).free());
            let other = match on_false {
                Factor::Number(v) => vec![*v; partitions],
                Factor::Column(slot) => x.values(*slot)?,
            };
            for (i, v) in values.iter_mut().enumerate() {
                if !take[i] {
                    *v = other[i / free];
                }
            }
            x.store_values(*dst, &values)?;
            reduce(x, r, *on_true, &values, None)
        }
        _ => Ok(()),
    }
}

/// The affine value of every element of a tile; 32-bit arithmetic, so a value beyond that is an error.
fn indices(x: &Execution<'_, '_>, affine: &Affine, tile: Slot) -> Result<Vec<i64>> {
    let offset = x.machine.int(affine.offset)?;
    let mut free = vec![0i64];
    for &(step, count) in &affine.levels {
        // Steps are below 2^32 and counts below 2^26: no level leaves i64, and neither do four of them.
        free = free.iter().flat_map(|v| (0..count as i64).map(move |i| v + i * step)).collect();
    }
    let mut out = Vec::with_capacity(x.access(tile).count());
    for p in 0..x.access(tile).partitions() as i64 {
        for v in &free {
            let value =
                p.checked_mul(affine.multiplier).and_then(|m| m.checked_add(offset)).and_then(|s| s.checked_add(*v));
            match value.filter(|v| i32::try_from(*v).is_ok()) {
                Some(value) => out.push(value),
                None => return fault(Rule::Value, "pattern: a value leaves the 32-bit range"),
            }
        }
    }
    Ok(out)
}

fn iota(x: &mut Execution<'_, '_>, dst: Slot, affine: &Affine) -> Result<()> {
    let values = indices(x, affine, dst)?;
    let dtype = x.dtype(dst);
    let bits = match dtype {
        Dtype::Uint32 if values.iter().any(|&v| v < 0) => {
            return fault(Rule::Value, "dst: a negative value into uint32");
        }
        Dtype::Int32 | Dtype::Uint32 => values.iter().map(|&v| v as u32).collect(),
        _ => x.rounded(dst, &values.iter().map(|&v| v as f32).collect::<Vec<_>>())?,
    };
    x.store(dst, &Elements::defined(bits), None, Psum::Other)
}
