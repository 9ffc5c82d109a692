//! `nrt_execute`: checks the sets against the model under the lock, then runs the program without it, so that threads overlap.
#![forbid(unsafe_code)]

use crate::abi::status;
use crate::calls::{Outcome, refuse, violate};
use crate::dtype;
use crate::entry::world;
use crate::handle::Handle;
use crate::model::{Loaded, Variable};
use crate::settings::{Settings, flag};
use crate::storage::{SPOILT, Span, Storage};
use crate::world::{Flight, Set, World};
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;
use trn_kernels::quant::ScaleRule;
use trn_kernels::trainium::emulator::{Options, Rule};

/// Name in the log.
pub(crate) const NAME: &str = "nrt_execute";

/// An execution that passed every check.
struct Plan {
    model: Handle,
    core: u32,
    loaded: Arc<Loaded>,
    settings: Settings,
    inputs: Vec<Span>,
    outputs: Vec<Span>,
    flight: u64,
}

/// Ends the flight however the execution ends.
struct Landing(u64);

impl Drop for Landing {
    fn drop(&mut self) {
        world().flights.retain(|f| f.number != self.0);
    }
}

/// Executes a model once. An injected status that stands for a failed run spoils the outputs, as a failed run does.
pub(crate) fn execute(
    model: *const c_void,
    inputs: *const c_void,
    outputs: *const c_void,
    injected: Option<u32>,
) -> Outcome<()> {
    if let Some(status) = injected.filter(|&s| !ran(s)) {
        return refuse(status, "injected");
    }
    let plan = world().plan(model, inputs, outputs)?;
    let landing = Landing(plan.flight);
    if plan.settings.has(flag::SLOW_EXEC) {
        std::thread::sleep(Duration::from_millis(plan.settings.delay));
    }
    let outcome = plan.run(injected);
    drop(landing);
    if let Err(refusal) = &outcome {
        let mut world = world();
        if let Some(model) = world.models.get_mut(&plan.model) {
            model.failed = true;
        }
        if refusal.status == status::UNIT_UNRECOVERABLE {
            world.dead.insert(plan.core);
        }
    }
    outcome
}

/// Whether a status says that the model ran (and what it wrote is not to be trusted).
fn ran(status: u32) -> bool {
    matches!(status, 5 | 6 | 101 | 1003 | 1004 | 1006 | 1200..=1299)
}

impl World {
    fn plan(&mut self, model: *const c_void, inputs: *const c_void, outputs: *const c_void) -> Outcome<Plan> {
        let (model, entry) = self.model(model)?;
        let (loaded, core) = (entry.loaded.clone(), entry.core);
        let (input_set, output_set) = (self.set(inputs)?.0, self.set(outputs)?.0);
        let (input_handles, inputs) = self.bind("input", &self.sets[&input_set], &loaded.inputs, core)?;
        let (output_handles, outputs) = self.bind("output", &self.sets[&output_set], &loaded.outputs, core)?;
        if self.dead.contains(&core) {
            return refuse(status::UNIT_UNRECOVERABLE, format!("the execution unit of core {core} died earlier"));
        }
        self.check_overlaps(&loaded, &inputs, &outputs)?;
        let flight = self.next();
        let mut handles = vec![model, input_set, output_set];
        handles.extend(input_handles.into_iter().chain(output_handles));
        self.flights.push(Flight { number: flight, handles });
        Ok(Plan { model, core, loaded, settings: self.settings.clone(), inputs, outputs, flight })
    }

    /// The tensors of a set in the order of the model's variables.
    fn bind(&self, side: &str, set: &Set, variables: &[Variable], core: u32) -> Outcome<(Vec<Handle>, Vec<Span>)> {
        let invalid = |reason: String| refuse(status::INVALID, reason);
        let (mut handles, mut spans) = (vec![], vec![]);
        for variable in variables {
            let name = &variable.name;
            let Some(&handle) = set.get(name.as_bytes()) else {
                return invalid(format!("{side} {name:?} is not in the set"));
            };
            let Some(tensor) = self.tensors.get(&handle) else {
                return violate(status::INVALID_HANDLE, format!("{side} {name:?}: its tensor was freed"));
            };
            if tensor.span.size != variable.bytes {
                let got = tensor.span.size;
                return invalid(format!("{side} {name:?}: tensor of {got} bytes, needed {}", variable.bytes));
            }
            if tensor.core != core {
                return invalid(format!("{side} {name:?}: tensor on core {}, model on core {core}", tensor.core));
            }
            handles.push(handle);
            spans.push(tensor.span.clone());
        }
        match set.keys().find(|k| variables.iter().all(|v| v.name.as_bytes() != k.as_slice())) {
            Some(name) => invalid(format!("the model has no {side} {:?}", String::from_utf8_lossy(name))),
            None => Ok((handles, spans)),
        }
    }

    /// In-place variables are one tensor; nothing else that is written may share a byte with another variable.
    fn check_overlaps(&mut self, loaded: &Loaded, inputs: &[Span], outputs: &[Span]) -> Outcome<()> {
        for &(input, output) in &loaded.aliases {
            if !inputs[input].is(&outputs[output]) {
                let (input, output) = (&loaded.inputs[input].name, &loaded.outputs[output].name);
                return refuse(status::INVALID, format!("{input:?} and {output:?} must be the same tensor"));
            }
        }
        for (o, output) in outputs.iter().enumerate() {
            let input = (0..inputs.len()).find(|&i| !loaded.aliases.contains(&(i, o)) && inputs[i].overlaps(output));
            let other = (0..o).find(|&other| outputs[other].overlaps(output));
            let variable = input.map(|i| &loaded.inputs[i]).or_else(|| other.map(|other| &loaded.outputs[other]));
            if let Some(variable) = variable {
                let (name, other) = (&loaded.outputs[o].name, &variable.name);
                self.calls.violation(NAME, &format!("output {name:?} overlaps {other:?}"));
            }
        }
        Ok(())
    }
}

/// The lock on one storage.
enum Held<'a> {
    Read(RwLockReadGuard<'a, Vec<u8>>),
    Write(RwLockWriteGuard<'a, Vec<u8>>),
}

impl Held<'_> {
    fn bytes(&self) -> &[u8] {
        match self {
            Held::Read(bytes) => bytes,
            Held::Write(bytes) => bytes,
        }
    }
}

impl Plan {
    /// Runs the program on the tensors' bytes; they stay locked meanwhile.
    fn run(&self, injected: Option<u32>) -> Outcome<()> {
        let mut storages: BTreeMap<u64, (&Storage, bool)> = BTreeMap::new();
        for (span, written) in self.inputs.iter().map(|s| (s, false)).chain(self.outputs.iter().map(|s| (s, true))) {
            storages.entry(span.storage.id).or_insert((&span.storage, false)).1 |= written;
        }
        // In the order of ids, as everywhere.
        let lock = |(&id, &(storage, written)): (&u64, &(_, bool))| {
            let storage: &Storage = storage;
            (id, if written { Held::Write(storage.write()) } else { Held::Read(storage.read()) })
        };
        let mut held: BTreeMap<u64, Held<'_>> = storages.iter().map(lock).collect();
        let views: Vec<&[u8]> = self.inputs.iter().map(|s| &held[&s.storage.id].bytes()[s.range()]).collect();
        let result = self.compute(&views, injected);
        for (i, span) in self.outputs.iter().enumerate() {
            let Some(Held::Write(bytes)) = held.get_mut(&span.storage.id) else { continue };
            match &result {
                Ok(outputs) => bytes[span.range()].copy_from_slice(&outputs[i]),
                Err(_) => bytes[span.range()].fill(SPOILT),
            }
        }
        let outputs = result?;
        let nan = || self.loaded.outputs.iter().zip(&outputs).find(|(v, bytes)| dtype::has_nan(v.dtype, bytes));
        match self.settings.fails_on_nan().then(nan).flatten() {
            Some((variable, _)) => refuse(status::NUMERIC, format!("output {:?} holds NaN", variable.name)),
            None => Ok(()),
        }
    }

    /// The outputs' bytes.
    fn compute(&self, inputs: &[&[u8]], injected: Option<u32>) -> Outcome<Vec<Vec<u8>>> {
        if let Some(status) = injected {
            return refuse(status, "injected");
        }
        let rule = if self.settings.has(flag::OCP_SCALES) { ScaleRule::Floor } else { ScaleRule::Trainium };
        let run = || {
            if self.settings.has(flag::EXEC_PANICS) {
                resume_unwind(Box::new("EXEC_PANICS")); // a panic that prints nothing
            }
            self.loaded.program.run(inputs, &Options { scale_rule: rule })
        };
        match catch_unwind(AssertUnwindSafe(run)) {
            Ok(Ok(outputs)) => Ok(outputs),
            Ok(Err(fault)) => {
                let status = match fault.rule {
                    Rule::Bounds => status::OOB,
                    Rule::Limit => status::RESOURCE,
                    _ => status::COMPLETED_WITH_ERR,
                };
                refuse(status, fault.to_string())
            }
            Err(_) => refuse(status::COMPLETED_WITH_ERR, "the program panicked"),
        }
    }
}
