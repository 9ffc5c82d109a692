//! The example as a user runs it: the greedy tokens on standard output and in its file, and one clear line for bad input.
#![forbid(unsafe_code)]

mod support;

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use support::{Golden, golden_dir, uint};
use tempfile::TempDir;
use trn_kernels::checkpoint::Checkpoint;

/// The example's executable, built once.
fn executable() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let build = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--example", "generate", "--message-format", "json", "--manifest-path"])
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
            .output()
            .unwrap();
        assert!(build.status.success(), "{}", String::from_utf8_lossy(&build.stderr));
        let messages = String::from_utf8(build.stdout).unwrap();
        let mut built = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let example = built.find(|m| m["target"]["name"] == "generate" && m["executable"].is_string());
        example.and_then(|m| m["executable"].as_str().map(PathBuf::from)).expect("an executable")
    })
}

fn generate(model: &Path, arguments: &[&str]) -> Output {
    Command::new(executable()).arg("--model").arg(model).args(arguments).output().unwrap()
}

/// What a failing run says: one line on standard error, nothing on standard output.
fn refusal(model: &Path, arguments: &[&str]) -> String {
    let output = generate(model, arguments);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{arguments:?} succeeded");
    assert!(output.stdout.is_empty(), "{arguments:?} printed tokens");
    assert!(said.starts_with("error: ") && said.trim_end().lines().count() == 1, "{arguments:?}: {said}");
    said.trim_end()["error: ".len()..].to_owned()
}

fn model() -> PathBuf {
    golden_dir().join("tiny-gpt-oss")
}

/// A copy of the model's folder, as `spoil` leaves it.
fn spoiled(spoil: impl FnOnce(&Path)) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(model().join(file), folder.path().join(file)).unwrap();
    }
    spoil(folder.path());
    folder
}

/// Reads a file, changes it, writes it back.
fn change(file: &Path, how: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(file).unwrap();
    how(&mut bytes);
    std::fs::write(file, bytes).unwrap();
}

#[test]
fn prints_the_greedy_tokens_and_writes_the_logits() {
    let golden = Golden::open("tiny-gpt-oss/reference");
    let (prompt, greedy, exact) = (golden.i64("prompt"), golden.i64("greedy"), golden.f64("logits.f64"));
    let words = |ids: &[i64], by: &str| ids.iter().map(i64::to_string).collect::<Vec<_>>().join(by);
    let folder = tempfile::tempdir().unwrap();
    let (file, steps) = (folder.path().join("logits.safetensors"), greedy.len().to_string());

    let plain = generate(&model(), &["--steps", &steps]);
    assert_eq!(String::from_utf8(plain.stdout).unwrap(), words(&greedy, " ") + "\n");
    assert!(plain.status.success());
    for naming in [model(), model().join("original")] {
        let (tokens, path) = (words(&prompt, ","), file.to_str().unwrap());
        let ours = ["--tokens", &tokens, "--steps", &steps, "--logits", path, "--prefill-chunk", "7", "--threads", "2"];
        let output = generate(&naming, &ours);
        assert_eq!(String::from_utf8(output.stdout).unwrap(), words(&greedy, " ") + "\n", "{naming:?}");
        let written = Checkpoint::read(&file).unwrap();
        let logits = written.tensor("logits").unwrap();
        assert_eq!(logits.shape, golden.shape("logits.f64"));
        let worst =
            logits.f32().unwrap().iter().zip(&exact).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
        assert!(worst <= 2e-3, "{naming:?}: max |logit - f64| = {worst:e}");
        let generated: Vec<u8> = greedy.iter().flat_map(|id| id.to_le_bytes()).collect();
        assert_eq!(written.tensor("generated").unwrap().bytes, generated);
    }
    // The prompt from a file, and the other caches and activations: as many tokens as asked for.
    let listed = folder.path().join("prompt.txt");
    std::fs::write(&listed, words(&prompt, "\n")).unwrap();
    let config: Value = serde_json::from_slice(&std::fs::read(model().join("config.json")).unwrap()).unwrap();
    let (head_dim, heads) = (uint(&config, "head_dim"), uint(&config, "num_attention_heads"));
    let block = |kv: &str| {
        if kv.starts_with("mx") {
            32
        } else if kv == "nvfp4" {
            16
        } else {
            1
        }
    };
    for (kv, acts) in [("bf16", "bf16"), ("fp8", "bf16"), ("mxfp8", "mxfp8"), ("mxfp4", "f32"), ("nvfp4", "bf16")] {
        let ours = ["--tokens-file", listed.to_str().unwrap(), "--kv", kv, "--acts", acts, "--steps", "3"];
        // Blocks run along head_dim, and along the heads' width where activations are quantized.
        if head_dim % block(kv) != 0 {
            assert!(refusal(&model(), &ours).contains("head_dim"), "{kv} {acts}");
            continue;
        }
        if acts == "mxfp8" && heads * head_dim % 32 != 0 {
            assert!(refusal(&model(), &ours).contains("multiple of 32"), "{kv} {acts}");
            continue;
        }
        let output = generate(&model(), &ours);
        assert!(output.status.success(), "{kv} {acts}: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(String::from_utf8(output.stdout).unwrap().split_whitespace().count(), 3, "{kv} {acts}");
    }
}

#[test]
fn bad_arguments_are_refused_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let vocab = Golden::open("tiny-gpt-oss/reference").shape("logits.f64")[1];
    let (bad, empty, binary) = (path("bad.txt"), path("empty.txt"), path("binary.txt"));
    std::fs::write(&bad, "1 2 three").unwrap();
    std::fs::write(&empty, " \n").unwrap();
    std::fs::write(&binary, [0xFF; 9]).unwrap();

    assert!(refusal(&folder.path().join("nowhere"), &[]).contains("nowhere: "));
    assert_eq!(
        refusal(&model(), &["--tokens", &format!("0,{vocab}")]),
        format!("prompt[1]: token {vocab} is out of vocabulary, needed below {vocab}")
    );
    assert_eq!(refusal(&model(), &["--tokens-file", &empty]), "the prompt is empty: at least one token is needed");
    assert!(refusal(&model(), &["--tokens-file", &bad]).starts_with(&format!("{bad}: token id \"three\"")));
    assert!(refusal(&model(), &["--tokens-file", &binary]).starts_with(&binary));
    assert!(refusal(&model(), &["--tokens-file", &path("missing")]).starts_with(&path("missing")));
    assert!(refusal(&model(), &["--logits", &path("no/such/folder")]).starts_with(&path("no/such/folder")));
    assert_eq!(
        refusal(&model(), &["--logits", folder.path().to_str().unwrap()]),
        format!("{}: is a folder, needed a file", folder.path().display())
    );
    assert_eq!(refusal(&model(), &["--threads", "0"]), "--threads: got 0, needed 1 to 1024");
    assert_eq!(refusal(&model(), &["--threads", "1025"]), "--threads: got 1025, needed 1 to 1024");
    assert_eq!(refusal(&model(), &["--prefill-chunk", "0"]), "--prefill-chunk: got 0, needed at least 1");
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(left.len(), 3, "temporary files left behind: {left:?}");
}

#[test]
fn spoiled_models_are_refused_in_one_line() {
    let refused = |spoil: &dyn Fn(&Path)| refusal(spoiled(spoil).path(), &["--tokens", "0"]);
    let weights = |how: fn(&mut Vec<u8>)| move |folder: &Path| change(&folder.join("model.safetensors"), how);
    let config = |key: &'static str, value: Value| {
        move |folder: &Path| {
            change(&folder.join("config.json"), |text| {
                let mut config: Value = serde_json::from_slice(text).unwrap();
                config[key] = value.clone();
                *text = config.to_string().into_bytes();
            });
        }
    };
    let file = |said: &str| assert!(said.contains("model.safetensors: "), "{said}");
    file(&refused(&weights(|b| b.clear())));
    file(&refused(&weights(|b| b.truncate(7))));
    file(&refused(&weights(|b| b.truncate(100))));
    file(&refused(&weights(|b| b.truncate(b.len() - 1))));
    file(&refused(&weights(|b| b.push(0))));
    file(&refused(&weights(|b| b[..8].fill(0xFF))));
    file(&refused(&weights(|b| b[8] = b'[')));
    file(&refused(&weights(|b| {
        // Every tensor takes another type's room.
        let header = u64::from_le_bytes(b[..8].try_into().unwrap()) as usize;
        let text = String::from_utf8(b[8..8 + header].to_vec()).unwrap().replace("BF16", "F32 ");
        b[8..8 + header].copy_from_slice(text.as_bytes());
    })));
    // A scale that is NaN: damage, found when weights are packed, before the first token.
    let said = refused(&weights(|b| {
        let header = u64::from_le_bytes(b[..8].try_into().unwrap()) as usize;
        let tensors: Value = serde_json::from_slice(&b[8..8 + header]).unwrap();
        let tensor = &tensors["model.layers.0.mlp.experts.down_proj_scales"];
        b[8 + header + tensor["data_offsets"][0].as_u64().unwrap() as usize] = 255;
    }));
    assert_eq!(said, "layer 0, experts: down of expert 0, scales[0]: got code 0xff, needed a finite block scale");
    for (key, value) in [
        ("vocab_size", 5.into()),
        ("head_dim", (1u64 << 62).into()),
        ("hidden_size", "wide".into()),
        ("num_hidden_layers", 0.into()),
        ("sliding_window", 0.into()),
        ("rope_theta", Value::Null),
        ("model_type", "llama".into()),
    ] {
        let said = refused(&config(key, value));
        let name = if key == "vocab_size" { "vocab" } else { key };
        assert!(said.contains(name) || (key == "head_dim" && said.contains("matrix")), "{key}: {said}");
    }
    let said = refused(&|folder: &Path| std::fs::remove_file(folder.join("config.json")).unwrap());
    assert!(said.starts_with("config.json: missing"), "{said}");
}
