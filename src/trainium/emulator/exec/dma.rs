//! Copies between HBM and SBUF, gathers and scatters among them, and transposes.
#![forbid(unsafe_code)]

use super::super::args::Slot;
use super::super::fault::{Result, Rule, fault};
use super::super::machine::Execution;
use super::super::memory::{Elements, Psum, Region};
use super::super::op::Op;
use super::super::rules::transpose_order;
use super::converted;

pub(in super::super) fn execute(x: &mut Execution<'_, '_>) -> Result<()> {
    match x.instruction.op {
        Op::DmaCopy { dst, src, skip } => copy(x, dst, src, skip),
        Op::DmaTranspose { dst, src, skip } => transpose(x, dst, src, skip),
        Op::DmaCompute { dst, ref srcs, skip } => sum(x, dst, srcs, skip),
        _ => Ok(()),
    }
}

/// The sum of the sources, in f32, rounded once. An element that some source or the destination skips stays as it is.
fn sum(x: &mut Execution<'_, '_>, dst: Slot, srcs: &[Slot], skip: bool) -> Result<()> {
    let to = x.region(dst, skip)?;
    let vector = x.access(dst).dynamic.as_ref().is_some_and(|d| d.vector);
    let mut starts: Vec<usize> = to.starts().iter().flatten().copied().collect();
    starts.sort_unstable();
    if vector && starts.windows(2).any(|pair| pair[0] == pair[1]) {
        return fault(Rule::Bounds, "dst: indices of a read-modify-write must be unique");
    }
    let mut total = vec![0f32; to.count()];
    let mut keep = vec![true; to.count()];
    for (number, &src) in srcs.iter().enumerate() {
        let from = x.region(src, skip)?;
        let (read, dtype, present) = (x.machine.memory.read(&from), x.dtype(src), present(&from));
        for (i, total) in total.iter_mut().enumerate() {
            if present.as_ref().is_some_and(|p| !p[i]) {
                keep[i] = false;
            } else if read.undefined(i) != 0 {
                return fault(Rule::Uninitialised, format!("{}: element {i} was never written", x.role(src)));
            } else {
                let value = dtype.to_f32(read.bits[i]);
                *total = if number == 0 { value } else { *total + value };
            }
        }
    }
    let bits = x.rounded(dst, &total)?;
    x.machine.memory.write(&to, &Elements::defined(bits), Some(&keep), Psum::Other);
    Ok(())
}

/// Which elements a source has: all but those of skipped rows.
fn present(region: &Region) -> Option<Vec<bool>> {
    let free = region.free();
    region.skips().then(|| region.starts().iter().flat_map(|s| std::iter::repeat_n(s.is_some(), free)).collect())
}

fn copy(x: &mut Execution<'_, '_>, dst: Slot, src: Slot, skip: bool) -> Result<()> {
    let (from, to) = (x.region(src, skip)?, x.region(dst, skip)?);
    let read = x.machine.memory.read(&from);
    let data = converted(&read, x.dtype(src), x.dtype(dst))?;
    if x.access(dst).dynamic.as_ref().is_some_and(|d| d.vector) {
        check_scatter(&to, &data)?;
    }
    x.machine.memory.write(&to, &data, present(&from).as_deref(), Psum::Other);
    Ok(())
}

/// Two rows scattered to one place must be equal: their order is not defined.
fn check_scatter(to: &Region, data: &Elements) -> Result<()> {
    let free = to.free();
    let mut rows: Vec<(usize, usize)> = to.starts().iter().enumerate().filter_map(|(i, s)| Some(((*s)?, i))).collect();
    rows.sort_unstable();
    for pair in rows.windows(2) {
        let row = |i: usize| &data.bits[i * free..(i + 1) * free];
        if pair[0].0 == pair[1].0 && row(pair[0].1) != row(pair[1].1) {
            return fault(
                Rule::Bounds,
                format!("dst: rows {} and {} go to one place and differ", pair[0].1, pair[1].1),
            );
        }
    }
    Ok(())
}

fn transpose(x: &mut Execution<'_, '_>, dst: Slot, src: Slot, skip: bool) -> Result<()> {
    let (from, to) = (x.region(src, skip)?, x.region(dst, false)?);
    let shape: Vec<usize> = x.access(src).dims.iter().map(|d| d.1).collect();
    let Some(order) = transpose_order(shape.len()) else { return fault(Rule::Operand, "src has 2, 3 or 4 axes") };
    // Stride, in the source's row-major numbering, of each axis of dst.
    let stride_of = |axis: usize| shape[axis + 1..].iter().product::<usize>();
    let axes: Vec<(usize, usize)> = order.iter().map(|&a| (shape[a], stride_of(a))).collect();
    let source = |mut i: usize| {
        let mut at = 0;
        for &(n, stride) in axes.iter().rev() {
            at += i % n * stride;
            i /= n;
        }
        at
    };
    let data = x.machine.memory.read(&from).permuted(source);
    let keep = present(&from).map(|p| (0..p.len()).map(|i| p[source(i)]).collect::<Vec<_>>());
    x.machine.memory.write(&to, &data, keep.as_deref(), Psum::Other);
    Ok(())
}
