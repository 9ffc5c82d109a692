//! golden/tiny-gpt-oss and golden/gptoss_layer, run by the example's runtime: whole models from bytes as they are on disk.

use crate::gpt_oss::{Model, Session};
use crate::support::{Golden, golden_dir};
use half::bf16;
use safetensors::tensor::{Dtype, TensorView};
use trn_kernels::backend::CpuBackend;
use trn_kernels::checkpoint::{Checkpoint, GptOss};
use trn_kernels::kv::KvFormat;
use trn_kernels::num::{Fp8, Real};
use trn_kernels::{Cpu, Parallelism, layer};

const KV_FORMATS: [KvFormat; 8] = [
    KvFormat::F32,
    KvFormat::Bf16,
    KvFormat::F16,
    KvFormat::Fp8(Fp8::E4M3Fn),
    KvFormat::Fp8(Fp8::E5M2),
    KvFormat::Mxfp8(Fp8::E4M3Fn),
    KvFormat::Mxfp4,
    KvFormat::Nvfp4,
];

struct Run {
    kv: KvFormat,
    quantize: bool,
    chunk: usize,
    threads: usize,
    steps: usize,
}

impl Run {
    fn new(kv: KvFormat) -> Run {
        Run { kv, quantize: false, chunk: usize::MAX, threads: 1, steps: 0 }
    }

    /// Logits of every prompt position, and the greedy continuation.
    fn of<T: Real>(&self, source: &GptOss<'_>, prompt: &[u32]) -> (Vec<f32>, Vec<u32>) {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(self.threads).build().unwrap();
        let cpu = Cpu::detect().with_parallelism(Parallelism::Pool(&pool));
        let mut backend = CpuBackend::new(cpu);
        let model = Model::load::<T>(&mut backend, source, self.quantize, || {}).unwrap();
        let room = prompt.len() + self.steps;
        let mut session = Session::<T>::new(&model, &mut backend, cpu, self.kv, room).unwrap();
        let (mut logits, mut all) = (vec![], vec![]);
        for chunk in prompt.chunks(self.chunk.min(prompt.len())) {
            session.step(chunk).unwrap();
            session.logits(chunk.len(), &mut logits).unwrap();
            all.extend_from_slice(&logits);
        }
        let mut generated = vec![];
        for _ in 0..self.steps {
            session.logits(1, &mut logits).unwrap();
            let token = layer::argmax(&logits).unwrap() as u32;
            generated.push(token);
            session.step(&[token]).unwrap();
        }
        (all, generated)
    }
}

/// The reference's prompt and greedy tokens.
fn reference() -> (Golden, Vec<u32>, Vec<u32>) {
    let golden = Golden::open("tiny-gpt-oss/reference");
    let ids = |name: &str| golden.i64(name).into_iter().map(|id| id as u32).collect();
    let (prompt, greedy) = (ids("prompt"), ids("greedy"));
    (golden, prompt, greedy)
}

fn with_model(folder: &str, f: impl FnOnce(&GptOss<'_>)) {
    let checkpoint = Checkpoint::read(golden_dir().join(folder)).unwrap();
    f(&GptOss::new(&checkpoint).unwrap());
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn f32_activations_match_the_f64_logits_in_both_namings() {
    let (golden, prompt, greedy) = reference();
    let exact = golden.f64("logits.f64");
    let mut seen = vec![];
    for folder in ["tiny-gpt-oss", "tiny-gpt-oss/original"] {
        with_model(folder, |model| {
            let run = Run { steps: greedy.len(), ..Run::new(KvFormat::F32) };
            let (logits, generated) = run.of::<f32>(model, &prompt);
            let worst = logits.iter().zip(&exact).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
            assert!(logits.len() == exact.len() && worst <= 2e-3, "{folder}: max |logit - f64| = {worst:e}");
            assert_eq!(generated, greedy, "{folder}");
            seen.push(bits(&logits));
        });
    }
    assert_eq!(seen[0], seen[1], "both namings are the same weights");
}

/// Share of positions whose largest logit is the same.
fn agreement(a: &[f64], b: &[f64], vocab: usize) -> f64 {
    let argmax = |x: &[f64]| (0..x.len()).fold(0, |best, i| if x[i] > x[best] { i } else { best });
    let same = a.chunks(vocab).zip(b.chunks(vocab)).filter(|(a, b)| argmax(a) == argmax(b)).count();
    same as f64 / (a.len() / vocab) as f64
}

fn mean_error(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f64>() / a.len() as f64
}

#[test]
fn bf16_activations_are_as_good_as_the_official_bf16() {
    let (golden, prompt, _) = reference();
    let (exact, official) = (golden.f64("logits.f64"), golden.real("logits.official_bf16"));
    let vocab = golden.shape("logits.f64")[1];
    with_model("tiny-gpt-oss", |model| {
        let (logits, _) = Run::new(KvFormat::Bf16).of::<bf16>(model, &prompt);
        let logits: Vec<f64> = logits.into_iter().map(f64::from).collect();
        let (ours, theirs) = (mean_error(&logits, &exact), mean_error(&official, &exact));
        assert!(ours <= 3.0 * theirs, "mean error {ours:e}, official bf16 {theirs:e}");
        let (ours, theirs) = (agreement(&logits, &exact, vocab), agreement(&official, &exact, vocab));
        assert!(ours >= theirs - 0.05, "argmax agreement {ours}, official bf16 {theirs}");
    });
}

/// One answer for a token: whatever the chunk, the format, the threads.
#[test]
fn chunks_and_threads_do_not_change_bits() {
    let (_, prompt, _) = reference();
    with_model("tiny-gpt-oss", |model| {
        // Blocks run along head_dim: a format of longer blocks is none for this model.
        for kv in KV_FORMATS.into_iter().filter(|kv| model.config().head_dim.is_multiple_of(kv.block())) {
            let whole = bits(&Run::new(kv).of::<bf16>(model, &prompt).0);
            for (chunk, threads) in [(1, 1), (7, 3), (16, 1), (33, 2)] {
                let logits = Run { chunk, threads, ..Run::new(kv) }.of::<bf16>(model, &prompt).0;
                assert!(bits(&logits) == whole, "{kv:?} in chunks of {chunk} on {threads} threads");
            }
            let whole = bits(&Run { quantize: true, ..Run::new(kv) }.of::<bf16>(model, &prompt).0);
            let logits = Run { quantize: true, chunk: 5, ..Run::new(kv) }.of::<bf16>(model, &prompt).0;
            assert!(bits(&logits) == whole, "{kv:?}, MXFP8 activations");
        }
    });
}

/// A checkpoint of one golden layer: the layer's input rows are the embedding, so that token t enters as row t.
fn one_layer(golden: &Golden, index: usize) -> Checkpoint {
    let conventions = golden.manifest["conventions"].as_array().unwrap();
    let config =
        conventions.iter().find_map(|c| c.as_str()?.strip_prefix("config: ")).expect("the manifest has a config");
    let mut config: serde_json::Value = serde_json::from_str(config).unwrap();
    let rows = golden.shape("x")[0];
    let hidden = golden.shape("x")[1];
    config["num_hidden_layers"] = 1.into();
    config["vocab_size"] = rows.into();
    let ones: Vec<u8> = bf16::ONE.to_le_bytes().repeat(hidden);
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = vec![
        ("model.embed_tokens.weight".into(), Dtype::BF16, vec![rows, hidden], golden.bytes("x")),
        ("lm_head.weight".into(), Dtype::BF16, vec![rows, hidden], golden.bytes("x")),
        ("model.norm.weight".into(), Dtype::BF16, vec![hidden], ones),
    ];
    for name in golden.names() {
        if let Some(rest) = name.strip_prefix(&format!("model.layers.{index}.")) {
            let blocks = rest.ends_with("_blocks") || rest.ends_with("_scales");
            let dtype = if blocks { Dtype::U8 } else { Dtype::BF16 };
            tensors.push((format!("model.layers.0.{rest}"), dtype, golden.shape(&name), golden.bytes(&name)));
        }
    }
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, data)| (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
    let file = safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap();
    let kind = if index.is_multiple_of(2) { "sliding_attention" } else { "full_attention" };
    config["layer_types"] = vec![kind].into();
    Checkpoint::from_bytes("one layer", file).unwrap().with_config("config", config.to_string()).unwrap()
}

/// The residual stream behind the last layer.
fn residual<T: Real>(source: &GptOss<'_>, kv: KvFormat, tokens: &[u32]) -> Vec<f64> {
    let mut backend = CpuBackend::new(Cpu::detect());
    let model = Model::load::<T>(&mut backend, source, false, || {}).unwrap();
    let mut session = Session::<T>::new(&model, &mut backend, Cpu::detect(), kv, tokens.len()).unwrap();
    session.step(tokens).unwrap();
    session.residual().iter().map(|v| f64::from(*v)).collect()
}

#[test]
fn both_layers_are_as_exact_as_the_official_f32() {
    let golden = Golden::open("gptoss_layer");
    let layers = golden.names().iter().filter(|n| n.ends_with(".official_f32")).count();
    assert!(layers >= 2);
    for index in 0..layers {
        let checkpoint = one_layer(&golden, index);
        let source = GptOss::new(&checkpoint).unwrap();
        let tokens: Vec<u32> = (0..golden.shape("x")[0] as u32).collect();
        let exact = golden.real(&format!("l{index}.out"));
        let worst = |x: &[f64]| x.iter().zip(&exact).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);

        let ours = residual::<f32>(&source, KvFormat::F32, &tokens);
        assert_eq!(ours.len(), exact.len());
        let (ours, theirs) = (worst(&ours), worst(&golden.real(&format!("l{index}.official_f32"))));
        // The factor is the manifest's for bf16: another order of the same f32 operations.
        assert!(ours <= 3.0 * theirs, "layer {index}: max error {ours:e}, official f32 {theirs:e}");

        let ours = residual::<bf16>(&source, KvFormat::Bf16, &tokens);
        let (ours, theirs) =
            (mean_error(&ours, &exact), mean_error(&golden.real(&format!("l{index}.official_bf16")), &exact));
        assert!(ours <= 3.0 * theirs, "layer {index}: mean error {ours:e}, official bf16 {theirs:e}");
    }
}
