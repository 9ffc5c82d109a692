//! Arguments of the instructions that this repository's kernels do not use, but others' do (NKI 0.6 API reference, `nki.isa`).
#![forbid(unsafe_code)]

use super::alu::Alu;
use super::args::{Args, Command, Factor};
use super::fault::{Result, Rule, fault};
use super::op::{Op, Other, Reduce, Step, Unit, arithmetic_step, number};

/// Names of the sources of `dma_compute`.
const SOURCES: [&str; 16] = [
    "src0", "src1", "src2", "src3", "src4", "src5", "src6", "src7", "src8", "src9", "src10", "src11", "src12", "src13",
    "src14", "src15",
];

/// Takes an instruction's arguments by its name.
pub(super) fn take(name: &str, args: &mut Args) -> Result<Op> {
    Ok(match name {
        "dma_compute" => {
            let dst = args.write("dst")?;
            let srcs = SOURCES.iter().map_while(|role| args.read_opt(role)).collect();
            if args.alu("reduce_op")? != Alu::Add {
                return fault(Rule::Operand, "dma_compute adds; it has no other operator");
            }
            Op::DmaCompute { dst, srcs, skip: args.skips()? }
        }
        "activate2" => return take_activate2(args),
        "tensor_tensor_scan" => {
            let (dst, data) = (args.write("dst")?, [args.read("data0")?, args.read("data1")?]);
            let Some(initial) = args.factor_opt("initial")? else { return fault(Rule::Malformed, "no initial") };
            let steps = [(args.alu("op0")?, args.flag("reverse0")?), (args.alu("op1")?, args.flag("reverse1")?)];
            Op::Scan { dst, data, initial, steps }
        }
        "tensor_scalar_cumulative" => {
            let (dst, src) = (args.write("dst")?, args.read("src")?);
            let step = arithmetic_step(args, "op0", "imm0", "reverse0")?;
            let (op, command) = (args.alu("op1")?, args.command("reduce_cmd")?);
            let init = args.factor_opt("imm1")?;
            if (command == Command::LoadReduce) != init.is_some() {
                return fault(Rule::Malformed, "imm1 goes with load_reduce, and only with it");
            }
            if matches!(command, Command::Idle | Command::Reset) {
                return fault(Rule::Operand, "reduce_cmd is not reset_reduce, reduce or load_reduce");
            }
            let reduce = Reduce { unit: Unit::Vector, op, command, init, result: None, negate: false };
            Op::Cumulative { dst, src, step, reduce }
        }
        "bn_stats" => Op::BnStats { dst: args.write("dst")?, data: args.read("data")? },
        "bn_aggr" => Op::BnAggr { dst: args.write("dst")?, data: args.read("data")? },
        "max8" => Op::Max8 { dst: args.write("dst")?, src: args.read("src")? },
        "nc_find_index8" => {
            Op::FindIndex8 { dst: args.write("dst")?, data: args.read("data")?, wanted: args.read("vals")? }
        }
        "nc_match_replace8" => {
            let (dst, index) = (args.write("dst")?, args.write_opt("dst_idx"));
            let (data, wanted, value) = (args.read("data")?, args.read("vals")?, number(args, "imm")?);
            Op::MatchReplace8 { dst, data, wanted, value, index }
        }
        "nc_n_gather" => {
            Op::Gather { dst: args.write("dst")?, data: args.read("data")?, indices: args.read("indices")? }
        }
        "local_gather" => {
            let (dst, src, index) = (args.write("dst")?, args.read("src_buffer")?, args.read("index")?);
            let mut size = |name: &str| match args.sizes(name)?[..] {
                [size] => Ok(size),
                _ => fault(Rule::Malformed, format!("no {name}")),
            };
            Op::LocalGather { dst, src, index, run: size("num_elem_per_idx")?, valid: size("num_valid_indices")? }
        }
        "nc_stream_shuffle" => {
            let (dst, src) = (args.write("dst")?, args.read("src")?);
            let mask = args.sizes("shuffle_mask")?.into_iter().map(|from| match from {
                0..32 => Some(Some(from)),
                255 => Some(None),
                _ => None,
            });
            let mask: Option<Vec<Option<usize>>> = mask.collect();
            match mask.and_then(|m| m.into_boxed_slice().try_into().ok()) {
                Some(mask) => Op::Shuffle { dst, src, mask },
                None => return fault(Rule::Malformed, "shuffle_mask is not 32 of 0..32 and 255"),
            }
        }
        "sequence_bounds" => Op::SequenceBounds { dst: args.write("dst")?, ids: args.read("segment_ids")? },
        "nonzero_with_count" => {
            let (dst, src) = (args.write("dst")?, args.read("src")?);
            Op::NonzeroWithCount { dst, src, offset: args.int("index_offset")?, padding: args.int("padding_val")? }
        }
        _ => return fault(Rule::Malformed, "this instruction is not one the emulator has"),
    })
}

fn take_activate2(args: &mut Args) -> Result<Op> {
    let (dst, data, function) = (args.write("dst")?, args.read("data")?, args.function("op")?);
    let mut names = [None, None];
    let mut steps = vec![];
    for (i, (op, imm, reverse)) in [("op0", "imm0", "reverse0"), ("op1", "imm1", "reverse1")].into_iter().enumerate() {
        let bypass = matches!(args.attrs.get(op).and_then(|v| v.as_str()), None | Some("bypass"));
        let other = args.factor_opt(imm)?;
        let reverse = args.flag(reverse)?;
        if bypass {
            args.ignore(&[op]);
            if reverse {
                return fault(Rule::Operand, format!("{op} is bypass, which has no order to reverse"));
            }
            continue;
        }
        let op = args.alu(op)?;
        let Some(other) = other else { return fault(Rule::Malformed, format!("no {imm}")) };
        names[i] = Some(op);
        steps.push(Step { op, other: Other::Factor(other), reverse });
    }
    if !matches!(
        names,
        [Some(Alu::Multiply), Some(Alu::Add | Alu::Subtract) | None] | [Some(Alu::Add | Alu::Subtract) | None, None]
    ) {
        return fault(Rule::Operand, format!("{names:?} are not two operators that activate2 combines"));
    }
    if !matches!(args.factor_opt("relu_param")?, None | Some(Factor::Number(0.0))) {
        return fault(Rule::Operand, "relu_param: none of the functions here takes one");
    }
    let command = args.command("reduce_cmd")?;
    let op = args.alu_opt("reduce_op")?.unwrap_or(Alu::Add);
    let result = args.write_opt("reduce_res");
    let reduce = Reduce { unit: Unit::Scalar, op, command, init: None, result, negate: false };
    Ok(Op::Activate2 { dst, data, function, steps, reduce })
}
