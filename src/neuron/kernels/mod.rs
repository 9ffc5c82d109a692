//! Compiled kernels: a folder of NEFFs with a `manifest.toml`, as `kernels/build.py` makes it, and typed calls of them.
//!
//! A NEFF serves one set of shapes. A call takes the smallest compiled shape that holds it; what is padded is cut off again, and
//! padding never reaches a result. A call larger than the largest compiled shape runs in several pieces.
//!
//! ```text
//! format = "trn-kernels.neffs.1"
//! [[neff]]
//! kernel = "matmul_mx"              # an entry of this crate's kernels/manifest.toml
//! file = "matmul_mx-trn3-lnc1-0a1b2c3d.neff"
//! sha256 = "..."                    # of the file
//! target = "trn3"
//! lnc = 1
//! parameters = { n = 512, w_element = "e4m3fn", x_terms = 2, out = "f32" }
//! inputs = [{ name = "x", dtype = "bfloat16", shape = [64, 256] }]    # and so on; dtype by its NKI name
//! outputs = [{ name = "output_0", dtype = "float32", shape = [64, 512] }]
//! ```
#![forbid(unsafe_code)]

mod append;
mod bytes;
mod decode;
mod device;
mod family;
mod matmul;
mod moe;
mod prefill;
mod read;

pub use append::AppendKernel;
pub use decode::DecodeKernel;
pub use device::DeviceKernels;
pub use matmul::{MatmulFp8Kernel, MatmulMxKernel};
pub use moe::{ExpertTensors, MoeKernel};
pub use prefill::PrefillKernel;

use crate::error::{Error, Result};
use crate::trainium::Target;
use crate::trainium::manifest::{Argument, Bound, BoundTensor};
use std::path::{Path, PathBuf};

/// What is compiled.
#[derive(Debug)]
pub struct KernelSet {
    folder: PathBuf,
    kernels: Vec<CompiledKernel>,
}

/// One NEFF and what it was compiled for; its call was held against this crate's manifest.
#[derive(Debug)]
pub struct CompiledKernel {
    kernel: String,
    file: String,
    sha256: String,
    target: Target,
    lnc: u32,
    parameters: Vec<(String, Value)>,
    bound: Bound,
}

/// A compile-time argument.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Int(i64),
    Real(f64),
    Bool(bool),
    Text(String),
}

impl Value {
    fn argument(&self) -> Argument<'_> {
        match self {
            Value::Int(v) => Argument::Int(*v),
            Value::Real(v) => Argument::Real(*v),
            Value::Bool(v) => Argument::Bool(*v),
            Value::Text(v) => Argument::Text(v),
        }
    }
}

impl KernelSet {
    /// Reads the manifest of a folder. The NEFFs are read when they are loaded.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Manifest`] for a manifest that is not one; what
    /// [`KernelEntry::check`](crate::trainium::manifest::KernelEntry::check) says of an entry that the kernel does not serve.
    pub fn open(folder: impl Into<PathBuf>) -> Result<KernelSet> {
        let folder = folder.into();
        let path = folder.join("manifest.toml");
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, &e))?;
        Ok(KernelSet { kernels: read::kernels(&text)?, folder })
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// All of them, in the order of the manifest.
    pub fn kernels(&self) -> &[CompiledKernel] {
        &self.kernels
    }

    /// Those of one kernel that `serves` accepts, ascending by the dimension `by`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with what is compiled, if there is none.
    fn family(
        &self,
        kernel: &str,
        by: &str,
        wanted: &str,
        serves: impl Fn(&CompiledKernel) -> bool,
    ) -> Result<Vec<&CompiledKernel>> {
        let of_kernel = || self.kernels.iter().filter(|k| k.kernel == kernel);
        let mut found: Vec<&CompiledKernel> = of_kernel().filter(|k| serves(k)).collect();
        found.sort_by_key(|k| k.dim(by));
        if found.is_empty() {
            let all: Vec<String> = of_kernel().take(MAX_LISTED).map(CompiledKernel::describe).collect();
            let rest = of_kernel().count() - all.len();
            let because = match (all.is_empty(), rest) {
                (true, _) => format!("{} has no {kernel}", self.folder.display()),
                (false, 0) => format!("compiled: {}", all.join("; ")),
                (false, rest) => format!("compiled: {}; and {rest} more", all.join("; ")),
            };
            return Err(Error::Unsupported { what: format!("{kernel} with {wanted}"), because });
        }
        Ok(found)
    }
}

/// Compiled shapes that a refusal lists.
const MAX_LISTED: usize = 6;

impl CompiledKernel {
    /// The kernel, an entry of this crate's manifest.
    pub fn kernel(&self) -> &str {
        &self.kernel
    }

    /// The NEFF's file name.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// The device it was compiled for.
    pub fn target(&self) -> Target {
        self.target
    }

    /// Physical cores to a logical core.
    pub fn lnc(&self) -> u32 {
        self.lnc
    }

    /// Dimensions, tensors and their bytes.
    pub fn bound(&self) -> &Bound {
        &self.bound
    }

    /// The compile-time argument called `name`, if it was given.
    pub fn parameter(&self, name: &str) -> Option<Argument<'_>> {
        self.parameters.iter().find(|(n, _)| n == name).map(|(_, value)| value.argument())
    }

    /// A dimension; 0 if there is none of that name.
    fn dim(&self, name: &str) -> usize {
        self.bound.dim(name).unwrap_or(0)
    }

    fn text(&self, name: &str) -> Option<&str> {
        match self.parameter(name) {
            Some(Argument::Text(text)) => Some(text),
            _ => None,
        }
    }

    fn int(&self, name: &str) -> Option<i64> {
        match self.parameter(name) {
            Some(Argument::Int(int)) => Some(int),
            _ => None,
        }
    }

    fn real(&self, name: &str) -> Option<f64> {
        match self.parameter(name) {
            Some(Argument::Real(real)) => Some(real),
            Some(Argument::Int(int)) => Some(int as f64),
            _ => None,
        }
    }

    fn truth(&self, name: &str) -> bool {
        matches!(self.parameter(name), Some(Argument::Bool(true)))
    }

    fn input(&self, name: &str) -> Option<&BoundTensor> {
        self.bound.inputs().iter().find(|t| t.name == name)
    }

    fn has(&self, name: &str) -> bool {
        self.input(name).is_some()
    }

    /// What it was compiled for, in a line.
    pub fn describe(&self) -> String {
        let mut words = vec![self.kernel.clone(), self.target.name().to_owned()];
        for tensor in self.bound.inputs() {
            words.push(format!("{} {} {:?}", tensor.name, tensor.dtype.name(), tensor.shape));
        }
        for (name, value) in &self.parameters {
            words.push(match value {
                Value::Int(v) => format!("{name} {v}"),
                Value::Real(v) => format!("{name} {v}"),
                Value::Bool(v) => format!("{name} {v}"),
                Value::Text(v) => format!("{name} {v}"),
            });
        }
        words.join(", ")
    }
}
