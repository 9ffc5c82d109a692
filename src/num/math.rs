//! The functions whose bits the crate promises: one polynomial `exp` for every tier, and what is made of it.
//!
//! Only IEEE additions, multiplications, divisions and fused multiply-adds are used, in a fixed order, so every machine gives
//! the same bits. Bounds are asserted over all inputs by `tests/math.rs`.
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

/// `e^x`, at most 1 ulp from the true value; below `ln 2^-126` the result is +0, above `ln f32::MAX` infinity; NaN gives NaN.
///
/// Cody-Waite reduction by ln 2 in two parts, then the degree-5 polynomial of Cephes `expf` on `[-ln2/2, ln2/2]`.
#[inline]
pub fn exp(x: f32) -> f32 {
    // Adding and taking away 1.5 * 2^23 rounds to the nearest integer.
    const ROUND: f32 = 12_582_912.0;
    // Clamped so that the integer stays in range; the comparisons below give the true result outside.
    let y = if x < -90.0 { -90.0 } else { x };
    let y = if y > 90.0 { 90.0 } else { y };
    let n = y.mul_add(std::f32::consts::LOG2_E, ROUND) - ROUND;
    let r = n.mul_add(-0.693_359_4, y);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = 1.987_569_1e-4f32;
    let p = p.mul_add(r, 1.398_2e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 5.000_000_1e-1);
    let e = (r * r).mul_add(p, r) + 1.0;
    // 2^n in two factors: n reaches 128 and -127, each half stays a normal power.
    let half = (n * 0.5).floor();
    let scaled = e * power_of_two(half) * power_of_two(n - half);
    if x < -87.336_54 {
        0.0
    } else if x > 88.722_83 {
        f32::INFINITY
    } else if x.is_nan() {
        f32::NAN
    } else {
        scaled
    }
}

/// `2^n` for an integer `n` in -126..=127.
#[inline]
fn power_of_two(n: f32) -> f32 {
    f32::from_bits(((n as i32 + 127) as u32) << 23)
}

/// `e^x` for softmax: as [`exp`], but zero below [`SOFTMAX_FLOOR`].
#[inline]
pub fn softmax_exp(x: f32) -> f32 {
    if x < SOFTMAX_FLOOR { 0.0 } else { exp(x) }
}

/// `1 / (1 + e^-x)`.
#[inline]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `tanh x`: the Cephes `tanhf` polynomial below 0.625, `1 - 2 / (e^2x + 1)` above.
#[inline]
pub fn tanh(x: f32) -> f32 {
    let a = x.abs();
    if a < 0.625 {
        let s = x * x;
        let p = -5.704_988_7e-3f32;
        let p = p.mul_add(s, 2.063_908_9e-2);
        let p = p.mul_add(s, -5.373_971_6e-2);
        let p = p.mul_add(s, 1.333_144_2e-1);
        let p = p.mul_add(s, -3.333_328_2e-1);
        (p * s).mul_add(x, x)
    } else {
        let t = 1.0 - 2.0 / (exp(2.0 * a) + 1.0);
        if x.is_nan() { f32::NAN } else { t.copysign(x) }
    }
}

/// Natural logarithm, rounded from `libm`'s f64 (the same on every machine).
pub fn ln(x: f32) -> f32 {
    libm::log(x as f64) as f32
}
