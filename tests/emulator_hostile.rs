//! Programs that are wrong or hostile: each rule refuses what it must, and no bytes make the emulator panic.

#[path = "support/device.rs"]
mod device;
#[path = "support/programs.rs"]
mod programs;

use device::{Device, f32_bytes};
use serde_json::{Value, json};
use trn_kernels::Error;
use trn_kernels::quant::ScaleRule;
use trn_kernels::trainium::cost;
use trn_kernels::trainium::emulator::{Fault, Limits, Options, Program, Rule};

/// The fault of a program, loaded or run on inputs of zeros.
fn fault(d: &Device) -> Fault {
    let program = match d.load() {
        Ok(program) => program,
        Err(fault) => return fault,
    };
    let inputs: Vec<Vec<u8>> = program.inputs().iter().map(|p| vec![0; program.tensors()[p.tensor].bytes()]).collect();
    let inputs: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
    program.run(&inputs, &Options::default()).expect_err("the program must be refused")
}

/// A copy of one SBUF tile `[4, 8]` to another, with the operands given.
fn copy_program(dst: Value, src: Value) -> Device {
    let mut d = Device::new("trn2");
    d.input("float32", &[4, 8]); // tensors 0 (hbm) and 1 (sbuf)
    let tile = d.tensor("sbuf", "float32", &[4, 8]); // 2
    d.op("tensor_copy", "vector", &[("dst", dst)], &[("src", src)], json!({}));
    d.output(tile);
    d
}

fn whole(tensor: usize) -> Value {
    json!([tensor, "float32", 0, [[8, 4], [1, 8]]])
}

#[test]
fn the_copy_that_the_others_break_is_fine() {
    assert!(copy_program(whole(2), whole(1)).run(&[&[0; 128]], &Options::default()).is_ok());
}

#[test]
fn every_access_stays_in_its_tensor() {
    for (what, src) in [
        ("a row too far", json!([1, "float32", 8, [[8, 4], [1, 8]]])),
        ("an element too far in a row", json!([1, "float32", 1, [[8, 4], [1, 8]]])),
        ("a stride out of the row", json!([1, "float32", 0, [[8, 4], [2, 8]]])),
        ("a partition stride that is not a row", json!([1, "float32", 0, [[4, 4], [1, 8]]])),
        ("an offset beyond all", json!([1, "float32", u64::MAX, [[8, 4], [1, 8]]])),
        ("strides that overflow", json!([1, "float32", 0, [[8, 4], [u64::MAX, 8]]])),
    ] {
        assert_eq!(fault(&copy_program(whole(2), src)).rule, Rule::Bounds, "{what}");
    }
    for (what, src, rule) in [
        ("no such tensor", json!([9, "float32", 0, [[8, 4], [1, 8]]]), Rule::Reference),
        ("no elements", json!([1, "float32", 0, [[8, 0], [1, 8]]]), Rule::Limit),
        ("counts that overflow", json!([1, "float32", 0, [[0, u64::MAX], [0, u64::MAX]]]), Rule::Limit),
        ("one axis on chip", json!([1, "float32", 0, [[1, 8]]]), Rule::Malformed),
        ("no such type", json!([1, "float7", 0, [[8, 4], [1, 8]]]), Rule::Malformed),
        ("fewer elements than dst", json!([1, "float32", 0, [[8, 4], [1, 4]]]), Rule::Operand),
        ("an operand that is no list", json!({"tensor": 1}), Rule::Malformed),
    ] {
        assert_eq!(fault(&copy_program(whole(2), src)).rule, rule, "{what}");
    }
}

#[test]
fn an_element_is_written_once() {
    assert_eq!(fault(&copy_program(json!([2, "float32", 0, [[8, 4], [0, 8]]]), whole(1))).rule, Rule::Bounds);
}

#[test]
fn undefined_bytes_travel_through_copies_and_stop_arithmetic_and_output() {
    let mut d = Device::new("trn2");
    let (a, b) = (d.tensor("sbuf", "float32", &[4, 8]), d.tensor("sbuf", "float32", &[4, 8]));
    d.on("tensor_copy", "vector", &[("dst", b)], &[("src", a)], json!({}));
    assert!(d.run(&[], &Options::default()).is_ok(), "a copy of undefined bytes is no fault");
    d.on("reciprocal", "vector", &[("dst", b)], &[("data", b)], json!({}));
    assert_eq!(fault(&d).rule, Rule::Uninitialised);

    let mut d = Device::new("trn2");
    let a = d.tensor("sbuf", "float32", &[4, 8]);
    d.output(a);
    let stopped = fault(&d);
    assert_eq!((stopped.rule, stopped.at), (Rule::Uninitialised, None));
}

/// Two tensors placed on the same bytes.
#[test]
fn a_tensor_placed_over_another_clobbers_it() {
    let program = |second_byte: usize| {
        let mut d = Device::new("trn2");
        let (a, b) = (d.tensor("sbuf", "float32", &[4, 8]), d.tensor("sbuf", "float32", &[4, 8]));
        d.on("memset", "vector", &[("dst", a)], &[], json!({"value": 1.0}));
        d.on("memset", "vector", &[("dst", b)], &[], json!({"value": 2.0}));
        d.output(a);
        let mut raw: Value = serde_json::from_slice(&d.json()).unwrap();
        raw["tensors"][a]["address"] = json!([0, 64]);
        raw["tensors"][b]["address"] = json!([0, second_byte]);
        let program = Program::from_json(raw.to_string().as_bytes(), &Limits::default()).unwrap();
        program.run(&[], &Options::default())
    };
    assert_eq!(program(96).unwrap()[0], f32_bytes(&[1.0; 32]));
    assert_eq!(program(92).unwrap_err().rule, Rule::Uninitialised);
}

/// A matmul into PSUM after `before`.
fn accumulating(target: &'static str, before: impl Fn(&mut Device, usize), accumulate: Value) -> Device {
    let mut d = Device::new(target);
    let (s, v) = (d.input("bfloat16", &[32, 4]), d.input("bfloat16", &[32, 8]));
    let acc = d.tensor("psum", "float32", &[4, 8]);
    before(&mut d, acc);
    let attrs = if accumulate.is_null() { json!({}) } else { json!({"accumulate": accumulate}) };
    d.on("nc_matmul", "tensor", &[("dst", acc)], &[("stationary", s), ("moving", v)], attrs);
    d
}

#[test]
fn matmuls_accumulate_onto_matmuls_only() {
    let run = |d: &Device| d.run(&[&[0; 256], &[0; 512]], &Options::default());
    let nothing = |_: &mut Device, _| {};
    let matmul = |d: &mut Device, acc| {
        d.on("nc_matmul", "tensor", &[("dst", acc)], &[("stationary", 1), ("moving", 3)], json!({"accumulate": false}))
    };
    let memset = |d: &mut Device, acc| d.on("memset", "vector", &[("dst", acc)], &[], json!({"value": 0.0}));
    let evicted = |d: &mut Device, acc| {
        matmul(d, acc);
        let copy = d.tensor("sbuf", "float32", &[4, 8]);
        d.on("tensor_copy", "vector", &[("dst", copy)], &[("src", acc)], json!({}));
    };
    assert!(run(&accumulating("trn2", nothing, json!(false))).is_ok());
    assert!(run(&accumulating("trn2", matmul, json!(true))).is_ok());
    assert!(run(&accumulating("trn2", nothing, json!(null))).is_ok());
    for d in [
        accumulating("trn2", nothing, json!(true)),
        accumulating("trn2", memset, json!(true)),
        accumulating("trn2", memset, json!(null)),
        accumulating("trn2", evicted, json!(null)),
        accumulating("trn3", nothing, json!(true)),
    ] {
        assert_eq!(fault(&d).rule, Rule::Accumulate);
    }
}

#[test]
fn instructions_refuse_operands_that_the_device_does_not_take() {
    let refused = |d: Device, what: &str| {
        let got = fault(&d);
        assert_eq!(got.rule, Rule::Operand, "{what}: {got}");
        assert!(got.at.is_some(), "{what}");
    };
    let mut d = Device::new("trn2");
    let (s, v) = (d.input("float8_e4m3fn", &[32, 4]), d.input("float8_e4m3fn", &[32, 8]));
    let acc = d.tensor("psum", "float32", &[4, 8]);
    d.on("nc_matmul", "tensor", &[("dst", acc)], &[("stationary", s), ("moving", v)], json!({"accumulate": false}));
    refused(d, "e4m3fn before trn3");

    let mut d = Device::new("trn3");
    let (s, v) = (d.input("float8_e4m3fn", &[32, 4]), d.input("float8_e4m3", &[32, 8]));
    let acc = d.tensor("psum", "float32", &[4, 8]);
    d.on("nc_matmul", "tensor", &[("dst", acc)], &[("stationary", s), ("moving", v)], json!({"accumulate": false}));
    refused(d, "e4m3fn with e4m3");

    let mut d = Device::new("trn2");
    let (s, v) = (d.input("bfloat16", &[32, 4]), d.input("bfloat16", &[32, 520]));
    let acc = d.tensor("psum", "float32", &[4, 520]);
    d.on("nc_matmul", "tensor", &[("dst", acc)], &[("stationary", s), ("moving", v)], json!({"accumulate": false}));
    refused(d, "a result wider than a bank before trn3");

    let mut d = Device::new("trn2");
    let tile = d.tensor("psum", "float32", &[4, 8]);
    d.output(tile);
    refused(d, "DMA from psum");

    let mut d = Device::new("trn2");
    let tile = d.tensor("psum", "float32", &[4, 8]);
    d.on("memset", "gpsimd", &[("dst", tile)], &[], json!({"value": 0.0}));
    refused(d, "gpsimd in psum");

    let mut d = Device::new("trn2");
    let tile = d.tensor("sbuf", "float32", &[128, 8]);
    let part = json!([tile, "float32", 16 * 8, [[8, 40], [1, 8]]]);
    d.op("memset", "vector", &[("dst", part)], &[], json!({"value": 0.0}));
    refused(d, "40 partitions from 16");

    let mut d = Device::new("trn2");
    let x = d.input("bfloat16", &[32, 8]);
    let (codes, scale) = (d.tensor("sbuf", "float8_e5m2_x4", &[32, 2]), d.tensor("sbuf", "uint8", &[32, 2]));
    d.on("quantize_mx", "vector", &[("dst", codes), ("dst_scale", scale)], &[("src", x)], json!({}));
    refused(d, "quantize_mx before trn3");

    let mut d = Device::new("trn3");
    let x = d.input("bfloat16", &[64, 8]);
    let (codes, scale) = (d.tensor("sbuf", "float8_e5m2_x4", &[64, 2]), d.tensor("sbuf", "uint8", &[64, 2]));
    let (x, codes) = (d.whole(x), d.whole(codes));
    let shifted = json!([scale, "uint8", 2 * 2, [[2, 62], [1, 2]]]);
    d.op("quantize_mx", "vector", &[("dst", codes), ("dst_scale", shifted)], &[("src", x)], json!({}));
    refused(d, "scales from row 2 of a quadrant");
}

#[test]
fn values_without_a_defined_result_stop_the_run() {
    let mut d = Device::new("trn2");
    let x = d.input("float32", &[1, 1]);
    let narrow = d.tensor("sbuf", "float8_e4m3", &[1, 1]);
    d.on("tensor_copy", "vector", &[("dst", narrow)], &[("src", x)], json!({}));
    d.output(narrow);
    let run = |x: f32| d.run(&[&f32_bytes(&[x])], &Options::default());
    assert_eq!(run(240.0).unwrap(), [[0x77]]);
    assert_eq!(run(250.0).unwrap_err().rule, Rule::Value);
}

/// The largest product of two uint32 does not fit the i64 that the emulator works in.
#[test]
fn a_product_of_integers_beyond_the_type_stops_the_run() {
    let mut d = Device::new("trn3");
    let (a, b) = (d.input("uint32", &[1, 1]), d.input("uint32", &[1, 1]));
    let product = d.tensor("sbuf", "uint32", &[1, 1]);
    d.on("tensor_tensor", "gpsimd", &[("dst", product)], &[("data1", a), ("data2", b)], json!({"op": "multiply"}));
    d.output(product);
    let run = |a: u32, b: u32| d.run(&[&a.to_le_bytes(), &b.to_le_bytes()], &Options::default());
    assert_eq!(run(65535, 65537).unwrap(), [u32::MAX.to_le_bytes()]);
    for (a, b) in [(65536, 65536), (u32::MAX, u32::MAX), (1 << 31, u32::MAX)] {
        assert_eq!(run(a, b).unwrap_err().rule, Rule::Value, "{a} x {b}");
    }
}

#[test]
fn reductions_start_before_they_go_on() {
    let program = |command: &str| {
        let mut d = Device::new("trn2");
        let x = d.input("float32", &[4, 8]);
        let result = d.tensor("sbuf", "float32", &[4, 1]);
        let attrs = json!({"op0": "abs", "reduce_op": "maximum", "reduce_cmd": command, "reduce_res_negate": false});
        d.on("tensor_scalar_reduce", "vector", &[("dst", x), ("reduce_res", result)], &[("data", x)], attrs);
        d.output(result);
        d
    };
    assert!(program("reset_reduce").run(&[&[0; 128]], &Options::default()).is_ok());
    assert_eq!(fault(&program("reduce")).rule, Rule::Reduction);
    assert_eq!(fault(&program("load_reduce")).rule, Rule::Malformed);
}

#[test]
fn gathers_refuse_or_skip_indices_out_of_range() {
    let program = |mode: &str| {
        let mut d = Device::new("trn2");
        let table = d.tensor("private_hbm", "float32", &[8, 2]);
        let index = d.input("int32", &[4, 1]);
        let tile = d.tensor("sbuf", "float32", &[4, 2]);
        d.on("memset", "vector", &[("dst", tile)], &[], json!({"value": 7.0}));
        let rows = json!([table, "float32", 0, [[2, 4], [1, 2]],
            {"kind": "vector", "scale": 2, "extent": 8, "index": [index, "int32", 0, [[1, 4], [1, 1]]]}]);
        let (dst, filled) = (d.whole(tile), d.tensor("sbuf", "float32", &[8, 2]));
        d.on("memset", "vector", &[("dst", filled)], &[], json!({"value": 1.0}));
        d.copy(table, filled);
        d.op("dma_copy", "dma", &[("dst", dst)], &[("src", rows)], json!({"oob_mode": mode}));
        d.output(tile);
        d
    };
    let index: Vec<u8> = [0i32, 7, 8, -1].iter().flat_map(|v| v.to_le_bytes()).collect();
    assert_eq!(program("error").run(&[&index], &Options::default()).unwrap_err().rule, Rule::Bounds);
    let got = program("skip").run(&[&index], &Options::default()).unwrap();
    assert_eq!(got[0], f32_bytes(&[1., 1., 1., 1., 7., 7., 7., 7.]));
}

#[test]
fn registers_are_set_before_they_are_used() {
    let program = |set: bool| {
        let mut d = Device::new("trn2");
        let tile = d.tensor("sbuf", "int32", &[1, 1]);
        let attrs = if set { json!({"dst": {"register": 0}, "value": 41}) } else { json!({"dst": {"register": 0}}) };
        d.on("register_alloc", "sync", &[], &[], attrs);
        d.on("register_store", "sync", &[("dst", tile)], &[], json!({"src": {"register": 0}}));
        d.output(tile);
        d
    };
    assert_eq!(program(true).run(&[], &Options::default()).unwrap(), [[41, 0, 0, 0]]);
    assert_eq!(fault(&program(false)).rule, Rule::Uninitialised);
}

#[test]
fn memory_and_work_are_bounded_before_they_are_spent() {
    let tight = |bytes, work| Limits { tensor_bytes: bytes, work, ..Limits::default() };
    let json = copy_program(whole(2), whole(1)).json();
    assert!(Program::from_json(&json, &tight(4 * 128, 192)).is_ok());
    assert_eq!(Program::from_json(&json, &tight(4 * 128 - 1, 192)).unwrap_err().rule, Rule::Limit);
    assert_eq!(Program::from_json(&json, &tight(4 * 128, 191)).unwrap_err().rule, Rule::Limit);
    assert_eq!(
        Program::from_json(&json, &Limits { json_bytes: 10, ..Limits::default() }).unwrap_err().rule,
        Rule::Limit
    );
    for shape in [json!([u64::MAX, 2]), json!([0, 2]), json!([]), json!([1u64 << 40])] {
        let mut raw: Value = serde_json::from_slice(&json).unwrap();
        raw["tensors"][0]["shape"] = shape;
        let got = Program::from_json(raw.to_string().as_bytes(), &Limits::default());
        assert_eq!(got.unwrap_err().rule, Rule::Limit);
    }
    let mut d = Device::new("trn2");
    for _ in 0..2 {
        let half = d.tensor("psum", "float32", &[128, 2049]);
        d.on("memset", "vector", &[("dst", half)], &[], json!({"value": 0.0}));
    }
    assert!(d.load().is_ok(), "one after the other they fit");
    d.on("tensor_copy", "vector", &[("dst", 0)], &[("src", 1)], json!({}));
    assert_eq!(fault(&d).rule, Rule::Limit);
}

#[test]
fn inputs_and_options_are_checked() {
    let program = copy_program(whole(2), whole(1)).load().unwrap();
    assert_eq!(program.run(&[], &Options::default()).unwrap_err().rule, Rule::Operand);
    assert_eq!(program.run(&[&[0; 127]], &Options::default()).unwrap_err().rule, Rule::Operand);
    let refused = program.run(&[&[0; 128]], &Options { scale_rule: ScaleRule::Even }).unwrap_err();
    assert_eq!(refused.rule, Rule::Operand);
    assert!(matches!(Error::from(refused), Error::Program { problem } if problem.contains("Even")));
}

#[test]
fn superfluous_or_missing_arguments_are_refused() {
    let with = |reads: &[(&str, usize)], attrs: Value| {
        let mut d = Device::new("trn2");
        let x = d.input("float32", &[4, 8]);
        assert_eq!(x, 1);
        d.on("tensor_scalar", "vector", &[("dst", x)], reads, attrs);
        fault(&d).rule
    };
    let good = json!({"op0": "add", "operand0": 1.0, "reverse0": false, "reverse1": false});
    assert_eq!(with(&[], good.clone()), Rule::Malformed);
    assert_eq!(with(&[("data", 1), ("extra", 1)], good.clone()), Rule::Malformed);
    for (name, value) in
        [("op0", json!("divide")), ("operand0", json!("x")), ("reverse0", json!(3)), ("surprise", json!(1))]
    {
        let mut attrs = good.clone();
        attrs[name] = value;
        assert_eq!(with(&[("data", 1)], attrs), Rule::Malformed, "{name}");
    }
}

/// Small enough that a hostile count cannot make a test slow.
const TIGHT: Limits = Limits { json_bytes: 1 << 20, tensor_bytes: 8 << 20, work: 1 << 24 };

/// Loads and, if it loads, runs and is costed. Whatever happens, it must not panic.
fn survive(json: &[u8], inputs: &[Vec<u8>]) -> bool {
    let Ok(program) = Program::from_json(json, &TIGHT) else { return false };
    let cost = cost::estimate(&program, &program.target().chip());
    assert_eq!(cost.spans.len(), program.instructions().len());
    let inputs: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
    let _ = program.run(&inputs, &Options::default());
    true
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }
}

#[test]
fn flipped_bytes_never_panic() {
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let mut loaded = 0;
    for checked in programs::all() {
        let inputs = checked.inputs();
        for _ in 0..40 {
            let mut json = checked.json.clone();
            for _ in 0..=random.below(3) {
                let at = random.below(json.len());
                // Digits to digits, so that many a flip still parses; now and then anything.
                json[at] = if json[at].is_ascii_digit() {
                    b'0' + random.below(10) as u8
                } else {
                    json[at] ^ 1 << random.below(8)
                };
                if random.below(8) > 0 && !checked.json[at].is_ascii_digit() {
                    json[at] = checked.json[at];
                }
            }
            loaded += usize::from(survive(&json, &inputs));
        }
    }
    assert!(loaded > 0, "no flip reached execution");
}

/// Pointers to every number in a JSON value.
fn numbers(value: &Value, path: &str, out: &mut Vec<String>) {
    match value {
        Value::Number(_) => out.push(path.into()),
        Value::Array(items) => items.iter().enumerate().for_each(|(i, v)| numbers(v, &format!("{path}/{i}"), out)),
        Value::Object(map) => map
            .iter()
            .for_each(|(k, v)| numbers(v, &format!("{path}/{}", k.replace('~', "~0").replace('/', "~1")), out)),
        _ => {}
    }
}

#[test]
fn hostile_numbers_never_panic() {
    let hostile = [
        json!(0),
        json!(-1),
        json!(1),
        json!(u64::MAX),
        json!(i64::MAX),
        json!(1u64 << 32),
        json!(1e300),
        json!(16384),
    ];
    let mut random = Random(7);
    for checked in programs::all() {
        let raw: Value = serde_json::from_slice(&checked.json).unwrap();
        let inputs = checked.inputs();
        let mut places = vec![];
        numbers(&raw, "", &mut places);
        for _ in 0..40 {
            let mut changed = raw.clone();
            for _ in 0..=random.below(2) {
                let place = &places[random.below(places.len())];
                *changed.pointer_mut(place).unwrap() = hostile[random.below(hostile.len())].clone();
            }
            survive(changed.to_string().as_bytes(), &inputs);
        }
    }
}

#[test]
fn truncated_programs_never_panic() {
    for checked in programs::all() {
        for n in (0..checked.json.len()).step_by(checked.json.len() / 40 + 1) {
            assert!(!survive(&checked.json[..n], &[]), "{} bytes of {} load", n, checked.name);
        }
    }
}

#[test]
fn deep_nesting_is_refused() {
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(!survive(deep.as_bytes(), &[]));
    let mut operand = json!([0, "int32", 0, [[1, 1], [1, 1]]]);
    for _ in 0..20 {
        operand =
            json!([0, "int32", 0, [[1, 1], [1, 1]], {"kind": "scalar", "scale": 1, "extent": 1, "index": operand}]);
    }
    assert_eq!(fault(&copy_program(operand, whole(1))).rule, Rule::Malformed);
}
