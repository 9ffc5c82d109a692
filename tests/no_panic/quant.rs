//! Quantized matrices of any extents, sliced, stepped, read anywhere; quantizers of any numbers under any options.

use crate::matmul::products;
use crate::{EXTENTS, NUMBERS, about, edges, number, survives};
use proptest::prelude::*;
use trn_kernels::num::{E8M0, Format, Fp8};
use trn_kernels::quant::{
    GlobalScale, NibbleOrder, Nvfp4Rule, QuantizationError, QuantizeOptions, QuantizedExperts, QuantizedMatrix,
    QuantizedMatrixBuf, ScaleRule, Scheme, encode_mx_block, encode_nvfp4_block, encode_ue4m3, mxfp4_from_gguf,
    mxfp4_to_gguf, nvfp4_from_gguf, quantize, quantize_into, repack_nibbles,
};
use trn_kernels::{Error, MatRef, Result};

const F8: Fp8 = Fp8::E4M3Fn;
const ROOM: usize = 64 * 64 * 2 + 256;

/// Schemes whose f32 scale tiles are as hostile as the extents.
fn schemes() -> Vec<Scheme> {
    let mut schemes = vec![
        Scheme::Bf16,
        Scheme::Mxfp4,
        Scheme::Mxfp8(F8),
        Scheme::Nvfp4,
        Scheme::Fp8PerTensor(Fp8::E5M2),
        Scheme::Fp8PerChannel(Fp8::E3M4),
    ];
    for (n, k) in [(1, 1), (1, 128), (2, 32), (16, 7), (usize::MAX, 32), (1, usize::MAX), (usize::MAX, usize::MAX)] {
        schemes.push(Scheme::Fp8Blockwise { element: Fp8::E4M3Ieee, n, k });
    }
    schemes.extend([(0, 32), (32, 0)].map(|(n, k)| Scheme::Fp8Blockwise { element: F8, n, k }));
    schemes
}

/// A matrix of `scheme` over slices of these lengths.
fn build<'a>(
    scheme: Scheme,
    (n, k): (usize, usize),
    codes: &'a [u8],
    (bytes, floats): (&'a [u8], &'a [f32]),
) -> Result<QuantizedMatrix<'a>> {
    match scheme {
        Scheme::Bf16 => QuantizedMatrix::bf16(n, k, codes),
        Scheme::Mxfp4 => QuantizedMatrix::mxfp4(n, k, codes, bytes),
        Scheme::Mxfp8(e) => QuantizedMatrix::mxfp8(e, n, k, codes, bytes),
        Scheme::Nvfp4 => QuantizedMatrix::nvfp4(n, k, codes, bytes, GlobalScale::ONE),
        Scheme::Fp8PerTensor(e) => {
            QuantizedMatrix::fp8_per_tensor(e, n, k, codes, floats.first().copied().unwrap_or(1.0))
        }
        Scheme::Fp8PerChannel(e) => QuantizedMatrix::fp8_per_channel(e, n, k, codes, floats),
        Scheme::Fp8Blockwise { element, n: rows, k: cols } => {
            QuantizedMatrix::fp8_blockwise(element, n, k, codes, floats, (rows, cols))
        }
    }
}

/// Elements of codes (in bytes), of byte scales and of f32 scales that the documentation asks for; `None` past `ROOM`.
fn planes(scheme: Scheme, n: usize, k: usize) -> Option<(usize, usize, usize)> {
    let (n, k) = (n as u128, k as u128);
    let codes = n.saturating_mul(k * scheme.bits() as u128 / 8);
    let bytes = if scheme.block() > 1 { n * (k / scheme.block() as u128) } else { 0 };
    let floats = match scheme {
        Scheme::Fp8PerTensor(_) => 1,
        Scheme::Fp8PerChannel(_) => n,
        Scheme::Fp8Blockwise { n: rows, k: cols, .. } if rows > 0 && cols > 0 => {
            n.div_ceil(rows as u128) * k.div_ceil(cols as u128)
        }
        _ => 0,
    };
    let small = |x: u128| usize::try_from(x).ok().filter(|x| *x <= ROOM);
    Some((small(codes)?, small(bytes)?, small(floats)?))
}

#[test]
fn matrices_of_any_extents() {
    let (codes, bytes, floats) = (vec![0x5Au8; ROOM], vec![0x70u8; ROOM], vec![0.5f32; ROOM]);
    let mut accepted = 0;
    for scheme in schemes() {
        for n in EXTENTS {
            for k in EXTENTS {
                let lens = planes(scheme, n, k);
                for (c, b, f) in lens.into_iter().chain([(0, 0, 0), (64, 0, 0), (64, 2, 2)]) {
                    let name = format_args!("{scheme:?} {n} x {k} of {c}, {b}, {f}");
                    let parts = (&bytes[..b], &floats[..f]);
                    let Ok(w) = survives(name, || build(scheme, (n, k), &codes[..c], parts)) else { continue };
                    let needed = lens.unwrap_or_else(|| panic!("{name}: accepted without the memory it needs"));
                    assert_eq!((c, b), (needed.0, if scheme.block() > 1 { needed.1 } else { b }), "{name}");
                    accepted += 1;
                    matrix(&w);
                    parts_of(&w);
                }
            }
        }
    }
    for n in EXTENTS {
        for k in EXTENTS {
            let len = (n as u128).saturating_mul(k as u128 / 32 * 17).min(ROOM as u128) as usize;
            for len in [len, 0, 17] {
                let name = format_args!("mxfp4_gguf {n} x {k} of {len}");
                let Ok(w) = survives(name, || QuantizedMatrix::mxfp4_gguf(n, k, &codes[..len])) else { continue };
                accepted += 1;
                matrix(&w);
                parts_of(&w);
            }
        }
    }
    assert!(accepted > 500, "only {accepted} matrices were accepted: the test sees too little");
}

/// Everything a matrix can be asked.
fn matrix(w: &QuantizedMatrix<'_>) {
    let (n, k) = (w.n(), w.k());
    let what = format!("{:?} {n} x {k}", w.scheme());
    for row in edges(n) {
        for col in edges(k) {
            let inside = row < n && col < k;
            survives(format_args!("reading ({row}, {col}) of {what}"), || {
                assert_eq!(w.code(row, col).is_some(), inside);
                assert_eq!(w.block_scale(row, col).is_some(), inside);
                assert_eq!(w.outer_scale(row, col).is_some(), inside);
                assert_eq!(w.value(row, col).is_some(), inside);
                assert!(inside || w.block_scale_code(row, col).is_none());
            });
        }
    }
    survives(format_args!("{what}"), || {
        let _ = (w.bytes(), w.nibble_order(), w.check_finite());
        let len = n.saturating_mul(k).min(ROOM);
        assert_eq!(w.dequantize_f32(&mut vec![0.0; len]).is_ok(), n as u128 * k as u128 == len as u128);
        assert_eq!(w.dequantize_bf16(&mut vec![Default::default(); len]).is_ok(), n as u128 * k as u128 == len as u128);
    });
    let original = vec![1.0f32; n.saturating_mul(k).min(ROOM)];
    if let Ok(original) = MatRef::new(&original, n, k) {
        let report = survives(format_args!("error of {what}"), || QuantizationError::measure(original, w)).unwrap();
        assert_eq!(report.compared + report.non_finite, n * k);
    }
    products(w);
}

/// Slices and steps of a matrix, which are matrices.
fn parts_of(w: &QuantizedMatrix<'_>) {
    let (n, k) = (w.n(), w.k());
    let check = |name: std::fmt::Arguments<'_>, part: Result<QuantizedMatrix<'_>>| match part {
        Ok(part) => {
            survives(name, || (part.bytes(), part.value(part.n().wrapping_sub(1), part.k().wrapping_sub(1))));
            let (n, k) = (part.n(), part.k());
            // Refused only where n is inside a scale tile.
            let none = survives(name, || part.slice_n(n..n));
            assert!(none.is_err() || none.is_ok_and(|p| p.n() == 0), "{name}");
            let one = survives(name, || part.step_n(0, usize::MAX));
            assert!(one.is_err() || one.is_ok_and(|p| p.n() == n.min(1)), "{name}");
            let _ = survives(name, || (part.check_finite().is_ok(), part.slice_k(k..k).is_ok()));
            assert_eq!(survives(name, || part.dequantize_f32(&mut [])).is_ok(), n == 0 || k == 0);
        }
        Err(e) => assert!(!e.to_string().contains("index -"), "{name}: {e}"),
    };
    for a in edges(n) {
        for b in edges(n) {
            let name = format_args!("slice_n({a}..{b}) of {n} x {k}");
            let part = survives(name, || w.slice_n(a..b));
            assert!(part.is_err() || a <= b && b <= n, "{name} was accepted");
            check(name, part);
            let name = format_args!("step_n({a}, {b}) of {n} x {k}");
            let part = survives(name, || w.step_n(a, b));
            assert!(part.is_err() || a <= n && b > 0, "{name} was accepted");
            check(name, part);
        }
    }
    for a in edges(k) {
        for b in edges(k) {
            let name = format_args!("slice_k({a}..{b}) of {n} x {k}");
            let part = survives(name, || w.slice_k(a..b));
            assert!(part.is_err() || a <= b && b <= k, "{name} was accepted");
            check(name, part);
        }
    }
    for experts in [0, 1, 2, 3, n, usize::MAX] {
        let stack = survives(format_args!("split of {n} x {k} by {experts}"), || QuantizedExperts::split(w, experts));
        if let Ok(stack) = stack {
            assert_eq!((stack.len(), stack.n() * experts, stack.k(), stack.is_empty()), (experts, n, k, false));
            survives(format_args!("experts"), || {
                (stack.scheme(), stack.get(usize::MAX).is_none(), stack.iter().count())
            });
            survives(format_args!("step_n"), || (stack.step_n(0, 0).is_err(), stack.step_n(usize::MAX, 1).is_err()));
        }
    }
}

#[test]
fn experts_of_any_extents() {
    let bytes = [0u8; 512];
    for experts in EXTENTS {
        for n in EXTENTS {
            for k in EXTENTS {
                for (blocks, scales) in [(0, 0), (16, 1), (512, 32)] {
                    let name = format_args!("{experts} experts of {n} x {k}");
                    let (blocks, scales) = (&bytes[..blocks], &bytes[..scales]);
                    let stack = survives(name, || QuantizedExperts::mxfp4(experts, n, k, blocks, scales));
                    let extents = experts as u128 * n as u128;
                    let fits = extents.checked_mul(k as u128 / 2).is_some_and(|e| e == blocks.len() as u128 && e > 0);
                    assert!(!stack.is_ok_and(|_| !fits), "{name} was accepted");
                }
            }
        }
    }
    assert!(matches!(QuantizedExperts::new(vec![]), Err(Error::Empty { .. })));
}

/// A global scale that is not finite, whichever way it is stored, is refused: 1 / inf would be a silent zero.
#[test]
fn global_scales_that_are_not_numbers() {
    for x in NUMBERS {
        for (global, name) in [(GlobalScale::multiplier(x), "multiplier"), (GlobalScale::divisor(x), "divisor")] {
            let w = survives(format_args!("{name} {x}"), || QuantizedMatrix::nvfp4(1, 16, &[0; 8], &[0x38], global));
            assert!(w.is_err() || x.is_finite() && global.get().is_finite(), "{name} {x} was accepted");
            let _ = survives(format_args!("{name} {x}"), || global.get_divisor());
        }
        let refused = !x.is_finite();
        assert_eq!(QuantizedMatrix::fp8_per_tensor(F8, 1, 1, &[0], x).is_err(), refused);
        assert_eq!(QuantizedMatrix::fp8_per_channel(F8, 1, 1, &[0], &[x][..]).is_err(), refused);
        assert_eq!(QuantizedMatrix::fp8_blockwise(F8, 1, 1, &[0], &[x][..], (1, 1)).is_err(), refused);
    }
}

#[test]
fn quantizers_of_any_extents() {
    for scheme in schemes() {
        for n in EXTENTS {
            for k in EXTENTS {
                let data = vec![0.5f32; n.saturating_mul(k).min(ROOM)];
                let Ok(x) = MatRef::new(&data, n, k) else { continue };
                let name = format_args!("quantize {n} x {k} to {scheme:?}");
                let result = survives(name, || quantize(x, scheme, &QuantizeOptions::default()));
                assert!(result.is_err() || k > 0, "{name}: accepted without columns");
                if let Ok(q) = result {
                    assert_eq!((q.scheme(), q.n(), q.k()), (scheme, n, k));
                    survives(name, || matrix(&q.view()));
                    let _ = (q.codes(), q.block_scales(), q.outer_scales(), q.global_scale());
                }
            }
        }
    }
}

fn any_scheme() -> impl Strategy<Value = Scheme> {
    proptest::sample::select(schemes())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn quantizers_of_any_numbers(
        scheme in any_scheme(),
        x in prop::collection::vec(number(), 128),
        shape in prop_oneof![Just((2, 64)), Just((4, 32)), Just((8, 16)), Just((1, 128)), Just((128, 1))],
        (rule, nvfp4) in (0usize..6, 0usize..3),
        static_scale in prop::option::weighted(0.3, number()),
        global in prop::option::weighted(0.3, (number(), any::<bool>())),
    ) {
        let x = MatRef::new(&x, shape.0, shape.1).unwrap();
        let options = QuantizeOptions {
            rule: ScaleRule::ALL[rule],
            nvfp4: Nvfp4Rule::ALL[nvfp4],
            static_scale,
            global: global.map(|(g, d)| if d { GlobalScale::divisor(g) } else { GlobalScale::multiplier(g) }),
        };
        let mut out = QuantizedMatrixBuf::new();
        match survives(format_args!("quantize to {scheme:?}"), || quantize_into(x, scheme, &options, &mut out)) {
            Err(_) => prop_assert_eq!((out.n(), out.k(), out.codes().len()), (0, 0, 0)),
            Ok(()) => {
                let q = out.view();
                for (row, col) in (0..shape.0).flat_map(|r| (0..shape.1).map(move |c| (r, c))) {
                    let (x, q) = (x.row(row).unwrap()[col], q.value(row, col).unwrap());
                    // bf16 keeps an infinity; nothing else makes a number of what is none.
                    prop_assert!(x.is_finite() || !q.is_finite(), "{} became {}", x, q);
                }
                matrix(&q);
            }
        }
    }

    #[test]
    fn blocks_of_any_numbers(
        x in prop::collection::vec(number(), 0..40),
        len in about(32),
        (format, rule, nvfp4) in (0usize..3, 0usize..6, 0usize..3),
        global in number(),
    ) {
        let mut codes = vec![0xEE; len.min(64)];
        let format = [Format::E2M1, Format::E4M3FN, Format::E5M2][format];
        let rule = ScaleRule::ALL[rule];
        let result = survives(format_args!("encode_mx_block"), || encode_mx_block(format, rule, &x, &mut codes));
        prop_assert_eq!(result.is_ok(), codes.len() == x.len());
        match result {
            Ok(scale) => prop_assert_eq!(scale == E8M0::NAN, x.iter().any(|x| !x.is_finite())),
            Err(_) => prop_assert!(codes.iter().all(|c| *c == 0xEE)),
        }
        codes.fill(0xEE);
        let (nvfp4, multiplier) = (Nvfp4Rule::ALL[nvfp4], GlobalScale::multiplier(global));
        let result =
            survives(format_args!("encode_nvfp4_block"), || encode_nvfp4_block(nvfp4, multiplier, &x, &mut codes));
        match result {
            Ok(scale) => prop_assert_eq!(scale.is_nan(), x.iter().any(|x| !x.is_finite())),
            Err(_) => prop_assert!(codes.iter().all(|c| *c == 0xEE)),
        }
        prop_assert_eq!(survives(format_args!("encode_ue4m3"), || encode_ue4m3(global)).is_nan(), global.is_nan());
        prop_assert!(survives(format_args!("global_scale"), || nvfp4.global_scale(global)).get().is_normal());
        prop_assert_eq!(rule.scale(format, global) == E8M0::NAN, !global.is_finite());
    }

    #[test]
    fn repacking_of_any_bytes(
        bytes in prop::collection::vec(any::<u8>(), 0..160),
        block in about(32),
        (codes, scales) in (about(32), about(4)),
    ) {
        let mut out = vec![0xEE; bytes.len()];
        let (from, to) = (NibbleOrder::Halves, NibbleOrder::Interleaved);
        let result = survives(format_args!("repack_nibbles"), || repack_nibbles(from, to, block, &bytes, &mut out));
        prop_assert!(result.is_ok() || out.iter().all(|b| *b == 0xEE));
        let (mut c, mut s) = (vec![0xEE; codes.min(160)], vec![0xEE; scales.min(160)]);
        type Reader = fn(&[u8], &mut [u8], &mut [u8]) -> Result<()>;
        for reader in [mxfp4_from_gguf as Reader, nvfp4_from_gguf] {
            for bytes in [&bytes[..], &bytes[..bytes.len() / 17 * 17], &bytes[..bytes.len() / 36 * 36]] {
                let before = (c.clone(), s.clone());
                let result = survives(format_args!("from gguf"), || reader(bytes, &mut c, &mut s));
                prop_assert!(result.is_ok() || before == (c.clone(), s.clone()));
            }
        }
        let before = out.clone();
        let result = survives(format_args!("mxfp4_to_gguf"), || mxfp4_to_gguf(&c, &s, &mut out));
        prop_assert!(result.is_ok() || before == out);
    }
}
