//! The operands and immediate values of one instruction, taken by role; what is left over is an error.
#![forbid(unsafe_code)]

use super::alu::{Alu, Function};
use super::fault::{Result, Rule, fault};
use super::program::{Access, Operand};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// Position of an operand in its instruction.
pub(super) type Slot = usize;

/// A number, or a column with one element for each partition.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Factor {
    /// The same for all.
    Number(f32),
    /// One for each partition.
    Column(Slot),
}

/// An int, or a register that holds one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Int {
    /// Known when the program was made.
    Value(i64),
    /// Known at run time.
    Register(usize),
}

/// What is done with an engine's reduction registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    /// Nothing asked (VectorE's may be disturbed all the same).
    Idle,
    /// Set to the start of the reduction.
    Reset,
    /// Go on from what they hold.
    Reduce,
    /// Set to the start, then reduce.
    ResetReduce,
    /// Set to given values, then reduce.
    LoadReduce,
}

/// The parts of one instruction not yet taken, and the operands taken so far.
pub(super) struct Args {
    pub(super) writes: BTreeMap<String, Access>,
    pub(super) reads: BTreeMap<String, Access>,
    pub(super) attrs: Map<String, Value>,
    pub(super) operands: Vec<Operand>,
    /// How many registers the program has named so far; grows as they are taken.
    pub(super) registers: usize,
}

/// Registers a program may have; the hardware has far fewer.
const MAX_REGISTERS: usize = 1 << 16;

impl Args {
    /// Checks a register number.
    pub(super) fn register(&mut self, number: u64) -> Result<usize> {
        match usize::try_from(number) {
            Ok(n) if n < MAX_REGISTERS => {
                self.registers = self.registers.max(n + 1);
                Ok(n)
            }
            _ => fault(Rule::Limit, format!("register {number}: a program may have {MAX_REGISTERS}")),
        }
    }

    fn push(&mut self, role: &'static str, access: Access, written: bool) -> Slot {
        self.operands.push(Operand { role, access, written });
        self.operands.len() - 1
    }

    /// A written operand, if there is one.
    pub(super) fn write_opt(&mut self, role: &'static str) -> Option<Slot> {
        let access = self.writes.remove(role)?;
        Some(self.push(role, access, true))
    }

    /// A written operand.
    pub(super) fn write(&mut self, role: &'static str) -> Result<Slot> {
        match self.write_opt(role) {
            Some(slot) => Ok(slot),
            None => fault(Rule::Malformed, format!("writes no {role}")),
        }
    }

    /// A read operand, if there is one.
    pub(super) fn read_opt(&mut self, role: &'static str) -> Option<Slot> {
        let access = self.reads.remove(role)?;
        Some(self.push(role, access, false))
    }

    /// A read operand.
    pub(super) fn read(&mut self, role: &'static str) -> Result<Slot> {
        match self.read_opt(role) {
            Some(slot) => Ok(slot),
            None => fault(Rule::Malformed, format!("reads no {role}")),
        }
    }

    /// Drops immediate values that only tell the compiler how, not what.
    pub(super) fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.attrs.remove(*name);
        }
    }

    /// A flag; absent is false.
    pub(super) fn flag(&mut self, name: &str) -> Result<bool> {
        match self.attrs.remove(name) {
            None => Ok(false),
            Some(Value::Bool(b)) => Ok(b),
            Some(other) => fault(Rule::Malformed, format!("{name} is {other}, needed true or false")),
        }
    }

    /// A flag with a third state.
    pub(super) fn flag_opt(&mut self, name: &str) -> Result<Option<bool>> {
        if self.attrs.contains_key(name) { self.flag(name).map(Some) } else { Ok(None) }
    }

    /// A name, if there is one.
    pub(super) fn text_opt(&mut self, name: &str) -> Result<Option<String>> {
        match self.attrs.remove(name) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => fault(Rule::Malformed, format!("{name} is {other}, needed a name")),
        }
    }

    /// An operator, if there is one.
    pub(super) fn alu_opt(&mut self, name: &str) -> Result<Option<Alu>> {
        let Some(text) = self.text_opt(name)? else { return Ok(None) };
        match Alu::by_name(&text) {
            Some(op) => Ok(Some(op)),
            None => fault(Rule::Malformed, format!("{name} is {text:?}, which is not an operator")),
        }
    }

    /// An operator.
    pub(super) fn alu(&mut self, name: &str) -> Result<Alu> {
        match self.alu_opt(name)? {
            Some(op) => Ok(op),
            None => fault(Rule::Malformed, format!("no {name}")),
        }
    }

    /// A ScalarE function.
    pub(super) fn function(&mut self, name: &str) -> Result<Function> {
        let text = self.text_opt(name)?.unwrap_or_default();
        match Function::by_name(&text) {
            Some(function) => Ok(function),
            None => fault(Rule::Malformed, format!("{name} is {text:?}, which is not an activation function")),
        }
    }

    /// A number; infinities and NaN come by name.
    pub(super) fn number_opt(&mut self, name: &str) -> Result<Option<f32>> {
        let Some(value) = self.attrs.remove(name) else { return Ok(None) };
        let number = match &value {
            Value::Number(n) => n.as_f64().map(|x| x as f32),
            Value::String(s) => match s.as_str() {
                "inf" => Some(f32::INFINITY),
                "-inf" => Some(f32::NEG_INFINITY),
                "nan" => Some(f32::NAN),
                _ => None,
            },
            _ => None,
        };
        match number {
            Some(x) => Ok(Some(x)),
            None => fault(Rule::Malformed, format!("{name} is {value}, needed a number")),
        }
    }

    /// A number or a column, if there is one.
    pub(super) fn factor_opt(&mut self, role: &'static str) -> Result<Option<Factor>> {
        match self.read_opt(role) {
            Some(slot) => Ok(Some(Factor::Column(slot))),
            None => Ok(self.number_opt(role)?.map(Factor::Number)),
        }
    }

    /// An int.
    pub(super) fn int(&mut self, name: &str) -> Result<i64> {
        match self.attrs.remove(name) {
            Some(Value::Number(n)) if n.as_i64().is_some() => Ok(n.as_i64().unwrap_or_default()),
            Some(other) => fault(Rule::Malformed, format!("{name} is {other}, needed an int")),
            None => fault(Rule::Malformed, format!("no {name}")),
        }
    }

    /// An int or a register.
    pub(super) fn int_or_register(&mut self, name: &str) -> Result<Int> {
        match self.attrs.get(name) {
            Some(Value::Object(_)) => self.register_named(name).map(Int::Register),
            _ => self.int(name).map(Int::Value),
        }
    }

    /// A register.
    pub(super) fn register_named(&mut self, name: &str) -> Result<usize> {
        let number = self.attrs.remove(name).and_then(|v| v.get("register").and_then(Value::as_u64));
        match number {
            Some(n) => self.register(n),
            None => fault(Rule::Malformed, format!("{name} is not a register")),
        }
    }

    /// A list of small non-negative ints; absent is empty.
    pub(super) fn sizes(&mut self, name: &str) -> Result<Vec<usize>> {
        let value = match self.attrs.remove(name) {
            None => return Ok(vec![]),
            Some(Value::Array(items)) => items,
            Some(other) => vec![other],
        };
        let sizes = value.iter().map(|v| v.as_u64().and_then(|n| usize::try_from(n).ok())).collect::<Option<Vec<_>>>();
        match sizes {
            Some(sizes) => Ok(sizes),
            None => fault(Rule::Malformed, format!("{name} is not a list of non-negative ints")),
        }
    }

    /// An affine pattern: `[[step, count], ...]`, 1 to 4 levels.
    pub(super) fn affine(&mut self, name: &str) -> Result<Vec<(i64, usize)>> {
        let items = match self.attrs.remove(name) {
            Some(Value::Array(items)) if (1..=4).contains(&items.len()) => items,
            _ => return fault(Rule::Malformed, format!("{name} is not a list of 1 to 4 levels")),
        };
        let level = |v: &Value| {
            let pair = v.as_array().filter(|p| p.len() == 2)?;
            let step = pair[0].as_i64().filter(|s| s.unsigned_abs() < 1 << 32)?;
            Some((step, usize::try_from(pair[1].as_u64()?).ok()?))
        };
        match items.iter().map(level).collect::<Option<Vec<_>>>() {
            Some(levels) => Ok(levels),
            None => fault(Rule::Malformed, format!("{name} has a level that is not [step, count]")),
        }
    }

    /// What to do with the reduction registers; absent is idle.
    pub(super) fn command(&mut self, name: &str) -> Result<Command> {
        match self.text_opt(name)?.as_deref() {
            None | Some("idle") => Ok(Command::Idle),
            Some("reset") => Ok(Command::Reset),
            Some("reduce") => Ok(Command::Reduce),
            Some("reset_reduce") => Ok(Command::ResetReduce),
            Some("load_reduce") => Ok(Command::LoadReduce),
            Some(other) => fault(Rule::Malformed, format!("{name} is {other:?}, which is not a reduce command")),
        }
    }

    /// Whether out-of-range indices are skipped instead of refused.
    pub(super) fn skips(&mut self) -> Result<bool> {
        match self.text_opt("oob_mode")?.as_deref() {
            None | Some("error") => Ok(false),
            Some("skip") => Ok(true),
            Some(other) => fault(Rule::Malformed, format!("oob_mode is {other:?}, needed error or skip")),
        }
    }

    /// Asks that nothing is left.
    pub(super) fn finish(&self) -> Result<()> {
        let left = self.writes.keys().chain(self.reads.keys()).chain(self.attrs.keys()).next();
        match left {
            None => Ok(()),
            Some(name) => fault(Rule::Malformed, format!("{name:?} is not an argument of this instruction")),
        }
    }
}
