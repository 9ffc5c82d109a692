//! Registers: 32-bit runtime scalars.
#![forbid(unsafe_code)]

use super::super::fault::{Result, Rule, fault};
use super::super::machine::Execution;
use super::super::memory::{Elements, Psum};
use super::super::op::Op;

pub(in super::super) fn execute(x: &mut Execution<'_, '_>) -> Result<()> {
    match x.instruction.op {
        Op::RegisterAlloc { register, value } => x.machine.set_register(register, value),
        Op::RegisterMove { register, from } => {
            let value = x.machine.int(from)?;
            x.machine.set_register(register, Some(value))
        }
        Op::RegisterLoad { register, src } => {
            let bits = x.bits(src)?.first().copied().unwrap_or_default();
            x.machine.set_register(register, Some(x.dtype(src).integer(bits)))
        }
        Op::RegisterStore { dst, register } => {
            let (value, dtype) = (x.machine.register(register)?, x.dtype(dst));
            match dtype.range() {
                Some((low, high)) if (low..=high).contains(&value) => {
                    x.store(dst, &Elements::defined(vec![value as u32 & dtype.mask()]), None, Psum::Other)
                }
                _ => fault(Rule::Value, format!("dst: {value} does not fit {}", dtype.name())),
            }
        }
        _ => Ok(()),
    }
}
