//! Where the program of a shape comes from: a file, the checked-in ones, or `kernels/trace.py`.
#![forbid(unsafe_code)]

use crate::failure::Failure;
use crate::shape::{self, Dims};
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use trn_kernels::trainium::emulator::{Limits, Program, Target};

/// A model allocates nothing for tensors, so their size is no matter.
const LIMITS: Limits = Limits { json_bytes: 1 << 30, tensor_bytes: usize::MAX, work: u64::MAX };

/// What `kernels/trace.py` needs.
const NEEDS: &str = "needs Python 3.11 or later with the packages of kernels/requirements.txt \
    (python3 -m pip install -r kernels/requirements.txt; --python names another interpreter). \
    `--program FILE` needs no Python, nor do the shapes in kernels/programs/large";

/// Reads a program file.
pub(crate) fn open(path: &Path) -> Result<Program, Failure> {
    let fail = |why: &dyn std::fmt::Display| Failure::refused(format!("{}: {why}", path.display()));
    let json = std::fs::read(path).map_err(|e| fail(&e))?;
    Program::from_json(&json, &LIMITS).map_err(|e| fail(&e))
}

/// The folder `kernels`: as asked, else here, else where this program was built.
pub(crate) fn kernels(asked: Option<&Path>) -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let here = PathBuf::from("kernels");
    asked.map_or_else(|| if here.join("trace.py").is_file() { here } else { built }, Path::to_path_buf)
}

/// The program of a kernel's shape.
pub(crate) fn of_shape(
    name: &str,
    dims: &Dims,
    target: Target,
    folder: &Path,
    python: &Path,
) -> Result<Program, Failure> {
    if !shape::targets(name).iter().any(|t| t == target.name()) {
        let served = shape::targets(name).join(" or ");
        return Err(Failure::refused(format!("{name} refuses: target: got {}, need {served}", target.name())));
    }
    if let Some(found) = checked_in(name, dims, target, folder) {
        return Ok(found);
    }
    trace(name, dims, target, folder, python)
}

/// The checked-in program of that shape, if its kernel has not changed since.
fn checked_in(name: &str, dims: &Dims, target: Target, folder: &Path) -> Option<Program> {
    let prefix = format!("{name}.{}.", target.name());
    let files = std::fs::read_dir(folder.join("programs").join("large")).ok()?;
    let path = files.flatten().map(|f| f.path()).find(|path| {
        let file = path.file_name().and_then(|n| n.to_str());
        let shape = file.and_then(|n| n.strip_prefix(&prefix)?.strip_suffix(".json"));
        shape.is_some_and(|text| shape::parse(name, text).is_ok_and(|other| other == *dims))
    })?;
    let program = open(&path).ok()?;
    let unchanged = program.sources().iter().all(|(file, sha256)| {
        let text = std::fs::read(folder.join(file)).unwrap_or_default();
        Sha256::digest(&text).iter().map(|b| format!("{b:02x}")).collect::<String>() == *sha256
    });
    unchanged.then_some(program)
}

/// Runs `kernels/trace.py`.
fn trace(name: &str, dims: &Dims, target: Target, folder: &Path, python: &Path) -> Result<Program, Failure> {
    let script = folder.join("trace.py");
    if !script.is_file() {
        return Err(Failure::refused(format!(
            "{} is not there, so the program of this shape cannot be made: name the repository's folder with \
             --kernels DIR, or a program with --program FILE",
            script.display()
        )));
    }
    let spinner = ProgressBar::new_spinner().with_style(ProgressStyle::default_spinner());
    spinner.set_message(format!("tracing {name} on the simulator ({})", script.display()));
    spinner.enable_steady_tick(Duration::from_millis(100));
    let shape = shape::text(name, dims)?;
    let ran = Command::new(python)
        .arg(&script)
        .args(["--kernel", name, "--shape", &shape, "--target", target.name()])
        .env("OPENBLAS_NUM_THREADS", "1")
        .output();
    spinner.finish_and_clear();
    let ran = ran.map_err(|e| Failure::refused(format!("{}: {e}; a new shape {NEEDS}", python.display())))?;
    let said = String::from_utf8_lossy(&ran.stderr);
    let last = said.trim_end().lines().next_back().unwrap_or("it said nothing");
    match ran.status.code() {
        Some(0) => Program::from_json(&ran.stdout, &LIMITS)
            .map_err(|e| Failure::refused(format!("what {} made is no program: {e}", script.display()))),
        Some(2) => Err(Failure::usage(last)),
        Some(3) => Err(Failure::refused(format!("{name} refuses this shape: {last}"))),
        _ if last.starts_with("ModuleNotFoundError") => Err(Failure::refused(format!("{last}; a new shape {NEEDS}"))),
        _ => Err(Failure::refused(format!("{} failed: {last}", script.display()))),
    }
}
