//! Products over matrices of any extents: operands that hold nothing can be as long as `usize` counts.

use crate::{EXTENTS, NUMBERS, about, number, survives, untouched};
use proptest::prelude::*;
use trn_kernels::layer::embed;
use trn_kernels::matmul::oracle::{Expected, OutputType, matmul as oracle};
use trn_kernels::matmul::{Activation, Activations, MatmulOptions, Output, PackedExperts, RowSource};
use trn_kernels::quant::{QuantizedExperts, QuantizedMatrix};
use trn_kernels::{Cpu, Error, MatMut, MatRef, Workspace};

const ROOM: usize = 64 * 64;

/// A matrix of ones that no slice longer than [`ROOM`] backs.
fn ones(data: &[f32], rows: usize, cols: usize) -> Option<MatRef<'_, f32>> {
    MatRef::new(data.get(..rows.checked_mul(cols)?)?, rows, cols).ok()
}

/// Every product that `w` can stand in, with as many rows as have no memory to need.
pub(crate) fn products(w: &QuantizedMatrix<'_>) {
    let cpu = Cpu::baseline();
    let (n, k) = (w.n(), w.k());
    let what = format!("{:?} {n} x {k}", w.scheme());
    let Ok(packed) = survives(format_args!("pack of {what}"), || cpu.pack(w)) else { return };
    assert_eq!((packed.n(), packed.k(), packed.scheme()), (n, k, w.scheme()));
    let _ = packed.bytes();
    let data = vec![1.0f32; ROOM];
    let mut workspace = Workspace::new();
    let options = MatmulOptions::default();
    for m in EXTENTS.into_iter().filter(|m| *m < 3 || *m > 64) {
        let Some(x) = ones(&data, m, k) else { continue };
        let len = m.saturating_mul(n).min(ROOM);
        let name = format_args!("matmul of {m} rows by {what}");
        let result = untouched(name, len, |y| cpu.matmul(x, &packed, MatMut::new(y, m, n)?, &options, &mut workspace));
        assert_eq!(result.is_ok(), m as u128 * n as u128 <= ROOM as u128, "{name}");
        let expected =
            survives(format_args!("oracle of {m} rows by {what}"), || oracle(x, w, &options, &[], OutputType::F32));
        match expected {
            Ok(expected) => assert_eq!(Some(expected.len()), m.checked_mul(n)),
            Err(e) => assert!(matches!(e, Error::Overflow { .. }), "{name}: {e}"),
        }
    }
    let _ = survives(format_args!("matmul of {what} by itself"), || {
        let len = n.saturating_mul(n).min(ROOM);
        let mut y = vec![0.0f32; len];
        cpu.matmul(w, &packed, MatMut::new(&mut y, n, n)?, &options, &mut workspace)
    });
    experts(w, &cpu);
    for tokens in [&[][..], &[0], &[u32::MAX]] {
        let len = tokens.len().saturating_mul(k).min(ROOM);
        let _ =
            untouched(format_args!("embed from {what}"), len, |y| embed(w, tokens, MatMut::new(y, tokens.len(), k)?));
    }
}

fn experts(w: &QuantizedMatrix<'_>, cpu: &Cpu<'_>) {
    let (n, k) = (w.n(), w.k());
    let what = format!("2 experts of {:?} {n} x {k}", w.scheme());
    let stack = QuantizedExperts::new(vec![w.clone(), w.clone()]).unwrap();
    let Ok(packed) = survives(format_args!("pack of {what}"), || cpu.pack_experts(&stack)) else { return };
    assert_eq!((packed.len(), packed.is_empty(), packed.n(), packed.k()), (2, false, n, k));
    let _ = packed.bytes();
    let data = vec![1.0f32; ROOM];
    let (mut workspace, options) = (Workspace::new(), MatmulOptions::default());
    for m in [0, 1, 2, usize::MAX / 2, usize::MAX] {
        let Some(x) = ones(&data, m, k) else { continue };
        let len = m.saturating_mul(n).min(ROOM);
        for offsets in [&[0, 0, m as u32][..], &[0, m as u32, m as u32], &[0, 1], &[], &[1, 0, 2], &[0, u32::MAX, 2]] {
            let _ = untouched(format_args!("grouped matmul of {m} rows by {what}"), len, |y| {
                cpu.grouped_matmul(x, &packed, offsets, MatMut::new(y, m, n)?, &options, &mut workspace)
            });
        }
        for (ids, top_k) in
            [(&[][..], 1), (&[0], 1), (&[1, 0], 2), (&[2, 0], 1), (&[u32::MAX], 1), (&[0, 1], 0), (&[0], usize::MAX)]
        {
            for source in [RowSource::Token, RowSource::Slot] {
                let len = ids.len().saturating_mul(n).min(ROOM);
                let name = format_args!("gathered matmul of {m} rows by {what}");
                let result = untouched(name, len, |y| {
                    let y = MatMut::new(y, ids.len(), n)?;
                    cpu.gather_matmul(x, source, &packed, ids, top_k, y, &options, &mut workspace)
                });
                assert!(result.is_err() || top_k > 0 && ids.iter().all(|id| *id < 2), "{name} was accepted");
            }
        }
    }
}

#[test]
fn nothing_of_anything() {
    assert!(matches!(PackedExperts::new(vec![]), Err(Error::Empty { .. })));
    let ws = survives(format_args!("an empty workspace"), Workspace::new);
    assert_eq!(ws.bytes(), 0);
    for x in NUMBERS {
        for activation in [Activation::None, Activation::Relu, Activation::Silu, Activation::GeluTanh] {
            let y = survives(format_args!("{activation:?} of {x}"), || activation.apply(x));
            assert!(y.is_nan() || !x.is_nan(), "{activation:?} made {y} of NaN");
        }
        for value in NUMBERS {
            let expected = Expected { value: value.into(), bound: x.into() };
            assert_eq!(expected.admits(f64::NAN), value.is_nan());
        }
    }
    let a = Activations::from(MatRef::<f32>::new(&[], usize::MAX, 0).unwrap());
    assert_eq!((a.m(), a.k()), (usize::MAX, 0));
    let mut none = [0.0f32; 0];
    let y = Output::from(MatMut::new(&mut none, 0, usize::MAX).unwrap());
    assert_eq!((y.m(), y.n()), (0, usize::MAX));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Shapes that almost fit, numbers that are none: refused whole, or computed whole.
    #[test]
    fn any_shapes_and_numbers(
        (m, n, k) in (about(3), about(5), about(33)),
        (w_n, w_k) in (about(5), about(33)),
        x in prop::collection::vec(number(), 99),
        codes in prop::collection::vec(any::<u8>(), 165 * 2),
        bias in prop::option::of(about(5)),
        (alpha, accumulate) in (number(), any::<bool>()),
    ) {
        let Some(x) = ones(&x, m, k) else { return Ok(()) };
        let bytes = w_n.saturating_mul(w_k).saturating_mul(2).min(codes.len());
        let Ok(w) = QuantizedMatrix::bf16(w_n, w_k, &codes[..bytes]) else { return Ok(()) };
        let cpu = Cpu::detect();
        let Ok(packed) = survives(format_args!("pack"), || cpu.pack(&w)) else { return Ok(()) };
        let bias = bias.map(|len| vec![f32::NAN; len.min(64)]);
        let options = MatmulOptions { bias: bias.as_deref(), alpha, accumulate, activation: Activation::Silu };
        let len = m.saturating_mul(n).min(ROOM);
        let result = untouched(format_args!("matmul"), len, |y| {
            let y = MatMut::new(y, m, n)?;
            cpu.matmul(x, &packed, y, &options, &mut Workspace::new())
        });
        let fits = (k, n) == (w_k, w_n) && bias.as_ref().is_none_or(|b| b.len() == n);
        prop_assert_eq!(result.is_ok(), fits && m.checked_mul(n) == Some(len));
        let previous = vec![f64::NAN; len];
        let _ = survives(format_args!("oracle"), || oracle(x, &w, &options, &previous, OutputType::Bf16));
    }
}
