//! Layer operations on any extents and numbers.

use crate::{EXTENTS, NUMBERS, about, edges, number, survives, untouched};
use proptest::prelude::*;
use trn_kernels::layer::{
    GateLayout, RopeFrequencies, RopePairs, RopeScaling, RopeTable, RouterMode, SwigluSpec, add, argmax,
    combine_experts, embed, rms_norm, rms_norm_quantize, route_top_k, swiglu,
};
use trn_kernels::num::Fp8;
use trn_kernels::quant::{QuantizeOptions, QuantizedMatrix, QuantizedMatrixBuf, Scheme};
use trn_kernels::{Cpu, Error, HeadsMut, MatMut, MatRef, Workspace};

const MODES: [RouterMode; 3] = [
    RouterMode::SoftmaxAfterTopK,
    RouterMode::SoftmaxThenTopK { renormalize: true },
    RouterMode::Sigmoid { renormalize: true },
];

/// Matrices without an element, of any rows or any columns, in every place of every operation.
#[test]
fn operands_that_hold_nothing() {
    let cpu = Cpu::baseline();
    let empty = |rows: usize, cols: usize| MatRef::<f32>::new(&[], rows, cols).ok();
    for rows in EXTENTS {
        for cols in EXTENTS {
            let Some(x) = empty(rows, cols) else { continue };
            let name = format_args!("of {rows} x {cols}");
            for (m, n) in
                [(rows, cols), (cols, rows), (rows, cols / 2), (0, cols), (rows, 0), (usize::MAX, 0), (0, usize::MAX)]
            {
                let Some(other) = empty(m, n) else { continue };
                let call = |f: &mut dyn FnMut(MatMut<'_, f32>) -> trn_kernels::Result<()>| {
                    untouched(name, 0, |y| f(MatMut::new(y, m, n)?))
                };
                let same = (m, n) == (rows, cols);
                assert_eq!(call(&mut |y| add(&cpu, x, y)).is_ok(), same, "add {name}");
                assert!(call(&mut |y| rms_norm(&cpu, x, &[1.0f32; 0], 1e-5, y)).is_err());
                let doubled = m == rows && n.checked_mul(2) == Some(cols);
                for layout in [GateLayout::Interleaved, GateLayout::Split] {
                    assert_eq!(call(&mut |y| swiglu(&cpu, SwigluSpec::SILU, layout, x, y)).is_ok(), doubled);
                }
                let _ = call(&mut |y| combine_experts(&cpu, x, other, true, y));
                let _ = call(&mut |y| combine_experts(&cpu, other, x, false, y));
                for mode in MODES {
                    let result = call(&mut |y| route_top_k(mode, x, MatMut::new(&mut [], m, n)?, y));
                    assert!(result.is_err() || n > 0 && n <= cols && m == 0);
                }
                let mut out = QuantizedMatrixBuf::new();
                let to = (Scheme::Mxfp8(Fp8::E4M3Fn), &QuantizeOptions::default());
                let result = survives(name, || {
                    rms_norm_quantize(&cpu, x, &[1.0f32; 0], 1e-5, to, &mut out, &mut Workspace::new())
                });
                assert!(result.is_err());
                let table = QuantizedMatrix::bf16(rows, cols, &[]);
                if let Ok(table) = table {
                    let result = call(&mut |y| embed(&table, &[], y));
                    assert_eq!(result.is_ok(), m == 0 && n == cols);
                    assert!(call(&mut |y| embed(&table, &[u32::MAX], y)).is_err() || rows > u32::MAX as usize);
                }
            }
        }
    }
    assert!(matches!(argmax::<f32>(&[]), Err(Error::Empty { .. })));
}

#[test]
fn rope_of_any_parameters() {
    let parameters =
        [0.0, -1.0, 1.0, 1.0 + f64::EPSILON, 2.0, 1e4, 1e308, 5e-324, 1e-310, f64::MAX, f64::INFINITY, f64::NAN];
    for theta in parameters {
        for dim in [0, 1, 2, 8, 64, usize::MAX - 1, usize::MAX] {
            for a in parameters {
                for b in parameters {
                    let yarn = RopeScaling::Yarn {
                        factor: 2.0,
                        original_context: 4096,
                        beta_fast: a,
                        beta_slow: b,
                        truncate: dim == 8,
                        concentration: None,
                    };
                    let name = format_args!("rope of {theta}, {dim}, beta {a} {b}");
                    if let Ok(f) = survives(name, || RopeFrequencies::new(theta, dim, yarn)) {
                        assert!(f.inv_freq().iter().all(|w| w.is_finite()), "{name}: {:?}", f.inv_freq());
                        assert_eq!(f.rotary_dim(), dim);
                    }
                }
                let scalings = [
                    RopeScaling::None,
                    RopeScaling::Linear { factor: a },
                    RopeScaling::Yarn {
                        factor: a,
                        original_context: u32::MAX,
                        beta_fast: 32.0,
                        beta_slow: 1.0,
                        truncate: true,
                        concentration: Some(a),
                    },
                ];
                for scaling in scalings {
                    let name = format_args!("rope of {theta}, {dim}, {scaling:?}");
                    let Ok(f) = survives(name, || RopeFrequencies::new(theta, dim, scaling)) else { continue };
                    assert!(theta > 1.0 && theta.is_finite() && f.concentration() > 0.0, "{name} was accepted");
                    let mut table = RopeTable::default();
                    survives(name, || table.fill(&f, &[0, 1, u32::MAX])).unwrap();
                    for t in edges(3) {
                        assert_eq!(survives(name, || table.cos_sin(t).is_some()), t < 3);
                    }
                }
            }
        }
    }
}

#[test]
fn rope_of_any_heads() {
    let cpu = Cpu::baseline();
    let f = RopeFrequencies::new(1e4, 8, RopeScaling::None).unwrap();
    let mut tables = vec![RopeTable::default(); 3];
    tables[1].fill(&f, &[]).unwrap();
    tables[2].fill(&f, &[u32::MAX]).unwrap();
    for table in &tables {
        for tokens in EXTENTS {
            for heads in EXTENTS {
                for head_dim in [0, 7, 8, 9, 64, usize::MAX] {
                    let name = format_args!("rope of [{tokens}, {heads}, {head_dim}]");
                    for len in [0, head_dim.min(64)] {
                        let result = untouched(name, len, |x| {
                            table.apply(&cpu, RopePairs::HalfSplit, HeadsMut::new(x, tokens, heads, head_dim)?)
                        });
                        assert!(result.is_err() || tokens == table.tokens() && head_dim >= table.rotary_dim());
                    }
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_shapes_and_numbers(
        (m, n, k) in (about(3), about(4), about(2)),
        (other_m, other_n) in (about(3), about(4)),
        x in prop::collection::vec(number(), 256),
        (a, b, c) in (number(), number(), prop::option::of(number())),
    ) {
        let cpu = Cpu::detect();
        let take = |rows: usize, cols: usize| MatRef::new(x.get(..rows.checked_mul(cols)?)?, rows, cols).ok();
        let (Some(view), Some(wide)) = (take(m, n), take(m, n.saturating_mul(2))) else { return Ok(()) };
        let len = other_m.saturating_mul(other_n).min(256);
        let same = (m, n) == (other_m, other_n);
        let nan = |row: &[f32], y: &[f32]| !row.iter().any(|x| x.is_nan()) || y.iter().all(|y| y.is_nan());

        let result = untouched(format_args!("add"), len, |y| add(&cpu, view, MatMut::new(y, other_m, other_n)?));
        prop_assert_eq!(result.is_ok(), same);

        let result = untouched(format_args!("rms_norm"), len, |y| {
            rms_norm(&cpu, view, &x[..n.min(256)], a, MatMut::new(&mut *y, other_m, other_n)?)?;
            Ok((0..m).all(|i| view.row(i).is_none_or(|row| nan(row, &y[i * n..(i + 1) * n]))))
        });
        prop_assert_eq!(result.is_ok(), same && n > 0 && a.is_finite() && a >= 0.0);
        prop_assert!(result != Ok(false), "rms_norm made a number of NaN");

        let spec = SwigluSpec { alpha: a, limit: c, up_offset: b };
        let result = untouched(format_args!("swiglu"), len, |y| {
            swiglu(&cpu, spec, GateLayout::Split, wide, MatMut::new(y, other_m, other_n)?)
        });
        let good = a.is_finite() && b.is_finite() && c.is_none_or(|c| c > 0.0);
        prop_assert_eq!(result.is_ok(), same && good);
        let _ = survives(format_args!("SwigluSpec::apply"), || spec.apply(a, b));

        for mode in MODES {
            let mut ids = vec![77u32; m.saturating_mul(k).min(256)];
            let len = other_m.saturating_mul(k).min(256);
            let result = untouched(format_args!("route_top_k"), len, |y| {
                route_top_k(mode, view, MatMut::new(&mut ids, m, k)?, MatMut::new(y, other_m, k)?)
            });
            prop_assert!(result.is_err() || ids.iter().all(|id| (*id as usize) < n));
            prop_assert!(result.is_ok() || ids.iter().all(|id| *id == 77));
        }

        if let (Some(weights), Some(y)) = (take(m, k), take(m.saturating_mul(k), n)) {
            let result = untouched(format_args!("combine_experts"), len, |out| {
                combine_experts(&cpu, y, weights, true, MatMut::new(out, other_m, other_n)?)
            });
            prop_assert_eq!(result.is_ok(), same && k > 0);
        }
        let row = &x[..n.min(256)];
        let best = survives(format_args!("argmax"), || argmax(row));
        prop_assert_eq!(best.is_err(), row.is_empty() || row.iter().any(|x| x.is_nan()));
    }
}

#[test]
fn swiglu_of_any_numbers() {
    for gate in NUMBERS {
        for up in NUMBERS {
            for spec in [SwigluSpec::GPT_OSS, SwigluSpec::SILU] {
                let y = survives(format_args!("swiglu of {gate}, {up}"), || spec.apply(gate, up));
                assert!(y.is_nan() || !gate.is_nan() && !up.is_nan());
            }
        }
    }
}
