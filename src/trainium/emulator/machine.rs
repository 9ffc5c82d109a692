//! Runs a program: instructions in order, each reading all it needs before it writes.
#![forbid(unsafe_code)]

use super::args::{Factor, Int, Slot};
use super::dtype::Dtype;
use super::exec;
use super::fault::{Result, Rule, fault};
use super::memory::{Elements, Memory, Psum, Region};
use super::op::{Op, Unit};
use super::program::{Access, Dynamic, Instruction, PARTITIONS, Program, Source};
use super::rules::fits_register;
use crate::quant::ScaleRule;

/// What the documents leave to the device or state in two ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Block scale of `quantize_mx`: [`ScaleRule::Trainium`] as documented since NKI 0.5, or [`ScaleRule::Floor`] as in the
    /// older published goldens. Other rules are not the device's and are refused.
    pub scale_rule: ScaleRule,
}

impl Default for Options {
    fn default() -> Self {
        Options { scale_rule: ScaleRule::Trainium }
    }
}

impl Program {
    /// Runs the program. `inputs` are the bytes of [`Program::inputs`], in order (little-endian, row-major); returned are the
    /// bytes of [`Program::outputs`], in order.
    ///
    /// Every compute instruction works in f32 and rounds once into its destination; matmuls form exact products and add them
    /// in f64 before they round to f32, since the order of the array's additions is not documented; other sums run in f32 in
    /// ascending order.
    ///
    /// # Errors
    /// A [`Fault`](super::Fault): inputs of the wrong number or size, or what the program did wrong and where.
    pub fn run(&self, inputs: &[&[u8]], options: &Options) -> Result<Vec<Vec<u8>>> {
        if !matches!(options.scale_rule, ScaleRule::Trainium | ScaleRule::Floor) {
            return fault(
                Rule::Operand,
                format!("scale rule {:?}; the device has Trainium or Floor", options.scale_rule),
            );
        }
        if inputs.len() != self.inputs.len() {
            return fault(Rule::Operand, format!("{} inputs, needed {}", inputs.len(), self.inputs.len()));
        }
        for (port, data) in self.inputs.iter().zip(inputs) {
            let needed = self.tensors[port.tensor].bytes();
            if data.len() != needed {
                return fault(
                    Rule::Operand,
                    format!("input {:?} has {} bytes, needed {needed}", port.name, data.len()),
                );
            }
        }
        let mut machine = Machine::new(self, options);
        for (port, data) in self.inputs.iter().zip(inputs) {
            machine.memory.fill(port.tensor, data);
        }
        for (i, instruction) in self.instructions.iter().enumerate() {
            machine.execute(instruction).map_err(|f| f.within(i, &instruction.name))?;
        }
        let output = |port: &super::Port| match machine.memory.bytes(port.tensor) {
            Ok(bytes) => Ok(bytes.to_vec()),
            Err(f) => fault(f.rule, format!("output {:?}: {}", port.name, f.message)),
        };
        self.outputs.iter().map(output).collect()
    }
}

/// Reduction registers of an engine: one for each partition, `None` until set.
type Accumulators = [Option<f32>; PARTITIONS];

/// The state of a run.
pub(super) struct Machine<'a> {
    pub(super) program: &'a Program,
    pub(super) options: &'a Options,
    pub(super) memory: Memory,
    registers: Vec<Option<i64>>,
    vector: Accumulators,
    scalar: Accumulators,
}

impl<'a> Machine<'a> {
    fn new(program: &'a Program, options: &'a Options) -> Self {
        Machine {
            program,
            options,
            memory: Memory::new(program),
            registers: vec![None; program.registers],
            vector: [None; PARTITIONS],
            scalar: [None; PARTITIONS],
        }
    }

    fn execute(&mut self, instruction: &Instruction) -> Result<()> {
        let mut step = Execution { machine: self, instruction };
        match &instruction.op {
            Op::DmaCopy { .. } | Op::DmaTranspose { .. } | Op::DmaCompute { .. } => exec::dma::execute(&mut step),
            Op::Copy { .. } | Op::Memset { .. } | Op::CopyPredicated { .. } | Op::Transpose { .. } => {
                exec::copy::execute(&mut step)
            }
            Op::Matmul { .. } | Op::MatmulTranspose { .. } => exec::matmul::execute(&mut step),
            Op::MatmulMx { .. } | Op::QuantizeMx { .. } => exec::mx::execute(&mut step),
            Op::Activation { .. }
            | Op::Activate2 { .. }
            | Op::Elementwise { .. }
            | Op::Bitwise { .. }
            | Op::ExactInteger { .. }
            | Op::TensorReduce { .. }
            | Op::BitReduce { .. }
            | Op::PartitionReduce { .. } => exec::arithmetic::execute(&mut step),
            Op::Scan { .. } | Op::Cumulative { .. } | Op::BnStats { .. } | Op::BnAggr { .. } => {
                exec::running::execute(&mut step)
            }
            Op::Max8 { .. }
            | Op::FindIndex8 { .. }
            | Op::MatchReplace8 { .. }
            | Op::Gather { .. }
            | Op::LocalGather { .. }
            | Op::Shuffle { .. }
            | Op::SequenceBounds { .. }
            | Op::NonzeroWithCount { .. } => exec::search::execute(&mut step),
            Op::Iota { .. } | Op::AffineSelect { .. } | Op::RangeSelect { .. } | Op::SelectReduce { .. } => {
                exec::select::execute(&mut step)
            }
            Op::RegisterAlloc { .. } | Op::RegisterMove { .. } | Op::RegisterLoad { .. } | Op::RegisterStore { .. } => {
                exec::register::execute(&mut step)
            }
        }
    }

    /// The accumulators of an engine.
    pub(super) fn accumulators(&mut self, unit: Unit) -> &mut Accumulators {
        match unit {
            Unit::Vector => &mut self.vector,
            Unit::Scalar => &mut self.scalar,
        }
    }

    /// A register's value.
    pub(super) fn register(&self, register: usize) -> Result<i64> {
        match self.registers.get(register) {
            Some(Some(value)) => Ok(*value),
            _ => fault(Rule::Uninitialised, format!("register {register} was never set")),
        }
    }

    /// Sets a register; `None` leaves it undefined.
    pub(super) fn set_register(&mut self, register: usize, value: Option<i64>) -> Result<()> {
        if let Some(value) = value.filter(|v| !fits_register(*v)) {
            return fault(Rule::Value, format!("{value} does not fit a 32-bit register"));
        }
        match self.registers.get_mut(register) {
            Some(r) => *r = value,
            None => return fault(Rule::Reference, format!("register {register}")),
        }
        Ok(())
    }

    /// An int that may be in a register.
    pub(super) fn int(&self, int: Int) -> Result<i64> {
        match int {
            Int::Value(value) => Ok(value),
            Int::Register(register) => self.register(register),
        }
    }
}

/// One instruction at work.
pub(super) struct Execution<'m, 'a> {
    pub(super) machine: &'m mut Machine<'a>,
    pub(super) instruction: &'m Instruction,
}

impl Execution<'_, '_> {
    /// An operand's access.
    pub(super) fn access(&self, slot: Slot) -> &Access {
        &self.instruction.operands[slot].access
    }

    /// Its type.
    pub(super) fn dtype(&self, slot: Slot) -> Dtype {
        self.access(slot).dtype
    }

    /// Its name.
    pub(super) fn role(&self, slot: Slot) -> &'static str {
        self.instruction.operands[slot].role
    }

    /// The bytes an operand names, runtime offsets filled in. With `skip`, rows whose index is out of range are left out.
    pub(super) fn region(&mut self, slot: Slot, skip: bool) -> Result<Region> {
        let (program, instruction) = (self.machine.program, self.instruction);
        let Some(operand) = instruction.operands.get(slot) else {
            return fault(Rule::Malformed, "an operand is missing");
        };
        let (a, role) = (&operand.access, operand.role);
        let tensor = &program.tensors[a.tensor];
        match &a.dynamic {
            None => self.machine.memory.region(a, tensor, a.offset),
            Some(dynamic) if dynamic.vector => self.gathered(a, dynamic, role, skip),
            Some(dynamic) => {
                let value = self.indices(dynamic, role)?.first().copied().unwrap_or(-1);
                let moved = usize::try_from(value).ok().and_then(|v| v.checked_mul(dynamic.scale));
                let offset = moved.and_then(|m| m.checked_add(a.offset));
                let region = match offset {
                    Some(offset) => self.machine.memory.region(a, tensor, offset),
                    None => fault(Rule::Bounds, "it is negative or beyond memory"),
                };
                match region {
                    Ok(region) => Ok(region),
                    Err(_) if skip => self.machine.memory.gathered(a, tensor, &vec![None; a.partitions()]),
                    Err(f) => fault(f.rule, format!("{role}: runtime offset {value}: {}", f.message)),
                }
            }
        }
    }

    fn gathered(&mut self, a: &Access, dynamic: &Dynamic, role: &str, skip: bool) -> Result<Region> {
        let indices = self.indices(dynamic, role)?;
        let n = a.partitions();
        if indices.len() < n {
            return fault(Rule::Bounds, format!("{role}: {n} rows with {} indices", indices.len()));
        }
        let mut rows = Vec::with_capacity(n);
        for (i, &index) in indices.iter().take(n).enumerate() {
            match usize::try_from(index).ok().filter(|&v| v < dynamic.extent) {
                Some(v) => match v.checked_mul(dynamic.scale) {
                    Some(row) => rows.push(Some(row)),
                    None => return fault(Rule::Bounds, format!("{role}: row {v} lies beyond memory")),
                },
                None if skip => rows.push(None),
                None => {
                    return fault(
                        Rule::Bounds,
                        format!("{role}: index {index} of row {i}, needed 0 <= index < {}", dynamic.extent),
                    );
                }
            }
        }
        self.machine.memory.gathered(a, &self.machine.program.tensors[a.tensor], &rows)
    }

    /// Runtime indices: a register, or a tensor's elements, partitions first.
    fn indices(&mut self, dynamic: &Dynamic, role: &str) -> Result<Vec<i64>> {
        let index = match &dynamic.source {
            Source::Register(register) => return Ok(vec![self.machine.register(*register)?]),
            Source::Index(index) => index,
        };
        let tensor = &self.machine.program.tensors[index.tensor];
        let region = self.machine.memory.region(index, tensor, index.offset)?;
        let bits = self.machine.memory.read_defined(&region, &format!("{role}: index"))?;
        let (rows, columns) = (index.partitions(), index.free());
        Ok((0..rows * columns).map(|i| index.dtype.integer(bits[i % rows * columns + i / rows])).collect())
    }

    /// An operand's values; undefined ones are an error.
    pub(super) fn values(&mut self, slot: Slot) -> Result<Vec<f32>> {
        let (dtype, role) = (self.dtype(slot), self.role(slot));
        let region = self.region(slot, false)?;
        self.machine.memory.values(&region, dtype, role)
    }

    /// An operand's bits; undefined ones are an error.
    pub(super) fn bits(&mut self, slot: Slot) -> Result<Vec<u32>> {
        let role = self.role(slot);
        let region = self.region(slot, false)?;
        self.machine.memory.read_defined(&region, role)
    }

    /// An operand's elements, undefined ones among them.
    pub(super) fn elements(&mut self, slot: Slot) -> Result<Elements> {
        let region = self.region(slot, false)?;
        Ok(self.machine.memory.read(&region))
    }

    /// A factor's value for each partition.
    pub(super) fn factor(&mut self, factor: Factor, partitions: usize) -> Result<Vec<f32>> {
        match factor {
            Factor::Number(x) => Ok(vec![x; partitions]),
            Factor::Column(slot) => self.values(slot),
        }
    }

    /// Stores elements into an operand.
    pub(super) fn store(&mut self, slot: Slot, data: &Elements, keep: Option<&[bool]>, psum: Psum) -> Result<()> {
        let region = self.region(slot, false)?;
        self.machine.memory.write(&region, data, keep, psum);
        Ok(())
    }

    /// Rounds values into an operand.
    pub(super) fn store_values(&mut self, slot: Slot, values: &[f32]) -> Result<()> {
        let bits = self.rounded(slot, values)?;
        self.store(slot, &Elements::defined(bits), None, Psum::Other)
    }

    /// Values rounded to an operand's type.
    pub(super) fn rounded(&self, slot: Slot, values: &[f32]) -> Result<Vec<u32>> {
        let (dtype, role) = (self.dtype(slot), self.role(slot));
        let bits: Result<Vec<u32>> = values.iter().map(|&x| dtype.round(x)).collect();
        bits.map_err(|f| super::Fault { message: format!("{role}: {}", f.message), ..f })
    }

    /// Physical partition of an operand's first element.
    pub(super) fn start_partition(&self, slot: Slot) -> usize {
        let a = self.access(slot);
        let tensor = &self.machine.program.tensors[a.tensor];
        tensor.start_partition() + a.offset * a.dtype.size() / tensor.row_bytes
    }
}
