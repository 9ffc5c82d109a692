//! Token ids in and out: the embedding's rows and the greedy choice.
#![forbid(unsafe_code)]

use crate::error::{Error, Result, extent};
use crate::num::{Real, rounded};
use crate::quant::QuantizedMatrix;
use crate::view::MatMut;

/// `out[i, :] = table[tokens[i], :]`: each value as f32 (rounded only where an f32 scale makes it inexact), then rounded to `U`.
/// bf16 tables are exact in f32 and bf16.
///
/// `table`: `[vocab, k]` of any scheme ([`QuantizedMatrix::bf16`] borrows a checkpoint's bytes). `tokens`: m ids.
/// `out`: `[m, k]`.
///
/// # Errors
/// [`Error::Extent`] unless `out` fits; [`Error::Index`] naming the first token outside the vocabulary. Nothing is written then.
pub fn embed<U: Real>(table: &QuantizedMatrix<'_>, tokens: &[u32], mut out: MatMut<'_, U>) -> Result<()> {
    extent("embedding output", "m", out.rows(), tokens.len())?;
    extent("embedding output", "k", out.cols(), table.k())?;
    if let Some(at) = tokens.iter().position(|&t| t as usize >= table.n()) {
        return Err(Error::Index { operand: "tokens".into(), at, got: tokens[at].into(), limit: table.n() });
    }
    for (i, &token) in tokens.iter().enumerate() {
        for (col, y) in out.row_mut(i).unwrap_or_default().iter_mut().enumerate() {
            *y = rounded(table.value(token as usize, col).map_or(f32::NAN, |v| v as f32));
        }
    }
    Ok(())
}

/// Index of the largest logit; of equal ones (+0 and -0 are equal) the lowest.
///
/// # Errors
/// [`Error::Empty`] for no logits; [`Error::Value`] naming the first NaN: there is no greedy token among broken logits.
pub fn argmax<T: Real>(logits: &[T]) -> Result<usize> {
    let mut best: Option<(usize, f32)> = None;
    for (at, logit) in logits.iter().enumerate() {
        let logit = logit.to_f32();
        if logit.is_nan() {
            return Err(Error::Value { operand: "logits".into(), at, got: "NaN".into(), needed: "a number" });
        }
        if best.is_none_or(|(_, largest)| logit > largest) {
            best = Some((at, logit));
        }
    }
    best.map(|(at, _)| at).ok_or(Error::Empty { operand: "logits".into(), axis: "vocab" })
}
