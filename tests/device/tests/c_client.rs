//! The C program in `c/`, compiled when there is a C compiler: the ABI is right from C's side too.
#![forbid(unsafe_code)]

use device_tests::programs::{Checked, all};
use device_tests::shared_object;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use trn_kernels::neuron::neff;
use trn_kernels::trainium::emulator::Options;

/// The compiled program with a library of its own, or `None` (reported) without a C compiler.
fn client(folder: &Path) -> Option<PathBuf> {
    if Command::new("cc").arg("--version").output().is_err() {
        eprintln!("skipped: no C compiler (cc), the ABI was not driven from C");
        return None;
    }
    let library = folder.join("libnrt.so.1");
    std::fs::copy(shared_object(), &library).unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("c/client.c");
    let program = folder.join("client");
    let mut cc = Command::new("cc");
    cc.args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "-pthread", "-o"])
        .arg(&program)
        .arg(source)
        .arg(&library);
    // For example -fsanitize=address,undefined: see tests/emulated-libnrt/README.md.
    cc.args(std::env::var("CFLAGS").unwrap_or_default().split_whitespace());
    let made = cc.output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    Some(program)
}

/// Runs the program as any libnrt client is run: the linker finds `libnrt.so.1` on its path.
fn run(program: &Path, arguments: &[&Path], mode: &str) -> Output {
    let folder = program.parent().unwrap();
    let mut command = Command::new(program);
    command.arg(mode).args(arguments).env("LD_LIBRARY_PATH", folder).env("EMUNRT_LOG", folder.join("trace"));
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{mode} {arguments:?}: {}: {text}", output.status);
    output
}

/// A program's NEFF and input files.
fn lay_out(checked: &Checked, folder: &Path) -> PathBuf {
    for (port, bytes) in checked.program.inputs().iter().zip(checked.inputs()) {
        let in_place = checked.program.outputs().iter().any(|o| o.tensor == port.tensor);
        let alias = if in_place { ".must_alias_input" } else { "" };
        std::fs::write(folder.join(format!("{}{alias}.in", port.name)), bytes).unwrap();
    }
    let path = folder.join("kernel.neff");
    std::fs::write(&path, neff::emulated(&checked.json, true).unwrap()).unwrap();
    path
}

#[test]
fn a_c_program_gets_the_emulators_bits() {
    let folder = tempfile::tempdir().unwrap();
    let Some(client) = client(folder.path()) else { return };
    for checked in all() {
        let folder = tempfile::tempdir().unwrap();
        let neff = lay_out(&checked, folder.path());
        run(&client, &[&neff, folder.path()], "run");
        let wanted = checked.run(&Options::default());
        assert!(!wanted.is_empty());
        for (port, wanted) in checked.program.outputs().iter().zip(wanted) {
            let input = checked.program.inputs().iter().find(|i| i.tensor == port.tensor);
            let name = input.map_or(&port.name, |input| &input.name);
            let got = std::fs::read(folder.path().join(format!("{name}.out"))).unwrap();
            assert!(got == wanted, "{}: {name}", checked.name);
        }
    }
}

#[test]
fn a_careless_c_program_is_told_so() {
    let folder = tempfile::tempdir().unwrap();
    let Some(client) = client(folder.path()) else { return };
    let neff = lay_out(&Checked::open("matmul_fp8.channel"), folder.path());
    run(&client, &[&neff], "misuse");
    let trace = std::fs::read_to_string(folder.path().join("trace")).unwrap();
    for line in [
        "violation nrt_tensor_allocate: called before nrt_init",
        "violation nrt_tensor_read: tensor: not a handle of this library",
        "violation nrt_tensor_read: tensor: the handle of a model",
        "violation nrt_tensor_free: tensor: stale",
        "violation nrt_free_model_tensor_info: the array was freed before",
        "violation nrt_close: called with 1 models alive",
        "violation nrt_unload: called after nrt_close",
    ] {
        assert!(trace.contains(line), "{line:?} is not in\n{trace}");
    }
}

#[test]
fn eight_c_threads_share_a_model() {
    let folder = tempfile::tempdir().unwrap();
    let Some(client) = client(folder.path()) else { return };
    let neff = lay_out(&Checked::open("matmul_mx.packed"), folder.path());
    run(&client, &[&neff, folder.path()], "threads");
}

#[test]
fn forked_children_are_refused_and_never_wait() {
    let folder = tempfile::tempdir().unwrap();
    let Some(client) = client(folder.path()) else { return };
    run(&client, &[], "fork");
    let trace = std::fs::read_to_string(folder.path().join("trace")).unwrap();
    // The children write to the same trace: it shows what they did.
    assert_eq!(trace.matches("violation nrt_tensor_free: called from a forked child").count(), 100);
}
