//! Forks and the end of a process: cases 44, 46.
#![allow(unsafe_code)] // fork

use device_tests::programs::Checked;
use device_tests::{BESIDE, Bound, Kind, Session, child, flag};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};
use trn_kernels::neuron::{
    LoadOptions, NeuronError, ProbeOptions, Read, Result, Runtime, Tensor, TensorSet, Verdict, Write, neff, probe,
};

const SMALL: &str = "matmul_fp8.tensor_exact";

unsafe extern "C" {
    safe fn fork() -> i32;
    fn waitpid(pid: i32, status: *mut i32, options: i32) -> i32;
    safe fn _exit(code: i32) -> !;
    safe fn kill(pid: i32, signal: i32) -> i32;
}

/// The exit status of a forked child, or `None` if it still ran after ten seconds (and is killed).
fn wait(pid: i32) -> Option<i32> {
    const WNOHANG: i32 = 1;
    let start = Instant::now();
    loop {
        let mut status = 0;
        // SAFETY: the pointer is to an i32 of our own.
        let ended = unsafe { waitpid(pid, &mut status, WNOHANG) };
        if ended == pid {
            return Some(status);
        }
        if start.elapsed() > Duration::from_secs(10) {
            kill(pid, 9);
            return None;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Everything that a forked child may try.
fn every_call(session: &Session, neff: &[u8], bound: &mut Inherited) {
    fn forked<T: std::fmt::Debug>(result: Result<T>) {
        assert_eq!(result.map(drop), Err(NeuronError::ForkedChild));
    }
    let (runtime, library) = (&session.runtime, session.runtime.library());
    let tensor = Arc::clone(&bound.tensor);
    forked(runtime.usable());
    forked(runtime.load(neff, 0));
    forked(runtime.allocate(0, 8, "t"));
    forked(runtime.instance());
    forked(runtime.memory(0));
    forked(runtime.write_batch(&[Write { tensor: &tensor, offset: 0, bytes: &[1] }]));
    forked(runtime.read_batch(&mut [Read { tensor: &tensor, offset: 0, into: &mut [0] }]));
    forked(runtime.clone().close());
    forked(Runtime::init(&library, &BESIDE));
    forked(TensorSet::new(runtime, 0));
    forked(tensor.write(0, &[1]));
    forked(tensor.read(0, &mut [0]));
    forked(tensor.fill(1));
    forked(tensor.copy_to(0, &tensor, 8, 4));
    forked(tensor.slice(0, 4, "v"));
    forked(tensor.device_address());
    forked(bound.program.inputs.insert("x", Arc::clone(&tensor)));
    forked(bound.program.inputs.get("x"));
    forked(bound.program.execute());
    forked(bound.program.model.instances());
    forked(library.version());
    forked(library.core_counts());
    let named = LoadOptions { path: Some(session.emulated.path()), environment: false };
    let options = ProbeOptions { library: named, require_device_nodes: false, ..ProbeOptions::default() };
    assert_eq!(probe(&options).verdict, Verdict::ForkedChild);
}

/// What a child inherits.
struct Inherited {
    program: Bound,
    tensor: Arc<Tensor>,
}

/// Forks while other threads write, allocate and execute, so that locks are held then and never released in the child.
fn fork_many(times: usize) {
    let (session, checked) = (Session::open(), Checked::open(SMALL));
    let neff = neff::emulated(&checked.json, false).unwrap();
    let tensor = Arc::new(session.runtime.allocate(0, 8064, "t").unwrap());
    let program = session.bind(&checked, 0);
    let mut inherited = Some(Inherited { program, tensor: Arc::clone(&tensor) });
    session.emulated.set_flags(flag::SLOW_EXEC);
    session.emulated.set_delay_ms(1);
    let done = &AtomicBool::new(false);
    let mut forks = vec![];
    std::thread::scope(|scope| {
        let busy = |work: &dyn Fn()| {
            while !done.load(Ordering::Relaxed) {
                work();
            }
        };
        let (session, checked) = (&session, &checked);
        scope.spawn(move || busy(&|| tensor.fill(7).unwrap()));
        scope.spawn(move || busy(&|| drop(session.runtime.allocate(0, 8, "brief").unwrap())));
        scope.spawn(move || busy(&|| session.bind(checked, 1).assert_runs()));
        for _ in 0..times {
            let pid = fork();
            if pid == 0 {
                let checks = catch_unwind(AssertUnwindSafe(|| {
                    every_call(session, &neff, inherited.as_mut().unwrap());
                    // Drops of what was inherited, the runtime's last holder included: none may wait, none may call.
                    drop(inherited.take());
                    // SAFETY: this process ends below without using the session again; the copy is the one that is dropped.
                    drop(unsafe { std::ptr::read(&session.runtime) });
                    assert_eq!(session.emulated.violation_count(), 0, "a drop called the library");
                }));
                _exit(i32::from(checks.is_err()));
            }
            assert!(pid > 0, "fork");
            forks.push((pid, wait(pid)));
        }
        done.store(true, Ordering::Relaxed);
    });
    for (pid, status) in &forks {
        assert_eq!(*status, Some(0), "forked child {pid} hung or failed");
        println!("forked {pid}");
    }
    inherited.unwrap().program.assert_runs();
    session.end();
}

/// In a child process with a log in a file, which forked children write to as well: it has no line of theirs.
#[test]
fn case_44_forked_children_are_told_and_touch_nothing() {
    const FORKS: usize = 20;
    if child::role().is_some() {
        fork_many(FORKS);
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log");
    let mut command = child::command("process::case_44_forked_children_are_told_and_touch_nothing", "fork");
    let said = child::run(command.env("EMUNRT_LOG", &log));
    let forked: Vec<&str> = said.lines().filter_map(|l| Some(l.split_once("forked ")?.1)).collect();
    assert_eq!(forked.len(), FORKS, "{said}");
    let log = std::fs::read_to_string(log).unwrap();
    let callers: std::collections::BTreeSet<&str> = log.lines().filter_map(|l| l.split_whitespace().next()).collect();
    assert_eq!(callers.len(), 1, "one process called the library: {callers:?}");
    assert!(forked.iter().all(|pid| !callers.contains(pid)));
    assert!(log.contains("nrt_execute 0") && !log.contains("violation"));
}

/// A process that ends with a live runtime, in a static or under an execution, ends well: nothing is called from `atexit`.
#[test]
fn case_46_a_process_ends_with_a_live_runtime() {
    const NAME: &str = "process::case_46_a_process_ends_with_a_live_runtime";
    static LIVE: OnceLock<(Session, Mutex<Bound>)> = OnceLock::new();
    let start = || {
        LIVE.get_or_init(|| {
            let session = Session::open();
            let bound = session.bind(&Checked::open(SMALL), 0);
            (session, Mutex::new(bound))
        })
    };
    match child::role().as_deref() {
        Some("return") => start().1.lock().unwrap().assert_runs(),
        Some("exit") => {
            let (session, bound) = start();
            session.emulated.set_flags(flag::SLOW_EXEC);
            session.emulated.set_delay_ms(10_000);
            std::thread::spawn(|| bound.lock().unwrap().execute());
            while session.emulated.live(Kind::Executions) == 0 {
                std::thread::yield_now();
            }
            std::process::exit(0);
        }
        Some(other) => panic!("{other}"),
        None => {
            for role in ["return", "exit"] {
                let folder = tempfile::tempdir().unwrap();
                let log = folder.path().join("log");
                child::run(child::command(NAME, role).env("EMUNRT_LOG", &log));
                let log = std::fs::read_to_string(log).unwrap();
                assert!(log.contains("nrt_init 0") && !log.contains("violation"), "{log}");
                assert!(!log.contains("nrt_close"), "closed from a static destructor:\n{log}");
            }
        }
    }
}
