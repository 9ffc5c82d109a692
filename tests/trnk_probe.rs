//! `trnk probe` as a user runs it, on a machine without a device.
#![forbid(unsafe_code)]

use std::process::{Command, Output};

/// A run without variables that would find a library.
fn probe(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trnk"));
    command.env_remove("TRN_KERNELS_LIBNRT").env_remove("TRN_KERNELS_NEURON").env_remove("LD_LIBRARY_PATH");
    command.envs(variables.iter().copied()).arg("probe").args(arguments).output().unwrap()
}

fn said(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn a_verdict_is_no_failure_unless_it_is_required() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "not a library").unwrap();
    let path = file.path().to_str().unwrap();
    let missing = [path, ".none"].concat();
    // A machine that has a device may be ready by default: these verdicts are the same everywhere.
    for (arguments, verdict, remedy) in [
        (["--without-device", "--library", path], "does not load: ", "Repair what the linker names"),
        (["--without-device", "--library", &missing], "There is no libnrt.so.1: tried ", "aws-neuronx-runtime-lib"),
    ] {
        let output = probe(&arguments, &[]);
        let text = said(&output.stdout);
        assert!(output.status.success(), "{text}");
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].contains(verdict) && lines[0].ends_with('.') && lines[1].contains(remedy), "{text}");
        assert!(text.contains("\ncpu: ") && text.contains("\nnext: cargo run"), "{text}");
        let output = probe(&[&arguments[..], &["--require"]].concat(), &[]);
        assert_eq!(output.status.code(), Some(1));
        assert!(said(&output.stderr).starts_with("error: --require: ") && said(&output.stdout) == text);
    }
}

#[test]
fn the_switch_is_the_verdict() {
    let output = probe(&[], &[("TRN_KERNELS_NEURON", "0"), ("NEURON_RT_LOG_LEVEL", "INFO")]);
    let text = said(&output.stdout);
    assert!(
        output.status.success() && text.starts_with("The device is switched off by TRN_KERNELS_NEURON=0."),
        "{text}"
    );
    assert!(text.contains("\nNEURON_RT_LOG_LEVEL=INFO ("), "{text}");
}

#[test]
fn a_folder_of_kernels_is_checked_and_listed() {
    let programs = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tiny-gpt-oss-programs");
    let text = said(&probe(&["--kernels", programs], &[]).stdout);
    assert!(
        text.contains(" compiled in ") && text.contains("  grouped_matmul_mx, trn3, x bfloat16 [64, 128]"),
        "{text}"
    );
    let output = probe(&["--kernels", env!("CARGO_MANIFEST_DIR")], &[]);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0));
    assert!(said(&output.stderr).contains("manifest.toml: "), "{}", said(&output.stderr));
}
