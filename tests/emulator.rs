//! Every checked-in device program, replayed on the emulator and compared with the simulator that exported it.

#[path = "support/programs.rs"]
mod programs;

use programs::{all, kernels, large, values};
use sha2::{Digest, Sha256};
use trn_kernels::quant::ScaleRule;
use trn_kernels::trainium::emulator::{Limits, Options, Program};

/// Both documented block scales of `quantize_mx`, with the suffix of their outputs.
const RULES: [(ScaleRule, &str); 2] = [(ScaleRule::Trainium, ""), (ScaleRule::Floor, "@ocp")];

#[test]
fn every_program_gives_the_simulators_outputs() {
    let mut compared = 0;
    for checked in all() {
        for (scale_rule, suffix) in RULES {
            let expected = |name: &str| format!("out.{name}{suffix}");
            if !checked.program.outputs().iter().all(|p| checked.has(&expected(&p.name))) {
                assert_eq!(scale_rule, ScaleRule::Floor, "{}: the default rule has no outputs", checked.name);
                continue; // a program without quantize_mx has one set
            }
            let got = checked.run(&Options { scale_rule });
            for (port, got) in checked.program.outputs().iter().zip(got) {
                let want = checked.bytes(&expected(&port.name));
                let place = format!("{} {}{suffix}", checked.name, port.name);
                compared += 1;
                let Some(bound) = checked.bound(&port.name) else {
                    assert!(got == want, "{place}: bytes differ");
                    continue;
                };
                let dtype = checked.dtype(port);
                let (got, want) = (values(dtype, &got), values(dtype, &want));
                assert_eq!([got.len(), bound.len()], [want.len(); 2], "{place}");
                for (i, ((g, w), bound)) in got.iter().zip(&want).zip(&bound).enumerate() {
                    assert!((g - w).abs() <= *bound, "{place}[{i}]: {g}, simulator {w}, bound {bound}");
                }
            }
        }
    }
    assert!(compared > 0);
}

#[test]
fn no_program_is_older_than_its_kernel() {
    for (name, program) in all().into_iter().map(|c| (c.name, c.program)).chain(large()) {
        assert!(!program.sources().is_empty(), "{name}: no sources");
        for (file, sha256) in program.sources() {
            let text = std::fs::read(kernels().join(file)).unwrap_or_else(|e| panic!("{name}: {file}: {e}"));
            let now: String = Sha256::digest(&text).iter().map(|b| format!("{b:02x}")).collect();
            assert_eq!(&now, sha256, "{name}: {file} has changed; run `python kernels/trace.py --all`");
        }
    }
}

/// The sets of programs that `generate` and `tests/device` need on a device: each loads, is current, and is what its manifest says.
#[test]
fn programs_of_the_sets_are_current() {
    for (set, folder) in [("tiny_gpt_oss", "tiny-gpt-oss-programs"), ("device_tests", "device-programs")] {
        set_is_current(set, folder);
    }
}

fn set_is_current(set: &str, folder: &str) {
    let again = format!("run `python kernels/build.py kernels/sets/{set}.toml --programs --out tests/data/{folder}`");
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(folder);
    let hex = |bytes: &[u8]| -> String { Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect() };
    let manifest = std::fs::read_to_string(folder.join("manifest.toml")).unwrap();
    let mut found = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if name == "manifest.toml" {
            continue;
        }
        let json = std::fs::read(&path).unwrap();
        let listed = format!("file = \"{name}\"\nsha256 = \"{}\"", hex(&json));
        assert!(manifest.contains(&listed), "{name} is not in the manifest; {again}");
        let program = Program::from_json(&json, &Limits::default()).unwrap_or_else(|e| panic!("{name}: {e}"));
        for (file, sha256) in program.sources() {
            assert_eq!(
                &hex(&std::fs::read(kernels().join(file)).unwrap()),
                sha256,
                "{name}: {file} has changed; {again}"
            );
        }
        found += 1;
    }
    assert_eq!(manifest.matches("[[neff]]").count(), found, "{again}");
    assert!(found > 0);
}

#[test]
fn a_run_leaves_no_trace_in_the_program() {
    for checked in all() {
        assert_eq!(checked.run(&Options::default()), checked.run(&Options::default()), "{}", checked.name);
    }
}
