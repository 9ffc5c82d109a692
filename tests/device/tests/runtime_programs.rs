//! Every checked-in program through the safe runtime and the emulated library: the bits of the emulator, and nothing forbidden.
#![forbid(unsafe_code)]

use device_tests::{Emulated, programs};
use std::collections::BTreeSet;
use std::sync::Arc;
use trn_kernels::neuron::{
    Library, LoadOptions, OPTIONAL_SYMBOLS, REQUIRED_SYMBOLS, Runtime, RuntimeOptions, TensorSet, neff,
};
use trn_kernels::trainium::emulator::Options;

// One test, because a process has one runtime.
#[test]
fn every_program_gives_the_emulators_bits_through_the_runtime() {
    let emulated = Emulated::new();
    let library = Library::open(&LoadOptions::path(emulated.path())).unwrap();
    let runtime = Runtime::init(&library, &RuntimeOptions::default()).unwrap();
    for checked in programs::all() {
        let model = runtime.load(&neff::emulated(&checked.json, true).unwrap(), 0).unwrap();
        let side = |descs: &[trn_kernels::neuron::TensorDesc]| {
            let mut set = TensorSet::new(&runtime, 0).unwrap();
            for desc in descs {
                let bytes = usize::try_from(desc.bytes).unwrap();
                set.insert(&desc.name, Arc::new(runtime.allocate(0, bytes, &desc.name).unwrap())).unwrap();
            }
            set
        };
        let (inputs, mut outputs) = (side(model.inputs()), side(model.outputs()));
        for (port, bytes) in checked.program.inputs().iter().zip(checked.inputs()) {
            inputs.get(&port.name).unwrap().write(0, &bytes).unwrap();
        }
        model.execute(&inputs, &mut outputs).unwrap();
        for (port, wanted) in checked.program.outputs().iter().zip(checked.run(&Options::default())) {
            let mut got = vec![0; wanted.len()];
            outputs.get(&port.name).unwrap().read(0, &mut got).unwrap();
            assert!(got == wanted, "{}: {}", checked.name, port.name);
        }
    }
    runtime.close().unwrap();
    emulated.assert_clean();
    assert_eq!(emulated.calls("nrt_close"), 1);
}

#[test]
fn binding_and_library_have_the_same_functions() {
    let (required, optional) = Emulated::new().symbols();
    fn names<'a>(list: impl IntoIterator<Item = &'a str>) -> BTreeSet<&'a str> {
        list.into_iter().collect()
    }
    assert_eq!(names(required.iter().map(String::as_str)), names(REQUIRED_SYMBOLS.iter().copied()));
    let (emulated, bound) = (names(optional.iter().map(String::as_str)), names(OPTIONAL_SYMBOLS.iter().copied()));
    assert!(bound.is_subset(&emulated), "bound but not emulated: {:?}", bound.difference(&emulated));
}
