//! The comparisons that golden tests of quantized data rest on. Each gives the places that differ, so that the planted-bug
//! tests can ask whether a comparison notices.
#![forbid(unsafe_code)]
#![allow(dead_code)] // each test binary uses its part

use trn_kernels::num::Format;
use trn_kernels::quant::QuantizedMatrix;

/// No position: what a comparison that holds gives.
pub(crate) const NONE: [usize; 0] = [];

/// Positions where two code planes differ, among those that `compare` admits.
pub(crate) fn codes(got: &[u8], want: &[u8], compare: impl Fn(usize) -> bool) -> Vec<usize> {
    assert_eq!(got.len(), want.len(), "code planes of different sizes");
    (0..got.len()).filter(|&i| compare(i) && got[i] != want[i]).collect()
}

/// Positions where codes differ, but that any NaN code may stand for any other.
pub(crate) fn codes_by_class(format: Format, got: &[u8], want: &[u8]) -> Vec<usize> {
    let both_nan = |i: usize| format.decode(got[i]).is_nan() && format.decode(want[i]).is_nan();
    codes(got, want, |_| true).into_iter().filter(|&i| !both_nan(i)).collect()
}

/// Positions where two f32 planes differ in any bit; any NaN equals any other.
pub(crate) fn bits(got: &[f32], want: &[f32]) -> Vec<usize> {
    assert_eq!(got.len(), want.len(), "planes of different sizes");
    let same = |i: usize| got[i].to_bits() == want[i].to_bits() || (got[i].is_nan() && want[i].is_nan());
    (0..got.len()).filter(|&i| !same(i)).collect()
}

/// Positions where the dequantized f32 values of a matrix differ in any bit from `want`.
pub(crate) fn dequantized(matrix: &QuantizedMatrix<'_>, want: &[f32]) -> Vec<usize> {
    let mut got = vec![0.0; want.len()];
    matrix.dequantize_f32(&mut got).unwrap();
    bits(&got, want)
}

/// Positions where the exact values of a matrix differ from `want`; any NaN equals any other.
pub(crate) fn exact_values(matrix: &QuantizedMatrix<'_>, want: &[f64]) -> Vec<usize> {
    let got = values(matrix);
    assert_eq!(got.len(), want.len(), "planes of different sizes");
    (0..got.len()).filter(|&i| got[i] != want[i] && !(got[i].is_nan() && want[i].is_nan())).collect()
}

/// The exact values of a matrix, row-major.
pub(crate) fn values(matrix: &QuantizedMatrix<'_>) -> Vec<f64> {
    let at = |row| (0..matrix.k()).map(move |col| matrix.value(row, col).unwrap());
    (0..matrix.n()).flat_map(at).collect()
}

/// The codes of a matrix, one per byte, row-major.
pub(crate) fn unpacked(matrix: &QuantizedMatrix<'_>) -> Vec<u8> {
    let at = |row| (0..matrix.k()).map(move |col| matrix.code(row, col).unwrap() as u8);
    (0..matrix.n()).flat_map(at).collect()
}

/// Elements farther from `x` than NVFP4 allows: 0.18 of the block's amax, in blocks that no clamp on the scale can touch.
///
/// Such a block's amax is at least 2^-14 * 4/7 = 1 / 28672 of the tensor's: its scale is a normal E4M3 number. The scale is amax
/// / 6 rounded to 4 significant bits, so at most 17/16 of it; within the grid an element is at most one scale off (half of the
/// widest step, 4 to 6), beyond it at most 6 / (15/16) - 6 = 0.4. So 17/16 / 6 = 0.178 of amax; the f32 operations on the way
/// add about 2^-22.
pub(crate) fn beyond_nvfp4_error(matrix: &QuantizedMatrix<'_>, x: &[f32]) -> Vec<usize> {
    let values = values(matrix);
    assert_eq!(values.len(), x.len(), "planes of different sizes");
    let amax = |x: &[f32]| f64::from(x.iter().fold(0.0f32, |m, x| m.max(x.abs())));
    let smallest = amax(x) / 28672.0 * 1.001;
    let outside = |&i: &usize| {
        let block = amax(&x[i / 16 * 16..][..16]);
        let error = (values[i] - f64::from(x[i])).abs();
        block >= smallest && (error.is_nan() || error > block * 0.18)
    };
    (0..x.len()).filter(outside).collect()
}
