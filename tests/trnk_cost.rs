//! `trnk cost` as a user runs it: what it prints and draws, and one clear line for bad input.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const MX: [&str; 2] = ["matmul_mx", "m=2048,n=2048,k=2048"];

fn trnk(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trnk"));
    // No Python: what is not checked in is refused, on every machine alike.
    command.current_dir(env!("CARGO_MANIFEST_DIR")).env("TRNK_PYTHON", "no-such-python").arg("cost").args(arguments);
    command.output().unwrap()
}

fn said(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Standard output of a run that succeeds.
fn printed(arguments: &[&str]) -> String {
    let output = trnk(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", said(&output.stderr));
    said(&output.stdout)
}

/// Standard error of a run that ends with `code`.
fn refusal(code: i32, arguments: &[&str]) -> String {
    let output = trnk(arguments);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", said(&output.stderr));
    assert!(output.stdout.is_empty(), "{arguments:?}");
    let error = said(&output.stderr);
    assert!(error.starts_with("error: "), "{error}");
    error["error: ".len()..].trim_end().to_owned()
}

/// The number before `unit` in the line that begins with `line`.
fn number(text: &str, line: &str, unit: &str) -> f64 {
    let found = text.lines().find(|l| l.trim_start().starts_with(line)).unwrap_or_else(|| panic!("no {line}: {text}"));
    let before = found.split(unit).next().unwrap().trim_end();
    before.rsplit(' ').next().unwrap().parse().unwrap_or_else(|_| panic!("{found}"))
}

#[test]
fn engines_shares_and_roofline_are_printed() {
    let text = printed(&MX);
    assert!(text.starts_with("matmul_mx m=2048,n=2048,k=2048 on one core of trn3"), "{text}");
    assert!(text.contains("A model from documented constants, not a measurement."), "{text}");
    let total = number(&text, "modelled time", "us");
    for engine in ["tensor", "vector", "scalar", "dma"] {
        let (busy, share) = (number(&text, engine, "us busy"), number(&text, engine, "%"));
        assert!((share - 100.0 * busy / total).abs() < 0.1, "{engine}: {text}");
    }
    assert!(!text.contains("sync"), "{text}");
    // By hand: 2 x 2048^3 FLOP at 314.6 TFLOP/s; 2048^2 bf16 in and out, 17 bytes for 32 weights.
    let roofline = text.split("roofline of the problem").nth(1).unwrap();
    assert!(
        roofline.contains("17.180 GFLOP at 314.6 TFLOP/s (Mx) 54.61 us, 19.005 MB at 528.0 GB/s 36.00 us"),
        "{text}"
    );
    assert!(roofline.contains("bound by compute"), "{text}");
    assert!((number(&text, "the program runs at", "%") - 100.0 * 54.61 / total).abs() < 0.06, "{text}");
}

#[test]
fn order_case_and_written_out_defaults_do_not_matter() {
    let (plain, same) = (printed(&MX), printed(&["matmul_mx", "K=2048, n=2048, out=bf16, M=2048", "--chip", "trn3"]));
    assert_eq!(plain, same);
}

#[test]
fn a_memory_bound_shape_says_so() {
    let text = printed(&["matmul_fp8", "m=4,n=4096,k=4096", "--chip", "trn2"]);
    assert!(text.contains("bound by memory"), "{text}");
    let decode = printed(&["attention_decode", "b=4,hq=64,hkv=8,d=64,m=256", "--chip", "trn2"]);
    assert!(decode.contains("bound by memory") && decode.contains("page of the block table"), "{decode}");
}

#[test]
fn any_program_file_on_any_chip() {
    let programs = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/programs");
    let mut seen = 0;
    for entry in std::fs::read_dir(programs).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "json") {
            for chip in ["trn1", "trn2", "trn3"] {
                let text = printed(&["--program", path.to_str().unwrap(), "--chip", chip]);
                assert!(text.contains(&format!("on one core of {chip}")) && text.contains("roofline"), "{text}");
            }
            seen += 1;
        }
    }
    assert!(seen > 0);
}

#[test]
fn the_critical_path_is_printed_on_request() {
    let text = printed(&["matmul_mx", "m=4,n=4096,k=4096", "--path"]);
    let path: Vec<&str> = text.split("critical path, from first to last\n").nth(1).unwrap().lines().collect();
    assert!(path.first().unwrap().contains("dma_copy") && path.last().unwrap().contains("dma_copy"), "{text}");
    let starts: Vec<f64> = path.iter().map(|l| l.split_whitespace().next().unwrap().parse().unwrap()).collect();
    assert!(starts.is_sorted(), "{starts:?}");
    assert_eq!(number(&text, "critical path:", "instructions") as usize, path.len());
}

/// The folder of a chip file, and its path.
fn chip_file(name: &str, text: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, text).unwrap();
    (folder, path)
}

#[test]
fn a_chip_can_be_filled_in() {
    let toml = "name = \"my Trainium4\"\nbased_on = \"trn3\"\ntensor.clock = 4.8e9\nhbm_bandwidth = 20e12\n[dma]\nengines = 32";
    let json = r#"{"name": "my Trainium4", "based_on": "trn3", "tensor": {"clock": 4.8e9}, "hbm_bandwidth": 20e12, "dma": {"engines": 32.0}}"#;
    let (_keep, toml) = chip_file("chip.toml", toml);
    let (_too, json) = chip_file("chip.json", json);
    let with = |path: &Path| printed(&[MX[0], MX[1], "--chip-file", path.to_str().unwrap()]);
    let (text, trn3) = (with(&toml), printed(&MX));
    assert_eq!(text, with(&json));
    assert!(text.contains("one core of my Trainium4"), "{text}");
    assert!(text.contains("629.1 TFLOP/s") && text.contains("1056.0 GB/s"), "{text}");
    assert!(number(&text, "modelled time", "us") < 0.75 * number(&trn3, "modelled time", "us"));
}

#[test]
fn a_chip_file_that_says_nothing_known_is_refused() {
    for (name, text, expected) in [
        ("a.toml", "based_on = \"trn3\"\ntensor.clok = 2e9", "tensor.clok: no such constant; there are "),
        ("b.toml", "hbm_bandwidth = 2e12", "needs based_on"),
        ("c.toml", "based_on = \"trn4\"", "based_on: got \"trn4\", need trn1, trn2 or trn3"),
        ("d.toml", "based_on = \"trn3\"\nhbm_bandwidth = -1.0", "hbm_bandwidth: got -1.0, need a positive number"),
        ("e.toml", "based_on = \"trn3\"\ntensor = 3", "tensor: got 3, need something like"),
        ("f.toml", "based_on = \"trn3\"\ncores = 1.5", "floating point `1.5`"),
        ("g.toml", "based_on = ", "TOML parse error"),
        ("h.json", "[1]", "invalid type"),
    ] {
        let (_keep, path) = chip_file(name, text);
        let error = refusal(1, &[MX[0], MX[1], "--chip-file", path.to_str().unwrap()]);
        assert!(error.starts_with(path.to_str().unwrap()) && error.contains(expected), "{name}: {error}");
    }
    assert!(refusal(1, &[MX[0], MX[1], "--chip-file", "nowhere.toml"]).starts_with("nowhere.toml: "));
}

#[test]
fn the_timeline_has_the_lanes_and_is_well_formed() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("timeline.svg");
    let (_keep, chip) = chip_file("chip.toml", "name = \"<&> 4\"\nbased_on = \"trn3\"");
    for (arguments, lanes) in [
        (
            vec!["matmul_mx", "m=4,n=4096,k=4096", "--chip-file", chip.to_str().unwrap()],
            vec!["tensor", "vector", "scalar", "dma"],
        ),
        (
            vec!["attention_decode", "b=4,hq=64,hkv=8,d=64,m=256", "--chip", "trn2"],
            vec!["tensor", "vector", "scalar", "gpsimd", "dma"],
        ),
    ] {
        let text = printed(&[&arguments[..], &["--svg", file.to_str().unwrap()]].concat());
        let svg = std::fs::read_to_string(&file).unwrap();
        assert!(svg.len() < 1_000_000, "{} bytes", svg.len());
        let xml = roxmltree::Document::parse(&svg).unwrap();
        let labels: Vec<&str> =
            xml.descendants().filter_map(|n| n.has_tag_name("text").then(|| n.text()).flatten()).collect();
        let labels: Vec<&str> = labels.into_iter().map(str::trim).collect();
        for lane in lanes {
            let share = format!("{lane} {:.1} %", number(&text, lane, "%"));
            assert!(labels.contains(&share.as_str()), "{share}: {labels:?}");
        }
        assert!(labels.contains(&"critical path") && labels.contains(&"us"), "{labels:?}");
        assert!(
            labels.iter().any(|l| l.contains("a model from documented constants, not a measurement")),
            "{labels:?}"
        );
        let title = format!("{} {} on one core of", arguments[0], arguments[1]);
        assert!(labels.iter().any(|l| l.starts_with(&title)), "{labels:?}");
        let rectangles = xml.descendants().filter(|n| n.has_tag_name("rect")).count();
        assert!(rectangles > 50, "{rectangles}");
    }
    let error = refusal(1, &[MX[0], MX[1], "--svg", folder.path().join("no/where.svg").to_str().unwrap()]);
    assert!(error.contains("where.svg: "), "{error}");
}

/// More instructions than are drawn singly, on three engines and of two classes.
#[test]
fn a_long_program_has_a_small_picture() {
    let operand = |tensor: usize| format!(r#"[{tensor},"float32",0,[[512,128],[1,512]]]"#);
    let instruction = |i: usize| {
        let (name, engine, tensor) = [
            ("memset", "gpsimd", 3),
            ("tensor_copy", "scalar", 1),
            ("memset", "gpsimd", 3),
            ("tensor_copy", "vector", 2),
            ("reciprocal", "vector", 2),
        ][i % 5];
        let (dst, src) = (operand(tensor), operand(0));
        let (reads, attrs) = match name {
            "memset" => (String::new(), r#""value":1.0"#),
            "reciprocal" => (format!(r#""data":{src}"#), ""),
            _ => (format!(r#""src":{src}"#), ""),
        };
        format!(
            r#"{{"name":"{name}","engine":"{engine}","writes":{{"dst":{dst}}},"reads":{{{reads}}},"attrs":{{{attrs}}}}}"#
        )
    };
    let tensor = r#"{"name":"","shape":[128,512],"dtype":"float32","buffer":"sbuf"}"#;
    let program = format!(
        r#"{{"format":"trn-kernels.program.1","kernel":"long","example":"e","target":"trn2","sources":{{}},"parameters":{{}},"inputs":[],"outputs":[],"tensors":[{}],"instructions":[{}]}}"#,
        [tensor; 4].join(","),
        (0..30_000).map(instruction).collect::<Vec<_>>().join(",")
    );
    let folder = tempfile::tempdir().unwrap();
    let (json, svg) = (folder.path().join("long.json"), folder.path().join("long.svg"));
    std::fs::write(&json, program).unwrap();
    let text = printed(&["--program", json.to_str().unwrap(), "--svg", svg.to_str().unwrap()]);
    assert!(text.contains("a program of 30000 instructions"), "{text}");
    let svg = std::fs::read_to_string(svg).unwrap();
    assert!(svg.len() < 1_000_000, "{} bytes", svg.len());
    let rectangles = roxmltree::Document::parse(&svg).unwrap().descendants().filter(|n| n.has_tag_name("rect")).count();
    // The page, two classes in the legend, four lanes; at most what is drawn singly.
    assert!((1 + 2 + 4..=8_000 + 9).contains(&rectangles), "{rectangles}");
}

#[test]
fn a_malformed_command_line_is_said_to_be_one() {
    for (arguments, expected) in [
        (vec!["matmul", "m=1"], "no kernel called \"matmul\"; there are matmul_fp8, matmul_mx, "),
        (vec!["matmul_mx"], "the following required arguments were not provided"),
        (vec!["matmul_mx", "m=4,n=96"], "shape: k (contraction) is missing: m=...,n=...,k=..."),
        (vec!["matmul_mx", "4x96x64"], "shape: got \"4x96x64\", need NAME=VALUE"),
        (vec!["matmul_mx", "m=4,n=96,k=sixty"], "k: got \"sixty\", need a number from 0 to 4294967295"),
        (vec!["matmul_mx", "m=4,n=96,k=99999999999"], "k: got \"99999999999\", need a number"),
        (vec!["matmul_mx", "m=4,n=96,k=-64"], "k: got \"-64\", need a number"),
        (vec!["matmul_mx", "m=0,n=96,k=64"], "m: got 0, need at least 1"),
        (vec!["matmul_mx", "m=4,m=5,n=96,k=64"], "m is given twice"),
        (vec!["matmul_mx", "m=4,n=96,k=64,hq=2"], "matmul_mx has no dimension \"hq\"; it has m, n, k, "),
        (vec!["matmul_mx", "m=4,n=96,k=64,out=f16"], "out: got \"f16\", need bf16 or f32"),
        (vec!["matmul_mx", "m=4,n=96,k=64", "--chip", "trn4"], "invalid value 'trn4' for '--chip <CHIP>'"),
    ] {
        assert!(refusal(2, &arguments).starts_with(expected), "{arguments:?}: {}", refusal(2, &arguments));
    }
}

#[test]
fn a_target_that_a_kernel_does_not_serve_is_refused() {
    let error = refusal(1, &[MX[0], MX[1], "--chip", "trn2"]);
    assert_eq!(error, "matmul_mx refuses: target: got trn2, need trn3");
    assert_eq!(
        refusal(1, &["matmul_fp8", "m=1,n=1,k=1", "--chip", "trn1"]),
        "matmul_fp8 refuses: target: got trn1, need trn2 or trn3"
    );
}

#[test]
fn without_python_it_says_what_to_install() {
    let error = refusal(1, &["matmul_mx", "m=3,n=5,k=64"]);
    assert!(
        error.starts_with("no-such-python: ") && error.contains("pip install -r kernels/requirements.txt"),
        "{error}"
    );
    let elsewhere = refusal(1, &["matmul_mx", "m=3,n=5,k=64", "--kernels", "nowhere"]);
    assert!(elsewhere.contains("--kernels DIR") && elsewhere.contains("--program FILE"), "{elsewhere}");
    let missing = refusal(1, &["--program", "nowhere.json"]);
    assert!(missing.starts_with("nowhere.json: "), "{missing}");
}

/// A Python that answers as kernels/trace.py would: what it says reaches the user.
#[cfg(unix)]
#[test]
fn what_the_tracer_says_is_passed_on() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let with = |name: &str, body: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    };
    let ask = |python: &Path| refusal(1, &["matmul_mx", "m=3,n=5,k=48", "--python", python.to_str().unwrap()]);
    let refuses = with("refuses", "echo 'K: got 48, need a multiple of 32 (one scale group)' >&2; exit 3");
    assert_eq!(ask(&refuses), "matmul_mx refuses this shape: K: got 48, need a multiple of 32 (one scale group)");
    let bare = with("bare", "echo \"ModuleNotFoundError: No module named 'numpy'\" >&2; exit 1");
    let error = ask(&bare);
    assert!(
        error.contains("No module named 'numpy'") && error.contains("pip install -r kernels/requirements.txt"),
        "{error}"
    );
    let garbage = with("garbage", "echo '{}'");
    assert!(ask(&garbage).contains("made is no program"), "{}", ask(&garbage));
    // And what it is asked, for the chip's target.
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/programs/matmul_mx.mxfp4.json");
    let asked = folder.path().join("asked");
    let answers = with("answers", &format!("shift; echo \"$@\" > '{}'; cat '{}'", asked.display(), file.display()));
    let text = printed(&["matmul_mx", "n=70,k=320,out=f32,x=bf16,m=5", "--python", answers.to_str().unwrap()]);
    assert!(text.starts_with("matmul_mx mxfp4 on one core of trn3"), "{text}");
    assert_eq!(
        std::fs::read_to_string(asked).unwrap().trim_end(),
        "--kernel matmul_mx --shape m=5,n=70,k=320,out=f32 --target trn3"
    );
}

#[test]
fn help_teaches_with_examples_that_work() {
    let help = printed(&["--help"]);
    let examples: Vec<&str> = help.lines().filter_map(|l| l.trim_start().strip_prefix("trnk cost ")).collect();
    assert!(examples.len() >= 4, "{help}");
    let mut ran = 0;
    for line in examples {
        // Those that need Python or a file of the user's are left to others.
        let arguments: Vec<&str> = line.split_whitespace().collect();
        if !line.contains("--chip-file") && !line.contains("--svg") {
            printed(&arguments);
            ran += 1;
        }
    }
    assert!(ran >= 3, "{help}");
    for kernel in ["matmul_fp8", "matmul_mx", "grouped_matmul_mx", "attention_decode", "attention_prefill", "kv_append"]
    {
        assert!(help.contains(&format!("  {kernel} (trn")), "{kernel}: {help}");
    }
    assert!(help.contains("m (rows of x, tokens), n (columns of y), k (contraction)"), "{help}");
}
