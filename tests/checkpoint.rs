//! Checkpoints as they should be: every way to open one, every layout the golden files lack, and every key of a config.
#![forbid(unsafe_code)]

#[path = "support/files.rs"]
mod files;
mod support;

use files::{GgufEntry, GgufFile, gguf_string, safetensors};
use half::{bf16, f16};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::fs;
use std::path::Path;
use trn_kernels::Error;
use trn_kernels::checkpoint::gguf::{GgmlType, Value as GgufValue, ValueType};
use trn_kernels::checkpoint::{Checkpoint, Dtype, Gguf, GptOss, GptOssConfig};
use trn_kernels::num::{F8E4M3Fn, F8E5M2, Fp8};
use trn_kernels::quant::{NibbleOrder, QuantizedMatrix, Scheme};

fn open(tensors: &[(&str, &str, &[usize], &[u8])]) -> Checkpoint {
    Checkpoint::from_bytes("file.st", safetensors(tensors)).unwrap()
}

fn values(m: &QuantizedMatrix<'_>) -> Vec<f64> {
    (0..m.n()).flat_map(|row| (0..m.k()).map(move |col| m.value(row, col).unwrap())).collect()
}

/// Names, dtypes, shapes and bytes.
fn contents(checkpoint: &Checkpoint) -> Vec<(String, Dtype, Vec<usize>, Vec<u8>)> {
    let of = |name: &str| {
        let t = checkpoint.tensor(name).unwrap();
        (t.name.into(), t.dtype, t.shape.to_vec(), t.bytes.to_vec())
    };
    checkpoint.names().map(of).collect()
}

/// Writes one checkpoint whole and in three shards; every way of opening gives the same.
#[test]
fn sharded_and_whole_checkpoints_are_equal() {
    let tensors: [(&str, &str, &[usize], &[u8]); 4] = [
        ("a.weight", "BF16", &[1, 2], &[1, 2, 3, 4]),
        ("b.weight", "U8", &[3], &[5, 6, 7]),
        ("c", "F32", &[], &[0, 0, 128, 63]),
        ("d", "I64", &[0], &[]),
    ];
    let whole = tempfile::tempdir().unwrap();
    let single = whole.path().join("model.safetensors");
    fs::write(&single, safetensors(&tensors)).unwrap();
    let expected = contents(&Checkpoint::read(whole.path()).unwrap());
    assert_eq!(expected.len(), 4);

    let sharded = tempfile::tempdir().unwrap();
    let shards = [("one.safetensors", &tensors[..1]), ("two.safetensors", &tensors[1..3]), ("3", &tensors[3..])];
    let mut map = serde_json::Map::new();
    for (name, tensors) in shards {
        fs::write(sharded.path().join(name), safetensors(tensors)).unwrap();
        map.extend(tensors.iter().map(|t| (t.0.to_owned(), Value::from(name))));
    }
    let index = json!({"metadata": {"total_size": 11}, "weight_map": map}).to_string();
    fs::write(sharded.path().join("model.safetensors.index.json"), index).unwrap();

    // Without an index, every *.safetensors of the folder is taken.
    let loose = tempfile::tempdir().unwrap();
    for (i, tensor) in tensors.iter().enumerate() {
        fs::write(loose.path().join(format!("{i}.safetensors")), safetensors(std::slice::from_ref(tensor))).unwrap();
    }
    for path in [whole.path(), &single, sharded.path(), loose.path()] {
        let checkpoint = Checkpoint::read(path).unwrap();
        assert_eq!(contents(&checkpoint), expected, "{}", path.display());
        assert!(checkpoint.contains("c") && !checkpoint.contains("e"));
        assert_eq!(checkpoint.path(), path.display().to_string());
        assert!(checkpoint.bytes() > 15);
    }
}

#[test]
fn values_convert_exactly_at_any_alignment() {
    let x = [1.5f32, -0.0, 3.0e-39, f32::MAX];
    let bytes: Vec<u8> = x.iter().flat_map(|x| x.to_le_bytes()).collect();
    // The headers of these files differ by one byte: at least three of them leave the f32 misaligned.
    // The headers of these files differ by one byte, so exactly one leaves the f32 aligned: that one is borrowed.
    let mut borrowed = 0;
    for pad in ["a", "ab", "abc", "abcd"] {
        let file = open(&[(pad, "F32", &[4], &bytes)]);
        let got = file.tensor(pad).unwrap().f32().unwrap();
        assert!(got.iter().map(|x| x.to_bits()).eq(x.iter().map(|x| x.to_bits())), "{got:?}");
        borrowed += usize::from(matches!(got, Cow::Borrowed(_)));
    }
    assert_eq!(borrowed, if cfg!(target_endian = "little") { 1 } else { 0 });
    let bf: Vec<u8> = [bf16::MAX, bf16::from_bits(1)].iter().flat_map(|x| x.to_le_bytes()).collect();
    let half: Vec<u8> = [f16::MAX, f16::from_bits(1)].iter().flat_map(|x| x.to_le_bytes()).collect();
    let file = open(&[("bf", "BF16", &[2], &bf), ("half", "F16", &[2], &half)]);
    let (bf, half) = (file.tensor("bf").unwrap(), file.tensor("half").unwrap());
    assert_eq!(*bf.f32().unwrap(), [bf16::MAX.to_f32(), bf16::from_bits(1).to_f32()]);
    assert_eq!(*half.f32().unwrap(), [65504.0, 2f32.powi(-24)]);
    assert_eq!((bf.len(), bf.is_empty()), (2, false));
}

/// 3 x 256 codes, all different from row to row, none NaN.
fn fp8_codes() -> Vec<u8> {
    (0..768u32).map(|i| (i * 7 % 120) as u8 | ((i % 2) << 7) as u8).collect()
}

#[test]
fn fp8_layouts_are_told_apart_by_their_scales() {
    let codes = fp8_codes();
    let weight: (&str, &str, &[usize], &[u8]) = ("p.weight", "F8_E4M3", &[3, 256], &codes);
    let value = |i: usize| f64::from(F8E4M3Fn::from_bits(codes[i]).to_f32());
    let f32s = |x: &[f32]| -> Vec<u8> { x.iter().flat_map(|x| x.to_le_bytes()).collect() };
    let bf16s = |x: &[f32]| -> Vec<u8> { x.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect() };
    let element = Fp8::E4M3Fn;
    let block = |n, k| Scheme::Fp8Blockwise { element, n, k };
    // Scale tensor, config, scheme, and the scale of (row, column).
    type ScaleAt = fn(usize, usize) -> f64;
    let one: ScaleAt = |_, _| 0.5;
    let by_row: ScaleAt = |row, _| [0.5, 2.0, 4.0][row];
    let by_half: ScaleAt = |_, col| [0.5, 2.0][col / 128];
    let by_tile: ScaleAt = |row, col| [[0.5, 2.0, 4.0, 8.0], [1.0, 3.0, 5.0, 7.0]][row / 2][col / 64];
    let tiles = f32s(&[0.5, 2.0, 4.0, 8.0, 1.0, 3.0, 5.0, 7.0]);
    let config = r#"{"quantization_config":{"weight_block_size":[2,64]}}"#;
    type Case<'a> = (&'a str, &'a str, &'a [usize], Vec<u8>, &'a str, Scheme, ScaleAt);
    let cases: [Case<'_>; 9] = [
        ("weight_scale", "F32", &[], f32s(&[0.5]), "{}", Scheme::Fp8PerTensor(element), one),
        ("weight_scale", "BF16", &[1], bf16s(&[0.5]), "{}", Scheme::Fp8PerTensor(element), one),
        ("weight_scale", "F32", &[1, 1], f32s(&[0.5]), "{}", Scheme::Fp8PerTensor(element), one),
        ("weight_scale", "F32", &[3, 1], f32s(&[0.5, 2.0, 4.0]), "{}", Scheme::Fp8PerChannel(element), by_row),
        ("weight_scale", "BF16", &[3, 1], bf16s(&[0.5, 2.0, 4.0]), "{}", Scheme::Fp8PerChannel(element), by_row),
        ("weight_scale_inv", "F32", &[1, 2], f32s(&[0.5, 2.0]), "{}", block(128, 128), by_half),
        ("weight_scale", "F32", &[1, 1, 2, 1], f32s(&[0.5, 2.0]), "{}", block(128, 128), by_half),
        ("weight_scale_inv", "F32", &[2, 4], tiles.clone(), config, block(2, 64), by_tile),
        ("weight_scale", "F32", &[2, 4], tiles, config, block(2, 64), by_tile),
    ];
    for (suffix, dtype, shape, bytes, config, scheme, scale) in cases {
        let what = format!("{suffix} {dtype} {shape:?}");
        let scale_tensor = (&*format!("p.{suffix}"), dtype, shape, &*bytes);
        let file = open(&[weight, scale_tensor]).with_config("config.json", config).unwrap();
        let linear = file.linear("p").unwrap();
        assert_eq!(linear.weight.scheme(), scheme, "{what}");
        let expected: Vec<f64> = (0..768).map(|i| value(i) * scale(i / 256, i % 256)).collect();
        assert_eq!(values(&linear.weight), expected, "{what}");
    }
}

#[test]
fn mx_and_dense_layouts_bias_and_activation_scales() {
    let codes = fp8_codes();
    let scales: Vec<u8> = (0..24).map(|i| 120 + i).collect();
    let bias = [0u8, 0, 0x80, 0x3F, 0, 0, 0, 0x40, 0, 0, 0x40, 0x40];
    for dtype in ["U8", "F8_E8M0"] {
        let file = open(&[
            ("p.weight", "F8_E5M2", &[3, 256], &codes),
            ("p.weight_scale", dtype, &[3, 8], &scales),
            ("p.bias", "F32", &[3], &bias),
            ("p.input_scale", "BF16", &[1], &[0x80, 0x3E]),
        ]);
        let linear = file.linear("p").unwrap();
        assert_eq!(linear.weight.scheme(), Scheme::Mxfp8(Fp8::E5M2));
        let value =
            |i: usize| f64::from(F8E5M2::from_bits(codes[i]).to_f32()) * 2f64.powi(i32::from(scales[i / 32]) - 127);
        assert_eq!(values(&linear.weight), (0..768).map(value).collect::<Vec<_>>());
        assert_eq!(linear.bias.as_deref(), Some(&[1.0f32, 2.0, 3.0][..]));
        assert_eq!((linear.input_scale, linear.input_global_scale), (Some(0.25), None));
    }
    let dense = open(&[("p.weight", "BF16", &[2, 1], &[0x80, 0x3F, 0, 0xC0])]);
    let linear = dense.linear("p").unwrap();
    assert_eq!((linear.weight.scheme(), values(&linear.weight)), (Scheme::Bf16, vec![1.0, -2.0]));
    // An ignored layer stays dense whatever the config names for the others.
    let config = r#"{"quantization_config":{"format":"nvfp4-pack-quantized"}}"#;
    assert!(dense.with_config("config.json", config).unwrap().linear("p").is_ok());
}

#[test]
fn kv_scales_under_both_names() {
    let (a, b) = (0.25f32.to_le_bytes(), 0.5f32.to_le_bytes());
    let per_head = [a, b].concat();
    let plain = open(&[("l.k_scale", "F32", &[], &a), ("l.v_scale", "F32", &[1], &b)]);
    let scales = plain.kv_scales("l").unwrap().unwrap();
    assert_eq!((&*scales.k, &*scales.v), (&[0.25][..], &[0.5][..]));
    let nested = open(&[("l.k_proj.k_scale", "F32", &[2], &per_head), ("l.v_proj.v_scale", "BF16", &[], &[0, 0x3F])]);
    let scales = nested.kv_scales("l").unwrap().unwrap();
    assert_eq!((&*scales.k, &*scales.v), (&[0.25, 0.5][..], &[0.5][..]));
    assert!(nested.kv_scales("m").unwrap().is_none());
}

#[test]
fn gguf_values_and_tensors() {
    let file = GgufFile::good();
    for version in [2, 3] {
        let file = Gguf::from_bytes("file.gguf", GgufFile { version, ..GgufFile::good() }.bytes()).unwrap();
        assert_eq!((file.version(), file.alignment()), (version, 32));
        assert_eq!(file.keys().count(), 15);
        let value = |i: usize| file.value(&format!("key.{i:02}")).unwrap();
        let scalars = [
            GgufValue::U8(200),
            GgufValue::I8(-56),
            GgufValue::U16(60000),
            GgufValue::I16(-2),
            GgufValue::U32(7),
            GgufValue::I32(-7),
            GgufValue::F32(1.5),
            GgufValue::Bool(true),
            GgufValue::String(b"gpt-oss"),
        ];
        for (i, expected) in scalars.into_iter().enumerate() {
            assert_eq!(value(i), expected);
        }
        let array = |i| match value(i) {
            GgufValue::Array(a) => a,
            other => panic!("{other:?}"),
        };
        assert_eq!(array(9).iter().collect::<Vec<_>>(), [GgufValue::I32(1), GgufValue::I32(2)]);
        assert_eq!((value(10), value(11)), (GgufValue::U64(u64::MAX), GgufValue::I64(i64::MIN)));
        assert_eq!((value(12).as_f64(), value(4).as_u64(), value(5).as_u64()), (Some(2.5), Some(7), None));
        let nested: Vec<_> = array(13).iter().collect();
        let [GgufValue::Array(bytes), GgufValue::Array(words)] = nested[..] else { panic!("{nested:?}") };
        assert_eq!((bytes.len(), bytes.element_type()), (2, ValueType::U8));
        assert_eq!(words.iter().map(|w| w.as_str()).collect::<Vec<_>>(), [Some("a"), Some("bc")]);
        assert_eq!(array(14).iter().collect::<Vec<_>>(), [false, true, false].map(GgufValue::Bool));
    }

    let open = Gguf::from_bytes("file.gguf", file.bytes()).unwrap();
    assert_eq!(open.names().collect::<Vec<_>>(), ["experts", "norm", "weight"]);
    assert_eq!(*open.f32("norm").unwrap(), [1.0, -2.0, 0.5]);
    let tensor = open.tensor("weight").unwrap();
    assert_eq!((tensor.ggml_type, tensor.shape, tensor.bytes), (GgmlType::MXFP4, &[2, 64][..], &file.data[32..100]));
    let weight = open.matrix("weight").unwrap();
    assert_eq!((weight.n(), weight.k(), weight.nibble_order()), (2, 64, NibbleOrder::Halves));
    let expected = QuantizedMatrix::mxfp4_gguf(2, 64, &file.data[32..100]).unwrap();
    assert_eq!(values(&weight), values(&expected));
    let experts = open.experts("experts").unwrap();
    assert_eq!((experts.len(), experts.n(), experts.k()), (2, 1, 32));
    for (e, expert) in experts.iter().enumerate() {
        let bytes = &file.data[128 + 17 * e..128 + 17 * (e + 1)];
        assert_eq!(values(expert), values(&QuantizedMatrix::mxfp4_gguf(1, 32, bytes).unwrap()), "expert {e}");
    }
}

#[test]
fn gguf_alignment_is_taken_from_its_key() {
    // The padding key makes the directory end where 32 and 64 put the data at different places.
    for pad in 0..64 {
        let padding = gguf_string(&"x".repeat(pad));
        let mut file =
            GgufFile::good().with_key("general.alignment", 4, 64u32.to_le_bytes()).with_key("pad", 8, padding);
        file.alignment = 64;
        (file.tensors[1].offset, file.tensors[2].offset) = (64, 192);
        file.data.resize(226, 0);
        let open = Gguf::from_bytes("file.gguf", file.bytes()).unwrap();
        assert_eq!(open.alignment(), 64);
        assert_eq!(*open.f32("norm").unwrap(), [1.0, -2.0, 0.5]);
        assert_eq!(open.tensor("experts").unwrap().bytes, &file.data[192..]);
    }
}

/// A folder of the golden model with `config.json` changed.
fn model_with(source: &Path, change: impl FnOnce(&mut Value)) -> (Checkpoint, String) {
    let text = fs::read(source.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&text).unwrap();
    change(&mut config);
    let text = config.to_string();
    (Checkpoint::read(source).unwrap().with_config("config.json", &text).unwrap(), text)
}

fn namings() -> [std::path::PathBuf; 2] {
    let dir = support::golden_dir().join("tiny-gpt-oss");
    [dir.clone(), dir.join("original")]
}

/// What the model says when a field of its config is changed.
fn complaint(source: &Path, key: &str, value: Value) -> Error {
    let (checkpoint, _) = model_with(source, |config| config[key] = value);
    GptOss::new(&checkpoint).err().unwrap_or_else(|| panic!("{}: {key} is accepted", source.display()))
}

#[test]
fn a_config_without_a_key_names_it() {
    for (source, extra) in namings().iter().zip([
        &["rms_norm_eps", "num_local_experts"][..],
        &["num_experts", "rope_scaling_factor", "initial_context_length", "rope_ntk_alpha", "rope_ntk_beta"],
    ]) {
        let sizes =
            ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"];
        let rest = ["head_dim", "vocab_size", "sliding_window", "swiglu_limit", "rope_theta"];
        for key in sizes.iter().chain(&rest).chain(extra) {
            let error = complaint(source, key, Value::Null);
            // Which naming it is, is told by num_local_experts: without it, the original's key is the one missed.
            let key = if *key == "num_local_experts" { "num_experts" } else { key };
            assert_eq!(error.to_string(), format!("{key}: missing, needed by config.json"));
        }
    }
    let without_both = |config: &mut Value| {
        config["experts_per_token"] = Value::Null;
        config["num_experts_per_tok"] = Value::Null;
    };
    let (checkpoint, _) = model_with(&namings()[0], without_both);
    let error = GptOss::new(&checkpoint).unwrap_err();
    assert_eq!(error.to_string(), "experts_per_token: missing, needed by config.json");
}

#[test]
fn a_config_that_contradicts_the_tensors_names_tensor_and_axis() {
    for source in namings() {
        let config = GptOss::new(&Checkpoint::read(&source).unwrap()).unwrap().config().clone();
        let experts = if source.ends_with("original") { "num_experts" } else { "num_local_experts" };
        for (key, other) in [
            ("hidden_size", config.hidden_size + 32),
            ("intermediate_size", config.intermediate_size + 32),
            ("num_attention_heads", config.num_attention_heads * 2),
            ("head_dim", config.head_dim + 2),
            ("vocab_size", config.vocab_size + 1),
            (experts, config.num_experts + 1),
        ] {
            let error = complaint(&source, key, other.into());
            let Error::Extent { operand, axis, got, needed } = &error else { panic!("{key}: {error}") };
            assert!(operand.contains('.') && !axis.is_empty(), "{error}");
            assert_ne!(got, needed, "{key}: {error}");
        }
        let mut more = config.clone();
        (more.num_hidden_layers, more.sliding_layers) = (config.num_hidden_layers + 1, None);
        let checkpoint = Checkpoint::read(&source).unwrap();
        let error = GptOss::with_config(&checkpoint, more).unwrap_err().to_string();
        assert!(error.contains(&format!(".{}.", config.num_hidden_layers)) && error.contains("missing"), "{error}");
        let mut less = config.clone();
        (less.num_hidden_layers, less.sliding_layers) = (config.num_hidden_layers - 1, None);
        let error = GptOss::with_config(&checkpoint, less).unwrap_err().to_string();
        let expected = match config.num_hidden_layers {
            1 => "num_hidden_layers: is 0, needed at least 1".into(),
            layers => format!("num_hidden_layers is {}", layers - 1),
        };
        assert!(error.contains(&expected), "{error}");
    }
}

#[test]
fn a_config_that_contradicts_itself_names_the_key() {
    let [hugging_face, original] = namings();
    for source in [&hugging_face, &original] {
        let config = GptOss::new(&Checkpoint::read(source).unwrap()).unwrap().config().clone();
        for (key, value, part) in [
            ("hidden_size", json!(0), "is 0, needed at least 1"),
            ("hidden_size", json!(33), "is 33, needed a multiple of 32"),
            ("intermediate_size", json!(16), "needed a multiple of 32"),
            ("head_dim", json!(31), "needed a multiple of 2"),
            ("head_dim", json!(1.5), "is 1.5, needed a whole number"),
            ("num_attention_heads", json!("8"), "needed a whole number"),
            ("num_key_value_heads", json!(config.num_attention_heads + 1), "num_attention_heads"),
            ("vocab_size", json!(-1), "is -1, needed a whole number"),
            ("vocab_size", json!(u64::MAX), "does not fit"),
            ("sliding_window", json!(0), "is 0"),
            ("swiglu_limit", json!(0.0), "is 0, needed a finite number above 0"),
            ("rope_theta", json!(-1), "is -1, needed a finite number above 0"),
            ("layer_types", json!(vec!["full_attention"; config.num_hidden_layers + 1]), "num_hidden_layers is"),
            ("layer_types", json!(["other"]), "`sliding_attention` and `full_attention`"),
            ("model_type", json!("llama"), "this reader knows gpt_oss"),
            ("quantization_config", json!({"quant_method": "awq"}), "gpt-oss experts are MXFP4"),
            ("tie_word_embeddings", json!("yes"), "needed true or false"),
        ] {
            let message = complaint(source, key, value).to_string();
            assert!(message.contains("config.json") && message.contains(part), "{key}: {message}");
        }
    }
    let config = GptOss::new(&Checkpoint::read(&original).unwrap()).unwrap().config().clone();
    let message = complaint(&hugging_face, "num_experts_per_tok", json!(config.experts_per_token + 1)).to_string();
    assert!(message.contains("experts_per_token") && message.contains("num_experts_per_tok"), "{message}");
    let message = complaint(&original, "experts_per_token", json!(1000)).to_string();
    assert!(message.contains("config.json: experts_per_token: is 1000"), "{message}");
    let rope = |key: &str, value: Value| {
        let (checkpoint, _) = model_with(&hugging_face, |config| config["rope_scaling"][key] = value);
        GptOss::new(&checkpoint).unwrap_err().to_string()
    };
    assert!(rope("rope_type", json!("linear")).contains("rope_type linear is not supported"));
    assert!(rope("rope_type", Value::Null).contains("rope_type: missing"));
    assert!(rope("factor", json!(0.5)).contains("factor: is 0.5, needed at least 1"));
    assert!(rope("beta_fast", json!(0.5)).contains("needed above beta_slow"));
    assert!(rope("attention_factor", json!(1.2)).contains("attention_factor 1.2 is not supported"));
    assert!(rope("original_max_position_embeddings", json!(0)).contains("original context: is 0"));
}

#[test]
fn config_keys_of_other_writers() {
    let [hugging_face, original] = namings();
    let parse = |text: &str| GptOssConfig::from_json("config.json", text).unwrap();
    let (_, text) = model_with(&hugging_face, |_| ());
    let expected = parse(&text);
    assert!(expected.yarn.is_some());
    // transformers 5 keeps rope_theta and scaling in one object.
    let (_, text) = model_with(&hugging_face, |config| {
        let mut rope = config["rope_scaling"].take();
        rope["rope_theta"] = config["rope_theta"].take();
        config["rope_parameters"] = rope;
    });
    assert_eq!(parse(&text), expected);
    // Without layer_types even layers slide.
    let (_, text) = model_with(&hugging_face, |config| config["layer_types"] = Value::Null);
    let alternating = parse(&text);
    let window = Some(expected.sliding_window);
    assert_eq!([0, 1, 2, 3].map(|i| alternating.window(i)), [window, None, window, None]);
    // transformers rounds the ramp's edges unless told not to; the original code never does.
    let (_, text) = model_with(&hugging_face, |config| config["rope_scaling"]["truncate"] = Value::Null);
    assert!(parse(&text).yarn.unwrap().truncate);
    let (_, text) = model_with(&original, |_| ());
    assert!(!parse(&text).yarn.unwrap().truncate);
    let (_, text) = model_with(&original, |config| config["rope_scaling_factor"] = json!(1.0));
    assert!(parse(&text).yarn.is_none());
}

#[test]
fn a_model_lacks_a_tensor_or_has_two_namings() {
    let error = GptOss::new(&open(&[])).unwrap_err().to_string();
    assert!(error.contains("config.json: missing") && error.contains("file.st"), "{error}");
    let config = fs::read(namings()[0].join("config.json")).unwrap();
    let none = open(&[]).with_config("config.json", &config).unwrap();
    let error = GptOss::new(&none).unwrap_err().to_string();
    assert!(error.contains("model.embed_tokens.weight (or embedding.weight): missing"), "{error}");
    let both = open(&[("model.embed_tokens.weight", "U8", &[0], &[]), ("embedding.weight", "U8", &[0], &[])]);
    let both = both.with_config("config.json", &config).unwrap();
    let error = GptOss::new(&both).unwrap_err().to_string();
    assert!(error.contains("two models in one"), "{error}");
    // Every tensor of the model is needed: leave one out, and it is named.
    for source in namings() {
        let whole = Checkpoint::read(&source).unwrap();
        let config = fs::read(source.join("config.json")).unwrap();
        let all = contents(&whole);
        for leave_out in
            all.iter().map(|t| &t.0).filter(|n| !n.contains(".1.") && !n.contains(".2.") && !n.contains(".3."))
        {
            let kept: Vec<_> = all.iter().filter(|t| t.0 != *leave_out).collect();
            let dtypes: Vec<String> = kept.iter().map(|t| t.1.to_string()).collect();
            let tensors: Vec<_> = kept
                .iter()
                .zip(&dtypes)
                .map(|(t, d)| (t.0.as_str(), d.as_str(), t.2.as_slice(), t.3.as_slice()))
                .collect();
            let checkpoint = open(&tensors).with_config("config.json", &config).unwrap();
            let error = GptOss::new(&checkpoint).unwrap_err();
            assert!(matches!(error, Error::Missing { .. }), "{leave_out}: {error}");
            assert!(error.to_string().contains(leave_out.as_str()), "{leave_out}: {error}");
        }
    }
}

/// NVFP4 weights by the facts of the format: 64 elements in 36 bytes, four scales first, each 16 elements in two halves.
#[test]
fn gguf_nvfp4_takes_its_scale_from_another_tensor() {
    let (rows, k) = (6, 128);
    // Every scale code that is a number and not zero-by-decree, every nibble pair.
    let block = |i: usize| -> Vec<u8> {
        let scales = (0..4).map(|j| ((i * 4 + j) * 11 % 0x7E + 1) as u8);
        scales.chain((0..32).map(|j| ((i * 32 + j) * 37 % 256) as u8)).collect()
    };
    let bytes: Vec<u8> = (0..rows * k / 64).flat_map(block).collect();
    let value = |row: usize, col: usize, global: f32| {
        let block = &bytes[(row * k + col) / 64 * 36..];
        let (sub, i) = (col % 64 / 16, col % 16);
        let byte = block[4 + sub * 8 + i % 8];
        let code = if i < 8 { byte & 15 } else { byte >> 4 };
        let magnitude = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][usize::from(code & 7)];
        let element = if code >= 8 { -magnitude } else { magnitude };
        element * f64::from(F8E4M3Fn::from_bits(block[sub]).to_f32()) * f64::from(global)
    };
    let entry = |name: &str, extents: &[u64], ggml_type, offset| GgufEntry {
        name: name.into(),
        extents: extents.into(),
        ggml_type,
        offset,
    };
    let scale_at = bytes.len().next_multiple_of(32);
    let with = |shape: &[u64], scales: &[(&str, &[f32])]| {
        let mut file = GgufFile { keys: vec![], data: bytes.clone(), ..GgufFile::good() };
        file.tensors = vec![entry("ffn.weight", shape, 40, 0)];
        for (name, values) in scales {
            file.data.resize(file.data.len().next_multiple_of(32), 0);
            file.tensors.push(entry(name, &[values.len() as u64], 0, file.data.len() as u64));
            file.data.extend(values.iter().flat_map(|x| x.to_le_bytes()));
        }
        assert!(file.data.len() >= scale_at || scales.is_empty());
        Gguf::from_bytes("file.gguf", file.bytes()).unwrap()
    };
    for name in ["ffn.scale", "ffn.weight.scale"] {
        let weights = with(&[128, 6], &[(name, &[0.75])]).nvfp4("ffn.weight").unwrap();
        assert_eq!(weights.experts(), 1);
        let expected: Vec<f64> = (0..rows * k).map(|i| value(i / k, i % k, 0.75)).collect();
        assert_eq!(values(&weights.matrix(0).unwrap()), expected);
    }
    for globals in [&[0.75f32, 2.0, 3.0][..], &[0.75]] {
        let weights = with(&[128, 2, 3], &[("ffn.scale", globals)]).nvfp4("ffn.weight").unwrap();
        let stack = weights.stack().unwrap();
        assert_eq!((stack.len(), stack.n(), stack.k(), stack.scheme()), (3, 2, 128, Scheme::Nvfp4));
        for (e, expert) in stack.iter().enumerate() {
            let global = globals.get(e).copied().unwrap_or(0.75);
            let expected: Vec<f64> = (0..2 * k).map(|i| value(e * 2 + i / k, i % k, global)).collect();
            assert_eq!(values(expert), expected, "expert {e}");
        }
        assert!(weights.matrix(3).unwrap_err().to_string().contains("ffn.weight[0]: index 3 is out of range"));
    }
    let refusal = |shape: &[u64], scales: &[(&str, &[f32])]| {
        let file = with(shape, scales);
        let weights = file.nvfp4("ffn.weight");
        weights.and_then(|w| w.stack().map(drop)).unwrap_err().to_string()
    };
    assert!(refusal(&[128, 6], &[]).contains("ffn.scale: missing, needed by the NVFP4 weight ffn.weight"));
    let both = refusal(&[128, 6], &[("ffn.scale", &[1.0]), ("ffn.weight.scale", &[1.0])]);
    assert!(both.contains("ffn.weight.scale: given but not wanted"), "{both}");
    assert!(refusal(&[128, 2, 3], &[("ffn.scale", &[1.0, 2.0])]).contains("has 2 f32 scales, needed 1 or 3"));
    assert!(refusal(&[128, 6], &[("ffn.scale", &[f32::NAN])]).contains("ffn.weight f32 scale[0]: got NaN"));
    assert!(refusal(&[128, 3, 2, 1], &[("ffn.scale", &[1.0])]).contains("ffn.weight: has shape [1, 2, 3, 128]"));
    let mut signed = GgufFile { keys: vec![], data: bytes.clone(), ..GgufFile::good() };
    signed.data[37] |= 0x80;
    signed.data.resize(scale_at + 4, 0);
    signed.tensors = vec![entry("ffn.weight", &[128, 6], 40, 0), entry("ffn.scale", &[1], 0, scale_at as u64)];
    let error = Gguf::from_bytes("file.gguf", signed.bytes()).unwrap().nvfp4("ffn.weight").unwrap_err().to_string();
    assert!(error.contains("ffn.weight[37]") && error.contains("without the sign bit"), "{error}");
}
