//! Rules of the instructions that this repository's kernels do not use (NKI 0.6 API reference, `nki.isa`).
#![forbid(unsafe_code)]

use super::alu::Alu;
use super::args::{Factor, Slot};
use super::check::Checker;
use super::dtype::Dtype::*;
use super::fault::{Result, Rule, fault};
use super::op::{Op, Other};
use super::program::{Buffer::*, PARTITIONS, Target};
use super::rules::only;

/// Elements of a partition that `bn_stats` takes.
const BN_ELEMENTS: usize = 512;
/// Elements of a partition that a search reads.
const SEARCH: std::ops::RangeInclusive<usize> = 8..=16384;
/// Partitions of a GpSimd core.
const CORE: usize = 16;

/// Checks an instruction of [`op_rare`](super::op_rare).
pub(super) fn check(op: &Op, c: &Checker<'_>) -> Result<()> {
    match op {
        Op::DmaCompute { dst, srcs, .. } => dma_compute(c, *dst, srcs),
        Op::Activate2 { dst, data, steps, reduce: r, .. } => {
            c.needs(Target::Trn3, "activate2")?;
            c.elementwise(*dst, *data)?;
            for step in steps {
                if let Other::Factor(factor) = step.other {
                    c.factor(factor, c.access(*data).partitions())?;
                }
            }
            let reduces = matches!(r.op, Alu::Add | Alu::Maximum | Alu::Minimum | Alu::AbsMax | Alu::AbsMin);
            only(reduces, "needed add, maximum, minimum, abs_max or abs_min")?;
            match r.result {
                Some(result) => c.column(result, c.access(*data).partitions()),
                None => Ok(()),
            }
        }
        Op::BitReduce { dst, data, op, across } => {
            only(matches!(op, Alu::BitwiseAnd | Alu::BitwiseOr | Alu::BitwiseXor), "needed bitwise and, or, xor")?;
            only(!across || *op != Alu::BitwiseXor, "across partitions needed bitwise and, or")?;
            for slot in [*dst, *data] {
                if *across {
                    c.buffer(slot, &[Sbuf])?
                } else {
                    c.on_chip(slot)?
                };
                c.integer(slot)?;
            }
            only(c.dtype(*dst).size() == c.dtype(*data).size(), "bitwise operands have one width")?;
            let (partitions, free) = match across {
                true => (1, c.access(*data).free()),
                false => (c.access(*data).partitions(), c.access(*dst).free()),
            };
            c.extent(*dst, partitions, free)
        }
        Op::Scan { dst, data, initial, steps } => {
            c.elementwise(*dst, data[0])?;
            c.elementwise(*dst, data[1])?;
            c.one_in_psum(data[0], data[1])?;
            if let Factor::Column(slot) = initial {
                c.column(*slot, c.access(data[0]).partitions())?;
            }
            let binary = |op: &Alu| !op.is_unary() && !op.is_bitwise();
            only(steps.iter().all(|(op, _)| binary(op)), "a scan's operators take two numbers")
        }
        Op::Cumulative { dst, src, step, reduce: r } => {
            c.elementwise(*dst, *src)?;
            for slot in [*dst, *src] {
                only(!matches!(c.dtype(slot), Int32 | Uint32), "tensor_scalar_cumulative has no 32-bit integers")?;
            }
            only(!step.op.is_bitwise(), "op0 must be arithmetic")?;
            for factor in [r.init, if let Other::Factor(f) = step.other { Some(f) } else { None }].into_iter().flatten()
            {
                c.factor(factor, c.access(*src).partitions())?;
            }
            only(
                r.op.is_reduction() || r.op == Alu::Subtract,
                "op1: needed add, subtract, multiply, maximum or minimum",
            )
        }
        Op::BnStats { dst, data } => {
            tiles(c, &[*dst, *data])?;
            only((2..=BN_ELEMENTS).contains(&c.access(*data).free()), "bn_stats takes 2 to 512 elements a partition")?;
            c.extent(*dst, c.access(*data).partitions(), 6)
        }
        Op::BnAggr { dst, data } => {
            tiles(c, &[*dst, *data])?;
            only(c.access(*data).free().is_multiple_of(3), "data is not groups of 3 elements a partition")?;
            c.extent(*dst, c.access(*data).partitions(), 2)
        }
        Op::Max8 { dst, src } => {
            tiles(c, &[*dst, *src])?;
            only(SEARCH.contains(&c.access(*src).free()), "a search reads 8 to 16384 elements a partition")?;
            c.extent(*dst, c.access(*src).partitions(), 8)
        }
        Op::FindIndex8 { dst, data, wanted } => search(c, *data, *wanted, Some(*dst)),
        Op::MatchReplace8 { dst, data, wanted, index, .. } => {
            c.elementwise(*dst, *data)?;
            search(c, *data, *wanted, *index)
        }
        Op::Gather { dst, data, indices } => {
            in_sbuf(c, &[*dst, *data, *indices])?;
            c.same_dtype(*dst, *data)?;
            c.dtype_in(*indices, &[Uint32])?;
            only(
                c.access(*indices).partitions() == c.access(*data).partitions(),
                "indices has other partitions than data",
            )?;
            c.like(*dst, *indices)
        }
        Op::LocalGather { dst, src, index, run, valid } => {
            in_sbuf(c, &[*dst, *src, *index])?;
            c.same_dtype(*dst, *src)?;
            c.dtype_in(*index, &[Uint16])?;
            let (partitions, indices) = (c.access(*src).partitions(), c.access(*index).free().saturating_mul(CORE));
            only(partitions.is_multiple_of(CORE), "src_buffer is not whole cores of 16 partitions")?;
            only(c.access(*index).partitions() == partitions, "index has other partitions than src_buffer")?;
            only(matches!(run, 1 | 2 | 4 | 8 | 16 | 32), "num_elem_per_idx is not 1, 2, 4, 8, 16 or 32")?;
            only((1..=indices.min(4096)).contains(valid), "num_valid_indices is 0, or more than index holds or 4096")?;
            c.extent(*dst, partitions, valid * run)
        }
        Op::Shuffle { dst, src, .. } => {
            for slot in [*dst, *src] {
                c.on_chip(slot)?;
                only(c.access(slot).partitions() <= PARTITIONS, "more than 128 partitions")?;
            }
            c.same_dtype(*dst, *src)?;
            only(c.access(*dst).free() == c.access(*src).free(), "dst has other elements a partition than src")
        }
        Op::SequenceBounds { dst, ids } => {
            in_sbuf(c, &[*dst, *ids])?;
            c.dtype_in(*dst, &[Float32, Int32])?;
            c.dtype_in(*ids, &[Float32, Int32])?;
            c.extent(*ids, 1, c.access(*ids).free())?;
            c.extent(*dst, 1, c.access(*ids).free().saturating_mul(2))
        }
        Op::NonzeroWithCount { dst, src, offset, padding } => {
            c.needs(Target::Trn2, "nonzero_with_count")?;
            in_sbuf(c, &[*dst, *src])?;
            c.dtype_in(*src, &[Float32, Int32])?;
            c.dtype_in(*dst, &[Int32])?;
            only(
                [offset, padding].into_iter().all(|v| i32::try_from(*v).is_ok()),
                "index_offset, padding_val: needed int32",
            )?;
            c.extent(*dst, c.access(*src).partitions(), c.access(*src).free().saturating_add(1))
        }
        // Every instruction is here or in `rules`.
        _ => fault(Rule::Malformed, format!("{op:?} has no rules")),
    }
}

fn tiles(c: &Checker<'_>, slots: &[Slot]) -> Result<()> {
    slots.iter().try_for_each(|slot| c.on_chip(*slot).and_then(|()| c.arithmetic(*slot)))
}

fn in_sbuf(c: &Checker<'_>, slots: &[Slot]) -> Result<()> {
    slots.iter().try_for_each(|slot| c.buffer(*slot, &[Sbuf]))
}

fn search(c: &Checker<'_>, data: Slot, wanted: Slot, index: Option<Slot>) -> Result<()> {
    tiles(c, &[data, wanted])?;
    only(SEARCH.contains(&c.access(data).free()), "a search reads 8 to 16384 elements a partition")?;
    c.extent(wanted, c.access(data).partitions(), 8)?;
    let Some(index) = index else { return Ok(()) };
    c.on_chip(index)?;
    c.dtype_in(index, &[Uint16, Uint32])?;
    c.extent(index, c.access(data).partitions(), 8)
}

fn dma_compute(c: &Checker<'_>, dst: Slot, srcs: &[Slot]) -> Result<()> {
    only(!srcs.is_empty(), "dma_compute has no source")?;
    for slot in std::iter::once(dst).chain(srcs.iter().copied()) {
        c.buffer(slot, &[Sbuf, PrivateHbm, SharedHbm])?;
        c.arithmetic(slot)?;
        if c.access(slot).count() != c.access(dst).count() {
            return fault(Rule::Operand, format!("{} has another number of elements than dst", c.role(slot)));
        }
    }
    let indirect = std::iter::once(&dst).chain(srcs).any(|slot| c.access(*slot).dynamic.is_some());
    only(!indirect || srcs.len() == 2, "a read-modify-write has two sources")?;
    only(!indirect || srcs.iter().any(|src| c.access(*src) == c.access(dst)), "a read-modify-write reads its dst")
}
