//! Joining attentions over disjoint tokens; adding sinks afterwards.
#![forbid(unsafe_code)]

use super::driver::AttentionOut;
use crate::error::{Result, extent, length, mul};
use crate::num::Real;
use crate::num::math::{exp, ln, sigmoid};
use crate::view::{HeadsMut, HeadsRef};

/// An attention over some of the tokens.
#[derive(Debug, Clone, Copy)]
pub struct PartialState<'a, T> {
    /// `[tokens, num_qo_heads, head_dim_vo]`
    pub out: HeadsRef<'a, T>,
    /// `[tokens, num_qo_heads]` natural log-sum-exps; -inf: this part saw no token.
    pub lse: &'a [f32],
}

/// Merges attentions of the same queries over disjoint sets of tokens (FlashInfer's `merge_state`, with natural logarithms), neither
/// with sinks: `out = (a e^lse_a + b e^lse_b) / (e^lse_a + e^lse_b)`, `lse = ln(e^lse_a + e^lse_b)`.
///
/// Where both saw nothing the result is 0 and -inf. Relative error of a weight: at most 2^-21 beyond that of the parts.
///
/// # Errors
/// [`Error::Extent`](crate::Error::Extent) or [`Error::Length`](crate::Error::Length) if shapes differ.
pub fn merge_states<T: Real, O: Real>(
    a: PartialState<'_, T>,
    b: PartialState<'_, T>,
    mut output: AttentionOut<'_, O>,
) -> Result<()> {
    let (tokens, heads, dim) = (a.out.tokens(), a.out.heads(), a.out.head_dim());
    extent("state b", "tokens", b.out.tokens(), tokens)?;
    extent("state b", "num_qo_heads", b.out.heads(), heads)?;
    extent("state b", "head_dim_vo", b.out.head_dim(), dim)?;
    extent("merged output", "tokens", output.out.tokens(), tokens)?;
    extent("merged output", "num_qo_heads", output.out.heads(), heads)?;
    extent("merged output", "head_dim_vo", output.out.head_dim(), dim)?;
    let count = mul("lse", tokens, heads)?;
    length("lse of state a", a.lse.len(), count)?;
    length("lse of state b", b.lse.len(), count)?;
    if let Some(lse) = &output.lse {
        length("merged lse", lse.len(), count)?;
    }
    for (i, (&lse_a, &lse_b)) in a.lse.iter().zip(b.lse).enumerate() {
        let (token, head) = (i / heads, i % heads);
        let max = if lse_b > lse_a { lse_b } else { lse_a };
        let base = if max == f32::NEG_INFINITY { 0.0 } else { max };
        let (weight_a, weight_b) = (exp(lse_a - base), exp(lse_b - base));
        let sum = weight_a + weight_b;
        // A part that saw nothing has weight 0 and is 0 itself.
        let (share_a, share_b) = if sum == 0.0 { (0.0, 0.0) } else { (weight_a / sum, weight_b / sum) };
        let parts = a.out.head(token, head).into_iter().flatten().zip(b.out.head(token, head).into_iter().flatten());
        for (y, (x_a, x_b)) in output.out.head_mut(token, head).into_iter().flatten().zip(parts) {
            *y = O::from_f32(x_a.to_f32().mul_add(share_a, x_b.to_f32() * share_b) + 0.0);
        }
        if let Some(to) = output.lse.as_deref_mut().and_then(|all| all.get_mut(i)) {
            *to = max + ln(sum);
        }
    }
    Ok(())
}

/// Adds sinks to outputs computed without: each is multiplied by `e^lse / (e^lse + e^sink)`. `lse` (`[tokens, num_qo_heads]`)
/// stays what it is: it never includes the sink. For states merged from parts; [`Cpu::prefill`](crate::Cpu::prefill) and
/// [`Cpu::decode`](crate::Cpu::decode) take sinks themselves, with one rounding less.
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) for `lse` or `sinks` (`[num_qo_heads]`).
pub fn apply_sinks<T: Real>(mut out: HeadsMut<'_, T>, lse: &[f32], sinks: &[f32]) -> Result<()> {
    let heads = out.heads();
    length("lse", lse.len(), mul("lse", out.tokens(), heads)?)?;
    length("sinks", sinks.len(), heads)?;
    for (i, &lse) in lse.iter().enumerate() {
        let (token, head) = (i / heads, i % heads);
        let sink = sinks[head];
        // No token seen: the output is 0 whatever the sink; -inf - -inf would say NaN.
        let share = if lse == f32::NEG_INFINITY { 0.0 } else { sigmoid(lse - sink) };
        for x in out.head_mut(token, head).into_iter().flatten() {
            *x = T::from_f32(x.to_f32() * share + 0.0);
        }
    }
    Ok(())
}
