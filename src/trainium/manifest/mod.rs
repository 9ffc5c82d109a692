//! What each device kernel takes, gives and refuses: the reading of `kernels/manifest.toml`.
//!
//! The manifest is the one statement of it. Each constraint has a `text` for people and a `check`, a test over dimensions,
//! parameters, tensors and the target; `kernels/manifest.py` evaluates the same checks, and the kernels' own assertions are held
//! against them by `kernels/tests/refusals.json`. So a call that a kernel would refuse on a device is refused here first, by the
//! same name.
//!
//! ```
//! # fn main() -> trn_kernels::Result<()> {
//! use trn_kernels::trainium::manifest::{Argument, Manifest};
//! use trn_kernels::trainium::{Dtype, Target};
//!
//! let kernel = Manifest::bundled()?.kernel("rmsnorm_quantize_fp8")?;
//! let inputs = |k| [("x", Dtype::Bfloat16, vec![4, k]), ("gamma", Dtype::Float32, vec![1, k])];
//! let bound = kernel.check(Target::Trn2, &inputs(64), &[("eps", Argument::Real(1e-6))])?;
//! assert_eq!((bound.dim("K"), bound.outputs()[0].bytes), (Some(64), 4 * 64));
//!
//! let refused = kernel.check(Target::Trn2, &inputs(8224), &[]).unwrap_err();
//! assert_eq!(refused.to_string(), "K: got K = 8224, needed at most 8192 (rmsnorm_quantize_fp8)");
//! # Ok(())
//! # }
//! ```
//!
//! A manifest is untrusted input: any text gives a manifest or an [`Error::Manifest`], and any call a [`Bound`] or an error.
#![forbid(unsafe_code)]

mod call;
mod evaluate;
mod expression;
mod read;

pub use call::{Argument, Bound, BoundTensor};

use crate::trainium::Target;
use crate::{Error, Result};
use expression::{Expression, Formula};
use std::sync::OnceLock;

/// The kernels of a manifest.
#[derive(Debug, Clone, PartialEq)]
pub struct Manifest {
    kernels: Vec<KernelEntry>,
}

/// One kernel: what it takes, gives and refuses.
#[derive(Debug, Clone, PartialEq)]
pub struct KernelEntry {
    name: String,
    file: String,
    entry: String,
    targets: Vec<Target>,
    layout: Option<String>,
    inputs: Vec<Input>,
    parameters: Vec<Parameter>,
    /// Names for expressions over dimensions and parameters; each may use those before it.
    definitions: Vec<(String, Expression)>,
    outputs: Vec<Output>,
    constraints: Vec<Constraint>,
}

/// A tensor that a kernel reads.
#[derive(Debug, Clone, PartialEq)]
pub struct Input {
    name: String,
    dtype: Types,
    formula: Formula,
    shape: String,
    optional: bool,
    alias: Option<String>,
}

/// A tensor that a kernel gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    name: String,
    dtype: Types,
    extents: Vec<Expression>,
    shape: String,
}

/// The libnrt types that a tensor may have.
#[derive(Debug, Clone, PartialEq)]
enum Types {
    /// One of these names.
    OneOf(Vec<&'static str>),
    /// That of another input, by position.
    OfInput(usize),
    /// The one named by a parameter, by position.
    OfParameter(usize),
}

/// A compile-time argument of a kernel.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    name: String,
    kind: ParameterKind,
    optional: bool,
    default: Option<Stored>,
}

/// What a parameter can be.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum ParameterKind {
    /// A whole number.
    Int,
    /// A number that the kernel takes as f32.
    F32,
    /// True or false.
    Bool,
    /// One of these texts.
    OneOf(Vec<String>),
}

/// A default.
#[derive(Debug, Clone, PartialEq)]
enum Stored {
    Int(i64),
    Real(f64),
    Bool(bool),
    Text(String),
}

/// Something that must be true of a call.
#[derive(Debug, Clone, PartialEq)]
pub struct Constraint {
    name: String,
    text: String,
    check: Expression,
}

impl Manifest {
    /// Reads a manifest.
    ///
    /// # Errors
    /// [`Error::Manifest`] with the kernel and the part of it that is wrong.
    pub fn parse(text: &str) -> Result<Manifest> {
        read::manifest(text)
    }

    /// The manifest of this crate's kernels, `kernels/manifest.toml`, read once.
    ///
    /// # Errors
    /// Those of [`Manifest::parse`]; a test shows that there are none.
    pub fn bundled() -> Result<&'static Manifest> {
        static BUNDLED: OnceLock<Result<Manifest>> = OnceLock::new();
        let read = BUNDLED.get_or_init(|| Manifest::parse(include_str!("../../../kernels/manifest.toml")));
        read.as_ref().map_err(Error::clone)
    }

    /// The kernels, in the order of the manifest.
    pub fn kernels(&self) -> &[KernelEntry] {
        &self.kernels
    }

    /// The kernel called `name`.
    ///
    /// # Errors
    /// [`Error::Unsupported`], with the names that there are.
    pub fn kernel(&self, name: &str) -> Result<&KernelEntry> {
        self.kernels.iter().find(|k| k.name == name).ok_or_else(|| {
            let names: Vec<&str> = self.kernels.iter().map(KernelEntry::name).collect();
            Error::Unsupported {
                what: format!("kernel {name:?}"),
                because: format!("the manifest has {}", names.join(", ")),
            }
        })
    }
}

impl KernelEntry {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its file, relative to `kernels/`.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// The function in that file.
    pub fn entry(&self) -> &str {
        &self.entry
    }

    /// The devices it is for.
    pub fn targets(&self) -> &[Target] {
        &self.targets
    }

    /// The layout of its weights or cache ([`layout`](crate::trainium::layout)), with its version.
    pub fn layout(&self) -> Option<&str> {
        self.layout.as_deref()
    }

    /// The tensors it reads, in the order in which they bind dimensions.
    pub fn inputs(&self) -> &[Input] {
        &self.inputs
    }

    /// Its compile-time arguments.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// The parameter called `name`.
    pub fn parameter(&self, name: &str) -> Option<&Parameter> {
        self.parameters.iter().find(|p| p.name == name)
    }

    /// The tensors it gives.
    pub fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    /// What must be true of a call, in the order in which it is checked.
    pub fn constraints(&self) -> &[Constraint] {
        &self.constraints
    }
}

impl Input {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its shape as the manifest has it: `[M, K]`, alternatives separated by `|`.
    pub fn shape(&self) -> &str {
        &self.shape
    }

    /// Whether a call may leave it out.
    pub fn optional(&self) -> bool {
        self.optional
    }

    /// The output that is the same tensor, if the kernel changes it in place.
    pub fn alias(&self) -> Option<&str> {
        self.alias.as_deref()
    }
}

impl Output {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its shape as the manifest has it.
    pub fn shape(&self) -> &str {
        &self.shape
    }
}

impl Parameter {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it can be.
    pub fn kind(&self) -> &ParameterKind {
        &self.kind
    }

    /// Whether a call may leave it out and the kernel then does without.
    pub fn optional(&self) -> bool {
        self.optional
    }

    /// What it is when a call leaves it out.
    pub fn default_value(&self) -> Option<Argument<'_>> {
        self.default.as_ref().map(|stored| match stored {
            Stored::Int(int) => Argument::Int(*int),
            Stored::Real(real) => Argument::Real(*real),
            Stored::Bool(bool) => Argument::Bool(*bool),
            Stored::Text(text) => Argument::Text(text),
        })
    }

    /// The value that `text` names (`128`, `0.125`, `true`, `e2m1`), as programs and command lines write them.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the text is no number, or not `true` or `false`, where one is needed.
    pub fn read<'a>(&self, text: &'a str) -> Result<Argument<'a>> {
        let (value, needed) = match &self.kind {
            ParameterKind::Int => (text.parse().ok().map(Argument::Int), "a whole number"),
            ParameterKind::F32 => (text.parse().ok().map(Argument::Real), "a number"),
            ParameterKind::Bool => (text.parse().ok().map(Argument::Bool), "true or false"),
            ParameterKind::OneOf(_) => (Some(Argument::Text(text)), ""),
        };
        value.ok_or_else(|| Error::Unsupported {
            what: format!("{} = {text:?}", self.name),
            because: format!("it is {needed}"),
        })
    }
}

impl Constraint {
    /// Its name, which begins the message of a refusal.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What is needed, for people.
    pub fn text(&self) -> &str {
        &self.text
    }
}
