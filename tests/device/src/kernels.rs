//! Folders of compiled kernels for the emulated runtime.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use tempfile::TempDir;
use trn_kernels::neuron::neff;

/// The repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The kernels of the tiny gpt-oss model (`kernels/sets/tiny_gpt_oss.toml`), from the programs that are checked in.
pub fn tiny_gpt_oss() -> TempDir {
    folder(&root().join("tests/data/tiny-gpt-oss-programs"))
}

/// A folder of programs as `kernels/build.py --programs` writes it, made into one of emulated NEFFs.
pub fn folder(programs: &Path) -> TempDir {
    let read = |path: &Path| std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let text = String::from_utf8(read(&programs.join("manifest.toml"))).expect("a manifest is text");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut manifest = String::new();
    let mut neff = Vec::new();
    for line in text.lines() {
        let value = |key: &str| line.strip_prefix(key)?.strip_prefix(" = \"")?.strip_suffix('"');
        if let Some(json) = value("file") {
            let name = json.strip_suffix(".json").expect("a program is JSON");
            neff = neff::emulated(&read(&programs.join(json)), false).expect("a checked-in program");
            std::fs::write(folder.path().join(format!("{name}.neff")), &neff).expect("a NEFF");
            manifest += &format!("file = \"{name}.neff\"\n");
        } else if value("sha256").is_some() {
            manifest += &format!("sha256 = \"{}\"\n", sha256(&neff));
        } else {
            manifest += &format!("{line}\n");
        }
    }
    std::fs::write(folder.path().join("manifest.toml"), manifest).expect("a manifest");
    folder
}

/// As a manifest has it.
pub fn sha256(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
