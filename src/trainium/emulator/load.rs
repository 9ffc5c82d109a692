//! From JSON to a [`Program`]: nothing is allocated on a number's say-so before it is checked.
#![forbid(unsafe_code)]

use super::args::Args;
use super::check;
use super::dtype::Dtype;
use super::fault::{Result, Rule, fault};
use super::op;
use super::program::{Access, Buffer, Dynamic, Engine, Instruction, PARTITIONS, Port, Program, Source, Target, Tensor};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// The format this emulator reads.
const FORMAT: &str = "trn-kernels.program.1";

/// What a program may ask for. The defaults are far above every kernel of this crate at test shapes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of JSON.
    pub json_bytes: usize,
    /// Bytes of all tensors together (a run keeps four bytes of state for each).
    pub tensor_bytes: usize,
    /// Elements that all instructions together read, write and multiply.
    pub work: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { json_bytes: 256 << 20, tensor_bytes: 1 << 30, work: 1 << 40 }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawProgram {
    format: String,
    kernel: String,
    example: String,
    target: String,
    sources: BTreeMap<String, String>,
    parameters: BTreeMap<String, Value>,
    inputs: Vec<RawPort>,
    outputs: Vec<RawPort>,
    tensors: Vec<RawTensor>,
    instructions: Vec<RawInstruction>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPort {
    name: String,
    tensor: usize,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    /// For people who read the file.
    #[serde(rename = "name")]
    _name: String,
    shape: Vec<usize>,
    dtype: String,
    buffer: String,
    address: Option<(usize, usize)>,
    /// `[repetitions, hexadecimal bytes]`.
    data: Option<Vec<(usize, String)>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawInstruction {
    name: String,
    engine: String,
    writes: BTreeMap<String, RawOperand>,
    reads: BTreeMap<String, RawOperand>,
    attrs: Map<String, Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum RawOperand {
    Static(usize, String, usize, Vec<(usize, usize)>),
    Dynamic(usize, String, usize, Vec<(usize, usize)>, RawDynamic),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDynamic {
    kind: String,
    scale: usize,
    extent: usize,
    register: Option<u64>,
    index: Option<Box<RawOperand>>,
}

impl Program {
    /// Reads a program from JSON and checks everything that can be checked before it runs.
    ///
    /// # Errors
    /// A [`Fault`](super::Fault) that names the instruction and operand.
    pub fn from_json(json: &[u8], limits: &Limits) -> Result<Program> {
        if json.len() > limits.json_bytes {
            return fault(Rule::Limit, format!("{} bytes of JSON, the limit is {}", json.len(), limits.json_bytes));
        }
        let raw: RawProgram = match serde_json::from_slice(json) {
            Ok(raw) => raw,
            Err(e) => return fault(Rule::Malformed, e.to_string()),
        };
        if raw.format != FORMAT {
            return fault(Rule::Malformed, format!("format is {:?}, needed {FORMAT:?}", raw.format));
        }
        let Some(target) = Target::by_name(&raw.target) else {
            return fault(Rule::Malformed, format!("target is {:?}, needed trn1, trn2 or trn3", raw.target));
        };
        let tensors = load_tensors(raw.tensors, target, limits)?;
        let mut program = Program {
            kernel: raw.kernel,
            example: raw.example,
            target,
            sources: raw.sources.into_iter().collect(),
            parameters: raw.parameters.into_iter().map(|(name, value)| (name, text(value))).collect(),
            inputs: ports("inputs", raw.inputs, &tensors)?,
            outputs: ports("outputs", raw.outputs, &tensors)?,
            tensors,
            instructions: Vec::with_capacity(raw.instructions.len()),
            registers: 0,
        };
        let mut work = 0u64;
        for (i, raw) in raw.instructions.into_iter().enumerate() {
            let name = raw.name.clone();
            let instruction = program.load_instruction(raw).map_err(|f| f.within(i, &name))?;
            work = work.saturating_add(work_of(&instruction));
            if work > limits.work {
                return fault(Rule::Limit, format!("more than {} elements of work", limits.work));
            }
            program.instructions.push(instruction);
        }
        program.check_capacity()?;
        Ok(program)
    }

    fn load_instruction(&mut self, raw: RawInstruction) -> Result<Instruction> {
        let Some(engine) = Engine::by_name(&raw.engine) else {
            return fault(Rule::Malformed, format!("engine is {:?}", raw.engine));
        };
        let mut args = Args {
            writes: BTreeMap::new(),
            reads: BTreeMap::new(),
            attrs: raw.attrs,
            operands: Vec::with_capacity(raw.writes.len() + raw.reads.len()),
            registers: self.registers,
        };
        for (role, operand) in raw.writes {
            let access = self.load_access(operand, &mut args, true)?;
            args.writes.insert(role, access);
        }
        for (role, operand) in raw.reads {
            let access = self.load_access(operand, &mut args, true)?;
            args.reads.insert(role, access);
        }
        let op = op::parse(&raw.name, engine, self.target, &mut args, &self.tensors)?;
        self.registers = args.registers;
        Ok(Instruction { name: raw.name, engine, operands: args.operands, op })
    }

    fn load_access(&self, raw: RawOperand, args: &mut Args, may_be_dynamic: bool) -> Result<Access> {
        let (tensor, dtype, offset, dims, dynamic) = match raw {
            RawOperand::Static(tensor, dtype, offset, dims) => (tensor, dtype, offset, dims, None),
            RawOperand::Dynamic(tensor, dtype, offset, dims, dynamic) => (tensor, dtype, offset, dims, Some(dynamic)),
        };
        let Some(dtype) = Dtype::by_name(&dtype) else {
            return fault(Rule::Malformed, format!("{dtype:?} is not an element type"));
        };
        let dynamic = match dynamic {
            None => None,
            Some(_) if !may_be_dynamic => return fault(Rule::Malformed, "an index with a runtime address of its own"),
            Some(raw) => Some(self.load_dynamic(raw, args)?),
        };
        let access = Access { tensor, dtype, offset, dims, dynamic };
        check::access(&access, &self.tensors)?;
        let gathers = access.dynamic.as_ref().is_some_and(|d| d.vector);
        if gathers && self.tensors[tensor].buffer.on_chip() {
            return fault(Rule::Operand, "a gather or scatter of partitions; rows are gathered in HBM only");
        }
        Ok(access)
    }

    fn load_dynamic(&self, raw: RawDynamic, args: &mut Args) -> Result<Dynamic> {
        let vector = match raw.kind.as_str() {
            "scalar" => false,
            "vector" => true,
            other => return fault(Rule::Malformed, format!("a runtime offset of kind {other:?}")),
        };
        let source = match (raw.register, raw.index) {
            (Some(register), None) if !vector => Source::Register(args.register(register)?),
            (None, Some(index)) => {
                let index = self.load_access(*index, args, false)?;
                if !index.dtype.is_integer() || (!vector && index.count() != 1) {
                    return fault(Rule::Operand, "a runtime offset is an integer: one element, or a column of them");
                }
                Source::Index(Box::new(index))
            }
            _ => return fault(Rule::Malformed, "a runtime offset has a register or an index"),
        };
        Ok(Dynamic { vector, scale: raw.scale, extent: raw.extent, source })
    }

    /// Checks that the on-chip tensors live at any time fit, each from its first to its last use.
    fn check_capacity(&self) -> Result<()> {
        let mut lives: Vec<Option<(usize, usize)>> = vec![None; self.tensors.len()];
        for (at, instruction) in self.instructions.iter().enumerate() {
            for operand in &instruction.operands {
                let index = match &operand.access.dynamic {
                    Some(Dynamic { source: Source::Index(index), .. }) => Some(index.tensor),
                    _ => None,
                };
                for tensor in [Some(operand.access.tensor), index].into_iter().flatten() {
                    let life = lives[tensor].get_or_insert((at, at));
                    life.1 = at;
                }
            }
        }
        for (buffer, capacity) in [(Buffer::Sbuf, self.target.sbuf_bytes()), (Buffer::Psum, self.target.psum_bytes())] {
            // Tensors placed by the kernel share their bytes knowingly; the others need room of their own.
            let mut changes = vec![];
            for (tensor, life) in self.tensors.iter().zip(&lives) {
                if let (true, None, Some((from, to))) = (tensor.buffer == buffer, tensor.address, *life) {
                    changes.push((from, true, tensor.row_bytes));
                    changes.push((to + 1, false, tensor.row_bytes));
                }
            }
            changes.sort_unstable(); // at one instruction, what ends goes before what begins
            let mut used = 0;
            for (at, begins, bytes) in changes {
                used = if begins { used + bytes } else { used - bytes };
                if used > capacity {
                    let name = buffer.name();
                    let message =
                        format!("{used} bytes a partition of {name} are live, {} has {capacity}", self.target.name());
                    return Err(
                        super::Fault { at: None, rule: Rule::Limit, message }.within(at, &self.instructions[at].name)
                    );
                }
            }
        }
        Ok(())
    }
}

/// A compile-time argument as text.
fn text(value: Value) -> String {
    match value {
        Value::String(s) => s,
        other => other.to_string(),
    }
}

/// Elements an instruction touches, and products it forms.
fn work_of(instruction: &Instruction) -> u64 {
    let touched: u64 = instruction.operands.iter().map(|o| o.access.count() as u64).sum();
    let products = match &instruction.op {
        op::Op::Matmul { stationary, moving, .. } => (stationary, moving, 1),
        op::Op::MatmulMx { data: [stationary, moving], .. } => (stationary, moving, 4),
        _ => return touched,
    };
    let (stationary, moving, lanes) = products;
    let (s, v) = (&instruction.operands[*stationary].access, &instruction.operands[*moving].access);
    touched.saturating_add(s.count() as u64 * v.free() as u64 * lanes)
}

fn ports(what: &str, raw: Vec<RawPort>, tensors: &[Tensor]) -> Result<Vec<Port>> {
    let mut seen = std::collections::BTreeSet::new();
    for port in &raw {
        match tensors.get(port.tensor) {
            None => {
                return fault(
                    Rule::Reference,
                    format!("{what}: {:?} is tensor {} of {}", port.name, port.tensor, tensors.len()),
                );
            }
            Some(t) if t.buffer.on_chip() => {
                return fault(Rule::Operand, format!("{what}: {:?} is in {}, needed hbm", port.name, t.buffer.name()));
            }
            Some(_) if !seen.insert(port.tensor) => {
                return fault(Rule::Reference, format!("{what}: {:?} names a tensor for the second time", port.name));
            }
            Some(_) => {}
        }
    }
    Ok(raw.into_iter().map(|p| Port { name: p.name, tensor: p.tensor }).collect())
}

fn load_tensors(raw: Vec<RawTensor>, target: Target, limits: &Limits) -> Result<Vec<Tensor>> {
    if raw.len() >= usize::from(u16::MAX) {
        return fault(Rule::Limit, format!("{} tensors, the limit is {}", raw.len(), u16::MAX - 1));
    }
    let mut total = 0usize;
    let mut tensors = Vec::with_capacity(raw.len());
    for (i, raw) in raw.into_iter().enumerate() {
        let made = load_tensor(raw, target, limits.tensor_bytes - total);
        let tensor = made.map_err(|f| super::Fault { message: format!("tensor {i}: {}", f.message), ..f })?;
        total += tensor.bytes();
        tensors.push(tensor);
    }
    Ok(tensors)
}

fn load_tensor(raw: RawTensor, target: Target, bytes_left: usize) -> Result<Tensor> {
    let (Some(dtype), Some(buffer)) = (Dtype::by_name(&raw.dtype), Buffer::by_name(&raw.buffer)) else {
        return fault(Rule::Malformed, format!("dtype {:?}, buffer {:?}", raw.dtype, raw.buffer));
    };
    let product = |extents: &[usize]| extents.iter().try_fold(dtype.size(), |n, &e| n.checked_mul(e));
    let bytes = product(&raw.shape).filter(|&n| n > 0 && !raw.shape.is_empty());
    let Some(bytes) = bytes.filter(|&n| n <= bytes_left) else {
        return fault(Rule::Limit, format!("shape {:?} has no element or more than {bytes_left} bytes", raw.shape));
    };
    let (rows, row_bytes) = if buffer.on_chip() { (raw.shape[0], bytes / raw.shape[0]) } else { (1, bytes) };
    let capacity = if buffer == Buffer::Psum { target.psum_bytes() } else { target.sbuf_bytes() };
    if buffer.on_chip() {
        if raw.shape.len() < 2 || rows > PARTITIONS || row_bytes > capacity {
            return fault(
                Rule::Limit,
                format!("shape {:?}: needed (partitions <= 128, at most {capacity} bytes)", raw.shape),
            );
        }
        if let Some((partition, byte)) = raw.address {
            let inside = partition.checked_add(rows).is_some_and(|p| p <= PARTITIONS)
                && byte.checked_add(row_bytes).is_some_and(|b| b <= capacity);
            if !inside {
                return fault(Rule::Bounds, format!("address {:?} leaves {}", (partition, byte), buffer.name()));
            }
        }
    } else if raw.address.is_some() {
        return fault(Rule::Malformed, "an address in HBM");
    }
    let data = match raw.data {
        None => None,
        Some(_) if raw.address.is_some() => return fault(Rule::Malformed, "a constant with an address"),
        Some(runs) => Some(unpack(&runs, bytes)?),
    };
    Ok(Tensor { shape: raw.shape, dtype, buffer, rows, row_bytes, address: raw.address, data })
}

/// Bytes of `[repetitions, hexadecimal]` runs; `bytes` of them.
fn unpack(runs: &[(usize, String)], bytes: usize) -> Result<Vec<u8>> {
    let mut out = Vec::with_capacity(bytes);
    for (repeat, hex) in runs {
        let length = (hex.len() / 2).checked_mul(*repeat).and_then(|n| n.checked_add(out.len()));
        if hex.len() % 2 != 0 || length.is_none_or(|n| n > bytes) {
            return fault(Rule::Malformed, format!("data: a run of {repeat} x {} digits in {bytes} bytes", hex.len()));
        }
        let digit = |c: u8| (c as char).to_digit(16).map(|d| d as u8);
        let mut unit = Vec::with_capacity(hex.len() / 2);
        for pair in hex.as_bytes().chunks_exact(2) {
            let (Some(high), Some(low)) = (digit(pair[0]), digit(pair[1])) else {
                return fault(Rule::Malformed, "data: not hexadecimal");
            };
            unit.push(high << 4 | low);
        }
        if !unit.is_empty() {
            for _ in 0..*repeat {
                out.extend_from_slice(&unit);
            }
        }
    }
    if out.len() == bytes { Ok(out) } else { fault(Rule::Malformed, format!("data: {} bytes of {bytes}", out.len())) }
}
