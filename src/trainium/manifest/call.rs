//! A call held against its kernel's entry.
#![forbid(unsafe_code)]

use super::evaluate::{Evaluator, MAX_STEPS, Problem, Scope, Value, Worth};
use super::expression::{Expression, Query};
use super::{Constraint, Input, KernelEntry, Parameter, ParameterKind, Types};
use crate::trainium::{Dtype, Target};
use crate::{Error, Result};
use std::cell::Cell;

/// A compile-time argument of a call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Argument<'a> {
    /// A whole number.
    Int(i64),
    /// A number.
    Real(f64),
    /// True or false.
    Bool(bool),
    /// One of a parameter's texts.
    Text(&'a str),
}

/// A call that its kernel serves.
#[derive(Debug, Clone, PartialEq)]
pub struct Bound {
    dims: Vec<(String, usize)>,
    inputs: Vec<BoundTensor>,
    outputs: Vec<BoundTensor>,
}

/// A tensor of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BoundTensor {
    /// Its name in the manifest.
    pub name: String,
    /// Its element type; libnrt knows it by [`Dtype::nrt_name`].
    pub dtype: Dtype,
    /// Its extents, outermost first.
    pub shape: Vec<usize>,
    /// All its bytes.
    pub bytes: usize,
}

impl Bound {
    /// The dimension or numeric definition called `name`.
    pub fn dim(&self, name: &str) -> Option<usize> {
        self.dims.iter().find(|(n, _)| n == name).map(|(_, extent)| *extent)
    }

    /// All dimensions and the definitions that are extents.
    pub fn dims(&self) -> &[(String, usize)] {
        &self.dims
    }

    /// The tensors given, in the order of the manifest.
    pub fn inputs(&self) -> &[BoundTensor] {
        &self.inputs
    }

    /// The tensors that the kernel will give.
    pub fn outputs(&self) -> &[BoundTensor] {
        &self.outputs
    }
}

/// A tensor as it was given.
#[derive(Clone, Copy)]
struct Given<'a> {
    dtype: Dtype,
    shape: &'a [usize],
}

/// What the names of an entry are worth in a call.
struct Call<'a> {
    entry: &'a KernelEntry,
    target: Target,
    tensors: Vec<Option<Given<'a>>>,
    parameters: Vec<Option<Value<'a>>>,
    dims: Vec<(&'a str, usize)>,
    definitions: Vec<(&'a str, Value<'a>)>,
    steps: Cell<u32>,
}

impl KernelEntry {
    /// Checks a call. `inputs` are the tensors given, by name, type and extents in any order; `parameters` the compile-time
    /// arguments, of which those with a default or marked optional may be left out.
    ///
    /// # Errors
    /// [`Error::Constraint`] for the first constraint, in the order of the manifest, that does not hold.
    /// [`Error::Missing`], [`Error::Unexpected`] for a name that is not there, not known or there twice.
    /// [`Error::Unsupported`] for a parameter of another kind, and for a shape or type outside the entry's lists that no
    /// constraint names. [`Error::Overflow`] if the bytes of a tensor do not fit `usize`.
    pub fn check(
        &self,
        target: Target,
        inputs: &[(&str, Dtype, impl AsRef<[usize]>)],
        parameters: &[(&str, Argument<'_>)],
    ) -> Result<Bound> {
        let mut call = Call {
            entry: self,
            target,
            tensors: self.given(inputs)?,
            parameters: self.arguments(parameters)?,
            dims: Vec::new(),
            definitions: Vec::new(),
            steps: Cell::new(MAX_STEPS),
        };
        for (input, given) in self.inputs.iter().zip(&call.tensors) {
            if given.is_some_and(|given| given.shape.contains(&0)) {
                return call.unsupported(call.describe(&input.name), "each axis needs at least 1".into());
            }
        }
        call.bind();
        for constraint in &self.constraints {
            call.hold(constraint)?;
        }
        call.finish()
    }

    fn given<'a>(&self, inputs: &'a [(&str, Dtype, impl AsRef<[usize]>)]) -> Result<Vec<Option<Given<'a>>>> {
        let mut tensors = vec![None; self.inputs.len()];
        for (name, dtype, shape) in inputs {
            let slot = self.inputs.iter().position(|i| i.name == *name).and_then(|at| tensors.get_mut(at));
            self.put(name, slot, Given { dtype: *dtype, shape: shape.as_ref() })?;
        }
        match self.inputs.iter().zip(&tensors).find(|(i, tensor)| tensor.is_none() && !i.optional) {
            Some((input, _)) => self.missing(&input.name),
            None => Ok(tensors),
        }
    }

    fn arguments<'a>(&'a self, arguments: &[(&str, Argument<'a>)]) -> Result<Vec<Option<Value<'a>>>> {
        let mut values = vec![None; self.parameters.len()];
        for (name, argument) in arguments {
            let at = self.parameters.iter().position(|p| p.name == *name);
            let value = match at.and_then(|at| self.parameters.get(at)) {
                Some(parameter) => parameter.value(*argument)?,
                None => Value::Truth(false),
            };
            self.put(name, at.and_then(|at| values.get_mut(at)), value)?;
        }
        for (parameter, value) in self.parameters.iter().zip(&mut values).filter(|(_, value)| value.is_none()) {
            match parameter.default_value() {
                Some(default) => *value = Some(parameter.value(default)?),
                None if parameter.optional => {}
                None => return self.missing(&parameter.name),
            }
        }
        Ok(values)
    }

    /// Fills the place of `name`, which is there and empty.
    fn put<T>(&self, name: &str, slot: Option<&mut Option<T>>, value: T) -> Result<()> {
        let because = match slot {
            None => format!("{} has none of that name", self.name),
            Some(Some(_)) => "it was given before".to_owned(),
            Some(empty) => {
                *empty = Some(value);
                return Ok(());
            }
        };
        Err(Error::Unexpected { operand: name.to_owned().into(), because: because.into() })
    }

    fn missing<T>(&self, name: &str) -> Result<T> {
        Err(Error::Missing { operand: name.to_owned().into(), needed_by: self.name.clone().into() })
    }
}

impl Parameter {
    /// An argument as a value of this parameter's kind. Which texts there are is left to the constraints.
    fn value<'a>(&self, argument: Argument<'a>) -> Result<Value<'a>> {
        match (argument, &self.kind) {
            (Argument::Int(int), ParameterKind::Int | ParameterKind::F32) => Ok(Value::Int(int.into())),
            (Argument::Real(real), ParameterKind::F32) => Ok(Value::Real(real)),
            (Argument::Bool(truth), ParameterKind::Bool) => Ok(Value::Truth(truth)),
            (Argument::Text(text), ParameterKind::OneOf(_)) => Ok(Value::Text(text)),
            (_, kind) => Err(Error::Unsupported {
                what: format!("{} = {argument:?}", self.name),
                because: format!("its kind is {kind:?}"),
            }),
        }
    }
}

impl<'a> Scope<'a> for Call<'a> {
    fn value(&self, name: &'a str) -> Worth<'a, Value<'a>> {
        if name == "target" {
            return Ok(Value::Text(self.target.name()));
        }
        if let Some((_, extent)) = self.dims.iter().find(|(n, _)| *n == name) {
            return Ok(Value::Int(*extent as i128));
        }
        if let Some((_, value)) = self.definitions.iter().find(|(n, _)| *n == name) {
            return Ok(*value);
        }
        let parameter = self.entry.parameters.iter().zip(&self.parameters).find(|(p, _)| p.name == name);
        parameter.and_then(|(_, value)| *value).ok_or(Problem::Undefined(name))
    }

    fn steps(&self) -> &Cell<u32> {
        &self.steps
    }

    fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensor(name)?.1.map(|given| given.shape)
    }

    fn query(&self, query: Query, name: &'a str, evaluator: &Evaluator<'_, 'a>) -> Worth<'a, Value<'a>> {
        let Some((input, given)) = self.tensor(name) else {
            // A parameter: whether it is given is all that can be asked.
            return Ok(Value::Truth(self.value(name).is_ok()));
        };
        Ok(match (query, given) {
            (Query::Given, given) => Value::Truth(given.is_some()),
            (Query::Fits, None) => Value::Truth(true),
            (Query::Fits, Some(given)) => Value::Truth(fits(input, given.shape, evaluator)?),
            (Query::Dtype, given) => Value::Text(given.map_or("none", |g| g.dtype.name())),
            (Query::Size, Some(given)) => Value::Int(given.dtype.size() as i128),
            (Query::Rank, Some(given)) => Value::Int(given.shape.len() as i128),
            (Query::Size | Query::Rank, None) => return Err(Problem::Undefined(name)),
        })
    }
}

/// Whether a shape is one of the alternatives of an input.
fn fits<'a>(input: &'a Input, shape: &[usize], evaluator: &Evaluator<'_, 'a>) -> Worth<'a, bool> {
    let mut problem = None;
    for alternative in input.formula.iter().filter(|a| a.len() == shape.len()) {
        let mut same = true;
        for (extent, got) in alternative.iter().zip(shape) {
            match evaluator.extent(extent) {
                Ok(needed) => same &= needed == Some(*got),
                Err(p) => {
                    problem = Some(p);
                    same = false;
                }
            }
        }
        if same {
            return Ok(true);
        }
    }
    problem.map_or(Ok(false), Err)
}

impl<'a> Call<'a> {
    fn tensor(&self, name: &str) -> Option<(&'a Input, Option<Given<'a>>)> {
        self.entry.inputs.iter().zip(&self.tensors).find(|(i, _)| i.name == name).map(|(i, given)| (i, *given))
    }

    /// Gives dimensions the extents of the first tensor, in the order of the manifest, in whose shape they stand alone; then
    /// works out the definitions. What cannot be known stays unknown: a constraint that asks for it does not hold.
    fn bind(&mut self) {
        let entry = self.entry;
        let is_definition = |name: &str| entry.definitions.iter().any(|(n, _)| n == name);
        for (input, given) in entry.inputs.iter().zip(&self.tensors) {
            let Some(given) = given else { continue };
            let Some(alternative) = input.formula.iter().find(|a| a.len() == given.shape.len()) else { continue };
            for (extent, got) in alternative.iter().zip(given.shape) {
                if let Expression::Name(name) = extent
                    && !self.dims.iter().any(|(n, _)| n == name)
                    && !is_definition(name)
                    && entry.parameter(name).is_none()
                {
                    self.dims.push((name, *got));
                }
            }
        }
        for (name, value) in &entry.definitions {
            if let Ok(value) = Evaluator::new(self).value(value) {
                self.definitions.push((name, value));
            }
        }
    }

    /// Checks that a constraint holds.
    fn hold(&self, constraint: &'a Constraint) -> Result<()> {
        let check = &constraint.check;
        let problem = match Evaluator::new(self).truth(check) {
            Ok(true) => return Ok(()),
            Ok(false) => None,
            Err(problem) => Some(problem),
        };
        let mut got: Vec<String> = Vec::new();
        check.names(&mut |name| {
            let text = self.describe(name);
            if !got.contains(&text) {
                got.push(text);
            }
        });
        got.extend(problem.map(|p| p.to_string()));
        Err(Error::Constraint {
            kernel: self.entry.name.clone(),
            constraint: constraint.name.clone(),
            got: got.join(", "),
            needed: constraint.text.clone(),
        })
    }

    /// A name with what it is in this call.
    fn describe(&self, name: &'a str) -> String {
        match (self.tensor(name), self.value(name)) {
            (Some((_, Some(given))), _) => format!("{name} = {} {:?}", given.dtype.name(), given.shape),
            (_, Ok(Value::Int(int))) => format!("{name} = {int}"),
            (_, Ok(Value::Real(real))) => format!("{name} = {real:?}"),
            (_, Ok(Value::Truth(truth))) => format!("{name} = {truth}"),
            (_, Ok(Value::Text(text))) => format!("{name} = {text}"),
            (_, Err(_)) => format!("no {name}"),
        }
    }

    fn unsupported<T>(&self, what: String, because: String) -> Result<T> {
        Err(Error::Unsupported { what: format!("{}: {what}", self.entry.name), because })
    }

    /// What holds for every kernel, whether a constraint names it or not; then the outputs.
    fn finish(self) -> Result<Bound> {
        let entry = self.entry;
        if !entry.targets.contains(&self.target) {
            let targets: Vec<&str> = entry.targets.iter().map(|t| t.name()).collect();
            return self.unsupported(self.target.name().into(), format!("it is for {}", targets.join(", ")));
        }
        for (parameter, value) in entry.parameters.iter().zip(&self.parameters) {
            if let (ParameterKind::OneOf(choices), Some(Value::Text(text))) = (&parameter.kind, value)
                && !choices.iter().any(|c| c == text)
            {
                let what = format!("{} = {text}", parameter.name);
                return self.unsupported(what, format!("it is one of {}", choices.join(", ")));
            }
        }
        let evaluator = Evaluator::new(&self);
        let mut inputs = Vec::new();
        for (at, (input, given)) in entry.inputs.iter().zip(&self.tensors).enumerate() {
            let Some(given) = given else { continue };
            let what = || self.describe(&input.name);
            let needed = match fits(input, given.shape, &evaluator) {
                Ok(true) => None,
                Ok(false) => Some(format!("its shape is {}", input.shape)),
                Err(problem) => Some(format!("its shape is {}; {problem}", input.shape)),
            };
            if let Some(needed) = needed {
                return self.unsupported(what(), needed);
            }
            if !self.has_type(at, given.dtype) {
                return self.unsupported(what(), "the kernel does not take that type".into());
            }
            inputs.push(tensor(&input.name, given.dtype, given.shape.to_vec())?);
        }
        let mut outputs = Vec::new();
        for output in &entry.outputs {
            let mut shape = Vec::with_capacity(output.extents.len());
            for e in &output.extents {
                match evaluator.extent(e) {
                    Ok(Some(extent)) => shape.push(extent),
                    Ok(None) => return Err(Error::Overflow { operand: output.name.clone().into() }),
                    Err(problem) => {
                        return self.unsupported(output.name.clone(), format!("{}: {problem}", output.shape));
                    }
                }
            }
            match self.output_type(&output.dtype) {
                Some(dtype) => outputs.push(tensor(&output.name, dtype, shape)?),
                None => return self.unsupported(output.name.clone(), "its type is not known".into()),
            }
        }
        let defined = self.definitions.iter().filter_map(|(name, value)| match value {
            Value::Int(int) => Some((*name, usize::try_from(*int).ok()?)),
            _ => None,
        });
        let dims = self.dims.iter().copied().chain(defined).map(|(name, extent)| (name.to_owned(), extent)).collect();
        Ok(Bound { dims, inputs, outputs })
    }

    /// Whether input `at` may be of this type.
    fn has_type(&self, at: usize, dtype: Dtype) -> bool {
        match self.entry.inputs.get(at).map(|i| &i.dtype) {
            Some(Types::OneOf(names)) => dtype.nrt_name().is_some_and(|n| names.contains(&n)),
            Some(Types::OfInput(other)) => {
                self.tensors.get(*other).is_some_and(|t| t.is_some_and(|t| t.dtype == dtype))
            }
            Some(Types::OfParameter(parameter)) => {
                dtype.nrt_name().is_some() && dtype.nrt_name() == self.text(*parameter)
            }
            None => false,
        }
    }

    fn output_type(&self, types: &Types) -> Option<Dtype> {
        let name = match types {
            Types::OfInput(at) => return self.tensors.get(*at)?.map(|t| t.dtype),
            Types::OneOf(names) => names.first().copied(),
            Types::OfParameter(parameter) => self.text(*parameter),
        };
        Dtype::all().find(|d| d.nrt_name().is_some() && d.nrt_name() == name)
    }

    fn text(&self, parameter: usize) -> Option<&'a str> {
        if let Some(Some(Value::Text(text))) = self.parameters.get(parameter) { Some(text) } else { None }
    }
}

fn tensor(name: &str, dtype: Dtype, shape: Vec<usize>) -> Result<BoundTensor> {
    let bytes = shape.iter().try_fold(dtype.size(), |bytes, extent| bytes.checked_mul(*extent));
    let bytes = bytes.ok_or_else(|| Error::Overflow { operand: name.to_owned().into() })?;
    Ok(BoundTensor { name: name.to_owned(), dtype, shape, bytes })
}
