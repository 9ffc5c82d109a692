//! Everything the runtime knows: models, tensors, sets, executions under way. One world to a loaded copy, behind one lock.
#![forbid(unsafe_code)]

use crate::abi::status;
use crate::calls::{Calls, Outcome, violate};
use crate::handle::{Handle, Kind};
use crate::info::Arrays;
use crate::model::Loaded;
use crate::settings::Settings;
use crate::storage::{Meter, Span};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::c_void;
use std::sync::Arc;

/// Where in its life the runtime is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Fresh,
    Open,
    Closed,
}

/// A loaded model.
pub(crate) struct Model {
    pub(crate) loaded: Arc<Loaded>,
    pub(crate) core: u32,
    /// Whether an execution of it failed.
    pub(crate) failed: bool,
}

/// A tensor, or a slice of one.
pub(crate) struct Tensor {
    pub(crate) span: Span,
    pub(crate) core: u32,
    /// For messages only.
    pub(crate) name: String,
}

/// A tensor set: handles by NEFF name.
pub(crate) type Set = BTreeMap<Vec<u8>, Handle>;

/// An execution under way: what must not be freed or changed meanwhile.
pub(crate) struct Flight {
    pub(crate) number: u64,
    pub(crate) handles: Vec<Handle>,
}

/// The state of the runtime.
pub(crate) struct World {
    pub(crate) settings: Settings,
    pub(crate) state: State,
    pub(crate) models: BTreeMap<Handle, Model>,
    pub(crate) tensors: BTreeMap<Handle, Tensor>,
    pub(crate) sets: BTreeMap<Handle, Set>,
    pub(crate) arrays: Arrays,
    pub(crate) flights: Vec<Flight>,
    pub(crate) calls: Calls,
    /// Cores whose execution unit died.
    pub(crate) dead: BTreeSet<u32>,
    meters: BTreeMap<u32, Meter>,
    /// Never goes back, so that no handle is given out twice.
    serial: u64,
    /// Loads on core -1.
    pub(crate) automatic: u32,
}

impl Default for World {
    fn default() -> World {
        let (settings, problems) = Settings::from_env(&|name| std::env::var(name).ok());
        let mut calls = Calls::default();
        for problem in problems {
            calls.violation("environment", &problem);
        }
        World {
            settings,
            state: State::Fresh,
            models: BTreeMap::new(),
            tensors: BTreeMap::new(),
            sets: BTreeMap::new(),
            arrays: Arrays::default(),
            flights: vec![],
            calls,
            dead: BTreeSet::new(),
            meters: BTreeMap::new(),
            serial: 0,
            automatic: 0,
        }
    }
}

/// The entry behind a client's pointer.
fn find<T>(table: &mut BTreeMap<Handle, T>, pointer: *const c_void, kind: Kind) -> Outcome<(Handle, &mut T)> {
    let wrong = |wrong| violate(status::INVALID_HANDLE, format!("{}: {wrong}", kind.name()));
    match Handle::from_pointer(pointer, kind) {
        Err(reason) => wrong(reason),
        Ok(handle) => match table.get_mut(&handle) {
            Some(entry) => Ok((handle, entry)),
            None => wrong(crate::handle::Wrong::Stale),
        },
    }
}

impl World {
    /// As after loading, but handles of before stay stale.
    pub(crate) fn reset(&mut self) {
        let serial = self.serial;
        let mut arrays = std::mem::take(&mut self.arrays);
        arrays.clear();
        *self = World { serial, arrays, ..World::default() };
    }

    /// Drops every object, as the process's end would.
    pub(crate) fn clear(&mut self) {
        self.models.clear();
        self.tensors.clear();
        self.sets.clear();
        self.arrays.clear();
        self.dead.clear();
    }

    /// The next number.
    pub(crate) fn next(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }

    /// A fresh handle.
    pub(crate) fn handle(&mut self, kind: Kind) -> Outcome<Handle> {
        match Handle::new(kind, self.next()) {
            Some(handle) => Ok(handle),
            None => violate(status::RESOURCE, "2^28 handles were given out"),
        }
    }

    /// The meter of a core's memory.
    pub(crate) fn meter(&mut self, core: u32) -> Meter {
        self.meters.entry(core).or_default().clone()
    }

    /// A core that the client named.
    pub(crate) fn core(&self, core: i32) -> Outcome<u32> {
        match u32::try_from(core).ok().filter(|&c| c < self.settings.visible) {
            Some(core) => Ok(core),
            None => crate::calls::refuse(
                status::INVALID,
                format!("core {core}, the process has {} of them", self.settings.visible),
            ),
        }
    }

    /// A model by pointer.
    pub(crate) fn model(&mut self, pointer: *const c_void) -> Outcome<(Handle, &mut Model)> {
        find(&mut self.models, pointer, Kind::Model)
    }

    /// A tensor by pointer.
    pub(crate) fn tensor(&mut self, pointer: *const c_void) -> Outcome<(Handle, &mut Tensor)> {
        find(&mut self.tensors, pointer, Kind::Tensor)
    }

    /// A set by pointer.
    pub(crate) fn set(&mut self, pointer: *const c_void) -> Outcome<(Handle, &mut Set)> {
        find(&mut self.sets, pointer, Kind::Set)
    }

    /// Notes a violation if an execution under way uses the object.
    pub(crate) fn must_rest(&mut self, function: &'static str, handle: Handle, what: &str) {
        if self.flights.iter().any(|f| f.handles.contains(&handle)) {
            self.calls.violation(function, &format!("{what} while an execution uses it"));
        }
    }

    /// What is still there, in words; empty if nothing is.
    pub(crate) fn leftovers(&self) -> String {
        let counts = [
            (self.models.len(), "models"),
            (self.tensors.len(), "tensors"),
            (self.sets.len(), "tensor sets"),
            (self.arrays.live(), "tensor info arrays"),
            (self.flights.len(), "executions"),
        ];
        let words: Vec<String> = counts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")).collect();
        words.join(", ")
    }
}
