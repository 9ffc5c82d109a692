//! golden/decode_tables and golden/encode_vectors: every code, and adversarial inputs to every encoder.
#![forbid(unsafe_code)]

use crate::compare;
use crate::support::{Golden, number, text, uint};
use serde_json::Value;
use trn_kernels::num::{E8M0, F4E2M1x2, F8E4M3Fn, Format, Fp8, Overflow, decode_slice, encode_slice};
use trn_kernels::quant::encode_ue4m3;

/// The formats as the manifests call them.
fn format(name: &str) -> Format {
    match name {
        "e4m3fn" => Format::E4M3FN,
        "e4m3_ieee" => Format::E4M3_IEEE,
        "e5m2" => Format::E5M2,
        "e3m4_ieee" => Format::E3M4,
        "e2m1" => Format::E2M1,
        "e2m3" => Format::E2M3,
        "e3m2" => Format::E3M2,
        other => panic!("the manifest names a format this crate does not have: {other}"),
    }
}

fn fp8(format: Format) -> Option<Fp8> {
    Fp8::ALL.into_iter().find(|f| f.format() == format)
}

fn code_list(case: &Value, key: &str) -> Vec<u8> {
    let list = case[key].as_array().unwrap_or_else(|| panic!("case {case}: no list {key}"));
    list.iter().map(|v| u8::try_from(v.as_u64().unwrap()).unwrap()).collect()
}

#[test]
fn decode_tables() {
    let golden = Golden::open("decode_tables");
    for case in golden.cases() {
        let name = text(case, "format");
        let decode: Box<dyn Fn(u8) -> f32> = match name {
            "e8m0" => Box::new(|code| E8M0::from_bits(code).to_f32()),
            _ => {
                let format = format(name);
                assert_eq!(f64::from(format.max()), number(case, "max_finite"), "{name}");
                Box::new(move |code| format.decode(code))
            }
        };
        let bits = golden.u32(&format!("{name}.f32_bits"));
        assert_eq!(bits.len(), uint(case, "codes"), "{name}");
        let all: Vec<u8> = (0..bits.len()).map(|c| c as u8).collect();
        let got: Vec<f32> = all.iter().map(|&c| decode(c)).collect();
        let want: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        assert_eq!(compare::bits(&got, &want), compare::NONE, "{name}");
        assert_eq!(compare::bits(&got, &golden.f32(&format!("{name}.value"))), compare::NONE, "{name}");
        let codes_where =
            |what: fn(f32) -> bool| -> Vec<u8> { all.iter().copied().filter(|&c| what(decode(c))).collect() };
        assert_eq!(codes_where(f32::is_nan), code_list(case, "nan_codes"), "{name}");
        assert_eq!(codes_where(f32::is_infinite), code_list(case, "inf_codes"), "{name}");
        let smallest = got.iter().copied().filter(|v| *v > 0.0).fold(f32::INFINITY, f32::min);
        assert_eq!(f64::from(smallest), number(case, "smallest_positive"), "{name}");
        if name != "e8m0"
            && let Some(fp8) = fp8(format(name))
        {
            let mut sliced = vec![0.0; all.len()];
            decode_slice(fp8, &all, &mut sliced).unwrap();
            assert_eq!(compare::bits(&sliced, &want), compare::NONE, "{name}: decode_slice");
        }
    }
    let ue4m3 = golden.f32("ue4m3.value");
    let got: Vec<f32> = (0..ue4m3.len()).map(|c| F8E4M3Fn::from_bits(c as u8).to_f32()).collect();
    assert_eq!(compare::bits(&got, &ue4m3), compare::NONE);
    let pairs = golden.f32("e2m1x2.value");
    let got: Vec<f32> = (0..pairs.len() / 2).flat_map(|b| F4E2M1x2::from_bits(b as u8).to_f32()).collect();
    assert_eq!(compare::bits(&got, &pairs), compare::NONE);
    golden.assert_all_read();
}

#[test]
fn encode_vectors() {
    let golden = Golden::open("encode_vectors");
    for case in golden.cases() {
        let name = text(case, "format");
        let format = format(name);
        let x: Vec<f32> = golden.u32(&format!("{name}.x_bits")).into_iter().map(f32::from_bits).collect();
        assert_eq!(x.len(), uint(case, "n"), "{name}");
        assert_eq!(f64::from(format.max()), number(case, "max_finite"), "{name}");
        assert_eq!(f64::from(format.decode(1)), number(case, "smallest_subnormal"), "{name}");
        // FP4 and FP6 have neither infinity nor NaN: they saturate in both modes.
        let saturated = format!("{name}.sat");
        let unsaturated = format!("{name}.nonsat");
        let unsaturated = if golden.has(&unsaturated) { &unsaturated } else { &saturated };
        for (overflow, want) in [(Overflow::Saturate, &saturated), (Overflow::NonSaturating, unsaturated)] {
            let want = golden.u8(want);
            let got: Vec<u8> = x.iter().map(|&x| format.encode(x, overflow)).collect();
            assert_eq!(compare::codes_by_class(format, &got, &want), compare::NONE, "{name} {overflow:?}");
            for (i, code) in want.iter().enumerate().filter(|(_, c)| format.decode(**c).is_nan()) {
                assert!(code_list(case, "nan_codes").contains(&got[i]), "{name}: {code} for {}", x[i]);
            }
            if let Some(fp8) = fp8(format) {
                let mut sliced = vec![0; x.len()];
                encode_slice(fp8, &x, overflow, &mut sliced).unwrap();
                assert_eq!(sliced, got, "{name}: encode_slice");
            }
        }
    }
    let x = golden.f32("e8m0.x");
    let codes = |scale: fn(f32) -> E8M0| x.iter().map(|&x| scale(x).to_bits()).collect::<Vec<u8>>();
    assert_eq!(codes(E8M0::floor), golden.u8("e8m0.floor"));
    assert_eq!(codes(E8M0::ceil), golden.u8("e8m0.ceil"));
    golden.assert_all_read();
}

#[test]
fn ue4m3_vectors() {
    let golden = Golden::open("blocks_gguf");
    let x = golden.f32("ue4m3.x");
    let got: Vec<u8> = x.iter().map(|&x| encode_ue4m3(x).to_bits()).collect();
    assert_eq!(got, golden.u8("ue4m3.rne"));
    // ggml's own encoder sends all that rounds to 256 or more to 448, rounds normal values half up and some subnormal ones down.
    let ggml = golden.u8("ue4m3.gguf");
    for ((&x, &got), &ggml) in x.iter().zip(&got).zip(&ggml) {
        let value = |code| f64::from(F8E4M3Fn::from_bits(code).to_f32());
        if value(got) >= 256.0 {
            assert_eq!(value(ggml), f64::from(F8E4M3Fn::MAX), "{x}");
        } else if x < 0.015_625 {
            assert!(ggml.abs_diff(got) <= 1, "{x}: {ggml} {got}");
        } else if got != ggml {
            assert_eq!(ggml, got + 1, "{x}");
            assert_eq!(f64::from(x) * 2.0, value(got) + value(ggml), "{x} is not a tie");
        }
    }
}
