//! What the device's matmuls compute from packed bytes: `nc_matmul_mx` and double-row, read instruction by instruction from the
//! tensors as a kernel would load them, against AWS's golden results and the oracle. Planted bugs must show.

#[path = "support/random.rs"]
mod random;
mod support;

use random::{RandomMatrix, Rng};
use support::{Golden, text, uint};
use trn_kernels::Parallelism;
use trn_kernels::matmul::oracle::OutputType;
use trn_kernels::matmul::{Activations, MatmulOptions, oracle};
use trn_kernels::num::{E8M0, F4E2M1x2, Fp8};
use trn_kernels::quant::{QuantizedMatrix, Scheme};
use trn_kernels::trainium::layout::*;

const SERIAL: Parallelism<'static> = Parallelism::Serial;

/// A sum and the sum of magnitudes.
#[derive(Clone, Copy, Default)]
struct Sum {
    value: f64,
    magnitude: f64,
}

impl Sum {
    fn add(&mut self, product: f64) {
        self.value += product;
        self.magnitude += product.abs();
    }
}

/// Sums off by more than f64 additions in another order explain: `2 k` additions of half a unit each.
fn wrong(got: &[Sum], wanted: &[f64], k: usize) -> usize {
    assert_eq!(got.len(), wanted.len());
    let off = |(g, w): (&Sum, &f64)| (g.value - w).abs() > 2.0 * k as f64 * f64::EPSILON / 2.0 * g.magnitude;
    got.iter().zip(wanted).filter(|pair| off(*pair)).count()
}

/// Element `q` of an x4 word, from the bytes of the data tensor.
fn x4(packed: &PackedMx, partition: usize, tile: usize, column: usize, q: usize) -> f64 {
    let [_, tiles, columns] = packed.layout().data_shape();
    let index = (partition * tiles + tile) * columns + column;
    f64::from(match packed.layout().element() {
        MxElement::E2M1 => {
            let word = u16::from_le_bytes(packed.data()[2 * index..2 * index + 2].try_into().unwrap());
            F4E2M1x2::VALUES[usize::from(word >> (4 * q) & 15)]
        }
        element => {
            let word = u32::from_le_bytes(packed.data()[4 * index..4 * index + 4].try_into().unwrap());
            let values = if element == MxElement::E5M2 { Fp8::E5M2.values() } else { Fp8::E4M3Fn.values() };
            values[(word >> (8 * q) & 255) as usize]
        }
    })
}

/// The scale tile of SBUF, `[128, S, C]`, loaded as docs/layouts.md says: 16 rows of HBM to the first 16 partitions of a quadrant.
fn scale_tile(packed: &PackedMx) -> Vec<Option<u8>> {
    let [_, s, c] = packed.layout().scale_shape();
    let mut tile = vec![None; 128 * s * c];
    for quadrant in 0..4 {
        let rows = &packed.scales()[16 * quadrant * s * c..16 * (quadrant + 1) * s * c];
        tile[32 * quadrant * s * c..][..16 * s * c].copy_from_slice(&rows.iter().map(|b| Some(*b)).collect::<Vec<_>>());
    }
    tile
}

/// `nc_matmul_mx` over all k tiles: partition p of tile t reads the scale at partition `32 (p / 32) + 4 (t % 4) + p / 8 % 4`.
fn nc_matmul_mx(stationary: &PackedMx, moving: &PackedMx) -> Vec<Sum> {
    let (m, n) = (stationary.layout().n(), moving.layout().n());
    let [_, tiles, _] = stationary.layout().data_shape();
    assert_eq!(tiles, moving.layout().data_shape()[1]);
    let operand = |packed: &PackedMx, rows: usize| -> Vec<f64> {
        let (image, [_, s, c]) = (scale_tile(packed), packed.layout().scale_shape());
        let column = |i| packed.layout().columns().column(i).unwrap();
        let mut out = Vec::new();
        for (i, tile, p) in (0..rows).flat_map(|i| (0..tiles).flat_map(move |t| (0..128).map(move |p| (i, t, p)))) {
            let partition = 32 * (p / 32) + 4 * (tile % 4) + p / 8 % 4;
            let scale = image[(partition * s + tile / 4) * c + column(i)].expect("a live row");
            let scale = f64::from(E8M0::from_bits(scale).to_f32());
            out.extend((0..4).map(|q| scale * x4(packed, p, tile, column(i), q)));
        }
        out
    };
    let (stationary, moving) = (operand(stationary, m), operand(moving, n));
    contract(&stationary, &moving, tiles * 512)
}

/// `out[i, j]` of rows of `k` values.
fn contract(a: &[f64], b: &[f64], k: usize) -> Vec<Sum> {
    let mut out = Vec::new();
    for (a, b) in a.chunks_exact(k).flat_map(|a| b.chunks_exact(k).map(move |b| (a, b))) {
        let mut sum = Sum::default();
        a.iter().zip(b).for_each(|(a, b)| sum.add(a * b));
        out.push(sum);
    }
    out
}

/// A golden operand `[K/4, rows * 4]` with dense scales `[K/32, rows]` as the checkpoint's `[rows, K]`: contiguous quads.
struct MxOperand {
    element: String,
    rows: usize,
    k: usize,
    codes: Vec<u8>,
    scales: Vec<u8>,
}

impl MxOperand {
    fn from_dense(element: &str, codes: &[u8], scales: &[u8], rows: usize, k: usize) -> Self {
        let at = |row: usize, k: usize| codes[k / 4 * rows * 4 + 4 * row + k % 4];
        let all = (0..rows).flat_map(|i| (0..k).map(move |j| (i, j)));
        let codes = match element {
            "e2m1" => all.filter(|(_, j)| j % 2 == 0).map(|(i, j)| at(i, j) | at(i, j + 1) << 4).collect(),
            _ => all.map(|(i, j)| at(i, j)).collect(),
        };
        let scales = (0..rows).flat_map(|i| (0..k / 32).map(move |g| scales[g * rows + i])).collect();
        MxOperand { element: element.into(), rows, k, codes, scales }
    }

    fn view(&self) -> QuantizedMatrix<'_> {
        match self.element.as_str() {
            "e2m1" => QuantizedMatrix::mxfp4(self.rows, self.k, &self.codes, &self.scales),
            "e4m3" => QuantizedMatrix::mxfp8(Fp8::E4M3Fn, self.rows, self.k, &self.codes, &self.scales),
            "e5m2" => QuantizedMatrix::mxfp8(Fp8::E5M2, self.rows, self.k, &self.codes, &self.scales),
            other => panic!("element {other}"),
        }
        .unwrap()
    }
}

fn pack(w: &QuantizedMatrix<'_>) -> PackedMx {
    MxLayout::of(w).unwrap().pack(w, SERIAL).unwrap()
}

/// Both operands of each golden matmul, and its result.
fn golden_matmuls(golden: &Golden) -> Vec<(MxOperand, MxOperand, Vec<f64>)> {
    let open = |case| {
        let (name, k) = (text(case, "matmul"), uint(case, "K"));
        let (left, right) = name.rsplit_once('.').unwrap().1.split_once('_').unwrap();
        let operand = |side: &str, element, rows| {
            let (codes, scales) = (golden.u8(&format!("{name}.{side}")), golden.u8(&format!("{name}.{side}_scale")));
            MxOperand::from_dense(element, &codes, &scales, rows, k)
        };
        let (stationary, moving) =
            (operand("stationary", left, uint(case, "M")), operand("moving", right, uint(case, "N")));
        (stationary, moving, golden.f64(&format!("{name}.out")))
    };
    golden.cases().iter().filter(|c| c["matmul"].is_string()).map(open).collect()
}

#[test]
fn packed_operands_give_awss_golden_results() {
    let golden = Golden::open("blocks_trn");
    let cases = golden_matmuls(&golden);
    assert!(!cases.is_empty());
    for (stationary, moving, out) in &cases {
        let (a, b) = (stationary.view(), moving.view());
        let got = nc_matmul_mx(&pack(&a), &pack(&b));
        assert_eq!(wrong(&got, out, a.k()), 0);
        let options = MatmulOptions::default();
        let oracle = oracle::matmul(Activations::Quantized(&a), &b, &options, &[], OutputType::F32).unwrap();
        let oracle: Vec<f64> = oracle.iter().map(|e| e.value).collect();
        assert_eq!(wrong(&got, &oracle, a.k()), 0, "the oracle agrees");
    }
}

/// `quantize_mx` writes its scales where the packed ones are loaded to.
#[test]
fn scales_lie_as_the_hardware_has_them() {
    let golden = Golden::open("blocks_trn");
    let hardware: Vec<String> = golden.names().into_iter().filter(|n| n.ends_with(".scale_hw")).collect();
    assert!(!hardware.is_empty());
    for name in hardware {
        let case = name.strip_suffix(".scale_hw").unwrap();
        let element = case.split('.').nth(1).unwrap();
        let [p, columns] = golden.shape(&name)[..] else { panic!("{name}: not a matrix") };
        let (codes, dense) = (golden.u8(&format!("{case}.codes")), golden.u8(&format!("{case}.scale")));
        let operand = MxOperand::from_dense(element, &codes, &dense, columns, 4 * p);
        let packed = pack(&operand.view());
        let ([_, s, c], image) = (packed.layout().scale_shape(), scale_tile(&packed));
        let wanted = golden.u8(&name);
        for (row, column) in (0..p).flat_map(|r| (0..columns).map(move |c| (r, c))) {
            let live = row % 32 < 4;
            let ours = if live { image[row * s * c + column].unwrap() } else { 0 };
            assert_eq!(wanted[row * columns + column], ours, "{name}: partition {row}, column {column}");
        }
        for (partition, column, q) in
            (0..p).flat_map(|p| (0..columns).flat_map(move |c| (0..4).map(move |q| (p, c, q))))
        {
            let code = packed.code(MxPlace { partition, tile: 0, column, sub: q });
            assert_eq!(code, Some(codes[partition * columns * 4 + 4 * column + q]), "{name}");
        }
    }
}

/// Several tiles, padding, permuted columns, odd m and n: the result is in the channels' order, and right.
#[test]
fn every_shape_and_column_order_gives_the_oracles_result() {
    let mut rng = Rng(3);
    let orders = [
        (GateUp::Together, ColumnOrder::Natural),
        (GateUp::Split, ColumnOrder::Natural),
        (GateUp::Split, ColumnOrder::Quads),
    ];
    for (m, n, k) in [(3, 6, 32), (1, 34, 544), (5, 10, 2880)] {
        for (i, order) in orders.into_iter().enumerate() {
            let schemes = [Scheme::Mxfp4, Scheme::Mxfp8(Fp8::E4M3Fn), Scheme::Mxfp8(Fp8::E5M2)];
            let (x, w) = (
                RandomMatrix::new(&mut rng, schemes[(i + 1) % 3], m, k, 6),
                RandomMatrix::new(&mut rng, schemes[i], n, k, 6),
            );
            let (x, w) = (x.view(), w.view());
            let layout = MxLayout::new(w.scheme(), n, k, order.0, order.1).unwrap();
            let got = nc_matmul_mx(&pack(&x), &layout.pack(&w, SERIAL).unwrap());
            let wanted = exact(&x, &w);
            assert_eq!(wrong(&got, &wanted, k), 0, "[{m}, {n}, {k}] {order:?}");
        }
    }
}

/// The oracle's values without f32 scales' rounding: plain f64.
fn exact(x: &QuantizedMatrix<'_>, w: &QuantizedMatrix<'_>) -> Vec<f64> {
    let rows = |w: &QuantizedMatrix<'_>| -> Vec<f64> {
        (0..w.n()).flat_map(|i| (0..w.k()).map(move |j| (i, j))).map(|(i, j)| w.value(i, j).unwrap()).collect()
    };
    contract(&rows(x), &rows(w), w.k()).iter().map(|s| s.value).collect()
}

/// The device's matmul over `rows-128/1`: chunks of 256 double-row, a last half chunk plain, channel scales at the end.
fn nc_matmul_rows(x: &PackedRows, w: &PackedRows) -> Vec<Sum> {
    let value = |packed: &PackedRows, partition, half, column| {
        let code = packed.code(RowPlace { partition, half, column }).unwrap();
        match packed.layout().element() {
            RowElement::Fp8(e) => f64::from(e.values()[usize::from(code)]),
            RowElement::Bf16 => f64::from(half::bf16::from_bits(code).to_f32()),
        }
    };
    let scale = |packed: &PackedRows, column: usize| match packed.scales() {
        [] => 1.0,
        [one] => f64::from(*one),
        scales => f64::from(scales[column]),
    };
    let [_, halves, _] = w.layout().data_shape();
    let mut out = Vec::new();
    for (i, j) in (0..x.layout().n()).flat_map(|i| (0..w.layout().n()).map(move |j| (i, j))) {
        let (a, b) = (x.layout().columns().column(i).unwrap(), w.layout().columns().column(j).unwrap());
        let scale = scale(x, a) * scale(w, b);
        let mut sum = Sum::default();
        for chunk in 0..halves / 2 {
            for (p, row) in (0..128).flat_map(|p| [(p, 0), (p, 1)]) {
                sum.add(scale * value(x, p, 2 * chunk + row, a) * value(w, p, 2 * chunk + row, b));
            }
        }
        if halves % 2 == 1 {
            (0..128).for_each(|p| sum.add(scale * value(x, p, halves - 1, a) * value(w, p, halves - 1, b)));
        }
        out.push(sum);
    }
    out
}

#[test]
fn double_row_gives_the_exact_result() {
    let mut rng = Rng(4);
    let fp8 = |e| [Scheme::Fp8PerTensor(e), Scheme::Fp8PerChannel(e)];
    for (m, n, k) in [(1, 2, 100), (3, 34, 256), (2, 6, 700)] {
        for e in [Fp8::E4M3Fn, Fp8::E4M3Ieee, Fp8::E5M2] {
            for scheme in fp8(e) {
                let x = RandomMatrix::new(&mut rng, Scheme::Fp8PerChannel(e), m, k, 1);
                let w = RandomMatrix::new(&mut rng, scheme, n, k, 1);
                let (x, w) = (x.view(), w.view());
                let element = RowElement::Fp8(e);
                let layout = RowsLayout::new(scheme, element, n, k, GateUp::Split, ColumnOrder::Natural).unwrap();
                let (x_packed, _) = RowsLayout::of(&x, element).unwrap().pack(&x, SERIAL).unwrap();
                let got = nc_matmul_rows(&x_packed, &layout.pack(&w, SERIAL).unwrap().0);
                assert_eq!(wrong(&got, &exact(&x, &w), k), 0, "[{m}, {n}, {k}] {scheme:?}");
            }
        }
        let (x, w) =
            (RandomMatrix::new(&mut rng, Scheme::Bf16, m, k, 1), RandomMatrix::new(&mut rng, Scheme::Bf16, n, k, 1));
        let (x, w) = (x.view(), w.view());
        let pack = |w| RowsLayout::of(w, RowElement::Bf16).unwrap().pack(w, SERIAL).unwrap().0;
        assert_eq!(wrong(&nc_matmul_rows(&pack(&x), &pack(&w)), &exact(&x, &w), k), 0, "[{m}, {n}, {k}] bf16");
    }
}

/// The same tensors with one mistake.
fn mutant(packed: &PackedMx, mutate: impl FnOnce(&mut Vec<u8>, &mut Vec<u8>)) -> PackedMx {
    let (mut data, mut scales) = (packed.data().to_vec(), packed.scales().to_vec());
    mutate(&mut data, &mut scales);
    PackedMx::from_parts(MxLayout::NAME, *packed.layout(), data, scales, vec![]).unwrap()
}

/// Every mistake of an operand that a packer could make changes results.
#[test]
fn planted_bugs_are_caught() {
    let mut rng = Rng(5);
    let (m, n, k) = (4, 8, 2 * 512);
    for scheme in [Scheme::Mxfp4, Scheme::Mxfp8(Fp8::E4M3Fn)] {
        let (x, w) = (RandomMatrix::new(&mut rng, scheme, m, k, 8), RandomMatrix::new(&mut rng, scheme, n, k, 8));
        let (x, w) = (x.view(), w.view());
        let (x_packed, w_packed) = (pack(&x), pack(&w));
        let wanted = exact(&x, &w);
        assert_eq!(wrong(&nc_matmul_mx(&x_packed, &w_packed), &wanted, k), 0);
        let word = w_packed.layout().element().word_bytes();
        let ([_, tiles, columns], [_, s, _]) = (w_packed.layout().data_shape(), w_packed.layout().scale_shape());
        let row = columns * word;
        let caught = |name: &str, mutant: PackedMx| {
            let off = wrong(&nc_matmul_mx(&x_packed, &mutant), &wanted, k);
            assert!(off > wanted.len() / 2, "{scheme:?}: {name} changed {off} of {} results", wanted.len());
        };
        caught(
            "elements of a word in reverse order",
            mutant(&w_packed, |data, _| {
                data.chunks_exact_mut(word).for_each(|w| {
                    w.reverse();
                    if scheme == Scheme::Mxfp4 {
                        w.iter_mut().for_each(|b| *b = b.rotate_left(4));
                    }
                })
            }),
        );
        caught(
            "bytes of a word in reverse order",
            mutant(&w_packed, |data, _| data.chunks_exact_mut(word).for_each(<[u8]>::reverse)),
        );
        if scheme == Scheme::Mxfp4 {
            caught("nibbles swapped", mutant(&w_packed, |data, _| data.iter_mut().for_each(|b| *b = b.rotate_left(4))));
        }
        caught(
            "strided order of the tutorial",
            mutant(&w_packed, |data, _| {
                let source = data.clone();
                // Element (p, q) of a tile is k = p + 128 q there.
                for (p, t, c, q) in (0..128).flat_map(|p| {
                    (0..tiles).flat_map(move |t| (0..columns).flat_map(move |c| (0..4).map(move |q| (p, t, c, q))))
                }) {
                    let k = p + 128 * q;
                    let nibble = |at: (usize, usize)| ((at.0 * tiles + t) * columns + c) * 4 + at.1;
                    let (to, from) = (nibble((p, q)), nibble((k / 4, k % 4)));
                    match word {
                        4 => data[to] = source[from],
                        _ => {
                            let code = source[from / 2] >> (4 * (from % 2)) & 15;
                            data[to / 2] = data[to / 2] & !(15 << (4 * (to % 2))) | code << (4 * (to % 2));
                        }
                    }
                }
            }),
        );
        caught("partitions shifted by one", mutant(&w_packed, |data, _| data.rotate_left(tiles * row)));
        caught(
            "k tiles exchanged",
            mutant(&w_packed, |data, _| {
                data.chunks_exact_mut(tiles * row).for_each(|p| p.rotate_left(row));
            }),
        );
        caught("scales of the next row", mutant(&w_packed, |_, scales| scales.rotate_left(s * columns)));
        caught("scales of the next tile's offset", mutant(&w_packed, |_, scales| scales.rotate_left(4 * s * columns)));
        caught("scales of the next quadrant", mutant(&w_packed, |_, scales| scales.rotate_left(16 * s * columns)));
        caught("columns shifted by one", mutant(&w_packed, |data, _| data.rotate_left(word)));
    }
}
