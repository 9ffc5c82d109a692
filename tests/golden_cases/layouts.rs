//! One linear layer in every checkpoint layout, and a whole model in both namings.

use crate::support::{Golden, golden_dir, text, uint};
use serde_json::{Value, json};
use trn_kernels::checkpoint::{Checkpoint, Dense, Experts, Gguf, GptOss, Linear, gguf::GgmlType};
use trn_kernels::quant::QuantizedMatrix;

/// All values, row-major.
fn values(m: &QuantizedMatrix<'_>) -> Vec<f64> {
    (0..m.n()).flat_map(|row| (0..m.k()).map(move |col| m.value(row, col).unwrap())).collect()
}

/// Compares a loaded weight with `NAME.weight`, which is exact; `relative` allows for a divisor kept as its f32 reciprocal.
fn check_weight(golden: &Golden, name: &str, weight: &QuantizedMatrix<'_>, relative: f64) {
    let tensor = format!("{name}.weight");
    assert_eq!(golden.shape(&tensor), [weight.n(), weight.k()], "{name}");
    let (got, expected, original) = (values(weight), golden.f64(&tensor), golden.real("original"));
    let amax = original.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    for (i, ((got, expected), original)) in got.iter().zip(&expected).zip(&original).enumerate() {
        assert!((got - expected).abs() <= relative * expected.abs(), "{name}[{i}]: {got} is not {expected}");
        // Rounding to 4 bits costs at most a quarter of the largest value (facts of the formats, worst case).
        assert!((got - original).abs() <= 0.25 * amax, "{name}[{i}]: {got} is far from the original {original}");
    }
}

/// The names of the case's tensors: the manifest says which are in the file.
fn tensor_names(case: &Value) -> Vec<&str> {
    case["tensors"].as_object().expect("tensors").keys().map(String::as_str).collect()
}

fn scalar(checkpoint: &Checkpoint, name: &str) -> f32 {
    checkpoint.tensor(name).and_then(|t| t.scalar()).unwrap()
}

fn check_safetensors(golden: &Golden, case: &Value) {
    let layout = text(case, "layout");
    let path = golden_dir().join(format!("layouts/{layout}.safetensors"));
    let config = json!({ "quantization_config": case["config"] }).to_string();
    let checkpoint = Checkpoint::read(&path).unwrap().with_config("config.json", config).unwrap();
    let names = tensor_names(case);
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), names, "{layout}");

    let weight = names.iter().find_map(|n| n.strip_suffix(".weight_packed").or(n.strip_suffix(".weight")));
    let prefix = weight.unwrap_or_else(|| panic!("{layout}: no weight"));
    let linear = checkpoint.linear(prefix).unwrap();
    let named = |suffix: &str| format!("{prefix}.{suffix}");
    // A divisor g is kept as the f32 nearest 1/g: half an ulp, and f64 rounding in both computations.
    let divided = checkpoint.contains(&named("weight_global_scale"));
    check_weight(golden, layout, &linear.weight, if divided { 2f64.powi(-24) + 2f64.powi(-50) } else { 0.0 });

    check_activation_scales(&checkpoint, &linear, &named, layout);
    let attention = names.iter().find_map(|n| n.strip_suffix(".k_scale"));
    if let Some(attention) = attention {
        let scales = checkpoint.kv_scales(attention).unwrap().unwrap();
        assert_eq!(*scales.k, [scalar(&checkpoint, &format!("{attention}.k_scale"))], "{layout}");
        assert_eq!(*scales.v, [scalar(&checkpoint, &format!("{attention}.v_scale"))], "{layout}");
    }
    assert_eq!(checkpoint.kv_scales(prefix).unwrap(), None, "{layout}: the linear layer has no KV scales");
}

fn check_activation_scales(checkpoint: &Checkpoint, linear: &Linear<'_>, named: &dyn Fn(&str) -> String, layout: &str) {
    let stored = |suffix: &str| checkpoint.contains(&named(suffix)).then(|| scalar(checkpoint, &named(suffix)));
    let fp4 = linear.weight.scheme().bits() == 4;
    // compressed-tensors divides by its global scale, ModelOpt multiplies by its input scale: both end as a multiplier.
    let global = stored("input_global_scale").map(|g| 1.0 / g).or(stored("input_scale").filter(|_| fp4));
    assert_eq!(linear.input_global_scale.map(|g| g.get()), global, "{layout}");
    assert_eq!(linear.input_scale, stored("input_scale").filter(|_| !fp4), "{layout}");
    assert!(linear.bias.is_none(), "{layout}");
}

fn check_gguf(golden: &Golden, case: &Value) {
    let layout = text(case, "layout");
    let path = golden_dir().join("layouts").join(layout);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), uint(case, "file_bytes") as u64, "{layout}");
    let file = Gguf::read(&path).unwrap();
    let ggml_type = GgmlType::from_code(uint(case, "ggml_type") as u32);
    assert_eq!(ggml_type, GgmlType::MXFP4, "{layout}");
    let weights: Vec<_> = file.names().filter(|n| file.tensor(n).unwrap().ggml_type == ggml_type).collect();
    let [weight] = weights[..] else { panic!("{layout}: {} tensors of type {ggml_type}", weights.len()) };
    check_weight(golden, layout, &file.matrix(weight).unwrap(), 0.0);
    // Metadata and the other tensors read too.
    assert!(file.value("general.architecture").unwrap().as_str().is_some());
    for name in file.names().filter(|n| *n != weight) {
        let tensor = file.tensor(name).unwrap();
        assert_eq!(file.f32(name).unwrap().len(), tensor.shape.iter().product::<usize>(), "{name}");
    }
}

#[test]
fn every_layout_decodes_to_its_exact_weight() {
    let golden = Golden::open("layouts/expected");
    for case in golden.cases() {
        if text(case, "layout").ends_with(".gguf") {
            check_gguf(&golden, case)
        } else {
            check_safetensors(&golden, case)
        }
    }
}

fn same_matrix(what: &str, a: &QuantizedMatrix<'_>, b: &QuantizedMatrix<'_>) {
    assert_eq!((a.scheme(), a.n(), a.k()), (b.scheme(), b.n(), b.k()), "{what}");
    for row in 0..a.n() {
        for col in 0..a.k() {
            let at = |m: &QuantizedMatrix<'_>| (m.code(row, col), m.block_scale_code(row, col));
            assert_eq!(at(a), at(b), "{what} at ({row}, {col})");
        }
    }
}

fn same_dense(what: &str, a: &Dense<'_>, b: &Dense<'_>) {
    same_matrix(what, &a.weight, &b.weight);
    assert_eq!(a.bias, b.bias, "{what}");
}

fn same_experts(what: &str, a: &Experts<'_>, b: &Experts<'_>) {
    assert_eq!((a.weight.len(), &a.bias), (b.weight.len(), &b.bias), "{what}");
    for (a, b) in a.weight.iter().zip(b.weight.iter()) {
        same_matrix(what, a, b);
    }
}

#[test]
fn gpt_oss_in_both_namings_is_one_model() {
    let dir = golden_dir().join("tiny-gpt-oss");
    let (hf, original) = (Checkpoint::read(&dir).unwrap(), Checkpoint::read(dir.join("original")).unwrap());
    let (a, b) = (GptOss::new(&hf).unwrap(), GptOss::new(&original).unwrap());
    let mut config = b.config().clone();
    // The original naming leaves the alternation of windows to the code.
    config.sliding_layers = a.config().sliding_layers.clone();
    assert_eq!(a.config(), &config);

    same_matrix("embedding", &a.embedding().unwrap(), &b.embedding().unwrap());
    same_matrix("lm_head", &a.lm_head().unwrap(), &b.lm_head().unwrap());
    assert_eq!(a.final_norm().unwrap(), b.final_norm().unwrap());
    for i in 0..a.config().num_hidden_layers {
        let (a, b) = (a.layer(i).unwrap(), b.layer(i).unwrap());
        assert_eq!((&a.attn_norm, &a.mlp_norm, &a.sinks, a.window), (&b.attn_norm, &b.mlp_norm, &b.sinks, b.window));
        for (what, a, b) in [("q", &a.q, &b.q), ("k", &a.k, &b.k), ("v", &a.v, &b.v), ("o", &a.o, &b.o)] {
            same_dense(what, a, b);
        }
        same_dense("router", &a.router, &b.router);
        same_experts("gate_up", &a.gate_up, &b.gate_up);
        same_experts("down", &a.down, &b.down);
    }
}
