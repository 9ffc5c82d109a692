//! A whole checkpoint through the device path: the example's runtime on the Neuron backend, on the emulated library.
#![forbid(unsafe_code)]

#[allow(dead_code)] // the tests use their part
#[path = "../../../examples/gpt_oss/mod.rs"]
mod gpt_oss;

use device_tests::{Emulated, registry};
use gpt_oss::{Model, Session};
use half::bf16;
use safetensors::SafeTensors;
use trn_kernels::backend::{Backend, NeuronBackend, NeuronOptions};
use trn_kernels::checkpoint::{Checkpoint, GptOss};
use trn_kernels::kv::KvFormat;
use trn_kernels::neuron::kernels::KernelSet;
use trn_kernels::neuron::{Library, LoadOptions, Runtime, RuntimeOptions};
use trn_kernels::{Cpu, layer};

struct Reference {
    prompt: Vec<u32>,
    greedy: Vec<u32>,
}

fn reference() -> Reference {
    let bytes = std::fs::read(registry::data("tiny-gpt-oss/reference.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let ids = |name: &str| {
        let data = tensors.tensor(name).unwrap().data().to_vec();
        data.chunks_exact(8).map(|id| i64::from_le_bytes(id.try_into().unwrap()) as u32).collect()
    };
    Reference { prompt: ids("prompt"), greedy: ids("greedy") }
}

/// The greedy continuation of the prompt, prefilled in chunks.
fn run<'w>(backend: &mut dyn Backend<'w>, source: &GptOss<'w>, reference: &Reference, chunk: usize) -> Vec<u32> {
    let model = Model::load::<bf16>(backend, source, false, || {}).unwrap();
    let room = reference.prompt.len() + reference.greedy.len();
    let mut session = Session::<bf16>::new(&model, backend, Cpu::detect(), KvFormat::Bf16, room).unwrap();
    for chunk in reference.prompt.chunks(chunk) {
        session.step(chunk).unwrap();
    }
    let (mut logits, mut tokens) = (vec![], vec![]);
    session.logits(1, &mut logits).unwrap();
    while tokens.len() < reference.greedy.len() {
        let token = layer::argmax(&logits).unwrap() as u32;
        tokens.push(token);
        session.step(&[token]).unwrap();
        session.logits(1, &mut logits).unwrap();
    }
    tokens
}

// One test, because a process has one runtime.
#[test]
fn a_checkpoint_gives_its_reference_tokens() {
    let reference = reference();
    let checkpoint = Checkpoint::read(registry::data("tiny-gpt-oss")).unwrap();
    let source = GptOss::new(&checkpoint).unwrap();
    let emulated = Emulated::new();
    let library = Library::open(&LoadOptions::path(emulated.path())).unwrap();
    let runtime = Runtime::init(&library, &RuntimeOptions::default()).unwrap();
    let folder = registry::neffs("tiny-gpt-oss-programs");
    // Whole, and in chunks of which the later ones have prior keys and begin inside a page.
    for chunk in [reference.prompt.len(), 23] {
        let set = KernelSet::open(folder.path()).unwrap().on(&runtime, 0);
        let mut backend = NeuronBackend::new(&set, NeuronOptions::default());
        assert_eq!(run(&mut backend, &source, &reference, chunk), reference.greedy, "in chunks of {chunk}");
    }
    runtime.close().unwrap();
    emulated.assert_clean();
}
