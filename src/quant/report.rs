//! What a quantization lost.
#![forbid(unsafe_code)]

use super::matrix::QuantizedMatrix;
use crate::error::{Result, extent};
use crate::num::Real;
use crate::view::MatRef;
use half::bf16;

/// The error of a quantized matrix against its original, in the original's unit. Sums are in f64.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QuantizationError {
    /// Largest `|x - q|`.
    pub max_abs: f64,
    /// Root of the mean of `(x - q)^2`.
    pub rms: f64,
    /// `10 log10(sum x^2 / sum (x - q)^2)`; infinite if nothing was lost.
    pub sqnr_db: f64,
    /// Elements whose `|x|` is more than the largest code can hold under their scales.
    pub clipped: usize,
    /// Elements compared: those that are finite in both matrices.
    pub compared: usize,
    /// Elements left out of all of the above because the original or the quantized one is NaN or infinite.
    pub non_finite: usize,
}

impl QuantizationError {
    /// Compares `quantized` with the `original` it came from, both `[n, k]`.
    ///
    /// # Errors
    /// [`Error::Extent`](crate::Error::Extent) if the shapes differ.
    pub fn measure<T: Real>(original: MatRef<'_, T>, quantized: &QuantizedMatrix<'_>) -> Result<Self> {
        extent("original", "n", original.rows(), quantized.n())?;
        extent("original", "k", original.cols(), quantized.k())?;
        let largest_code = quantized.scheme().element().map_or(bf16::MAX.to_f32(), |f| f.max());
        let mut report =
            QuantizationError { max_abs: 0.0, rms: 0.0, sqnr_db: 0.0, clipped: 0, compared: 0, non_finite: 0 };
        let (mut signal, mut noise) = (0.0, 0.0);
        // Without columns any number of rows fits any slice: do not walk them.
        let rows = if quantized.k() == 0 { 0 } else { quantized.n() };
        for row in 0..rows {
            for (col, x) in original.row(row).unwrap_or_default().iter().enumerate() {
                let x = f64::from(x.to_f32());
                let q = quantized.value(row, col).unwrap_or(f64::NAN);
                if !x.is_finite() || !q.is_finite() {
                    report.non_finite += 1;
                    continue;
                }
                let scale = |s: Option<f32>| f64::from(s.unwrap_or(f32::NAN)).abs();
                let scale = scale(quantized.block_scale(row, col)) * scale(quantized.outer_scale(row, col));
                let error = (x - q).abs();
                report.compared += 1;
                report.clipped += usize::from(x.abs() > f64::from(largest_code) * scale);
                report.max_abs = report.max_abs.max(error);
                signal += x * x;
                noise += error * error;
            }
        }
        if report.compared > 0 {
            report.rms = (noise / report.compared as f64).sqrt();
        }
        report.sqnr_db = if noise == 0.0 { f64::INFINITY } else { 10.0 * libm::log10(signal / noise) };
        Ok(report)
    }
}
