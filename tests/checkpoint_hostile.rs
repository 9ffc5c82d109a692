//! Files that lie: every one is refused with an error that names what is wrong, and none panics.
#![forbid(unsafe_code)]

#[path = "support/files.rs"]
mod files;

use files::{GgufFile, exercise_checkpoint, exercise_gguf, gguf_array, gguf_string, raw_safetensors, safetensors};
use proptest::prelude::*;
use std::fs;
use trn_kernels::checkpoint::{Checkpoint, Gguf};
use trn_kernels::quant::{QuantizedExperts, QuantizedMatrix};
use trn_kernels::{Error, Result};

/// The message, which must hold all of `parts`.
#[track_caller]
fn refused<T>(result: Result<T>, parts: &[&str]) -> Error {
    let Err(error) = result else { panic!("accepted, should be refused with {parts:?}") };
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "`{message}` lacks `{part}`");
    }
    error
}

fn open(bytes: impl Into<Vec<u8>>) -> Result<Checkpoint> {
    Checkpoint::from_bytes("file.st", bytes.into())
}

fn small() -> Vec<u8> {
    safetensors(&[
        ("p.weight", "F8_E4M3", &[2, 32], &[0x38; 64]),
        ("p.weight_scale", "U8", &[2, 1], &[127; 2]),
        ("p.bias", "F32", &[2], &[0; 8]),
    ])
}

#[test]
fn safetensors_cut_at_any_byte_is_refused_by_name() {
    let file = small();
    exercise_checkpoint(&open(file.clone()).unwrap());
    for len in 0..file.len() {
        refused(open(&file[..len]), &["file.st"]);
    }
    refused(open([file, vec![0]].concat()), &["file.st", "the tensors end at 74, the file's data has 75 bytes"]);
}

#[test]
fn safetensors_header_length_is_not_believed() {
    for len in [u64::MAX, u64::MAX - 7, 1 << 63, 100_000_001] {
        let file = [&len.to_le_bytes(), &small()[8..]].concat();
        refused(open(file), &["file.st", &len.to_string(), "allowed are 100000000"]);
    }
    let file = [&100_000_000u64.to_le_bytes(), &small()[8..]].concat();
    refused(open(file), &["file.st", "100000000 bytes, the file has"]);
}

#[test]
fn safetensors_entries_that_contradict_are_refused_by_tensor_name() {
    let entry = |name: &str, dtype: &str, shape: &str, offsets: &str| {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}"#)
    };
    let max = usize::MAX;
    let cases = [
        (
            vec![entry("a", "U8", "[4]", "[0,4]"), entry("b", "U8", "[4]", "[2,6]")],
            "`b`",
            "lies at 2..6, needed a range that starts at 4",
        ),
        (vec![entry("a", "U8", "[2]", "[0,2]"), entry("b", "U8", "[4]", "[4,8]")], "`b`", "starts at 2"),
        (vec![entry("a", "U8", "[4]", "[4,0]")], "`a`", "lies at 4..0"),
        (vec![entry("a", "U8", "[9]", "[0,9]")], "`a`", "ends at 9, the file's data has 8 bytes"),
        (vec![entry("a", "F32", "[3]", "[0,8]")], "`a`", "[3] of F32 takes 96 bits, its range has 8 bytes"),
        (vec![entry("a", "F4", "[1]", "[0,0]")], "`a`", "takes 4 bits"),
        (vec![entry("a", "F32", &format!("[{max},2]"), "[0,8]")], "`a`", "overflows"),
        (vec![entry("a", "F64", &format!("[{}]", max / 2), "[0,8]")], "`a`", "overflows"),
        // Ends that wrap around: lengths summed unchecked would accept them.
        (vec![entry("a", "U8", &format!("[{max}]"), &format!("[0,{max}]"))], "`a`", "ends at"),
        (vec![entry("a", "U8", "[8]", "[0,8]"), entry("a", "U8", "[0]", "[8,8]")], "`a`", "there twice"),
        (vec![entry("a", "F7", "[8]", "[0,8]")], "`a`", "F7"),
        (vec![entry("a", "U8", "[-8]", "[0,8]")], "`a`", "-8"),
        (vec![entry("a", "U8", "[8.5]", "[0,8]")], "`a`", "8.5"),
        (vec![entry("a", "U8", "[8]", "[0]")], "`a`", "invalid length 1"),
        (vec![entry("a", "U8", "[8]", &format!("[0,{max}0]"))], "`a`", "invalid"),
        (vec![r#""a":{"dtype":"U8","shape":[8]}"#.into()], "`a`", "data_offsets"),
        (vec![r#""a":7"#.into()], "`a`", "invalid type"),
    ];
    for (entries, name, problem) in cases {
        refused(open(raw_safetensors(format!("{{{}}}", entries.join(",")), &[0; 8])), &["file.st", name, problem]);
    }
    for header in ["", "[]", "{", "null", "{\"a\":", &"[".repeat(100_000), &"{\"a\":".repeat(100_000)] {
        refused(open(raw_safetensors(header, &[])), &["file.st", "the header is not what safetensors says"]);
    }
    refused(open(raw_safetensors(b"{\"\xFF\":1}", &[])), &["file.st", "the header is not"]);
}

#[test]
fn a_tensor_that_is_not_there_is_named() {
    let checkpoint = open(small()).unwrap();
    let error = refused(checkpoint.tensor("q.weight"), &["q.weight: missing", "file.st"]);
    assert!(matches!(error, Error::Missing { .. }));
    refused(checkpoint.linear("q"), &["q.weight (or weight_packed): missing"]);
}

#[test]
fn a_tensor_of_another_dtype_or_shape_is_named() {
    let checkpoint = open(small()).unwrap();
    let weight = checkpoint.tensor("p.weight").unwrap();
    refused(weight.f32(), &["p.weight", "is F8_E4M3, needed F32 or BF16 or F16"]);
    refused(weight.bf16_matrix(), &["p.weight", "is F8_E4M3, needed BF16"]);
    refused(weight.expect_shape(&[("n", 2), ("k", 33)]), &["p.weight: axis k is 32, needed 33"]);
    refused(weight.expect_shape(&[("n", 2)]), &["p.weight: has shape [2, 32], needed [2]"]);
    let bias = checkpoint.tensor("p.bias").unwrap();
    refused(bias.scalar(), &["p.bias: has shape [2], needed one element"]);
    refused(bias.matrix_shape(), &["p.bias: has shape [2], needed 2 axes"]);
}

/// Layers that must be refused: tensors, and what the message says.
#[test]
fn linear_layers_that_could_be_misread_are_refused() {
    const F8: &str = "F8_E4M3";
    let f32 = |x: f32| x.to_le_bytes().to_vec();
    type Tensors<'a> = Vec<(&'a str, &'a str, &'a [usize], Vec<u8>)>;
    let nvfp4 = |scale: u8, global: f32| -> Tensors<'static> {
        vec![
            ("p.weight_packed", "U8", &[1, 16], vec![0; 16]),
            ("p.weight_scale", F8, &[1, 2], vec![0x38, scale]),
            ("p.weight_global_scale", "F32", &[1], f32(global)),
        ]
    };
    let fp8 = |rest: Tensors<'static>| -> Tensors<'static> {
        let weight: (&str, &str, &[usize], Vec<u8>) = ("p.weight", F8, &[2, 32], vec![0x38; 64]);
        std::iter::once(weight).chain(rest).collect()
    };
    let mut without_global = nvfp4(0x38, 1.0);
    without_global.pop();
    let mut both = nvfp4(0x38, 1.0);
    both.push(("p.weight", "BF16", &[1, 1], vec![0; 2]));
    let mut foreign_global = nvfp4(0x38, 1.0);
    foreign_global.push(("p.weight_scale_2", "F32", &[], f32(1.0)));
    let scale = |shape, x| fp8(vec![("p.weight_scale", "F32", shape, f32(x))]);
    let cases: Vec<(Tensors<'_>, &[&str])> = vec![
        (nvfp4(0xB8, 1.0), &["p.weight_scale[1]", "0xb8", "without the sign bit"]),
        (nvfp4(0x38, 0.0), &["p.weight_global_scale[0]: got 0", "above 0"]),
        (nvfp4(0x38, f32::NAN), &["p.weight_global_scale[0]: got NaN"]),
        (nvfp4(0x38, 1e-45), &["p.weight_global_scale[0]", "finite reciprocal"]),
        (nvfp4(0x38, -1.0), &["p.weight_global_scale[0]: got -1"]),
        (without_global, &["p.weight_global_scale: missing", "nvfp4-pack-quantized"]),
        (both, &["p.weight_packed: given but not wanted", "not clear"]),
        (foreign_global, &["p.weight_scale_2: given but not wanted", "nvfp4-pack-quantized"]),
        (vec![("p.weight_packed", "U8", &[1, 16], vec![0; 16])], &["p.weight_scale: missing"]),
        (
            vec![("p.weight_packed", "U8", &[1, 8], vec![0; 8]), ("p.weight_scale", "U8", &[1, 0], vec![])],
            &["p.weight_scale: axis k is 16, needed a multiple of 32"],
        ),
        (
            vec![("p.weight_packed", "I8", &[1, 16], vec![0; 16]), ("p.weight_scale", "U8", &[1, 1], vec![127])],
            &["p.weight_packed", "is I8, needed U8"],
        ),
        (
            vec![("p.weight", "U8", &[1, 16], vec![0; 16]), ("p.weight_scale", F8, &[1, 2], vec![0x38; 2])],
            &["p.weight_scale_2: missing", "ModelOpt NVFP4"],
        ),
        (
            vec![
                ("p.weight", "U8", &[1, 16], vec![0; 16]),
                ("p.weight_scale", F8, &[1, 2], vec![0x38; 2]),
                ("p.weight_scale_2", "F32", &[], f32(f32::INFINITY)),
            ],
            &["p.weight_scale_2[0]: got inf"],
        ),
        (fp8(vec![]), &["p.weight_scale: missing"]),
        (scale(&[1], f32::NAN), &["p.weight_scale[0]: got NaN", "finite"]),
        (fp8(vec![("p.weight_scale", "F32", &[3, 1], vec![0; 12])]), &["p.weight_scale: axis n tiles is 3, needed 1"]),
        (fp8(vec![("p.weight_scale", "F32", &[2], vec![0; 8])]), &["p.weight_scale: has shape [2]"]),
        (
            fp8(vec![("p.weight_scale", "F32", &[2, 1], [f32(1.0), f32(f32::NEG_INFINITY)].concat())]),
            &["p.weight_scale[1]: got -inf"],
        ),
        (fp8(vec![("p.weight_scale", "I32", &[1], vec![0; 4])]), &["p.weight_scale", "is I32, needed F32"]),
        (fp8(vec![("p.weight_scale", "U8", &[2, 2], vec![127; 4])]), &["p.weight_scale: axis k blocks is 2, needed 1"]),
        (
            fp8(vec![("p.weight_scale_inv", "F32", &[1, 2], vec![0; 8])]),
            &["p.weight_scale_inv: axis k tiles is 2, needed 1"],
        ),
        (
            fp8(vec![("p.weight_scale", "F32", &[1], f32(1.0)), ("p.weight_scale_inv", "F32", &[1, 1], f32(1.0))]),
            &["p.weight_scale: given but not wanted"],
        ),
        (
            fp8(vec![("p.weight_scale", "F32", &[1], f32(1.0)), ("p.weight_zero_point", "I8", &[1], vec![0])]),
            &["p.weight_zero_point: given but not wanted"],
        ),
        (
            fp8(vec![("p.weight_scale", "F32", &[1], f32(1.0)), ("p.bias", "F32", &[3], vec![0; 12])]),
            &["p.bias: axis n is 3, needed 2"],
        ),
        (
            fp8(vec![("p.weight_scale", "F32", &[1], f32(1.0)), ("p.input_scale", "F32", &[], f32(0.0))]),
            &["p.input_scale[0]: got 0"],
        ),
        (
            vec![("p.weight", "BF16", &[1, 1], vec![0; 2]), ("p.weight_scale", "F32", &[1], f32(1.0))],
            &["p.weight_scale: given but not wanted", "dense BF16"],
        ),
        (vec![("p.weight", "F64", &[1, 1], vec![0; 8])], &["p.weight: a weight of F64 is not supported"]),
        (
            vec![("p.weight", F8, &[64], vec![0; 64]), ("p.weight_scale", "F32", &[1], f32(1.0))],
            &["p.weight: has shape [64]"],
        ),
    ];
    for (tensors, parts) in cases {
        let tensors: Vec<_> = tensors.iter().map(|(n, d, s, b)| (*n, *d, *s, b.as_slice())).collect();
        refused(open(safetensors(&tensors)).unwrap().linear("p"), parts);
    }
}

#[test]
fn kv_scales_that_could_be_misread_are_refused() {
    let one = 1.0f32.to_le_bytes();
    let file = |tensors: &[(&str, &str, &[usize], &[u8])]| open(safetensors(tensors)).unwrap();
    let half = file(&[("a.v_scale", "F32", &[], &one)]);
    refused(half.kv_scales("a"), &["a.k_scale: missing", "a, which has a v_scale"]);
    let twice = file(&[("a.k_scale", "F32", &[], &one), ("a.k_proj.k_scale", "F32", &[], &one)]);
    refused(twice.kv_scales("a"), &["a.k_proj.k_scale: given but not wanted"]);
    let zero = file(&[("a.k_scale", "F32", &[2], &[&one[..], &[0; 4]].concat()), ("a.v_scale", "F32", &[], &one)]);
    refused(zero.kv_scales("a"), &["a.k_scale[1]: got 0, needed a finite scale above 0"]);
    let empty = file(&[("a.k_scale", "F32", &[0], &[]), ("a.v_scale", "F32", &[], &one)]);
    refused(empty.kv_scales("a"), &["a.k_scale: is empty"]);
}

#[test]
fn configs_that_contradict_the_tensors_are_refused() {
    let with = |config: &str| open(small()).unwrap().with_config("config.json", config);
    let linear = |config: &str| with(config).and_then(|c| c.linear("p").map(drop));
    assert!(linear(r#"{"quantization_config":{"format":"mxfp8-quantized"}}"#).is_ok());
    let other = r#"{"quantization_config":{"format":"float-quantized"}}"#;
    refused(linear(other), &["config.json", "float-quantized", "p is stored as mxfp8-quantized"]);
    for size in ["[0,128]", "[128]", "128", "[-1,128]", "\"128x128\""] {
        let config = format!(r#"{{"quantization_config":{{"weight_block_size":{size}}}}}"#);
        refused(with(&config), &["config.json: quantization_config.weight_block_size", "needed two sizes above 0"]);
    }
    let group = r#"{"quantization":{"quant_algo":"NVFP4","group_size":32}}"#;
    refused(with(group), &["config.json: quantization.group_size", "is 32, NVFP4 needs 16"]);
    refused(with("{"), &["config.json", "is not JSON"]);
}

#[test]
fn folders_that_lie_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    let index = |text: &str| fs::write(path.join("model.safetensors.index.json"), text).unwrap();
    refused(Checkpoint::read(path.join("absent")), &["absent"]);
    refused(Checkpoint::read(path), &["holds no *.safetensors file"]);

    fs::write(path.join("a.safetensors"), small()).unwrap();
    for name in ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "..", ".", "", "a\\\\b", "c:d", "a\\u0000b"] {
        index(&format!(r#"{{"weight_map":{{"p.weight":"{name}"}}}}"#));
        refused(Checkpoint::read(path), &["index.json", "tensor `p.weight`", "needed a file name without folders"]);
    }
    index(r#"{"weight_map":{"p.weight":7}}"#);
    refused(Checkpoint::read(path), &["tensor `p.weight`", "is said to be in 7"]);
    index(r#"{"weight_map":{"p.weight":"b.safetensors"}}"#);
    assert!(matches!(refused(Checkpoint::read(path), &["b.safetensors"]), Error::Io { .. }));
    index(r#"{"weight_map":{"q.weight":"a.safetensors"}}"#);
    refused(Checkpoint::read(path), &["index.json: tensor `q.weight`", "a.safetensors", "which lacks it"]);
    index(r#"{"weight_map":[]}"#);
    refused(Checkpoint::read(path), &["index.json", "weight_map"]);
    index("not json");
    refused(Checkpoint::read(path), &["index.json", "is not JSON"]);

    // Two shards with the same tensor: which holds is not clear.
    fs::copy(path.join("a.safetensors"), path.join("b.safetensors")).unwrap();
    index(r#"{"weight_map":{"p.weight":"a.safetensors","p.bias":"b.safetensors"}}"#);
    refused(Checkpoint::read(path), &["b.safetensors: tensor `p.weight`", "is already in", "a.safetensors"]);
    // The named shard is a folder.
    fs::create_dir(path.join("c.safetensors")).unwrap();
    index(r#"{"weight_map":{"p.weight":"c.safetensors"}}"#);
    refused(Checkpoint::read(path), &["c.safetensors", "not a regular file"]);
}

fn gguf(file: &GgufFile) -> Result<Gguf> {
    Gguf::from_bytes("file.gguf", file.bytes())
}

#[test]
fn gguf_cut_at_any_byte_is_refused_by_name() {
    let file = GgufFile::good().bytes();
    exercise_gguf(&Gguf::from_bytes("file.gguf", file.clone()).unwrap());
    for len in 0..file.len() {
        refused(Gguf::from_bytes("file.gguf", file[..len].to_vec()), &["file.gguf"]);
    }
}

#[test]
fn gguf_fields_that_lie_are_refused_by_name() {
    type Spoil = fn(&mut GgufFile);
    let cases: [(Spoil, &[&str]); 22] = [
        (|f| f.magic = *b"GGML", &["not a GGUF file"]),
        (|f| f.version = 1, &["GGUF version 1, needed 2 or 3"]),
        (|f| f.version = 3 << 24, &["big-endian"]),
        (|f| f.counts = Some((u64::MAX, 0)), &["file.gguf"]),
        (|f| f.counts = Some((3, u64::MAX)), &["file.gguf"]),
        (|f| f.keys[1].0 = f.keys[0].0.clone(), &["key `key.00`", "is there twice"]),
        (|f| f.keys[0].0 = "k".repeat(65536), &["a metadata key", "65536 bytes, at most 65535"]),
        (|f| f.keys[0].1 = 13, &["key `key.00`", "unknown type 13"]),
        (|f| f.keys[7].2 = vec![2], &["key `key.07`", "a bool of 2"]),
        (|f| f.keys[8].2 = u64::MAX.to_le_bytes().into(), &["key `key.08`", "outside the file"]),
        (|f| f.keys[9].2 = gguf_array(12, u64::MAX / 4, &[]), &["key `key.09`", "overflows"]),
        (|f| f.keys[9].2 = gguf_array(0, 1 << 40, &[]), &["key `key.09`", "outside the file"]),
        (|f| f.keys[9].2 = gguf_array(8, u64::MAX, &[]), &["key `key.09`", "outside the file"]),
        (|f| f.tensors[1].name = "norm".into(), &["tensor `norm`", "is there twice"]),
        (|f| f.tensors[1].extents = vec![1; 5], &["tensor `weight`", "5 axes, at most 4"]),
        (|f| f.tensors[1].extents = vec![48, 2], &["tensor `weight`", "rows of 48, needed a multiple of 32 for MXFP4"]),
        (|f| f.tensors[1].extents = vec![1 << 40, 1 << 40], &["tensor `weight`", "overflows"]),
        (|f| f.tensors[1].ggml_type = 4, &["tensor `weight`", "unknown type: ggml type 4"]),
        (|f| f.tensors[1].offset = 33, &["tensor `weight`", "offset 33, needed a multiple of 32"]),
        (|f| f.tensors[1].offset = 0, &["overlaps tensor"]),
        (|f| f.tensors[1].offset = !31, &["tensor `weight`", "outside the file"]),
        (|f| f.tensors[2].offset = 160, &["tensor `experts`", "outside the file"]),
    ];
    for (spoil, parts) in cases {
        let mut file = GgufFile::good();
        spoil(&mut file);
        refused(gguf(&file), &[&["file.gguf"], parts].concat());
    }
    for (code, value) in [(4, 24u32), (4, 0), (5, 32)] {
        let file = GgufFile::good().with_key("general.alignment", code, value.to_le_bytes());
        refused(gguf(&file), &["key `general.alignment`", "needed a U32 power of two"]);
    }
    let nest = |levels: usize| (1..levels).fold(gguf_array(0, 1, &[7]), |inner, _| gguf_array(9, 1, &inner));
    refused(gguf(&GgufFile::good().with_key("deep", 9, nest(5))), &["key `deep`", "deeper than 4"]);
    refused(gguf(&GgufFile::good().with_key("deep", 9, nest(100_000))), &["key `deep`", "deeper than 4"]);
    exercise_gguf(&gguf(&GgufFile::good().with_key("deep", 9, nest(4))).unwrap());
}

#[test]
fn tensors_of_another_kind_or_of_no_bytes_are_refused_by_name() {
    let file = gguf(&GgufFile::good()).unwrap();
    refused(file.tensor("absent"), &["absent: missing", "file.gguf"]);
    refused(file.value("absent"), &["absent: missing"]);
    refused(file.matrix("norm"), &["norm: has shape [3], needed 2 axes"]);
    refused(file.matrix("experts"), &["experts: has shape [2, 1, 32], needed 2 axes"]);
    refused(file.experts("weight"), &["weight: has shape [2, 64], needed 3 axes"]);
    refused(file.f32("weight"), &["weight: MXFP4 is not supported"]);
    let mut floats = GgufFile::good();
    floats.tensors[0].extents = vec![3, 1];
    refused(gguf(&floats).unwrap().matrix("norm"), &["norm: F32 is not supported"]);
    // No bytes at all would do for any number of experts or rows.
    let mut none = GgufFile::good();
    none.tensors[2].extents = vec![0, 1, 1 << 50];
    none.tensors[1].extents = vec![0, 1 << 50];
    let none = gguf(&none).unwrap();
    refused(none.experts("experts"), &["experts: axis k is empty"]);
    refused(none.matrix("weight"), &["weight: axis k is empty"]);
    let rows = 1usize << 50;
    let none = open(safetensors(&[("p.weight", "BF16", &[rows, 0], &[])])).unwrap();
    refused(none.linear("p"), &["p.weight: axis k is empty"]);
    assert!(QuantizedMatrix::bf16(rows, 0, &[]).unwrap().check_finite().is_ok());
    refused(QuantizedExperts::mxfp4(rows, 1, 0, &[], &[]), &["experts: axis k is empty"]);
    refused(QuantizedExperts::mxfp4(rows, 0, 32, &[], &[]), &["experts: axis n is empty"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever bytes change, opening answers, and what opens can be read to its end.
    #[test]
    fn gguf_with_changed_bytes_never_panics(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut file = GgufFile::good().with_key("name", 8, gguf_string("x")).bytes();
        for (at, byte) in changes {
            let len = file.len();
            file[at.index(len)] = byte;
        }
        if let Ok(file) = Gguf::from_bytes("file.gguf", file) {
            exercise_gguf(&file);
        }
    }

    #[test]
    fn safetensors_with_changed_bytes_never_panics(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let mut file = small();
        for (at, byte) in changes {
            let len = file.len();
            file[at.index(len)] = byte;
        }
        if let Ok(checkpoint) = open(file) {
            exercise_checkpoint(&checkpoint);
        }
    }

    /// Digits are where a header lies best.
    #[test]
    fn safetensors_with_changed_numbers_never_panics(numbers in prop::array::uniform8(prop_oneof![0u64..80, any::<u64>()])) {
        let [a, b, c, d, e, f, g, h] = numbers;
        let header = format!(
            r#"{{"p.weight":{{"dtype":"F8_E4M3","shape":[{a},{b}],"data_offsets":[{c},{d}]}},"p.weight_scale":{{"dtype":"U8","shape":[{e},{f}],"data_offsets":[{g},{h}]}}}}"#
        );
        if let Ok(checkpoint) = open(raw_safetensors(header, &[127; 66])) {
            exercise_checkpoint(&checkpoint);
        }
    }
}
