//! A `config.json` of any bytes, alone and against a model's tensors.
#![no_main]
#![forbid(unsafe_code)]

use std::sync::OnceLock;
use trn_kernels::checkpoint::{Checkpoint, GptOss, GptOssConfig};

/// The small model of the tests.
fn model() -> &'static Checkpoint {
    static MODEL: OnceLock<Checkpoint> = OnceLock::new();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/tiny-gpt-oss/model.safetensors");
    MODEL.get_or_init(|| Checkpoint::read(path).expect("the tests' model opens"))
}

libfuzzer_sys::fuzz_target!(|text: &[u8]| {
    if let Ok(config) = GptOssConfig::from_json("fuzz", text) {
        let layers = config.num_hidden_layers;
        if let Ok(model) = GptOss::with_config(model(), config) {
            assert!(model.layer(layers - 1).is_ok() && model.layer(layers).is_err());
        }
    }
});
