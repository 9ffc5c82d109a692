//! What each instruction does, as data: names and roles resolved, immediates typed, static rules checked.
#![forbid(unsafe_code)]

use super::alu::{Alu, Function};
use super::args::{Args, Command, Factor, Int, Slot};
use super::check::Checker;
use super::dtype::Dtype;
use super::fault::{Result, Rule, fault};
use super::program::{Buffer, Engine, PARTITIONS, Target, Tensor};

/// The second input of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Other {
    /// The operator takes one input.
    None,
    /// A number or a column.
    Factor(Factor),
    /// A tile as large as the data.
    Tile(Slot),
}

/// `x = x op other`, or `other op x`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Step {
    pub(super) op: Alu,
    pub(super) other: Other,
    pub(super) reverse: bool,
}

/// Which engine's reduction registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    /// One set shared by all VectorE reductions; `idle` may disturb it.
    Vector,
    /// The activations'; `idle` leaves it alone.
    Scalar,
}

/// What an instruction does with reduction registers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Reduce {
    pub(super) unit: Unit,
    pub(super) op: Alu,
    pub(super) command: Command,
    pub(super) init: Option<Factor>,
    pub(super) result: Option<Slot>,
    pub(super) negate: bool,
}

/// A tile or one element's bits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum TileOrBits {
    Tile(Slot),
    Bits(u32),
}

/// An affine value of partition and free indices: `offset + p x multiplier + sum of i x step`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Affine {
    pub(super) levels: Vec<(i64, usize)>,
    pub(super) multiplier: i64,
    pub(super) offset: Int,
}

/// One instruction's work.
#[derive(Debug, Clone, PartialEq)]
#[rustfmt::skip]
pub(super) enum Op {
    DmaCopy { dst: Slot, src: Slot, skip: bool },
    DmaTranspose { dst: Slot, src: Slot, skip: bool },
    DmaCompute { dst: Slot, srcs: Vec<Slot>, skip: bool },
    Copy { dst: Slot, src: Slot },
    Memset { dst: Slot, bits: u32 },
    CopyPredicated { dst: Slot, src: TileOrBits, predicate: Slot, reverse: bool },
    Transpose { dst: Slot, data: Slot },
    MatmulTranspose { dst: Slot, stationary: Slot, moving: Slot },
    Matmul { dst: Slot, stationary: Slot, moving: Slot, depth: usize, accumulate: Option<bool> },
    MatmulMx { dst: Slot, data: [Slot; 2], scales: [Slot; 2], accumulate: Option<bool> },
    QuantizeMx { dst: Slot, src: Slot, dst_scale: Slot },
    Activation { dst: Slot, data: Slot, function: Function, scale: Factor, bias: Option<Factor>, subtract: bool, reduce: Reduce },
    Activate2 { dst: Slot, data: Slot, function: Function, steps: Vec<Step>, reduce: Reduce },
    Elementwise { dst: Slot, data: Slot, steps: Vec<Step>, reduce: Option<Reduce> },
    Bitwise { dst: Slot, data: Slot, steps: Vec<BitStep> },
    ExactInteger { dst: Slot, a: Slot, b: Slot, op: Alu },
    TensorReduce { dst: Slot, data: Slot, op: Alu, negate: bool },
    PartitionReduce { dst: Slot, data: Slot, op: Alu },
    BitReduce { dst: Slot, data: Slot, op: Alu, across: bool },
    Scan { dst: Slot, data: [Slot; 2], initial: Factor, steps: [(Alu, bool); 2] },
    Cumulative { dst: Slot, src: Slot, step: Step, reduce: Reduce },
    BnStats { dst: Slot, data: Slot },
    BnAggr { dst: Slot, data: Slot },
    Max8 { dst: Slot, src: Slot },
    FindIndex8 { dst: Slot, data: Slot, wanted: Slot },
    MatchReplace8 { dst: Slot, data: Slot, wanted: Slot, value: f32, index: Option<Slot> },
    Gather { dst: Slot, data: Slot, indices: Slot },
    LocalGather { dst: Slot, src: Slot, index: Slot, run: usize, valid: usize },
    Shuffle { dst: Slot, src: Slot, mask: Box<[Option<usize>; 32]> },
    SequenceBounds { dst: Slot, ids: Slot },
    NonzeroWithCount { dst: Slot, src: Slot, offset: i64, padding: i64 },
    Iota { dst: Slot, affine: Affine },
    AffineSelect { dst: Slot, on_true: Slot, affine: Affine, compare: Alu, on_false: f32 },
    RangeSelect { dst: Slot, on_true: Slot, compare: [Alu; 2], bounds: [Slot; 2], start: i64, reduce: Reduce },
    SelectReduce { dst: Slot, predicate: Slot, on_true: Slot, on_false: Factor, reverse: bool, reduce: Reduce },
    RegisterAlloc { register: usize, value: Option<i64> },
    RegisterMove { register: usize, from: Int },
    RegisterLoad { register: usize, src: Slot },
    RegisterStore { dst: Slot, register: usize },
}

/// A step on integer bits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct BitStep {
    pub(super) op: Alu,
    pub(super) other: BitOther,
    pub(super) reverse: bool,
}

/// The second input of a bitwise step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum BitOther {
    None,
    Bits(u32),
    Column(Slot),
    Tile(Slot),
}

/// Reads and checks one instruction. `args` keeps its operands.
pub(super) fn parse(name: &str, engine: Engine, target: Target, args: &mut Args, tensors: &[Tensor]) -> Result<Op> {
    let op = take(name, engine, args)?;
    args.finish()?;
    let checker = Checker { target, tensors, operands: &args.operands };
    let scales: &[Slot] = match &op {
        Op::MatmulMx { scales, .. } => scales,
        Op::QuantizeMx { dst_scale, .. } => std::slice::from_ref(dst_scale),
        _ => &[],
    };
    for slot in 0..args.operands.len() {
        checker.common(slot, engine == Engine::Dma, scales.contains(&slot))?;
        if engine == Engine::Gpsimd && checker.tensor(slot).buffer == Buffer::Psum {
            return fault(Rule::Operand, format!("{} is in psum, which gpsimd cannot reach", checker.role(slot)));
        }
    }
    super::rules::check(&op, engine, &checker)?;
    Ok(op)
}

/// Takes an instruction's arguments by its name.
fn take(name: &str, engine: Engine, args: &mut Args) -> Result<Op> {
    Ok(match name {
        "dma_copy" => {
            args.ignore(&["dge_mode", "priority", "trigger"]);
            Op::DmaCopy { dst: args.write("dst")?, src: args.read("src")?, skip: args.skips()? }
        }
        "dma_transpose" => {
            args.ignore(&["dge_mode", "priority"]);
            let op = Op::DmaTranspose { dst: args.write("dst")?, src: args.read("src")?, skip: args.skips()? };
            let axes = args.sizes("axes")?;
            if !matches!(axes[..], [] | [1, 0] | [2, 1, 0] | [3, 1, 2, 0]) {
                return fault(Rule::Operand, format!("axes {axes:?}; needed (1,0), (2,1,0) or (3,1,2,0)"));
            }
            op
        }
        "tensor_copy" => Op::Copy { dst: args.write("dst")?, src: args.read("src")? },
        "memset" => {
            let dst = args.write("dst")?;
            Op::Memset { dst, bits: constant(args, "value", dst)? }
        }
        "tensor_copy_predicated" => {
            let dst = args.write("dst")?;
            let predicate = args.read("predicate")?;
            let src = match args.read_opt("src") {
                Some(slot) => TileOrBits::Tile(slot),
                None => TileOrBits::Bits(constant(args, "src", dst)?),
            };
            Op::CopyPredicated { dst, src, predicate, reverse: args.flag("reverse_pred")? }
        }
        "nc_transpose" => Op::Transpose { dst: args.write("dst")?, data: args.read("data")? },
        "nc_matmul" => return take_matmul(args),
        "nc_matmul_mx" => {
            let dst = args.write("dst")?;
            let data = [args.read("stationary")?, args.read("moving")?];
            let scales = [args.read("stationary_scale")?, args.read("moving_scale")?];
            row_tile(args, data[0])?;
            Op::MatmulMx { dst, data, scales, accumulate: args.flag_opt("accumulate")? }
        }
        "quantize_mx" => {
            args.ignore(&["mx_scale"]); // the run's options say which rule
            Op::QuantizeMx { dst: args.write("dst")?, src: args.read("src")?, dst_scale: args.write("dst_scale")? }
        }
        "activation" | "activation_reduce" => {
            let (dst, data, function) = (args.write("dst")?, args.read("data")?, args.function("op")?);
            let scale = args.factor_opt("scale")?.unwrap_or(Factor::Number(1.0));
            let bias = args.factor_opt("bias")?;
            let command = args.command("reduce_cmd")?;
            let op = args.alu_opt("reduce_op")?.unwrap_or(Alu::Add);
            let result = args.write_opt("reduce_res");
            let reduce = Reduce { unit: Unit::Scalar, op, command, init: None, result, negate: false };
            Op::Activation { dst, data, function, scale, bias, subtract: false, reduce }
        }
        "exponential" => {
            let (dst, data) = (args.write("dst")?, args.read("src")?);
            let bias = args.factor_opt("max_value")?;
            let reduce = vector_reduce(args, Alu::Add)?;
            let scale = Factor::Number(1.0);
            Op::Activation { dst, data, function: Function::Exp, scale, bias, subtract: true, reduce }
        }
        "tensor_tensor" => {
            let (dst, a, b, op) = (args.write("dst")?, args.read("data1")?, args.read("data2")?, args.alu("op")?);
            if op.is_bitwise() {
                return Ok(Op::Bitwise {
                    dst,
                    data: a,
                    steps: vec![BitStep { op, other: BitOther::Tile(b), reverse: false }],
                });
            }
            // GpSimdE has exact 32-bit integers; VectorE goes through f32.
            let word = |slot: Slot| matches!(args.operands[slot].access.dtype, Dtype::Int32 | Dtype::Uint32);
            if engine == Engine::Gpsimd && op != Alu::Power && [dst, a, b].into_iter().all(word) {
                return Ok(Op::ExactInteger { dst, a, b, op });
            }
            Op::Elementwise {
                dst,
                data: a,
                steps: vec![Step { op, other: Other::Tile(b), reverse: false }],
                reduce: None,
            }
        }
        "tensor_scalar" => return take_tensor_scalar(args),
        "scalar_tensor_tensor" => {
            let (dst, data) = (args.write("dst")?, args.read("data")?);
            let first = arithmetic_step(args, "op0", "operand0", "reverse0")?;
            let tile = Other::Tile(args.read("operand1")?);
            let second = Step { op: args.alu("op1")?, other: tile, reverse: args.flag("reverse1")? };
            Op::Elementwise { dst, data, steps: vec![first, second], reduce: None }
        }
        "tensor_scalar_reduce" => {
            let (dst, data) = (args.write("dst")?, args.read("data")?);
            let step = arithmetic_step(args, "op0", "operand0", "reverse0")?;
            let op = args.alu("reduce_op")?;
            let mut reduce = vector_reduce(args, op)?;
            reduce.negate = args.flag("reduce_res_negate")?;
            Op::Elementwise { dst, data, steps: vec![step], reduce: Some(reduce) }
        }
        "reciprocal" => {
            let step = Step { op: Alu::Reciprocal, other: Other::None, reverse: false };
            Op::Elementwise { dst: args.write("dst")?, data: args.read("data")?, steps: vec![step], reduce: None }
        }
        "tensor_reduce" => {
            let (dst, data, op) = (args.write("dst")?, args.read("data")?, args.alu("op")?);
            args.ignore(&["keepdims"]); // a matter of dst's shape
            let axes = args.sizes("axis")?;
            let rank = args.operands[data].access.dims.len();
            // The kept part is what dst holds; the rest of each partition, in order, is reduced into it.
            if axes.first().is_none_or(|&a| a == 0) || !axes.iter().copied().eq(rank.saturating_sub(axes.len())..rank) {
                return fault(Rule::Operand, format!("axes {axes:?} are not the last free axes of {rank}"));
            }
            let dims = &args.operands[data].access.dims;
            let kept: usize = dims[1..rank - axes.len()].iter().map(|d| d.1).product();
            if args.operands[dst].access.free() != kept {
                return fault(
                    Rule::Operand,
                    format!(
                        "dst has {} elements a partition, reducing axes {axes:?} leaves {kept}",
                        args.operands[dst].access.free()
                    ),
                );
            }
            let negate = args.flag("negate")?;
            match op.is_bitwise() {
                true if negate => return fault(Rule::Operand, "negate goes with arithmetic operators only"),
                true => Op::BitReduce { dst, data, op, across: false },
                false => Op::TensorReduce { dst, data, op, negate },
            }
        }
        "tensor_partition_reduce" => {
            let (dst, data, op) = (args.write("dst")?, args.read("data")?, args.alu("op")?);
            match op.is_bitwise() {
                true => Op::BitReduce { dst, data, op, across: true },
                false => Op::PartitionReduce { dst, data, op },
            }
        }
        "iota" => Op::Iota { dst: args.write("dst")?, affine: affine(args)? },
        "affine_select" => Op::AffineSelect {
            dst: args.write("dst")?,
            on_true: args.read("on_true_tile")?,
            affine: affine(args)?,
            compare: args.alu("cmp_op")?,
            on_false: number(args, "on_false_value")?,
        },
        "range_select" => {
            let (dst, on_true) = (args.write("dst")?, args.read("on_true_tile")?);
            let compare = [args.alu("comp_op0")?, args.alu("comp_op1")?];
            let bounds = [args.read("bound0")?, args.read("bound1")?];
            let start = args.int("range_start")?;
            Op::RangeSelect { dst, on_true, compare, bounds, start, reduce: vector_reduce(args, Alu::Maximum)? }
        }
        "select_reduce" => {
            let (dst, predicate, on_true) = (args.write("dst")?, args.read("predicate")?, args.read("on_true")?);
            let Some(on_false) = args.factor_opt("on_false")? else { return fault(Rule::Malformed, "no on_false") };
            let reverse = args.flag("reverse_pred")?;
            Op::SelectReduce { dst, predicate, on_true, on_false, reverse, reduce: vector_reduce(args, Alu::Maximum)? }
        }
        "register_alloc" => {
            let register = args.register_named("dst")?;
            let value = if args.attrs.contains_key("value") { Some(args.int("value")?) } else { None };
            Op::RegisterAlloc { register, value }
        }
        "register_move" => {
            Op::RegisterMove { register: args.register_named("dst")?, from: args.int_or_register("src")? }
        }
        "register_load" => Op::RegisterLoad { register: args.register_named("dst")?, src: args.read("src")? },
        "register_store" => Op::RegisterStore { dst: args.write("dst")?, register: args.register_named("src")? },
        _ => return super::op_rare::take(name, args),
    })
}

fn take_matmul(args: &mut Args) -> Result<Op> {
    args.ignore(&["is_stationary_onezero", "is_moving_onezero"]); // hints for speed
    let (dst, stationary, moving) = (args.write("dst")?, args.read("stationary")?, args.read("moving")?);
    row_tile(args, stationary)?;
    let double = match args.text_opt("perf_mode")?.as_deref() {
        None | Some("none") => false,
        Some("double_row") => true,
        Some(other) => return fault(Rule::Operand, format!("perf_mode {other:?} is not served")),
    };
    let transpose = args.flag("is_transpose")?;
    let accumulate = args.flag_opt("accumulate")?;
    if double {
        for slot in [stationary, moving] {
            let (role, access) = (args.operands[slot].role, &args.operands[slot].access);
            if access.dims.len() < 3 || access.dims[1].1 != 2 || access.dtype.fp8().is_none() {
                return fault(Rule::Operand, format!("{role}: double_row takes fp8 of shape [K, 2, columns]"));
            }
        }
    }
    if transpose {
        if double || accumulate == Some(true) {
            return fault(Rule::Operand, "a transpose has no perf_mode and does not accumulate");
        }
        return Ok(Op::MatmulTranspose { dst, stationary, moving });
    }
    Ok(Op::Matmul { dst, stationary, moving, depth: if double { 2 } else { 1 }, accumulate })
}

/// Row tiling: a contraction over part of the array's rows, which starts at a multiple of its size.
fn row_tile(args: &mut Args, stationary: Slot) -> Result<()> {
    let (position, size) = (args.sizes("tile_position")?, args.sizes("tile_size")?);
    let used = args.operands[stationary].access.partitions();
    match (&position[..], &size[..]) {
        ([], []) => Ok(()),
        (&[row, column], &[rows @ (32 | 64 | 128), columns @ (32 | 64 | 128)])
            if row % rows == 0 && row + rows <= PARTITIONS && column % columns == 0 && used <= rows =>
        {
            Ok(())
        }
        _ => fault(Rule::Operand, format!("tile_position {position:?}, tile_size {size:?} with {used} rows in use")),
    }
}

/// A constant that dst's type can hold, as bits.
fn constant(args: &mut Args, name: &str, dst: Slot) -> Result<u32> {
    let dtype = args.operands[dst].access.dtype;
    if let Some((low, high)) = dtype.range() {
        let value = match args.attrs.get(name) {
            Some(serde_json::Value::Bool(b)) if dtype == Dtype::Bool => {
                let value = i64::from(*b);
                args.attrs.remove(name);
                value
            }
            _ => args.int(name)?,
        };
        if !(low..=high).contains(&value) {
            return fault(Rule::Value, format!("{name} {value} does not fit {}", dtype.name()));
        }
        return Ok(value as u32 & dtype.mask());
    }
    let value = number(args, name)?;
    if dtype.is_float() {
        return dtype.round(value);
    }
    if value == 0.0 {
        Ok(0)
    } else {
        fault(Rule::Value, format!("only 0 can be set into {}, got {value}", dtype.name()))
    }
}

pub(super) fn number(args: &mut Args, name: &str) -> Result<f32> {
    match args.number_opt(name)? {
        Some(x) => Ok(x),
        None => fault(Rule::Malformed, format!("no {name}")),
    }
}

/// The reduction of a VectorE instruction.
pub(super) fn vector_reduce(args: &mut Args, op: Alu) -> Result<Reduce> {
    let command = args.command("reduce_cmd")?;
    let init = args.factor_opt("reduce_init")?;
    if (command == Command::LoadReduce) != init.is_some() {
        return fault(Rule::Malformed, "reduce_init goes with load_reduce, and only with it");
    }
    Ok(Reduce { unit: Unit::Vector, op, command, init, result: args.write_opt("reduce_res"), negate: false })
}

/// A step with a number, a column or nothing as its second input.
pub(super) fn arithmetic_step(args: &mut Args, op: &str, operand: &'static str, reverse: &str) -> Result<Step> {
    let op = args.alu(op)?;
    let reverse = args.flag(reverse)?;
    let other = match args.factor_opt(operand)? {
        None | Some(Factor::Number(0.0)) if op.is_unary() => Other::None,
        Some(factor) if !op.is_unary() => Other::Factor(factor),
        _ => {
            return fault(
                Rule::Malformed,
                format!("{operand}: one second input for a binary operator, none for a unary one"),
            );
        }
    };
    Ok(Step { op, other, reverse })
}

fn bit_step(args: &mut Args, op: &str, operand: &'static str, reverse: &str, dtype: Dtype) -> Result<BitStep> {
    let op = args.alu(op)?;
    let reverse = args.flag(reverse)?;
    if let Some(slot) = args.read_opt(operand) {
        return Ok(BitStep { op, other: BitOther::Column(slot), reverse });
    }
    if op.is_unary() {
        args.ignore(&[operand]);
        return Ok(BitStep { op, other: BitOther::None, reverse });
    }
    let value = args.int(operand)?;
    let width = 8 * dtype.size() as u32;
    if !(-(1i64 << (width - 1))..1i64 << width).contains(&value) {
        return fault(Rule::Value, format!("{operand} {value} does not fit {}", dtype.name()));
    }
    Ok(BitStep { op, other: BitOther::Bits(value as u32 & dtype.mask()), reverse })
}

fn take_tensor_scalar(args: &mut Args) -> Result<Op> {
    let (dst, data) = (args.write("dst")?, args.read("data")?);
    let bitwise = |args: &Args, name: &str| {
        args.attrs.get(name).and_then(|v| v.as_str()).and_then(Alu::by_name).is_some_and(Alu::is_bitwise)
    };
    let second = args.attrs.contains_key("op1");
    if second && bitwise(args, "op0") != bitwise(args, "op1") {
        return fault(Rule::Operand, "op0 and op1 must both be bitwise or both arithmetic");
    }
    let op = if bitwise(args, "op0") {
        let dtype = args.operands[data].access.dtype;
        let mut steps = vec![bit_step(args, "op0", "operand0", "reverse0", dtype)?];
        if second {
            steps.push(bit_step(args, "op1", "operand1", "reverse1", dtype)?);
        }
        Op::Bitwise { dst, data, steps }
    } else {
        let mut steps = vec![arithmetic_step(args, "op0", "operand0", "reverse0")?];
        if second {
            steps.push(arithmetic_step(args, "op1", "operand1", "reverse1")?);
        }
        Op::Elementwise { dst, data, steps, reduce: None }
    };
    if !second {
        args.ignore(&["reverse1"]);
    }
    Ok(op)
}

fn affine(args: &mut Args) -> Result<Affine> {
    let levels = args.affine("pattern")?;
    let multiplier = args.int("channel_multiplier")?;
    if multiplier.unsigned_abs() >= 1 << 32 {
        return fault(Rule::Value, format!("channel_multiplier {multiplier} is not a 32-bit int"));
    }
    Ok(Affine { levels, multiplier, offset: args.int_or_register("offset")? })
}
