//! `trnk bench` as a user runs it: the table, the CSV record, the roofline, and one clear line for bad input. No figure is
//! judged here: a test machine may be as slow as it likes.
#![forbid(unsafe_code)]

use std::path::Path;
use std::process::{Command, Output};

/// One small case, called once.
const TINY: [&str; 10] = ["--shapes", "96x64", "--m", "1", "--schemes", "mxfp4", "--repeat", "1", "--threads", "2"];

fn trnk(arguments: &[&str]) -> Output {
    bench("matmul", arguments)
}

fn bench(what: &str, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_trnk"))
        .env_remove("TRN_KERNELS_ISA")
        .args(["bench", what])
        .args(arguments)
        .output()
        .unwrap()
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

/// Standard error of a run that ends with `code`, before anything is measured.
fn refusal(code: i32, arguments: &[&str]) -> String {
    let output = trnk(arguments);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", said(&output.stderr));
    assert!(output.stdout.is_empty(), "{arguments:?}");
    let error = said(&output.stderr);
    assert!(error.starts_with("error: "), "{error}");
    error["error: ".len()..].trim_end().to_owned()
}

/// Records by column name.
fn records(csv: &str) -> Vec<std::collections::HashMap<String, String>> {
    // Commas between quotes do not separate.
    let fields = |line: &str| {
        let mut fields = vec![String::new()];
        let mut quoted = false;
        for c in line.chars() {
            match c {
                '"' => quoted = !quoted,
                ',' if !quoted => fields.push(String::new()),
                c => fields.last_mut().unwrap().push(c),
            }
        }
        fields
    };
    let mut lines = csv.lines();
    let names = fields(lines.next().unwrap());
    let record = |line| {
        let fields = fields(line);
        assert_eq!(fields.len(), names.len(), "{line}");
        names.iter().cloned().zip(fields).collect()
    };
    lines.map(record).collect()
}

#[test]
fn a_table_a_record_and_a_roofline() {
    let folder = tempfile::tempdir().unwrap();
    // The folder of the picture is made.
    let (csv, svg) = (folder.path().join("run.csv"), folder.path().join("new/roofline.svg"));
    let files = ["--out", csv.to_str().unwrap(), "--svg", svg.to_str().unwrap()];
    let text = printed(&[&TINY[..], &files, &["--acts", "bf16,f32", "--m", "3"]].concat());
    let rows: Vec<&str> = text.lines().filter(|line| line.starts_with("mxfp4 ")).collect();
    assert_eq!(rows.len(), 4, "{text}");
    for (row, (m, acts)) in rows.iter().zip([("1", "bf16"), ("1", "f32"), ("3", "bf16"), ("3", "f32")]) {
        let words: Vec<&str> = row.split_whitespace().collect();
        assert_eq!(words[..4], ["mxfp4", acts, m, "96x64"], "{row}");
        // time, unit, GB/s, of read, GFLOP/s, of peak, bound, calls
        let (seconds, rate): (f64, f64) = (words[4].parse().unwrap(), words[8].parse().unwrap());
        assert!(seconds > 0.0 && rate >= 0.0 && words[11] == "1", "{row}");
    }
    for line in [
        "read: ",
        "AVX2 FMA f32: ",
        "AVX-512 FMA f32: ",
        "AVX-512 bf16 pairs: ",
        "AMX bf16: ",
        "share of the nearer limit",
    ] {
        assert!(text.contains(&format!("\n{line}")), "{line}: {text}");
    }
    assert!(text.contains(", 2 threads, tier "), "{text}");

    let records = records(&std::fs::read_to_string(&csv).unwrap());
    assert_eq!(records.len(), 4);
    let number =
        |record: &std::collections::HashMap<String, String>, name: &str| -> f64 { record[name].parse().unwrap() };
    for (record, m) in records.iter().zip([1.0, 1.0, 3.0, 3.0]) {
        // By hand: 17 bytes for 32 weights, 2 m n k operations; rates are those of the median.
        assert_eq!(number(record, "weight_bytes"), 96.0 * 64.0 * 17.0 / 32.0);
        assert_eq!(number(record, "flop"), 2.0 * m * 96.0 * 64.0);
        assert_eq!((record["n"].as_str(), record["k"].as_str(), record["who"].as_str()), ("96", "64", "trn-kernels"));
        assert!(number(record, "limit_read_gb_per_s") > 0.0 && number(record, "times_ours") == 1.0, "{record:?}");
        let (seconds, rate) = (number(record, "seconds_median"), number(record, "gb_per_s"));
        let bytes = number(record, "weight_bytes");
        assert!((rate - bytes / seconds / 1e9).abs() <= 6e-4 + 1e-3 * rate, "{record:?}");
        let share = number(record, "of_read");
        assert!((share - bytes / seconds / 1e9 / number(record, "limit_read_gb_per_s")).abs() < 1e-3 + 0.01 * share);
    }

    let text = std::fs::read_to_string(&svg).unwrap();
    let picture = roxmltree::Document::parse(&text).unwrap();
    let named = |name: &str| picture.descendants().filter(|node| node.has_tag_name(name)).count();
    assert!(named("circle") == 4 && named("polyline") >= 1, "{text}");
    let texts: Vec<_> = picture.descendants().filter(|n| n.has_tag_name("text")).filter_map(|n| n.text()).collect();
    for label in ["GFLOP/s", "FLOP for each byte of weights", "mxfp4"] {
        assert!(texts.iter().any(|t| t.trim() == label), "{label}: {texts:?}");
    }
    // A longer file of that name is replaced whole.
    std::fs::write(&svg, "x".repeat(1 << 20)).unwrap();
    printed(&[&TINY[..], &["--svg", svg.to_str().unwrap()]].concat());
    roxmltree::Document::parse(&std::fs::read_to_string(&svg).unwrap()).unwrap();
}

#[test]
fn experts_and_every_scheme_are_measured() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().to_str().unwrap();
    let schemes = "mxfp4,nvfp4,mxfp8,fp8-tensor,fp8-channel,fp8-block,bf16";
    let tiny = ["--moe", "--shapes", "64x96", "--experts", "5", "--top-k", "2", "--m", "1,7", "--repeat", "1"];
    let text = printed(&[&tiny[..], &["--schemes", schemes, "--threads", "1", "--out", out]].concat());
    assert_eq!(text.lines().filter(|line| line.contains("2/5 of 64x96")).count(), 14, "{text}");
    // A folder gets one for the CPU and a file for the day.
    let cpu = std::fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
    let csv = std::fs::read_dir(&cpu).unwrap().next().unwrap().unwrap().path();
    assert!(csv.extension().is_some_and(|e| e == "csv") && csv.file_stem().unwrap().len() == "2026-01-31".len());
    let first = records(&std::fs::read_to_string(&csv).unwrap());
    assert_eq!(first.len(), 14);
    // Another run of the day is added.
    printed(&[&TINY[..], &["--out", out]].concat());
    let both = records(&std::fs::read_to_string(csv).unwrap());
    assert_eq!((both.len(), &both[..14], both[14]["n"].as_str()), (15, &first[..], "96"));
    // One token reads two experts; seven tokens read four of five, because a shuffled deck is dealt by twos.
    let mxfp4 = 64.0 * 96.0 * 17.0 / 32.0;
    let bytes = |record: usize| -> f64 { first[record]["weight_bytes"].parse().unwrap() };
    assert_eq!(bytes(0), 2.0 * mxfp4);
    assert!(bytes(1) >= 4.0 * mxfp4 && bytes(1) <= 5.0 * mxfp4);
}

#[test]
fn packing_is_measured_beside_a_copy() {
    let output = bench("pack", &["--shapes", "96x256,17x256", "--repeat", "2", "--threads", "2"]);
    let text = said(&output.stdout);
    assert!(output.status.success(), "{}", said(&output.stderr));
    let rows: Vec<Vec<&str>> = text.lines().skip(2).map(|line| line.split_whitespace().collect()).collect();
    let (schemes, shapes) = (["mxfp4", "nvfp4", "mxfp8", "fp8-tensor", "fp8-channel", "fp8-block", "bf16"], 2);
    assert_eq!(rows.len(), schemes.len() * shapes, "{text}");
    for (row, i) in rows.iter().zip(0..) {
        assert_eq!((row[0], row[1]), (schemes[i / shapes], ["96x256", "17x256"][i % shapes]), "{text}");
        // time, unit, GB/s, of read, copy, of copy, larger, calls
        let number = |column: usize| -> f64 { row[column].parse().unwrap() };
        assert!([2, 4, 6].map(number).iter().all(|v| *v >= 0.0) && row[9] == "2", "{text}");
        // Whole panels of 16 rows and whole groups of steps add hardly anything; 17 rows are stored as 32.
        let larger = number(8);
        assert!(if row[1] == "96x256" { larger < 1.02 } else { larger > 1.5 && larger < 2.0 }, "{text}");
    }
    for (arguments, message) in [
        (["--shapes", "64x48"], "--shapes: 64x48: k of mxfp4 must be a multiple of 32"),
        (["--schemes", "q4_0"], "got \"q4_0\", need one of mxfp4"),
    ] {
        let output = bench("pack", &arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(output.stdout.is_empty() && said(&output.stderr).contains(message), "{}", said(&output.stderr));
    }
    let output = bench("pack", &["--shapes", "1048576x1048576", "--schemes", "bf16"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output.stderr).contains("bf16 1048576x1048576: needs "), "{}", said(&output.stderr));
}

#[test]
fn bad_input_is_one_clear_line() {
    let with = |change: [&str; 2]| refusal(2, &[&TINY[2..], &change].concat());
    for (change, message) in [
        (["--shapes", "4096"], "got \"4096\", need NxK such as 4096x4096, each from 1 to 1048576"),
        (["--shapes", "0x64"], "got \"0x64\", need NxK"),
        (["--shapes", "64x-1"], "got \"64x-1\", need NxK"),
        (["--shapes", "64x48"], "--shapes: 64x48: k of mxfp4 must be a multiple of 32"),
        (["--acts", "f16"], "invalid value 'f16'"),
        (["--top-k", "33"], "--top-k: got 33, need at most --experts, 32"),
        (["--experts", "0"], "got \"0\", need a number from 1 to 1048576"),
    ] {
        let error = with(change);
        assert!(error.contains(message), "{change:?}: {error}");
    }
    for (change, message) in [
        (["--m", "0"], "got \"0\", need a number from 1 to 1048576"),
        (["--m", "1,,2"], "got \"\", need a number"),
        (
            ["--schemes", "int4"],
            "got \"int4\", need one of mxfp4, nvfp4, mxfp8, fp8-tensor, fp8-channel, fp8-block, bf16",
        ),
        (["--threads", "0"], "0 is not in 1..=1024"),
        (["--repeat", "0"], "0 is not in 1..=100000"),
        (["--seconds", "NaN"], "got \"NaN\", need seconds from 0 to 3600"),
    ] {
        let error = refusal(2, &change);
        assert!(error.contains(message), "{change:?}: {error}");
    }
}

#[test]
fn what_cannot_be_done_is_said_before_anything_is_measured() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let below = Path::new(file.path()).join("run.csv");
    let error = refusal(1, &[&TINY[..], &["--out", below.to_str().unwrap()]].concat());
    assert!(error.starts_with(below.to_str().unwrap()), "{error}");
    let refused = Command::new(env!("CARGO_BIN_EXE_trnk"))
        .args(["bench", "matmul"])
        .env("TRN_KERNELS_ISA", "sse9")
        .output()
        .unwrap();
    assert!(refused.stdout.is_empty() && said(&refused.stderr).contains("TRN_KERNELS_ISA[0]: got sse9"), "{refused:?}");
    let error = refusal(1, &["--shapes", "1048576x1048576", "--schemes", "bf16"]);
    assert!(error.starts_with("bf16 1048576x1048576: needs ") && error.ends_with(" are available"), "{error}");
}

#[test]
fn help_teaches() {
    let text = printed(&["--help"]);
    for word in ["Examples:", "--shapes", "of read", "of peak", "oracle", "TRN_KERNELS_ISA", "Exit codes"] {
        assert!(text.contains(word), "{word}: {text}");
    }
}
