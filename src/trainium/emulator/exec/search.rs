//! Largest values, where values are, gathers and shuffles on chip.
#![forbid(unsafe_code)]

use super::super::args::Slot;
use super::super::dtype::Dtype;
use super::super::fault::{Result, Rule, fault};
use super::super::machine::Execution;
use super::super::memory::{Elements, Psum};
use super::super::op::Op;

/// Partitions of a GpSimd core.
const CORE: usize = 16;
/// Partitions of a quadrant.
const QUADRANT: usize = 32;

pub(in super::super) fn execute(x: &mut Execution<'_, '_>) -> Result<()> {
    match &x.instruction.op {
        Op::Max8 { dst, src } => {
            let (values, free) = (numbers(x, *src)?, x.access(*src).free());
            let mut largest = Vec::new();
            for row in values.chunks_exact(free) {
                let mut row = row.to_vec();
                row.sort_by(|a, b| b.total_cmp(a));
                largest.extend_from_slice(&row[..8]);
            }
            x.store_values(*dst, &largest)
        }
        Op::FindIndex8 { dst, data, wanted } => {
            let found = find(x, *data, *wanted)?;
            x.store(*dst, &Elements::defined(found), None, Psum::Other)
        }
        Op::MatchReplace8 { dst, data, wanted, value, index } => {
            let found = find(x, *data, *wanted)?;
            let (mut values, free) = (x.values(*data)?, x.access(*data).free());
            for (row, found) in values.chunks_exact_mut(free).zip(found.chunks_exact(8)) {
                for (i, at) in found.iter().enumerate() {
                    if found[..i].contains(at) {
                        return fault(
                            Rule::Value,
                            "vals: two are equal; which element the second replaces is not documented",
                        );
                    }
                    row[*at as usize] = *value;
                }
            }
            x.store_values(*dst, &values)?;
            match index {
                Some(index) => x.store(*index, &Elements::defined(found), None, Psum::Other),
                None => Ok(()),
            }
        }
        Op::Gather { dst, data, indices } => {
            let at = indices_of(x, *indices)?;
            let (per, free) = (x.access(*indices).free(), x.access(*data).free());
            let places =
                at.iter().enumerate().map(|(i, at)| inside("indices", *at, free).map(|at| i / per * free + at));
            let places = places.collect::<Result<Vec<_>>>()?;
            let picked = x.elements(*data)?.picked(places.into_iter());
            x.store(*dst, &picked, None, Psum::Other)
        }
        Op::LocalGather { dst, src, index, run, valid } => {
            let at = indices_of(x, *index)?;
            let (per, free) = (x.access(*index).free(), x.access(*src).free());
            let mut places = Vec::new();
            for p in 0..x.access(*src).partitions() {
                // A core's indices, partitions first.
                for i in 0..*valid {
                    let start = at[(p / CORE * CORE + i % CORE) * per + i / CORE];
                    inside("index", start.saturating_add(run - 1), free)?;
                    places.extend((start..start + run).map(|at| p * free + at));
                }
            }
            let picked = x.elements(*src)?.picked(places.into_iter());
            x.store(*dst, &picked, None, Psum::Other)
        }
        Op::Shuffle { dst, src, mask } => {
            let (rows, free) = (x.access(*src).partitions(), x.access(*src).free());
            let (mut places, mut keep) = (Vec::new(), Vec::new());
            for p in 0..x.access(*dst).partitions() {
                let from = mask[p % QUADRANT].map(|m| p / QUADRANT * QUADRANT + m);
                if let Some(from) = from.filter(|f| *f >= rows) {
                    return fault(Rule::Bounds, format!("shuffle_mask: partition {p} takes {from} of {rows}"));
                }
                places.extend((0..free).map(|i| from.unwrap_or(0) * free + i));
                keep.extend(std::iter::repeat_n(from.is_some(), free));
            }
            let picked = x.elements(*src)?.picked(places.into_iter());
            x.store(*dst, &picked, Some(&keep), Psum::Other)
        }
        Op::SequenceBounds { dst, ids } => {
            let ids = x.values(*ids)?;
            if let Some(id) = ids.iter().find(|id| !(id.is_finite() && **id >= 0.0 && id.fract() == 0.0)) {
                return fault(Rule::Value, format!("segment_ids: {id} is not a non-negative integer"));
            }
            let n = ids.len() as f32;
            let (mut first, mut end) = (Vec::new(), Vec::new());
            // A segment is a stretch of equal ids; 0 is padding.
            for run in ids.chunk_by(|a, b| a == b) {
                let start = first.len() as f32;
                let bounds = if run[0] == 0.0 { (n, -1.0) } else { (start, start + run.len() as f32) };
                first.extend(std::iter::repeat_n(bounds.0, run.len()));
                end.extend(std::iter::repeat_n(bounds.1, run.len()));
            }
            first.append(&mut end);
            x.store_values(*dst, &first)
        }
        Op::NonzeroWithCount { dst, src, offset, padding } => {
            let (values, free) = (x.values(*src)?, x.access(*src).free());
            let (mut out, mut keep) = (Vec::new(), Vec::new());
            for (p, row) in values.chunks_exact(free).enumerate() {
                let found = row.iter().enumerate().filter(|(_, v)| **v != 0.0).map(|(i, _)| i as i64 + offset);
                let mut line = found.collect::<Vec<_>>();
                let count = line.len() as i64;
                line.resize(free, *padding);
                line.push(count);
                for value in line {
                    match i32::try_from(value) {
                        Ok(value) => out.push(value as u32),
                        Err(_) => return fault(Rule::Value, format!("dst: index {value} does not fit int32")),
                    }
                }
                // Only the first partition of each core takes part.
                keep.extend(std::iter::repeat_n(p % CORE == 0, free + 1));
            }
            x.store(*dst, &Elements::defined(out), Some(&keep), Psum::Other)
        }
        _ => Ok(()),
    }
}

/// Values among which an order is defined.
fn numbers(x: &mut Execution<'_, '_>, slot: Slot) -> Result<Vec<f32>> {
    let values = x.values(slot)?;
    match values.iter().position(|v| v.is_nan()) {
        None => Ok(values),
        Some(at) => {
            fault(Rule::Value, format!("{}: element {at} is NaN, which has no place in an order", x.role(slot)))
        }
    }
}

/// For each partition the first place of each of its 8 values.
fn find(x: &mut Execution<'_, '_>, data: Slot, wanted: Slot) -> Result<Vec<u32>> {
    let (values, free) = (numbers(x, data)?, x.access(data).free());
    let wanted = numbers(x, wanted)?;
    let mut found = Vec::with_capacity(wanted.len());
    for (p, (row, wanted)) in values.chunks_exact(free).zip(wanted.chunks_exact(8)).enumerate() {
        for value in wanted {
            match row.iter().position(|v| v == value) {
                Some(at) => found.push(at as u32),
                None => return fault(Rule::Value, format!("vals: {value} is not in partition {p} of data")),
            }
        }
    }
    Ok(found)
}

fn indices_of(x: &mut Execution<'_, '_>, slot: Slot) -> Result<Vec<usize>> {
    let dtype: Dtype = x.dtype(slot);
    Ok(x.bits(slot)?.into_iter().map(|bits| usize::try_from(dtype.integer(bits)).unwrap_or(usize::MAX)).collect())
}

fn inside(role: &str, at: usize, free: usize) -> Result<usize> {
    if at < free { Ok(at) } else { fault(Rule::Bounds, format!("{role}: {at}, needed below {free}")) }
}
