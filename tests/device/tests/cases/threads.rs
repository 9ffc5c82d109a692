//! Threads: cases 42, 43.
#![forbid(unsafe_code)]

use device_tests::programs::Checked;
use device_tests::{Bound, Session};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use trn_kernels::trainium::emulator::Options;

#[test]
fn case_42_eight_threads_share_a_model() {
    const THREADS: usize = 8;
    const EXECUTIONS: usize = 200;
    let session = Session::open();
    let checked = Checked::open("matmul_fp8.tensor_exact");
    let model = Arc::clone(&session.bind(&checked, 0).model);
    let port = checked.program.inputs().iter().position(|p| p.name == "x").unwrap();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (model, checked, session) = (Arc::clone(&model), &checked, &session);
            scope.spawn(move || {
                // Inputs of its own, so that another thread's results would be seen.
                let mut inputs = checked.inputs();
                inputs[port].rotate_left(thread * 384);
                let views: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
                let wanted = checked.program.run(&views, &Options::default()).unwrap().remove(0);
                let mut bound = Bound::of(model, checked).unwrap();
                bound.inputs.get("x").unwrap().write(0, &inputs[port]).unwrap();
                for execution in 0..EXECUTIONS {
                    bound.execute().unwrap();
                    assert!(bound.read(0).unwrap() == wanted, "thread {thread}, execution {execution}");
                    bound.output(0).fill(0xEE).unwrap();
                }
                session.emulated.assert_no_violation();
            });
        }
    });
    let traffic = session.runtime.traffic();
    assert_eq!(traffic.calls, (THREADS * EXECUTIONS) as u64);
    assert_eq!(session.emulated.calls("nrt_execute"), (THREADS * EXECUTIONS) as u64);
    drop(model);
    session.end();
}

/// Threads also make and drop what they use.
#[test]
fn case_42_threads_come_and_go() {
    let session = Session::open();
    let checked = Checked::open("matmul_fp8.tensor_exact");
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (session, checked) = (&session, &checked);
            scope.spawn(move || {
                for _ in 0..12 {
                    session.bind(checked, thread % 2).assert_runs();
                }
            });
        }
    });
    session.end();
}

#[test]
fn case_43_a_read_never_sees_half_a_write() {
    let session = Session::open();
    let tensor = session.runtime.allocate(0, 1 << 16, "t").unwrap();
    let view = tensor.slice(0, 1 << 16, "view").unwrap();
    tensor.fill(0).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers: Vec<_> = [(&tensor, 1u8), (&view, 2)]
            .into_iter()
            .map(|(to, byte)| {
                scope.spawn(move || {
                    (0..300).for_each(|i| to.write(0, &vec![byte.wrapping_add(i as u8); 1 << 16]).unwrap())
                })
            })
            .collect();
        for from in [&tensor, &view] {
            let done = &done;
            scope.spawn(move || {
                let mut bytes = vec![0; 1 << 16];
                while !done.load(Ordering::Relaxed) {
                    from.read(0, &mut bytes).unwrap();
                    assert!(bytes.iter().all(|b| *b == bytes[0]), "a torn read");
                }
            });
        }
        writers.into_iter().for_each(|w| w.join().unwrap());
        done.store(true, Ordering::Relaxed);
    });
    drop((tensor, view));
    session.end();
}
