//! Scales of an FP8 KV cache.
#![forbid(unsafe_code)]

use super::{Checkpoint, bad};
use crate::error::{Error, Result};
use std::borrow::Cow;

/// Scales of an FP8 KV cache: cached code = sat(x / scale), value = code x scale.
#[derive(Debug, Clone, PartialEq)]
pub struct KvScales<'a> {
    /// For keys: one for all heads, or `[num_kv_heads]`.
    pub k: Cow<'a, [f32]>,
    /// For values: as `k`.
    pub v: Cow<'a, [f32]>,
}

impl Checkpoint {
    /// The KV cache scales of one attention layer; `prefix` is `model.layers.N.self_attn` or what the model calls it.
    ///
    /// Names: `P.k_scale` and `P.v_scale` (compressed-tensors), or `P.k_proj.k_scale` and `P.v_proj.v_scale` (ModelOpt). `None`
    /// if there is neither: whether that means 1.0, as vLLM has it, is for the caller to write out.
    ///
    /// # Errors
    /// [`Error::Missing`] if only one of keys and values has a scale; [`Error::Unexpected`] if both names are there;
    /// [`Error::Checkpoint`] for dtypes other than F32, BF16, F16 or an empty tensor; [`Error::Value`] for a scale that is not
    /// finite and above 0.
    pub fn kv_scales(&self, prefix: &str) -> Result<Option<KvScales<'_>>> {
        match (self.kv_scale(prefix, "k")?, self.kv_scale(prefix, "v")?) {
            (Some(k), Some(v)) => Ok(Some(KvScales { k, v })),
            (None, None) => Ok(None),
            (k, _) => {
                let (missing, given) = if k.is_none() { ("k", "v") } else { ("v", "k") };
                Err(Error::Missing {
                    operand: format!("{prefix}.{missing}_scale").into(),
                    needed_by: format!("{prefix}, which has a {given}_scale").into(),
                })
            }
        }
    }

    fn kv_scale(&self, prefix: &str, which: &str) -> Result<Option<Cow<'_, [f32]>>> {
        let (plain, nested) = (format!("{prefix}.{which}_scale"), format!("{prefix}.{which}_proj.{which}_scale"));
        let tensor = match (self.find(&plain)?, self.find(&nested)?) {
            (Some(_), Some(_)) => {
                let because = format!("there is {plain} as well: which of the two holds is not clear");
                return Err(Error::Unexpected { operand: nested.into(), because: because.into() });
            }
            (Some(t), None) | (None, Some(t)) => t,
            (None, None) => return Ok(None),
        };
        let scales = tensor.f32()?;
        if scales.is_empty() {
            return Err(bad(tensor.name, "is empty, needed at least one scale"));
        }
        if let Some(at) = scales.iter().position(|s| !(s.is_finite() && *s > 0.0)) {
            let got = scales.get(at).copied().unwrap_or_default().to_string();
            let operand = tensor.name.to_owned().into();
            return Err(Error::Value { operand, at, got, needed: "a finite scale above 0" });
        }
        Ok(Some(scales))
    }
}
