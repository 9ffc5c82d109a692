//! Every checked-in program through the safe runtime and the emulated library: the bits of the emulator, and nothing forbidden.
#![forbid(unsafe_code)]

use device_tests::{Emulated, Session, programs};
use std::collections::BTreeSet;
use trn_kernels::neuron::{OPTIONAL_SYMBOLS, REQUIRED_SYMBOLS};

#[test]
fn every_program_gives_the_emulators_bits_through_the_runtime() {
    let session = Session::open();
    for checked in programs::all() {
        session.bind(&checked, 0).assert_runs();
        session.assert_live(0);
    }
    session.end();
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
