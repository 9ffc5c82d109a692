//! The manifest of a folder of NEFFs.
#![forbid(unsafe_code)]

use super::{CompiledKernel, Value};
use crate::error::{Error, Result};
use crate::trainium::manifest::{Argument, Manifest};
use crate::trainium::{Dtype, Target};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

/// The format this reads, with its version.
pub(super) const FORMAT: &str = "trn-kernels.neffs.1";

#[derive(Deserialize)]
struct File {
    format: String,
    #[serde(default, rename = "neff")]
    neffs: Vec<Neff>,
}

#[derive(Deserialize)]
struct Neff {
    kernel: String,
    file: String,
    sha256: String,
    target: String,
    lnc: u32,
    #[serde(default)]
    parameters: BTreeMap<String, toml::Value>,
    inputs: Vec<Tensor>,
    outputs: Vec<Tensor>,
}

#[derive(Deserialize)]
struct Tensor {
    name: String,
    dtype: String,
    shape: Vec<usize>,
}

fn wrong(at: &str, problem: impl Into<String>) -> Error {
    Error::Manifest { at: at.into(), problem: problem.into() }
}

/// Every entry, held against this crate's manifest.
pub(super) fn kernels(text: &str) -> Result<Vec<CompiledKernel>> {
    let file: File = toml::from_str(text).map_err(|e| wrong("manifest.toml", e.to_string()))?;
    if file.format != FORMAT {
        return Err(wrong("manifest.toml", format!("format {:?}, needed {FORMAT:?}", file.format)));
    }
    file.neffs.iter().map(compiled).collect()
}

fn compiled(neff: &Neff) -> Result<CompiledKernel> {
    let at = neff.file.as_str();
    // A name, not a way out of the folder.
    if at.is_empty() || at.contains(['/', '\\']) || at == ".." {
        return Err(wrong(at, "a file name without folders is needed"));
    }
    let target = Target::by_name(&neff.target).ok_or_else(|| wrong(at, format!("target {:?}", neff.target)))?;
    if !matches!(neff.lnc, 1 | 2) {
        return Err(wrong(at, format!("lnc {}, needed 1 or 2", neff.lnc)));
    }
    if neff.sha256.len() != 64 || !neff.sha256.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(wrong(at, "sha256 is not 64 hexadecimal digits"));
    }
    let entry = Manifest::bundled()?.kernel(&neff.kernel)?;
    let mut parameters = Vec::new();
    for (name, value) in &neff.parameters {
        parameters.push((name.clone(), parameter(at, name, value)?));
    }
    let arguments: Vec<(&str, Argument<'_>)> = parameters.iter().map(|(n, v)| (n.as_str(), v.argument())).collect();
    let tensors = |side: &[Tensor]| -> Result<Vec<(String, Dtype, Vec<usize>)>> {
        side.iter().map(|t| Ok((t.name.clone(), dtype(at, t)?, t.shape.clone()))).collect()
    };
    let (inputs, outputs) = (tensors(&neff.inputs)?, tensors(&neff.outputs)?);
    let given: Vec<(&str, Dtype, &[usize])> = inputs.iter().map(|(n, d, s)| (n.as_str(), *d, s.as_slice())).collect();
    let bound = entry.check(target, &given, &arguments)?;
    let made: Vec<(String, Dtype, Vec<usize>)> =
        bound.outputs().iter().map(|t| (t.name.clone(), t.dtype, t.shape.clone())).collect();
    if made != outputs {
        return Err(wrong(at, format!("its outputs are {outputs:?}, the kernel gives {made:?}")));
    }
    Ok(CompiledKernel {
        kernel: neff.kernel.clone(),
        file: neff.file.clone(),
        sha256: neff.sha256.to_ascii_lowercase(),
        target,
        lnc: neff.lnc,
        parameters,
        bound,
    })
}

fn dtype(at: &str, tensor: &Tensor) -> Result<Dtype> {
    Dtype::by_name(&tensor.dtype).ok_or_else(|| wrong(at, format!("{} has dtype {:?}", tensor.name, tensor.dtype)))
}

fn parameter(at: &str, name: &str, value: &toml::Value) -> Result<Value> {
    match value {
        toml::Value::Integer(v) => Ok(Value::Int(*v)),
        toml::Value::Float(v) => Ok(Value::Real(*v)),
        toml::Value::Boolean(v) => Ok(Value::Bool(*v)),
        toml::Value::String(v) => Ok(Value::Text(v.clone())),
        other => Err(wrong(at, format!("parameter {name} is {}", other.type_str()))),
    }
}

/// Asks that a NEFF be the one the manifest was written for.
pub(super) fn check_hash(kernel: &CompiledKernel, neff: &[u8]) -> Result<()> {
    let got: String = Sha256::digest(neff).iter().map(|byte| format!("{byte:02x}")).collect();
    if got == kernel.sha256 {
        return Ok(());
    }
    Err(wrong(&kernel.file, format!("sha256 is {got}, the manifest has {}; build the folder again", kernel.sha256)))
}
