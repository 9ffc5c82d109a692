//! The functions of `num::math` against f64, over every exponent of f32: each 61st input by default (and all of them around each
//! threshold), every input with `TRN_KERNELS_EXHAUSTIVE=1` (use `--release`: some minutes).
#![forbid(unsafe_code)]

use trn_kernels::num::math::{self, EXP_ULP, LN_ULP, SIGMOID_ULP, TANH_ULP};

/// 2^-126.
const MIN_NORMAL: f64 = f32::MIN_POSITIVE as f64;

/// Prime, so that the low bits of the inputs take all values.
const STRIDE: u64 = 61;

/// Inputs on either side of a threshold that are all visited.
const NEAR: i64 = 4096;

fn inputs(thresholds: &[f32]) -> impl Iterator<Item = f32> {
    let stride = if std::env::var_os("TRN_KERNELS_EXHAUSTIVE").is_some_and(|v| !v.is_empty()) { 1 } else { STRIDE };
    let special = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN, f32::MAX, f32::MIN];
    let smallest = [f32::MIN_POSITIVE, -f32::MIN_POSITIVE, f32::from_bits(1), -f32::from_bits(1)];
    let near: Vec<f32> = thresholds
        .iter()
        .flat_map(|t| (-NEAR..=NEAR).map(|d| f32::from_bits((i64::from(t.to_bits()) + d) as u32)))
        .collect();
    let all = (0..1u64 << 32).step_by(stride as usize).map(|bits| f32::from_bits(bits as u32));
    special.into_iter().chain(smallest).chain(near).chain(all)
}

/// Distance of `got` from `want` in ulp of `want`.
fn ulps(got: f32, want: f64) -> f64 {
    let exponent = ((want.to_bits() >> 52 & 0x7FF) as i32 - 1023).max(-126);
    // 2^(23 - exponent) is a normal f64.
    (f64::from(got) - want).abs() * f64::from_bits(((23 - exponent + 1023) as u64) << 52)
}

/// What is wrong with `f` at `x`: `None` if it keeps its promise.
///
/// Values beyond f32 are infinite, values below its normal numbers zero with their sign, NaN stays NaN.
fn fault(f: impl Fn(f32) -> f32, exact: impl Fn(f64) -> f64, bound: f64, x: f32) -> Option<String> {
    let (got, want) = (f(x), exact(f64::from(x)));
    let kept = if want.is_nan() {
        got.is_nan()
    } else if want.abs() < MIN_NORMAL {
        got == 0.0
    } else if got.is_infinite() {
        // Right where the value rounds to infinity.
        (want as f32) == got
    } else {
        ulps(got, want) <= bound
    };
    (!kept).then(|| format!("x = {x:e} ({:#010x}): got {got:e}, exact {want:e}, {} ulp", x.to_bits(), ulps(got, want)))
}

fn assert_bound(f: impl Fn(f32) -> f32, exact: impl Fn(f64) -> f64, bound: f64, thresholds: &[f32]) {
    let mut visited = 0u64;
    let mut worst = (0.0, 0.0);
    for x in inputs(thresholds) {
        visited += 1;
        if let Some(fault) = fault(&f, &exact, bound, x) {
            panic!("{fault}");
        }
        let want = exact(f64::from(x));
        if want.is_finite() && want.abs() >= MIN_NORMAL && f(x).is_finite() {
            let distance = ulps(f(x), want);
            if distance > worst.0 {
                worst = (distance, x);
            }
        }
    }
    println!("{visited} inputs, at most {} ulp, at {:e}", worst.0, worst.1);
    // The bound is not idle: the sweep comes near it.
    assert!(worst.0 > 0.9 * bound, "bound {bound} ulp, but at most {} seen", worst.0);
}

#[test]
fn exp_is_within_its_bound() {
    let thresholds = [-87.336_54, 88.722_83, -90.0, 90.0, -104.0, 0.346_573_6, -0.346_573_6, 1.0, -1.0];
    assert_bound(math::exp, libm::exp, EXP_ULP, &thresholds);
}

#[test]
fn exp_special_values() {
    assert!(math::exp(f32::NAN).is_nan() && math::exp(-f32::NAN).is_nan());
    assert_eq!(math::exp(f32::INFINITY), f32::INFINITY);
    assert_eq!(math::exp(f32::NEG_INFINITY).to_bits(), 0);
    assert_eq!(math::exp(-200.0).to_bits(), 0);
    assert_eq!((math::exp(0.0), math::exp(-0.0)), (1.0, 1.0));
    // ln 2^-126 = -87.336544750553; its neighbours in f32 are -87.33655 and -87.33654.
    let below = -87.336_55f32;
    let above = f32::from_bits(below.to_bits() - 1);
    assert!(f64::from(below) < -87.336_544_750_553 && f64::from(above) > -87.336_544_750_553);
    assert_eq!(math::exp(below).to_bits(), 0);
    assert!(math::exp(above) >= f32::MIN_POSITIVE);
    // ln f32::MAX = 88.722839052068.
    let below = 88.722_83f32;
    let above = f32::from_bits(below.to_bits() + 1);
    assert!(f64::from(below) < 88.722_839_052_068 && f64::from(above) > 88.722_839_052_068);
    assert!(math::exp(below).is_finite());
    assert_eq!(math::exp(above), f32::INFINITY);
}

#[test]
fn softmax_exp_is_exp_above_its_floor() {
    for d in -NEAR..=NEAR {
        let x = f32::from_bits((i64::from(math::SOFTMAX_FLOOR.to_bits()) + d) as u32);
        let want = if x < math::SOFTMAX_FLOOR { 0.0 } else { math::exp(x) };
        assert_eq!(math::softmax_exp(x).to_bits(), want.to_bits(), "{x:e}");
    }
    assert!(math::softmax_exp(f32::NAN).is_nan());
    assert_eq!(math::softmax_exp(f32::NEG_INFINITY).to_bits(), 0);
    assert!(math::exp(math::SOFTMAX_FLOOR) < 2f32.powi(-59) && math::exp(math::SOFTMAX_FLOOR) > 2f32.powi(-61));
}

#[test]
fn sigmoid_is_within_its_bound() {
    let thresholds = [-87.336_54, 87.336_54, 88.722_83, -88.722_83, 16.635_7, -16.635_7];
    assert_bound(math::sigmoid, |x| 1.0 / (1.0 + libm::exp(-x)), SIGMOID_ULP, &thresholds);
}

#[test]
fn tanh_is_within_its_bound_and_odd() {
    assert_bound(math::tanh, libm::tanh, TANH_ULP, &[0.625, -0.625, 9.0, -9.0, 44.36, 45.0, f32::MIN_POSITIVE]);
    for x in [0.0, 1e-40, f32::MIN_POSITIVE, 0.1, 0.624_999_9, 0.625, 3.0, 100.0, f32::INFINITY] {
        assert_eq!(math::tanh(-x).to_bits(), (-math::tanh(x)).to_bits(), "{x:e}");
    }
    assert_eq!(math::tanh(f32::INFINITY), 1.0);
    assert_eq!(math::tanh(-1e-40).to_bits(), (-0.0f32).to_bits());
}

#[test]
fn ln_is_within_its_bound() {
    assert_bound(math::ln, f64::ln, LN_ULP, &[1.0, 2.0, 0.5, f32::MIN_POSITIVE]);
    assert_eq!(math::ln(0.0), f32::NEG_INFINITY);
    assert_eq!(math::ln(1.0).to_bits(), 0);
    assert!(math::ln(-1.0).is_nan());
    assert_eq!(math::ln(f32::INFINITY), f32::INFINITY);
}

/// The check itself: a function one part in a million off, and ones that miss a special value, are found out.
#[test]
fn the_bound_check_catches_wrong_functions() {
    let wrong = |f: fn(f32) -> f32| inputs(&[]).step_by(9973).any(|x| fault(f, libm::exp, EXP_ULP, x).is_some());
    assert!(!wrong(math::exp));
    assert!(wrong(|x| math::exp(x) * (1.0 + 2f32.powi(-20))));
    assert!(wrong(|x| if x.is_nan() { 0.0 } else { math::exp(x) }));
    assert!(wrong(|x| math::exp(x).min(f32::MAX)), "no infinity");
    assert!(wrong(|x| if x < -87.336_54 { f32::MIN_POSITIVE } else { math::exp(x) }), "no zero");
}

#[test]
fn floor_and_ceil_log2_are_exact_for_every_exponent() {
    for x in inputs(&[]) {
        let (floor, ceil) = (math::floor_log2(x), math::ceil_log2(x));
        if x == 0.0 || !x.is_finite() {
            assert_eq!((floor, ceil), (None, None), "{x:e}");
            continue;
        }
        // Every f32 but zero is normal in f64, so its exponent field says it all.
        let bits = f64::from(x.abs()).to_bits();
        let exponent = (bits >> 52) as i32 - 1023;
        let above = i32::from(bits & ((1 << 52) - 1) != 0);
        assert_eq!((floor, ceil), (Some(exponent), Some(exponent + above)), "{x:e}");
    }
}
