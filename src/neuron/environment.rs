//! The environment variables that matter to the device, each with what it does. They are read and reported, never set: setting one
//! is unsound in a process with threads.
#![forbid(unsafe_code)]

use super::load::{LIBRARY_VARIABLE, SWITCH_VARIABLE};

/// A variable that this crate or the runtime reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// What it does.
    pub effect: &'static str,
}

/// All that [`probe()`](super::probe()) reports when set.
pub const VARIABLES: &[Variable] = &[
    Variable { name: SWITCH_VARIABLE, effect: "0 switches the device off (this crate)" },
    Variable { name: LIBRARY_VARIABLE, effect: "path of the libnrt to use, and no other (this crate)" },
    Variable { name: "LD_LIBRARY_PATH", effect: "where the loader looks for libnrt.so.1" },
    Variable { name: "NEURON_RT_VISIBLE_CORES", effect: "cores to take, as 0 or 3-6; wins over NEURON_RT_NUM_CORES" },
    Variable { name: "NEURON_RT_NUM_CORES", effect: "how many cores to take; unset or 0: every core of the instance" },
    Variable {
        name: "NEURON_LOGICAL_NC_CONFIG",
        effect: "physical cores of a logical one; must be what the NEFF was compiled for",
    },
    Variable { name: "NEURON_RT_VIRTUAL_CORE_SIZE", effect: "older name of NEURON_LOGICAL_NC_CONFIG" },
    Variable { name: "NEURON_RT_LOG_LEVEL", effect: "INFO shows why a call failed: the cause is in the log only" },
    Variable { name: "NEURON_RT_LOG_LOCATION", effect: "console or syslog" },
    Variable {
        name: "NEURON_RT_EXEC_TIMEOUT",
        effect: "seconds until an execution counts as hung; read when a model is loaded",
    },
    Variable { name: "NEURON_RT_VALIDATE_HASH", effect: "true: check a NEFF's hash when it is loaded" },
    Variable {
        name: "NEURON_RT_STOCHASTIC_ROUNDING_EN",
        effect: "changes the numbers of FP8 and bf16: unset it to compare bits",
    },
    Variable { name: "NEURON_RT_STOCHASTIC_ROUNDING_SEED", effect: "seed of stochastic rounding" },
    Variable {
        name: "NEURON_RT_ASYNC_EXEC_MAX_INFLIGHT_REQUESTS",
        effect: "above 0 execute returns before its outputs are there: Runtime::init refuses; unset it",
    },
    Variable { name: "NEURON_RT_NUMERICAL_ERRORS_VERBOSITY", effect: "critical: not-a-number fails an execution" },
    Variable { name: "NEURON_FAIL_ON_NAN", effect: "1: not-a-number fails an execution" },
    Variable { name: "NEURON_RT_INSPECT_ENABLE", effect: "profiles every execution" },
];

/// The variables that are set, with their values.
pub(super) fn set() -> Vec<(Variable, String)> {
    let value = |v: &Variable| Some((*v, std::env::var_os(v.name)?.to_string_lossy().into_owned()));
    VARIABLES.iter().filter_map(value).collect()
}
