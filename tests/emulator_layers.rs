//! Device programs that requantize on the way, on the emulator and against the CPU path: experts (`grouped_matmul_mx`) and
//! `rmsnorm_quantize`.
//!
//! A value that is rounded to a code cannot be compared within a small bound: two right executors may fall on both sides of a
//! rounding edge. What can be known is an interval for the value before the rounding, and then that its code lies between the
//! codes of the interval's ends, since rounding is monotone.

#[path = "support/programs.rs"]
mod programs;
#[path = "support/random.rs"]
mod random;

use half::bf16;
use programs::{Checked, values};
use random::Rng;
use trn_kernels::layer::{GateLayout, SwigluSpec, rms_norm, rms_norm_quantize, swiglu};
use trn_kernels::matmul::oracle::{self, OutputType};
use trn_kernels::matmul::{MatmulOptions, PackedExperts, RowSource};
use trn_kernels::num::{Fp8, Overflow};
use trn_kernels::quant::{
    QuantizeOptions, QuantizedExperts, QuantizedMatrix, QuantizedMatrixBuf, ScaleRule, Scheme, quantize,
};
use trn_kernels::trainium::emulator::{Dtype, Options};
use trn_kernels::trainium::layout::{ColumnOrder, GateUp, MxLayout, PackedMx, PackedMxExperts};
use trn_kernels::{Cpu, MatMut, MatRef, Parallelism, Workspace};

/// Unit roundoffs of f32 and of bf16.
const U32: f64 = 1.0 / (1u64 << 24) as f64;
const U16: f64 = 1.0 / 256.0;
/// Largest slope of `g sigmoid(1.702 g)`: that of silu.
const SLOPE: f64 = 1.1;
const RULES: [ScaleRule; 2] = [ScaleRule::Trainium, ScaleRule::Floor];

fn parameter<T: std::str::FromStr>(checked: &Checked, name: &str) -> T {
    let text = checked.program.parameter(name).unwrap_or_else(|| panic!("{}: no parameter {name}", checked.name));
    text.parse().unwrap_or_else(|_| panic!("{}: {name} is {text}", checked.name))
}

fn fp8(element: &str) -> Fp8 {
    match element {
        "e4m3" => Fp8::E4M3Ieee,
        "e4m3fn" => Fp8::E4M3Fn,
        "e5m2" => Fp8::E5M2,
        other => panic!("element {other}"),
    }
}

/// The program's outputs on these inputs, given by name.
fn emulate(checked: &Checked, inputs: &[(&str, Vec<u8>)], scale_rule: ScaleRule) -> Vec<Vec<u8>> {
    let find = |name: &str| inputs.iter().find(|(n, _)| *n == name).map(|(_, bytes)| bytes.as_slice());
    let ports = checked.program.inputs().iter();
    let ordered: Vec<&[u8]> =
        ports.map(|p| find(&p.name).unwrap_or_else(|| panic!("{}: no {}", checked.name, p.name))).collect();
    checked.program.run(&ordered, &Options { scale_rule }).unwrap_or_else(|e| panic!("{}: {e}", checked.name))
}

fn bf16_bytes(values: &[bf16]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn i32s(bytes: &[u8]) -> Vec<i32> {
    bytes.chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// A row of blocks of 32 after quantizing to MX: the exact row's values, and how far another executor's may be from them if what
/// it quantizes is within `apart` of the row (after `round`, a monotone rounding that both do).
fn requantized(
    row: &[f64],
    apart: &[f64],
    rule: ScaleRule,
    element: Fp8,
    round: fn(f64) -> f64,
) -> (Vec<f64>, Vec<f64>) {
    let format = element.format();
    let at_scale = |v: f64, e: i32| {
        f64::from(format.decode(format.encode((v * 2f64.powi(-e)) as f32, Overflow::Saturate))) * 2f64.powi(e)
    };
    let (mut value, mut slack) = (vec![], vec![]);
    for (row, apart) in row.chunks(32).zip(apart.chunks(32)) {
        let ends: Vec<[f64; 2]> = row.iter().zip(apart).map(|(v, a)| [round(v - a), round(v + a)]).collect();
        let exact: Vec<f64> = row.iter().map(|v| round(*v)).collect();
        let amax = |v: &mut dyn Iterator<Item = f64>| v.fold(0.0, f64::max) as f32;
        let scale = |amax: f32| rule.scale(format, amax).exponent().expect("a number");
        let least = |e: &[f64; 2]| if e[0] * e[1] > 0.0 { e[0].abs().min(e[1].abs()) } else { 0.0 };
        let here = scale(amax(&mut exact.iter().map(|v| v.abs())));
        let low = scale(amax(&mut ends.iter().map(least)));
        let high = scale(amax(&mut ends.iter().map(|e| e[0].abs().max(e[1].abs()))));
        assert!(low <= here && here <= high && high - low <= 1, "the interval spans scales {low}..={high}");
        for (v, ends) in exact.iter().zip(&ends) {
            let kept = at_scale(*v, here);
            value.push(kept);
            let far = ends.iter().flat_map(|end| [low, here, high].map(|e| (at_scale(*end, e) - kept).abs()));
            slack.push(far.fold(0.0, f64::max));
        }
    }
    (value, slack)
}

/// As [`requantized`] for two MXFP8 terms under the documented scale: the row in bf16, of which an element is lost only if it is
/// 2^13 below the power of two of its block's maximum, and then at most 2^-17 + 2^-21 of that.
fn in_two_terms(row: &[f64], apart: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let (mut value, mut slack) = (vec![], vec![]);
    for (row, apart) in row.chunks(32).zip(apart.chunks(32)) {
        let ends: Vec<[f64; 2]> = row.iter().zip(apart).map(|(v, a)| [to_bf16(v - a), to_bf16(v + a)]).collect();
        let top = ends.iter().flatten().fold(0.0, |m: f64, v| m.max(v.abs())).log2().floor().exp2();
        for (v, [low, high]) in row.iter().zip(&ends) {
            let exact = to_bf16(*v);
            let least = if low * high > 0.0 { low.abs().min(high.abs()) } else { 0.0 };
            let lost = if least < top * 2f64.powi(-13) { top * (2f64.powi(-17) + 2f64.powi(-21)) } else { 0.0 };
            value.push(exact);
            slack.push((low - exact).abs().max((high - exact).abs()) + lost);
        }
    }
    (value, slack)
}

fn to_bf16(v: f64) -> f64 {
    bf16::from_f64(v).to_f64()
}

/// Experts of one program's shape, quantized by this crate.
struct Experts {
    hidden: usize,
    inter: usize,
    offsets: Vec<u32>,
    limit: f32,
    /// What the device makes of activations: MXFP8, or bf16 itself in two terms.
    activations: Scheme,
    gate_up: Vec<QuantizedMatrixBuf>,
    down: Vec<QuantizedMatrixBuf>,
    gate_up_bias: Vec<f32>,
    down_bias: Vec<f32>,
}

impl Experts {
    fn new(checked: &Checked, rng: &mut Rng) -> Experts {
        let (hidden, inter) = (checked.shape(checked.input("x"))[1], parameter(checked, "intermediate"));
        let scheme = match parameter::<String>(checked, "w_element").as_str() {
            "e2m1" => Scheme::Mxfp4,
            element => Scheme::Mxfp8(fp8(element)),
        };
        let experts = checked.shape(checked.input("w_down"))[0];
        let (rows, slots) = (checked.shape(checked.input("x"))[0], checked.shape(checked.input("take"))[1]);
        // Which rows are an expert's follows from the program's blocks.
        let mut of_row = vec![0; rows];
        let (take, block_expert) = (i32s(&checked.bytes("in.take")), i32s(&checked.bytes("in.block_expert")));
        for (block, expert) in take.chunks_exact(slots).zip(block_expert) {
            block.iter().filter(|r| (**r as usize) < rows).for_each(|r| of_row[*r as usize] = expert);
        }
        assert!(of_row.is_sorted(), "{}: rows are sorted by expert", checked.name);
        let offsets = (0..=experts).map(|e| of_row.partition_point(|x| (*x as usize) < e) as u32).collect();
        let mut matrices = |n: usize, k: usize, size: f32| -> Vec<QuantizedMatrixBuf> {
            let one = |_| {
                let w: Vec<f32> = (0..n * k).map(|_| rng.normal() * size).collect();
                quantize(MatRef::new(&w, n, k).unwrap(), scheme, &QuantizeOptions::default()).unwrap()
            };
            (0..experts).map(one).collect()
        };
        // Gates and ups of a few units: all clamps act.
        let (gate_up, down) = (matrices(2 * inter, hidden, 5.0 / (hidden as f32).sqrt()), matrices(hidden, inter, 1.0));
        let mut bias =
            |n: usize| -> Vec<f32> { (0..experts * n).map(|_| bf16::from_f32(rng.normal()).to_f32()).collect() };
        let (gate_up_bias, down_bias) = (bias(2 * inter), bias(hidden));
        let limit = parameter(checked, "limit");
        let activations = match parameter::<u32>(checked, "x_terms") {
            1 => Scheme::Mxfp8(Fp8::E4M3Fn),
            _ => Scheme::Bf16,
        };
        Experts { hidden, inter, offsets, limit, activations, gate_up, down, gate_up_bias, down_bias }
    }

    fn rows(&self, e: usize) -> std::ops::Range<usize> {
        self.offsets[e] as usize..self.offsets[e + 1] as usize
    }

    fn layouts(&self) -> [MxLayout; 2] {
        let of =
            |w: &QuantizedMatrixBuf, gate_up, order| MxLayout::new(w.scheme(), w.n(), w.k(), gate_up, order).unwrap();
        [
            of(&self.gate_up[0], GateUp::Split, ColumnOrder::Quads),
            of(&self.down[0], GateUp::Together, ColumnOrder::Natural),
        ]
    }

    /// The program's inputs but for x.
    fn inputs(&self, checked: &Checked) -> Vec<(&'static str, Vec<u8>)> {
        let pack = |w: &[QuantizedMatrixBuf], layout: &MxLayout| {
            let views = QuantizedExperts::new(w.iter().map(|w| w.view()).collect()).unwrap();
            let c = layout.columns();
            PackedMxExperts::pack(&views, c.gate_up(), c.order(), Parallelism::Serial).unwrap()
        };
        let layouts = self.layouts();
        let (gate_up, down) = (pack(&self.gate_up, &layouts[0]), pack(&self.down, &layouts[1]));
        let bias = |values: &[f32], layout: &MxLayout| -> Vec<f32> {
            values.chunks_exact(layout.n()).flat_map(|b| layout.columns().pack(b, 0.0).unwrap()).collect()
        };
        let b_down: Vec<bf16> = bias(&self.down_bias, &layouts[1]).into_iter().map(bf16::from_f32).collect();
        vec![
            ("take", checked.bytes("in.take")),
            ("put", checked.bytes("in.put")),
            ("block_expert", checked.bytes("in.block_expert")),
            ("w_gate_up", gate_up.data().to_vec()),
            ("s_gate_up", gate_up.scales().to_vec()),
            ("b_gate_up", bias(&self.gate_up_bias, &layouts[0]).iter().flat_map(|v| v.to_le_bytes()).collect()),
            ("w_down", down.data().to_vec()),
            ("s_down", down.scales().to_vec()),
            ("b_down", bf16_bytes(&b_down)),
        ]
    }

    /// The exact result and how far an executor may be from it, `[rows, hidden]`: gate and up within the oracle's bound (and one
    /// rounding of bias + 1, which the device adds at once), swiglu by its slopes and 12 roundings at most, both roundings on the way
    /// to MX as [`requantized`] says, the down projection carrying that by |w| and within its own bound.
    fn expected(&self, x: &QuantizedMatrixBuf, rule: ScaleRule, output: OutputType) -> Vec<(f64, f64)> {
        let spec = SwigluSpec { limit: Some(self.limit), ..SwigluSpec::GPT_OSS };
        let (alpha, limit) = (f64::from(spec.alpha), f64::from(self.limit));
        let (x, mut out) = (x.view(), vec![]);
        for e in 0..self.gate_up.len() {
            let rows = self.rows(e);
            let count = rows.len();
            let bias = &self.gate_up_bias[e * 2 * self.inter..][..2 * self.inter];
            let options = MatmulOptions { bias: Some(bias), ..MatmulOptions::default() };
            let x = x.slice_n(rows).unwrap();
            let pre = oracle::matmul(&x, &self.gate_up[e].view(), &options, &[], OutputType::F32).unwrap();
            let (mut inner, mut slack) = (vec![], vec![]);
            for row in pre.chunks_exact(2 * self.inter) {
                let (mut exact, mut apart) = (vec![], vec![]);
                for (pair, bias) in row.chunks_exact(2).zip(bias.chunks_exact(2)) {
                    let error = |i: usize| pair[i].bound + U32 * (f64::from(bias[i]).abs() + pair[i].value.abs() + 2.0);
                    let (gate, up) = (pair[0].value.min(limit), pair[1].value.clamp(-limit, limit) + 1.0);
                    let glu = gate / (1.0 + (-alpha * gate).exp());
                    let before = error(0) * SLOPE * up.abs() + error(1) * glu.abs() + error(0) * error(1) * SLOPE;
                    // CPU: `SwigluSpec::apply`; the device has fewer roundings.
                    let own = ((alpha * gate).abs() + 1.0 + 9.0) * U32 * ((glu * up).abs() + before);
                    exact.push(glu * up);
                    apart.push(before + own + f64::from(f32::MIN_POSITIVE));
                }
                let (value, off) = match self.activations {
                    Scheme::Bf16 => in_two_terms(&exact, &apart),
                    _ => requantized(&exact, &apart, rule, Fp8::E4M3Fn, to_bf16),
                };
                inner.extend(value);
                slack.extend(off);
            }
            // The values are MX codes times scales, so bf16 holds them exactly.
            let exact: Vec<bf16> = inner.iter().map(|v| bf16::from_f64(*v)).collect();
            assert!(exact.iter().zip(&inner).all(|(b, v)| b.to_f64() == *v));
            let bias = &self.down_bias[e * self.hidden..][..self.hidden];
            let options = MatmulOptions { bias: Some(bias), ..MatmulOptions::default() };
            let down = self.down[e].view();
            let exact = MatRef::new(&exact, count, self.inter).unwrap();
            for (at, want) in oracle::matmul(exact, &down, &options, &[], output).unwrap().iter().enumerate() {
                let (i, n) = (at / self.hidden, at % self.hidden);
                let slack = &slack[i * self.inter..][..self.inter];
                let moved: f64 = slack.iter().enumerate().map(|(k, s)| s * down.value(n, k).unwrap().abs()).sum();
                // What moved is summed and rounded like the rest: at most inter + 4 more roundings, and the output's.
                let rounding = (self.inter + 4) as f64 * U32 + if output == OutputType::Bf16 { U16 } else { U32 };
                out.push((want.value, want.bound + moved * (1.0 + rounding)));
            }
        }
        out
    }

    /// The CPU path from the crate's own functions, `[rows, hidden]`: by [`Cpu::grouped_matmul`], and, to the same bits, by
    /// [`Cpu::gather_matmul`].
    fn on_cpu(&self, x: &QuantizedMatrixBuf, rule: ScaleRule) -> Vec<f64> {
        let (cpu, ws) = (Cpu::detect(), &mut Workspace::new());
        let rows = x.n();
        let stack = |w: &[QuantizedMatrixBuf]| {
            PackedExperts::new(w.iter().map(|w| cpu.pack(&w.view()).unwrap()).collect()).unwrap()
        };
        let (gate_up, down) = (stack(&self.gate_up), stack(&self.down));
        let first = MatmulOptions { bias: Some(&self.gate_up_bias), ..MatmulOptions::default() };
        let second = MatmulOptions { bias: Some(&self.down_bias), ..MatmulOptions::default() };
        let spec = SwigluSpec { limit: Some(self.limit), ..SwigluSpec::GPT_OSS };
        let ids: Vec<u32> = (0..self.gate_up.len()).flat_map(|e| self.rows(e).map(move |_| e as u32)).collect();
        let mut results: Vec<Vec<bf16>> = vec![];
        for gathered in [false, true] {
            let (mut pre, mut inner) = (vec![0f32; rows * 2 * self.inter], vec![bf16::ZERO; rows * self.inter]);
            let y = MatMut::new(&mut pre, rows, 2 * self.inter).unwrap();
            match gathered {
                false => cpu.grouped_matmul(&x.view(), &gate_up, &self.offsets, y, &first, ws).unwrap(),
                true => cpu.gather_matmul(&x.view(), RowSource::Token, &gate_up, &ids, 1, y, &first, ws).unwrap(),
            }
            let activated = MatMut::new(&mut inner, rows, self.inter).unwrap();
            swiglu(&cpu, spec, GateLayout::Interleaved, MatRef::new(&pre, rows, 2 * self.inter).unwrap(), activated)
                .unwrap();
            let options = QuantizeOptions { rule, ..QuantizeOptions::default() };
            let inner = quantize(MatRef::new(&inner, rows, self.inter).unwrap(), self.activations, &options).unwrap();
            let mut out = vec![bf16::ZERO; rows * self.hidden];
            let y = MatMut::new(&mut out, rows, self.hidden).unwrap();
            match gathered {
                false => cpu.grouped_matmul(&inner.view(), &down, &self.offsets, y, &second, ws).unwrap(),
                true => cpu.gather_matmul(&inner.view(), RowSource::Slot, &down, &ids, 1, y, &second, ws).unwrap(),
            }
            results.push(out);
        }
        assert_eq!(results[0], results[1], "grouped and gathered have the same bits");
        results[0].iter().map(|v| v.to_f64()).collect()
    }
}

fn outside(got: &[f64], expected: &[(f64, f64)]) -> usize {
    assert_eq!(got.len(), expected.len());
    // Counted from within: NaN is outside.
    got.len() - got.iter().zip(expected).filter(|(g, (want, bound))| (*g - want).abs() <= *bound).count()
}

#[test]
fn grouped_matmul_mx_from_checkpoint_experts() {
    for (seed, checked) in programs::of("grouped_matmul_mx").iter().enumerate() {
        let rng = &mut Rng(seed as u64 + 300);
        let experts = Experts::new(checked, rng);
        let layouts = experts.layouts();
        for (name, layout) in [("w_gate_up", &layouts[0]), ("w_down", &layouts[1])] {
            assert_eq!(layout.data_shape(), checked.shape(checked.input(name))[1..], "{} {name}", checked.name);
        }
        let rows = checked.shape(checked.input("x"))[0];
        let mut inputs = experts.inputs(checked);
        let port = &checked.program.outputs()[0];
        let output = match checked.dtype(port) {
            Dtype::Bfloat16 => OutputType::Bf16,
            _ => OutputType::F32,
        };
        for rule in RULES {
            let mut x: Vec<bf16> = (0..rows * experts.hidden).map(|_| bf16::from_f32(rng.normal())).collect();
            if experts.activations == Scheme::Bf16 {
                // Two terms are the value under the documented rule, where it is not far below its block's maximum.
                if rule != ScaleRule::Trainium {
                    continue;
                }
                x.iter_mut().filter(|v| v.to_f32().abs() < 0.01).for_each(|v| *v = bf16::ZERO);
            }
            let options = QuantizeOptions { rule, ..QuantizeOptions::default() };
            let quantized =
                quantize(MatRef::new(&x, rows, experts.hidden).unwrap(), experts.activations, &options).unwrap();
            let expected = experts.expected(&quantized, rule, output);
            inputs.retain(|(name, _)| *name != "x");
            inputs.push(("x", bf16_bytes(&x)));
            let device = |inputs: &[(&str, Vec<u8>)]| values(checked.dtype(port), &emulate(checked, inputs, rule)[0]);
            assert_eq!(outside(&device(&inputs), &expected), 0, "{} {rule:?} on the emulator", checked.name);
            assert_eq!(
                outside(&experts.on_cpu(&quantized, rule), &expected),
                0,
                "{} {rule:?} on the CPU",
                checked.name
            );

            // Bugs that the comparison must see.
            let count = experts.gate_up.len();
            let bug = |what: &str, name: &str, change: &dyn Fn(&mut [u8])| {
                let mut wrong = inputs.clone();
                change(&mut wrong.iter_mut().find(|(n, _)| *n == name).expect("an input").1);
                assert!(outside(&device(&wrong), &expected) > 0, "{} {rule:?}: {what} goes unseen", checked.name);
            };
            let swap = |bytes: &mut [u8]| bytes.rotate_left(bytes.len() / count);
            bug("another expert's down projection", "w_down", &swap);
            bug("another expert's gate-up bias", "b_gate_up", &swap);
            bug("a wrong expert for a block", "block_expert", &|bytes| bytes.rotate_left(4));
            for scales in ["s_gate_up", "s_down"] {
                bug("a moved scale row", scales, &|bytes| {
                    let row = bytes.len() / count / 64;
                    bytes[..2 * row].rotate_left(row);
                });
            }
        }
    }
}

/// `x [m, k]` and `gamma [k]` exact in bf16, as the program's types.
struct Norm {
    m: usize,
    k: usize,
    eps: f32,
    x: Vec<f32>,
    gamma: Vec<f32>,
}

impl Norm {
    fn read(checked: &Checked, x: &[u8], gamma: &[u8]) -> Norm {
        let shape = checked.shape(checked.input("x"));
        let floats = |name: &str, bytes: &[u8]| -> Vec<f32> {
            values(checked.dtype(checked.input(name)), bytes).into_iter().map(|v| v as f32).collect()
        };
        let (x, gamma) = (floats("x", x), floats("gamma", gamma));
        Norm { m: shape[0], k: shape[1], eps: parameter(checked, "eps"), x, gamma }
    }

    fn inputs(checked: &Checked, rng: &mut Rng) -> Vec<(&'static str, Vec<u8>)> {
        ["x", "gamma"]
            .map(|name| {
                let port = checked.input(name);
                let count: usize = checked.shape(port).iter().product();
                let values: Vec<bf16> = rng.wide(count, -2..=2).into_iter().map(bf16::from_f32).collect();
                let bytes = match checked.dtype(port) {
                    Dtype::Bfloat16 => bf16_bytes(&values),
                    _ => values.iter().flat_map(|v| v.to_f32().to_le_bytes()).collect(),
                };
                (name, bytes)
            })
            .to_vec()
    }

    fn x(&self) -> MatRef<'_, f32> {
        MatRef::new(&self.x, self.m, self.k).unwrap()
    }

    /// Exact results, row by row, and the relative error of an executor that sums squares in any order: half of k + 1 roundings of
    /// the sum (the root halves them), and 8 for mean, eps, root and both products.
    fn exact(&self) -> (Vec<f64>, f64) {
        let rows = self.x.chunks_exact(self.k).flat_map(|row| {
            let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / self.k as f64;
            let factor = 1.0 / (mean + f64::from(self.eps)).sqrt();
            row.iter().zip(&self.gamma).map(move |(x, g)| f64::from(*x) * factor * f64::from(*g)).collect::<Vec<_>>()
        });
        (rows.collect(), ((self.k + 1) as f64 / 2.0 + 8.0) * U32 * 1.01)
    }
}

/// How many codes and scales are not what a right executor can give. A code: the position of y between 0 and the largest |y| of its
/// row does not depend on the norm's factor, and both executors find it with at most 8 roundings. Its code is between those of the ends.
fn fp8_outside(norm: &Norm, element: Fp8, codes: &[u8], scales: &[f64]) -> usize {
    let ((exact, relative), format) = (norm.exact(), element.format());
    let top = f64::from(format.max());
    let mut wrong = 0;
    for ((row, codes), scale) in exact.chunks_exact(norm.k).zip(codes.chunks_exact(norm.k)).zip(scales) {
        let largest = row.iter().fold(0.0, |a: f64, v| a.max(v.abs()));
        let near = (scale - largest / top).abs() <= (relative + 4.0 * U32) * largest / top;
        wrong += usize::from(!near);
        for (v, code) in row.iter().zip(codes) {
            let place = v / largest * top;
            let end =
                |factor: f64| f64::from(format.decode(format.encode((place * factor) as f32, Overflow::Saturate)));
            let (a, b, got) = (end(1.0 - 9.0 * U32), end(1.0 + 9.0 * U32), f64::from(format.decode(*code)));
            wrong += usize::from(!(a.min(b) <= got && got <= a.max(b)));
        }
    }
    wrong
}

#[test]
fn rmsnorm_quantize_fp8_meets_the_layer() {
    for (seed, checked) in programs::of("rmsnorm_quantize_fp8").iter().enumerate() {
        let element = fp8(&parameter::<String>(checked, "element"));
        let rng = &mut Rng(seed as u64 + 400);
        let own = ["x", "gamma"].map(|name| (name, checked.bytes(&format!("in.{name}")))).to_vec();
        for inputs in [own, Norm::inputs(checked, rng)] {
            let norm = Norm::read(checked, &inputs[0].1, &inputs[1].1);
            let out = emulate(checked, &inputs, ScaleRule::Trainium);
            let scales = values(Dtype::Float32, &out[1]);
            assert_eq!(fp8_outside(&norm, element, &out[0], &scales), 0, "{} on the emulator", checked.name);

            let (mut cpu, ws) = (QuantizedMatrixBuf::new(), &mut Workspace::new());
            let to = (Scheme::Fp8PerChannel(element), &QuantizeOptions::default());
            rms_norm_quantize(&Cpu::detect(), norm.x(), &norm.gamma, norm.eps, to, &mut cpu, ws).unwrap();
            let scales: Vec<f64> = cpu.outer_scales().iter().map(|s| f64::from(*s)).collect();
            assert_eq!(fp8_outside(&norm, element, cpu.codes(), &scales), 0, "{} on the CPU", checked.name);

            // Bugs that the comparison must see: gamma of the next column, scales of the next row.
            let mut moved = inputs.clone();
            let size = moved[1].1.len() / norm.k;
            moved[1].1.rotate_left(size);
            let wrong = emulate(checked, &moved, ScaleRule::Trainium);
            assert!(fp8_outside(&norm, element, &wrong[0], &scales) > 0, "{}: a moved gamma goes unseen", checked.name);
            let mut rotated = scales.clone();
            rotated.rotate_left(1);
            assert!(fp8_outside(&norm, element, &out[0], &rotated) > 0, "{}: moved scales go unseen", checked.name);
        }
    }
}

/// The device's MX output as this crate's matrix: its columns, of which an odd number has one of padding, are those of a layout.
fn unpacked(checked: &Checked, norm: &Norm, element: Fp8, out: &[Vec<u8>]) -> QuantizedMatrixBuf {
    let columns = checked.shape(&checked.program.outputs()[0])[2];
    let layout = MxLayout::new(Scheme::Mxfp8(element), norm.m, norm.k, GateUp::Together, ColumnOrder::Natural).unwrap();
    let to = layout.columns().count();
    let widen = |bytes: &[u8], size: usize, fill: u8| -> Vec<u8> {
        let wide = bytes.chunks_exact(columns * size).flat_map(|row| {
            let kept = &row[..norm.m * size];
            kept.iter().copied().chain(std::iter::repeat_n(fill, (to - norm.m) * size)).collect::<Vec<u8>>()
        });
        wide.collect()
    };
    let (data, scales) = (widen(&out[0], layout.element().word_bytes(), 0), widen(&out[1], 1, 127));
    PackedMx::from_parts(MxLayout::NAME, layout, data, scales, vec![]).unwrap().unpack(Parallelism::Serial).unwrap()
}

fn mx_outside(norm: &Norm, element: Fp8, rule: ScaleRule, got: &QuantizedMatrix<'_>, round: fn(f64) -> f64) -> usize {
    let (exact, relative) = norm.exact();
    let mut wrong = 0;
    for (i, row) in exact.chunks_exact(norm.k).enumerate() {
        let apart: Vec<f64> = row.iter().map(|v| relative * v.abs()).collect();
        let (value, slack) = requantized(row, &apart, rule, element, round);
        let far = |k: usize| (got.value(i, k).unwrap() - value[k]).abs() <= slack[k];
        wrong += (0..norm.k).filter(|k| !far(*k)).count();
    }
    wrong
}

#[test]
fn rmsnorm_quantize_mx_meets_the_layer() {
    for (seed, checked) in programs::of("rmsnorm_quantize_mx").iter().enumerate() {
        let element = fp8(&parameter::<String>(checked, "element"));
        let rng = &mut Rng(seed as u64 + 500);
        let own = ["x", "gamma"].map(|name| (name, checked.bytes(&format!("in.{name}")))).to_vec();
        for (exact, inputs) in [(true, own), (false, Norm::inputs(checked, rng))] {
            for rule in RULES {
                let norm = Norm::read(checked, &inputs[0].1, &inputs[1].1);
                let device = unpacked(checked, &norm, element, &emulate(checked, &inputs, rule));
                let place = format!("{} {rule:?}", checked.name);
                assert_eq!(mx_outside(&norm, element, rule, &device.view(), to_bf16), 0, "{place} on the emulator");

                let (cpu, ws) = (Cpu::detect(), &mut Workspace::new());
                let options = QuantizeOptions { rule, ..QuantizeOptions::default() };
                let scheme = Scheme::Mxfp8(element);
                // Without the device's rounding to bf16 on the way.
                let mut single = QuantizedMatrixBuf::new();
                rms_norm_quantize(&cpu, norm.x(), &norm.gamma, norm.eps, (scheme, &options), &mut single, ws).unwrap();
                assert_eq!(mx_outside(&norm, element, rule, &single.view(), |v| v), 0, "{place} on the CPU");
                // And with it.
                let mut y = vec![bf16::ZERO; norm.m * norm.k];
                rms_norm(&cpu, norm.x(), &norm.gamma, norm.eps, MatMut::new(&mut y, norm.m, norm.k).unwrap()).unwrap();
                let half = quantize(MatRef::new(&y, norm.m, norm.k).unwrap(), scheme, &options).unwrap();
                assert_eq!(mx_outside(&norm, element, rule, &half.view(), to_bf16), 0, "{place} on the CPU in bf16");
                if exact {
                    // Nothing in the program's own data rounds but what both round alike: bits.
                    assert_eq!(device.codes(), half.codes(), "{place}: codes");
                    assert_eq!(device.block_scales(), half.block_scales(), "{place}: scales");
                }

                // A bug that the comparison must see.
                let mut moved = inputs.clone();
                let size = moved[1].1.len() / norm.k;
                moved[1].1.rotate_left(size);
                let wrong = unpacked(checked, &norm, element, &emulate(checked, &moved, rule));
                assert!(
                    mx_outside(&norm, element, rule, &wrong.view(), to_bf16) > 0,
                    "{place}: a moved gamma goes unseen"
                );
            }
        }
    }
}
