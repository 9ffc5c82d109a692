//! From TOML to a [`Manifest`]: every name resolved, every expression of the kind that its place needs.
#![forbid(unsafe_code)]

use super::evaluate::{self, Kind, Names};
use super::expression::{self, Expression, Formula};
use super::{Constraint, Input, KernelEntry, Manifest, Output, Parameter, ParameterKind, Stored, Types};
use crate::trainium::{Dtype, Target};
use crate::{Error, Result};
use serde::Deserialize;
use std::collections::BTreeSet;

/// Bytes of a manifest.
const MAX_TEXT: usize = 1 << 20;
/// Kernels of a manifest, and entries of each list of a kernel.
const MAX_LIST: usize = 128;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawManifest {
    kernel: Vec<RawKernel>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawKernel {
    name: String,
    file: String,
    entry: String,
    targets: Vec<String>,
    layout: Option<String>,
    inputs: Vec<RawInput>,
    parameters: Vec<RawParameter>,
    #[serde(default)]
    definitions: Vec<RawDefinition>,
    outputs: Vec<RawOutput>,
    constraints: Vec<RawConstraint>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawInput {
    name: String,
    dtype: String,
    shape: String,
    #[serde(default)]
    optional: bool,
    alias: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawParameter {
    name: String,
    kind: String,
    #[serde(default)]
    optional: bool,
    default: Option<RawDefault>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum RawDefault {
    Bool(bool),
    Int(i64),
    Real(f64),
    Text(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDefinition {
    name: String,
    value: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawOutput {
    name: String,
    dtype: String,
    shape: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConstraint {
    name: String,
    text: String,
    check: String,
}

fn problem<T>(at: impl Into<String>, problem: impl Into<String>) -> Result<T> {
    Err(Error::Manifest { at: at.into(), problem: problem.into() })
}

/// The result of a part of kernel `kernel`, an error with its place.
fn within<T>(kernel: &str, part: &str, name: &str, result: std::result::Result<T, String>) -> Result<T> {
    result.or_else(|text| problem(format!("{kernel}: {part} {name:?}"), text))
}

pub(super) fn manifest(text: &str) -> Result<Manifest> {
    if text.len() > MAX_TEXT {
        return problem("manifest", format!("{} bytes, the limit is {MAX_TEXT}", text.len()));
    }
    let raw: RawManifest = toml::from_str(text).or_else(|e| problem("manifest", e.to_string()))?;
    let mut names = BTreeSet::new();
    for kernel in &raw.kernel {
        if !names.insert(kernel.name.clone()) {
            return problem("manifest", format!("two kernels are called {:?}", kernel.name));
        }
    }
    if raw.kernel.len() > MAX_LIST {
        return problem("manifest", format!("{} kernels, the limit is {MAX_LIST}", raw.kernel.len()));
    }
    Ok(Manifest { kernels: raw.kernel.into_iter().map(kernel).collect::<Result<_>>()? })
}

/// What the expressions of a kernel may name.
#[derive(Default)]
struct Known {
    values: Vec<(String, Kind)>,
    tensors: Vec<String>,
}

impl Names for Known {
    fn kind(&self, name: &str) -> Option<Kind> {
        self.values.iter().find(|(n, _)| n == name).map(|(_, kind)| *kind)
    }

    fn is_tensor(&self, name: &str) -> bool {
        self.tensors.iter().any(|n| n == name)
    }
}

impl Known {
    /// Whether `name` can be given to something new.
    fn free(&self, name: &str) -> std::result::Result<(), String> {
        if !expression::is_name(name) {
            return Err("it is not a name, or a word of the language".into());
        }
        if self.is_tensor(name) || self.kind(name).is_some() { Err("the name is taken".into()) } else { Ok(()) }
    }

    /// The names without the tensors: what shapes may use.
    fn without_tensors(&self) -> Known {
        Known { values: self.values.clone(), tensors: vec![] }
    }
}

fn kernel(raw: RawKernel) -> Result<KernelEntry> {
    let kernel = raw.name;
    let lists =
        [raw.inputs.len(), raw.parameters.len(), raw.definitions.len(), raw.outputs.len(), raw.constraints.len()];
    if let Some(length) = lists.into_iter().chain([raw.targets.len()]).find(|n| *n > MAX_LIST) {
        return problem(kernel, format!("a list of {length}, the limit is {MAX_LIST}"));
    }
    let mut targets = Vec::with_capacity(raw.targets.len());
    for name in &raw.targets {
        match Target::by_name(name) {
            Some(target) => targets.push(target),
            None => return within(&kernel, "target", name, Err("needed trn1, trn2 or trn3".into())),
        }
    }

    let mut known = Known::default();
    let mut parameters = Vec::with_capacity(raw.parameters.len());
    for p in raw.parameters {
        within(&kernel, "parameter", &p.name, known.free(&p.name))?;
        let (kind, value) = parameter_kind(&p.kind);
        let default = p.default.map(|d| if p.optional { Err("it is optional".into()) } else { stored(d, &kind) });
        let default = within(&kernel, "default of parameter", &p.name, default.transpose())?;
        known.values.push((p.name.clone(), value));
        parameters.push(Parameter { name: p.name, kind, optional: p.optional, default });
    }
    for input in &raw.inputs {
        within(&kernel, "input", &input.name, known.free(&input.name))?;
        known.tensors.push(input.name.clone());
    }

    // Dimensions are the names that stand alone in a shape and are nothing else. Definitions come after them.
    let defined: BTreeSet<&str> = raw.definitions.iter().map(|d| d.name.as_str()).collect();
    let mut formulas = Vec::with_capacity(raw.inputs.len());
    for input in &raw.inputs {
        let formula = within(&kernel, "input", &input.name, expression::formula(&input.shape))?;
        for extent in formula.iter().flatten() {
            if let Expression::Name(name) = extent
                && known.kind(name).is_none()
                && !defined.contains(name.as_str())
            {
                within(&kernel, "dimension", name, known.free(name))?;
                known.values.push((name.clone(), Kind::Number));
            }
        }
        formulas.push(formula);
    }
    let mut definitions = Vec::with_capacity(raw.definitions.len());
    for definition in &raw.definitions {
        within(&kernel, "definition", &definition.name, known.free(&definition.name))?;
        let value = within(&kernel, "definition", &definition.name, Expression::parse(&definition.value))?;
        let kind = within(&kernel, "definition", &definition.name, evaluate::kind(&value, &known))?;
        known.values.push((definition.name.clone(), kind));
        definitions.push((definition.name.clone(), value));
    }

    // A shape that asked whether a tensor fits could ask about itself.
    let shapes = known.without_tensors();
    let extents = |part: &str, name: &str, formula: &Formula| {
        let result = formula.iter().flatten().try_for_each(|e| evaluate::expect(e, &shapes, Kind::Number));
        within(&kernel, part, name, result)
    };
    for (input, formula) in raw.inputs.iter().zip(&formulas) {
        extents("input", &input.name, formula)?;
    }
    let names: Vec<String> = raw.inputs.iter().map(|i| i.name.clone()).collect();
    let mut inputs = Vec::with_capacity(raw.inputs.len());
    for (input, formula) in raw.inputs.into_iter().zip(formulas) {
        let types = types(&input.dtype, &names[..inputs.len()], &parameters);
        let dtype = within(&kernel, "input", &input.name, types)?;
        if let Some(alias) = &input.alias
            && !raw.outputs.iter().any(|o| o.name == *alias)
        {
            within(&kernel, "input", &input.name, Err::<(), _>(format!("no output is called {alias:?}")))?;
        }
        let (name, shape, optional, alias) = (input.name, input.shape, input.optional, input.alias);
        inputs.push(Input { name, dtype, formula, shape, optional, alias });
    }
    let mut outputs: Vec<Output> = Vec::with_capacity(raw.outputs.len());
    for output in raw.outputs {
        if outputs.iter().any(|o| o.name == output.name) {
            within(&kernel, "output", &output.name, Err::<(), _>("the name is taken".into()))?;
        }
        let formula = within(&kernel, "output", &output.name, expression::formula(&output.shape))?;
        extents("output", &output.name, &formula)?;
        let Ok([only]) = <[_; 1]>::try_from(formula) else {
            return problem(format!("{kernel}: output {:?}", output.name), "alternatives in the shape of an output");
        };
        let dtype = within(&kernel, "output", &output.name, types(&output.dtype, &names, &parameters))?;
        within(&kernel, "output", &output.name, unique(&dtype, &parameters))?;
        outputs.push(Output { name: output.name, dtype, extents: only, shape: output.shape });
    }
    let mut constraints: Vec<Constraint> = Vec::with_capacity(raw.constraints.len());
    for c in raw.constraints {
        if constraints.iter().any(|other| other.name == c.name) {
            within(&kernel, "constraint", &c.name, Err::<(), _>("the name is taken".into()))?;
        }
        let check = within(&kernel, "constraint", &c.name, Expression::parse(&c.check))?;
        within(&kernel, "constraint", &c.name, evaluate::expect(&check, &known, Kind::Truth))?;
        constraints.push(Constraint { name: c.name, text: c.text, check });
    }
    Ok(KernelEntry {
        name: kernel,
        file: raw.file,
        entry: raw.entry,
        targets,
        layout: raw.layout,
        inputs,
        parameters,
        definitions,
        outputs,
        constraints,
    })
}

fn parameter_kind(text: &str) -> (ParameterKind, Kind) {
    match text {
        "int" => (ParameterKind::Int, Kind::Number),
        "f32" => (ParameterKind::F32, Kind::Number),
        "bool" => (ParameterKind::Bool, Kind::Truth),
        choices => (ParameterKind::OneOf(choices.split('|').map(|c| c.trim().into()).collect()), Kind::Text),
    }
}

fn stored(default: RawDefault, kind: &ParameterKind) -> std::result::Result<Stored, String> {
    Ok(match (default, kind) {
        (RawDefault::Bool(value), ParameterKind::Bool) => Stored::Bool(value),
        (RawDefault::Int(value), ParameterKind::Int | ParameterKind::F32) => Stored::Int(value),
        (RawDefault::Real(value), ParameterKind::F32) => Stored::Real(value),
        (RawDefault::Text(value), ParameterKind::OneOf(choices)) if choices.contains(&value) => Stored::Text(value),
        _ => return Err("the default is not of its kind".into()),
    })
}

/// `bf16 | f32`, `dtype of INPUT` or `value of PARAMETER`.
fn types(text: &str, inputs: &[String], parameters: &[Parameter]) -> std::result::Result<Types, String> {
    if let Some(name) = text.strip_prefix("dtype of ") {
        let at = inputs.iter().position(|i| i == name.trim());
        return at.map(Types::OfInput).ok_or_else(|| format!("no input before it is called {name:?}"));
    }
    if let Some(name) = text.strip_prefix("value of ") {
        let at = parameters.iter().position(|p| p.name == name.trim());
        let at = at.ok_or_else(|| format!("no parameter is called {name:?}"))?;
        let ParameterKind::OneOf(choices) = &parameters[at].kind else {
            return Err(format!("{name} does not name a type"));
        };
        choices.iter().try_for_each(|c| nrt_name(c).map(drop))?;
        return Ok(Types::OfParameter(at));
    }
    Ok(Types::OneOf(text.split('|').map(|name| nrt_name(name.trim())).collect::<std::result::Result<_, _>>()?))
}

fn nrt_name(name: &str) -> std::result::Result<&'static str, String> {
    Dtype::all().filter_map(Dtype::nrt_name).find(|n| *n == name).ok_or_else(|| format!("libnrt has no type {name:?}"))
}

/// Whether the type of an output follows from the call, and is one NKI type.
fn unique(types: &Types, parameters: &[Parameter]) -> std::result::Result<(), String> {
    let one = |name: &str| match Dtype::all().filter(|d| d.nrt_name() == Some(name)).count() {
        1 => Ok(()),
        _ => Err(format!("{name} is more than one type")),
    };
    match types {
        Types::OneOf(names) => match &names[..] {
            [name] => one(name),
            _ => Err("which of these types it has does not follow from a call".into()),
        },
        Types::OfInput(_) => Ok(()),
        Types::OfParameter(at) => match parameters.get(*at).map(|p| &p.kind) {
            Some(ParameterKind::OneOf(choices)) => choices.iter().try_for_each(|c| one(c)),
            _ => Err("its type is not a parameter's".into()),
        },
    }
}
