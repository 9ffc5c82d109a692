//! Layer operations refuse wrong shapes and parameters, say why, and write nothing.
#![forbid(unsafe_code)]

use trn_kernels::layer::{
    GateLayout, RopeFrequencies, RopePairs, RopeScaling, RopeTable, RouterMode, SwigluSpec, add, combine_experts,
    rms_norm, route_top_k, swiglu,
};
use trn_kernels::{Cpu, HeadsMut, MatMut, MatRef, Result};

/// Runs `f` on an output of `rows` x `cols` and asks for this refusal and an untouched output.
fn refused(rows: usize, cols: usize, text: &str, f: impl FnOnce(MatMut<'_, f32>) -> Result<()>) {
    let mut y = vec![-3.5f32; rows * cols];
    let error = f(MatMut::new(&mut y, rows, cols).unwrap()).unwrap_err();
    assert_eq!(error.to_string(), text);
    assert!(y.iter().all(|y| *y == -3.5), "{text}: the output was written");
}

fn zeros(rows: usize, cols: usize) -> MatRef<'static, f32> {
    MatRef::new(&[0.0; 256][..rows * cols], rows, cols).unwrap()
}

#[test]
fn rms_norm_refusals() {
    let cpu = Cpu::detect();
    let call = |x, weight: usize, eps| move |y: MatMut<'_, f32>| rms_norm(&cpu, x, &vec![1.0f32; weight], eps, y);
    refused(2, 0, "rms_norm input: axis k is empty, needed at least 1", call(zeros(2, 0), 0, 1e-5));
    refused(2, 4, "rms_norm weight: axis k is 3, needed 4", call(zeros(2, 4), 3, 1e-5));
    refused(3, 4, "rms_norm output: axis m is 3, needed 2", call(zeros(2, 4), 4, 1e-5));
    refused(2, 5, "rms_norm output: axis k is 5, needed 4", call(zeros(2, 4), 4, 1e-5));
    let needed = "needed a finite number that is not negative";
    refused(2, 4, &format!("rms_norm eps[0]: got -1, {needed}"), call(zeros(2, 4), 4, -1.0));
    refused(2, 4, &format!("rms_norm eps[0]: got NaN, {needed}"), call(zeros(2, 4), 4, f32::NAN));
    refused(2, 4, &format!("rms_norm eps[0]: got inf, {needed}"), call(zeros(2, 4), 4, f32::INFINITY));
}

#[test]
fn residual_refusals() {
    let cpu = Cpu::detect();
    refused(2, 4, "residual: axis m is 2, needed 3", |y| add(&cpu, zeros(3, 4), y));
    refused(2, 4, "residual: axis k is 4, needed 5", |y| add(&cpu, zeros(2, 5), y));
}

#[test]
fn swiglu_refusals() {
    let cpu = Cpu::detect();
    let call = |spec, x| move |y: MatMut<'_, f32>| swiglu(&cpu, spec, GateLayout::Split, x, y);
    let good = SwigluSpec::GPT_OSS;
    refused(2, 4, "swiglu gate_up: axis m is 3, needed 2", call(good, zeros(3, 8)));
    refused(2, 4, "swiglu gate_up: axis 2n is 9, needed 8", call(good, zeros(2, 9)));
    refused(2, 4, "swiglu gate_up: axis 2n is 4, needed 8", call(good, zeros(2, 4)));
    let bad = SwigluSpec { alpha: f32::NAN, ..good };
    refused(2, 4, "swiglu alpha[0]: got NaN, needed a finite number", call(bad, zeros(2, 8)));
    let bad = SwigluSpec { up_offset: f32::INFINITY, ..good };
    refused(2, 4, "swiglu up_offset[0]: got inf, needed a finite number", call(bad, zeros(2, 8)));
    for (limit, got) in [(0.0, "0"), (-7.0, "-7"), (f32::NAN, "NaN")] {
        let bad = SwigluSpec { limit: Some(limit), ..good };
        refused(2, 4, &format!("swiglu limit[0]: got {got}, needed a number above zero"), call(bad, zeros(2, 8)));
    }
}

#[test]
fn router_refusals() {
    let call = |logits, rows: usize, k: usize| {
        move |weights: MatMut<'_, f32>| {
            let mut ids = vec![77u32; rows * k];
            let view = MatMut::new(&mut ids, rows, k).unwrap();
            let result = route_top_k(RouterMode::SoftmaxAfterTopK, logits, view, weights);
            assert!(ids.iter().all(|id| *id == 77), "ids were written");
            result
        }
    };
    refused(2, 0, "router ids: axis k is empty, needed at least 1", call(zeros(2, 8), 2, 0));
    refused(2, 9, "router ids: axis k is 9, needed 8", call(zeros(2, 8), 2, 9));
    refused(2, 4, "router ids: axis m is 3, needed 2", call(zeros(2, 8), 3, 4));
    refused(3, 4, "router weights: axis m is 3, needed 2", call(zeros(2, 8), 2, 4));
    refused(2, 3, "router weights: axis k is 3, needed 4", call(zeros(2, 8), 2, 4));
}

#[test]
fn combine_refusals() {
    let cpu = Cpu::detect();
    let call = |y, weights| move |out: MatMut<'_, f32>| combine_experts(&cpu, y, weights, true, out);
    refused(2, 5, "expert weights: axis k is empty, needed at least 1", call(zeros(0, 5), zeros(2, 0)));
    refused(3, 5, "combined output: axis m is 3, needed 2", call(zeros(8, 5), zeros(2, 4)));
    refused(2, 6, "combined output: axis n is 6, needed 5", call(zeros(8, 5), zeros(2, 4)));
    refused(2, 5, "expert outputs: axis m * k is 7, needed 8", call(zeros(7, 5), zeros(2, 4)));
}

#[test]
fn rope_refusals() {
    let text = |theta, dim, scaling| RopeFrequencies::new(theta, dim, scaling).unwrap_err().to_string();
    let plain = RopeScaling::None;
    assert_eq!(text(1e4, 0, plain), "rope: axis rotary_dim is empty, needed at least 1");
    assert_eq!(text(1e4, 7, plain), "rope: axis rotary_dim is 7, needed a multiple of 2");
    assert_eq!(
        text(1e4, usize::MAX - 1, plain),
        "rope table: the product of its extents does not fit in usize or in memory"
    );
    for (theta, got) in [(1.0, "1"), (-3.0, "-3"), (f64::NAN, "NaN"), (f64::INFINITY, "inf")] {
        assert_eq!(text(theta, 8, plain), format!("rope theta[0]: got {got}, needed a finite number above 1"));
    }
    let linear = RopeScaling::Linear { factor: 0.0 };
    assert_eq!(text(1e4, 8, linear), "rope factor[0]: got 0, needed a finite number above 0");
    let yarn = |factor, original_context, beta_fast, beta_slow, concentration| {
        let truncate = false;
        text(1e4, 8, RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, truncate, concentration })
    };
    assert_eq!(yarn(0.5, 9, 32.0, 1.0, None), "rope factor[0]: got 0.5, needed a finite number of at least 1");
    assert_eq!(yarn(2.0, 0, 32.0, 1.0, None), "rope original_context[0]: got 0, needed at least 1 token");
    assert_eq!(yarn(2.0, 9, 32.0, 0.0, None), "rope beta_slow[0]: got 0, needed a finite number above 0");
    assert_eq!(yarn(2.0, 9, 1.0, 1.0, None), "rope beta_fast[0]: got 1, needed a finite number above beta_slow");
    let needed = "needed a finite number above 0";
    assert_eq!(yarn(2.0, 9, 2.0, 1.0, Some(f64::NAN)), format!("rope concentration[0]: got NaN, {needed}"));
}

#[test]
fn rope_apply_refusals() {
    let cpu = Cpu::detect();
    let f = RopeFrequencies::new(1e4, 8, RopeScaling::None).unwrap();
    let mut table = RopeTable::default();
    table.fill(&f, &[1, 2]).unwrap();
    let mut x = [1.0f32; 48];
    for (tokens, heads, head_dim, text) in [
        (3, 2, 8, "rope table: axis tokens is 2, needed 3"),
        (2, 4, 6, "rope heads: axis head_dim is 6, needed 8"),
        (2, 24, 0, "rope heads: axis head_dim is 0, needed 8"),
    ] {
        let view = HeadsMut::new(&mut x[..tokens * heads * head_dim], tokens, heads, head_dim).unwrap();
        assert_eq!(table.apply(&cpu, RopePairs::HalfSplit, view).unwrap_err().to_string(), text);
    }
    assert!(x.iter().all(|x| *x == 1.0));
}
