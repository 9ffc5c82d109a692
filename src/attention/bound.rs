//! One row of the oracle and the derived bound on a kernel's error; docs/numerics.md holds the derivation.
#![forbid(unsafe_code)]

use super::oracle::Reference;
use super::spec::{AttentionSpec, KV_SECTION, KV_TILE};
use crate::cpu::STEP;
use crate::num::math::{EXP_ULP, LN_ULP, SOFTMAX_FLOOR, TANH_ULP};

/// Half an ulp of f32, relative.
const U: f64 = 1.0 / (1u64 << 24) as f64;
/// Half an ulp of bf16, relative.
const U_BF16: f64 = 1.0 / 256.0;
/// What a flush to zero may take away.
const TINY: f64 = f32::MIN_POSITIVE as f64;

/// Relative error of `n` roundings in a row.
fn gamma(n: usize) -> f64 {
    let nu = n as f64 * U;
    nu / (1.0 - nu)
}

/// One query head of one query, and the tokens it sees.
pub(super) struct Row<'a> {
    pub(super) spec: &'a AttentionSpec,
    pub(super) q: Vec<f64>,
    /// Exact keys and values of the visible tokens, f32 scales included.
    pub(super) k: &'a [Vec<f64>],
    pub(super) v: &'a [Vec<f64>],
    /// Position of the first visible token.
    pub(super) first: usize,
    pub(super) sink: Option<f64>,
    /// f32 scales of K and V.
    pub(super) scales: (f32, f32),
    pub(super) rounds_weights: bool,
}

/// A score and how far the computed one may be from it.
struct Score {
    value: f64,
    error: f64,
}

/// A softmax weight `exp(score - max)`, how far the computed one may be from it, and the same once rounded for the product with V.
struct Weight {
    value: f64,
    error: f64,
    rounded: f64,
}

impl Row<'_> {
    /// Results and bounds into row `at` of `to`.
    pub(super) fn attend(&self, to: &mut Reference, at: usize) {
        let dim = self.spec.head_dim_vo;
        if self.k.is_empty() {
            to.lse[at] = f64::NEG_INFINITY;
            return;
        }
        let scores: Vec<Score> = self.k.iter().map(|k| self.score(k)).collect();
        (to.lse[at], to.lse_bound[at]) = self.lse(&scores);

        let weights = self.weights(&scores, self.sink);
        let mut sum: f64 = weights.iter().map(|w| w.value).sum();
        let mut sum_error: f64 = weights.iter().map(|w| w.error).sum();
        if let Some(sink) = self.sink {
            let max = scores.iter().map(|s| s.value).fold(sink, f64::max);
            let sink = self.weight(&Score { value: sink, error: 0.0 }, max, self.slack(&scores));
            sum += sink.value;
            sum_error += sink.error;
        }
        sum_error += gamma(self.sum_roundings()) * (sum + sum_error);
        let least = sum - sum_error;

        let v_scale = f64::from(self.scales.1);
        // Each product and sum of the dot may be flushed, and so may an element of V be.
        let flushes = (3 * self.v.len() + 4 * KV_TILE) as f64 * TINY * v_scale;
        for d in 0..dim {
            let (mut y, mut magnitude, mut error) = (0.0, 0.0, flushes);
            for (w, v) in weights.iter().zip(self.v) {
                y += w.value * v[d];
                magnitude += (w.value + w.rounded) * v[d].abs();
                error += w.rounded * v[d].abs();
            }
            error += gamma(self.sum_roundings()) * magnitude;
            let y = y / sum;
            let bound = if least > 0.0 { (error + y.abs() * sum_error) / least } else { f64::INFINITY };
            // The division, the product with it, the scale of V; and what may underflow there.
            let last = gamma(4) * (y.abs() + bound) + 2.0 * TINY * (1.0 + v_scale);
            to.out[at * dim + d] = y;
            to.out_bound[at * dim + d] = bound + last;
        }
    }

    fn score(&self, k: &[f64]) -> Score {
        let scale = f64::from(self.spec.sm_scale);
        let (mut dot, mut magnitude, mut elements) = (0.0, 0.0, 0.0);
        let k_scale = f64::from(self.scales.0);
        for (q, k) in self.q.iter().zip(k) {
            dot += q * k;
            magnitude += (q * k).abs();
            elements += q.abs() * k_scale + k.abs();
        }
        let d = self.q.len();
        // Half a step in each chain, the chains' sum, a sum for each step; then sm_scale as an f32, times the scale of K, times the
        // dot.
        let roundings = STEP / 2 + 1 + d.div_ceil(STEP) + 3;
        // A flush may hit each element, each product and each sum.
        let flushed = scale.abs() * TINY * (elements + (2 * d + 2) as f64 * k_scale) + TINY;
        let value = dot * scale;
        let error = gamma(roundings) * magnitude * scale.abs() + flushed;
        match self.spec.logits_soft_cap.map(f64::from) {
            None => Score { value, error },
            Some(cap) => {
                // |c tanh(s / c)| <= |s| and its slope is at most 1.
                let capped = cap * (value / cap).tanh();
                let reach = value.abs() + error;
                let error = error + U * reach + (2.0 * TANH_ULP * U + U) * 1.01 * (capped.abs() + error) + TINY * cap;
                Score { value: capped, error }
            }
        }
    }

    /// Twice the largest error of a score: what a difference of two may be off by.
    fn slack(&self, scores: &[Score]) -> f64 {
        2.0 * scores.iter().map(|s| s.error).fold(0.0, f64::max)
    }

    /// Tiles within a section at most, and sections, that the row's tokens touch.
    fn walk(&self) -> (usize, usize) {
        let end = self.first + self.k.len();
        let tiles = (end.div_ceil(KV_TILE) - self.first / KV_TILE).min(KV_SECTION / KV_TILE);
        (tiles, end.div_ceil(KV_SECTION) - self.first / KV_SECTION)
    }

    /// Roundings on the way of one weight into a sum: chain, chains' sum, steps of the tile, tiles, two for each section, the sink.
    fn sum_roundings(&self) -> usize {
        let (tiles, sections) = self.walk();
        STEP / 2 + 1 + KV_TILE / STEP + tiles + 2 * sections + 2
    }

    fn weights(&self, scores: &[Score], sink: Option<f64>) -> Vec<Weight> {
        // As the maximum: -inf scores weigh nothing, a row of them is 0/0 as the kernel's is.
        let max = scores.iter().map(|s| s.value).fold(sink.unwrap_or(f64::NEG_INFINITY), f64::max);
        let slack = self.slack(scores);
        scores.iter().map(|s| self.weight(s, max, slack)).collect()
    }

    fn weight(&self, score: &Score, max: f64, slack: f64) -> Weight {
        let max = if max == f64::NEG_INFINITY { 0.0 } else { max };
        let below = max - score.value;
        let value = (-below).exp();
        // Each exponential has its error and that of its argument's rounding; the arguments add up to what the score is below the
        // maximum.
        let (tiles, sections) = self.walk();
        let exponentials = (1 + tiles + sections + 1) as f64;
        let exponent = if value == 0.0 {
            0.0
        } else {
            score.error + U * (below + slack) + exponentials * 2.0 * EXP_ULP * U * (1.0 + 4.0 * U)
        };
        let relative = exponent.exp_m1();
        // Near the floor and below it may have become 0.
        let floored = below + slack + 1e-3 >= -f64::from(SOFTMAX_FLOOR);
        let relative_or_gone = |relative: f64| if floored { relative.max(1.0) } else { relative };
        let rounding = if self.rounds_weights { U_BF16 } else { 0.0 };
        Weight {
            value,
            error: value * relative_or_gone(relative),
            rounded: value * relative_or_gone((1.0 + relative) * (1.0 + rounding) - 1.0),
        }
    }

    fn lse(&self, scores: &[Score]) -> (f64, f64) {
        let max = scores.iter().map(|s| s.value).fold(f64::NEG_INFINITY, f64::max);
        let weights = self.weights(scores, None);
        let sum: f64 = weights.iter().map(|w| w.value).sum();
        let sum_error: f64 = weights.iter().map(|w| w.error).sum();
        let relative = (sum_error + gamma(self.sum_roundings()) * (sum + sum_error)) / sum;
        let value = max + sum.ln();
        let from_sum = if relative < 1.0 { -(-relative).ln_1p() } else { f64::INFINITY };
        // ln, rounded, of a sum of at least 1; then the addition.
        let ln = 2.0 * LN_ULP * U * (sum.ln().abs() + from_sum);
        (value, (from_sum + ln) * (1.0 + U) + U * value.abs() + TINY)
    }
}
