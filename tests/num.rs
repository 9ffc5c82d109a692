//! Formats, exhaustively, against a reference written from the formats' definition: every code, every bf16 and f16 input,
//! every midpoint and its neighbours.
#![forbid(unsafe_code)]

use half::{bf16, f16};
use trn_kernels::num::{
    E8M0, F4E2M1x2, F8E3M4, F8E4M3Fn, F8E4M3Ieee, F8E5M2, Format, Fp8, Overflow, Real, Specials, bf16_from_f64,
    decode_fp4_slice, decode_slice, encode_fp4_slice, encode_slice, halve_for_ieee, to_ieee,
};

/// A format spelled out in f64: the magnitudes of its codes in ascending order, and what lies beyond.
struct Reference {
    format: Format,
    /// Value of magnitude code i, for all finite magnitudes.
    magnitudes: Vec<f64>,
    /// The next magnitude if exponents had no end: where overflow starts to be nearer.
    beyond: f64,
    /// Magnitude code of infinity, or of NaN in a format without infinity; `None` if the format has neither.
    overflow: Option<u8>,
    /// Whether that code is infinity.
    infinity: bool,
    sign: u8,
}

/// (format, exponent bits, mantissa bits, bias, finite magnitudes, has infinity)
const DEFINITIONS: [(Format, u32, u32, i32, usize, bool); 7] = [
    (Format::E4M3FN, 4, 3, 7, 0x7F, false),
    (Format::E4M3_IEEE, 4, 3, 7, 0x78, true),
    (Format::E5M2, 5, 2, 15, 0x7C, true),
    (Format::E3M4, 3, 4, 3, 0x70, true),
    (Format::E2M1, 2, 1, 1, 0x8, false),
    (Format::E2M3, 2, 3, 1, 0x20, false),
    (Format::E3M2, 3, 2, 3, 0x20, false),
];

fn references() -> Vec<Reference> {
    let reference = |(format, e, m, bias, finite, infinity): (Format, u32, u32, i32, usize, bool)| {
        let value = |code: usize| {
            let (exponent, fraction) = ((code >> m) as i32, (code & ((1 << m) - 1)) as f64 / 2f64.powi(m as i32));
            if exponent == 0 { fraction * 2f64.powi(1 - bias) } else { (1.0 + fraction) * 2f64.powi(exponent - bias) }
        };
        let all = 1usize << (e + m);
        Reference {
            format,
            magnitudes: (0..finite).map(value).collect(),
            beyond: value(finite),
            // FP4 and FP6 have no code left over.
            overflow: (infinity || finite < all).then_some(finite as u8),
            infinity,
            sign: all as u8,
        }
    };
    DEFINITIONS.into_iter().map(reference).collect()
}

impl Reference {
    /// Number of codes, signs included.
    fn codes(&self) -> usize {
        2 * self.sign as usize
    }

    fn decode(&self, code: u8) -> f64 {
        let magnitude = code & (self.sign - 1);
        let value = match self.magnitudes.get(magnitude as usize) {
            Some(v) => *v,
            None if self.infinity && self.overflow == Some(magnitude) => f64::INFINITY,
            None => f64::NAN,
        };
        if code & self.sign != 0 { -value } else { value }
    }

    /// The nearest code by search, ties to the even code; `None` for NaN.
    fn encode(&self, x: f64, overflow: Overflow) -> Option<u8> {
        if x.is_nan() {
            return None;
        }
        let a = x.abs();
        let largest = self.magnitudes.len() - 1;
        // First magnitude above `a`; the one before it is not above.
        let above = self.magnitudes.partition_point(|v| *v <= a);
        let (low, high) = (above - 1, self.magnitudes.get(above).copied().unwrap_or(self.beyond));
        let middle = (self.magnitudes[low] + high) / 2.0;
        let up = a > middle || (a == middle && low % 2 == 1);
        let nearest = low + usize::from(up);
        let magnitude = match (overflow, self.overflow) {
            _ if nearest <= largest => nearest as u8,
            (Overflow::NonSaturating, Some(code)) => code,
            _ => largest as u8,
        };
        Some(magnitude | if x.is_sign_negative() { self.sign } else { 0 })
    }

    /// Asserts that the crate encodes `x` as the reference does, in both modes.
    fn check(&self, x: f32) {
        for overflow in [Overflow::Saturate, Overflow::NonSaturating] {
            let got = self.format.encode(x, overflow);
            match self.encode(f64::from(x), overflow) {
                Some(want) => assert_eq!(got, want, "{} {overflow:?}: {x:e}", self.format.name()),
                None => match self.format.specials() {
                    Specials::None => assert_eq!(got, 0, "{}: NaN", self.format.name()),
                    _ => assert!(self.decode(got).is_nan(), "{}: NaN gives {got:#x}", self.format.name()),
                },
            }
        }
    }
}

#[test]
fn facts_of_the_formats() {
    for (r, (format, e, m, bias, finite, _)) in references().iter().zip(DEFINITIONS) {
        assert_eq!((format.exponent_bits(), format.mantissa_bits(), format.bias()), (e, m, bias));
        assert_eq!(format.max_code() as usize, finite - 1);
        assert_eq!(f64::from(format.max()), r.magnitudes[finite - 1]);
        assert_eq!(2f64.powi(format.emax()), 2f64.powf(f64::from(format.max()).log2().floor()), "{}", format.name());
        assert_eq!(format.sign_bit(), r.sign);
        match format.nan() {
            Some(nan) => assert!(r.decode(nan).is_nan()),
            None => assert_eq!(format.specials(), Specials::None),
        }
    }
    assert_eq!((F8E4M3Fn::MAX, F8E4M3Ieee::MAX, F8E5M2::MAX, F8E3M4::MAX), (448.0, 240.0, 57344.0, 15.5));
}

#[test]
fn every_code_decodes_and_comes_back() {
    for r in references() {
        for code in 0..r.codes() {
            let code = code as u8;
            let (got, want) = (f64::from(r.format.decode(code)), r.decode(code));
            assert!(got == want || (got.is_nan() && want.is_nan()), "{} {code:#x}: {got}", r.format.name());
            assert_eq!(got.is_sign_negative(), code & r.sign != 0, "{} {code:#x}", r.format.name());
            let back = r.format.encode(r.format.decode(code), Overflow::NonSaturating);
            if want.is_nan() {
                assert!(r.decode(back).is_nan(), "{} {code:#x}", r.format.name());
            } else {
                assert_eq!(back, code, "{}", r.format.name());
            }
        }
    }
}

#[test]
fn every_bf16_and_f16_encodes_to_the_nearest() {
    for r in references() {
        for bits in 0..=u16::MAX {
            r.check(bf16::from_bits(bits).to_f32());
            r.check(f16::from_bits(bits).to_f32());
        }
    }
}

/// The f32 numbers next to `x`, and `x`.
fn around(x: f32) -> [f32; 3] {
    [x.next_down(), x, x.next_up()]
}

#[test]
fn every_midpoint_and_its_neighbours() {
    for r in references() {
        let ladder: Vec<f64> = r.magnitudes.iter().copied().chain([r.beyond]).collect();
        for pair in ladder.windows(2) {
            for x in [pair[0], pair[1], (pair[0] + pair[1]) / 2.0] {
                assert_eq!(f64::from(x as f32), x, "midpoints are exact in f32");
                for x in around(x as f32) {
                    r.check(x);
                    r.check(-x);
                }
            }
        }
        for x in [f32::MAX, f32::INFINITY, f32::NAN, f32::MIN_POSITIVE, f32::from_bits(1)] {
            r.check(x);
            r.check(-x);
        }
    }
}

/// Slices of `T`: every 16-bit pattern through `encode_slice`, every code through `decode_slice`.
fn slices_of<T: Real>(all: impl Fn() -> Vec<T>) {
    let x = all();
    for r in references() {
        let Some(fp8) = Fp8::ALL.into_iter().find(|f| f.format() == r.format) else { continue };
        for overflow in [Overflow::Saturate, Overflow::NonSaturating] {
            let mut codes = vec![0; x.len()];
            encode_slice(fp8, &x, overflow, &mut codes).unwrap();
            for (x, code) in x.iter().zip(&codes) {
                match r.encode(f64::from(x.to_f32()), overflow) {
                    Some(want) => assert_eq!(*code, want, "{fp8:?} {x:?}"),
                    None => assert!(r.decode(*code).is_nan(), "{fp8:?} {x:?}"),
                }
            }
        }
        let codes: Vec<u8> = (0..=255).collect();
        let mut values = vec![T::default(); 256];
        decode_slice(fp8, &codes, &mut values).unwrap();
        for (&code, value) in codes.iter().zip(values) {
            let (got, want) = (f64::from(value.to_f32()), r.decode(code));
            assert!(got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()), "{fp8:?} {code:#x}");
        }
    }
}

/// Slices of `T` through FP4: every number among them in pairs, and every byte.
fn fp4_slices_of<T: Real>(all: impl Fn() -> Vec<T>) {
    let r = references().into_iter().find(|r| r.format == Format::E2M1).unwrap();
    let mut x: Vec<T> = all().into_iter().filter(|x| !x.to_f32().is_nan()).collect();
    x.truncate(x.len() / 2 * 2);
    let mut bytes = vec![0; x.len() / 2];
    encode_fp4_slice(&x, &mut bytes).unwrap();
    for (i, x) in x.iter().enumerate() {
        let code = bytes[i / 2] >> (4 * (i % 2)) & 15;
        assert_eq!(Some(code), r.encode(f64::from(x.to_f32()), Overflow::Saturate), "{x:?}");
    }
    let bytes: Vec<u8> = (0..=255).collect();
    let mut values = vec![T::default(); 512];
    decode_fp4_slice(&bytes, &mut values).unwrap();
    for (i, value) in values.iter().enumerate() {
        let code = bytes[i / 2] >> (4 * (i % 2)) & 15;
        assert_eq!(f64::from(value.to_f32()).to_bits(), r.decode(code).to_bits(), "{code:#x}");
    }
}

#[test]
fn fp4_slices() {
    fp4_slices_of(|| (0..=u16::MAX).map(bf16::from_bits).collect());
    fp4_slices_of(|| (0..=u16::MAX).map(f16::from_bits).collect());
    fp4_slices_of(|| (0..1 << 20).map(|i: u32| f32::from_bits(i.wrapping_mul(4097))).collect());
    let mut bytes = [0xAA; 2];
    let error = encode_fp4_slice(&[1.0, 2.0, f32::NAN, 4.0], &mut bytes).unwrap_err();
    assert_eq!(error.to_string(), "encode input[2]: got NaN, needed a number: FP4 has no NaN");
    let error = encode_fp4_slice(&[1.0f32; 3], &mut bytes).unwrap_err();
    assert_eq!(error.to_string(), "encode input: the slice has 3 elements, its extents need 4");
    assert_eq!(bytes, [0xAA; 2]);
    let error = decode_fp4_slice(&bytes, &mut [0.0f32; 3]).unwrap_err();
    assert_eq!(error.to_string(), "decode output: the slice has 3 elements, its extents need 4");
}

#[test]
fn slices() {
    slices_of(|| (0..=u16::MAX).map(bf16::from_bits).collect());
    slices_of(|| (0..=u16::MAX).map(f16::from_bits).collect());
    // A step of 2^12 + 1 walks through all exponents, both signs and many mantissas.
    slices_of(|| (0..1 << 20).map(|i: u32| f32::from_bits(i.wrapping_mul(4097))).collect());
    let error = encode_slice(Fp8::E5M2, &[1.0f32; 3], Overflow::Saturate, &mut [0; 2]).unwrap_err();
    assert_eq!(error.to_string(), "encode output: the slice has 2 elements, its extents need 3");
    let error = decode_slice(Fp8::E5M2, &[0; 3], &mut [0.0f32; 4]).unwrap_err();
    assert_eq!(error.to_string(), "decode output: the slice has 4 elements, its extents need 3");
}

#[test]
fn storage_types_are_their_formats() {
    macro_rules! check {
        ($($t:ident $format:ident $fp8:ident),+) => {$(
            for code in 0..=255u8 {
                let (x, want) = ($t::from_bits(code), Format::$format.decode(code));
                assert_eq!(x.to_bits(), code);
                assert!(x.to_f32().to_bits() == want.to_bits() || (x.is_nan() && want.is_nan()));
                assert!(Fp8::$fp8.values()[code as usize].to_bits() == want.to_bits() || want.is_nan());
                let back = $t::from_f32(want, Overflow::NonSaturating);
                assert!(back == x || (back.is_nan() && x.is_nan()));
            }
        )+};
    }
    check!(F8E4M3Fn E4M3FN E4M3Fn, F8E4M3Ieee E4M3_IEEE E4M3Ieee, F8E5M2 E5M2 E5M2, F8E3M4 E3M4 E3M4);
}

#[test]
fn fp4_pairs() {
    let r = references().into_iter().find(|r| r.format == Format::E2M1).unwrap();
    for byte in 0..=255u8 {
        let pair = F4E2M1x2::from_bits(byte);
        assert_eq!(pair.codes(), [byte & 15, byte >> 4]);
        assert_eq!(F4E2M1x2::from_codes(byte & 15, byte >> 4).to_bits(), byte);
        let values = pair.to_f32();
        for (value, code) in values.into_iter().zip(pair.codes()) {
            assert_eq!(f64::from(value).to_bits(), r.decode(code).to_bits(), "{byte:#x}");
        }
        assert_eq!(F4E2M1x2::from_f32(values), Some(pair));
    }
    // Bits beyond a nibble are not let through.
    assert_eq!(F4E2M1x2::from_codes(0xF1, 0xF2).to_bits(), 0x21);
    assert_eq!(F4E2M1x2::from_f32([f32::NAN, 1.0]), None);
    assert_eq!(F4E2M1x2::from_f32([1.0, f32::NAN]), None);
    assert_eq!(F4E2M1x2::from_f32([1e30, f32::NEG_INFINITY]).unwrap().to_f32(), [6.0, -6.0]);
}

#[test]
fn e8m0_codes() {
    for code in 0..=254u8 {
        let (scale, exponent) = (E8M0::from_bits(code), i32::from(code) - 127);
        let value = 2f64.powi(exponent);
        assert_eq!((scale.to_bits(), scale.exponent()), (code, Some(exponent)));
        assert_eq!(f64::from(scale.to_f32()), value);
        assert_eq!(scale.reciprocal(), 1.0 / value);
        assert_eq!(E8M0::from_exponent(exponent), scale);
        for x in around(scale.to_f32()).into_iter().flat_map(|x| [x, -x]) {
            let a = f64::from(x).abs();
            let (floor, ceil) = (f64::from(E8M0::floor(x).to_f32()), f64::from(E8M0::ceil(x).to_f32()));
            let (smallest, largest) = (2f64.powi(-127), 2f64.powi(127));
            assert!((floor <= a && a < 2.0 * floor) || (a < smallest && floor == smallest), "floor {x:e}");
            assert!((ceil >= a && a > ceil / 2.0) || ceil == if a < 1.0 { smallest } else { largest }, "ceil {x:e}");
        }
    }
    assert!(E8M0::NAN.to_f32().is_nan() && E8M0::NAN.reciprocal().is_nan());
    assert_eq!(E8M0::NAN.exponent(), None);
    assert_eq!(E8M0::ONE.to_f32(), 1.0);
    for scale in [E8M0::floor as fn(f32) -> E8M0, E8M0::ceil] {
        assert_eq!(scale(0.0), E8M0::from_bits(0));
        assert_eq!(scale(-0.0), E8M0::from_bits(0));
        for x in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(scale(x), E8M0::NAN);
        }
    }
    assert_eq!(E8M0::from_exponent(i32::MIN), E8M0::from_bits(0));
    assert_eq!(E8M0::from_exponent(i32::MAX), E8M0::from_bits(254));
}

#[test]
fn bridge_to_ieee() {
    let (mut exact, mut overflowed) = (0, 0);
    for code in 0..=255u8 {
        let value = f64::from(F8E4M3Fn::from_bits(code).to_f32());
        let mut codes = [code];
        let report = to_ieee(&mut codes);
        let got = f64::from(F8E4M3Ieee::from_bits(codes[0]).to_f32());
        if value.is_nan() {
            assert!(got.is_nan());
        } else if value.abs() <= 240.0 {
            assert_eq!(codes[0], code, "magnitudes up to 240 keep their byte");
            assert_eq!(got, value);
        } else {
            assert_eq!(got, 240f64.copysign(value));
        }
        assert_eq!(report.exact + report.overflowed, 1);
        assert_eq!(report.overflowed == 1, value.abs() > 240.0);
        exact += report.exact;
        overflowed += report.overflowed;
    }
    // 256 to 448 are seven codes of either sign.
    let mut all: Vec<u8> = (0..=255).collect();
    let report = to_ieee(&mut all);
    assert_eq!((report.exact, report.rounded, report.overflowed), (exact, 0, overflowed));
    assert_eq!(overflowed, 14);
}

#[test]
fn bridge_halved() {
    for code in 0..=255u8 {
        let value = f64::from(F8E4M3Fn::from_bits(code).to_f32());
        let mut codes = [code];
        let report = halve_for_ieee(&mut codes);
        let doubled = 2.0 * f64::from(F8E4M3Ieee::from_bits(codes[0]).to_f32());
        assert_eq!(report.overflowed, 0);
        if value.is_nan() {
            assert!(doubled.is_nan() && report.exact == 1);
            continue;
        }
        assert_eq!(doubled.is_sign_negative(), code >= 0x80);
        let rounds = code & 0x7F < 0x10 && code % 2 == 1;
        assert_eq!(report.rounded == 1, rounds, "code {code:#x}");
        let error = if rounds { 2f64.powi(-9) } else { 0.0 };
        assert_eq!((doubled - value).abs(), error, "code {code:#x}");
    }
}

#[test]
fn bf16_rounds_once_from_f64() {
    for bits in 0..0x7F80u16 {
        let (low, high) = (bf16::from_bits(bits), bf16::from_bits(bits + 1));
        // Above the largest, overflow starts half a step on.
        let next = if high.is_finite() { f64::from(high) } else { 2f64.powi(128) };
        let middle = (f64::from(low) + next) / 2.0;
        let even = if bits & 1 == 0 { low } else { high };
        for (x, want) in [(middle.next_down(), low), (middle, even), (middle.next_up(), high), (f64::from(low), low)] {
            assert_eq!(bf16_from_f64(x).to_bits(), want.to_bits(), "{x:e}");
            assert_eq!(bf16_from_f64(-x).to_bits(), want.to_bits() | 0x8000, "{x:e}");
        }
        // What rounding through f32 would get wrong: so near the midpoint that f32 calls it one.
        let near = middle * (1.0 + 2f64.powi(-40));
        assert_eq!(bf16_from_f64(near).to_bits(), high.to_bits(), "{near:e}");
    }
    assert!(bf16_from_f64(f64::NAN).is_nan());
    for x in [f64::INFINITY, f64::MAX] {
        assert_eq!((bf16_from_f64(x), bf16_from_f64(-x)), (bf16::INFINITY, bf16::NEG_INFINITY));
    }
    assert_eq!(bf16_from_f64(f64::MIN_POSITIVE).to_bits(), 0);
    assert_eq!(bf16_from_f64(-f64::MIN_POSITIVE).to_bits(), 0x8000);
}
