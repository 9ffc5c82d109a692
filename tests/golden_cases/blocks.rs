//! golden/blocks_*: quantizing gives the libraries' codes and scales bit for bit where the manifests say so, and their bytes
//! decode to their values.
#![forbid(unsafe_code)]

use crate::compare;
use crate::support::{Golden, text, uint};
use trn_kernels::MatRef;
use trn_kernels::num::{E8M0, Format, Fp8, Overflow, Real};
use trn_kernels::quant::{
    GlobalScale, Nvfp4Rule, QuantizationError, QuantizeOptions, QuantizedMatrix, QuantizedMatrixBuf, ScaleRule, Scheme,
    encode_mx_block, mxfp4_from_gguf, mxfp4_to_gguf, nvfp4_from_gguf, quantize,
};

/// Elements as blocks_mx and blocks_trn call them; `None` is FP4.
fn element(name: &str) -> Option<Fp8> {
    match name {
        "e4m3" => Some(Fp8::E4M3Fn),
        "e5m2" => Some(Fp8::E5M2),
        "e2m1" => None,
        other => panic!("unknown element {other}"),
    }
}

fn mx_scheme(name: &str) -> Scheme {
    element(name).map_or(Scheme::Mxfp4, Scheme::Mxfp8)
}

/// An MX matrix from one code per byte, as the golden files hold it.
fn mx_matrix(name: &str, n: usize, k: usize, codes: &[u8], scales: &[u8], check: impl FnOnce(&QuantizedMatrix<'_>)) {
    match element(name) {
        Some(fp8) => check(&QuantizedMatrix::mxfp8(fp8, n, k, codes, scales).unwrap()),
        None => {
            let packed: Vec<u8> = codes.chunks_exact(2).map(|p| p[0] | p[1] << 4).collect();
            check(&QuantizedMatrix::mxfp4(n, k, &packed, scales).unwrap());
        }
    }
}

fn quantized<T: Real>(x: &[T], n: usize, k: usize, scheme: Scheme, options: QuantizeOptions) -> QuantizedMatrixBuf {
    quantize(MatRef::new(x, n, k).unwrap(), scheme, &options).unwrap()
}

fn mx_rule(name: &str) -> ScaleRule {
    match name {
        "floor" => ScaleRule::Floor,
        "rceil" => ScaleRule::Rceil,
        "ceil" => ScaleRule::Ceil,
        "even" => ScaleRule::Even,
        "ct" => ScaleRule::CompressedTensors,
        other => panic!("unknown rule {other}"),
    }
}

#[test]
fn mx() {
    let golden = Golden::open("blocks_mx");
    for el in golden.stems(".x").into_iter().filter(|el| el != "special") {
        let (n, k) = golden.shape2(&format!("{el}.x"));
        let x = golden.f32(&format!("{el}.x"));
        let rules =
            golden.stems(".scale").into_iter().filter_map(|s| Some(s.strip_prefix(&format!("{el}."))?.to_owned()));
        for rule in rules {
            let name = |part: &str| format!("{el}.{rule}.{part}");
            let options = QuantizeOptions { rule: mx_rule(&rule), ..Default::default() };
            let got = quantized(&x, n, k, mx_scheme(&el), options);
            let scale = golden.u8(&name("scale"));
            if rule == "ct" {
                // Meaningful where 1e-30 < amax < 1e30, says the manifest.
                let amax = |b: usize| x[b * 32..b * 32 + 32].iter().fold(0.0f32, |m, x| m.max(x.abs()));
                let differ = compare::codes(got.block_scales(), &scale, |b| amax(b) > 1e-30 && amax(b) < 1e30);
                assert_eq!(differ, compare::NONE, "{el} {rule}");
                continue;
            }
            // Where torchao deviates from the exact computation the mask is 0, and the exact result is given beside it. Rules
            // without a mask deviate in the same way: nonzero blocks with scale code 0 are divided by 2^-126.
            let codes = golden.u8(&name("codes"));
            let small = |b: usize| scale[b] == 0 && x[b * 32..b * 32 + 32].iter().any(|x| *x != 0.0);
            let ok = if golden.has(&name("ok")) {
                golden.u8(&name("ok"))
            } else {
                let format = mx_scheme(&el).element().unwrap();
                for b in (0..scale.len()).filter(|&b| small(b)) {
                    let doubled = |x: &f32| format.encode(x * 2f32.powi(126), Overflow::Saturate);
                    let torchao: Vec<u8> = x[b * 32..b * 32 + 32].iter().map(doubled).collect();
                    assert_eq!(
                        compare::codes(&torchao, &codes[b * 32..b * 32 + 32], |_| true),
                        compare::NONE,
                        "{el} {rule}"
                    );
                }
                (0..scale.len()).map(|b| u8::from(!small(b))).collect()
            };
            let got_codes = compare::unpacked(&got.view());
            assert_eq!(compare::codes(got.block_scales(), &scale, |b| ok[b] == 1), compare::NONE, "{el} {rule} scales");
            assert_eq!(compare::codes(&got_codes, &codes, |i| ok[i / 32] == 1), compare::NONE, "{el} {rule} codes");
            if golden.has(&name("exact_scale")) {
                assert_eq!(got.block_scales(), golden.u8(&name("exact_scale")), "{el} {rule} exact scales");
                assert_eq!(got_codes, golden.u8(&name("exact_codes")), "{el} {rule} exact codes");
            }
            let dequant = golden.f32(&name("dequant"));
            mx_matrix(&el, n, k, &codes, &scale, |m| {
                assert_eq!(compare::dequantized(m, &dequant), compare::NONE, "{el} {rule} dequant");
            });
            if golden.has(&name("packed")) {
                let packed = golden.u8(&name("packed"));
                assert_eq!(
                    compare::codes(got.codes(), &packed, |byte| ok[byte / 16] == 1),
                    compare::NONE,
                    "{el} {rule} packed"
                );
                let matrix = QuantizedMatrix::mxfp4(n, k, &packed, &scale).unwrap();
                assert_eq!(compare::dequantized(&matrix, &dequant), compare::NONE, "{el} {rule} packed dequant");
            }
            // The report leaves nothing out, and finds nothing clipped by a rule that never clips.
            let report = QuantizationError::measure(MatRef::new(&x, n, k).unwrap(), &got.view()).unwrap();
            assert_eq!((report.compared, report.non_finite), (n * k, 0), "{el} {rule}");
            assert!(rule != "ceil" || report.clipped == 0, "{el} {rule}: {report:?}");
        }
    }
    non_finite_mx_blocks(&golden);
    golden.assert_all_read();
}

/// Libraries disagree on these blocks; this crate makes them NaN, as all of them do for NaN.
fn non_finite_mx_blocks(golden: &Golden) {
    let (rows, k) = golden.shape2("special.x");
    let x = golden.f32("special.x");
    for stem in golden.stems(".scale").into_iter().filter(|s| s.starts_with("special.")) {
        let (el, rule) = stem["special.".len()..].split_once('.').unwrap();
        let options = QuantizeOptions { rule: mx_rule(rule), ..Default::default() };
        let got = quantized(&x, rows, k, mx_scheme(el), options);
        assert_eq!(got.block_scales(), vec![255; rows], "{stem}");
        assert!(got.codes().iter().all(|c| *c == 0), "{stem}");
        assert!(compare::values(&got.view()).iter().all(|v| v.is_nan()), "{stem}");
        let (scale, codes) = (golden.u8(&format!("{stem}.scale")), golden.u8(&format!("{stem}.codes")));
        mx_matrix(el, rows, k, &codes, &scale, |m| {
            let values = compare::values(m);
            for (row, x) in x.chunks_exact(k).enumerate() {
                let values = &values[row * k..(row + 1) * k];
                if x.iter().any(|x| x.is_nan()) {
                    assert_eq!(scale[row], 255, "{stem} row {row}");
                }
                if scale[row] == 255 {
                    assert!(values.iter().all(|v| v.is_nan()), "{stem} row {row}: scale 255 decodes to a number");
                }
            }
        });
    }
}

#[test]
fn nvfp4() {
    let golden = Golden::open("blocks_nvfp4");
    for case in golden.stems(".x") {
        let name = |part: &str| format!("{case}.{part}");
        let (n, k) = golden.shape2(&name("x"));
        let x = golden.f32(&name("x"));
        let near_tie = golden.u8(&name("near_tie"));
        let codes_of = |packed: &[u8]| packed.iter().flat_map(|b| [b & 15, b >> 4]).collect::<Vec<u8>>();
        let rules = [
            (Nvfp4Rule::TorchAo, "", GlobalScale::multiplier(golden.f32(&name("global"))[0])),
            (Nvfp4Rule::CompressedTensors, "ct.", GlobalScale::divisor(golden.f32(&name("ct.global"))[0])),
        ];
        for (rule, prefix, global) in rules {
            let got = quantized(&x, n, k, Scheme::Nvfp4, QuantizeOptions { nvfp4: rule, ..Default::default() });
            assert_eq!(got.global_scale(), global, "{case} {rule:?}");
            let scale = golden.u8(&name(&format!("{prefix}scale")));
            assert_eq!(got.block_scales(), scale, "{case} {rule:?}");
            let packed = golden.u8(&name(&format!("{prefix}packed")));
            let differ = compare::codes(&codes_of(got.codes()), &codes_of(&packed), |i| near_tie[i] == 0);
            assert_eq!(differ, compare::NONE, "{case} {rule:?}");
            let matrix = QuantizedMatrix::nvfp4(n, k, &packed, &scale, global).unwrap();
            assert_eq!(compare::beyond_nvfp4_error(&matrix, &x), compare::NONE, "{case} {rule:?}");
            if prefix.is_empty() {
                assert_eq!(compare::exact_values(&matrix, &golden.f64(&name("dequant_f64"))), compare::NONE, "{case}");
            }
        }
    }
    // One level: gauss.x under no global scale.
    let (n, k) = golden.shape2("gauss.x");
    let options = QuantizeOptions { nvfp4: Nvfp4Rule::TorchAo, global: Some(GlobalScale::ONE), ..Default::default() };
    let got = quantized(&golden.f32("gauss.x"), n, k, Scheme::Nvfp4, options);
    assert_eq!(got.block_scales(), golden.u8("single.scale"));
    assert_eq!(got.codes(), golden.u8("single.packed"));
    golden.assert_all_read();
}

#[test]
fn fp8() {
    let golden = Golden::open("blocks_fp8");
    let (n, k) = golden.shape2("x");
    let x = golden.bf16("x");
    for case in golden.cases() {
        let name = text(case, "case");
        let group = case["group"].as_array().unwrap();
        let group = (group[0].as_u64().unwrap() as usize, group[1].as_u64().unwrap() as usize);
        let tiles = Scheme::Fp8Blockwise { element: Fp8::E4M3Fn, n: group.0, k: group.1 };
        let scheme = match group {
            g if g == (n, k) => Scheme::Fp8PerTensor(Fp8::E4M3Fn),
            g if g == (1, k) => Scheme::Fp8PerChannel(Fp8::E4M3Fn),
            _ => tiles,
        };
        let got = quantized(&x, n, k, scheme, QuantizeOptions::default());
        let scale = golden.f32(&format!("{name}.scale"));
        check_f32_scales(name, got.outer_scales(), &scale);
        // Where a quotient lies next to a rounding midpoint, dividing and multiplying by a reciprocal may differ by one code.
        let near_tie = golden.u32(&format!("{name}.near_tie_idx"));
        let want = golden.u8(&format!("{name}.codes"));
        for i in compare::codes(got.codes(), &want, |_| true) {
            assert!(near_tie.contains(&(i as u32)), "{name}: code {i}: got {}, want {}", got.codes()[i], want[i]);
            assert_eq!(got.codes()[i].abs_diff(want[i]), 1, "{name}: code {i}");
        }
        // The special cases of the grid are the grid.
        let general = quantized(&x, n, k, tiles, QuantizeOptions::default());
        assert_eq!((general.codes(), general.outer_scales()), (got.codes(), got.outer_scales()), "{name}");
        if scheme == Scheme::Fp8PerTensor(Fp8::E4M3Fn) {
            let options = QuantizeOptions { static_scale: Some(scale[0]), ..Default::default() };
            let fixed = quantized(&x, n, k, scheme, options);
            assert_eq!((fixed.codes(), fixed.outer_scales()), (got.codes(), &scale[..]), "{name}: static scale");
        }
    }
    // DeepSeek: tiles of 128 x 128, ragged at both far edges.
    let (n, k) = golden.shape2("ragged.x");
    let scheme = Scheme::Fp8Blockwise { element: Fp8::E4M3Fn, n: 128, k: 128 };
    let got = quantized(&golden.bf16("ragged.x"), n, k, scheme, QuantizeOptions::default());
    assert_eq!(golden.shape2("ragged.weight_scale_inv"), (n.div_ceil(128), k.div_ceil(128)));
    check_f32_scales("ragged", got.outer_scales(), &golden.f32("ragged.weight_scale_inv"));
    assert_eq!(compare::codes(got.codes(), &golden.u8("ragged.weight"), |_| true), compare::NONE);
    golden.assert_all_read();
}

/// Bit for bit, but that a group of zeros may have any finite scale.
fn check_f32_scales(name: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{name}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!(got.to_bits() == want.to_bits() || (*want == 0.0 && *got == 1.0), "{name}: scale {i}: {got} {want}");
    }
}

#[test]
fn gguf() {
    let golden = Golden::open("blocks_gguf");
    for (bytes, dequant) in [("mxfp4.bytes", "mxfp4.dequant"), ("mxfp4.rand_bytes", "mxfp4.rand_dequant")] {
        let (n, k) = golden.shape2(dequant);
        let (bytes, want) = (golden.u8(bytes), golden.f32(dequant));
        let (mut codes, mut scales) = (vec![0; n * k / 2], vec![0; n * k / 32]);
        mxfp4_from_gguf(&bytes, &mut codes, &mut scales).unwrap();
        // ggml's table has no -0, and it reads scale code 255 as 2^128 where this crate reads NaN.
        for matrix in
            [QuantizedMatrix::mxfp4_gguf(n, k, &bytes).unwrap(), QuantizedMatrix::mxfp4(n, k, &codes, &scales).unwrap()]
        {
            for (i, (got, &want)) in compare::values(&matrix).into_iter().zip(&want).enumerate() {
                if scales[i / 32] == 255 {
                    assert!(got.is_nan(), "element {i}");
                } else {
                    assert_eq!(got as f32, want, "element {i}");
                }
            }
        }
        let mut back = vec![0; bytes.len()];
        if scales.contains(&255) {
            mxfp4_to_gguf(&codes, &scales, &mut back).unwrap_err();
        } else {
            mxfp4_to_gguf(&codes, &scales, &mut back).unwrap();
            assert_eq!(back, bytes);
        }
    }
    gguf_encoder(&golden);

    let (n, k) = golden.shape2("nvfp4.rand_dequant");
    let want = golden.f32("nvfp4.rand_dequant");
    let (mut codes, mut scales) = (vec![0; n * k / 2], vec![0; n * k / 16]);
    nvfp4_from_gguf(&golden.u8("nvfp4.rand_bytes"), &mut codes, &mut scales).unwrap();
    let matrix = QuantizedMatrix::nvfp4(n, k, &codes, &scales, GlobalScale::ONE).unwrap();
    let want: Vec<f64> = want.into_iter().map(f64::from).collect();
    assert_eq!(compare::exact_values(&matrix, &want), compare::NONE);
    // `formats::ue4m3_vectors` covers the rest of the file.
    for name in ["ue4m3.x", "ue4m3.gguf", "ue4m3.rne"] {
        golden.bytes(name);
    }
    golden.assert_all_read();
}

/// ggml's quantizer follows the FLOOR rule but for an f32 logarithm, rounds ties toward zero and writes no -0. With those
/// three differences taken out, its blocks are ours.
fn gguf_encoder(golden: &Golden) {
    let x = golden.f32("mxfp4.x");
    let (n, k) = golden.shape2("mxfp4.x");
    let theirs = golden.u8("mxfp4.bytes");
    let theirs = QuantizedMatrix::mxfp4_gguf(n, k, &theirs).unwrap();
    let ours = quantized(&x, n, k, Scheme::Mxfp4, QuantizeOptions::default());
    for (block, x) in x.chunks_exact(32).enumerate() {
        let (row, col) = (block * 32 / k, block * 32 % k);
        let amax = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let scale = theirs.block_scale_code(row, col).unwrap();
        if scale != ours.block_scales()[block] {
            // The last place of an f32 logarithm up to 149 is 2^-16 at most: only so near an integer can its floor be wrong.
            let log2 = f64::from(amax).log2();
            assert!((log2 - log2.round()).abs() < 2f64.powi(-16), "block {block}: scale {scale}, amax {amax}");
        }
        let exponent = E8M0::from_bits(scale).exponent().unwrap();
        for (i, &x) in x.iter().enumerate() {
            let scaled = f64::from(x) * 2f64.powi(-exponent);
            let code = Format::E2M1.encode(scaled as f32, Overflow::Saturate);
            // Of a tie ggml takes the smaller magnitude.
            let code = if is_midpoint(scaled.abs()) && f64::from(Format::E2M1.decode(code & 7)) > scaled.abs() {
                code - 1
            } else {
                code
            };
            let want = if code == 8 { 0 } else { code };
            assert_eq!(theirs.code(row, col + i), Some(u16::from(want)), "block {block} element {i}: {x}");
        }
    }
}

/// Whether a magnitude lies half way between two FP4 magnitudes.
fn is_midpoint(magnitude: f64) -> bool {
    (0..7).any(|c| f64::from(Format::E2M1.decode(c) + Format::E2M1.decode(c + 1)) == 2.0 * magnitude)
}

#[test]
fn trainium_quantize_mx() {
    let golden = Golden::open("blocks_trn");
    for stem in golden.stems(".valid") {
        let [q, el, version] = stem.split('.').collect::<Vec<_>>()[..] else { panic!("unexpected name {stem}") };
        let rule = match version {
            "v1" => ScaleRule::Floor,
            "v2" => ScaleRule::Trainium,
            other => panic!("unknown rule {other}"),
        };
        let (p, f) = golden.shape2(&format!("{q}.x"));
        let x = golden.bf16(&format!("{q}.x"));
        let plane = |part: &str| golden.u8(&format!("{stem}.{part}"));
        let (want, scale, valid) = (plane("codes"), plane("scale"), plane("valid"));
        let format = element(el).map_or(Format::E2M1, Fp8::format);
        // A scaling group is 8 partitions x 4 consecutive free elements.
        let group = |g: usize| {
            let (gp, gf) = (g / (f / 4), g % (f / 4));
            (0..32).map(move |i| (gp * 8 + i / 4) * f + gf * 4 + i % 4)
        };
        assert_eq!((scale.len(), valid.len()), (p * f / 32, p * f / 32), "{stem}");
        assert!(valid.contains(&1), "{stem}: nothing to compare");
        for g in (0..scale.len()).filter(|&g| valid[g] == 1) {
            let block: Vec<_> = group(g).map(|i| x[i]).collect();
            let mut codes = [0; 32];
            let got = encode_mx_block(format, rule, &block, &mut codes).unwrap();
            assert_eq!(got.to_bits(), scale[g], "{stem} group {g}");
            let want: Vec<u8> = group(g).map(|i| want[i]).collect();
            assert_eq!(compare::codes(&codes, &want, |_| true), compare::NONE, "{stem} group {g}");
        }
        // Every quadrant of 32 partitions holds its four rows of scales first; the other 28 rows are free.
        let hw = plane("scale_hw");
        assert_eq!(hw.len(), p * f / 4, "{stem}");
        for (partition, row) in hw.chunks_exact(f / 4).enumerate() {
            let (quadrant, r) = (partition / 32, partition % 32);
            if r < 4 {
                let dense = 4 * quadrant + r;
                assert_eq!(row, &scale[dense * (f / 4)..(dense + 1) * (f / 4)], "{stem} partition {partition}");
            } else {
                assert!(row.iter().all(|s| *s == 0), "{stem} partition {partition}");
            }
        }
    }
    for case in golden.cases() {
        nc_matmul_mx(&golden, text(case, "matmul"), uint(case, "M"), uint(case, "N"), uint(case, "K"));
    }
    golden.assert_all_read();
}

/// One operand of `nc_matmul_mx`, `[K/4, columns * 4]` with scales `[K/32, columns]`, as rows along k: element
/// `k = 4 * partition + q` of row `j` is at `[partition, 4 j + q]`. A scaling group is 32 consecutive k.
fn contraction_rows(golden: &Golden, name: &str, el: &str, columns: usize, k: usize) -> Vec<f64> {
    let (codes, scales) = (golden.u8(name), golden.u8(&format!("{name}_scale")));
    assert_eq!((codes.len(), scales.len()), (columns * k, columns * k / 32), "{name}");
    let code = |i: usize| codes[(i % k / 4) * columns * 4 + i / k * 4 + i % 4];
    let scale = |b: usize| scales[(b % (k / 32)) * columns + b / (k / 32)];
    let rows: Vec<u8> = (0..columns * k).map(code).collect();
    let scales: Vec<u8> = (0..columns * k / 32).map(scale).collect();
    let mut values = vec![];
    mx_matrix(el, columns, k, &rows, &scales, |m| values = compare::values(m));
    values
}

/// The products are exact in f64, so two sums of K of them differ by at most `2 (K - 1) 2^-53 sum |a b|`, whatever the order.
fn nc_matmul_mx(golden: &Golden, name: &str, m: usize, n: usize, k: usize) {
    let (_, elements) = name.split_once('.').unwrap();
    let (stationary, moving) = elements.split_once('_').unwrap();
    let a = contraction_rows(golden, &format!("{name}.stationary"), stationary, m, k);
    let b = contraction_rows(golden, &format!("{name}.moving"), moving, n, k);
    let want = golden.f64(&format!("{name}.out"));
    assert_eq!(want.len(), m * n, "{name}");
    for (i, want) in want.iter().enumerate() {
        let (a, b) = (&a[i / n * k..][..k], &b[i % n * k..][..k]);
        let products = || a.iter().zip(b).map(|(a, b)| a * b);
        let (got, magnitude): (f64, f64) = (products().sum(), products().map(f64::abs).sum());
        let bound = 2.0 * (k as f64 - 1.0) * 2f64.powi(-53) * magnitude;
        assert!((got - want).abs() <= bound, "{name} output {i}: {got} {want}, bound {bound}");
    }
}
