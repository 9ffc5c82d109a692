//! A loaded model: the program, parsed once, and its variables under the names that a client binds.
#![forbid(unsafe_code)]

use crate::abi::{NAME_MAX, status};
use crate::calls::{Outcome, refuse};
use crate::container::Container;
use crate::settings::Settings;
use serde_json::Value;
use std::collections::BTreeSet;
use trn_kernels::trainium::emulator::{Dtype, Limits, Port, Program};

/// Ending of an input's name that is updated in place: the output without it is the same tensor.
const ALIAS: &str = ".must_alias_input";

/// An input or output of a model.
pub(crate) struct Variable {
    pub(crate) name: String,
    pub(crate) bytes: usize,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Whether the program reads or writes it as one of the x4 types.
    pub(crate) x4: bool,
}

impl Variable {
    /// Bytes as the runtime reports them.
    pub(crate) fn reported_bytes(&self, settings: &Settings) -> usize {
        if self.x4 && settings.quarters_x4() { self.bytes / 4 } else { self.bytes }
    }
}

/// A model, shared by its executions.
pub(crate) struct Loaded {
    pub(crate) program: Program,
    /// In the order of the program's ports.
    pub(crate) inputs: Vec<Variable>,
    pub(crate) outputs: Vec<Variable>,
    /// Input and output that must be one tensor.
    pub(crate) aliases: Vec<(usize, usize)>,
}

fn invalid<T>(reason: impl Into<String>) -> Outcome<T> {
    refuse(status::INVALID, reason)
}

impl Loaded {
    /// Parses and checks the program and its variables.
    pub(crate) fn new(container: &Container) -> Outcome<Loaded> {
        let program = match Program::from_json(&container.program, &Limits::default()) {
            Ok(program) => program,
            Err(fault) => return invalid(format!("program.json: {fault}")),
        };
        let names = names(&container.definition, &program)?;
        let (inputs, outputs) = names.split_at(program.inputs().len());
        let describe = |names: &[String], ports: &[Port]| -> Vec<Variable> {
            names.iter().zip(ports).map(|(name, port)| variable(name, port, &program)).collect()
        };
        let inputs = describe(inputs, program.inputs());
        let outputs = describe(outputs, program.outputs());
        let mut aliases = vec![];
        for (i, input) in inputs.iter().enumerate() {
            let Some(name) = input.name.strip_suffix(ALIAS) else { continue };
            match outputs.iter().position(|o| o.name == name && o.bytes == input.bytes) {
                Some(o) => aliases.push((i, o)),
                None => return invalid(format!("def.json: {} has no output {name:?} of its size", input.name)),
            }
        }
        Ok(Loaded { program, inputs, outputs, aliases })
    }
}

fn variable(name: &str, port: &Port, program: &Program) -> Variable {
    let tensor = &program.tensors()[port.tensor];
    let accesses = || program.instructions().iter().flat_map(|i| i.operands()).map(|o| &o.access);
    Variable {
        name: name.into(),
        bytes: tensor.bytes(),
        dtype: tensor.dtype(),
        shape: tensor.shape().to_vec(),
        x4: tensor.dtype().is_packed() || accesses().any(|a| a.tensor == port.tensor && a.dtype.is_packed()),
    }
}

/// Names of all ports, inputs first: `var_id` counts the program's inputs, then its outputs.
fn names(definition: &[u8], program: &Program) -> Outcome<Vec<String>> {
    let definition: Value = match serde_json::from_slice(definition) {
        Ok(definition) => definition,
        Err(e) => return invalid(format!("def.json: {e}")),
    };
    let ports: Vec<(&str, usize)> = [("input", program.inputs()), ("output", program.outputs())]
        .into_iter()
        .flat_map(|(kind, ports)| ports.iter().map(move |p| (kind, program.tensors()[p.tensor].bytes())))
        .collect();
    let mut names = vec![None; ports.len()];
    let mut seen = BTreeSet::new();
    for (name, variable) in definition.get("var").and_then(Value::as_object).into_iter().flatten() {
        let kind = variable.get("type").and_then(Value::as_str).unwrap_or_default();
        if !matches!(kind, "input" | "output") {
            continue;
        }
        let id = variable.get("var_id").and_then(Value::as_u64).and_then(|id| usize::try_from(id).ok());
        let size = variable.get("size").and_then(Value::as_u64).and_then(|size| usize::try_from(size).ok());
        let fits = id.filter(|&id| size.is_some_and(|size| ports.get(id) == Some(&(kind, size))) && seen.insert(id));
        let named = name.len() < NAME_MAX && !name.contains('\0');
        let (Some(id), true) = (fits, named) else {
            return invalid(format!("def.json: {name:?} is not a variable of the program"));
        };
        names[id] = Some(name.clone());
    }
    let found: Option<Vec<String>> = names.into_iter().collect();
    match found {
        Some(names) => Ok(names),
        None => invalid(format!("def.json: {} variables of {}", seen.len(), ports.len())),
    }
}
