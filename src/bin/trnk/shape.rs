//! Kernels and their shapes, as `kernels/shapes.toml` and `kernels/manifest.toml` have them.
#![forbid(unsafe_code)]

use crate::failure::Failure;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt::Write;

/// What each dimension of a shape says, defaults included.
pub(crate) type Dims = BTreeMap<String, String>;

/// What a kernel's shape may say.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Kernel {
    needed: toml::Table,
    extents: toml::Table,
    choices: toml::Table,
}

/// A kernel's targets and refusals.
#[derive(Deserialize)]
struct Entry {
    name: String,
    targets: Vec<String>,
}

#[derive(Deserialize)]
struct Manifest {
    kernel: Vec<Entry>,
}

/// Both files are part of this program: a test asks for every kernel, so that they are known to be read.
fn table() -> toml::Table {
    include_str!("../../../kernels/shapes.toml").parse().unwrap_or_default()
}

fn kernel(name: &str) -> Result<Kernel, Failure> {
    let Some(found) = table().remove(name) else {
        return Err(Failure::usage(format!("no kernel called {name:?}; there are {}", names().join(", "))));
    };
    found.try_into().map_err(|e| Failure::refused(format!("kernels/shapes.toml: {name}: {e}")))
}

/// Every kernel that has shapes.
pub(crate) fn names() -> Vec<String> {
    table().keys().cloned().collect()
}

/// The targets of a kernel, oldest first.
pub(crate) fn targets(name: &str) -> Vec<String> {
    let manifest: Manifest = match toml::from_str(include_str!("../../../kernels/manifest.toml")) {
        Ok(manifest) => manifest,
        Err(_) => Manifest { kernel: vec![] },
    };
    manifest.kernel.into_iter().find(|k| k.name == name).map_or(vec![], |k| k.targets)
}

/// What a shape such as `m=4,n=96,k=64,out=f32` says.
pub(crate) fn parse(name: &str, shape: &str) -> Result<Dims, Failure> {
    let known = kernel(name)?;
    let listed =
        || [&known.needed, &known.extents, &known.choices].map(|t| t.keys().cloned().collect::<Vec<_>>()).concat();
    let mut dims = Dims::new();
    for part in shape.split(',').filter(|part| !part.is_empty()) {
        let Some((key, value)) = part.split_once('=') else {
            let say = format!("shape: got {part:?}, need NAME=VALUE, separated by commas: {}", example(&known));
            return Err(Failure::usage(say));
        };
        let (key, value) = (key.trim().to_lowercase(), value.trim());
        if let Some(allowed) = known.choices.get(&key) {
            let allowed = words(allowed);
            if !allowed.iter().any(|word| word == value) {
                return Err(Failure::usage(format!("{key}: got {value:?}, need {}", allowed.join(" or "))));
            }
        } else if known.needed.contains_key(&key) || known.extents.contains_key(&key) {
            // The digits are kept, so that two shapes are equal when their numbers are.
            match value.parse::<u32>() {
                Ok(0) if known.needed.contains_key(&key) => {
                    return Err(Failure::usage(format!("{key}: got 0, need at least 1")));
                }
                Ok(number) if number.to_string() == value => {}
                _ => return Err(Failure::usage(format!("{key}: got {value:?}, need a number from 0 to {}", u32::MAX))),
            }
        } else {
            return Err(Failure::usage(format!("{name} has no dimension {key:?}; it has {}", listed().join(", "))));
        }
        if dims.insert(key.clone(), value.to_owned()).is_some() {
            return Err(Failure::usage(format!("{key} is given twice")));
        }
    }
    let missing: Vec<&String> = known.needed.keys().filter(|key| !dims.contains_key(*key)).collect();
    if let Some(first) = missing.first() {
        let meaning = known.needed.get(*first).and_then(toml::Value::as_str).unwrap_or_default();
        return Err(Failure::usage(format!("shape: {first} ({meaning}) is missing: {}", example(&known))));
    }
    for (key, value) in &known.extents {
        dims.entry(key.clone()).or_insert_with(|| value.to_string());
    }
    for (key, value) in &known.choices {
        dims.entry(key.clone()).or_insert_with(|| words(value).into_iter().next().unwrap_or_default());
    }
    Ok(dims)
}

/// The shape as text for `kernels/trace.py`: what is needed, then what differs from the defaults.
pub(crate) fn text(name: &str, dims: &Dims) -> Result<String, Failure> {
    let known = kernel(name)?;
    let needed = known.needed.keys().map(|key| (key, None));
    let extents = known.extents.iter().map(|(key, value)| (key, Some(value.to_string())));
    let choices = known.choices.iter().map(|(key, value)| (key, words(value).into_iter().next()));
    let said = needed.chain(extents).chain(choices).filter_map(|(key, default)| {
        let value = dims.get(key)?;
        (default.as_ref() != Some(value)).then(|| format!("{key}={value}"))
    });
    Ok(said.collect::<Vec<_>>().join(","))
}

/// Every kernel with what its shape may say, for `--help`.
pub(crate) fn help() -> String {
    let mut out = String::new();
    for name in names() {
        let Ok(known) = kernel(&name) else { continue };
        let _ = writeln!(out, "  {name} ({})", targets(&name).join(", "));
        let needed =
            known.needed.iter().map(|(key, meaning)| format!("{key} ({})", meaning.as_str().unwrap_or_default()));
        let _ = writeln!(out, "      {}", needed.collect::<Vec<_>>().join(", "));
        let extents = known.extents.iter().map(|(key, value)| format!("{key}={value}"));
        let choices = known.choices.iter().map(|(key, value)| format!("{key}={}", words(value).join("|")));
        let _ = writeln!(out, "      [{}]", extents.chain(choices).collect::<Vec<_>>().join(", "));
    }
    out
}

fn example(known: &Kernel) -> String {
    known.needed.keys().map(|key| format!("{key}=...")).collect::<Vec<_>>().join(",")
}

fn words(value: &toml::Value) -> Vec<String> {
    let all = value.as_array().into_iter().flatten();
    all.filter_map(|word| word.as_str().map(String::from)).collect()
}
