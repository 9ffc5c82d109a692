//! What one attention computes.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};

/// Tokens of a tile: scores of so many tokens are taken together, at absolute positions. A multiple of 32.
pub const KV_TILE: usize = 64;

/// Tokens of a section: softmax starts afresh at each multiple of this position; sections merge in ascending order.
pub const KV_SECTION: usize = 1024;

/// Shape and mask of an attention. Query head h reads kv head `h / (num_qo_heads / num_kv_heads)`.
///
/// Query i of a sequence with `q` queries and `t` tokens stands at position `p = t - q + i` (bottom-right alignment). Token j is
/// visible to it iff `j <= p` (if `causal`) and `p - j <= window_left` (if given). Scores are
/// `cap(sm_scale x q.k)`, with `cap(s) = c tanh(s / c)` if `logits_soft_cap` is `c`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionSpec {
    /// Query (and output) heads.
    pub num_qo_heads: usize,
    /// Key and value heads; divides `num_qo_heads`.
    pub num_kv_heads: usize,
    /// Elements of a query and of a key.
    pub head_dim_qk: usize,
    /// Elements of a value and of an output.
    pub head_dim_vo: usize,
    /// Factor on the scores, finite; usually `1 / sqrt(head_dim_qk)`.
    pub sm_scale: f32,
    /// Whether tokens after the query are invisible.
    pub causal: bool,
    /// Tokens to the left of the query that stay visible, itself not counted; `None`: all. FlashInfer's meaning: a sliding window
    /// of 128 tokens that counts the query (gpt-oss, Hugging Face `sliding_window`) is `Some(127)`.
    pub window_left: Option<usize>,
    /// `c` of the soft cap, finite and above zero; `None`: no cap.
    pub logits_soft_cap: Option<f32>,
}

const SPEC: &str = "attention spec";

impl AttentionSpec {
    /// Causal, without window or cap, one head dim, `sm_scale = 1 / sqrt(head_dim)`.
    pub fn new(num_qo_heads: usize, num_kv_heads: usize, head_dim: usize) -> Self {
        AttentionSpec {
            num_qo_heads,
            num_kv_heads,
            head_dim_qk: head_dim,
            head_dim_vo: head_dim,
            sm_scale: (1.0 / (head_dim as f64).sqrt()) as f32,
            causal: true,
            window_left: None,
            logits_soft_cap: None,
        }
    }

    /// Query heads that share a kv head.
    pub fn group_size(&self) -> usize {
        self.num_qo_heads / self.num_kv_heads.max(1)
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::Empty`] for an extent of 0; [`Error::Multiple`] unless `num_kv_heads` divides `num_qo_heads`; [`Error::Value`] for
    /// an `sm_scale` that is not finite or a cap that is not finite and above zero.
    pub fn validate(&self) -> Result<()> {
        for (got, axis) in [
            (self.num_qo_heads, "num_qo_heads"),
            (self.num_kv_heads, "num_kv_heads"),
            (self.head_dim_qk, "head_dim_qk"),
            (self.head_dim_vo, "head_dim_vo"),
        ] {
            if got == 0 {
                return Err(Error::Empty { operand: SPEC.into(), axis });
            }
        }
        crate::error::multiple(SPEC, "num_qo_heads", self.num_qo_heads, self.num_kv_heads)?;
        let wrong = |field: &'static str, got: f32, needed| {
            Err(Error::Value { operand: field.into(), at: 0, got: got.to_string(), needed })
        };
        if !self.sm_scale.is_finite() {
            return wrong("sm_scale", self.sm_scale, "a finite factor");
        }
        match self.logits_soft_cap {
            Some(cap) if !(cap.is_finite() && cap > 0.0) => {
                wrong("logits_soft_cap", cap, "a finite cap above zero, or none")
            }
            _ => Ok(()),
        }
    }

    /// Tokens `lo..hi` that a query at `position` sees in a sequence of `len` tokens. A negative position (more queries than
    /// tokens) sees nothing if causal.
    pub(crate) fn visible(&self, position: i64, len: usize) -> (usize, usize) {
        let clamp = |x: i64| usize::try_from(x).unwrap_or(0).min(len);
        let hi = if self.causal { clamp(position.saturating_add(1)) } else { len };
        let left = self.window_left.and_then(|w| i64::try_from(w).ok());
        let lo = left.map_or(0, |left| clamp(position.saturating_sub(left)));
        (lo.min(hi), hi)
    }
}

/// Tile and section lengths of a walk over the tokens: constants to callers, parameters so that small tests cross every edge.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Walk {
    pub(crate) tile: usize,
    pub(crate) section: usize,
}

impl Walk {
    pub(crate) const DEFAULT: Walk = Walk { tile: KV_TILE, section: KV_SECTION };
}
