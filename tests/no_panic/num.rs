//! Numbers: every function of codes and floats is total.

use crate::{NUMBERS, survives};
use half::{bf16, f16};
use proptest::prelude::*;
use trn_kernels::num::{
    E8M0, F4E2M1x2, F8E4M3Fn, Format, Fp8, Overflow, bf16_from_f64, decode_slice, encode_slice, halve_for_ieee, math,
    to_ieee,
};

const FORMATS: [Format; 7] =
    [Format::E4M3FN, Format::E4M3_IEEE, Format::E5M2, Format::E3M4, Format::E2M1, Format::E2M3, Format::E3M2];

fn scalars(x: f32) {
    for format in FORMATS {
        for overflow in [Overflow::Saturate, Overflow::NonSaturating] {
            let code = survives(format_args!("{format:?} encode {x}"), || format.encode(x, overflow));
            assert_eq!(
                format.decode(code).is_nan(),
                x.is_nan() && format.nan().is_some() || {
                    // An overflow without saturation is NaN where there is no infinity.
                    overflow == Overflow::NonSaturating
                        && format.infinity().is_none()
                        && format.nan() == Some(code & 0x7F)
                }
            );
        }
    }
    survives(format_args!("functions of {x}"), || {
        let functions = [math::exp(x), math::softmax_exp(x), math::sigmoid(x), math::tanh(x), math::ln(x)];
        assert!(!x.is_nan() || functions.iter().all(|y| y.is_nan()), "a function made a number of NaN");
        let _ = (math::floor_log2(x), math::ceil_log2(x));
        let scales = [E8M0::floor(x), E8M0::ceil(x)];
        assert_eq!(scales.map(|s| s.to_f32().is_nan()), [!x.is_finite(); 2]);
        assert_eq!(bf16_from_f64(x.into()).is_nan(), x.is_nan());
        assert_eq!(F4E2M1x2::from_f32([x, 0.0]).is_none(), x.is_nan());
        assert_eq!(F8E4M3Fn::from_f32(x, Overflow::Saturate).is_nan(), x.is_nan());
    });
}

#[test]
fn codes() {
    for code in 0..=255u8 {
        survives(format_args!("code {code}"), || {
            for format in FORMATS {
                let _ = (format.decode(code), format.max(), format.emax(), format.infinity(), format.sign_bit());
            }
            let scale = E8M0::from_bits(code);
            assert_eq!(scale.to_f32().is_nan(), code == 255);
            assert_eq!(scale.reciprocal().is_nan(), scale.exponent().is_none());
            let pair = F4E2M1x2::from_bits(code);
            assert_eq!(F4E2M1x2::from_codes(pair.codes()[0] | 0xF0, pair.codes()[1] | 0xF0), pair);
        });
    }
    for exponent in [i32::MIN, -128, -127, 0, 127, 128, i32::MAX] {
        let scale = survives(format_args!("exponent {exponent}"), || E8M0::from_exponent(exponent));
        assert_eq!(scale.exponent(), Some(exponent.clamp(-127, 127)));
    }
}

#[test]
fn special_numbers() {
    NUMBERS.into_iter().for_each(scalars);
    for x in [f64::NAN, f64::INFINITY, f64::MAX, f64::MIN, 5e-324, -5e-324, 1e-46, -0.0, 3.4028235677973366e38] {
        assert_eq!(survives(format_args!("bf16 of {x}"), || bf16_from_f64(x)).is_nan(), x.is_nan());
    }
}

proptest! {
    #[test]
    fn any_bits(bits: u32, wide: u64) {
        scalars(f32::from_bits(bits));
        let x = f64::from_bits(wide);
        prop_assert_eq!(survives(format_args!("bf16 of {x}"), || bf16_from_f64(x)).is_nan(), x.is_nan());
    }

    #[test]
    fn slices(codes in prop::collection::vec(any::<u8>(), 0..40), len in 0usize..40, which in 0usize..4) {
        let format = Fp8::ALL[which];
        let mut out = vec![f16::ONE; len];
        let result = survives(format_args!("decode_slice"), || decode_slice(format, &codes, &mut out));
        prop_assert_eq!(result.is_ok(), len == codes.len());
        prop_assert!(result.is_ok() || out.iter().all(|x| *x == f16::ONE));
        let x = vec![bf16::NAN; len];
        let mut to = codes.clone();
        let result = survives(format_args!("encode_slice"), || encode_slice(format, &x, Overflow::Saturate, &mut to));
        prop_assert_eq!(result.is_ok(), len == codes.len());
        prop_assert!(result.is_ok() || to == codes);
        for bridge in [to_ieee, halve_for_ieee] {
            let report = survives(format_args!("bridge"), || bridge(&mut to));
            prop_assert_eq!(report.exact + report.rounded + report.overflowed, codes.len());
        }
    }
}
