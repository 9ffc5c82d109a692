//! Every status from every call: cases 38 to 41.
#![forbid(unsafe_code)]

use device_tests::programs::Checked;
use device_tests::{BESIDE, Bound, Emulated, Kind, Session, flag};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use trn_kernels::neuron::{
    LoadOptions, NeuronError, OPTIONAL_SYMBOLS, ProbeOptions, REQUIRED_SYMBOLS, Read, Result, Runtime, RuntimeOptions,
    Status, StatusClass, Tensor, TensorSet, Verdict, Write, neff, probe, retry,
};

const SMALL: &str = "matmul_fp8.tensor_exact";

/// What a client has at hand when a call fails.
struct Site {
    session: Session,
    checked: Checked,
    neff: Vec<u8>,
    bound: Bound,
    a: Arc<Tensor>,
    b: Tensor,
}

impl Site {
    fn new() -> Site {
        let (session, checked) = (Session::open(), Checked::open(SMALL));
        let neff = neff::emulated(&checked.json, false).unwrap();
        let mut bound = session.bind(&checked, 0);
        bound.execute().unwrap();
        let a = Arc::new(session.runtime.allocate(0, 64, "a").unwrap());
        let b = session.runtime.allocate(0, 64, "b").unwrap();
        Site { session, checked, neff, bound, a, b }
    }
}

/// A function of the library, and a call of ours that reaches it.
type Op = (&'static str, fn(&mut Site) -> Result<()>);

/// Those whose status a call of ours hands on.
const OPS: [Op; 18] = [
    ("nrt_load", |s| s.session.runtime.load(&s.neff, 0).map(drop)),
    ("nrt_get_model_tensor_info", |s| s.session.runtime.load(&s.neff, 1).map(drop)),
    ("nrt_free_model_tensor_info", |s| s.session.runtime.load(&s.neff, 0).map(drop)),
    ("nrt_allocate_tensor_set", |s| TensorSet::new(&s.session.runtime, 0).map(drop)),
    ("nrt_add_tensor_to_tensor_set", |s| TensorSet::new(&s.session.runtime, 0)?.insert("x", Arc::clone(&s.a))),
    ("nrt_get_tensor_from_tensor_set", |s| s.bound.inputs.get("x").map(drop)),
    ("nrt_execute", |s| s.bound.execute()),
    ("nrt_tensor_allocate", |s| s.session.runtime.allocate(1, 8, "t").map(drop)),
    ("nrt_tensor_read", |s| s.a.read(8, &mut [0; 8])),
    ("nrt_tensor_write", |s| s.a.write(8, &[1; 8])),
    ("nrt_tensor_copy", |s| s.a.copy_to(0, &s.b, 32, 32)),
    ("nrt_tensor_memset", |s| s.a.fill(3)),
    ("nrt_tensor_allocate_slice", |s| s.a.slice(1, 2, "view").map(drop)),
    ("nrt_get_instance_info", |s| s.session.runtime.instance().map(drop)),
    ("nrt_get_vnc_memory_stats", |s| s.session.runtime.memory(1).map(drop)),
    ("nrt_get_model_instance_count", |s| s.bound.model.instances().map(drop)),
    ("nrt_tensor_read_batch", |s| {
        s.session.runtime.read_batch(&mut [Read { tensor: &s.a, offset: 0, into: &mut [0; 4] }])
    }),
    ("nrt_tensor_write_batch", |s| s.session.runtime.write_batch(&[Write { tensor: &s.a, offset: 0, bytes: &[0; 4] }])),
];

/// The rest: before there is a runtime, when something is dropped, without a status.
const ELSEWHERE: [&str; 10] = [
    "nrt_init",
    "nrt_close",
    "nrt_get_version",
    "nrt_get_total_nc_count",
    "nrt_get_visible_nc_count",
    "nrt_unload",
    "nrt_destroy_tensor_set",
    "nrt_tensor_free",
    "nrt_tensor_get_size",
    "nrt_tensor_get_va",
];

/// Every status but success, and one that nobody knows.
fn statuses() -> impl Iterator<Item = Status> {
    Status::ALL.iter().copied().filter(|s| !s.is_success()).chain([Status(99_999)])
}

#[test]
fn case_38_the_tables_are_complete() {
    let tested: BTreeSet<&str> = OPS.iter().map(|(name, _)| *name).chain(ELSEWHERE).collect();
    let bound: BTreeSet<&str> = REQUIRED_SYMBOLS.iter().chain(OPTIONAL_SYMBOLS).copied().collect();
    assert_eq!((tested, statuses().count()), (bound, 28));
}

/// A status after which the runtime lives on: its class is right, nothing leaks, and the next call works.
#[test]
fn case_38_every_status_that_can_be_survived() {
    let site = &mut Site::new();
    let live = site.session.emulated.live(Kind::Everything);
    for (name, call) in OPS {
        call(site).unwrap_or_else(|e| panic!("{name} without a fault: {e}"));
        for status in statuses().filter(|s| s.class() != StatusClass::Poison) {
            site.session.emulated.inject(name, status.0, 0, u32::MAX);
            let failed = call(site).unwrap_err();
            site.session.emulated.inject(name, 0, 0, 0);
            assert_eq!(failed, NeuronError::Call { op: name, status }, "{name} {status}");
            assert_eq!(failed.class(), Some(status.class()));
            site.session.runtime.usable().unwrap();
            assert_eq!(site.session.emulated.live(Kind::Everything), live, "{name} {status}: a leak");
            if name == "nrt_execute" {
                // A full queue ran nothing; everything else leaves bytes that nobody may take for a result.
                let read = site.bound.read(0);
                assert_eq!(read.is_ok(), status == Status::QUEUE_FULL, "{status}: {read:?}");
                assert!(matches!(read, Ok(_) | Err(NeuronError::Untrusted { .. })));
            }
            call(site).unwrap_or_else(|e| panic!("{name} after {status}: {e}"));
            site.session.emulated.assert_no_violation();
        }
        site.bound.assert_runs();
    }
}

/// A status that loses the device: later calls fail without a call, drops leave the library alone, nothing starts again.
#[test]
fn case_38_every_status_that_loses_the_device() {
    for (name, call) in OPS {
        for status in statuses().filter(|s| s.class() == StatusClass::Poison) {
            let mut site = Site::new();
            site.session.emulated.inject(name, status.0, 0, 1);
            assert_eq!(call(&mut site), Err(NeuronError::Call { op: name, status }), "{name} {status}");
            let calls = site.session.emulated.log();
            let lost = NeuronError::Poisoned { status };
            for (other, call) in OPS {
                assert_eq!(call(&mut site), Err(lost.clone()), "{other} after {name} {status}");
            }
            assert_eq!(site.bound.read(0), Err(lost.clone()));
            assert_eq!(site.a.device_address(), Err(lost.clone()));
            assert_eq!(site.session.runtime.clone().close(), Err(lost));
            let Site { session: Session { runtime, emulated }, bound, a, b, .. } = site;
            let library = runtime.library();
            drop((bound, a, b, runtime));
            assert_eq!(emulated.log(), calls, "{name} {status}: a call to a lost device");
            emulated.assert_no_violation();
            assert_eq!(Runtime::init(&library, &BESIDE).map(drop), Err(NeuronError::ProcessMustRestart));
            let options = LoadOptions { path: Some(emulated.path()), environment: false };
            let options = ProbeOptions { library: options, require_device_nodes: false, ..ProbeOptions::default() };
            assert_eq!(probe(&options).verdict, Verdict::RuntimePoisoned);
            assert_eq!(emulated.log(), calls);
        }
    }
}

/// Before there is a runtime a status loses nothing: it is told, and the next try may succeed.
#[test]
fn case_38_every_status_before_there_is_a_runtime() {
    let emulated = Emulated::new();
    let library = emulated.open();
    for op in ["nrt_init", "nrt_get_version", "nrt_get_total_nc_count", "nrt_get_visible_nc_count"] {
        for status in statuses() {
            emulated.reset();
            let fresh = emulated.calls("nrt_init") == 0;
            emulated.inject(op, status.0, 0, 1);
            let failed = Runtime::init(&library, &BESIDE).map(drop).unwrap_err();
            // After a close, 14 is how a library says that it does not come back.
            let gone = op == "nrt_init" && status == Status::CLOSED;
            match failed {
                NeuronError::Call { op: said, status: with } => assert_eq!((said, with), (op, status)),
                NeuronError::ProcessMustRestart => assert!(gone),
                other => panic!("{op} {status}: {other:?}"),
            }
            assert!(fresh);
            emulated.assert_clean();
            Runtime::init(&library, &BESIDE).unwrap().close().unwrap();
            emulated.assert_clean();
        }
    }
}

#[test]
fn case_38_every_status_of_an_unload() {
    static SAID: Mutex<Vec<(&str, Status)>> = Mutex::new(Vec::new());
    let hook = RuntimeOptions { on_drop_failure: Some(|op, status| SAID.lock().unwrap().push((op, status))), ..BESIDE };
    let checked = Checked::open(SMALL);
    for status in statuses() {
        let emulated = Emulated::new();
        let runtime = Runtime::init(&emulated.open(), &hook).unwrap();
        let Bound { model, inputs, outputs, .. } = Bound::new(&runtime, &checked, 0).unwrap();
        emulated.inject("nrt_unload", status.0, 0, 1);
        drop(model);
        assert_eq!(std::mem::take(&mut *SAID.lock().unwrap()), [("nrt_unload", status)]);
        emulated.assert_no_violation();
        assert_eq!(emulated.live(Kind::Models), 0, "the library's part is done whatever it answers");
        let lost = status.class() == StatusClass::Poison;
        assert_eq!(runtime.usable().is_err(), lost, "{status}");
        drop((inputs, outputs, runtime));
        assert_eq!((emulated.live(Kind::Everything) > 0, emulated.calls("nrt_close") == 0), (lost, lost), "{status}");
        emulated.assert_no_violation();
    }
}

/// Functions without a status do their work; two that give a value give none.
#[test]
fn case_38_functions_without_a_status() {
    let site = Site::new();
    let (emulated, runtime) = (&site.session.emulated, &site.session.runtime);
    for name in ["nrt_tensor_free", "nrt_destroy_tensor_set", "nrt_close", "nrt_tensor_get_size", "nrt_tensor_get_va"] {
        emulated.inject(name, 1, 0, u32::MAX);
    }
    let live = emulated.live(Kind::Everything);
    for what in ["an allocation", "a view"] {
        let refused = if what == "a view" { site.a.slice(0, 8, "t") } else { runtime.allocate(0, 8, "t") };
        match refused.unwrap_err() {
            NeuronError::Answer { op: "nrt_tensor_get_size", problem } => assert!(problem.contains("t holds 0 bytes")),
            other => panic!("{what}: {other:?}"),
        }
    }
    assert_eq!(site.a.device_address(), Ok(None));
    assert_eq!(emulated.live(Kind::Everything), live, "what was refused was freed");
    let Site { session, bound, a, b, .. } = site;
    drop((bound, a, b));
    session.end();
}

#[test]
fn case_39_a_lost_core_gives_no_results() {
    for status in [101, 1201, 1203] {
        let mut site = Site::new();
        assert!(site.bound.read(0).is_ok());
        site.session.emulated.inject("nrt_execute", status, 0, 1);
        assert_eq!(site.bound.execute(), Err(NeuronError::Call { op: "nrt_execute", status: Status(status) }));
        let lost = NeuronError::Poisoned { status: Status(status) };
        assert_eq!(site.bound.read(0), Err(lost.clone()), "not even results of before");
        assert_eq!(site.session.runtime.load(&site.neff, 1).map(drop), Err(lost), "nor another core");
        let Site { session: Session { runtime, emulated }, bound, a, b, .. } = site;
        drop((runtime, bound, a, b));
        emulated.assert_no_violation();
        assert_eq!(emulated.calls("nrt_close"), 0);
    }
}

#[test]
fn case_40_a_full_queue_is_tried_again_a_bounded_number_of_times() {
    let mut site = Site::new();
    let before = site.session.emulated.calls("nrt_execute");
    let calls = |site: &Site| site.session.emulated.calls("nrt_execute") - before;
    site.session.emulated.inject("nrt_execute", 7, 0, 3);
    retry(5, || site.bound.execute()).unwrap();
    assert_eq!(calls(&site), 4);
    assert!(site.bound.read(0).unwrap() == site.bound.wanted[0].1);
    site.session.emulated.inject("nrt_execute", 7, 0, u32::MAX);
    let full = retry(3, || site.bound.execute()).unwrap_err();
    assert_eq!((full.status(), calls(&site)), (Some(Status::QUEUE_FULL), 7));
    site.session.emulated.inject("nrt_execute", 0, 0, 0);
    site.session.emulated.inject("nrt_execute", 1004, 0, u32::MAX);
    retry(3, || site.bound.execute()).unwrap_err();
    assert_eq!(calls(&site), 8, "another failure is not tried again");
}

#[test]
fn case_41_what_a_failed_execution_left_cannot_be_read_copied_or_run_on() {
    let mut site = Site::new();
    site.session.emulated.set_flags(flag::EXEC_PANICS);
    let failed = site.bound.execute().unwrap_err();
    assert_eq!(failed, NeuronError::Call { op: "nrt_execute", status: Status(1004) });
    site.session.emulated.set_flags(0);
    let output = Arc::clone(site.bound.output(0));
    let doubt = NeuronError::Untrusted { tensor: "output_0".into() };
    let calls = site.session.emulated.log();
    assert_eq!(output.read(0, &mut [0; 1]), Err(doubt.clone()));
    assert_eq!(output.copy_to(0, &site.b, 0, 4), Err(doubt.clone()));
    let mut one = [0; 1];
    let refused = site.session.runtime.read_batch(&mut [Read { tensor: &output, offset: 9, into: &mut one }]);
    assert_eq!(refused, Err(doubt.clone()));
    // As an input of the next execution, by way of a view.
    let x = site.bound.model.inputs().iter().find(|d| d.name == "x_scale").unwrap().bytes as usize;
    assert_eq!(site.session.emulated.log(), calls, "none of this reached the library");
    let view = Arc::new(output.slice(16, x, "view").unwrap());
    let outputs = site.checked.program.outputs();
    let mut other = TensorSet::new(&site.session.runtime, 0).unwrap();
    let fresh = site.session.runtime.allocate(0, site.bound.wanted[0].1.len(), "fresh").unwrap();
    other.insert(&outputs[0].name, Arc::new(fresh)).unwrap();
    let scale = Arc::clone(site.bound.inputs.get("x_scale").unwrap());
    site.bound.inputs.insert("x_scale", Arc::clone(&view)).unwrap();
    let refused = site.bound.model.execute(&site.bound.inputs, &mut other).unwrap_err();
    assert_eq!(refused, NeuronError::Untrusted { tensor: "view".into() });
    // Writing a part makes that part known again, and no other.
    view.write(0, &vec![0; x]).unwrap();
    view.read(0, &mut vec![0; x]).unwrap();
    output.read(16, &mut vec![0; x]).unwrap();
    assert_eq!(output.read(15, &mut [0; 2]), Err(doubt.clone()));
    site.bound.model.execute(&site.bound.inputs, &mut other).unwrap();
    site.bound.inputs.insert("x_scale", scale).unwrap();
    assert_eq!(output.read(0, &mut [0; 1]), Err(doubt));
    // And so does the next execution.
    site.bound.assert_runs();
    let Site { session, bound, a, b, .. } = site;
    drop((other, view, output, bound, a, b));
    session.end();
}
