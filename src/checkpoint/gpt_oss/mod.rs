//! A gpt-oss model: the same structs from Hugging Face and from original naming.
//!
//! Tensor names and shapes: openai/gpt-oss (`weights.py`, `model.py`) and transformers (`modeling_gpt_oss.py`).
#![forbid(unsafe_code)]

mod config;

pub use config::{GptOssConfig, Yarn};

use super::{Checkpoint, Dtype, Tensor, bad};
use crate::error::{Error, Result};
use crate::quant::{QuantizedExperts, QuantizedMatrix};
use std::borrow::Cow;

/// How tensors are named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Naming {
    /// `model.layers.0.self_attn.q_proj.weight`: q, k and v are tensors of their own.
    HuggingFace,
    /// `block.0.attn.qkv.weight`: rows of q, then k, then v.
    Original,
}

/// A gpt-oss model in a checkpoint: every tensor found, every shape checked against the config; nothing copied but vectors.
#[derive(Debug)]
pub struct GptOss<'a> {
    checkpoint: &'a Checkpoint,
    config: GptOssConfig,
    naming: Naming,
}

/// A matrix with its bias.
#[derive(Debug, Clone)]
pub struct Dense<'a> {
    /// The weight, `[n, k]`, BF16.
    pub weight: QuantizedMatrix<'a>,
    /// The bias, `[n]`.
    pub bias: Vec<f32>,
}

/// The experts' matrices with their biases.
#[derive(Debug, Clone)]
pub struct Experts<'a> {
    /// The weights, `[experts]` of `[n, k]`, MXFP4.
    pub weight: QuantizedExperts<'a>,
    /// The biases, `[experts, n]`.
    pub bias: Vec<f32>,
}

/// One layer. `H` is hidden_size, `I` intermediate_size, `D` head_dim; matrices are `[out, in]`.
#[derive(Debug, Clone)]
pub struct GptOssLayer<'a> {
    /// Weight of the norm before attention, `[H]`.
    pub attn_norm: Vec<f32>,
    /// Queries, `[num_attention_heads * D, H]`.
    pub q: Dense<'a>,
    /// Keys, `[num_key_value_heads * D, H]`.
    pub k: Dense<'a>,
    /// Values, `[num_key_value_heads * D, H]`.
    pub v: Dense<'a>,
    /// Attention output, `[H, num_attention_heads * D]`.
    pub o: Dense<'a>,
    /// One logit for each query head that joins the softmax denominator, `[num_attention_heads]`.
    pub sinks: Vec<f32>,
    /// Keys that a token sees, its own included; `None`: all before it.
    pub window: Option<usize>,
    /// Weight of the norm before the experts, `[H]`.
    pub mlp_norm: Vec<f32>,
    /// Router, `[num_experts, H]`.
    pub router: Dense<'a>,
    /// First expert matrices, `[2I, H]`: row `2j` is gate `j`, row `2j + 1` is up `j`.
    pub gate_up: Experts<'a>,
    /// Second expert matrices, `[H, I]`. The bias is weighted along with the rest of the expert's output.
    pub down: Experts<'a>,
}

impl<'a> GptOss<'a> {
    /// The model of a checkpoint folder, by its `config.json`.
    ///
    /// # Errors
    /// [`Error::Missing`] without a config; as [`GptOssConfig::from_json`] and [`GptOss::with_config`].
    pub fn new(checkpoint: &'a Checkpoint) -> Result<Self> {
        let Some((at, json)) = checkpoint.config() else {
            let needed_by = format!("the gpt-oss model in {}", checkpoint.path());
            return Err(Error::Missing { operand: "config.json".into(), needed_by: needed_by.into() });
        };
        Self::with_config(checkpoint, GptOssConfig::from_value(at, json)?)
    }

    /// The model of a checkpoint, by a given config. Every tensor is looked up and its dtype and shape checked here, so that a
    /// bad checkpoint is refused before the first token.
    ///
    /// # Errors
    /// [`Error::Missing`] naming a tensor; [`Error::Extent`] naming tensor and axis where config and tensor contradict each
    /// other; [`Error::Checkpoint`] for a dtype, a number of axes, tensors of both namings, or more layers than the config says;
    /// as [`GptOssConfig::validate`].
    pub fn with_config(checkpoint: &'a Checkpoint, config: GptOssConfig) -> Result<Self> {
        config.validate()?;
        let (hugging_face, original) = ("model.embed_tokens.weight", "embedding.weight");
        let naming = match (checkpoint.contains(hugging_face), checkpoint.contains(original)) {
            (true, false) => Naming::HuggingFace,
            (false, true) => Naming::Original,
            (true, true) => {
                return Err(bad(
                    checkpoint.path(),
                    format!("has both {hugging_face} and {original}: two models in one"),
                ));
            }
            (false, false) => {
                let operand = format!("{hugging_face} (or {original})").into();
                return Err(Error::Missing { operand, needed_by: "gpt-oss".into() });
            }
        };
        let model = GptOss { checkpoint, config, naming };
        let past = model.layer_name(model.config.num_hidden_layers, "input_layernorm.weight", "attn.norm.scale");
        if checkpoint.contains(&past) {
            let layers = model.config.num_hidden_layers;
            return Err(bad(past, format!("is there, but num_hidden_layers is {layers}")));
        }
        model.embedding()?;
        model.lm_head()?;
        model.final_norm()?;
        for i in 0..model.config.num_hidden_layers {
            model.layer(i)?;
        }
        Ok(model)
    }

    /// The config.
    pub fn config(&self) -> &GptOssConfig {
        &self.config
    }

    /// The embedding, `[vocab_size, H]`, BF16.
    ///
    /// # Errors
    /// As [`GptOss::with_config`], as for all accessors: none once that has succeeded.
    pub fn embedding(&self) -> Result<QuantizedMatrix<'a>> {
        self.vocabulary("model.embed_tokens.weight", "embedding.weight")
    }

    /// The output matrix, `[vocab_size, H]`, BF16.
    ///
    /// # Errors
    /// As [`GptOss::embedding`].
    pub fn lm_head(&self) -> Result<QuantizedMatrix<'a>> {
        let (hugging_face, original) = ("lm_head.weight", "unembedding.weight");
        if self.config.tie_word_embeddings && !self.checkpoint.contains(self.pick(hugging_face, original)) {
            return self.embedding();
        }
        self.vocabulary(hugging_face, original)
    }

    /// Weight of the last norm, `[H]`.
    ///
    /// # Errors
    /// As [`GptOss::embedding`].
    pub fn final_norm(&self) -> Result<Vec<f32>> {
        self.vector(self.pick("model.norm.weight", "norm.scale"), &[("hidden", self.config.hidden_size)])
    }

    /// Layer `i`.
    ///
    /// # Errors
    /// [`Error::Index`] past the last layer; as [`GptOss::embedding`].
    pub fn layer(&self, i: usize) -> Result<GptOssLayer<'a>> {
        let c = &self.config;
        if i >= c.num_hidden_layers {
            return Err(Error::index("layer", 0, i, c.num_hidden_layers));
        }
        let name = |hugging_face: &str, original: &str| self.layer_name(i, hugging_face, original);
        let hidden = c.hidden_size;
        // Checked by the config's validation: neither product overflows.
        let (queries, keys) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        let (q, k, v) = self.qkv(i, queries, keys)?;
        Ok(GptOssLayer {
            attn_norm: self.vector(&name("input_layernorm.weight", "attn.norm.scale"), &[("hidden", hidden)])?,
            q,
            k,
            v,
            o: self.dense(&name("self_attn.o_proj", "attn.out"), hidden, queries)?,
            sinks: self.vector(&name("self_attn.sinks", "attn.sinks"), &[("num_qo_heads", c.num_attention_heads)])?,
            window: c.window(i),
            mlp_norm: self.vector(&name("post_attention_layernorm.weight", "mlp.norm.scale"), &[("hidden", hidden)])?,
            router: self.dense(&name("mlp.router", "mlp.gate"), c.num_experts, hidden)?,
            gate_up: self.experts(&name("mlp.experts.gate_up_proj", "mlp.mlp1"), 2 * c.intermediate_size, hidden)?,
            down: self.experts(&name("mlp.experts.down_proj", "mlp.mlp2"), hidden, c.intermediate_size)?,
        })
    }

    fn pick<'n>(&self, hugging_face: &'n str, original: &'n str) -> &'n str {
        match self.naming {
            Naming::HuggingFace => hugging_face,
            Naming::Original => original,
        }
    }

    fn layer_name(&self, i: usize, hugging_face: &str, original: &str) -> String {
        format!("{}.{i}.{}", self.pick("model.layers", "block"), self.pick(hugging_face, original))
    }

    fn tensor(&self, name: &str, dtypes: &[Dtype], axes: &[(&'static str, usize)]) -> Result<Tensor<'a>> {
        let tensor = self.checkpoint.tensor_for(name, "gpt-oss")?;
        tensor.expect_dtype(dtypes)?;
        tensor.expect_shape(axes)?;
        Ok(tensor)
    }

    fn vector(&self, name: &str, axes: &[(&'static str, usize)]) -> Result<Vec<f32>> {
        let tensor = self.tensor(name, &[Dtype::BF16, Dtype::F32], axes)?;
        tensor.f32().map(Cow::into_owned)
    }

    fn matrix(&self, name: &str, n: usize, k: usize) -> Result<QuantizedMatrix<'a>> {
        self.tensor(name, &[Dtype::BF16], &[("n", n), ("k", k)])?.bf16_matrix()
    }

    fn vocabulary(&self, hugging_face: &str, original: &str) -> Result<QuantizedMatrix<'a>> {
        let axes = [("vocab", self.config.vocab_size), ("hidden", self.config.hidden_size)];
        self.tensor(self.pick(hugging_face, original), &[Dtype::BF16], &axes)?.bf16_matrix()
    }

    fn dense(&self, prefix: &str, n: usize, k: usize) -> Result<Dense<'a>> {
        let weight = self.matrix(&format!("{prefix}.weight"), n, k)?;
        Ok(Dense { weight, bias: self.vector(&format!("{prefix}.bias"), &[("n", n)])? })
    }

    fn qkv(&self, i: usize, queries: usize, keys: usize) -> Result<(Dense<'a>, Dense<'a>, Dense<'a>)> {
        let hidden = self.config.hidden_size;
        if self.naming == Naming::HuggingFace {
            let one = |which: &str, n| self.dense(&format!("model.layers.{i}.self_attn.{which}_proj"), n, hidden);
            return Ok((one("q", queries)?, one("k", keys)?, one("v", keys)?));
        }
        let fused = self.dense(&format!("block.{i}.attn.qkv"), queries + 2 * keys, hidden)?;
        let part = |start: usize, n: usize| -> Result<Dense<'a>> {
            let bias = fused.bias.get(start..start + n).unwrap_or_default().to_vec();
            Ok(Dense { weight: fused.weight.slice_n(start..start + n)?, bias })
        };
        Ok((part(0, queries)?, part(queries, keys)?, part(queries + keys, keys)?))
    }

    fn experts(&self, prefix: &str, n: usize, k: usize) -> Result<Experts<'a>> {
        let experts = self.config.num_experts;
        let (blocks, scales) = (self.pick("_blocks", "_weight.blocks"), self.pick("_scales", "_weight.scales"));
        let axes = [("expert", experts), ("n", n), ("k blocks", k / 32), ("block bytes", 16)];
        let blocks = self.tensor(&format!("{prefix}{blocks}"), &[Dtype::U8], &axes)?;
        let scales = self.tensor(&format!("{prefix}{scales}"), &[Dtype::U8], &axes[..3])?;
        let weight = QuantizedExperts::mxfp4(experts, n, k, blocks.bytes, scales.bytes)?;
        Ok(Experts { weight, bias: self.vector(&format!("{prefix}_bias"), &[("expert", experts), ("n", n)])? })
    }
}
