//! When no subnormal can arise, so that the flush to zero need not be looked for.
#![forbid(unsafe_code)]

/// Exponents of the smallest non-zero magnitude seen: what [`flush_free`] needs to know of an operand.
///
/// Proof. Let every non-zero element of one operand be a multiple of `2^p` and of the other a multiple of `2^q`. Each product
/// is a multiple of `2^(p+q)`, and so is every exact sum of them. Rounding to 24 bits keeps a multiple of `2^(p+q)` one (it only
/// moves to a coarser grid). So by induction every chain, their sum and the accumulator hold zero or at least `2^(p+q)` in
/// magnitude: with `p + q >= -126` nothing subnormal but zero ever appears, and flushing is the identity.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Smallest {
    /// Smallest non-zero magnitude; infinity if there is none.
    magnitude: f32,
    /// Bits after the leading one that elements can have.
    mantissa_bits: i32,
}

impl Smallest {
    /// Nothing seen yet, of elements exact in bf16.
    pub(crate) const BF16: Smallest = Smallest { magnitude: f32::INFINITY, mantissa_bits: 7 };
    /// Nothing seen yet, of arbitrary f32 elements.
    pub(crate) const F32: Smallest = Smallest { magnitude: f32::INFINITY, mantissa_bits: 23 };

    /// Elements that are multiples of `2^exponent`.
    pub(crate) fn grid_of(exponent: i32) -> Smallest {
        Smallest { magnitude: 1.0, mantissa_bits: -exponent }
    }

    /// Takes in more elements. NaN and infinities do not matter: they never become subnormal.
    #[inline(always)]
    pub(crate) fn see(&mut self, values: &[f32]) {
        // Magnitudes order as their bits do; less one, zero wraps to the top. Integers, because this reduction vectorises.
        let bits = |v: f32| (v.to_bits() & 0x7FFF_FFFF).wrapping_sub(1);
        let smallest = values.iter().fold(bits(self.magnitude), |s, &v| s.min(bits(v)));
        self.magnitude = f32::from_bits(smallest.wrapping_add(1));
    }

    /// Takes in what another has seen.
    pub(crate) fn merge(self, other: Smallest) -> Smallest {
        Smallest {
            magnitude: self.magnitude.min(other.magnitude),
            mantissa_bits: self.mantissa_bits.max(other.mantissa_bits),
        }
    }

    /// Exponent of the grid all elements lie on; `None` if all are zero.
    pub(crate) fn grid(self) -> Option<i32> {
        crate::num::math::floor_log2(self.magnitude).map(|e| e - self.mantissa_bits)
    }
}

/// What an operand's magnitudes are between: what tells which shortcuts keep every bit (docs/numerics.md, section 2).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Range {
    pub(crate) smallest: Smallest,
    /// Bits of the largest magnitude; beyond those of infinity if there was a NaN.
    largest: u32,
}

impl Range {
    /// Nothing seen yet.
    pub(crate) fn new(smallest: Smallest) -> Range {
        Range { smallest, largest: 0 }
    }

    /// Takes in more elements.
    #[inline(always)]
    pub(crate) fn see(&mut self, values: &[f32]) {
        self.smallest.see(values);
        self.largest = values.iter().fold(self.largest, |m, v| m.max(v.to_bits() & 0x7FFF_FFFF));
    }

    /// Takes in what another has seen.
    pub(crate) fn merge(self, other: Range) -> Range {
        Range { smallest: self.smallest.merge(other.smallest), largest: self.largest.max(other.largest) }
    }

    /// The least e with all magnitudes below `2^e`; 128 or more with infinities or NaN.
    pub(crate) fn top(self) -> i32 {
        (self.largest >> 23) as i32 - 126 + i32::from(self.largest >= 0x7F80_0000)
    }
}

/// Subnormals become zero of their sign; NaN stays.
#[inline(always)]
pub(crate) fn flush(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0.0f32.copysign(x) } else { x }
}

/// Whether no sum of products of elements of `a` and `b` can be subnormal.
pub(crate) fn flush_free(a: Smallest, b: Smallest) -> bool {
    match (a.grid(), b.grid()) {
        (Some(p), Some(q)) => p + q >= -126,
        // An operand of zeros (or of infinities and NaN alone) makes no subnormal.
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(kind: Smallest, values: &[f32]) -> Smallest {
        let mut s = kind;
        s.see(values);
        s
    }

    #[test]
    fn edge_of_the_proof() {
        // Grids 2^(-56-7) each: products are multiples of 2^-126.
        let a = of(Smallest::BF16, &[0.0, 2f32.powi(-56), 1.0, f32::NAN]);
        assert!(flush_free(a, a));
        let b = of(Smallest::BF16, &[-(2f32.powi(-57))]);
        assert!(!flush_free(a, b));
        assert!(flush_free(of(Smallest::F32, &[0.0]), b));
        assert!(!flush_free(of(Smallest::F32, &[2f32.powi(-56)]), a));
        assert!(flush_free(Smallest::grid_of(-63), a) && !flush_free(Smallest::grid_of(-64), a));
        assert!(flush_free(Smallest::grid_of(40), a));
    }

    #[test]
    fn tops() {
        let top = |values: &[f32]| {
            let mut range = Range::new(Smallest::F32);
            range.see(values);
            range.top()
        };
        assert_eq!([top(&[1.0, -0.5]), top(&[-1.99]), top(&[2.0]), top(&[f32::MAX])], [1, 1, 2, 128]);
        assert!(top(&[0.0]) <= -126 && top(&[f32::NEG_INFINITY]) > 128 && top(&[1.0, f32::NAN]) > 128);
    }
}
