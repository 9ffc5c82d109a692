//! From the largest magnitude of a block to its power-of-two scale.
#![forbid(unsafe_code)]

use crate::num::math::{ceil_log2, floor_log2};
use crate::num::{E8M0, Format};

/// How the E8M0 scale of an MX block follows from the largest magnitude in it.
///
/// With `amax = 1.f x 2^E` and the element's `emax` (exponent of its largest value) and `M` (mantissa bits), each rule names
/// an exponent, which is then clamped to -127..=127. All of them give valid MX blocks; they differ in what happens to the
/// largest elements. Checkpoints hold scales: a rule is only for data that this crate quantizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ScaleRule {
    /// `E - emax`. OCP MX v1.0 section 6.3, torchao's default, microxcaling, GGUF, `quantize_mx` up to NKI 0.4.
    ///
    /// Elements above the largest value saturate: up to 12.5 % (FP8) or 25 % (FP4) of amax is lost.
    #[default]
    Floor,
    /// `E - emax`, one more unless amax is a power of two. torchao CEIL. Never saturates.
    Ceil,
    /// `ceil(log2(amax / max))`, the quotient in f32. NVIDIA (PTX `cvt.rp` ue8m0, cuBLAS, Transformer Engine), torchao RCEIL.
    /// Never saturates; the tightest rule of which that is true.
    Rceil,
    /// `E - emax`, one more if rounding amax to `M` mantissa bits carries: if `1.f >= 2 - 2^-(M+1)`. torchao EVEN.
    Even,
    /// [`Even`](ScaleRule::Even) with `M` = 1 for every element: one more if `1.f >= 1.75`. compressed-tensors, llm-compressor.
    CompressedTensors,
    /// `E - (emax - 1)`. `nisa.quantize_mx` of Trainium3 since NKI 0.5 (Neuron 2.31). Never saturates.
    Trainium,
}

impl ScaleRule {
    /// All of them.
    pub const ALL: [ScaleRule; 6] = [
        ScaleRule::Floor,
        ScaleRule::Ceil,
        ScaleRule::Rceil,
        ScaleRule::Even,
        ScaleRule::CompressedTensors,
        ScaleRule::Trainium,
    ];

    /// The scale of a block of `element`s whose largest magnitude is `|amax|`.
    ///
    /// Zero gives code 0 (2^-127); NaN and infinities give NaN. The exponent comes from the bits of amax, never from a
    /// rounded logarithm.
    pub fn scale(self, element: Format, amax: f32) -> E8M0 {
        let Some((exponent, fraction)) = split(amax) else {
            return if amax == 0.0 { E8M0::from_bits(0) } else { E8M0::NAN };
        };
        let floor = exponent - element.emax();
        E8M0::from_exponent(match self {
            ScaleRule::Floor => floor,
            ScaleRule::Ceil => floor + i32::from(fraction != 0),
            // A quotient that underflows to zero is below every scale.
            ScaleRule::Rceil => ceil_log2(amax.abs() / element.max()).unwrap_or(i32::MIN),
            ScaleRule::Even => floor + i32::from(carries(fraction, element.mantissa_bits())),
            ScaleRule::CompressedTensors => floor + i32::from(carries(fraction, 1)),
            ScaleRule::Trainium => floor + 1,
        })
    }
}

/// Bits of the fraction that [`split`] gives.
const FRACTION_BITS: u32 = 23;

/// `|x|` as `(E, f)` with `|x| = (1 + f / 2^23) 2^E`, subnormals normalized; `None` for zero, infinities and NaN.
fn split(x: f32) -> Option<(i32, u32)> {
    let exponent = floor_log2(x)?;
    let below_normal = (-126 - exponent).max(0);
    Some((exponent, (x.to_bits() << below_normal) & ((1 << FRACTION_BITS) - 1)))
}

/// Whether `1.fraction` rounded half up to `mantissa_bits` bits reaches 2.
fn carries(fraction: u32, mantissa_bits: u32) -> bool {
    let half_step = 1 << (FRACTION_BITS - 1 - mantissa_bits);
    fraction >= (1 << FRACTION_BITS) - half_step
}
