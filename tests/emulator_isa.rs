//! The emulator against what is known of the instruction set without a simulator: the documents' worked answers, and the
//! goldens of `quantize_mx` and `nc_matmul_mx` made with AWS's own CPU utilities.

#[path = "support/device.rs"]
mod device;
mod support;

use device::{Device, bf16_bytes, f32_bytes, f32_values};
use serde_json::json;
use support::{Golden, text, uint};
use trn_kernels::quant::ScaleRule;
use trn_kernels::trainium::emulator::{Options, Rule};

const OCP: Options = Options { scale_rule: ScaleRule::Floor };

/// One fp32 tile through one instruction that writes one fp32 tile of the same shape.
fn one(name: &str, engine: &str, role: &str, x: &[f32], attrs: serde_json::Value) -> Vec<f32> {
    let mut d = Device::new("trn3");
    let data = d.input("float32", &[1, x.len()]);
    let dst = d.tensor("sbuf", "float32", &[1, x.len()]);
    d.on(name, engine, &[("dst", dst)], &[(role, data)], attrs);
    d.output(dst);
    f32_values(&d.run(&[&f32_bytes(x)], &Options::default()).unwrap()[0])
}

#[test]
fn abs_max_and_abs_min_keep_the_sign() {
    let step = |op: &str, y: f32| json!({"op0": op, "operand0": y, "reverse0": false, "reverse1": false});
    let at = |op, x, y| one("tensor_scalar", "vector", "data", &[x], step(op, y))[0];
    assert_eq!([at("abs_max", -5.0, 3.0), at("abs_max", 1.0, -1.0)], [-5.0, -1.0]);
    assert_eq!([at("abs_min", 5.0, -3.0), at("abs_min", 1.0, -1.0)], [-3.0, -1.0]);
}

#[test]
fn casts_to_integers_round_to_even_and_saturate() {
    let mut d = Device::new("trn2");
    let data = d.input("float32", &[1, 5]);
    let dst = d.tensor("sbuf", "uint8", &[1, 5]);
    d.on("tensor_copy", "vector", &[("dst", dst)], &[("src", data)], json!({}));
    d.output(dst);
    let got = d.run(&[&f32_bytes(&[2.5, 3.5, -2.5, 300.0, -7.0])], &Options::default()).unwrap();
    assert_eq!(got, [[2, 4, 0, 255, 0]]);
}

#[test]
fn iota_is_offset_plus_partition_plus_steps() {
    let mut d = Device::new("trn3");
    let dst = d.tensor("sbuf", "int32", &[3, 4]);
    let attrs = json!({"pattern": [[1, 4]], "offset": 10, "channel_multiplier": 100});
    d.on("iota", "gpsimd", &[("dst", dst)], &[], attrs);
    d.output(dst);
    let got = d.run(&[], &Options::default()).unwrap();
    let want: Vec<u8> = [210i32, 211, 212, 213].iter().flat_map(|v| v.to_le_bytes()).collect();
    assert_eq!(got[0][32..], want);
}

#[test]
fn affine_select_keeps_the_causal_triangle() {
    let mut d = Device::new("trn3");
    let x = d.input("float32", &[2, 4]);
    let dst = d.tensor("sbuf", "float32", &[2, 4]);
    let attrs = json!({"pattern": [[-1, 4]], "offset": 0, "channel_multiplier": 1, "cmp_op": "greater_equal", "on_false_value": -9.0});
    d.on("affine_select", "gpsimd", &[("dst", dst)], &[("on_true_tile", x)], attrs);
    d.output(dst);
    let got = d.run(&[&f32_bytes(&[1., 2., 3., 4., 5., 6., 7., 8.])], &Options::default()).unwrap();
    assert_eq!(f32_values(&got[0]), [1., -9., -9., -9., 5., 6., -9., -9.]);
}

#[test]
fn exp_is_exact_at_its_limits_and_functions_refuse_what_the_device_cannot() {
    let op = |f: &str| json!({"op": f, "reduce_cmd": "idle", "scale": 1.0});
    assert_eq!(one("activation", "scalar", "data", &[f32::NEG_INFINITY, 0.0], op("exp")), [0.0, 1.0]);
    let mut d = Device::new("trn2");
    let data = d.input("float32", &[1, 1]);
    d.on("activation", "scalar", &[("dst", data)], &[("data", data)], op("rsqrt"));
    d.output(data);
    assert_eq!(d.run(&[&f32_bytes(&[0.0])], &Options::default()).unwrap_err().rule, Rule::Value);
}

/// A matmul of ones with `double_row`.
#[test]
fn double_row_of_ones_is_256() {
    let mut d = Device::new("trn2");
    let s = d.input("float8_e4m3", &[128, 2, 4]);
    let v = d.input("float8_e4m3", &[128, 2, 6]);
    let acc = d.tensor("psum", "float32", &[4, 6]);
    let attrs = json!({"accumulate": false, "perf_mode": "double_row"});
    d.on("nc_matmul", "tensor", &[("dst", acc)], &[("stationary", s), ("moving", v)], attrs);
    let out = d.tensor("sbuf", "float32", &[4, 6]);
    d.on("tensor_copy", "vector", &[("dst", out)], &[("src", acc)], json!({}));
    d.output(out);
    let got = d.run(&[&[0x38; 1024], &[0x38; 1536]], &Options::default()).unwrap();
    assert_eq!(f32_values(&got[0]), [256.0; 24]);
}

/// `nc_matmul_mx` of dense scales `[P/8, columns]` and codes one to a byte.
struct Mx {
    partitions: usize,
    columns: usize,
    dtype: &'static str,
    codes: Vec<u8>,
    scales: Vec<u8>,
}

impl Mx {
    /// Packed words, as they cross the kernel boundary.
    fn words(&self) -> Vec<u8> {
        if self.dtype != "float4_e2m1fn_x4" {
            return self.codes.clone();
        }
        self.codes.chunks_exact(2).map(|c| c[0] | c[1] << 4).collect()
    }

    /// The scale tile: four rows to a quadrant, the others bytes that must not matter.
    fn tile(&self) -> Vec<u8> {
        let mut tile = vec![255; self.partitions * self.columns];
        for (group, row) in self.scales.chunks_exact(self.columns).enumerate() {
            let at = (32 * (group / 4) + group % 4) * self.columns;
            tile[at..at + self.columns].copy_from_slice(row);
        }
        tile
    }

    /// The same with every sign cleared.
    fn magnitudes(&self) -> Mx {
        let sign = if self.dtype == "float4_e2m1fn_x4" { 0x8 } else { 0x80 };
        Mx { codes: self.codes.iter().map(|c| c & !sign).collect(), scales: self.scales.clone(), ..*self }
    }
}

fn matmul_mx(s: &Mx, v: &Mx) -> Vec<f32> {
    let mut d = Device::new("trn3");
    let (p, m, n) = (s.partitions, s.columns, v.columns);
    let (sd, ss) = (d.input(s.dtype, &[p, m]), d.input("uint8", &[p, m]));
    let (vd, vs) = (d.input(v.dtype, &[p, n]), d.input("float8_e8m0fnu", &[p, n]));
    let acc = d.tensor("psum", "float32", &[m, n]);
    let reads = [("stationary", sd), ("moving", vd), ("stationary_scale", ss), ("moving_scale", vs)];
    d.on("nc_matmul_mx", "tensor", &[("dst", acc)], &reads, json!({"accumulate": false}));
    let out = d.tensor("sbuf", "float32", &[m, n]);
    d.on("tensor_copy", "vector", &[("dst", out)], &[("src", acc)], json!({}));
    d.output(out);
    let inputs = [s.words(), s.tile(), v.words(), v.tile()];
    let inputs: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
    f32_values(&d.run(&inputs, &Options::default()).unwrap()[0])
}

#[test]
fn mx_of_ones_is_512_and_a_doubled_group_adds_32() {
    let ones = |columns| Mx {
        partitions: 128,
        columns,
        dtype: "float8_e4m3fn_x4",
        codes: vec![0x38; 128 * columns * 4],
        scales: vec![127; 16 * columns],
    };
    let (mut s, v) = (ones(2), ones(3));
    assert_eq!(matmul_mx(&s, &v), [512.0; 6]);
    s.scales[5 * 2..6 * 2].fill(128); // group 5 lives at partition 33
    assert_eq!(matmul_mx(&s, &v), [544.0; 6]);
}

#[test]
fn golden_matmul_mx() {
    let golden = Golden::open("blocks_trn");
    for case in golden.cases() {
        let name = text(case, "matmul");
        let (k, m, n) = (uint(case, "K"), uint(case, "M"), uint(case, "N"));
        let (first, second) = name.split('.').nth(1).and_then(|f| f.split_once('_')).expect("element names");
        let side = |element: &str, what: &str, columns: usize| Mx {
            partitions: k / 4,
            columns,
            dtype: match element {
                "e4m3" => "float8_e4m3fn_x4",
                "e5m2" => "float8_e5m2_x4",
                "e2m1" => "float4_e2m1fn_x4",
                other => panic!("element {other}"),
            },
            codes: golden.u8(&format!("{name}.{what}")),
            scales: golden.u8(&format!("{name}.{what}_scale")),
        };
        let (s, v) = (side(first, "stationary", m), side(second, "moving", n));
        let want = golden.f64(&format!("{name}.out"));
        let (got, size) = (matmul_mx(&s, &v), matmul_mx(&s.magnitudes(), &v.magnitudes()));
        assert_eq!(got.len(), want.len(), "{name}");
        for (i, ((g, w), size)) in got.iter().zip(&want).zip(&size).enumerate() {
            // One rounding to f32, and two f64 sums of k exact products in unknown orders.
            let bound = w.abs() * 2f64.powi(-24) + 2.0 * k as f64 * 2f64.powi(-53) * f64::from(*size) * 1.01;
            assert!((f64::from(*g) - w).abs() <= bound, "{name}[{i}]: {g}, golden {w}");
        }
    }
}

#[test]
fn golden_quantize_mx() {
    let golden = Golden::open("blocks_trn");
    let sources: Vec<String> = golden.names().iter().filter_map(|n| n.strip_suffix(".x").map(String::from)).collect();
    let mut compared = 0;
    for source in &sources {
        let shape = golden.shape(&format!("{source}.x"));
        let (p, f) = (shape[0], shape[1] / 4);
        let x = golden.bytes(&format!("{source}.x"));
        for (element, dtype) in [("e4m3", "float8_e4m3fn_x4"), ("e5m2", "float8_e5m2_x4")] {
            for (version, options) in [("v1", OCP), ("v2", Options::default())] {
                let name = format!("{source}.{element}.{version}");
                if !golden.has(&format!("{name}.codes")) {
                    continue;
                }
                let mut d = Device::new("trn3");
                let src = d.input("bfloat16", &[p, 4 * f]);
                let (dst, scale) = (d.tensor("sbuf", dtype, &[p, f]), d.tensor("sbuf", "uint8", &[p, f]));
                d.on("memset", "vector", &[("dst", scale)], &[], json!({"value": 0}));
                d.on("quantize_mx", "vector", &[("dst", dst), ("dst_scale", scale)], &[("src", src)], json!({}));
                d.output(dst);
                d.output(scale);
                let got = d.run(&[&x], &options).unwrap();
                let (codes, scales) = (golden.u8(&format!("{name}.codes")), golden.u8(&format!("{name}.scale_hw")));
                let valid = golden.u8(&format!("{name}.valid"));
                for group in 0..p / 8 {
                    for column in (0..f).filter(|c| valid[group * f + c] != 0) {
                        let row = 32 * (group / 4) + group % 4;
                        assert_eq!(
                            got[1][row * f + column],
                            scales[row * f + column],
                            "{name}: scale of group {group}, {column}"
                        );
                        for at in (0..8).map(|i| ((8 * group + i) * f + column) * 4) {
                            assert_eq!(got[0][at..at + 4], codes[at..at + 4], "{name}: codes at {at}");
                        }
                        compared += 1;
                    }
                }
                let dead = |at: usize| at / f % 32 > 3;
                assert!(
                    (0..p * f).filter(|&at| dead(at)).all(|at| got[1][at] == 0),
                    "{name}: a dead scale row was written"
                );
            }
        }
    }
    assert!(compared > 0, "no group was compared");
}

#[test]
fn quantize_mx_of_known_groups() {
    let run = |x: f32, options: &Options| {
        let mut d = Device::new("trn3");
        let src = d.input("bfloat16", &[32, 4]);
        let (dst, scale) = (d.tensor("sbuf", "float8_e4m3fn_x4", &[32, 1]), d.tensor("sbuf", "uint8", &[4, 1]));
        d.on("quantize_mx", "vector", &[("dst", dst), ("dst_scale", scale)], &[("src", src)], json!({}));
        d.output(dst);
        d.output(scale);
        let mut values = vec![0.25 * x; 128];
        values[0] = x;
        let got = d.run(&[&bf16_bytes(&values)], options).unwrap();
        (got[0][0], got[1][0])
    };
    assert_eq!(run(1.0, &Options::default()), (0x70, 120));
    assert_eq!(run(1.0, &OCP), (0x78, 119));
    assert_eq!(run(0.0, &Options::default()), (0, 0));
    assert_eq!(run(1.9375, &Options::default()), (0x78, 120)); // 248 ties to 256
    assert_eq!(run(1.9375, &OCP), (0x7E, 119)); // 496 is clipped to 448
}

/// One fp32 row through an instruction of GpSimd or VectorE that writes one row of another shape.
fn row(name: &str, engine: &str, role: &str, x: &[f32], dst: (&str, usize), attrs: serde_json::Value) -> Vec<u8> {
    let mut d = Device::new("trn2");
    let data = d.input("float32", &[1, x.len()]);
    let out = d.tensor("sbuf", dst.0, &[1, dst.1]);
    d.on(name, engine, &[("dst", out)], &[(role, data)], attrs);
    d.output(out);
    d.run(&[&f32_bytes(x)], &Options::default()).unwrap()[0].clone()
}

#[test]
fn nonzero_with_count_is_the_documents_example() {
    let x = [0., 1., 1., 0., 0., 1., 0., 0.];
    let attrs = json!({"index_offset": 16, "padding_val": -1});
    let got = row("nonzero_with_count", "gpsimd", "src", &x, ("int32", 9), attrs);
    let want: Vec<u8> = [17i32, 18, 21, -1, -1, -1, -1, -1, 3].iter().flat_map(|v| v.to_le_bytes()).collect();
    assert_eq!(got, want);
}

#[test]
fn statistics_are_of_even_and_odd_elements_and_sequences_end_where_ids_change() {
    let got = f32_values(&row("bn_stats", "vector", "data", &[1., 10., 3., 20., 5.], ("float32", 6), json!({})));
    assert_eq!(got, [3., 3., 8., 2., 15., 50.]);
    let ids = [7., 7., 0., 2.];
    let got = f32_values(&row("sequence_bounds", "gpsimd", "segment_ids", &ids, ("float32", 8), json!({})));
    assert_eq!(got, [0., 0., 4., 3., 2., 2., -1., 4.]);
}

/// What the documents call undefined is refused: a value that is not there, two equal values to replace.
#[test]
fn searches_refuse_what_has_no_documented_result() {
    let run = |wanted: [f32; 8], replace: bool| {
        let mut d = Device::new("trn2");
        let (data, vals) = (d.input("float32", &[1, 9]), d.input("float32", &[1, 8]));
        let reads = [("data", data), ("vals", vals)];
        if replace {
            let dst = d.tensor("sbuf", "float32", &[1, 9]);
            d.on("nc_match_replace8", "vector", &[("dst", dst)], &reads, json!({"imm": -1.0}));
            d.output(dst);
        } else {
            let dst = d.tensor("sbuf", "uint16", &[1, 8]);
            d.on("nc_find_index8", "vector", &[("dst", dst)], &reads, json!({}));
            d.output(dst);
        }
        let x = [9., 1., 2., 3., 4., 5., 6., 7., 2.];
        d.run(&[&f32_bytes(&x), &f32_bytes(&wanted)], &Options::default())
    };
    let known = [1., 2., 3., 4., 5., 6., 7., 9.];
    let places: Vec<u8> = [1u16, 2, 3, 4, 5, 6, 7, 0].iter().flat_map(|v| v.to_le_bytes()).collect();
    assert_eq!(run(known, false).unwrap()[0], places, "the first 2, not the second");
    assert_eq!(f32_values(&run(known, true).unwrap()[0]), [-1., -1., -1., -1., -1., -1., -1., -1., 2.]);
    let with = |i: usize, v: f32| std::array::from_fn(|j| if i == j { v } else { known[j] });
    assert_eq!(run(with(3, 8.0), false).unwrap_err().rule, Rule::Value);
    assert_eq!(run(with(0, 2.0), true).unwrap_err().rule, Rule::Value);
}
