//! Planted bugs: each is put into golden data, or into the call, and the comparison that the golden tests use must notice it.
//! The same comparison of the untouched data must find nothing.
#![forbid(unsafe_code)]

#[path = "golden_cases/compare.rs"]
mod compare;
mod support;

use support::Golden;
use trn_kernels::MatRef;
use trn_kernels::num::{Format, Fp8, Overflow};
use trn_kernels::quant::{
    GlobalScale, NibbleOrder, Nvfp4Rule, QuantizeOptions, QuantizedMatrix, ScaleRule, Scheme, encode_mx_block,
    quantize, repack_nibbles,
};

/// The first FLOOR-rule matrix of blocks_mx with packed FP4: (n, k, packed, scales, dequantized values).
fn mxfp4() -> (usize, usize, Vec<u8>, Vec<u8>, Vec<f32>) {
    let golden = Golden::open("blocks_mx");
    let (n, k) = golden.shape2("e2m1.x");
    let plane = |part: &str| golden.u8(&format!("e2m1.floor.{part}"));
    (n, k, plane("packed"), plane("scale"), golden.f32("e2m1.floor.dequant"))
}

fn mxfp4_mismatches(n: usize, k: usize, packed: &[u8], scales: &[u8], want: &[f32]) -> usize {
    compare::dequantized(&QuantizedMatrix::mxfp4(n, k, packed, scales).unwrap(), want).len()
}

#[test]
fn swapped_nibbles_are_noticed() {
    let (n, k, packed, scales, want) = mxfp4();
    assert_eq!(mxfp4_mismatches(n, k, &packed, &scales, &want), 0);
    let swapped: Vec<u8> = packed.iter().map(|b| b.rotate_left(4)).collect();
    assert!(mxfp4_mismatches(n, k, &swapped, &scales, &want) > 0);
}

#[test]
fn scales_shifted_by_one_block_are_noticed() {
    let (n, k, packed, mut scales, want) = mxfp4();
    scales.rotate_right(1);
    assert!(mxfp4_mismatches(n, k, &packed, &scales, &want) > 0);
}

#[test]
fn scales_read_as_bits_of_the_exponent_field_are_noticed() {
    // `code << 23` is right for every code but 0 (2^-127 is subnormal) and 255: one block of each code, every element.
    let golden = Golden::open("decode_tables");
    let (scale_values, elements) = (golden.f32("e8m0.value"), golden.f32("e2m1.value"));
    let scales: Vec<u8> = (0..=255).collect();
    let packed: Vec<u8> = (0..256 * 16).map(|byte| ((byte % 8 * 2) | ((byte % 8 * 2 + 1) << 4)) as u8).collect();
    let values = |scales: &[f32]| -> Vec<f32> { (0..256 * 32).map(|i| elements[i % 16] * scales[i / 32]).collect() };
    assert_eq!(mxfp4_mismatches(256, 32, &packed, &scales, &values(&scale_values)), 0);
    let shifted: Vec<f32> = (0..256).map(|code| f32::from_bits(code << 23)).collect();
    assert!(mxfp4_mismatches(256, 32, &packed, &scales, &values(&shifted)) > 0);
}

#[test]
fn halves_read_as_interleaved_are_noticed() {
    let golden = Golden::open("blocks_gguf");
    let (n, k) = golden.shape2("mxfp4.dequant");
    let (bytes, want) = (golden.u8("mxfp4.bytes"), golden.f32("mxfp4.dequant"));
    let scales: Vec<u8> = bytes.chunks_exact(17).map(|b| b[0]).collect();
    let codes: Vec<u8> = bytes.chunks_exact(17).flat_map(|b| b[1..].to_vec()).collect();
    let mut interleaved = vec![0; codes.len()];
    repack_nibbles(NibbleOrder::Halves, NibbleOrder::Interleaved, 32, &codes, &mut interleaved).unwrap();
    assert_eq!(mxfp4_mismatches(n, k, &interleaved, &scales, &want), 0);
    assert!(mxfp4_mismatches(n, k, &codes, &scales, &want) > 0);
}

#[test]
fn e4m3fn_read_as_ieee_is_noticed() {
    let golden = Golden::open("blocks_mx");
    let (n, k) = golden.shape2("e4m3.x");
    let (codes, scales) = (golden.u8("e4m3.floor.codes"), golden.u8("e4m3.floor.scale"));
    let want = golden.f32("e4m3.floor.dequant");
    let mismatches =
        |element| compare::dequantized(&QuantizedMatrix::mxfp8(element, n, k, &codes, &scales).unwrap(), &want).len();
    assert_eq!(mismatches(Fp8::E4M3Fn), 0);
    assert!(mismatches(Fp8::E4M3Ieee) > 0);
    assert!(mismatches(Fp8::E5M2) > 0);
}

#[test]
fn a_divisor_used_as_a_multiplier_is_noticed() {
    let golden = Golden::open("blocks_nvfp4");
    for case in golden.stems(".x") {
        let name = |part: &str| format!("{case}.{part}");
        let (n, k) = golden.shape2(&name("x"));
        let x = golden.f32(&name("x"));
        // compressed-tensors stores a divisor: read as a multiplier, nothing is near its original.
        let (codes, scales) = (golden.u8(&name("ct.packed")), golden.u8(&name("ct.scale")));
        let stored = golden.f32(&name("ct.global"))[0];
        let far = |global| {
            compare::beyond_nvfp4_error(&QuantizedMatrix::nvfp4(n, k, &codes, &scales, global).unwrap(), &x).len()
        };
        assert_eq!(far(GlobalScale::divisor(stored)), 0, "{case}");
        assert!(far(GlobalScale::multiplier(stored)) > 0, "{case}");
        assert!(far(GlobalScale::ONE) > 0, "{case}: dropped global scale");
        // And torchao's multiplier read as a divisor.
        let (codes, scales) = (golden.u8(&name("packed")), golden.u8(&name("scale")));
        let (stored, want) = (golden.f32(&name("global"))[0], golden.f64(&name("dequant_f64")));
        let wrong = |global| {
            compare::exact_values(&QuantizedMatrix::nvfp4(n, k, &codes, &scales, global).unwrap(), &want).len()
        };
        assert_eq!(wrong(GlobalScale::multiplier(stored)), 0, "{case}");
        assert!(wrong(GlobalScale::divisor(stored)) > 0, "{case}");
    }
}

#[test]
fn another_scale_rule_is_noticed() {
    // Every rule against every rule's golden scales: only the right one agrees with all elements'. (With FP4's alone
    // compared, EVEN would be what compressed-tensors does for all elements.)
    let golden = Golden::open("blocks_mx");
    let elements = [("e4m3", Scheme::Mxfp8(Fp8::E4M3Fn)), ("e5m2", Scheme::Mxfp8(Fp8::E5M2)), ("e2m1", Scheme::Mxfp4)];
    for (name, right) in
        [("floor", ScaleRule::Floor), ("rceil", ScaleRule::Rceil), ("ceil", ScaleRule::Ceil), ("even", ScaleRule::Even)]
    {
        for rule in ScaleRule::ALL {
            let differing = elements.map(|(el, scheme)| {
                let (n, k) = golden.shape2(&format!("{el}.x"));
                let x = golden.f32(&format!("{el}.x"));
                let part = |part: &str| format!("{el}.{name}.{part}");
                let want = golden.u8(&part("scale"));
                let ok = if golden.has(&part("ok")) { golden.u8(&part("ok")) } else { vec![1; want.len()] };
                let x = MatRef::new(&x, n, k).unwrap();
                let got = quantize(x, scheme, &QuantizeOptions { rule, ..Default::default() }).unwrap();
                compare::codes(got.block_scales(), &want, |b| ok[b] == 1).len()
            });
            assert_eq!(differing == [0; 3], rule == right, "{rule:?} for {right:?}: {differing:?} scales differ");
        }
    }
}

/// Mismatching groups of a quantize_mx golden when its codes are made with `rule`.
fn trainium_mismatches(version: &str, rule: ScaleRule) -> usize {
    let golden = Golden::open("blocks_trn");
    let suffix = format!(".e4m3.{version}.scale");
    let mut mismatches = 0;
    for q in golden.stems(&suffix) {
        let (_, f) = golden.shape2(&format!("{q}.x"));
        let x = golden.bf16(&format!("{q}.x"));
        let plane = |part: &str| golden.u8(&format!("{q}.e4m3.{version}.{part}"));
        let (codes, scales, valid) = (plane("codes"), plane("scale"), plane("valid"));
        for g in (0..scales.len()).filter(|&g| valid[g] == 1) {
            let at = |i: usize| (g / (f / 4) * 8 + i / 4) * f + g % (f / 4) * 4 + i % 4;
            let block: Vec<_> = (0..32).map(|i| x[at(i)]).collect();
            let want: Vec<u8> = (0..32).map(|i| codes[at(i)]).collect();
            let mut got = [0; 32];
            let scale = encode_mx_block(Format::E4M3FN, rule, &block, &mut got).unwrap();
            mismatches +=
                usize::from(scale.to_bits() != scales[g] || !compare::codes(&got, &want, |_| true).is_empty());
        }
    }
    mismatches
}

#[test]
fn floor_for_the_trainium_rule_is_noticed() {
    assert_eq!(trainium_mismatches("v2", ScaleRule::Trainium), 0);
    assert!(trainium_mismatches("v2", ScaleRule::Floor) > 0);
    assert_eq!(trainium_mismatches("v1", ScaleRule::Floor), 0);
    assert!(trainium_mismatches("v1", ScaleRule::Trainium) > 0);
}

#[test]
fn another_librarys_nvfp4_rule_is_noticed() {
    // Blocks far below the tensor's maximum are where the libraries part.
    let golden = Golden::open("blocks_nvfp4");
    let mut parted = 0;
    for case in golden.stems(".x") {
        let (n, k) = golden.shape2(&format!("{case}.x"));
        let x = golden.f32(&format!("{case}.x"));
        let x = MatRef::new(&x, n, k).unwrap();
        let want = golden.u8(&format!("{case}.ct.scale"));
        let differ = |nvfp4| {
            let got = quantize(x, Scheme::Nvfp4, &QuantizeOptions { nvfp4, ..Default::default() }).unwrap();
            compare::codes(got.block_scales(), &want, |_| true).len()
        };
        assert_eq!(differ(Nvfp4Rule::CompressedTensors), 0, "{case}");
        parted += differ(Nvfp4Rule::TorchAo);
    }
    assert!(parted > 0);
}

#[test]
fn truncation_instead_of_rounding_is_noticed() {
    let golden = Golden::open("encode_vectors");
    for (name, format) in [("e4m3fn", Format::E4M3FN), ("e5m2", Format::E5M2), ("e2m1", Format::E2M1)] {
        let x: Vec<f32> = golden.u32(&format!("{name}.x_bits")).into_iter().map(f32::from_bits).collect();
        let want = golden.u8(&format!("{name}.sat"));
        let codes = |encode: &dyn Fn(f32) -> u8| x.iter().map(|&x| encode(x)).collect::<Vec<u8>>();
        let rounded = codes(&|x| format.encode(x, Overflow::Saturate));
        assert_eq!(compare::codes_by_class(format, &rounded, &want), compare::NONE, "{name}");
        // One code too far from zero is what truncation would have avoided.
        let truncated = codes(&|x| {
            let code = format.encode(x, Overflow::Saturate);
            if format.decode(code).abs() > x.abs() { code - 1 } else { code }
        });
        assert!(!compare::codes_by_class(format, &truncated, &want).is_empty(), "{name}");
        // Through bf16 first: rounded twice.
        let twice = codes(&|x| format.encode(half::bf16::from_f32(x).to_f32(), Overflow::Saturate));
        assert!(!compare::codes_by_class(format, &twice, &want).is_empty(), "{name}: double rounding");
    }
}

#[test]
fn a_flushed_sign_of_zero_is_noticed() {
    let golden = Golden::open("blocks_mx");
    let (n, k) = golden.shape2("e2m1.x");
    let (codes, scales) = (golden.u8("e2m1.even.codes"), golden.u8("e2m1.even.scale"));
    let want = golden.f32("e2m1.even.dequant");
    let mismatches = |codes: Vec<u8>| {
        let packed: Vec<u8> = codes.chunks_exact(2).map(|p| p[0] | p[1] << 4).collect();
        mxfp4_mismatches(n, k, &packed, &scales, &want)
    };
    assert_eq!(mismatches(codes.clone()), 0);
    assert!(mismatches(codes.iter().map(|&c| if c == 8 { 0 } else { c }).collect()) > 0);
}
