//! Tensors and configs that a caller made by hand: their fields are public, so nothing about them has been checked.

use crate::{EXTENTS, survives};
use proptest::prelude::*;
use trn_kernels::checkpoint::gguf::GgmlType;
use trn_kernels::checkpoint::{Checkpoint, Dtype, Gguf, GptOss, GptOssConfig, Tensor, Yarn};

#[test]
fn tensors_made_by_hand() {
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::U8, Dtype::F4] {
        for a in EXTENTS {
            for b in EXTENTS {
                for (shape, bytes) in [(&[a, b][..], &[1u8, 2, 3][..]), (&[a], &[]), (&[], &[0; 4]), (&[a, b, 0], &[7])]
                {
                    let tensor = Tensor { name: "x", dtype, shape, bytes };
                    survives(format_args!("{tensor:?}"), || {
                        let _ = (tensor.len(), tensor.is_empty(), tensor.matrix_shape(), tensor.scalar(), tensor.f32());
                        let _ = (tensor.expect_dtype(&[]), tensor.expect_shape(&[("n", a)]), tensor.bf16_matrix());
                    });
                }
            }
        }
    }
    for code in [0, 1, 4, 39, 40, 41, u32::MAX] {
        let ggml = GgmlType::from_code(code);
        survives(format_args!("{ggml}"), || (ggml.code(), ggml.block()));
    }
}

fn config(size: usize, number: f64) -> GptOssConfig {
    GptOssConfig {
        num_hidden_layers: size,
        hidden_size: size,
        intermediate_size: size,
        num_attention_heads: size,
        num_key_value_heads: size,
        head_dim: size,
        vocab_size: size,
        num_experts: size,
        experts_per_token: size,
        sliding_window: size,
        sliding_layers: None,
        rms_norm_eps: number,
        swiglu_limit: number,
        rope_theta: number,
        yarn: Some(Yarn {
            factor: number,
            original_context: size,
            beta_fast: number,
            beta_slow: number / 2.0,
            truncate: false,
        }),
        tie_word_embeddings: false,
    }
}

#[test]
fn configs_made_by_hand() {
    let checkpoint = Checkpoint::from_bytes("empty", b"\x02\0\0\0\0\0\0\0{}".to_vec()).unwrap();
    for size in EXTENTS {
        for number in [0.0, -1.0, 1.0, 1e4, f64::NAN, f64::INFINITY] {
            let config = config(size, number);
            let name = format_args!("{config:?}");
            let valid = survives(name, || config.validate());
            assert!(valid.is_err() || size > 0 && size < 1 << 32 && number >= 1.0 && number.is_finite(), "{name}");
            let _ = survives(name, || (config.window(0), config.window(usize::MAX)));
            assert!(survives(name, || GptOss::with_config(&checkpoint, config.clone())).is_err());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Bytes that are no file at all; files that almost are: `checkpoint_hostile.rs`.
    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200), text in "\\PC*") {
        let _ = survives(format_args!("Checkpoint"), || Checkpoint::from_bytes("x", bytes.clone()).is_ok());
        let gguf = [b"GGUF\x03\0\0\0".to_vec(), bytes.clone()].concat();
        let _ = survives(format_args!("Gguf"), || Gguf::from_bytes("x", gguf).is_ok());
        prop_assert!(survives(format_args!("Gguf"), || Gguf::from_bytes("x", bytes)).is_err());
        for text in [text.clone(), format!("{{\"hidden_size\": {text}}}")] {
            prop_assert!(survives(format_args!("config"), || GptOssConfig::from_json("x", &text)).is_err());
        }
    }
}
