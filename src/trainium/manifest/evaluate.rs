//! What an expression is worth: its kind, found when the manifest is read, and its value in a call.
#![forbid(unsafe_code)]

use super::expression::{Arithmetic, Comparison, Expression, Extreme, Query, Search};
use std::cell::Cell;
use std::fmt;

/// What an expression gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Number,
    Truth,
    Text,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Number => "a number",
            Kind::Truth => "true or false",
            Kind::Text => "a text",
        })
    }
}

/// Names that an expression may use.
pub(super) trait Names {
    /// Kind of the dimension, parameter or definition called `name`.
    fn kind(&self, name: &str) -> Option<Kind>;
    /// Whether a tensor is called `name`.
    fn is_tensor(&self, name: &str) -> bool;
}

/// The kind of an expression, every part of it checked.
pub(super) fn kind(e: &Expression, names: &dyn Names) -> Result<Kind, String> {
    kind_with(e, names, &[])
}

/// Checks that an expression is of a kind.
pub(super) fn expect(e: &Expression, names: &dyn Names, needed: Kind) -> Result<(), String> {
    expect_with(e, names, &[], needed)
}

fn expect_with(e: &Expression, names: &dyn Names, locals: &[&str], needed: Kind) -> Result<(), String> {
    match kind_with(e, names, locals)? {
        got if got == needed => Ok(()),
        got => Err(format!("{got} where {needed} is needed")),
    }
}

fn kind_with(e: &Expression, names: &dyn Names, locals: &[&str]) -> Result<Kind, String> {
    let expect = |e, needed| expect_with(e, names, locals, needed);
    match e {
        Expression::Int(_) => Ok(Kind::Number),
        Expression::Text(_) => Ok(Kind::Text),
        Expression::Name(name) if locals.contains(&name.as_str()) => Ok(Kind::Number),
        Expression::Name(name) if name == "target" => Ok(Kind::Text),
        Expression::Name(name) => names.kind(name).ok_or_else(|| format!("nothing here is called {name}")),
        Expression::Negate(a) => expect(a, Kind::Number).map(|()| Kind::Number),
        Expression::Not(a) => expect(a, Kind::Truth).map(|()| Kind::Truth),
        Expression::Arithmetic(_, two) => {
            two.iter().try_for_each(|e| expect(e, Kind::Number))?;
            Ok(Kind::Number)
        }
        Expression::Compare(first, rest) => {
            let kind = kind_with(first, names, locals)?;
            for (comparison, e) in rest {
                if kind != Kind::Number && !matches!(comparison, Comparison::Equal | Comparison::NotEqual) {
                    return Err(format!("an order of {kind}"));
                }
                expect(e, kind)?;
            }
            Ok(Kind::Truth)
        }
        Expression::OneOf(a, list) => {
            let kind = kind_with(a, names, locals)?;
            list.iter().try_for_each(|e| expect(e, kind))?;
            Ok(Kind::Truth)
        }
        Expression::And(two) | Expression::Or(two) => {
            two.iter().try_for_each(|e| expect(e, Kind::Truth))?;
            Ok(Kind::Truth)
        }
        Expression::If { test, then, otherwise } => {
            expect(test, Kind::Truth)?;
            let kind = kind_with(then, names, locals)?;
            expect(otherwise, kind)?;
            Ok(kind)
        }
        Expression::Extreme(_, list) => {
            list.iter().try_for_each(|e| expect(e, Kind::Number))?;
            Ok(Kind::Number)
        }
        Expression::Search(s) => {
            [&s.from, &s.to].into_iter().try_for_each(|e| expect(e, Kind::Number))?;
            if locals.contains(&s.name.as_str()) || names.kind(&s.name).is_some() || names.is_tensor(&s.name) {
                return Err(format!("{} already has a meaning", s.name));
            }
            let inner = [locals, &[s.name.as_str()]].concat();
            expect_with(&s.item, names, &inner, Kind::Number)?;
            if let Some(filter) = &s.filter {
                expect_with(filter, names, &inner, Kind::Truth)?;
            }
            Ok(Kind::Number)
        }
        Expression::Shape(name, extents) => {
            if !names.is_tensor(name) {
                return Err(format!("no tensor is called {name}"));
            }
            extents.iter().try_for_each(|e| expect(e, Kind::Number))?;
            Ok(Kind::Truth)
        }
        Expression::Tensor(query, name) => {
            // A parameter too may be given or not.
            if !names.is_tensor(name) && (*query != Query::Given || names.kind(name).is_none()) {
                return Err(format!("no tensor is called {name}"));
            }
            Ok(match query {
                Query::Given | Query::Fits => Kind::Truth,
                Query::Dtype => Kind::Text,
                Query::Size | Query::Rank => Kind::Number,
            })
        }
    }
}

/// The value of an expression.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Value<'a> {
    Int(i128),
    Real(f64),
    Truth(bool),
    Text(&'a str),
}

/// Why an expression has no value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Problem<'a> {
    /// A name whose tensor or parameter is not there.
    Undefined(&'a str),
    Overflow,
    /// A division that leaves something, or by what is not positive.
    Inexact,
    /// Arithmetic on a parameter that is not a whole number.
    Real,
    /// More steps than any check needs.
    Long,
    /// Kinds that do not go together. The manifest was checked for this.
    Kind,
}

impl fmt::Display for Problem<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Problem::Undefined(name) => write!(f, "{name} is not known"),
            Problem::Overflow => f.write_str("a number is too large"),
            Problem::Inexact => f.write_str("a division is by zero or leaves a remainder"),
            Problem::Real => f.write_str("arithmetic on a number that is not whole"),
            Problem::Long => f.write_str("it takes too many steps"),
            Problem::Kind => f.write_str("it mixes kinds of values"),
        }
    }
}

/// What names are worth in a call.
pub(super) trait Scope<'a> {
    /// Value of a dimension, parameter, definition or of `target`.
    fn value(&self, name: &'a str) -> Worth<'a, Value<'a>>;
    /// The steps that the call has left.
    fn steps(&self) -> &Cell<u32>;
    /// The extents of a tensor, if it is given.
    fn shape(&self, name: &str) -> Option<&[usize]>;
    /// The answer of a tensor.
    fn query(&self, query: Query, name: &'a str, evaluator: &Evaluator<'_, 'a>) -> Worth<'a, Value<'a>>;
}

/// Evaluates the expressions of a call.
pub(super) struct Evaluator<'s, 'a> {
    scope: &'s dyn Scope<'a>,
}

/// Steps of all expressions of a call: far above what the kernels' constraints take.
pub(super) const MAX_STEPS: u32 = 1 << 20;
/// Values that a search goes through.
const MAX_SEARCH: i128 = 4096;

/// A value, or why there is none.
pub(super) type Worth<'a, T> = Result<T, Problem<'a>>;

impl<'s, 'a> Evaluator<'s, 'a> {
    pub(super) fn new(scope: &'s dyn Scope<'a>) -> Self {
        Evaluator { scope }
    }

    /// The value of `e`.
    pub(super) fn value(&self, e: &'a Expression) -> Worth<'a, Value<'a>> {
        self.with(e, &[])
    }

    /// The value of a test.
    pub(super) fn truth(&self, e: &'a Expression) -> Worth<'a, bool> {
        truth(self.value(e)?)
    }

    /// The value of an extent; `None` if it is negative or beyond `usize`.
    pub(super) fn extent(&self, e: &'a Expression) -> Worth<'a, Option<usize>> {
        Ok(usize::try_from(int(self.value(e)?)?).ok())
    }

    fn with(&self, e: &'a Expression, locals: &[(&'a str, i128)]) -> Worth<'a, Value<'a>> {
        let steps = self.scope.steps();
        steps.set(steps.get().checked_sub(1).ok_or(Problem::Long)?);
        let of = |e| self.with(e, locals);
        match e {
            Expression::Int(number) => Ok(Value::Int(*number)),
            Expression::Text(text) => Ok(Value::Text(text)),
            Expression::Name(name) => match locals.iter().find(|(local, _)| local == name) {
                Some((_, value)) => Ok(Value::Int(*value)),
                None => self.scope.value(name),
            },
            Expression::Negate(a) => match of(a)? {
                Value::Int(a) => a.checked_neg().map(Value::Int).ok_or(Problem::Overflow),
                Value::Real(a) => Ok(Value::Real(-a)),
                _ => Err(Problem::Kind),
            },
            Expression::Not(a) => Ok(Value::Truth(!truth(of(a)?)?)),
            Expression::Arithmetic(operation, two) => {
                let [a, b] = &**two;
                arithmetic(*operation, int(of(a)?)?, int(of(b)?)?)
            }
            Expression::Compare(first, rest) => {
                let mut left = of(first)?;
                for (comparison, e) in rest {
                    let right = of(e)?;
                    if !compare(*comparison, left, right)? {
                        return Ok(Value::Truth(false));
                    }
                    left = right;
                }
                Ok(Value::Truth(true))
            }
            Expression::OneOf(a, list) => {
                let a = of(a)?;
                for e in list {
                    if compare(Comparison::Equal, a, of(e)?)? {
                        return Ok(Value::Truth(true));
                    }
                }
                Ok(Value::Truth(false))
            }
            Expression::And(two) => Ok(Value::Truth(truth(of(&two[0])?)? && truth(of(&two[1])?)?)),
            Expression::Or(two) => Ok(Value::Truth(truth(of(&two[0])?)? || truth(of(&two[1])?)?)),
            Expression::If { test, then, otherwise } => of(if truth(of(test)?)? { then } else { otherwise }),
            Expression::Extreme(extreme, list) => {
                let mut best = None;
                for e in list {
                    best = Some(better(*extreme, best, int(of(e)?)?));
                }
                Ok(Value::Int(best.unwrap_or(0)))
            }
            Expression::Search(search) => self.search(search, locals),
            Expression::Tensor(query, name) => self.scope.query(*query, name, self),
            Expression::Shape(name, extents) => {
                let Some(shape) = self.scope.shape(name) else { return Ok(Value::Truth(false)) };
                let mut same = shape.len() == extents.len();
                for (e, got) in extents.iter().zip(shape) {
                    same &= int(of(e)?)? == *got as i128;
                }
                Ok(Value::Truth(same))
            }
        }
    }

    fn search(&self, s: &'a Search, locals: &[(&'a str, i128)]) -> Worth<'a, Value<'a>> {
        let (from, to) = (int(self.with(&s.from, locals)?)?, int(self.with(&s.to, locals)?)?);
        if to.checked_sub(from).is_none_or(|n| n > MAX_SEARCH) {
            return Err(Problem::Long);
        }
        let mut best = None;
        let mut inner = locals.to_vec();
        for value in from..to {
            inner.truncate(locals.len());
            inner.push((&s.name, value));
            let passes = match &s.filter {
                None => true,
                Some(filter) => truth(self.with(filter, &inner)?)?,
            };
            if passes {
                best = Some(better(s.extreme, best, int(self.with(&s.item, &inner)?)?));
            }
        }
        Ok(Value::Int(best.unwrap_or(0)))
    }
}

fn better(extreme: Extreme, best: Option<i128>, value: i128) -> i128 {
    match (extreme, best) {
        (_, None) => value,
        (Extreme::Max, Some(best)) => best.max(value),
        (Extreme::Min, Some(best)) => best.min(value),
    }
}

fn truth(value: Value<'_>) -> Worth<'_, bool> {
    if let Value::Truth(truth) = value { Ok(truth) } else { Err(Problem::Kind) }
}

fn int(value: Value<'_>) -> Worth<'_, i128> {
    match value {
        Value::Int(int) => Ok(int),
        Value::Real(_) => Err(Problem::Real),
        _ => Err(Problem::Kind),
    }
}

fn arithmetic<'a>(operation: Arithmetic, a: i128, b: i128) -> Worth<'a, Value<'a>> {
    let result = match operation {
        Arithmetic::Add => a.checked_add(b),
        Arithmetic::Subtract => a.checked_sub(b),
        Arithmetic::Multiply => a.checked_mul(b),
        Arithmetic::Divide | Arithmetic::DivideUp | Arithmetic::Remainder if b <= 0 => return Err(Problem::Inexact),
        Arithmetic::Divide if a % b != 0 => return Err(Problem::Inexact),
        Arithmetic::Divide => Some(a / b),
        Arithmetic::DivideUp => Some(a.div_euclid(b) + i128::from(a.rem_euclid(b) != 0)),
        Arithmetic::Remainder => Some(a.rem_euclid(b)),
        Arithmetic::Power if b < 0 => {
            // Exact for the powers of two that bounds are made of.
            let real = i32::try_from(b).map_or(f64::NAN, |b| (a as f64).powi(b));
            return if real.is_normal() { Ok(Value::Real(real)) } else { Err(Problem::Overflow) };
        }
        Arithmetic::Power => u32::try_from(b).ok().and_then(|b| a.checked_pow(b)),
    };
    result.map(Value::Int).ok_or(Problem::Overflow)
}

fn compare<'a>(comparison: Comparison, a: Value<'a>, b: Value<'a>) -> Worth<'a, bool> {
    use std::cmp::Ordering::{Equal, Greater, Less};
    let order = match (a, b) {
        (Value::Int(a), Value::Int(b)) => Some(a.cmp(&b)),
        (Value::Real(a), Value::Real(b)) => a.partial_cmp(&b),
        (Value::Int(a), Value::Real(b)) => (a as f64).partial_cmp(&b),
        (Value::Real(a), Value::Int(b)) => a.partial_cmp(&(b as f64)),
        (Value::Truth(a), Value::Truth(b)) => Some(a.cmp(&b)),
        (Value::Text(a), Value::Text(b)) => Some(a.cmp(b)),
        _ => return Err(Problem::Kind),
    };
    // NaN compares as in IEEE: it differs from everything.
    Ok(match comparison {
        Comparison::Less => order == Some(Less),
        Comparison::LessOrEqual => matches!(order, Some(Less | Equal)),
        Comparison::Greater => order == Some(Greater),
        Comparison::GreaterOrEqual => matches!(order, Some(Greater | Equal)),
        Comparison::Equal => order == Some(Equal),
        Comparison::NotEqual => order != Some(Equal),
    })
}
