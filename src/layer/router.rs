//! The expert router: top-k of its logits, and the weights of the chosen.
#![forbid(unsafe_code)]

use crate::error::{Error, Result, extent};
use crate::num::math::{exp, sigmoid};
use crate::num::rounded;
use crate::view::{MatMut, MatRef};

/// How the chosen experts' logits become weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RouterMode {
    /// Softmax over the k chosen logits only: gpt-oss.
    SoftmaxAfterTopK,
    /// Softmax over all experts' logits, of which the chosen keep theirs: Mixtral, Qwen.
    SoftmaxThenTopK {
        /// Whether the chosen weights are divided by their sum.
        renormalize: bool,
    },
    /// Each chosen expert's own sigmoid: DeepSeek-V3 and Llama 4 without their biases.
    Sigmoid {
        /// Whether the chosen weights are divided by their sum (unless that is zero: then they stay zero).
        renormalize: bool,
    },
}

/// Chooses the `k` experts of the largest logits for each token, and weighs them.
///
/// `logits`: `[m, experts]`. `ids` and `weights`: `[m, k]`, slots in descending order of logit. Of equal logits (+0 and -0 are
/// equal) the lowest index comes first. NaN counts as larger than infinity, so a NaN logit is chosen and, as the sums of the
/// softmax and of `renormalize` hold it, makes NaN of every weight they make; the same holds of an infinite maximum under softmax.
///
/// In f32: softmax is `exp(logit - max) / sum`; sums run in ascending slot order over the chosen, in ascending expert order
/// over all.
///
/// Error bounds, relative, with d = |logit - max|, `B(n) = (d + ln n + n + 6) u`, and 2^-126 more where `exp` or the sigmoid is
/// flushed to zero: `B(k)` for softmax over the chosen; `B(experts)` over all, renormalised `2 B(experts) + B(k)`; `5 u` for the
/// sigmoid, renormalised `(k + 11) u`.
///
/// # Errors
/// [`Error::Empty`] if k is 0; [`Error::Extent`] unless the shapes agree and k is at most the number of experts;
/// [`Error::Overflow`] for more experts than 32 bits number. Nothing is written then.
pub fn route_top_k(
    mode: RouterMode,
    logits: MatRef<'_, f32>,
    mut ids: MatMut<'_, u32>,
    mut weights: MatMut<'_, f32>,
) -> Result<()> {
    let k = ids.cols();
    if k == 0 {
        return Err(Error::Empty { operand: "router ids".into(), axis: "k" });
    }
    if k > logits.cols() {
        return Err(Error::Extent { operand: "router ids".into(), axis: "k", got: k, needed: logits.cols() });
    }
    if u32::try_from(logits.cols()).is_err() {
        return Err(Error::Overflow { operand: "router ids".into() });
    }
    extent("router ids", "m", ids.rows(), logits.rows())?;
    extent("router weights", "m", weights.rows(), logits.rows())?;
    extent("router weights", "k", weights.cols(), k)?;
    for t in 0..logits.rows() {
        if let (Some(logits), Some(ids), Some(weights)) = (logits.row(t), ids.row_mut(t), weights.row_mut(t)) {
            choose(logits, ids);
            for (weight, &id) in weights.iter_mut().zip(ids.iter()) {
                *weight = logits[id as usize];
            }
            weigh(mode, logits, weights);
            weights.iter_mut().for_each(|w| *w = rounded(*w));
        }
    }
    Ok(())
}

/// Whether logit `a` goes before logit `b` of a lower index.
fn before(a: f32, b: f32) -> bool {
    if a.is_nan() { !b.is_nan() } else { a > b }
}

/// Insertion into the slots, experts ascending: an expert goes behind all that are at least as large, which came earlier.
fn choose(logits: &[f32], ids: &mut [u32]) {
    let mut filled = 0;
    for (expert, &logit) in logits.iter().enumerate() {
        let at = ids[..filled].partition_point(|&id| !before(logit, logits[id as usize]));
        filled = (filled + 1).min(ids.len());
        if let Some(behind) = ids.get_mut(at..filled).filter(|slots| !slots.is_empty()) {
            behind.rotate_right(1);
            behind[0] = expert as u32;
        }
    }
}

/// Turns the chosen logits, largest first, into weights.
fn weigh(mode: RouterMode, logits: &[f32], chosen: &mut [f32]) {
    let Some(&max) = chosen.first() else { return };
    match mode {
        RouterMode::SoftmaxAfterTopK => {
            chosen.iter_mut().for_each(|w| *w = exp(*w - max));
            divide_by_sum(chosen);
        }
        RouterMode::SoftmaxThenTopK { renormalize } => {
            let sum: f32 = logits.iter().fold(0.0, |sum, l| sum + exp(l - max));
            chosen.iter_mut().for_each(|w| *w = exp(*w - max) / sum);
            if renormalize {
                divide_by_sum(chosen);
            }
        }
        RouterMode::Sigmoid { renormalize } => {
            chosen.iter_mut().for_each(|w| *w = sigmoid(*w));
            if renormalize {
                divide_by_sum(chosen);
            }
        }
    }
}

/// Divides by the sum in slot order. Only sigmoids can all be zero; they stay so.
fn divide_by_sum(weights: &mut [f32]) {
    let sum: f32 = weights.iter().fold(0.0, |sum, w| sum + w);
    if sum != 0.0 {
        weights.iter_mut().for_each(|w| *w /= sum);
    }
}
