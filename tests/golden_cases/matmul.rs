//! golden/matmul: every case, every tier, every output type, within the manifest's bound and within the crate's own.

use crate::support::{Golden, text, uint};
use crate::tiers;
use half::bf16;
use serde_json::Value;
use trn_kernels::matmul::{Activations, MatmulOptions, oracle};
use trn_kernels::num::Fp8;
use trn_kernels::quant::{GlobalScale, QuantizedMatrix};
use trn_kernels::{Cpu, MatMut, MatRef, Workspace};

/// A golden operand: its bytes, to be borrowed.
pub(crate) struct Operand {
    format: String,
    pub(crate) rows: usize,
    k: usize,
    codes: Vec<u8>,
    pub(crate) scale: Vec<u8>,
    scale_f32: Vec<f32>,
    scale_shape: Vec<usize>,
    global: f32,
}

impl Operand {
    pub(crate) fn open(golden: &Golden, name: &str, format: &str, rows: usize, k: usize) -> Operand {
        let mut operand = Operand {
            format: format.into(),
            rows,
            k,
            codes: vec![],
            scale: vec![],
            scale_f32: vec![],
            scale_shape: vec![],
            global: 1.0,
        };
        let tensor = |part: &str| format!("{name}.{part}");
        operand.codes =
            golden.bytes(&tensor(["codes", "packed", "data"].into_iter().find(|p| golden.has(&tensor(p))).unwrap()));
        if golden.has(&tensor("scale")) {
            operand.scale_shape = golden.shape(&tensor("scale"));
            if format.starts_with("fp8") {
                operand.scale_f32 = golden.f32(&tensor("scale"));
            } else {
                operand.scale = golden.u8(&tensor("scale"));
            }
        }
        if golden.has(&tensor("global")) {
            operand.global = golden.f32(&tensor("global"))[0];
        }
        operand
    }

    fn element(&self) -> Fp8 {
        match self.format.as_str() {
            f if f.contains("ieee") => Fp8::E4M3Ieee,
            f if f.contains("e5m2") => Fp8::E5M2,
            f if f.contains("e3m4") => Fp8::E3M4,
            _ => Fp8::E4M3Fn,
        }
    }

    pub(crate) fn matrix(&self) -> QuantizedMatrix<'_> {
        let (n, k, e) = (self.rows, self.k, self.element());
        match self.format.as_str() {
            "mxfp4" => QuantizedMatrix::mxfp4(n, k, &self.codes, &self.scale),
            "nvfp4" => QuantizedMatrix::nvfp4(n, k, &self.codes, &self.scale, GlobalScale::multiplier(self.global)),
            f if f.starts_with("mxfp8") => QuantizedMatrix::mxfp8(e, n, k, &self.codes, &self.scale),
            f if f.ends_with("_tensor") => QuantizedMatrix::fp8_per_tensor(e, n, k, &self.codes, self.scale_f32[0]),
            f if f.ends_with("_row") => QuantizedMatrix::fp8_per_channel(e, n, k, &self.codes, &self.scale_f32),
            f if f.ends_with("_g128") => {
                QuantizedMatrix::fp8_blockwise(e, n, k, &self.codes, &self.scale_f32, (1, 128))
            }
            f if f.ends_with("_block128") => {
                QuantizedMatrix::fp8_blockwise(e, n, k, &self.codes, &self.scale_f32, (128, 128))
            }
            other => panic!("unknown format {other}"),
        }
        .unwrap()
    }
}

/// Outputs outside `(K + 8) 2^-24 |A||W|^T` (+ `2^-8 |ref|` for bf16), the acceptance the manifest suggests.
pub(crate) fn violations(k: usize, y: &[f64], reference: &[f64], magnitude: &[f64], bf16_output: bool) -> usize {
    assert!(y.len() == reference.len() && y.len() == magnitude.len() && !y.is_empty());
    let outside = |((y, r), a): ((&f64, &f64), &f64)| {
        let bound =
            (k as f64 + 8.0) * 2f64.powi(-24) * a + 1e-30 + if bf16_output { 2f64.powi(-8) * r.abs() } else { 0.0 };
        (y - r).abs().partial_cmp(&bound).is_none_or(std::cmp::Ordering::is_gt)
    };
    y.iter().zip(reference).zip(magnitude).filter(|v| outside(*v)).count()
}

#[test]
fn all_cases() {
    let golden = Golden::open("matmul");
    let mut ws = Workspace::new();
    for case in golden.cases() {
        let (s, m, n, k) = (uint(case, "shape"), uint(case, "M"), uint(case, "N"), uint(case, "K"));
        let (act, weight) = (text(case, "act"), text(case, "weight"));
        let a = Operand::open(&golden, &format!("s{s}.a.{act}"), act, m, k);
        let w = Operand::open(&golden, &format!("s{s}.w.{weight}"), weight, n, k);
        let reference = golden.f64(&format!("s{s}.y.{act}.{weight}"));
        let magnitude = golden.real(&format!("s{s}.abs.{act}.{weight}"));
        let floats: Vec<f32> = a.codes.chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect();
        let halves: Vec<bf16> = a.codes.chunks_exact(2).map(|c| bf16::from_le_bytes(c.try_into().unwrap())).collect();
        let quantized;
        let x: Activations<'_> = match act {
            "f32" => MatRef::new(&floats, m, k).unwrap().into(),
            "bf16" => MatRef::new(&halves, m, k).unwrap().into(),
            _ => {
                quantized = a.matrix();
                (&quantized).into()
            }
        };
        let w = w.matrix();
        let options = MatmulOptions::default();
        let expected = oracle::matmul(x, &w, &options, &[], oracle::OutputType::F32).unwrap();
        // Two f64 sums of the same k terms, in any order: each term is rounded at most k - 1 times by additions and 3 times by
        // products with scales. One more covers second order terms and the magnitude's storage in f32.
        let relative = 2.0 * (k as f64 + 3.0) * 2f64.powi(-53);
        for ((e, r), a) in expected.iter().zip(&reference).zip(&magnitude) {
            assert!((e.value - r).abs() <= relative * a, "{case}: the oracle is not the reference");
        }
        for (_, cpu) in tiers::all_builds() {
            let packed = cpu.pack(&w).unwrap();
            let mut y = vec![f32::NAN; m * n];
            cpu.matmul(x, &packed, MatMut::new(&mut y, m, n).unwrap(), &options, &mut ws).unwrap();
            let got: Vec<f64> = y.iter().map(|v| f64::from(*v)).collect();
            assert_eq!(violations(k, &got, &reference, &magnitude, false), 0, "{case} f32 output");
            for (e, y) in expected.iter().zip(&got) {
                assert!(e.admits(*y), "{case}: {y} is not within {e:?}");
            }
            let mut y = vec![bf16::NAN; m * n];
            cpu.matmul(x, &packed, MatMut::new(&mut y, m, n).unwrap(), &options, &mut ws).unwrap();
            let got: Vec<f64> = y.iter().map(|v| f64::from(*v)).collect();
            assert_eq!(violations(k, &got, &reference, &magnitude, true), 0, "{case} bf16 output");
        }
    }
}

/// Runs every case of a weight format with the weight's bytes changed, and counts outputs out of bounds.
fn violations_with(weight: &str, change: impl Fn(&mut Operand)) -> usize {
    let golden = Golden::open("matmul");
    let cases: Vec<_> =
        golden.cases().iter().filter(|c| text(c, "act") == "bf16" && text(c, "weight") == weight).collect();
    assert!(!cases.is_empty(), "no bf16 x {weight} case");
    let count = |case: &&Value| {
        let (s, m, n, k) = (uint(case, "shape"), uint(case, "M"), uint(case, "N"), uint(case, "K"));
        let x = golden.bf16(&format!("s{s}.a.bf16.data"));
        let mut w = Operand::open(&golden, &format!("s{s}.w.{weight}"), weight, n, k);
        change(&mut w);
        let cpu = Cpu::detect();
        let mut y = vec![0.0f32; m * n];
        let x = MatRef::new(&x, m, k).unwrap();
        let out = MatMut::new(&mut y, m, n).unwrap();
        cpu.matmul(x, &cpu.pack(&w.matrix()).unwrap(), out, &MatmulOptions::default(), &mut Workspace::new()).unwrap();
        let y: Vec<f64> = y.into_iter().map(f64::from).collect();
        let reference = golden.f64(&format!("s{s}.y.bf16.{weight}"));
        violations(k, &y, &reference, &golden.real(&format!("s{s}.abs.bf16.{weight}")), false)
    };
    cases.iter().map(count).sum()
}

#[test]
fn planted_swapped_nibbles_are_noticed() {
    for weight in ["mxfp4", "nvfp4"] {
        assert_eq!(violations_with(weight, |_| {}), 0);
        assert!(violations_with(weight, |w| w.codes.iter_mut().for_each(|b| *b = b.rotate_left(4))) > 0, "{weight}");
    }
}

#[test]
fn planted_scales_shifted_by_a_block_are_noticed() {
    for weight in ["mxfp4", "mxfp8_e4m3", "mxfp8_e5m2", "nvfp4"] {
        assert!(violations_with(weight, |w| w.scale.rotate_left(1)) > 0, "{weight}");
    }
    assert!(violations_with("fp8_e4m3_row", |w| w.scale_f32.rotate_left(1)) > 0);
    // Weights of no more than 128 x 128 have one block: other data may hold no others.
    let blocks = std::cell::Cell::new(0);
    let shift = |w: &mut Operand| {
        blocks.set(blocks.get().max(w.scale_f32.len()));
        w.scale_f32.rotate_left(1);
    };
    let noticed = violations_with("fp8_e4m3_block128", shift) > 0;
    assert_eq!(noticed, blocks.get() > 1);
}

#[test]
fn planted_scale_direction_and_format_mixups_are_noticed() {
    assert!(violations_with("nvfp4", |w| w.global = 1.0 / w.global) > 0, "divisor for multiplier");
    assert!(violations_with("nvfp4", |w| w.global = 1.0) > 0, "global scale dropped");
    assert!(violations_with("fp8_e4m3_row", |w| w.format = "fp8_ieee_row".into()) > 0, "E4M3FN read as IEEE");
    assert!(violations_with("mxfp8_e5m2", |w| w.format = "mxfp8_e4m3".into()) > 0, "E5M2 read as E4M3");
    assert!(violations_with("mxfp4", |w| w.scale.iter_mut().for_each(|s| *s += 1)) > 0, "scale bias off by one");
}
