//! Device layouts and the cost model over any extents, places and constants.

use crate::{EXTENTS, edges, survives};
use trn_kernels::kv::{KvFormat, KvPlane, KvScale, KvShape, PagedKv};
use trn_kernels::num::Fp8;
use trn_kernels::quant::{QuantizedMatrix, Scheme};
use trn_kernels::trainium::layout::{
    ColumnOrder, Columns, GateUp, KvHeads, KvRowsLayout, MxLayout, MxPlace, MxScalePlace, PackedKvRows, PackedMx,
    PackedRows, RowElement, RowPlace, RowsLayout,
};
use trn_kernels::trainium::roofline::{DecodeProblem, MatmulProblem, Roofline};
use trn_kernels::trainium::{Chip, MatmulMode};
use trn_kernels::{Parallelism, Result};

const SCHEMES: [Scheme; 8] = [
    Scheme::Bf16,
    Scheme::Mxfp4,
    Scheme::Mxfp8(Fp8::E5M2),
    Scheme::Nvfp4,
    Scheme::Fp8PerTensor(Fp8::E4M3Fn),
    Scheme::Fp8PerChannel(Fp8::E4M3Fn),
    Scheme::Fp8Blockwise { element: Fp8::E4M3Fn, n: 0, k: 0 },
    Scheme::Fp8Blockwise { element: Fp8::E4M3Fn, n: usize::MAX, k: usize::MAX },
];
const ORDERS: [(GateUp, ColumnOrder); 4] = [
    (GateUp::Together, ColumnOrder::Natural),
    (GateUp::Together, ColumnOrder::Quads),
    (GateUp::Split, ColumnOrder::Natural),
    (GateUp::Split, ColumnOrder::Quads),
];
const ELEMENTS: [RowElement; 3] = [RowElement::Bf16, RowElement::Fp8(Fp8::E4M3Fn), RowElement::Fp8(Fp8::E4M3Ieee)];

#[test]
fn columns_of_any_extents() {
    for n in EXTENTS {
        for (gate_up, order) in ORDERS {
            let name = format_args!("columns of {n}, {gate_up:?} {order:?}");
            let Ok(columns) = survives(name, || Columns::new(n, gate_up, order)) else { continue };
            for i in edges(n).into_iter().chain(edges(columns.count())) {
                let column = survives(name, || (columns.column(i), columns.channel(i), columns.to_string()));
                assert_eq!(column.0.is_some(), i < n, "{name}");
                assert!(column.0.is_none_or(|c| columns.channel(c) == Some(i)), "{name}");
                assert!(column.1.is_none_or(|c| columns.column(c) == Some(i)), "{name}");
            }
            let values = vec![1u8; n.min(64)];
            let packed = survives(name, || columns.pack(&values, 0));
            assert_eq!(packed.is_ok(), values.len() == n, "{name}");
            assert!(survives(name, || columns.unpack(&values)).is_err() || values.len() == columns.count());
        }
    }
}

#[test]
fn layouts_of_any_extents() {
    for scheme in SCHEMES {
        for n in EXTENTS {
            for k in EXTENTS {
                for (gate_up, order) in ORDERS {
                    let name = format_args!("layout of {scheme:?} {n} x {k}, {gate_up:?} {order:?}");
                    if let Ok(layout) = survives(name, || MxLayout::new(scheme, n, k, gate_up, order)) {
                        survives(name, || mx(&layout));
                    }
                    for element in ELEMENTS {
                        let layout = survives(name, || RowsLayout::new(scheme, element, n, k, gate_up, order));
                        if let Ok(layout) = layout {
                            survives(name, || rows(&layout));
                        }
                    }
                }
            }
        }
    }
}

fn mx(layout: &MxLayout) {
    let (n, k) = (layout.n(), layout.k());
    let [_, tiles, columns] = layout.data_shape();
    let _ = (layout.to_string(), layout.padded_k(), layout.data_bytes(), layout.scale_bytes(), layout.scale_shape());
    for n_at in edges(n) {
        for k_at in edges(k) {
            let inside = n_at < n && k_at < k;
            let place = layout.place(n_at, k_at);
            assert_eq!(place.and_then(|p| layout.element_at(p)), inside.then_some((n_at, k_at)));
            let scale = layout.scale_place(n_at, k_at);
            assert_eq!(scale.and_then(|p| layout.group_at(p)), inside.then_some((n_at, k_at / 32 * 32)));
        }
    }
    for (tile, column) in edges(tiles).into_iter().zip(edges(columns)) {
        for partition in [0, 127, 128, usize::MAX] {
            for sub in [0, 4, usize::MAX] {
                let place = MxPlace { partition, tile, column, sub };
                let _ = (layout.word_index(place), layout.element_at(place), place.to_string());
            }
            let place = MxScalePlace { row: partition, tile, column };
            let _ = (layout.scale_index(place), layout.group_at(place), place.partition(), place.to_string());
        }
    }
    let empty = PackedMx::from_parts(MxLayout::NAME, *layout, vec![], vec![], vec![]);
    assert!(empty.is_err(), "a layout of something, filled with nothing");
    assert!(layout.pack(&QuantizedMatrix::bf16(0, 0, &[]).unwrap(), Parallelism::Serial).is_err());
}

fn rows(layout: &RowsLayout) {
    let (n, k) = (layout.n(), layout.k());
    let [_, halves, columns] = layout.data_shape();
    let _ = (layout.to_string(), layout.padded_k(), layout.data_bytes(), layout.halves(), layout.device_scheme());
    for n_at in edges(n) {
        for k_at in edges(k) {
            let place = layout.place(n_at, k_at);
            assert_eq!(place.and_then(|p| layout.element_at(p)), (n_at < n && k_at < k).then_some((n_at, k_at)));
        }
    }
    for (half, column) in edges(halves).into_iter().zip(edges(columns)) {
        for partition in [0, 127, 128, usize::MAX] {
            let place = RowPlace { partition, half, column };
            let _ = (layout.index(place), layout.element_at(place), place.to_string());
        }
    }
    assert!(PackedRows::from_parts(RowsLayout::NAME, *layout, vec![], vec![1.0]).is_err());
    assert!(layout.pack(&QuantizedMatrix::bf16(0, 0, &[]).unwrap(), Parallelism::Serial).is_err());
}

#[test]
fn caches_of_any_extents() {
    for num_pages in EXTENTS {
        for page_size in EXTENTS {
            for (heads, dim) in [(1, 1), (2, 3), (1 << 31, 1 << 40), (usize::MAX, 1), (1, usize::MAX), (0, 1), (1, 0)] {
                for (format, element) in
                    [(KvFormat::Bf16, RowElement::Bf16), (KvFormat::Fp8(Fp8::E4M3Fn), RowElement::Fp8(Fp8::E4M3Ieee))]
                {
                    let shape = KvShape {
                        format,
                        num_pages,
                        page_size,
                        num_kv_heads: heads,
                        head_dim_qk: dim,
                        head_dim_vo: dim,
                    };
                    for how in [KvHeads::Together, KvHeads::Apart] {
                        let name = format_args!("{how:?} rows of {shape:?}");
                        let Ok(layout) = survives(name, || KvRowsLayout::new(shape, element, how)) else { continue };
                        survives(name, || cache(&layout));
                    }
                }
            }
        }
    }
}

fn cache(layout: &KvRowsLayout) {
    let shape = *layout.shape();
    let _ = (layout.k_shape(), layout.v_shape(), layout.to_string());
    for page in edges(shape.num_pages) {
        for offset in edges(shape.page_size) {
            let row = layout.row(page, offset);
            assert_eq!(row.is_some(), page < shape.num_pages && offset < shape.page_size);
            for head in edges(shape.num_kv_heads) {
                let inside = row.is_some() && head < shape.num_kv_heads;
                assert_eq!(row.and_then(|row| layout.k_index(row, head)).is_some(), inside);
                let _ = (layout.v_index(offset, head), layout.v_index(usize::MAX, head));
            }
        }
    }
    let plane = || KvPlane { codes: &[], block_scales: &[], scale: KvScale::One };
    let slots = layout.slots();
    let packed = PagedKv::new(shape, plane(), plane()).map(|kv| {
        let (packed, report) = layout.pack(&kv, Parallelism::Serial).unwrap();
        assert_eq!((packed.k().len(), packed.v().len(), report.exact), (0, 0, 0));
        packed.unpack(Parallelism::Serial).unwrap()
    });
    assert_eq!(packed.is_ok(), slots == 0);
    let scales =
        || [vec![1.0; usize::from(shape.format.has_scale())], vec![1.0; usize::from(shape.format.has_scale())]];
    let none = [[].as_slice().into(), [].as_slice().into()];
    let parts = PackedKvRows::from_parts(KvRowsLayout::NAME, *layout, none, scales());
    assert_eq!(parts.and_then(|p| p.unpack(Parallelism::Serial)).is_ok(), slots == 0);
}

/// The cost model is plain arithmetic: any extents and any constants give numbers, or a refusal.
#[test]
fn problems_of_any_extents() {
    let mut chips = Chip::documented().to_vec();
    chips.push(Chip { cores: 0, hbm_bandwidth: f64::NAN, sbuf_partition_bytes: usize::MAX, ..Chip::trn1() });
    chips.push(Chip { cores: usize::MAX, psum_banks: usize::MAX, psum_bank_bytes: usize::MAX, ..Chip::trn3() });
    for chip in &chips {
        let _ =
            survives(format_args!("{}", chip.name), || (chip.sbuf_bytes(), chip.psum_bytes(), chip.core_bandwidth()));
        for mode in MatmulMode::ALL {
            for columns in EXTENTS {
                let engine = chip.tensor;
                let _ = (engine.moving_cycles(mode, columns), engine.load_cycles(columns), engine.peak_flops(mode));
            }
        }
        for extent in EXTENTS {
            for (weights, activations) in SCHEMES.into_iter().flat_map(|w| [(w, w), (w, Scheme::Bf16)]) {
                let problem = MatmulProblem { m: extent, n: extent, k: extent, weights, activations };
                model(survives(format_args!("{problem:?}"), || problem.on(chip)), extent);
            }
            let problem = DecodeProblem {
                sequences: extent,
                kv_tokens: extent,
                num_qo_heads: extent,
                num_kv_heads: extent,
                head_dim_qk: extent,
                head_dim_vo: extent,
                format: KvFormat::Bf16,
            };
            model(survives(format_args!("{problem:?}"), || problem.on(chip)), extent);
        }
    }
    assert_eq!((Chip::named(""), Chip::named("trn2")), (None, Some(Chip::trn2())));
}

fn model(roofline: Result<Roofline>, extent: usize) {
    if let Ok(r) = roofline {
        assert!(extent > 0 && r.seconds() > 0.0 && r.intensity() > 0.0 && r.ridge() > 0.0, "{r}");
        assert!(r.compute_share() <= 1.0 && r.memory_share() <= 1.0, "{r}");
    }
}
