//! Device layouts: every place hit once, packing and its inverse, refusals. The contraction itself: tests/trainium_matmul.rs.

#[path = "support/random.rs"]
mod random;

use proptest::prelude::*;
use random::{RandomMatrix, Rng};
use trn_kernels::kv::{KvFormat, KvPlane, KvScale, KvShape, PagedKv};
use trn_kernels::num::{F8E4M3Fn, F8E4M3Ieee, Fp8, halve_for_ieee};
use trn_kernels::quant::{GlobalScale, mxfp4_from_gguf, mxfp4_to_gguf};
use trn_kernels::quant::{QuantizedExperts, QuantizedMatrix, QuantizedMatrixBuf, Scheme};
use trn_kernels::trainium::layout::*;
use trn_kernels::{Error, Parallelism};

const SERIAL: Parallelism<'static> = Parallelism::Serial;
const NATURAL: (GateUp, ColumnOrder) = (GateUp::Together, ColumnOrder::Natural);
const ORDERS: [(GateUp, ColumnOrder); 4] = [
    NATURAL,
    (GateUp::Split, ColumnOrder::Natural),
    (GateUp::Together, ColumnOrder::Quads),
    (GateUp::Split, ColumnOrder::Quads),
];
const MX_SCHEMES: [Scheme; 7] = [
    Scheme::Mxfp4,
    Scheme::Mxfp8(Fp8::E4M3Fn),
    Scheme::Mxfp8(Fp8::E5M2),
    Scheme::Fp8PerTensor(Fp8::E4M3Fn),
    Scheme::Fp8PerTensor(Fp8::E5M2),
    Scheme::Fp8PerChannel(Fp8::E4M3Fn),
    Scheme::Fp8PerChannel(Fp8::E5M2),
];

fn mx(scheme: Scheme, n: usize, k: usize, order: (GateUp, ColumnOrder)) -> MxLayout {
    MxLayout::new(scheme, n, k, order.0, order.1).unwrap()
}

/// Rows layouts with what the device reads: bf16, FP8 as it is, FP8 halved.
fn row_pairs() -> Vec<(Scheme, RowElement)> {
    let tiles = |element, n, k| Scheme::Fp8Blockwise { element, n, k };
    let mut pairs = vec![(Scheme::Bf16, RowElement::Bf16)];
    for (from, to) in [
        (Fp8::E4M3Fn, Fp8::E4M3Fn),
        (Fp8::E4M3Fn, Fp8::E4M3Ieee),
        (Fp8::E4M3Ieee, Fp8::E4M3Ieee),
        (Fp8::E5M2, Fp8::E5M2),
    ] {
        for scheme in
            [Scheme::Fp8PerTensor(from), Scheme::Fp8PerChannel(from), tiles(from, 128, 128), tiles(from, 3, 40)]
        {
            pairs.push((scheme, RowElement::Fp8(to)));
        }
    }
    pairs
}

/// What must be equal for two matrices to be one.
fn parts(w: &QuantizedMatrixBuf) -> (Scheme, usize, usize, &[u8], &[u8], &[f32]) {
    (w.scheme(), w.n(), w.k(), w.codes(), w.block_scales(), w.outer_scales())
}

/// The table of AWS's documents (contiguous order): k, tile, partition, element, scale partition at offset 0.
#[test]
fn mx_places_are_those_of_the_documents() {
    let layout = mx(Scheme::Mxfp4, 3, 5 * 512, NATURAL);
    for (k, tile, partition, sub, scale) in [
        (0, 0, 0, 0, 0),
        (1, 0, 0, 1, 0),
        (4, 0, 1, 0, 0),
        (31, 0, 7, 3, 0),
        (32, 0, 8, 0, 1),
        (127, 0, 31, 3, 3),
        (128, 0, 32, 0, 32),
        (255, 0, 63, 3, 35),
        (256, 0, 64, 0, 64),
        (384, 0, 96, 0, 96),
        (511, 0, 127, 3, 99),
        (512, 1, 0, 0, 0),
    ] {
        for n in 0..3 {
            assert_eq!(layout.place(n, k), Some(MxPlace { partition, tile, column: n, sub }), "k = {k}");
            let at = layout.scale_place(n, k).unwrap();
            // Four tiles share a scale tile, each four rows further down.
            assert_eq!((at.partition(), at.tile, at.column), (scale + 4 * tile, 0, n), "k = {k}");
        }
    }
    let fifth = layout.scale_place(0, 4 * 512 + 511).unwrap();
    assert_eq!((fifth.partition(), fifth.tile), (99, 1), "the fifth tile starts the second scale tile");
}

/// Codes 2, 4, 7, 11 at k = 0..4 are the u16 0xB742; FP8 codes are a little-endian u32; a block's bytes stay in order.
#[test]
fn words_are_little_endian_with_element_0_lowest() {
    let mut codes = vec![0u8; 16];
    codes[..4].copy_from_slice(&[0x42, 0xB7, 0x51, 0x63]);
    let w = QuantizedMatrix::mxfp4(1, 32, &codes, &[130]).unwrap();
    let packed = MxLayout::of(&w).unwrap().pack(&w, SERIAL).unwrap();
    let row = 32 * 2; // one tile of 32 columns
    assert_eq!(packed.data()[..2], 0xB742u16.to_le_bytes());
    assert_eq!(packed.data()[row..row + 2], 0x6351u16.to_le_bytes(), "partition 1 holds k = 4..8");
    assert_eq!(packed.scales()[0], 130);
    assert!(packed.scales()[1..].iter().all(|s| *s == 127), "padding is 1.0");

    let codes: Vec<u8> = (1..=32).collect();
    let w = QuantizedMatrix::mxfp8(Fp8::E4M3Fn, 1, 32, &codes, &[1]).unwrap();
    let packed = MxLayout::of(&w).unwrap().pack(&w, SERIAL).unwrap();
    assert_eq!(packed.data()[..4], 0x0403_0201u32.to_le_bytes());
}

/// Every element and every scale has a place of its own, the inverse finds it, and what is left is padding.
#[test]
fn mx_is_bijective() {
    let shapes = [(2880, 2880), (5760, 2880), (37, 96), (1, 32), (2, 4 * 512 + 32), (513, 544), (1026, 2080)];
    for ((n, k), order) in shapes.into_iter().flat_map(|s| ORDERS.map(|o| (s, o))) {
        if order.0 == GateUp::Split && n % 2 == 1 {
            continue;
        }
        let layout = mx(Scheme::Mxfp4, n, k, order);
        let [p, t, c] = layout.data_shape();
        assert_eq!(layout.data_bytes(), p * t * c * 2);
        let mut hit = vec![0u8; p * t * c];
        for (i, j) in (0..n).flat_map(|i| (0..k).map(move |j| (i, j))) {
            let at = layout.place(i, j).unwrap();
            let element = &mut hit[layout.word_index(at).unwrap()];
            assert_eq!(*element & 1 << at.sub, 0, "two elements at {at}");
            *element |= 1 << at.sub;
            assert_eq!(layout.element_at(at), Some((i, j)));
        }
        let padding = hit.iter().map(|h| 4 - h.count_ones() as usize).sum::<usize>();
        assert_eq!(padding, p * t * c * 4 - n * k, "[{n}, {k}] {order:?}");
        assert_eq!(layout.padded_k(), k.next_multiple_of(512));

        let [rows, s, _] = layout.scale_shape();
        let mut hit = vec![false; rows * s * c];
        for (i, j) in (0..n).flat_map(|i| (0..k).step_by(32).map(move |j| (i, j))) {
            let at = layout.scale_place(i, j).unwrap();
            assert_eq!(layout.scale_place(i, j + 31), Some(at), "a group has one scale");
            let index = layout.scale_index(at).unwrap();
            assert!(!hit[index], "two scales at {at}");
            hit[index] = true;
            assert_eq!(layout.group_at(at), Some((i, j)));
            // The instruction's rule: partition p of the data reads scale row p / 8 of the tile, in its quadrant.
            let data = layout.place(i, j).unwrap();
            let group = data.partition / 8;
            assert_eq!(at.partition(), 32 * (group / 4) + 4 * (data.tile % 4) + group % 4);
            assert_eq!(at.tile, data.tile / 4);
        }
        let mut padding = 0;
        for (row, tile, column) in (0..rows).flat_map(|r| (0..s).flat_map(move |t| (0..c).map(move |c| (r, t, c)))) {
            padding += usize::from(layout.group_at(MxScalePlace { row, tile, column }).is_none());
        }
        assert_eq!(padding, rows * s * c - n * (k / 32));
    }
}

#[test]
fn rows_are_bijective() {
    for ((n, k), order) in
        [(2880, 2880), (5760, 300), (37, 97), (1, 1), (514, 129)].into_iter().flat_map(|s| ORDERS.map(|o| (s, o)))
    {
        if order.0 == GateUp::Split && n % 2 == 1 {
            continue;
        }
        let layout = RowsLayout::new(Scheme::Bf16, RowElement::Bf16, n, k, order.0, order.1).unwrap();
        let [p, h, c] = layout.data_shape();
        assert_eq!((p, h, layout.padded_k()), (128, k.div_ceil(128), k.next_multiple_of(128)));
        let mut hit = vec![false; p * h * c];
        for (i, j) in (0..n).flat_map(|i| (0..k).map(move |j| (i, j))) {
            let at = layout.place(i, j).unwrap();
            assert_eq!(layout.element_at(at), Some((i, j)));
            let index = layout.index(at).unwrap();
            assert!(!hit[index], "two elements at {at}");
            hit[index] = true;
            // Double-row: chunk of 256, then which of the two rows, then the partition.
            assert_eq!(j, 256 * (at.half / 2) + 128 * (at.half % 2) + at.partition);
        }
    }
}

#[test]
fn columns_split_gate_from_up_and_lie_in_quads() {
    let columns = Columns::new(5760, GateUp::Split, ColumnOrder::Natural).unwrap();
    assert_eq!(
        (columns.count(), columns.column(0), columns.column(1), columns.column(2)),
        (5760, Some(0), Some(2880), Some(1))
    );
    let columns = Columns::new(5760, GateUp::Split, ColumnOrder::Quads).unwrap();
    assert_eq!(columns.count(), 2 * 3072, "each part is whole k tiles of the down projection");
    for (i, c) in [(0, 0), (1, 128), (2, 256), (3, 384), (4, 1), (511, 511), (512, 512), (2879, 2560 + 3 * 128 + 79)] {
        assert_eq!((columns.column(2 * i), columns.column(2 * i + 1)), (Some(c), Some(3072 + c)), "channel {i}");
    }
    for order in ORDERS {
        let columns = Columns::new(1030, order.0, order.1).unwrap();
        let bias: Vec<f32> = (0..1030).map(|i| i as f32 + 1.0).collect();
        let packed = columns.pack(&bias, 0.0).unwrap();
        assert_eq!(packed.iter().filter(|b| **b == 0.0).count(), columns.count() - 1030);
        assert_eq!(columns.unpack(&packed).unwrap(), bias);
        assert!((0..1030).all(|n| columns.channel(columns.column(n).unwrap()) == Some(n)));
    }
}

/// Every byte of the packed tensors is the code or scale that the maps say, or padding; memory that was dirty, and any number of
/// threads, make no difference; unpacking gives the matrix.
fn check_mx(w: &RandomMatrix, scheme: Scheme, order: (GateUp, ColumnOrder)) {
    let source = w.view();
    let layout = mx(scheme, source.n(), source.k(), order);
    let packed = layout.pack(&source, SERIAL).unwrap();
    let ([p, t, c], [rows, s, _]) = (layout.data_shape(), layout.scale_shape());
    for (partition, tile, column) in (0..p).flat_map(|p| (0..t).flat_map(move |t| (0..c).map(move |c| (p, t, c)))) {
        for sub in 0..4 {
            let at = MxPlace { partition, tile, column, sub };
            let wanted = layout.element_at(at).map_or(0, |(n, k)| source.code(n, k).unwrap() as u8);
            assert_eq!(packed.code(at), Some(wanted), "{scheme:?} {order:?} {at}");
        }
    }
    for (row, tile, column) in (0..rows).flat_map(|r| (0..s).flat_map(move |t| (0..c).map(move |c| (r, t, c)))) {
        let at = MxScalePlace { row, tile, column };
        let wanted = layout.group_at(at).and_then(|(n, k)| source.block_scale_code(n, k)).unwrap_or(127);
        assert_eq!(packed.scale(at), Some(wanted), "{scheme:?} {order:?} {at}");
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    let (mut data, mut scales) = (vec![0xA5; layout.data_bytes()], vec![0xA5; layout.scale_bytes()]);
    layout.pack_into(&source, Parallelism::Pool(&pool), &mut data, &mut scales).unwrap();
    assert!(data == packed.data() && scales == packed.scales(), "dirty memory or threads changed a byte");
    for parallelism in [SERIAL, Parallelism::Pool(&pool)] {
        let back = packed.unpack(parallelism).unwrap();
        let outer: &[f32] = if source.scheme().block() == 32 { &[] } else { &w.floats };
        assert_eq!(parts(&back), (scheme, source.n(), source.k(), &w.codes[..], &w.scales[..], outer));
    }
    let again = PackedMx::from_parts(MxLayout::NAME, layout, data, scales, packed.outer_scales().to_vec()).unwrap();
    assert_eq!(again, packed);
}

fn check_rows(w: &RandomMatrix, scheme: Scheme, element: RowElement, order: (GateUp, ColumnOrder)) {
    let source = w.view();
    let layout = RowsLayout::new(scheme, element, source.n(), source.k(), order.0, order.1).unwrap();
    let (packed, report) = layout.pack(&source, SERIAL).unwrap();
    let halved = |code: u16| {
        let mut byte = [code as u8];
        halve_for_ieee(&mut byte);
        u16::from(byte[0])
    };
    let device = |code: u16| if layout.halves() { halved(code) } else { code };
    let [p, h, c] = layout.data_shape();
    for (partition, half, column) in (0..p).flat_map(|p| (0..h).flat_map(move |h| (0..c).map(move |c| (p, h, c)))) {
        let at = RowPlace { partition, half, column };
        let wanted = layout.element_at(at).map_or(0, |(n, k)| device(source.code(n, k).unwrap()));
        assert_eq!(packed.code(at), Some(wanted), "{scheme:?} {order:?} {at}");
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    let mut data = vec![0xA5; layout.data_bytes()];
    assert_eq!(layout.pack_into(&source, Parallelism::Pool(&pool), &mut data).unwrap(), report);
    assert!(data == packed.data(), "dirty memory or threads changed a byte");

    let back = packed.unpack(Parallelism::Pool(&pool)).unwrap();
    let mut codes = w.codes.clone();
    let mut expected = (codes.len(), 0);
    if layout.halves() {
        let counted = halve_for_ieee(&mut codes);
        expected = (counted.exact, counted.rounded);
    } else if scheme == Scheme::Bf16 {
        expected.0 /= 2;
    }
    assert_eq!((report.exact, report.rounded, report.overflowed), (expected.0, expected.1, 0));
    let outer: Vec<f32> = w.floats.iter().map(|s| if layout.halves() { 2.0 * s } else { *s }).collect();
    assert_eq!(parts(&back), (layout.device_scheme(), source.n(), source.k(), &codes[..], &[][..], &outer[..]));
    let again = PackedRows::from_parts(RowsLayout::NAME, layout, data, packed.scales().to_vec()).unwrap();
    assert_eq!(again, packed);
}

/// Shapes on both sides of every edge: 32 columns, strips of 256, quads of 512; a quadrant, a tile, four tiles of k.
#[test]
fn packed_bytes_are_what_the_maps_say() {
    let mut rng = Rng(7);
    for scheme in MX_SCHEMES {
        for (n, k, order) in [(2, 32, 1), (33, 544, 0), (514, 96, 3), (258, 2080, 1), (260, 160, 2)] {
            check_mx(&RandomMatrix::new(&mut rng, scheme, n, k, 40), scheme, ORDERS[order]);
        }
    }
    check_mx(&RandomMatrix::new(&mut rng, MX_SCHEMES[3], 5, 77, 1), MX_SCHEMES[3], NATURAL);
    for (scheme, element) in row_pairs() {
        for (n, k, order) in [(1, 1, 0), (33, 129, 0), (514, 70, 3), (258, 300, 1)] {
            let order = if matches!(scheme, Scheme::Fp8Blockwise { .. }) { NATURAL } else { ORDERS[order] };
            check_rows(&RandomMatrix::new(&mut rng, scheme, n, k, 1), scheme, element, order);
        }
    }
}

/// A real shape, whole: gpt-oss's gate-up weight.
#[test]
fn gpt_oss_gate_up_comes_back() {
    let w = RandomMatrix::new(&mut Rng(8), Scheme::Mxfp4, 5760, 2880, 40);
    let layout = mx(Scheme::Mxfp4, 5760, 2880, (GateUp::Split, ColumnOrder::Quads));
    assert_eq!((layout.data_shape(), layout.scale_shape()), ([128, 6, 6144], [64, 2, 6144]));
    let packed = layout.pack(&w.view(), SERIAL).unwrap();
    let back = packed.unpack(SERIAL).unwrap();
    assert!(back.codes() == w.codes && back.block_scales() == w.scales);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn packing_comes_back(seed: u64, n in 1usize..600, blocks in 1usize..40, pick in 0usize..64, order in 0usize..4) {
        let mut rng = Rng(seed);
        let order = ORDERS[order];
        let n = if order.0 == GateUp::Split { 2 * n.div_ceil(2) } else { n };
        let scheme = MX_SCHEMES[pick % MX_SCHEMES.len()];
        let k = 32 * blocks - if scheme.block() == 1 { rng.below(32) } else { 0 };
        let w = RandomMatrix::new(&mut rng, scheme, n, k, 60);
        let back = mx(scheme, n, k, order).pack(&w.view(), SERIAL).unwrap().unpack(SERIAL).unwrap();
        prop_assert_eq!((back.codes(), back.block_scales()), (&w.codes[..], &w.scales[..]));

        let (scheme, element) = row_pairs()[pick % row_pairs().len()];
        let order = if matches!(scheme, Scheme::Fp8Blockwise { .. }) { NATURAL } else { order };
        let w = RandomMatrix::new(&mut rng, scheme, n, k, 1);
        let layout = RowsLayout::new(scheme, element, n, k, order.0, order.1).unwrap();
        let back = layout.pack(&w.view(), SERIAL).unwrap().0.unpack(SERIAL).unwrap();
        let mut codes = w.codes.clone();
        if layout.halves() {
            halve_for_ieee(&mut codes);
        }
        prop_assert_eq!(back.codes(), &codes[..]);
    }
}

/// Views with gaps and GGUF's nibble order pack to the bytes that a planar copy packs to.
#[test]
fn views_pack_as_their_copies() {
    let (n, k) = (12, 1088);
    let w = RandomMatrix::new(&mut Rng(9), Scheme::Mxfp4, n, k, 40);
    let mut gguf = vec![0; n * k / 32 * 17];
    mxfp4_to_gguf(&w.codes, &w.scales, &mut gguf).unwrap();
    let planar = w.view();
    let blocks = QuantizedMatrix::mxfp4_gguf(n, k, &gguf).unwrap();
    let views = [
        (blocks.clone(), planar.clone()),
        (blocks.slice_n(3..7).unwrap(), planar.slice_n(3..7).unwrap()),
        (blocks.slice_k(64..1056).unwrap(), planar.slice_k(64..1056).unwrap()),
        (blocks.step_n(1, 2).unwrap(), planar.step_n(1, 2).unwrap()),
    ];
    for (gguf, planar) in views {
        let (n, k) = (planar.n(), planar.k());
        let code = |i: usize, j: usize| planar.code(i, j).unwrap() as u8;
        let codes: Vec<u8> = (0..n)
            .flat_map(|i| (0..k / 2).map(move |j| (i, 2 * j)))
            .map(|(i, j)| code(i, j) | code(i, j + 1) << 4)
            .collect();
        let scale = |i: usize, j: usize| planar.block_scale_code(i, j).unwrap();
        let scales: Vec<u8> =
            (0..n).flat_map(|i| (0..k).step_by(32).map(move |j| (i, j))).map(|(i, j)| scale(i, j)).collect();
        let copy = QuantizedMatrix::mxfp4(n, k, &codes, &scales).unwrap();
        let layout = MxLayout::of(&copy).unwrap();
        let wanted = layout.pack(&copy, SERIAL).unwrap();
        assert_eq!(layout.pack(&planar, SERIAL).unwrap(), wanted);
        assert_eq!(layout.pack(&gguf, SERIAL).unwrap(), wanted);
    }
    // The two helpers above are themselves inverse, so the GGUF bytes were the same matrix.
    let (mut codes, mut scales) = (vec![0; w.codes.len()], vec![0; w.scales.len()]);
    mxfp4_from_gguf(&gguf, &mut codes, &mut scales).unwrap();
    assert!(codes == w.codes && scales == w.scales);
}

#[test]
fn experts_lie_one_after_the_other() {
    let (e, n, k) = (3, 66, 544);
    let w = RandomMatrix::new(&mut Rng(10), Scheme::Mxfp4, e * n, k, 40);
    let stack = QuantizedExperts::mxfp4(e, n, k, &w.codes, &w.scales).unwrap();
    let packed = PackedMxExperts::pack(&stack, GateUp::Split, ColumnOrder::Natural, SERIAL).unwrap();
    assert_eq!((packed.experts(), packed.get(e)), (e, None));
    for (i, expert) in stack.iter().enumerate() {
        let one = packed.layout().pack(expert, SERIAL).unwrap();
        let (d, s) = (packed.layout().data_bytes(), packed.layout().scale_bytes());
        assert_eq!(packed.data()[i * d..][..d], *one.data());
        assert_eq!(packed.scales()[i * s..][..s], *one.scales());
        assert_eq!(packed.get(i), Some(one));
    }
}

/// Halved codes under doubled scales are the same numbers, but for odd codes of the two lowest binades.
#[test]
fn halving_keeps_values() {
    let codes: Vec<u8> = (0..=255).collect();
    let w = QuantizedMatrix::fp8_per_channel(Fp8::E4M3Fn, 2, 128, &codes, vec![0.75, 3.0]).unwrap();
    let layout = RowsLayout::of(&w, RowElement::Fp8(Fp8::E4M3Ieee)).unwrap();
    let (packed, report) = layout.pack(&w, SERIAL).unwrap();
    let back = packed.unpack(SERIAL).unwrap();
    let (mut rounded, view) = (0, back.view());
    for (n, k) in (0..2).flat_map(|n| (0..128).map(move |k| (n, k))) {
        let code = codes[n * 128 + k];
        let (was, is) = (w.value(n, k).unwrap(), view.value(n, k).unwrap());
        if F8E4M3Fn::from_bits(code).is_nan() {
            assert!(F8E4M3Ieee::from_bits(view.code(n, k).unwrap() as u8).is_nan());
        } else if was != is {
            assert!(code & 0x7F < 0x10 && code % 2 == 1, "code {code:#04x}");
            assert!((was - is).abs() <= w.outer_scale(n, k).map_or(0.0, f64::from) * 2f64.powi(-9));
            rounded += 1;
        }
    }
    assert_eq!((report.rounded, report.exact, report.overflowed), (rounded, 256 - rounded, 0));
    assert_eq!(rounded, 16, "eight odd codes below 0x10, two signs");
}

#[test]
fn kv_rows_gather_by_slot() {
    let (pages, page, heads, dk, dv) = (5, 4, 3, 8, 6);
    let mut rng = Rng(11);
    for (format, element, bytes, halves) in [
        (KvFormat::Bf16, RowElement::Bf16, 2, false),
        (KvFormat::Fp8(Fp8::E4M3Fn), RowElement::Fp8(Fp8::E4M3Fn), 1, false),
        (KvFormat::Fp8(Fp8::E4M3Fn), RowElement::Fp8(Fp8::E4M3Ieee), 1, true),
        (KvFormat::Fp8(Fp8::E5M2), RowElement::Fp8(Fp8::E5M2), 1, false),
    ] {
        let shape = KvShape {
            format,
            num_pages: pages,
            page_size: page,
            num_kv_heads: heads,
            head_dim_qk: dk,
            head_dim_vo: dv,
        };
        let codes = |dim: usize, rng: &mut Rng| {
            (0..pages * page * heads * dim * bytes).map(|_| rng.next() as u8).collect::<Vec<_>>()
        };
        let (k, v) = (codes(dk, &mut rng), codes(dv, &mut rng));
        let scales =
            |one: f32| if format.has_scale() { KvScale::Head(vec![one, 2.0, 3.0].into()) } else { KvScale::One };
        let plane = |codes, scale| KvPlane { codes, block_scales: &[], scale };
        let cache = PagedKv::new(shape, plane(&k, scales(0.5)), plane(&v, scales(0.25))).unwrap();
        for order in [KvHeads::Together, KvHeads::Apart] {
            let layout = KvRowsLayout::new(shape, element, order).unwrap();
            let (packed, report) = layout.pack(&cache, SERIAL).unwrap();
            let (mut device_k, mut device_v) = (k.clone(), v.clone());
            let mut rounded = 0;
            if halves {
                rounded = halve_for_ieee(&mut device_k).rounded + halve_for_ieee(&mut device_v).rounded;
            }
            assert_eq!(report.rounded, rounded);
            assert_eq!(report.exact, (k.len() + v.len()) / bytes - rounded);
            for (p, o, h) in (0..pages).flat_map(|p| (0..page).flat_map(move |o| (0..heads).map(move |h| (p, o, h)))) {
                let row = layout.row(p, o).unwrap();
                assert_eq!(row, p * page + o);
                let vector = (p * page + o) * heads + h;
                let at = layout.k_index(row, h).unwrap() * bytes;
                assert_eq!(packed.k()[at..at + dk * bytes], device_k[vector * dk * bytes..][..dk * bytes]);
                let at = layout.v_index(row, h).unwrap() * bytes;
                assert_eq!(packed.v()[at..at + dv * bytes], device_v[vector * dv * bytes..][..dv * bytes]);
            }
            let by = if halves { 2.0 } else { 1.0 };
            let wanted = |one: f32| if format.has_scale() { vec![by * one, by * 2.0, by * 3.0] } else { vec![] };
            assert_eq!(packed.scales(), [&wanted(0.5)[..], &wanted(0.25)[..]]);
            assert_eq!(packed.unpack(SERIAL).unwrap(), [device_k, device_v]);
            if order == KvHeads::Together && !halves {
                assert_eq!(packed.k().as_ptr(), k.as_ptr(), "nothing is copied");
            }
            let [g, slots, r] = layout.v_shape();
            assert_eq!(g * slots * r * bytes, packed.v().len());
            assert_eq!((layout.row(pages, 0), layout.row(0, page), layout.row(usize::MAX, 0)), (None, None, None));
            assert_eq!((layout.k_index(usize::MAX, 0), layout.v_index(0, usize::MAX)), (None, None));
            let planes = [packed.k().to_vec().into(), packed.v().to_vec().into()];
            let again =
                PackedKvRows::from_parts(KvRowsLayout::NAME, layout, planes, packed.scales().map(<[f32]>::to_vec));
            assert_eq!(again.unwrap().k(), packed.k());
        }
    }
}

fn text<T>(result: trn_kernels::Result<T>) -> String {
    result.err().expect("refused").to_string()
}

#[test]
fn what_is_not_served_is_refused_by_name() {
    let mx = |scheme, n, k, gate_up| MxLayout::new(scheme, n, k, gate_up, ColumnOrder::Natural);
    assert_eq!(
        text(mx(Scheme::Nvfp4, 32, 64, GateUp::Together)),
        "Nvfp4 in layout mx-quads/1 is not supported: no Trainium instruction takes E4M3 scales of 16 elements"
    );
    assert_eq!(
        text(mx(Scheme::Mxfp8(Fp8::E4M3Ieee), 32, 64, GateUp::Together)),
        "Mxfp8(E4M3Ieee) in layout mx-quads/1 is not supported: nc_matmul_mx takes E4M3FN and E5M2 elements only"
    );
    let blockwise = Scheme::Fp8Blockwise { element: Fp8::E4M3Fn, n: 128, k: 128 };
    assert!(matches!(mx(blockwise, 32, 64, GateUp::Together), Err(Error::Unsupported { .. })));
    assert!(matches!(mx(Scheme::Bf16, 32, 64, GateUp::Together), Err(Error::Unsupported { .. })));
    assert_eq!(text(mx(Scheme::Mxfp4, 32, 40, GateUp::Together)), "weight: axis k is 40, needed a multiple of 32");
    assert_eq!(text(mx(Scheme::Mxfp4, 33, 64, GateUp::Split)), "gate-up weight: axis n is 33, needed a multiple of 2");
    assert_eq!(text(mx(Scheme::Mxfp4, 0, 64, GateUp::Together)), "weight: axis n is empty, needed at least 1");
    assert_eq!(text(mx(Scheme::Mxfp4, 1, 0, GateUp::Together)), "weight: axis k is empty, needed at least 1");

    let rows = |scheme, element, gate_up| RowsLayout::new(scheme, element, 32, 64, gate_up, ColumnOrder::Natural);
    assert_eq!(
        text(rows(Scheme::Mxfp4, RowElement::Bf16, GateUp::Together)),
        "Mxfp4 read as Bf16 in layout rows-128/1 is not supported: block scales need nc_matmul_mx; use MxLayout"
    );
    for (scheme, element) in [
        (Scheme::Nvfp4, RowElement::Bf16),
        (Scheme::Bf16, RowElement::Fp8(Fp8::E4M3Fn)),
        (Scheme::Fp8PerTensor(Fp8::E4M3Fn), RowElement::Bf16),
        (Scheme::Fp8PerTensor(Fp8::E4M3Ieee), RowElement::Fp8(Fp8::E4M3Fn)),
        (Scheme::Fp8PerTensor(Fp8::E5M2), RowElement::Fp8(Fp8::E4M3Ieee)),
        (Scheme::Fp8PerTensor(Fp8::E3M4), RowElement::Fp8(Fp8::E3M4)),
    ] {
        assert!(
            matches!(rows(scheme, element, GateUp::Together), Err(Error::Unsupported { .. })),
            "{scheme:?} {element:?}"
        );
    }
    let refused = rows(blockwise, RowElement::Fp8(Fp8::E4M3Fn), GateUp::Split);
    assert!(text(refused).ends_with("a tile of scales spans neighbouring rows"));
    let shape =
        |format| KvShape { format, num_pages: 1, page_size: 1, num_kv_heads: 1, head_dim_qk: 32, head_dim_vo: 32 };
    for (format, element) in [
        (KvFormat::F32, RowElement::Bf16),
        (KvFormat::Mxfp4, RowElement::Fp8(Fp8::E4M3Fn)),
        (KvFormat::Nvfp4, RowElement::Fp8(Fp8::E4M3Fn)),
        (KvFormat::Bf16, RowElement::Fp8(Fp8::E4M3Fn)),
        (KvFormat::Fp8(Fp8::E4M3Ieee), RowElement::Fp8(Fp8::E4M3Fn)),
    ] {
        let refused = KvRowsLayout::new(shape(format), element, KvHeads::Together);
        assert!(matches!(refused, Err(Error::Unsupported { .. })), "{format:?} {element:?}");
    }
}

#[test]
fn operands_of_another_shape_version_or_length_are_refused() {
    let (codes, scales) = (vec![0u8; 32 * 32], vec![127u8; 64]);
    let w = QuantizedMatrix::mxfp4(32, 64, &codes, &scales).unwrap();
    let layout = MxLayout::of(&w).unwrap();
    let (d, s) = (layout.data_bytes(), layout.scale_bytes());
    assert_eq!(text(layout.pack(&w.slice_n(0..31).unwrap(), SERIAL)), "weight: axis n is 31, needed 32");
    assert_eq!(text(layout.pack(&w.slice_k(0..32).unwrap(), SERIAL)), "weight: axis k is 32, needed 64");
    let other = QuantizedMatrix::nvfp4(32, 64, &codes, &[0x38; 128], GlobalScale::ONE).unwrap();
    assert!(text(layout.pack(&other, SERIAL)).contains("a layout serves the scheme it was made for"));
    let (mut data, mut out) = (vec![7; d - 1], vec![7; s]);
    let short = text(layout.pack_into(&w, SERIAL, &mut data, &mut out));
    assert_eq!(short, format!("packed data: the slice has {} elements, its extents need {d}", d - 1));
    assert!(data.iter().chain(&out).all(|b| *b == 7), "nothing is written by a refused call");
    let (mut data, mut out) = (vec![7; d], vec![7; s + 1]);
    assert!(text(layout.pack_into(&w, SERIAL, &mut data, &mut out)).starts_with("packed scales: "));
    assert!(data.iter().chain(&out).all(|b| *b == 7), "nothing is written by a refused call");

    assert_eq!(
        text(PackedMx::from_parts("mx-quads/0", layout, vec![0; d], vec![0; s], vec![])),
        "tensors of layout \"mx-quads/0\" read as \"mx-quads/1\" is not supported: packed tensors are only unpacked by the \
         layout and version that made them"
    );
    for (d, s, o) in [(d + 1, s, 0), (d, s - 1, 0), (d, s, 1)] {
        let parts = PackedMx::from_parts(MxLayout::NAME, layout, vec![0; d], vec![0; s], vec![1.0; o]);
        assert!(matches!(parts, Err(Error::Length { .. })));
    }
    let channel =
        RowsLayout::new(Scheme::Fp8PerChannel(Fp8::E5M2), RowElement::Fp8(Fp8::E5M2), 32, 64, NATURAL.0, NATURAL.1);
    let (channel, bytes) = (channel.clone().unwrap(), channel.unwrap().data_bytes());
    assert!(matches!(
        PackedRows::from_parts(RowsLayout::NAME, channel, vec![0; bytes], vec![]),
        Err(Error::Length { .. })
    ));
    assert!(matches!(
        PackedRows::from_parts("", channel, vec![0; bytes], vec![1.0; 32]),
        Err(Error::Unsupported { .. })
    ));
    let nan = PackedRows::from_parts(RowsLayout::NAME, channel, vec![0; bytes], vec![f32::NAN; 32]);
    assert_eq!(text(nan), "f32 scales[0]: got NaN, needed a finite scale");
    // A scale that cannot be doubled.
    let huge = QuantizedMatrix::fp8_per_tensor(Fp8::E4M3Fn, 32, 32, &codes, 3e38).unwrap();
    let halved = RowsLayout::of(&huge, RowElement::Fp8(Fp8::E4M3Ieee)).unwrap().pack(&huge, SERIAL);
    assert!(text(halved).ends_with("needed a scale that can be doubled"));
}

/// Extents that overflow, and places outside: answers, never panics.
#[test]
fn hostile_extents_and_places() {
    const MAX: usize = usize::MAX;
    for (n, k) in [(MAX, 32), (1, MAX / 32 * 32), (1 << 40, 1 << 40), (MAX - 31, 1 << 20), (1 << 33, 1 << 33)] {
        for order in ORDERS.into_iter().filter(|o| o.0 == GateUp::Together || n % 2 == 0) {
            let refused = MxLayout::new(Scheme::Mxfp4, n, k, order.0, order.1);
            assert!(matches!(refused, Err(Error::Overflow { .. })), "[{n}, {k}] {order:?}: {refused:?}");
            let rows = RowsLayout::new(Scheme::Bf16, RowElement::Bf16, n, k, order.0, order.1);
            assert!(matches!(rows, Err(Error::Overflow { .. })), "[{n}, {k}] {order:?}: {rows:?}");
        }
    }
    // Fits usize, but no machine: the allocator is asked first.
    let codes = vec![0u8; 1 << 20];
    let tall = QuantizedMatrix::fp8_per_tensor(Fp8::E5M2, 1 << 20, 1, &codes, 1.0).unwrap();
    let layout = MxLayout::of(&tall).unwrap();
    assert_eq!(layout.data_bytes(), 512 << 20);
    let blockwise = Scheme::Fp8Blockwise { element: Fp8::E5M2, n: 0, k: 0 };
    let degenerate = RowsLayout::new(blockwise, RowElement::Fp8(Fp8::E5M2), 1, 1, NATURAL.0, NATURAL.1).unwrap();
    let bytes = degenerate.data_bytes();
    assert!(matches!(
        PackedRows::from_parts(RowsLayout::NAME, degenerate, vec![0; bytes], vec![]),
        Err(Error::Empty { .. })
    ));

    let layout = mx(Scheme::Mxfp4, 33, 64, NATURAL);
    let packed = PackedMx::from_parts(
        MxLayout::NAME,
        layout,
        vec![0; layout.data_bytes()],
        vec![0; layout.scale_bytes()],
        vec![],
    )
    .unwrap();
    for (n, k) in [(33, 0), (0, 64), (MAX, MAX)] {
        assert_eq!((layout.place(n, k), layout.scale_place(n, k)), (None, None));
    }
    let at = MxPlace { partition: 0, tile: 0, column: 0, sub: 0 };
    for at in [
        MxPlace { partition: 128, ..at },
        MxPlace { tile: 1, ..at },
        MxPlace { column: 64, ..at },
        MxPlace { sub: 4, ..at },
        MxPlace { partition: MAX, tile: MAX, column: MAX, sub: MAX },
    ] {
        assert_eq!((packed.code(at), layout.element_at(at)), (None, None), "{at}");
    }
    let at = MxScalePlace { row: 0, tile: 0, column: 0 };
    for at in [
        MxScalePlace { row: 64, ..at },
        MxScalePlace { tile: 1, ..at },
        MxScalePlace { column: 64, ..at },
        MxScalePlace { row: MAX, tile: MAX, column: MAX },
    ] {
        assert_eq!((packed.scale(at), layout.group_at(at)), (None, None), "{at}");
    }
    let columns = layout.columns();
    assert_eq!((columns.column(33), columns.channel(33), columns.channel(MAX)), (None, None, None));
    assert!(columns.pack(&[0; 32], 0).is_err() && columns.unpack(&[0; 33]).is_err());
}

#[test]
fn layouts_print_themselves() {
    let layout = mx(Scheme::Mxfp4, 5760, 2880, (GateUp::Split, ColumnOrder::Quads));
    assert_eq!(
        layout.to_string(),
        "mx-quads/1: [5760, 2880] of Mxfp4, k padded to 3072\n  \
         data   [128, 6, 6144] float4_e2m1fn_x4: [(k % 512) / 4, k / 512, column], element k % 4\n  \
         scales [64, 2, 6144] u8: [16 (g / 4) + 4 (t % 4) + g % 4, t / 4, column], t = k / 512, g = k % 512 / 32\n  \
         column = 512 ((n / 2) / 512) + 128 ((n / 2) % 4) + ((n / 2) % 512) / 4 + 3072 (n % 2), 5760 of 6144"
    );
    let place = layout.place(3, 700).unwrap();
    assert_eq!(place.to_string(), "partition 47, tile 1, column 3200, element 0");
    let scale = layout.scale_place(3, 700).unwrap();
    assert_eq!(scale.to_string(), "row 21 (partition 37), tile 0, column 3200");
    let scheme = Scheme::Fp8PerChannel(Fp8::E4M3Fn);
    let rows = RowsLayout::new(scheme, RowElement::Fp8(Fp8::E4M3Ieee), 2880, 2880, NATURAL.0, NATURAL.1).unwrap();
    assert_eq!(
        rows.to_string(),
        "rows-128/1: [2880, 2880] of Fp8PerChannel(E4M3Fn), k padded to 2944\n  \
         data [128, 23, 2880] Fp8(E4M3Ieee): [k % 128, k / 128, column], codes halved, scales doubled\n  \
         column = n, 2880 of 2880"
    );
}
