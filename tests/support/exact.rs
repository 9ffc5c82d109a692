//! Outputs judged against exact values with derived bounds.
#![allow(dead_code)] // each test binary uses its part

use trn_kernels::num::Real;

/// Unit roundoff of f32.
pub(crate) const U: f64 = 1.0 / (1u64 << 24) as f64;

/// What is right: the exact value, and how far f32 arithmetic may be from it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Exact {
    pub(crate) value: f64,
    pub(crate) bound: f64,
}

/// Unit roundoff of rounding an f32 to `T`, and half its smallest subnormal.
fn rounding<T: Real>() -> (f64, f64) {
    match T::NAME {
        "f32" => (0.0, 2f64.powi(-150)),
        "bf16" => (2f64.powi(-8), 2f64.powi(-134)),
        "f16" => (2f64.powi(-11), 2f64.powi(-25)),
        other => panic!("{other}"),
    }
}

/// The first output outside its bound, if any.
pub(crate) fn judge<T: Real>(got: &[T], exact: &[Exact]) -> Result<(), String> {
    assert_eq!(got.len(), exact.len());
    let (relative, absolute) = rounding::<T>();
    for (i, (got, exact)) in got.iter().zip(exact).enumerate() {
        let got = f64::from(got.to_f32());
        let bound = exact.bound + relative * (exact.value.abs() + exact.bound) + absolute;
        let right = if exact.value.is_nan() { got.is_nan() } else { (got - exact.value).abs() <= bound };
        if !right {
            return Err(format!("output {i} is {got:e}, exact {:e}, bound {bound:e}", exact.value));
        }
    }
    Ok(())
}

/// The values' bits in f32, to compare with.
pub(crate) fn bits<T: Real>(y: &[T]) -> Vec<u32> {
    y.iter().map(|v| v.to_f32().to_bits()).collect()
}

/// Rounded to `T`.
pub(crate) fn cast<T: Real>(x: &[f32]) -> Vec<T> {
    x.iter().map(|v| T::from_f32(*v)).collect()
}

/// As f64, exactly.
pub(crate) fn wide<T: Real>(x: &[T]) -> Vec<f64> {
    x.iter().map(|v| f64::from(v.to_f32())).collect()
}

/// Runs the body with `T` as each of the three types.
macro_rules! for_each_type {
    ($t:ident => $body:block) => {{
        {
            type $t = f32;
            $body
        }
        {
            type $t = half::bf16;
            $body
        }
        {
            type $t = half::f16;
            $body
        }
    }};
}

pub(crate) use for_each_type;
