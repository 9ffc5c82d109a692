//! NVFP4: FP4 codes under an E4M3FN scale for each 16 and one f32 scale for the tensor.
#![forbid(unsafe_code)]

use super::encode::{amax, encode_with};
use super::scheme::GlobalScale;
use crate::error::{Error, Result, length};
use crate::num::{F4E2M1x2, F8E4M3Fn, Format, Overflow, Real};

/// Largest block scale times largest element: what amax of a tensor is mapped to.
const RANGE: f32 = F8E4M3Fn::MAX * F4E2M1x2::MAX;

/// The smallest f32 scale in use: a smaller quotient would lose bits or become zero.
const MIN_SCALE: f32 = f32::MIN_POSITIVE;

/// Whose NVFP4 quantizer to follow. All give valid NVFP4; they differ in blocks far smaller than the tensor's maximum, in the
/// rounding of the division, and in the sign of zero.
///
/// | | [`TorchAo`](Nvfp4Rule::TorchAo) | [`CompressedTensors`](Nvfp4Rule::CompressedTensors) | [`ModelOpt`](Nvfp4Rule::ModelOpt) |
/// | --- | --- | --- | --- |
/// | global scale | `g = amax / 2688` | divisor `G = 2688 / amax` | `g = amax / 2688` |
/// | block scale `s` | `e4m3(max(2^-6, amax / 6 / g))` | `e4m3(G * (amax / 6))` | `e4m3(amax / 6 / g)` |
/// | if it is zero | cannot be | 0.125, after rounding | 1.0 if zero before rounding |
/// | code | `fp4(x * (1 / g / s))` | `fp4(x / (s / G))` | `fp4(x / (s * g))` |
/// | -0 | kept | +0 | +0 |
///
/// Every operation is in f32; `e4m3` and `fp4` round to nearest even and saturate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Nvfp4Rule {
    /// torchao `nvfp4_quantize`.
    TorchAo,
    /// compressed-tensors and llm-compressor.
    CompressedTensors,
    /// NVIDIA ModelOpt. A block whose scale rounds to zero has codes 0.
    #[default]
    ModelOpt,
}

impl Nvfp4Rule {
    /// All of them.
    pub const ALL: [Nvfp4Rule; 3] = [Nvfp4Rule::TorchAo, Nvfp4Rule::CompressedTensors, Nvfp4Rule::ModelOpt];

    /// The global scale of a tensor whose largest finite magnitude is `amax`.
    ///
    /// 1 if amax is zero or not finite. The multiplier is never below 2^-126, the smallest normal f32.
    pub fn global_scale(self, amax: f32) -> GlobalScale {
        if amax == 0.0 || !amax.is_finite() {
            return GlobalScale::ONE;
        }
        match self {
            Nvfp4Rule::TorchAo | Nvfp4Rule::ModelOpt => GlobalScale::multiplier((amax.abs() / RANGE).max(MIN_SCALE)),
            Nvfp4Rule::CompressedTensors => GlobalScale::divisor((RANGE / amax.abs()).min(1.0 / MIN_SCALE)),
        }
    }

    /// The scale of a block whose largest magnitude is `amax`; NaN if amax is not finite.
    fn block_scale(self, global: GlobalScale, amax: f32) -> F8E4M3Fn {
        /// The smallest normal E4M3FN, torchao's lower clamp.
        const TORCHAO_MIN: f32 = 0.015_625;
        /// What compressed-tensors writes for a scale of zero: the epsilon of E4M3.
        const COMPRESSED_TENSORS_EPS: F8E4M3Fn = F8E4M3Fn::from_f32(0.125, Overflow::Saturate);
        if !amax.is_finite() {
            return F8E4M3Fn::from_f32(f32::NAN, Overflow::Saturate);
        }
        let wanted = amax / F4E2M1x2::MAX;
        match self {
            Nvfp4Rule::TorchAo => encode_ue4m3((wanted / global.get()).max(TORCHAO_MIN)),
            Nvfp4Rule::CompressedTensors => match encode_ue4m3(global.get_divisor() * wanted) {
                zero if zero.to_bits() == 0 => COMPRESSED_TENSORS_EPS,
                scale => scale,
            },
            Nvfp4Rule::ModelOpt => {
                let scale = wanted / global.get();
                encode_ue4m3(if scale == 0.0 { 1.0 } else { scale })
            }
        }
    }
}

/// Quantizes one NVFP4 block: writes one 4-bit code per byte and gives the block's scale. value = code x scale x global scale.
///
/// `x` is the block, of any length (NVFP4 blocks are 16 long); `codes` is as long. A block with a NaN or an infinity in it has
/// the NaN scale (code 0x7F) and codes 0, so that all of its values decode to NaN.
///
/// # Errors
/// [`Error::Length`] if the slices differ in length; [`Error::Value`] unless the global multiplier is a positive normal
/// f32. Nothing is written then.
pub fn encode_nvfp4_block<T: Real>(
    rule: Nvfp4Rule,
    global: GlobalScale,
    x: &[T],
    codes: &mut [u8],
) -> Result<F8E4M3Fn> {
    length("block codes", codes.len(), x.len())?;
    check_global(global)?;
    let scale = rule.block_scale(global, amax(x));
    let s = scale.to_f32();
    let positive_zero = |x: f32| if x == 0.0 { 0.0 } else { x };
    match rule {
        _ if s.is_nan() || s == 0.0 => codes.fill(0),
        Nvfp4Rule::TorchAo => {
            let reciprocal = 1.0 / global.get() / s;
            encode_with(Format::E2M1, x, codes, |x| x * reciprocal);
        }
        Nvfp4Rule::CompressedTensors => {
            let step = s / global.get_divisor();
            encode_with(Format::E2M1, x, codes, |x| positive_zero(x / step));
        }
        Nvfp4Rule::ModelOpt => {
            let step = s * global.get();
            encode_with(Format::E2M1, x, codes, |x| positive_zero(x / step));
        }
    }
    Ok(scale)
}

/// Asks that a global scale be one that data can be divided by.
pub(crate) fn check_global(global: GlobalScale) -> Result<()> {
    let g = global.get();
    if g.is_normal() && g > 0.0 {
        return Ok(());
    }
    Err(Error::Value {
        operand: "global scale".into(),
        at: 0,
        got: g.to_string(),
        needed: "a positive normal multiplier",
    })
}

/// UE4M3, the type of NVFP4 block scales: the non-negative half of E4M3FN, nearest value, ties to even, at most 448.
///
/// Negative numbers and -0 give +0: the format has no sign. NaN gives NaN (0x7F).
pub fn encode_ue4m3(x: f32) -> F8E4M3Fn {
    let unsigned = if x.is_nan() {
        f32::NAN
    } else if x > 0.0 {
        x
    } else {
        0.0
    };
    F8E4M3Fn::from_f32(unsigned, Overflow::Saturate)
}
