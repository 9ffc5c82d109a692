//! The chip that is asked about: a documented one, or one that the user fills in.
#![forbid(unsafe_code)]

use crate::failure::Failure;
use serde_json::{Map, Value};
use std::path::Path;
use trn_kernels::trainium::Chip;
use trn_kernels::trainium::emulator::Target;

/// A chip and the target whose programs run on it.
pub(crate) struct Asked {
    pub(crate) chip: Chip,
    pub(crate) target: Target,
}

/// The documented chip of that name.
pub(crate) fn named(name: &str) -> Result<Asked, Failure> {
    match Target::by_name(name) {
        Some(target) => Ok(Asked { chip: target.chip(), target }),
        None => Err(Failure::usage(format!("no chip {name:?}; there are trn1, trn2, trn3 (or give --chip-file)"))),
    }
}

/// A chip from a file: `based_on` names a documented chip, every other entry replaces one of its constants.
pub(crate) fn from_file(path: &Path) -> Result<Asked, Failure> {
    let fail = |why: &dyn std::fmt::Display| Failure::refused(format!("{}: {why}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|e| fail(&e))?;
    let is_json = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("json"));
    let mut changes: Map<String, Value> = if is_json {
        serde_json::from_str(&text).map_err(|e| fail(&e))?
    } else {
        toml::from_str(&text).map_err(|e| fail(&e.to_string().trim_end()))?
    };
    let Some(Value::String(base)) = changes.remove("based_on") else {
        return Err(fail(&"needs based_on = \"trn1\", \"trn2\" or \"trn3\": the chip whose other constants it shares"));
    };
    let Some(target) = Target::by_name(&base) else {
        return Err(fail(&format!("based_on: got {base:?}, need trn1, trn2 or trn3")));
    };
    let mut constants = serde_json::to_value(target.chip()).map_err(|e| fail(&e))?;
    replace(&mut constants, changes, "").map_err(|e| fail(&e))?;
    let chip: Chip = serde_json::from_value(constants).map_err(|e| fail(&e))?;
    Ok(Asked { chip, target })
}

/// Puts each change where a constant of the same name and kind is.
fn replace(constants: &mut Value, changes: Map<String, Value>, path: &str) -> Result<(), String> {
    let Value::Object(constants) = constants else { return Err(format!("{path} is no table")) };
    for (key, change) in changes {
        let at = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        let known = constants.keys().cloned().collect::<Vec<_>>().join(", ");
        let Some(old) = constants.get_mut(&key) else {
            return Err(format!("{at}: no such constant; there are {known}"));
        };
        match (old, change) {
            (old @ Value::Object(_), Value::Object(inner)) => replace(old, inner, &at)?,
            (Value::Number(old), Value::Number(new)) => {
                if !new.as_f64().is_some_and(|x| x > 0.0 && x.is_finite()) {
                    return Err(format!("{at}: got {new}, need a positive number"));
                }
                // 4096.0 is a count too.
                let whole = new.as_f64().filter(|x| old.is_u64() && x.fract() == 0.0 && *x < 2f64.powi(53));
                *old = whole.map_or(new, |x| (x as u64).into());
            }
            (old @ Value::String(_), new @ Value::String(_)) | (old @ Value::Bool(_), new @ Value::Bool(_)) => {
                *old = new
            }
            (old, new) => return Err(format!("{at}: got {new}, need something like {old}")),
        }
    }
    Ok(())
}
