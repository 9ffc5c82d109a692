//! One owner, drops in any order, starting again: cases 14 to 17, 20, 31.
#![forbid(unsafe_code)]

use device_tests::programs::Checked;
use device_tests::{BESIDE, Emulated, Kind, Session, flag};
use proptest::prelude::*;
use std::any::Any;
use std::sync::Arc;
use std::sync::Mutex;
use trn_kernels::neuron::{NeuronError, Runtime, RuntimeOptions, Status, TensorSet};

const SMALL: &str = "matmul_fp8.tensor_exact";

#[test]
fn case_14_a_failed_start_leaves_nothing() {
    let emulated = Emulated::new();
    let library = emulated.open();
    emulated.inject("nrt_init", 1, 0, 1);
    let failed = Runtime::init(&library, &BESIDE).unwrap_err();
    assert_eq!(failed, NeuronError::Call { op: "nrt_init", status: Status::FAILURE });
    assert!(failed.to_string().contains("NEURON_RT_LOG_LEVEL=INFO"), "{failed}");
    // One that starts and cannot count its cores is closed again.
    emulated.inject("nrt_get_visible_nc_count", 1, 0, 1);
    assert!(matches!(Runtime::init(&library, &BESIDE), Err(NeuronError::Call { op: "nrt_get_visible_nc_count", .. })));
    assert_eq!(emulated.calls("nrt_close"), 1);
    let runtime = Runtime::init(&library, &BESIDE).unwrap();
    runtime.close().unwrap();
    assert_eq!((emulated.calls("nrt_init"), emulated.calls("nrt_close")), (3, 2));
    emulated.assert_clean();
}

#[test]
fn case_15_one_owner() {
    let session = Session::open();
    let library = session.runtime.library();
    let again = || Runtime::init(&library, &BESIDE).map(|_| ());
    assert_eq!(again(), Err(NeuronError::AlreadyInitialized));
    let clone = session.runtime.clone();
    assert_eq!(clone.close(), Err(NeuronError::InUse));
    // Eight threads at once: still one.
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(again)).collect();
        threads.into_iter().for_each(|t| assert_eq!(t.join().unwrap(), Err(NeuronError::AlreadyInitialized)));
    });
    assert_eq!(session.emulated.calls("nrt_init"), 1);
    session.end();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Whatever is dropped first, whether it ran or failed before: the runtime is closed last, once, over nothing.
    #[test]
    fn case_16_drop_orders(order in Just((0..8).collect::<Vec<usize>>()).prop_shuffle(), status in prop::sample::select(vec![0u32, 1004])) {
        // One library for all cases: each starts it again.
        static EMULATED: Mutex<Option<Emulated>> = Mutex::new(None);
        let mut emulated = EMULATED.lock().unwrap_or_else(|e| e.into_inner());
        let emulated = emulated.get_or_insert_with(Emulated::new);
        emulated.reset();
        let runtime = Runtime::init(&emulated.open(), &BESIDE).unwrap();
        let mut bound = device_tests::Bound::new(&runtime, &Checked::open(SMALL), 0).unwrap();
        emulated.inject("nrt_execute", status, 0, u32::from(status != 0));
        prop_assert_eq!(bound.execute().is_ok(), status == 0);
        let device_tests::Bound { model, inputs, outputs, .. } = bound;
        let extra = runtime.allocate(0, 64, "extra").unwrap();
        let view = extra.slice(8, 8, "view").unwrap();
        let held = Arc::clone(inputs.get("x").unwrap());
        let mut things: Vec<Option<Box<dyn Any>>> = vec![
            Some(Box::new(model)), Some(Box::new(inputs)), Some(Box::new(outputs)), Some(Box::new(extra)), Some(Box::new(view)),
            Some(Box::new(held)), Some(Box::new(runtime.clone())), Some(Box::new(runtime)),
        ];
        for (count, at) in order.iter().enumerate() {
            prop_assert_eq!(emulated.calls("nrt_close"), 0, "closed with {} things left", things.len() - count);
            things[*at] = None;
        }
        prop_assert_eq!(emulated.calls("nrt_close"), 1);
        prop_assert_eq!(emulated.log().pop(), Some(("nrt_close".to_owned(), 0)));
        prop_assert_eq!(emulated.violations(), Vec::<String>::new());
        prop_assert_eq!(emulated.live(Kind::Everything), 0);
    }
}

#[test]
fn case_17_starting_again_after_a_close() {
    let emulated = Emulated::new();
    let library = emulated.open();
    for _ in 0..2 {
        let session = Runtime::init(&library, &BESIDE).unwrap();
        session.close().unwrap();
    }
    emulated.set_flags(flag::REINIT_AFTER_CLOSE_FAILS);
    assert_eq!(Runtime::init(&library, &BESIDE).map(|_| ()), Err(NeuronError::ProcessMustRestart));
    // It was tried, and may be tried again: some releases come back.
    emulated.set_flags(0);
    Runtime::init(&library, &BESIDE).unwrap().close().unwrap();
    emulated.assert_clean();
    // The very first start is no restart: 14 is what the library says.
    let fresh = Emulated::new();
    fresh.inject("nrt_init", 14, 0, 1);
    let first = Runtime::init(&fresh.open(), &BESIDE).map(|_| ());
    assert_eq!(first, Err(NeuronError::Call { op: "nrt_init", status: Status::CLOSED }));
}

#[test]
fn case_20_models_are_unloaded_once() {
    let session = Session::open();
    for status in [0, 1004, 1002] {
        let before = session.emulated.calls("nrt_unload");
        let mut bound = session.bind(&Checked::open(SMALL), 0);
        session.emulated.inject("nrt_execute", status, 0, u32::from(status != 0));
        assert_eq!(bound.execute().is_ok(), status == 0);
        drop(bound);
        assert_eq!(session.emulated.calls("nrt_unload") - before, 1);
        session.assert_live(0);
    }
    // Also by a library that says it could not: that goes to the hook, and nobody tries again.
    static SAID: Mutex<Vec<(&str, Status)>> = Mutex::new(Vec::new());
    let other = Emulated::new();
    let hook = RuntimeOptions { on_drop_failure: Some(|op, status| SAID.lock().unwrap().push((op, status))), ..BESIDE };
    let runtime = Runtime::init(&other.open(), &hook).unwrap();
    let bound = device_tests::Bound::new(&runtime, &Checked::open(SMALL), 0).unwrap();
    other.inject("nrt_unload", 1, 0, 1);
    drop(bound);
    assert_eq!(*SAID.lock().unwrap(), [("nrt_unload", Status::FAILURE)]);
    assert_eq!(other.calls("nrt_unload"), 1);
    runtime.close().unwrap();
    other.assert_clean();
    session.end();
}

/// A hook that panics is the hook's affair.
#[test]
fn case_20_a_hook_that_panics_ends_nothing() {
    let emulated = Emulated::new();
    let hook = RuntimeOptions { on_drop_failure: Some(|_, _| panic!("a hook's own bug")), ..BESIDE };
    let runtime = Runtime::init(&emulated.open(), &hook).unwrap();
    let bound = device_tests::Bound::new(&runtime, &Checked::open(SMALL), 0).unwrap();
    emulated.inject("nrt_unload", 1, 0, 1);
    drop(bound);
    assert!(runtime.allocate(0, 1, "still usable").is_ok());
    runtime.close().unwrap();
    emulated.assert_clean();
}

#[test]
fn case_31_sets_keep_their_tensors() {
    let session = Session::open();
    let mut set = TensorSet::new(&session.runtime, 0).unwrap();
    set.insert("x", Arc::new(session.runtime.allocate(0, 16, "x").unwrap())).unwrap();
    // The user's handle is gone; the set's is not.
    assert_eq!(session.emulated.live(Kind::Tensors), 1);
    set.get("x").unwrap().write(0, &[7; 16]).unwrap();
    drop(set);
    let order: Vec<String> = session.emulated.log().into_iter().map(|(name, _)| name).collect();
    assert_eq!(order[order.len() - 2..], ["nrt_destroy_tensor_set", "nrt_tensor_free"]);
    session.end();
}
