//! Which operands each instruction takes (NKI 0.6 API reference, instruction by instruction).
#![forbid(unsafe_code)]

use super::alu::Alu;
use super::args::{Command, Factor, Int, Slot};
use super::check::Checker;
use super::dtype::Dtype::{self, *};
use super::fault::{Result, Rule, fault};
use super::op::{Affine, BitOther, Op, Other, Reduce, Step, TileOrBits, Unit};
use super::program::{Buffer::*, Engine, PARTITIONS, Target};

/// Checks the operands of an instruction.
pub(super) fn check(op: &Op, engine: Engine, c: &Checker<'_>) -> Result<()> {
    let expected: &[Engine] = match op {
        Op::DmaCopy { .. } | Op::DmaTranspose { .. } | Op::DmaCompute { .. } => &[Engine::Dma],
        Op::Matmul { .. } | Op::MatmulMx { .. } | Op::MatmulTranspose { .. } => &[Engine::Tensor],
        Op::Transpose { .. } => &[Engine::Tensor, Engine::Vector],
        Op::RegisterAlloc { .. } | Op::RegisterMove { .. } | Op::RegisterLoad { .. } | Op::RegisterStore { .. } => {
            &[Engine::Sync]
        }
        _ => &[Engine::Vector, Engine::Scalar, Engine::Gpsimd],
    };
    if !expected.contains(&engine) {
        return fault(Rule::Operand, format!("engine {} cannot execute this", engine.name()));
    }
    match op {
        Op::DmaCopy { dst, src, skip } => dma_copy(c, *dst, *src, *skip),
        Op::DmaTranspose { dst, src, .. } => dma_transpose(c, *dst, *src),
        Op::Copy { dst, src } => copy(c, *dst, *src),
        Op::Memset { dst, .. } => c.on_chip(*dst).and_then(|()| c.on_target(*dst)),
        Op::CopyPredicated { dst, src, predicate, .. } => {
            c.on_chip(*dst)?;
            c.on_chip(*predicate)?;
            c.like(*predicate, *dst)?;
            c.dtype_in(*predicate, &[Uint8, Uint16, Uint32])?;
            let TileOrBits::Tile(src) = *src else { return Ok(()) };
            c.on_chip(src)?;
            c.like(src, *dst)?;
            c.same_dtype(src, *dst)?;
            c.one_in_psum(src, *predicate)
        }
        Op::Transpose { dst, data } => transpose(c, engine, *dst, *data),
        Op::MatmulTranspose { dst, stationary, moving } => {
            c.matmul_inputs(*stationary, *moving)?;
            c.buffer(*dst, &[Psum])?;
            let (k, m) = (c.access(*stationary).partitions(), c.access(*stationary).free());
            c.extent(*moving, k, k)?;
            c.arithmetic(*moving)?;
            c.extent(*dst, m, k)?;
            c.same_dtype(*dst, *stationary)
        }
        Op::Matmul { dst, stationary, moving, depth, .. } => matmul(c, *dst, *stationary, *moving, *depth),
        Op::MatmulMx { dst, data, scales, .. } => matmul_mx(c, *dst, *data, *scales),
        Op::QuantizeMx { dst, src, dst_scale } => quantize_mx(c, *dst, *src, *dst_scale),
        Op::Activation { dst, data, scale, bias, subtract, reduce: r, .. } => {
            c.elementwise(*dst, *data)?;
            let partitions = c.access(*data).partitions();
            c.factor(*scale, partitions)?;
            match bias {
                Some(Factor::Column(slot)) if !subtract => c.column(*slot, partitions)?, // of any arithmetic type
                Some(factor) if *subtract => c.factor(*factor, partitions)?,
                Some(Factor::Number(_)) => c.needs(Target::Trn2, "a number as bias")?,
                _ => {}
            }
            if *subtract {
                c.needs(Target::Trn3, "exponential")?;
            }
            only(r.op == Alu::Add, "activations reduce by add")?;
            reduce(c, r, *data)
        }
        Op::Elementwise { dst, data, steps, reduce: r } => elementwise(c, *dst, *data, steps, r.as_ref()),
        Op::Bitwise { dst, data, steps } => {
            for slot in [*dst, *data] {
                c.on_chip(slot)?;
                c.integer(slot)?;
            }
            c.like(*dst, *data)?;
            only(c.dtype(*dst).size() == c.dtype(*data).size(), "bitwise operands have one width")?;
            for step in steps {
                match step.other {
                    BitOther::Column(slot) => {
                        c.integer(slot)?;
                        c.column(slot, c.access(*data).partitions())?;
                        only(c.dtype(slot).size() == c.dtype(*data).size(), "bitwise operands have one width")?;
                    }
                    BitOther::Tile(slot) => {
                        c.integer(slot)?;
                        c.on_chip(slot)?;
                        c.like(slot, *data)?;
                        c.one_in_psum(slot, *data)?;
                        only(c.dtype(slot).size() == c.dtype(*data).size(), "bitwise operands have one width")?;
                    }
                    BitOther::None | BitOther::Bits(_) => {}
                }
            }
            Ok(())
        }
        Op::ExactInteger { dst, a, b, .. } => {
            c.elementwise(*dst, *a)?;
            c.elementwise(*dst, *b)
        }
        Op::TensorReduce { dst, data, op, .. } => {
            c.on_chip(*dst)?;
            c.on_chip(*data)?;
            c.arithmetic(*dst)?;
            c.arithmetic(*data)?;
            c.extent(*dst, c.access(*data).partitions(), c.access(*dst).free())?;
            only(op.is_reduction(), "needed add, multiply, maximum or minimum")
        }
        Op::PartitionReduce { dst, data, op } => {
            c.buffer(*dst, &[Sbuf])?;
            c.buffer(*data, &[Sbuf])?;
            c.arithmetic(*dst)?;
            c.arithmetic(*data)?;
            c.extent(*dst, 1, c.access(*data).free())?;
            only(matches!(op, Alu::Add | Alu::Maximum), "needed add or maximum")
        }
        Op::Iota { dst, affine } => {
            c.buffer(*dst, &[Sbuf])?;
            c.arithmetic(*dst)?;
            affine_fits(c, affine, *dst)
        }
        Op::AffineSelect { dst, on_true, affine, compare, .. } => {
            c.buffer(*dst, &[Sbuf])?;
            c.buffer(*on_true, &[Sbuf])?;
            c.elementwise(*dst, *on_true)?;
            only(compare.is_comparison(), "cmp_op is not a comparison")?;
            affine_fits(c, affine, *on_true)
        }
        Op::RangeSelect { dst, on_true, compare, bounds, start, reduce: r } => {
            c.needs(Target::Trn2, "range_select")?;
            c.elementwise(*dst, *on_true)?;
            only(c.dtype(*on_true).is_float(), "on_true_tile must be a float")?;
            for (op, bound) in compare.iter().zip(bounds) {
                only(op.is_comparison() && *op != Alu::NotEqual, "comp_op is not one of the five comparisons")?;
                c.factor(Factor::Column(*bound), c.access(*on_true).partitions())?;
            }
            let end = start.checked_add(c.access(*on_true).free() as i64);
            only(*start >= 0 && end.is_some_and(|e| e <= 1 << 24), "indices beyond 2^24 are not exact in f32")?;
            reduce(c, r, *on_true)
        }
        Op::SelectReduce { dst, predicate, on_true, on_false, reduce: r, .. } => {
            c.elementwise(*dst, *on_true)?;
            c.on_chip(*predicate)?;
            c.like(*predicate, *on_true)?;
            c.dtype_in(*predicate, &[Int8, Uint8, Int16, Uint16])?;
            c.one_in_psum(*on_true, *predicate)?;
            if let Factor::Column(slot) = on_false {
                c.column(*slot, c.access(*on_true).partitions())?;
            }
            reduce(c, r, *on_true)
        }
        Op::RegisterAlloc { value, .. } => only(value.is_none_or(fits_register), "the value does not fit 32 bits"),
        Op::RegisterMove { from, .. } => {
            only(!matches!(from, Int::Value(v) if !fits_register(*v)), "the value does not fit 32 bits")
        }
        Op::RegisterLoad { src: slot, .. } | Op::RegisterStore { dst: slot, .. } => {
            c.buffer(*slot, &[Sbuf, PrivateHbm, SharedHbm])?;
            c.integer(*slot)?;
            only(c.access(*slot).count() == 1, "a register holds one element")
        }
        rare => super::rules_rare::check(rare, c),
    }
}

pub(super) fn only(holds: bool, otherwise: &str) -> Result<()> {
    if holds { Ok(()) } else { fault(Rule::Operand, otherwise) }
}

/// Whether a register holds it, signed or unsigned.
pub(super) fn fits_register(value: i64) -> bool {
    (i64::from(i32::MIN)..=i64::from(u32::MAX)).contains(&value)
}

fn dma_copy(c: &Checker<'_>, dst: Slot, src: Slot, skip: bool) -> Result<()> {
    for slot in [dst, src] {
        c.buffer(slot, &[Sbuf, PrivateHbm, SharedHbm])?;
    }
    let (d, s) = (c.access(dst), c.access(src));
    if d.count() != s.count() {
        return fault(Rule::Operand, format!("src has {} elements, dst has {}", s.count(), d.count()));
    }
    if d.dtype != s.dtype {
        c.arithmetic(dst)?;
        c.arithmetic(src)?;
    }
    only(!skip || d.dynamic.is_some() || s.dynamic.is_some(), "skipping needs a runtime index")
}

fn dma_transpose(c: &Checker<'_>, dst: Slot, src: Slot) -> Result<()> {
    c.buffer(dst, &[Sbuf])?;
    c.buffer(src, &[Sbuf, PrivateHbm, SharedHbm])?;
    c.same_dtype(dst, src)?;
    only(matches!(c.dtype(src).size(), 2 | 4), "DMA transposes elements of 2 and 4 bytes")?;
    only(c.access(dst).dynamic.is_none(), "dst has a runtime address")?;
    let Some(order) = transpose_order(c.access(src).dims.len()) else {
        return fault(Rule::Operand, format!("src has {} axes, needed 2, 3 or 4", c.access(src).dims.len()));
    };
    let wanted: Vec<usize> = order.iter().map(|&a| c.access(src).dims[a].1).collect();
    let got: Vec<usize> = c.access(dst).dims.iter().map(|d| d.1).collect();
    if got == wanted { Ok(()) } else { fault(Rule::Operand, format!("dst has shape {got:?}, needed {wanted:?}")) }
}

/// How a DMA transpose permutes the axes of a tensor of this rank.
pub(super) fn transpose_order(rank: usize) -> Option<&'static [usize]> {
    match rank {
        2 => Some(&[1, 0]),
        3 => Some(&[2, 1, 0]),
        4 => Some(&[3, 1, 2, 0]),
        _ => None,
    }
}

fn copy(c: &Checker<'_>, dst: Slot, src: Slot) -> Result<()> {
    c.on_chip(dst)?;
    c.on_chip(src)?;
    c.on_target(dst)?;
    c.like(dst, src)?;
    if c.dtype(dst) != c.dtype(src) {
        c.arithmetic(dst)?;
        c.arithmetic(src)?;
    }
    Ok(())
}

fn transpose(c: &Checker<'_>, engine: Engine, dst: Slot, data: Slot) -> Result<()> {
    c.on_chip(dst)?;
    c.on_chip(data)?;
    c.same_dtype(dst, data)?;
    let (p, f) = (c.access(data).partitions(), c.access(data).free());
    c.extent(dst, f, p)?;
    if engine == Engine::Vector {
        return only(p <= 32 && f <= 32, "VectorE transposes up to 32 x 32");
    }
    c.buffer(data, &[Sbuf])?;
    c.buffer(dst, &[Psum])?;
    only(f <= PARTITIONS, "TensorE transposes up to 128 elements a partition")?;
    c.one_bank(dst)
}

fn matmul(c: &Checker<'_>, dst: Slot, stationary: Slot, moving: Slot, depth: usize) -> Result<()> {
    c.matmul_inputs(stationary, moving)?;
    let single = |d: Dtype| matches!(d, Float32 | Tfloat32);
    let (s, v) = (c.dtype(stationary), c.dtype(moving));
    only(s.is_float() && v.is_float(), "TensorE multiplies floats")?;
    only(single(s) == single(v), "fp32 and tf32 pair only with each other")?;
    only(![(Float8E4M3, Float8E4M3Fn), (Float8E4M3Fn, Float8E4M3)].contains(&(s, v)), "e4m3 and e4m3fn do not mix")?;
    if depth == 2 {
        c.needs(Target::Trn2, "double_row")?;
    }
    let (m, n) = (c.access(stationary).free() / depth, c.access(moving).free() / depth);
    only(m <= PARTITIONS, "stationary has more than 128 columns")?;
    c.matmul_dst(dst, m, n)
}

/// Partition, within its scale tile, of the scale of a group of 8 partitions: four rows to a quadrant of 32.
pub(super) fn scale_row(group: usize) -> usize {
    32 * (group / 4) + group % 4
}

fn mx_scale(c: &Checker<'_>, scale: Slot, data: Slot) -> Result<()> {
    c.buffer(scale, &[Sbuf])?;
    c.dtype_in(scale, &[Uint8, Float8E8M0Fnu])?;
    let (a, d) = (c.access(scale), c.access(data));
    let last = scale_row(d.partitions() / 8 - 1);
    if a.free() != d.free() || a.partitions() <= last {
        let role = c.role(scale);
        return fault(
            Rule::Operand,
            format!("{role} is {} x {}, needed more than {last} x {}", a.partitions(), a.free(), d.free()),
        );
    }
    let (start, of) = (c.start_partition(scale), c.start_partition(data));
    only(matches!(start % 32, 0 | 4 | 8 | 12), "scales start at row 0, 4, 8 or 12 of a quadrant")?;
    only(start / 32 == of / 32, "a scale lies in the quadrant of its group")
}

/// The instruction's page says a multiple of 32, a library comment leaves 96 out (facts: nki-api section 6): the page rules here, as in
/// the simulator's default. No kernel of this repository uses 96.
fn mx_partitions(c: &Checker<'_>, slot: Slot) -> Result<()> {
    only(matches!(c.access(slot).partitions(), 32 | 64 | 96 | 128), "MX tiles have 32, 64, 96 or 128 partitions")
}

fn matmul_mx(c: &Checker<'_>, dst: Slot, data: [Slot; 2], scales: [Slot; 2]) -> Result<()> {
    c.needs(Target::Trn3, "nc_matmul_mx")?;
    c.matmul_inputs(data[0], data[1])?;
    for (slot, scale) in data.into_iter().zip(scales) {
        only(c.dtype(slot).is_packed(), "nc_matmul_mx multiplies x4 types")?;
        mx_partitions(c, slot)?;
        mx_scale(c, scale, slot)?;
    }
    let (m, n) = (c.access(data[0]).free(), c.access(data[1]).free());
    only(m <= PARTITIONS && m % 2 == 0, "stationary columns are even and at most 128")?;
    c.matmul_dst(dst, m, n)
}

fn quantize_mx(c: &Checker<'_>, dst: Slot, src: Slot, dst_scale: Slot) -> Result<()> {
    c.needs(Target::Trn3, "quantize_mx")?;
    c.buffer(src, &[Sbuf])?;
    c.buffer(dst, &[Sbuf])?;
    c.dtype_in(src, &[Bfloat16, Float16])?;
    c.dtype_in(dst, &[Float8E4M3FnX4, Float8E5M2X4])?;
    mx_partitions(c, dst)?;
    c.extent(src, c.access(dst).partitions(), 4 * c.access(dst).free())?;
    mx_scale(c, dst_scale, dst)
}

fn elementwise(c: &Checker<'_>, dst: Slot, data: Slot, steps: &[Step], r: Option<&Reduce>) -> Result<()> {
    c.elementwise(dst, data)?;
    for step in steps {
        only(!step.op.is_bitwise(), "a bitwise operator among arithmetic ones")?;
        only(
            step.op.is_unary() == (step.other == Other::None),
            "one second input for a binary operator, none for a unary one",
        )?;
        match step.other {
            Other::None => {}
            Other::Factor(factor) => c.factor(factor, c.access(data).partitions())?,
            Other::Tile(slot) => {
                c.on_chip(slot)?;
                c.arithmetic(slot)?;
                c.like(slot, data)?;
                c.one_in_psum(slot, data)?;
            }
        }
    }
    r.map_or(Ok(()), |r| reduce(c, r, data))
}

fn reduce(c: &Checker<'_>, r: &Reduce, data: Slot) -> Result<()> {
    only(r.op.is_reduction(), "needed add, multiply, maximum or minimum")?;
    let partitions = c.access(data).partitions();
    if let Some(init) = r.init {
        c.factor(init, partitions)?;
    }
    let Some(result) = r.result else { return Ok(()) };
    only(
        r.unit == Unit::Scalar || r.command != Command::Idle,
        "reduce_res after idle reads registers in an unknown state",
    )?;
    c.column(result, partitions)
}

fn affine_fits(c: &Checker<'_>, affine: &Affine, tile: Slot) -> Result<()> {
    let count = affine.levels.iter().try_fold(1usize, |n, level| n.checked_mul(level.1));
    only(count == Some(c.access(tile).free()), "the pattern's counts do not multiply to the tile's free size")
}
