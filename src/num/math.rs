//! The functions whose bits the crate promises: one polynomial `exp` for every tier, and what is made of it.
//!
//! Only IEEE additions, multiplications, divisions and fused multiply-adds are used, in a fixed order, so every machine gives
//! the same bits. None returns a subnormal of its own making, and [`exp`], [`sigmoid`] and [`tanh`] read subnormals as zero, so
//! they may run where those are flushed. Monotony is not promised.
//!
//! The bounds were measured against f64 over all 2^32 inputs; `tests/math.rs` asserts them over a part of the inputs, and over
//! all with `TRN_KERNELS_EXHAUSTIVE=1`. An ulp is 2^(floor(log2 |true value|) - 23).
#![forbid(unsafe_code)]

/// `floor(log2 |x|)` from the bits, exact for subnormals too; `None` for zero, infinities and NaN.
pub const fn floor_log2(x: f32) -> Option<i32> {
    let magnitude = x.to_bits() & 0x7FFF_FFFF;
    if magnitude == 0 || magnitude >= 0x7F80_0000 {
        return None;
    }
    let field = (magnitude >> 23) as i32;
    if field > 0 { Some(field - 127) } else { Some(31 - magnitude.leading_zeros() as i32 - 149) }
}

/// `ceil(log2 |x|)` from the bits; `None` for zero, infinities and NaN.
pub const fn ceil_log2(x: f32) -> Option<i32> {
    let magnitude = x.to_bits() & 0x7FFF_FFFF;
    match floor_log2(x) {
        None => None,
        Some(e) => {
            let power = if e >= -126 { magnitude & 0x7F_FFFF == 0 } else { magnitude.is_power_of_two() };
            Some(e + !power as i32)
        }
    }
}

/// Softmax weights below `exp(SOFTMAX_FLOOR)` (about 2^-60) of the running maximum are zero.
///
/// Their sum over 2^30 tokens is below 2^-30 of the total; in exchange no product of a weight with a value of at least 2^-52
/// can be subnormal, which lets a tier skip the flush to zero (docs/numerics.md).
pub const SOFTMAX_FLOOR: f32 = -41.5;

/// Largest error of [`exp`], in ulp, where `e^x` is a normal number (measured 1.01035, at -5.8778844).
pub const EXP_ULP: f64 = 1.011;

/// Largest error of [`sigmoid`], in ulp, where its value is a normal number (measured 2.48074, at -16.635704).
pub const SIGMOID_ULP: f64 = 2.481;

/// Largest error of [`tanh`], in ulp, for normal `x` (measured 1.33033, at 0.62830955).
pub const TANH_ULP: f64 = 1.331;

/// Largest error of [`ln`], in ulp: half, and what is left of the f64's own error.
pub const LN_ULP: f64 = 0.5 + 1.0 / (1u64 << 28) as f64;

/// The smallest f32 above `ln 2^-126`: from here up `e^x` is a normal number.
const LN_MIN_NORMAL: f32 = -87.336_54;

/// The largest f32 below `ln f32::MAX`.
const LN_MAX: f32 = 88.722_83;

/// `e^x`, within [`EXP_ULP`]; below `ln 2^-126` the result is +0, above `ln f32::MAX` infinity; NaN gives NaN.
///
/// Cody-Waite reduction by ln 2 in two parts, then the polynomial of Cephes `expf` on `[-ln2/2, ln2/2]`.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Adding and taking away 1.5 * 2^23 rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    // Clamped so that the integer stays in range; the comparisons below give the true result outside.
    let y = if x < -90.0 { -90.0 } else { x };
    let y = if y > 90.0 { 90.0 } else { y };
    let rounded = y.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = n.mul_add(-0.693_359_4, y);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = 1.987_569_1e-4f32;
    let p = p.mul_add(r, 1.398_2e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let e = (r * r).mul_add(p, r) + 1.0;
    // 2^n in two factors: n reaches 128 and -127, each half stays a normal power.
    let n = (rounded.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    let scaled = e * power_of_two(half) * power_of_two(n.wrapping_sub(half));
    if x < LN_MIN_NORMAL {
        0.0
    } else if x > LN_MAX {
        f32::INFINITY
    } else if x.is_nan() {
        f32::NAN
    } else {
        scaled
    }
}

/// `2^n` for an integer `n` in -126..=127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// `e^x` for softmax: as [`exp`], but zero below [`SOFTMAX_FLOOR`].
#[inline(always)]
pub fn softmax_exp(x: f32) -> f32 {
    if x < SOFTMAX_FLOOR { 0.0 } else { exp(x) }
}

/// `1 / (1 + e^-x)`, within [`SIGMOID_ULP`]; below `ln 2^-126`, where the value would be subnormal, +0; NaN gives NaN.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    let s = 1.0 / (1.0 + exp(-x));
    if x < LN_MIN_NORMAL { 0.0 } else { s }
}

/// `tanh x`, within [`TANH_ULP`]; a subnormal `x` counts as zero with its sign; NaN gives NaN.
///
/// The Cephes `tanhf` polynomial below 0.625, `1 - 2 / (e^2x + 1)` above.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let a = x.abs();
    if a < f32::MIN_POSITIVE {
        0f32.copysign(x)
    } else if a < 0.625 {
        let s = x * x;
        let p = -5.704_988_7e-3f32;
        let p = p.mul_add(s, 2.063_909e-2);
        let p = p.mul_add(s, -5.373_971_6e-2);
        let p = p.mul_add(s, 1.333_144_2e-1);
        let p = p.mul_add(s, -3.333_328e-1);
        (p * s).mul_add(x, x)
    } else {
        let t = 1.0 - 2.0 / (exp(2.0 * a) + 1.0);
        if x.is_nan() { f32::NAN } else { t.copysign(x) }
    }
}

/// Natural logarithm, within [`LN_ULP`]: rounded from `libm`'s f64 (the same on every machine). Zero gives -infinity, negative
/// numbers and NaN give NaN.
pub fn ln(x: f32) -> f32 {
    libm::log(x as f64) as f32
}
