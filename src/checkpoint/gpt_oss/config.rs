//! `config.json` of a gpt-oss model, in either naming.
#![forbid(unsafe_code)]

use super::bad;
use crate::error::{Error, Result};
use serde_json::Value;

/// Sizes and constants of a gpt-oss model.
#[derive(Debug, Clone, PartialEq)]
pub struct GptOssConfig {
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Width of the residual stream, a multiple of 32.
    pub hidden_size: usize,
    /// Width of an expert between its two matrices, a multiple of 32.
    pub intermediate_size: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Elements of a head, even.
    pub head_dim: usize,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Experts of a layer.
    pub num_experts: usize,
    /// Experts that a token visits.
    pub experts_per_token: usize,
    /// Keys that a sliding layer sees, the token's own included.
    pub sliding_window: usize,
    /// For each layer whether it slides; `None`: even layers slide, odd ones see everything.
    pub sliding_layers: Option<Vec<bool>>,
    /// Epsilon inside the root of the RMS norms.
    pub rms_norm_eps: f64,
    /// Clamp of the gate (above) and of the linear half (both sides) of the experts' SwiGLU.
    pub swiglu_limit: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Scaling of the rotary frequencies; `None`: none.
    pub yarn: Option<Yarn>,
    /// Whether the output matrix is the embedding.
    pub tie_word_embeddings: bool,
}

/// YaRN scaling of rotary frequencies (formula: openai/gpt-oss `model.py`, after Peng et al. 2023).
///
/// With `d = head_dim / 2`, `f_i = theta^(2i / head_dim)` and `edge(beta) = d ln(original_context / (2 pi beta)) / ln theta`:
/// the ramp `clamp((i - edge(beta_fast)) / (edge(beta_slow) - edge(beta_fast)), 0, 1)` blends `1 / f_i` into
/// `1 / (factor f_i)`; cos and sin are multiplied by `0.1 ln(factor) + 1`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Yarn {
    /// How much longer the context became, at least 1.
    pub factor: f64,
    /// The context, in tokens, that the model was first trained on.
    pub original_context: usize,
    /// Rotations within the original context above which a frequency stays as it is (`ntk_beta`).
    pub beta_fast: f64,
    /// Rotations below which a frequency is divided by `factor` (`ntk_alpha`).
    pub beta_slow: f64,
    /// Whether the ramp's edges are rounded outwards to integers.
    pub truncate: bool,
}

impl GptOssConfig {
    /// Reads the text of a `config.json`: Hugging Face (`num_local_experts`) or original (`num_experts`). `name` stands for
    /// the file in messages.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is not JSON, a field has another type, or fields contradict each other; [`Error::Missing`]
    /// naming the key; [`Error::Unsupported`] for another model, quantization or rope scaling; as
    /// [`GptOssConfig::validate`].
    pub fn from_json(name: &str, json: impl AsRef<[u8]>) -> Result<Self> {
        let json = serde_json::from_slice(json.as_ref()).map_err(|e| bad(name, format!("is not JSON: {e}")))?;
        Self::from_value(name, &json)
    }

    pub(super) fn from_value(at: &str, json: &Value) -> Result<Self> {
        let fields = Fields { at, json };
        let hugging_face = fields.given("num_local_experts");
        if let Some(model) = fields.text("model_type")?
            && model != "gpt_oss"
        {
            return Err(fields.unsupported("model_type", model, "this reader knows gpt_oss"));
        }
        let quantization = Fields { at, json: &json["quantization_config"] };
        if let Some(method) = quantization.text("quant_method")?
            && method != "mxfp4"
        {
            return Err(fields.unsupported("quantization_config.quant_method", method, "gpt-oss experts are MXFP4"));
        }
        let config = GptOssConfig {
            num_hidden_layers: fields.size("num_hidden_layers")?,
            hidden_size: fields.size("hidden_size")?,
            intermediate_size: fields.size("intermediate_size")?,
            num_attention_heads: fields.size("num_attention_heads")?,
            num_key_value_heads: fields.size("num_key_value_heads")?,
            head_dim: fields.size("head_dim")?,
            vocab_size: fields.size("vocab_size")?,
            num_experts: fields.size(if hugging_face { "num_local_experts" } else { "num_experts" })?,
            experts_per_token: fields.one_of("experts_per_token", "num_experts_per_tok")?,
            sliding_window: fields.size("sliding_window")?,
            sliding_layers: fields.sliding_layers()?,
            // The original naming has no key for it: a constant of its code.
            rms_norm_eps: if hugging_face { fields.number("rms_norm_eps")? } else { 1e-5 },
            swiglu_limit: fields.number("swiglu_limit")?,
            rope_theta: fields.rope_theta()?,
            yarn: if hugging_face { fields.hugging_face_yarn()? } else { fields.original_yarn()? },
            tie_word_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
        };
        config.check(at)?;
        Ok(config)
    }

    /// Asks that sizes be above 0 and fit each other, and that numbers be numbers.
    ///
    /// # Errors
    /// [`Error::Checkpoint`], [`Error::Extent`] or [`Error::Multiple`] naming the field; [`Error::Overflow`] if a product of
    /// sizes does not fit.
    pub fn validate(&self) -> Result<()> {
        self.check("gpt-oss config")
    }

    fn check(&self, at: &str) -> Result<()> {
        let sizes = [
            ("num_hidden_layers", self.num_hidden_layers),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("vocab_size", self.vocab_size),
            ("num_experts", self.num_experts),
            ("experts_per_token", self.experts_per_token),
            ("sliding_window", self.sliding_window),
        ];
        for (key, size) in sizes {
            if size == 0 {
                return Err(bad(format!("{at}: {key}"), "is 0, needed at least 1"));
            }
        }
        let multiples = [
            ("hidden_size", self.hidden_size, 32),
            ("intermediate_size", self.intermediate_size, 32),
            ("head_dim", self.head_dim, 2),
            ("num_attention_heads", self.num_attention_heads, self.num_key_value_heads),
        ];
        for (key, got, of) in multiples {
            if !got.is_multiple_of(of) {
                return Err(bad(format!("{at}: {key}"), format!("is {got}, needed a multiple of {of}")));
            }
        }
        if self.experts_per_token > self.num_experts {
            let (got, limit) = (self.experts_per_token, self.num_experts);
            return Err(bad(format!("{at}: experts_per_token"), format!("is {got}, there are {limit} experts")));
        }
        if let Some(layers) = &self.sliding_layers
            && layers.len() != self.num_hidden_layers
        {
            let (got, needed) = (layers.len(), self.num_hidden_layers);
            return Err(bad(format!("{at}: layer_types"), format!("has {got} layers, num_hidden_layers is {needed}")));
        }
        let mut positive = vec![
            ("rms_norm_eps", self.rms_norm_eps),
            ("swiglu_limit", self.swiglu_limit),
            ("rope_theta", self.rope_theta),
        ];
        if let Some(y) = &self.yarn {
            positive.extend([
                ("rope scaling factor", y.factor),
                ("rope scaling beta_fast", y.beta_fast),
                ("rope scaling beta_slow", y.beta_slow),
            ]);
            if y.original_context == 0 {
                return Err(bad(format!("{at}: rope scaling original context"), "is 0, needed at least 1"));
            }
            if y.factor < 1.0 {
                return Err(bad(format!("{at}: rope scaling factor"), format!("is {}, needed at least 1", y.factor)));
            }
            if y.beta_fast <= y.beta_slow {
                let (fast, slow) = (y.beta_fast, y.beta_slow);
                return Err(bad(
                    format!("{at}: rope scaling beta_fast"),
                    format!("is {fast}, needed above beta_slow {slow}"),
                ));
            }
        }
        for (key, x) in positive {
            if !(x.is_finite() && x > 0.0) {
                return Err(bad(format!("{at}: {key}"), format!("is {x}, needed a finite number above 0")));
            }
        }
        let heads = self.num_key_value_heads.checked_mul(2).and_then(|kv| kv.checked_add(self.num_attention_heads));
        let products = [
            heads.and_then(|h| h.checked_mul(self.head_dim)).and_then(|n| n.checked_mul(self.hidden_size)),
            self.num_experts.checked_mul(self.intermediate_size).and_then(|n| n.checked_mul(2)),
            self.vocab_size.checked_mul(self.hidden_size),
        ];
        if products.contains(&None) {
            return Err(Error::Overflow { operand: format!("{at}: the sizes of a matrix").into() });
        }
        Ok(())
    }

    /// Keys that layer `layer` sees, the token's own included; `None`: all before it.
    pub fn window(&self, layer: usize) -> Option<usize> {
        let slides = match &self.sliding_layers {
            Some(layers) => layers.get(layer).copied().unwrap_or(false),
            None => layer.is_multiple_of(2),
        };
        slides.then_some(self.sliding_window)
    }
}

/// The fields of a JSON object.
struct Fields<'a> {
    at: &'a str,
    json: &'a Value,
}

impl Fields<'_> {
    fn given(&self, key: &str) -> bool {
        !self.json[key].is_null()
    }

    fn wrong(&self, key: &str, needed: &str) -> Error {
        bad(format!("{}: {key}", self.at), format!("is {}, needed {needed}", self.json[key]))
    }

    fn missing(&self, key: &str) -> Error {
        Error::Missing { operand: key.to_owned().into(), needed_by: self.at.to_owned().into() }
    }

    fn unsupported(&self, key: &str, got: &str, because: &str) -> Error {
        Error::Unsupported { what: format!("{}: {key} {got}", self.at), because: because.into() }
    }

    fn size(&self, key: &str) -> Result<usize> {
        if !self.given(key) {
            return Err(self.missing(key));
        }
        let size = self.json[key].as_u64().and_then(|n| n.try_into().ok());
        size.ok_or_else(|| self.wrong(key, "a whole number that fits usize"))
    }

    fn number(&self, key: &str) -> Result<f64> {
        if !self.given(key) {
            return Err(self.missing(key));
        }
        self.json[key].as_f64().ok_or_else(|| self.wrong(key, "a number"))
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        if !self.given(key) {
            return Ok(None);
        }
        self.json[key].as_bool().map(Some).ok_or_else(|| self.wrong(key, "true or false"))
    }

    fn text(&self, key: &str) -> Result<Option<&str>> {
        if !self.given(key) {
            return Ok(None);
        }
        self.json[key].as_str().map(Some).ok_or_else(|| self.wrong(key, "text"))
    }

    /// A size under either of two names; if under both, the same.
    fn one_of(&self, key: &str, other: &str) -> Result<usize> {
        match (self.given(key), self.given(other)) {
            (_, false) => self.size(key),
            (false, true) => self.size(other),
            (true, true) if self.size(key)? == self.size(other)? => self.size(key),
            _ => Err(self.wrong(key, &format!("{} as {other} is", self.json[other]))),
        }
    }

    fn sliding_layers(&self) -> Result<Option<Vec<bool>>> {
        let key = "layer_types";
        if !self.given(key) {
            return Ok(None);
        }
        let needed = "a list of `sliding_attention` and `full_attention`";
        let layers = self.json[key].as_array().ok_or_else(|| self.wrong(key, needed))?;
        let slides = |layer: &Value| match layer.as_str() {
            Some("sliding_attention") => Some(true),
            Some("full_attention") => Some(false),
            _ => None,
        };
        layers.iter().map(slides).collect::<Option<_>>().map(Some).ok_or_else(|| self.wrong(key, needed))
    }

    /// `rope_parameters` (transformers 5), `rope_scaling` (before), or nothing.
    fn rope(&self) -> Option<Fields<'_>> {
        let key = ["rope_parameters", "rope_scaling"].into_iter().find(|k| self.given(k))?;
        Some(Fields { at: self.at, json: &self.json[key] })
    }

    fn rope_theta(&self) -> Result<f64> {
        match self.rope() {
            Some(rope) if !self.given("rope_theta") => rope.number("rope_theta"),
            _ => self.number("rope_theta"),
        }
    }

    fn hugging_face_yarn(&self) -> Result<Option<Yarn>> {
        let Some(rope) = self.rope() else {
            return Ok(None);
        };
        match rope.text("rope_type")? {
            Some("yarn") => {}
            Some("default") => return Ok(None),
            Some(other) => return Err(self.unsupported("rope_type", other, "gpt-oss uses yarn")),
            None => return Err(rope.missing("rope_type")),
        }
        for key in ["attention_factor", "mscale", "mscale_all_dim"] {
            if rope.given(key) {
                let got = rope.json[key].to_string();
                return Err(self.unsupported(key, &got, "cos and sin are multiplied by 0.1 ln(factor) + 1"));
            }
        }
        let context = "original_max_position_embeddings";
        Ok(Some(Yarn {
            factor: rope.number("factor")?,
            original_context: if rope.given(context) {
                rope.size(context)?
            } else {
                self.size("initial_context_length")?
            },
            beta_fast: rope.number("beta_fast")?,
            beta_slow: rope.number("beta_slow")?,
            // transformers rounds the edges unless told not to.
            truncate: rope.flag("truncate")?.unwrap_or(true),
        }))
    }

    /// The original code scales iff the factor is above 1, and never rounds the edges.
    fn original_yarn(&self) -> Result<Option<Yarn>> {
        let factor = self.number("rope_scaling_factor")?;
        if factor == 1.0 {
            return Ok(None);
        }
        Ok(Some(Yarn {
            factor,
            original_context: self.size("initial_context_length")?,
            beta_fast: self.number("rope_ntk_beta")?,
            beta_slow: self.number("rope_ntk_alpha")?,
            truncate: false,
        }))
    }
}
