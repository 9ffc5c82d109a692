//! Rotary positions, with linear and YaRN scaling of the context.
#![forbid(unsafe_code)]

use super::parameter;
use super::rows::{self, RowKernel};
use crate::cpu::Cpu;
use crate::error::{Error, Result, extent, mul, multiple, reserve};
use crate::num::{Real, rounded};
use crate::view::HeadsMut;
use std::f64::consts::PI;

const TABLE: &str = "rope table";

/// How positions beyond the trained context are served.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// Above zero.
        factor: f64,
    },
    /// YaRN (arXiv 2309.00071): low frequencies divided by `factor`, high ones kept, a ramp between.
    Yarn {
        /// How much longer than trained the context is; at least 1.
        factor: f64,
        /// Tokens of the trained context (`original_max_position_embeddings`).
        original_context: u32,
        /// Frequencies that turn more often than this over the trained context are kept (gpt-oss: 32).
        beta_fast: f64,
        /// Frequencies that turn less often than this are divided by `factor` (gpt-oss: 1).
        beta_slow: f64,
        /// Whether the ramp's ends are rounded outwards to whole dimensions (gpt-oss: no).
        truncate: bool,
        /// Factor on every cosine and sine; `None`: `0.1 ln(factor) + 1` (gpt-oss). DeepSeek-V3's two equal `mscale` make it 1.
        concentration: Option<f64>,
    },
}

/// Which elements of a head turn together. `d` is the number of rotary dimensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RopePairs {
    /// `i` and `i + d/2`: gpt-oss, Llama and most Hugging Face checkpoints.
    HalfSplit,
    /// `2i` and `2i + 1`: GPT-J, DeepSeek.
    Interleaved,
}

/// The angular frequencies of a model, in f64.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeFrequencies {
    inv_freq: Vec<f64>,
    concentration: f64,
}

impl RopeFrequencies {
    /// Frequencies of `rotary_dim` rotary dimensions: `1/f_i` with `f_i = theta^(2i / rotary_dim)`, scaled.
    ///
    /// YaRN: `ramp_i / (factor f_i) + (1 - ramp_i) / f_i`, `ramp_i = clamp((i - low) / (high - low), 0, 1)`, where
    /// `low` and `high` are `rotary_dim/2 * ln(original_context / (2 pi beta)) / ln theta` for `beta_fast` and `beta_slow`, `low`
    /// at least 0, `high` at most `rotary_dim - 1` and at least 0.001 above `low`, as the paper's reference code does.
    ///
    /// # Errors
    /// [`Error::Empty`] or [`Error::Multiple`] unless `rotary_dim` is even and above 0; [`Error::Value`] unless `theta > 1` and
    /// the scaling is as its fields say; [`Error::Overflow`] if there is no memory for that many frequencies.
    pub fn new(theta: f64, rotary_dim: usize, scaling: RopeScaling) -> Result<Self> {
        if rotary_dim == 0 {
            return Err(Error::Empty { operand: "rope".into(), axis: "rotary_dim" });
        }
        multiple("rope", "rotary_dim", rotary_dim, 2)?;
        parameter("rope theta", theta, theta.is_finite() && theta > 1.0, "a finite number above 1")?;
        check(scaling)?;
        let ramp = Ramp::new(theta, rotary_dim, scaling);
        let mut inv_freq = Vec::new();
        reserve(TABLE, &mut inv_freq, rotary_dim / 2)?;
        inv_freq.extend((0..rotary_dim / 2).map(|i| {
            let f = libm::pow(theta, 2.0 * i as f64 / rotary_dim as f64);
            match scaling {
                RopeScaling::None => 1.0 / f,
                RopeScaling::Linear { factor } => 1.0 / (factor * f),
                RopeScaling::Yarn { factor, .. } => ramp.at(i) / (factor * f) + (1.0 - ramp.at(i)) / f,
            }
        }));
        let concentration = match scaling {
            RopeScaling::Yarn { factor, concentration, .. } => concentration.unwrap_or(0.1 * libm::log(factor) + 1.0),
            _ => 1.0,
        };
        Ok(RopeFrequencies { inv_freq, concentration })
    }

    /// Radians per position of each pair, `rotary_dim / 2` of them.
    pub fn inv_freq(&self) -> &[f64] {
        &self.inv_freq
    }

    /// Factor on every cosine and sine, so that queries times keys grow by its square.
    pub fn concentration(&self) -> f64 {
        self.concentration
    }

    /// Number of rotary dimensions.
    pub fn rotary_dim(&self) -> usize {
        2 * self.inv_freq.len()
    }
}

fn check(scaling: RopeScaling) -> Result<()> {
    match scaling {
        RopeScaling::None => Ok(()),
        RopeScaling::Linear { factor } => {
            parameter("rope factor", factor, factor.is_finite() && factor > 0.0, "a finite number above 0")
        }
        RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, truncate: _, concentration } => {
            parameter("rope factor", factor, factor.is_finite() && factor >= 1.0, "a finite number of at least 1")?;
            parameter("rope original_context", original_context.into(), original_context > 0, "at least 1 token")?;
            parameter(
                "rope beta_slow",
                beta_slow,
                beta_slow.is_finite() && beta_slow > 0.0,
                "a finite number above 0",
            )?;
            let above = beta_fast.is_finite() && beta_fast > beta_slow;
            parameter("rope beta_fast", beta_fast, above, "a finite number above beta_slow")?;
            let concentration = concentration.unwrap_or(1.0);
            let positive = concentration.is_finite() && concentration > 0.0;
            parameter("rope concentration", concentration, positive, "a finite number above 0")
        }
    }
}

/// From which pair YaRN begins to slow frequencies down, and from which it slows them fully.
struct Ramp {
    low: f64,
    high: f64,
}

impl Ramp {
    fn new(theta: f64, rotary_dim: usize, scaling: RopeScaling) -> Self {
        let RopeScaling::Yarn { original_context, beta_fast, beta_slow, truncate, .. } = scaling else {
            return Ramp { low: 0.0, high: 1.0 };
        };
        let d = rotary_dim as f64;
        let pair =
            |turns: f64| d / 2.0 * libm::log(f64::from(original_context) / (2.0 * PI * turns)) / libm::log(theta);
        let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        // A ramp that begins past the last pair slows none down, wherever it begins: also at infinity, where it has no slope.
        let low = low.clamp(0.0, d);
        Ramp { low, high: high.min(d - 1.0).max(low + 0.001) }
    }

    fn at(&self, i: usize) -> f64 {
        ((i as f64 - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
    }
}

/// Cosines and sines of a batch of tokens' positions: computed once for a forward step, used by every layer.
///
/// ```
/// # use trn_kernels::{Cpu, HeadsMut, layer::*};
/// let frequencies = RopeFrequencies::new(150_000.0, 64, RopeScaling::None)?;
/// let mut table = RopeTable::default();
/// table.fill(&frequencies, &[7, 8])?;
/// let mut q = vec![1.0f32; 2 * 4 * 64];
/// table.apply(&Cpu::detect(), RopePairs::HalfSplit, HeadsMut::new(&mut q, 2, 4, 64)?)?;
/// # Ok::<(), trn_kernels::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RopeTable {
    tokens: usize,
    half: usize,
    /// For each token `half` cosines, then `half` sines.
    cos_sin: Vec<f32>,
}

impl RopeTable {
    /// Replaces the contents by the angles of `positions`. Allocates only when the batch is larger than any before.
    ///
    /// `angle = position * inv_freq`, its cosine and sine times the concentration, all in f64, rounded once to f32. For
    /// positions up to 2^31 the f64 angle is within 2^-21 radians.
    ///
    /// # Errors
    /// [`Error::Overflow`] if there is no memory for the table; it is empty then.
    pub fn fill(&mut self, frequencies: &RopeFrequencies, positions: &[u32]) -> Result<()> {
        (self.tokens, self.half) = (0, 0);
        self.cos_sin.clear();
        reserve(TABLE, &mut self.cos_sin, mul(TABLE, positions.len(), frequencies.rotary_dim())?)?;
        for &position in positions {
            let angle = |inv_freq: &f64| f64::from(position) * inv_freq;
            let scaled = |x: f64| (x * frequencies.concentration) as f32;
            self.cos_sin.extend(frequencies.inv_freq.iter().map(|w| scaled(libm::cos(angle(w)))));
            self.cos_sin.extend(frequencies.inv_freq.iter().map(|w| scaled(libm::sin(angle(w)))));
        }
        (self.tokens, self.half) = (positions.len(), frequencies.inv_freq.len());
        Ok(())
    }

    /// Number of tokens the table holds.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Number of rotary dimensions.
    pub fn rotary_dim(&self) -> usize {
        2 * self.half
    }

    /// Cosines and sines of token `t`, `rotary_dim / 2` of each, or `None` if there is no such token.
    pub fn cos_sin(&self, t: usize) -> Option<(&[f32], &[f32])> {
        if t >= self.tokens {
            return None;
        }
        let row = self.cos_sin.get(t * 2 * self.half..(t + 1) * 2 * self.half)?;
        row.split_at_checked(self.half)
    }

    /// Turns every head of token t by the angles of token t, in place.
    ///
    /// `heads`: `[tokens, heads, head_dim]`, queries or keys. Elements from `rotary_dim` on stay as they are. In f32, for a pair
    /// `(x, y)`: `x' = fma(x, cos, -(y * sin))`, `y' = fma(y, cos, x * sin)`, rounded once to `T`.
    ///
    /// Error bound, besides that of the angle and the rounding to `T`: `3.01 u (|x cos| + |y sin|)` for x', and likewise for y'.
    ///
    /// # Errors
    /// [`Error::Extent`] unless the table holds as many tokens, and a head at least `rotary_dim` elements.
    pub fn apply<T: Real>(&self, cpu: &Cpu<'_>, pairs: RopePairs, mut heads: HeadsMut<'_, T>) -> Result<()> {
        extent("rope table", "tokens", self.tokens, heads.tokens())?;
        if heads.head_dim() < self.rotary_dim() {
            let (got, needed) = (heads.head_dim(), self.rotary_dim());
            return Err(Error::Extent { operand: "rope heads".into(), axis: "head_dim", got, needed });
        }
        let head_dim = heads.head_dim();
        rows::tokens(cpu, &mut heads, &Rotate { table: self, pairs, head_dim });
        Ok(())
    }
}

struct Rotate<'a> {
    table: &'a RopeTable,
    pairs: RopePairs,
    head_dim: usize,
}

impl<T: Real> RowKernel<T> for Rotate<'_> {
    #[inline(always)]
    fn row(&self, t: usize, token: &mut [T]) {
        let Some((cos, sin)) = self.table.cos_sin(t) else { return };
        let angles = || cos.iter().zip(sin);
        for head in token.chunks_exact_mut(self.head_dim.max(1)) {
            let (head, _) = head.split_at_mut(2 * cos.len());
            match self.pairs {
                RopePairs::HalfSplit => {
                    let (first, second) = head.split_at_mut(cos.len());
                    for ((x, y), (cos, sin)) in first.iter_mut().zip(second).zip(angles()) {
                        (*x, *y) = rotated(*x, *y, *cos, *sin);
                    }
                }
                RopePairs::Interleaved => {
                    for (pair, (cos, sin)) in head.chunks_exact_mut(2).zip(angles()) {
                        (pair[0], pair[1]) = rotated(pair[0], pair[1], *cos, *sin);
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn rotated<T: Real>(x: T, y: T, cos: f32, sin: f32) -> (T, T) {
    let (x, y) = (x.to_f32(), y.to_f32());
    (rounded(x.mul_add(cos, -(y * sin))), rounded(y.mul_add(cos, x * sin)))
}
