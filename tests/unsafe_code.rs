//! Where unsafe code may stand, kept true: every other file of `src` forbids it, and every unsafe block says why it is sound.

use std::path::{Path, PathBuf};

/// design: machine tiers, what the CPU tells of itself, memory of packed weights, parts of rows for threads, mapping a checkpoint (whose caller vouches for the
/// file), loading libnrt and calling it.
const MAY_BE_UNSAFE: [&str; 7] = [
    "cpu/tier/",
    "cpu/isa.rs",
    "cpu/workspace.rs",
    "cpu/handout.rs",
    "checkpoint/map.rs",
    "neuron/load.rs",
    "neuron/runtime",
];
/// The same for the emulated libnrt: where C's pointers come in, and its root, which says so.
const MAY_BE_UNSAFE_EMULATED: [&str; 2] = ["exports/", "caller.rs"];
const ABOVE_UNSAFE_EMULATED: [&str; 1] = ["lib.rs"];
/// Module roots that hold `mod` lines and re-exports above files that may be unsafe.
const ABOVE_UNSAFE: [&str; 4] = ["lib.rs", "cpu/mod.rs", "checkpoint/mod.rs", "neuron/mod.rs"];
/// The type of a foreign function: to write it down is not unsafe, only to call one.
const FOREIGN_TYPE: &str = "unsafe extern \"C\" fn(";

fn rust_files(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, files);
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
}

/// What is wrong with a source file, if anything.
fn verdict(name: &str, text: &str) -> Option<String> {
    verdict_of(name, text, &MAY_BE_UNSAFE, &ABOVE_UNSAFE)
}

/// The same by other lists.
fn verdict_of(name: &str, text: &str, may_be_unsafe: &[&str], above_unsafe: &[&str]) -> Option<String> {
    let allowed = may_be_unsafe.iter().any(|p| name.starts_with(p));
    let code = text.lines().map(|l| l.split("//").next().unwrap_or_default().replace(FOREIGN_TYPE, ""));
    let code: Vec<String> = code.collect();
    let word = |l: &String| l.split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == "unsafe");
    if !allowed && code.iter().any(word) {
        return Some(format!("{name}: unsafe code outside {may_be_unsafe:?}"));
    }
    let forbids = text.contains("#![forbid(unsafe_code)]");
    if !allowed && !forbids && !above_unsafe.contains(&name) {
        return Some(format!("{name}: no #![forbid(unsafe_code)]"));
    }
    let blocks = code.iter().filter(|l| l.contains("unsafe {")).count();
    let proofs = text.matches("// SAFETY: ").count();
    (proofs < blocks).then(|| format!("{name}: {blocks} unsafe blocks, {proofs} SAFETY comments"))
}

/// What is wrong in the files of a folder of this package.
fn wrong_in(folder: &str, least: usize, verdict: impl Fn(&str, &str) -> Option<String>) -> Vec<String> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut files = vec![];
    rust_files(&src, &mut files);
    assert!(files.len() > least, "only {} files found", files.len());
    let check = |path: &PathBuf| {
        let name = path.strip_prefix(&src).unwrap().to_str().unwrap().replace('\\', "/");
        verdict(&name, &std::fs::read_to_string(path).unwrap())
    };
    files.iter().filter_map(check).collect()
}

#[test]
fn unsafe_stays_where_it_may() {
    let wrong = wrong_in("src", 20, verdict);
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn unsafe_of_the_emulated_libnrt_stays_where_c_comes_in() {
    let by = |name: &str, text: &str| verdict_of(name, text, &MAY_BE_UNSAFE_EMULATED, &ABOVE_UNSAFE_EMULATED);
    let wrong = wrong_in("tests/emulated-libnrt/src", 10, by);
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_check_can_fail() {
    assert!(verdict("matmul/x.rs", "#![forbid(unsafe_code)]\nfn f() {}").is_none());
    assert!(verdict("matmul/x.rs", "fn f() {}").is_some());
    assert!(verdict("matmul/x.rs", "#![forbid(unsafe_code)]\nunsafe fn f() {}").is_some());
    let foreign = "#![forbid(unsafe_code)]\ntype F = unsafe extern \"C\" fn(u32);";
    assert!(verdict("matmul/x.rs", foreign).is_none());
    assert!(verdict("matmul/x.rs", &format!("{foreign}\nunsafe extern \"C\" fn f() {{}}")).is_some());
    assert!(verdict("cpu/tier/x.rs", "fn f() { unsafe { g() } }").is_some());
    assert!(verdict("cpu/tier/x.rs", "// SAFETY: g has no requirement.\nfn f() { unsafe { g() } }").is_none());
}
