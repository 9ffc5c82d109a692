//! Quantizing: rules against their definitions, codes against the nearest value, every scheme against its own error bound,
//! what is not finite, what is refused, and repacking.
#![forbid(unsafe_code)]

#[path = "support/random.rs"]
mod random;

use half::{bf16, f16};
use random::{Rng, SCHEMES};
use trn_kernels::num::{E8M0, F8E4M3Fn, Format, Fp8, Overflow, Real};
use trn_kernels::quant::{
    GlobalScale, NibbleOrder, Nvfp4Rule, QuantizationError, QuantizeOptions, QuantizedMatrix, QuantizedMatrixBuf,
    ScaleRule, Scheme, encode_mx_block, encode_nvfp4_block, encode_ue4m3, mxfp4_from_gguf, mxfp4_to_gguf,
    nvfp4_from_gguf, quantize, quantize_into, repack_nibbles,
};
use trn_kernels::{Error, MatRef};

const ELEMENTS: [Format; 7] =
    [Format::E4M3FN, Format::E4M3_IEEE, Format::E5M2, Format::E3M4, Format::E2M1, Format::E2M3, Format::E3M2];

fn run<T: Real>(x: &[T], n: usize, k: usize, scheme: Scheme, options: &QuantizeOptions) -> QuantizedMatrixBuf {
    quantize(MatRef::new(x, n, k).unwrap(), scheme, options).unwrap()
}

fn values(m: &QuantizedMatrix<'_>) -> Vec<f64> {
    (0..m.n()).flat_map(|i| (0..m.k()).map(move |j| m.value(i, j).unwrap())).collect()
}

/// Every f32 exponent, subnormal ones included, with mantissas on and next to every threshold a rule could have.
fn amaxes() -> Vec<f32> {
    let mut all = vec![];
    for exponent in -149..=127 {
        for eighths in 0..32 {
            let x = 2f64.powi(exponent) * (1.0 + f64::from(eighths) / 32.0);
            if x as f32 != 0.0 {
                all.extend([(x as f32).next_down(), x as f32, (x as f32).next_up()]);
            }
        }
    }
    all.retain(|x| *x > 0.0 && x.is_finite());
    all
}

/// The largest integer e with 2^e <= x, by comparison.
fn exponent_of(x: f64) -> i32 {
    (-1074..1024).rev().find(|e| 2f64.powi(*e) <= x).unwrap()
}

#[test]
fn scale_rules_are_their_definitions() {
    let amaxes: Vec<(f32, i32)> = amaxes().into_iter().map(|x| (x, exponent_of(f64::from(x)))).collect();
    for element in ELEMENTS {
        let max = f64::from(element.max());
        for &(amax, e) in &amaxes {
            let mantissa = f64::from(amax) / 2f64.powi(e);
            let rounded_to = |bits: i32| (mantissa * 2f64.powi(bits) + 0.5).floor() / 2f64.powi(bits);
            let emax = exponent_of(max);
            for rule in ScaleRule::ALL {
                let want = match rule {
                    ScaleRule::Floor => e - emax,
                    ScaleRule::Ceil => e - emax + i32::from(mantissa > 1.0),
                    ScaleRule::Rceil => {
                        // The quotient is an f32.
                        let quotient = f64::from((f64::from(amax) / max) as f32);
                        let floor = if quotient > 0.0 { exponent_of(quotient) } else { -200 };
                        floor + i32::from(quotient > 2f64.powi(floor))
                    }
                    ScaleRule::Even => e - emax + i32::from(rounded_to(element.mantissa_bits() as i32) >= 2.0),
                    ScaleRule::CompressedTensors => e - emax + i32::from(rounded_to(1) >= 2.0),
                    ScaleRule::Trainium => e - (emax - 1),
                };
                let got = rule.scale(element, amax);
                assert_eq!(got.exponent(), Some(want.clamp(-127, 127)), "{} {rule:?} {amax:e}", element.name());
                assert_eq!(rule.scale(element, -amax), got);
            }
        }
        for rule in ScaleRule::ALL {
            assert_eq!(rule.scale(element, 0.0).to_bits(), 0);
            assert_eq!(rule.scale(element, -0.0).to_bits(), 0);
            for x in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                assert_eq!(rule.scale(element, x), E8M0::NAN);
            }
        }
    }
}

#[test]
fn three_rules_never_clip_and_rceil_is_the_tightest() {
    for element in ELEMENTS {
        let max = f64::from(element.max());
        for amax in amaxes() {
            let scale = |rule: ScaleRule| f64::from(rule.scale(element, amax).to_f32());
            for rule in [ScaleRule::Ceil, ScaleRule::Rceil, ScaleRule::Trainium] {
                // 2^-127 serves all that is smaller; there RCEIL's f32 quotient may have lost the last bit.
                let holds = max * scale(rule) * if scale(rule) == 2f64.powi(-127) { 1.0 + 2f64.powi(-22) } else { 1.0 };
                assert!(f64::from(amax) <= holds, "{} {rule:?} {amax:e}", element.name());
                assert!(scale(ScaleRule::Rceil) <= scale(rule));
            }
            let rceil = scale(ScaleRule::Rceil);
            assert!(rceil == 2f64.powi(-127) || f64::from(amax) > max * rceil / 2.0, "{} {amax:e}", element.name());
        }
    }
}

/// The code nearest `x` by search over the format's own table (tests/num.rs proves the table), ties to even, saturating.
fn nearest(element: Format, x: f64) -> u8 {
    let a = x.abs();
    let distance = |c: &u8| (f64::from(element.decode(*c)) - a).abs();
    let all = 0..=element.max_code();
    let best = all.clone().map(|c| distance(&c)).fold(f64::INFINITY, f64::min);
    let mut ties = all.filter(|c| distance(c) == best);
    let first = ties.next().unwrap();
    let code = ties.find(|c| c % 2 == 0).unwrap_or(first);
    let code = if first % 2 == 0 { first } else { code };
    code | if x.is_sign_negative() { element.sign_bit() } else { 0 }
}

/// Random blocks over all of f32's range, with zeros of both signs, some on midpoints.
fn blocks(rng: &mut Rng) -> Vec<Vec<f32>> {
    let mut all: Vec<Vec<f32>> = vec![vec![0.0; 32], vec![-0.0; 32], vec![], vec![-3.0], vec![f32::MAX; 32]];
    for exponent in (-149..=118).step_by(3) {
        let normal = exponent.max(-126);
        let mut block = rng.wide(32, normal..=normal + 8);
        block.iter_mut().for_each(|x| *x *= 2f32.powi(exponent - normal));
        block[rng.below(32)] = 0.0;
        block[rng.below(32)] = -0.0;
        let at = rng.below(32);
        // Few significant bits: exact midpoints of narrow formats are among these.
        block[at] = f32::from_bits(block[at].to_bits() & 0xFFF0_0000);
        all.push(block);
    }
    all
}

#[test]
fn mx_codes_are_nearest_to_the_exact_quotient() {
    let mut rng = Rng(3);
    for block in blocks(&mut rng) {
        for element in ELEMENTS {
            for rule in ScaleRule::ALL {
                let mut codes = vec![0xAA; block.len()];
                let scale = encode_mx_block(element, rule, &block, &mut codes).unwrap();
                let amax = block.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                assert_eq!(scale, rule.scale(element, amax));
                for (&x, &code) in block.iter().zip(&codes) {
                    let quotient = f64::from(x) * 2f64.powi(-scale.exponent().unwrap());
                    assert_eq!(code, nearest(element, quotient), "{} {rule:?} {x:e} / {scale:?}", element.name());
                }
            }
        }
    }
}

#[test]
fn a_block_that_is_not_finite_is_nan() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN] {
        let mut x = [1.0f32; 32];
        x[17] = bad;
        for element in ELEMENTS {
            for rule in ScaleRule::ALL {
                let mut codes = [7; 32];
                assert_eq!(encode_mx_block(element, rule, &x, &mut codes).unwrap(), E8M0::NAN);
                assert_eq!(codes, [0; 32]);
            }
        }
        for rule in Nvfp4Rule::ALL {
            let mut codes = [7; 16];
            let scale = encode_nvfp4_block(rule, GlobalScale::ONE, &x[16..], &mut codes).unwrap();
            assert_eq!((scale.to_bits(), codes), (0x7F, [0; 16]));
        }
    }
}

#[test]
fn nvfp4_small_and_zero_blocks_follow_their_library() {
    // 2688 = 448 * 6: the global scale is 1 for a tensor with this maximum.
    let mut x = vec![0.0f32; 64];
    x[0] = 2688.0;
    // Block 1 is zero, with one -0; block 2 rounds to a zero scale; block 3 has a subnormal scale (3 * 2^-9).
    x[20] = -0.0;
    x[32] = 0.005;
    x[48] = -6.0 * 3.0 / 512.0;
    let cases = [
        (Nvfp4Rule::TorchAo, [0x7E, 0x08, 0x08, 0x08], [8u8, 1, 12]),
        (Nvfp4Rule::CompressedTensors, [0x7E, 0x20, 0x20, 0x03], [0, 0, 15]),
        (Nvfp4Rule::ModelOpt, [0x7E, 0x38, 0x00, 0x03], [0, 0, 15]),
    ];
    for (rule, scales, [minus_zero, tiny, small]) in cases {
        assert_eq!(rule.global_scale(2688.0).get(), 1.0);
        let got = run(&x, 1, 64, Scheme::Nvfp4, &QuantizeOptions { nvfp4: rule, ..Default::default() });
        assert_eq!(got.block_scales(), scales, "{rule:?}");
        let code = |i| got.view().code(0, i).unwrap() as u8;
        assert_eq!((code(0), code(20), code(32), code(48)), (7, minus_zero, tiny, small), "{rule:?}");
    }
    for rule in Nvfp4Rule::ALL {
        // A zero tensor has global scale 1 and decodes to zeros.
        let zeros = run(&[0.0f32; 32], 1, 32, Scheme::Nvfp4, &QuantizeOptions { nvfp4: rule, ..Default::default() });
        assert_eq!(zeros.global_scale().get(), 1.0);
        assert!(values(&zeros.view()).iter().all(|v| *v == 0.0));
        for amax in [0.0, f32::NAN, f32::INFINITY] {
            assert_eq!(rule.global_scale(amax), GlobalScale::ONE);
        }
        for amax in amaxes() {
            let g = rule.global_scale(amax).get();
            assert!(g.is_normal() && g > 0.0, "{rule:?} {amax:e}: {g:e}");
        }
    }
}

#[test]
fn ue4m3_has_no_sign() {
    for (x, code) in [(0.0, 0), (-0.0, 0), (-5.0, 0), (f32::NEG_INFINITY, 0), (1e30, 0x7E), (f32::INFINITY, 0x7E)] {
        assert_eq!(encode_ue4m3(x).to_bits(), code, "{x}");
    }
    assert_eq!((encode_ue4m3(f32::NAN).to_bits(), encode_ue4m3(-f32::NAN).to_bits()), (0x7F, 0x7F));
    for code in 0..0x7F {
        let x = F8E4M3Fn::from_bits(code).to_f32();
        assert_eq!(encode_ue4m3(x).to_bits(), code);
    }
}

/// The largest `|x - value|` that rounding to nearest allows an element under `scale`, the clamp included.
fn element_bound(element: Format, scale: f64, x: f64) -> f64 {
    let half_step = 2f64.powi(-(element.mantissa_bits() as i32) - 1);
    let half_subnormal = f64::from(element.decode(1)) / 2.0 * scale;
    let clamped = (x.abs() - f64::from(element.max()) * scale).max(0.0);
    (half_step * x.abs()).max(half_subnormal).max(clamped) * (1.0 + 2f64.powi(-20))
}

#[test]
fn every_scheme_keeps_its_error_bound() {
    let mut rng = Rng(4);
    let (n, k) = (37, 192);
    for exponents in [0..=0, -20..=20, -140..=-100, 90..=120] {
        let x = rng.wide(n * k, exponents);
        for scheme in SCHEMES {
            for rule in ScaleRule::ALL {
                for nvfp4 in Nvfp4Rule::ALL {
                    let options = QuantizeOptions { rule, nvfp4, ..Default::default() };
                    let got = run(&x, n, k, scheme, &options);
                    let view = got.view();
                    for (i, &x) in x.iter().enumerate() {
                        let (row, col) = (i / k, i % k);
                        let error = (view.value(row, col).unwrap() - f64::from(x)).abs();
                        let scale = f64::from(view.block_scale(row, col).unwrap())
                            * f64::from(view.outer_scale(row, col).unwrap());
                        let bound = match scheme.element() {
                            // bf16: 7 stored bits of mantissa; half of a subnormal step at the bottom.
                            None => (2f64.powi(-8) * f64::from(x).abs()).max(2f64.powi(-134)),
                            Some(element) => element_bound(element, scale, f64::from(x)),
                        };
                        assert!(error <= bound, "{scheme:?} {options:?} ({row}, {col}): {x:e} error {error:e}");
                    }
                    if scheme != Scheme::Nvfp4 {
                        break;
                    }
                }
                if !matches!(scheme, Scheme::Mxfp4 | Scheme::Mxfp8(_)) {
                    break;
                }
            }
        }
    }
}

/// What the public constructors make of a buffer's planes.
fn rebuilt(b: &QuantizedMatrixBuf) -> QuantizedMatrix<'_> {
    let (n, k, codes, scales, outer) = (b.n(), b.k(), b.codes(), b.block_scales(), b.outer_scales());
    match b.scheme() {
        Scheme::Bf16 => QuantizedMatrix::bf16(n, k, codes),
        Scheme::Mxfp4 => QuantizedMatrix::mxfp4(n, k, codes, scales),
        Scheme::Mxfp8(e) => QuantizedMatrix::mxfp8(e, n, k, codes, scales),
        Scheme::Nvfp4 => QuantizedMatrix::nvfp4(n, k, codes, scales, b.global_scale()),
        Scheme::Fp8PerTensor(e) => QuantizedMatrix::fp8_per_tensor(e, n, k, codes, outer[0]),
        Scheme::Fp8PerChannel(e) => QuantizedMatrix::fp8_per_channel(e, n, k, codes, outer),
        Scheme::Fp8Blockwise { element, n: tn, k: tk } => {
            QuantizedMatrix::fp8_blockwise(element, n, k, codes, outer, (tn, tk))
        }
    }
    .unwrap()
}

#[test]
fn buffers_pass_the_public_constructors() {
    let mut rng = Rng(5);
    for (n, k) in [(0, 32), (1, 32), (37, 192), (130, 160)] {
        let x = rng.wide(n * k, -3..=3);
        for scheme in SCHEMES {
            let got = run(&x, n, k, scheme, &QuantizeOptions::default());
            let (view, rebuilt) = (got.view(), rebuilt(&got));
            assert_eq!(values(&view), values(&rebuilt), "{scheme:?}");
            assert_eq!(view.bytes(), rebuilt.bytes(), "{scheme:?}");
            assert_eq!(view.scheme(), scheme);
        }
    }
}

#[test]
fn activation_types_and_strides_do_not_matter() {
    let mut rng = Rng(6);
    let (n, k, stride) = (5, 64, 70);
    // Values that bf16 and f16 both hold.
    let x: Vec<f32> = rng.wide(n * stride, 0..=3).into_iter().map(|x| bf16::from_f32(x).to_f32()).collect();
    let x: Vec<f32> = x.into_iter().map(|x| f16::from_f32(x).to_f32()).collect();
    let packed: Vec<f32> = x.chunks(stride).flat_map(|row| row[..k].to_vec()).collect();
    let halves: Vec<bf16> = x.iter().map(|x| bf16::from_f32(*x)).collect();
    let singles: Vec<f16> = x.iter().map(|x| f16::from_f32(*x)).collect();
    let options = QuantizeOptions::default();
    for scheme in SCHEMES {
        let want = run(&packed, n, k, scheme, &options);
        let strided = [
            quantize(MatRef::with_stride(&x, n, k, stride).unwrap(), scheme, &options).unwrap(),
            quantize(MatRef::with_stride(&halves, n, k, stride).unwrap(), scheme, &options).unwrap(),
            quantize(MatRef::with_stride(&singles, n, k, stride).unwrap(), scheme, &options).unwrap(),
        ];
        for got in strided {
            assert_eq!((got.codes(), got.block_scales()), (want.codes(), want.block_scales()), "{scheme:?}");
            assert_eq!(got.outer_scales(), want.outer_scales(), "{scheme:?}");
        }
    }
}

/// Except through a scale they share, rows do not see each other: an activation has the same bytes alone and in a batch.
#[test]
fn a_row_alone_has_the_bytes_it_has_in_a_batch() {
    let mut rng = Rng(7);
    let (n, k) = (6, 256);
    let x = rng.wide(n * k, -4..=4);
    let fixed = |scheme| QuantizeOptions {
        static_scale: matches!(scheme, Scheme::Fp8PerTensor(_)).then_some(0.125),
        global: (scheme == Scheme::Nvfp4).then_some(GlobalScale::multiplier(0.01)),
        ..Default::default()
    };
    for scheme in SCHEMES.into_iter().filter(|s| !matches!(s, Scheme::Fp8Blockwise { n: 2.., .. })) {
        let all = run(&x, n, k, scheme, &fixed(scheme));
        for row in 0..n {
            let alone = run(&x[row * k..(row + 1) * k], 1, k, scheme, &fixed(scheme));
            let bytes = alone.codes().len();
            assert_eq!(alone.codes(), &all.codes()[row * bytes..(row + 1) * bytes], "{scheme:?}");
            assert_eq!(values(&alone.view()), values(&all.view().slice_n(row..row + 1).unwrap()), "{scheme:?}");
        }
    }
}

#[test]
fn what_is_not_finite_decodes_to_nan_and_harms_nothing_else() {
    let (n, k) = (3, 64);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x: Vec<f32> = (0..n * k).map(|i| (i % 7) as f32 - 3.0).collect();
        let clean = x.clone();
        let at = k + 35;
        x[at] = bad;
        for scheme in SCHEMES {
            let got = values(&run(&x, n, k, scheme, &QuantizeOptions::default()).view());
            let want = values(&run(&clean, n, k, scheme, &QuantizeOptions::default()).view());
            let block = scheme.block();
            for i in 0..n * k {
                if i / block == at / block {
                    match scheme {
                        Scheme::Bf16 => assert_eq!(got[i].to_bits() << 12, f64::from(bad).to_bits() << 12),
                        _ => assert!(got[i].is_nan(), "{scheme:?} {bad} element {i}"),
                    }
                } else {
                    assert_eq!(got[i], want[i], "{scheme:?} {bad} element {i}");
                }
            }
        }
        // All of a group: any finite scale, all codes NaN.
        let all = run(&vec![bad; n * k], n, k, Scheme::Fp8PerChannel(Fp8::E4M3Fn), &QuantizeOptions::default());
        assert_eq!(all.outer_scales(), [1.0; 3]);
        assert!(values(&all.view()).iter().all(|v| v.is_nan()));
    }
}

#[test]
fn a_buffer_is_overwritten_whole_and_kept_on_error() {
    let mut rng = Rng(8);
    let mut reused = QuantizedMatrixBuf::new();
    assert_eq!((reused.n(), reused.k(), reused.view().bytes()), (0, 0, 0));
    for round in 0..3 {
        for scheme in SCHEMES {
            let (n, k) = ([40, 3, 17][round], [96, 160, 64][round]);
            let x = rng.wide(n * k, -2..=2);
            quantize_into(MatRef::new(&x, n, k).unwrap(), scheme, &QuantizeOptions::default(), &mut reused).unwrap();
            let fresh = run(&x, n, k, scheme, &QuantizeOptions::default());
            assert_eq!(format!("{reused:?}"), format!("{fresh:?}"), "{scheme:?}");
            let before = format!("{reused:?}");
            let odd = MatRef::new(&x, n * k, 1).unwrap();
            quantize_into(odd, Scheme::Mxfp4, &QuantizeOptions::default(), &mut reused).unwrap_err();
            assert_eq!(format!("{reused:?}"), before);
        }
    }
}

#[test]
fn static_scales_are_used_and_saturate() {
    let x = [0.0f32, 1.0, -1.0, 100.0, -100.0, f32::MAX, 0.3, -0.0];
    let options = QuantizeOptions { static_scale: Some(0.125), ..Default::default() };
    let got = run(&x, 2, 4, Scheme::Fp8PerTensor(Fp8::E4M3Fn), &options);
    assert_eq!(got.outer_scales(), [0.125]);
    // 448 / 8 = 56 is all that fits; 0.3 * 8 = 2.4 lies between 2.25 and 2.5.
    assert_eq!(values(&got.view()), [0.0, 1.0, -1.0, 56.0, -56.0, 56.0, 0.3125, -0.0]);
    let x = MatRef::new(&x, 2, 4).unwrap();
    let report = QuantizationError::measure(x, &got.view()).unwrap();
    assert_eq!((report.clipped, report.compared), (3, 8));
}

#[test]
fn scales_never_underflow() {
    for amax in [f32::from_bits(1), f32::from_bits(77), 1e-40, f32::MIN_POSITIVE, 1e-36] {
        let x = [amax, -amax, 0.0, amax / 2.0];
        for scheme in [Scheme::Fp8PerTensor(Fp8::E4M3Fn), Scheme::Fp8PerChannel(Fp8::E5M2)] {
            let got = run(&x, 1, 4, scheme, &QuantizeOptions::default());
            assert!(got.outer_scales()[0].is_normal() && got.outer_scales()[0] > 0.0, "{amax:e}");
            assert!(values(&got.view()).iter().all(|v| v.is_finite()), "{amax:e}");
        }
        let block: Vec<f32> = x.repeat(4);
        for nvfp4 in Nvfp4Rule::ALL {
            let got = run(&block, 1, 16, Scheme::Nvfp4, &QuantizeOptions { nvfp4, ..Default::default() });
            assert!(values(&got.view()).iter().all(|v| v.is_finite()), "{nvfp4:?} {amax:e}");
        }
    }
}

#[test]
fn reports_count_what_was_lost() {
    // Scale 2^0 under FLOOR (amax 7 = 1.75 * 2^2): 7 clips to 6, 5 ties to 4, 0.25 ties to 0, the rest is exact.
    let mut x = [0.0f32; 32];
    x[..6].copy_from_slice(&[7.0, -5.0, 0.25, 3.0, -1.5, 6.0]);
    let got = run(&x, 1, 32, Scheme::Mxfp4, &QuantizeOptions::default());
    let measure = |m: &QuantizedMatrix<'_>, x: &[f32]| {
        QuantizationError::measure(MatRef::new(x, 1, x.len()).unwrap(), m).unwrap()
    };
    let report = measure(&got.view(), &x);
    let (signal, noise) = (49.0 + 25.0 + 0.0625 + 9.0 + 2.25 + 36.0, 1.0 + 1.0 + 0.0625);
    assert_eq!((report.max_abs, report.clipped, report.compared, report.non_finite), (1.0, 1, 32, 0));
    assert_eq!(report.rms, f64::sqrt(noise / 32.0));
    assert!((report.sqnr_db - 10.0 * f64::log10(signal / noise)).abs() < 1e-12);
    // The rule that never clips clips nothing.
    let options = QuantizeOptions { rule: ScaleRule::Rceil, ..Default::default() };
    assert_eq!(measure(&run(&x, 1, 32, Scheme::Mxfp4, &options).view(), &x).clipped, 0);
    // Nothing lost: infinite SQNR. NaN: left out.
    x.fill(1.0);
    assert_eq!(
        measure(&run(&x, 1, 32, Scheme::Mxfp4, &QuantizeOptions::default()).view(), &x),
        QuantizationError { max_abs: 0.0, rms: 0.0, sqnr_db: f64::INFINITY, clipped: 0, compared: 32, non_finite: 0 }
    );
    x[3] = f32::NAN;
    let report = measure(&run(&x, 1, 32, Scheme::Mxfp4, &QuantizeOptions::default()).view(), &x);
    assert_eq!((report.compared, report.non_finite), (0, 32));
    let shape = QuantizationError::measure(MatRef::new(&x, 2, 16).unwrap(), &got.view()).unwrap_err();
    assert_eq!(shape.to_string(), "original: axis n is 2, needed 1");
}

#[test]
fn what_is_refused_says_why() {
    let x = [1.0f32; 96];
    let text = |n, k, scheme, options: QuantizeOptions| {
        quantize(MatRef::new(&x[..n * k], n, k).unwrap(), scheme, &options).unwrap_err().to_string()
    };
    let plain = QuantizeOptions::default();
    let static_scale = |s| QuantizeOptions { static_scale: Some(s), ..plain };
    let global = |g| QuantizeOptions { global: Some(g), ..plain };
    let tensor = Scheme::Fp8PerTensor(Fp8::E4M3Fn);
    let tile = |n, k| Scheme::Fp8Blockwise { element: Fp8::E4M3Fn, n, k };
    let cases = [
        (text(2, 48, Scheme::Mxfp4, plain), "matrix to quantize: axis k is 48, needed a multiple of 32"),
        (text(2, 33, Scheme::Mxfp8(Fp8::E5M2), plain), "matrix to quantize: axis k is 33, needed a multiple of 32"),
        (text(2, 40, Scheme::Nvfp4, plain), "matrix to quantize: axis k is 40, needed a multiple of 16"),
        (text(2, 0, tensor, plain), "matrix to quantize: axis k is empty, needed at least 1"),
        (text(2, 32, tile(0, 1), plain), "scale tile: axis n is empty, needed at least 1"),
        (text(2, 32, tile(1, 0), plain), "scale tile: axis k is empty, needed at least 1"),
        (text(2, 32, tensor, static_scale(0.0)), "static scale[0]: got 0, needed a finite positive scale"),
        (text(2, 32, tensor, static_scale(-1.0)), "static scale[0]: got -1, needed a finite positive scale"),
        (text(2, 32, tensor, static_scale(f32::NAN)), "static scale[0]: got NaN, needed a finite positive scale"),
        (
            text(2, 32, Scheme::Mxfp4, static_scale(1.0)),
            "static scale: given but not wanted: only the per-tensor FP8 scheme has one",
        ),
        (text(2, 32, tensor, global(GlobalScale::ONE)), "global scale: given but not wanted: only NVFP4 has one"),
        (
            text(2, 32, Scheme::Nvfp4, global(GlobalScale::divisor(0.0))),
            "global scale[0]: got inf, needed a positive normal multiplier",
        ),
        (
            text(2, 32, Scheme::Nvfp4, global(GlobalScale::multiplier(-1.0))),
            "global scale[0]: got -1, needed a positive normal multiplier",
        ),
    ];
    for (got, want) in cases {
        assert_eq!(got, want);
    }
    let mut codes = [9; 31];
    let short = encode_mx_block(Format::E2M1, ScaleRule::Floor, &x[..32], &mut codes).unwrap_err();
    assert_eq!(short.to_string(), "block codes: the slice has 31 elements, its extents need 32");
    let short = encode_nvfp4_block(Nvfp4Rule::ModelOpt, GlobalScale::ONE, &x[..32], &mut codes).unwrap_err();
    assert_eq!(short.to_string(), "block codes: the slice has 31 elements, its extents need 32");
    let bad = encode_nvfp4_block(Nvfp4Rule::ModelOpt, GlobalScale::multiplier(f32::NAN), &x[..31], &mut codes);
    assert!(matches!(bad, Err(Error::Value { .. })));
    assert_eq!(codes, [9; 31], "nothing is written by a refused call");
    // Any number of rows fits no columns: refused, not allocated.
    let endless = MatRef::<f32>::new(&[], usize::MAX, 0).unwrap();
    assert!(quantize(endless, Scheme::Fp8PerChannel(Fp8::E4M3Fn), &plain).is_err());
}

#[test]
fn global_scales_keep_their_direction() {
    // An infinite divisor would be a multiplier of 0, and every value silently 0.
    let infinite = QuantizedMatrix::nvfp4(1, 16, &[0; 8], &[0], GlobalScale::divisor(f32::INFINITY));
    assert_eq!(infinite.unwrap_err().to_string(), "global scale[0]: got inf, needed a finite scale");
    let (m, d) = (GlobalScale::multiplier(3.0), GlobalScale::divisor(3.0));
    assert_eq!((m.get(), m.get_divisor()), (3.0, 1.0 / 3.0));
    assert_eq!((d.get(), d.get_divisor()), (1.0 / 3.0, 3.0));
    assert_eq!((GlobalScale::ONE.get(), GlobalScale::ONE.get_divisor()), (1.0, 1.0));
}

#[test]
fn nibble_orders_repack_and_return() {
    let mut rng = Rng(9);
    for block in [2, 16, 32] {
        let codes: Vec<u8> = (0..block / 2 * 3).map(|_| rng.next() as u8).collect();
        let mut halves = vec![0; codes.len()];
        let mut back = vec![0; codes.len()];
        let (i, h) = (NibbleOrder::Interleaved, NibbleOrder::Halves);
        repack_nibbles(i, h, block, &codes, &mut halves).unwrap();
        repack_nibbles(h, i, block, &halves, &mut back).unwrap();
        assert_eq!(back, codes);
        for (c, h) in codes.chunks_exact(block / 2).zip(halves.chunks_exact(block / 2)) {
            let interleaved: Vec<u8> = c.iter().flat_map(|b| [b & 15, b >> 4]).collect();
            let halves: Vec<u8> = h.iter().map(|b| b & 15).chain(h.iter().map(|b| b >> 4)).collect();
            assert_eq!(interleaved, halves);
        }
        repack_nibbles(i, i, block, &codes, &mut back).unwrap();
        assert_eq!(back, codes);
    }
    let text = |block, codes: &[u8], out: usize| {
        let out = &mut vec![0; out][..];
        repack_nibbles(NibbleOrder::Halves, NibbleOrder::Interleaved, block, codes, out).unwrap_err().to_string()
    };
    assert_eq!(text(0, &[], 0), "fp4 block: axis k is empty, needed at least 1");
    assert_eq!(text(3, &[], 0), "fp4 block: axis k is 3, needed a multiple of 2");
    assert_eq!(text(32, &[0; 17], 17), "fp4 codes: axis bytes is 17, needed a multiple of 16");
    assert_eq!(text(32, &[0; 16], 15), "repacked fp4 codes: the slice has 15 elements, its extents need 16");
}

#[test]
fn gguf_blocks_are_checked_before_anything_is_written() {
    let (mut codes, mut scales) = ([9; 32], [9; 4]);
    let text = |r: trn_kernels::Result<()>| r.unwrap_err().to_string();
    assert_eq!(
        text(mxfp4_from_gguf(&[0; 18], &mut codes, &mut scales)),
        "gguf mxfp4: axis bytes is 18, needed a multiple of 17"
    );
    assert_eq!(
        text(mxfp4_from_gguf(&[0; 34], &mut codes, &mut scales)),
        "mxfp4 scales: the slice has 4 elements, its extents need 2"
    );
    assert_eq!(
        text(nvfp4_from_gguf(&[0; 35], &mut codes, &mut scales)),
        "gguf nvfp4: axis bytes is 35, needed a multiple of 36"
    );
    let mut block = [0; 36];
    block[2] = 0x81;
    assert_eq!(
        text(nvfp4_from_gguf(&block, &mut codes, &mut scales)),
        "gguf nvfp4[2]: got UE4M3 code 0x81, needed a scale without the sign bit"
    );
    let mut bytes = [9; 34];
    assert_eq!(
        text(mxfp4_to_gguf(&[0; 32], &[1, 255], &mut bytes)),
        "mxfp4 scales[1]: got E8M0 code 255 (NaN), needed a scale that ggml reads as this crate does"
    );
    assert_eq!(
        text(mxfp4_to_gguf(&[0; 31], &[1, 2], &mut bytes)),
        "mxfp4 codes: the slice has 31 elements, its extents need 32"
    );
    assert!(codes == [9; 32] && scales == [9; 4] && bytes == [9; 34]);
}

/// A slice along k leaves the last tile row short; a slice along n after it must not ask for more.
#[test]
fn block_scaled_matrices_slice_both_ways() {
    let (n, k) = (10, 24);
    let mut rng = Rng(10);
    let x = rng.wide(n * k, -3..=3);
    let scheme = Scheme::Fp8Blockwise { element: Fp8::E4M3Fn, n: 4, k: 8 };
    let whole = run(&x, n, k, scheme, &QuantizeOptions::default());
    for rows in [0..10, 4..10, 8..10, 0..3, 4..8] {
        for cols in [0..24, 8..24, 16..24, 8..16] {
            let part = whole.view().slice_k(cols.clone()).unwrap().slice_n(rows.clone()).unwrap();
            let other = whole.view().slice_n(rows.clone()).unwrap().slice_k(cols.clone()).unwrap();
            for (i, row) in rows.clone().enumerate() {
                for (j, col) in cols.clone().enumerate() {
                    let want = whole.view().value(row, col);
                    assert_eq!((part.value(i, j), other.value(i, j)), (want, want), "{rows:?} {cols:?}");
                }
            }
        }
    }
}

#[test]
fn schemes_know_their_element() {
    for scheme in SCHEMES {
        let got = scheme.element();
        assert_eq!(got, scheme.fp8().map(Fp8::format).or((scheme.bits() == 4).then_some(Format::E2M1)));
        assert_eq!(got.is_none(), scheme == Scheme::Bf16);
    }
    // Saturation is of the element's own maximum: 240 for the IEEE variant.
    let x = [240.0f32, 120.0];
    let got = run(&x, 1, 2, Scheme::Fp8PerTensor(Fp8::E4M3Ieee), &QuantizeOptions::default());
    assert_eq!((got.outer_scales(), got.codes()[0]), (&[1.0][..], Format::E4M3_IEEE.encode(240.0, Overflow::Saturate)));
}

#[test]
fn blocks_beyond_a_given_global_scale_saturate() {
    // 15000 / 6 / 0.5 is far beyond 448.
    let x: Vec<f32> = (0..16).map(|i| i as f32 * 1000.0).collect();
    let global = GlobalScale::multiplier(0.5);
    for rule in Nvfp4Rule::ALL {
        let mut codes = [0; 16];
        let scale = encode_nvfp4_block(rule, global, &x, &mut codes).unwrap();
        assert_eq!((scale.to_f32(), codes[15]), (448.0, 7), "{rule:?}");
    }
}
