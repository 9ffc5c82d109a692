//! Folders of NEFFs as `kernels/build.py` makes them, from the programs that are checked in.

use crate::programs;
use sha2::{Digest, Sha256};
use std::fmt::Write;
use std::path::PathBuf;
use tempfile::TempDir;
use trn_kernels::neuron::neff;

/// `tests/data/NAME` of the repository.
pub fn data(name: &str) -> PathBuf {
    programs::kernels().parent().expect("kernels has a parent").join("tests/data").join(name)
}

/// The programs of `tests/data/NAME` as NEFFs for the emulated library, with their manifest.
pub fn neffs(name: &str) -> TempDir {
    let (from, to) = (data(name), tempfile::tempdir().expect("a temporary folder"));
    let manifest = std::fs::read_to_string(from.join("manifest.toml")).expect("manifest.toml");
    let (mut lines, mut hash) = (String::new(), String::new());
    for line in manifest.lines() {
        if let Some(file) = line.strip_prefix("file = \"").and_then(|l| l.strip_suffix(".json\"")) {
            let program = std::fs::read(from.join(format!("{file}.json"))).expect("a program");
            let made = neff::emulated(&program, false).expect("a NEFF");
            hash = Sha256::digest(&made).iter().map(|b| format!("{b:02x}")).collect();
            std::fs::write(to.path().join(format!("{file}.neff")), made).expect("a file");
            writeln!(lines, "file = \"{file}.neff\"").expect("memory");
        } else if line.starts_with("sha256 = ") {
            writeln!(lines, "sha256 = \"{hash}\"").expect("memory");
        } else {
            writeln!(lines, "{line}").expect("memory");
        }
    }
    std::fs::write(to.path().join("manifest.toml"), lines).expect("a file");
    to
}
