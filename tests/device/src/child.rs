//! Tests that need a process of their own: the test binary runs itself again for one test.

use std::process::{Command, Output};

const CHILD: &str = "DEVICE_TESTS_CHILD";

/// The word that the parent gave, if this process is a child.
pub fn role() -> Option<String> {
    std::env::var(CHILD).ok()
}

/// This test binary, for the test `name` (with its modules) in the role `role`, with none of the variables that matter set.
pub fn command(name: &str, role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("a test has a path"));
    command.args(["--exact", name, "--nocapture", "--test-threads=1"]).env(CHILD, role);
    for variable in trn_kernels::neuron::VARIABLES {
        command.env_remove(variable.name);
    }
    command
}

/// Runs it and panics unless it ran that one test, and well. Its standard output.
pub fn run(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().expect("a child process");
    let (out, err) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{status}\n{out}\n{err}");
    assert!(out.contains("running 1 test"), "no such test\n{out}");
    out.into_owned()
}
