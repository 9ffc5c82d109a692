//! Three implementations meet in data: device programs on the emulator, this crate's CPU kernels, and its f64 oracles.
//!
//! The matmul programs run on weights that Rust quantizes and lays out (`trainium::layout`), so that the way from a checkpoint
//! to the device and back is covered; the attention programs run on their exported inputs.

#[path = "support/programs.rs"]
mod programs;
#[path = "support/random.rs"]
mod random;

use half::bf16;
use programs::{Checked, values};
use random::Rng;
use trn_kernels::attention::oracle::{self as attention_oracle, Reference};
use trn_kernels::attention::{AttentionOut, AttentionSpec, Queries, RaggedKv, plan_decode};
use trn_kernels::kv::{
    KvConfig, KvFormat, KvPlane, KvPool, KvScale, KvSequence, KvShape, PageTable, PagedKv, append_kv,
};
use trn_kernels::matmul::oracle::{self, Expected, OutputType};
use trn_kernels::matmul::{Activation, Activations, MatmulOptions};
use trn_kernels::num::Fp8;
use trn_kernels::quant::{QuantizeOptions, QuantizedMatrix, QuantizedMatrixBuf, ScaleRule, Scheme, quantize};
use trn_kernels::trainium::emulator::{Dtype, Options};
use trn_kernels::trainium::layout::{MxLayout, RowElement, RowsLayout};
use trn_kernels::{Cpu, HeadsMut, HeadsRef, MatMut, MatRef, Parallelism, Workspace};

/// A compile-time argument of the program, as a number.
fn parameter<T: std::str::FromStr>(checked: &Checked, name: &str) -> T {
    let text = checked.program.parameter(name).unwrap_or_else(|| panic!("{}: no parameter {name}", checked.name));
    text.parse().unwrap_or_else(|_| panic!("{}: {name} is {text}", checked.name))
}

fn random_matrix(rng: &mut Rng, n: usize, k: usize, scheme: Scheme) -> QuantizedMatrixBuf {
    let x = rng.wide(n * k, -3..=3);
    quantize(MatRef::new(&x, n, k).unwrap(), scheme, &QuantizeOptions::default()).unwrap()
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// The program's output on these inputs, given by name.
fn emulate(checked: &Checked, inputs: &[(&str, Vec<u8>)], rule: ScaleRule) -> Vec<f64> {
    let find = |name: &str| inputs.iter().find(|(n, _)| *n == name).map(|(_, bytes)| bytes.as_slice());
    let ports = checked.program.inputs().iter();
    let ordered: Vec<&[u8]> =
        ports.map(|p| find(&p.name).unwrap_or_else(|| panic!("{}: no {}", checked.name, p.name))).collect();
    let options = Options { scale_rule: rule };
    let out = checked.program.run(&ordered, &options).unwrap_or_else(|e| panic!("{}: {e}", checked.name));
    values(checked.dtype(&checked.program.outputs()[0]), &out[0])
}

/// What the CPU kernel gives, rounded to the program's output type.
fn on_cpu(x: Activations<'_>, w: &QuantizedMatrix<'_>, options: &MatmulOptions<'_>, output: OutputType) -> Vec<f64> {
    let cpu = Cpu::detect();
    let packed = cpu.pack(w).unwrap();
    let (m, n, ws) = (x.m(), w.n(), &mut Workspace::new());
    if output == OutputType::Bf16 {
        let mut y = vec![bf16::ZERO; m * n];
        cpu.matmul(x, &packed, MatMut::new(&mut y, m, n).unwrap(), options, ws).unwrap();
        return y.into_iter().map(|v| v.to_f64()).collect();
    }
    let mut y = vec![0f32; m * n];
    cpu.matmul(x, &packed, MatMut::new(&mut y, m, n).unwrap(), options, ws).unwrap();
    y.into_iter().map(f64::from).collect()
}

/// How many elements of `got` lie outside the oracle's bound.
///
/// The bound holds for the device too: it counts at least 20 + ceil(K / 32) roundings on every path, and the array's f32
/// sums, its scale products and its additions in PSUM are fewer (one an instruction of 128 to 512 of K, three a scale block).
fn outside(got: &[f64], expected: &[Expected]) -> usize {
    assert_eq!(got.len(), expected.len());
    got.iter().zip(expected).filter(|(g, e)| !e.admits(**g)).count()
}

/// The bias of a program that takes one: `n` values exact in bf16, and its bytes padded to the port's columns.
fn bias(checked: &Checked, rng: &mut Rng, n: usize) -> Option<(Vec<f32>, Vec<u8>)> {
    let port = checked.program.inputs().iter().find(|p| p.name == "bias")?;
    let values: Vec<bf16> = (0..n).map(|_| bf16::from_f32(rng.normal())).collect();
    let mut padded = values.clone();
    padded.resize(checked.shape(port)[1], bf16::ZERO);
    let bytes = match checked.dtype(port) {
        Dtype::Bfloat16 => padded.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Dtype::Float32 => padded.iter().flat_map(|v| v.to_f32().to_le_bytes()).collect(),
        other => panic!("bias of {}", other.name()),
    };
    Some((values.iter().map(|v| v.to_f32()).collect(), bytes))
}

fn output_type(checked: &Checked) -> OutputType {
    match checked.dtype(&checked.program.outputs()[0]) {
        Dtype::Float32 => OutputType::F32,
        Dtype::Bfloat16 => OutputType::Bf16,
        other => panic!("output of {}", other.name()),
    }
}

fn mx_scheme(element: &str) -> Scheme {
    match element {
        "e2m1" => Scheme::Mxfp4,
        "e4m3fn" => Scheme::Mxfp8(Fp8::E4M3Fn),
        "e5m2" => Scheme::Mxfp8(Fp8::E5M2),
        other => panic!("element {other}"),
    }
}

#[test]
fn matmul_mx_from_checkpoint_weights() {
    for (seed, checked) in programs::of("matmul_mx").iter().enumerate() {
        let rng = &mut Rng(seed as u64);
        let shape = checked.shape(&checked.program.outputs()[0]);
        let (m, n) = (shape[0], shape[1]);
        let packed_x = checked.shape(checked.input("x")).len() == 3;
        let x_shape = checked.shape(checked.input("x"));
        let k = if packed_x { 512 * x_shape[1] } else { x_shape[1] };
        let scheme = mx_scheme(&parameter::<String>(checked, "w_element"));
        let x_scheme = mx_scheme(&parameter::<String>(checked, "x_element"));
        let terms = parameter::<u32>(checked, "x_terms");
        let w = random_matrix(rng, n, k, scheme);
        let layout = MxLayout::of(&w.view()).unwrap();
        assert_eq!(layout.data_shape(), checked.shape(checked.input("w")), "{}", checked.name);
        assert_eq!(layout.scale_shape(), checked.shape(checked.input("w_scale")), "{}", checked.name);
        let packed = layout.pack(&w.view(), Parallelism::Serial).unwrap();
        let bias = bias(checked, rng, n);
        let options = MatmulOptions { bias: bias.as_ref().map(|b| &b.0[..]), ..MatmulOptions::default() };
        for rule in [ScaleRule::Trainium, ScaleRule::Floor] {
            let mut x: Vec<bf16> = rng.wide(m * k, -2..=2).into_iter().map(bf16::from_f32).collect();
            if terms == 2 {
                // Two terms are the value where it is not far below the group's maximum, under the documented rule.
                if rule == ScaleRule::Floor {
                    continue;
                }
                x.iter_mut().filter(|v| v.to_f32().abs() < 0.01).for_each(|v| *v = bf16::ZERO);
            }
            let quantize_options = QuantizeOptions { rule, ..QuantizeOptions::default() };
            let quantized = quantize(MatRef::new(&x, m, k).unwrap(), x_scheme, &quantize_options).unwrap();
            let mut inputs = vec![("w", packed.data().to_vec()), ("w_scale", packed.scales().to_vec())];
            if packed_x {
                let layout = MxLayout::of(&quantized.view()).unwrap();
                let p = layout.pack(&quantized.view(), Parallelism::Serial).unwrap();
                let ([rows, tiles, from], to) = (layout.data_shape(), x_shape[2]);
                let scale_rows = layout.scale_shape()[0] * layout.scale_shape()[1];
                inputs.push(("x", fit_columns(p.data(), rows * tiles, from, to, layout.element().word_bytes())));
                inputs.push(("x_scale", fit_columns(p.scales(), scale_rows, from, to, 1)));
            } else {
                inputs.push(("x", x.iter().flat_map(|v| v.to_le_bytes()).collect()));
            }
            if let Some((_, bytes)) = &bias {
                inputs.push(("bias", bytes.clone()));
            }
            let output = output_type(checked);
            let quantized = quantized.view();
            let x = match terms {
                1 => Activations::Quantized(&quantized),
                _ => Activations::Bf16(MatRef::new(&x, m, k).unwrap()),
            };
            let expected = oracle::matmul(x, &w.view(), &options, &[], output).unwrap();
            let device = emulate(checked, &inputs, rule);
            assert_eq!(outside(&device, &expected), 0, "{} {rule:?} on the emulator", checked.name);
            let cpu = on_cpu(x, &w.view(), &options, output);
            assert_eq!(outside(&cpu, &expected), 0, "{} {rule:?} on the CPU", checked.name);

            // The comparison can fail: scale rows of the first quadrant moved by one group.
            let row = packed.scales().len() / 64;
            inputs[1].1[..4 * row].rotate_left(row);
            assert!(
                outside(&emulate(checked, &inputs, rule), &expected) > 0,
                "{}: moved scales go unseen",
                checked.name
            );
        }
    }
}

/// `[rows, from]` elements of `size` bytes as `[rows, to]`, cut or filled with zeros.
fn fit_columns(data: &[u8], rows: usize, from: usize, to: usize, size: usize) -> Vec<u8> {
    let mut out = vec![0; rows * to * size];
    let width = from.min(to) * size;
    for (row, out) in data.chunks_exact(from * size).zip(out.chunks_exact_mut(to * size)) {
        out[..width].copy_from_slice(&row[..width]);
    }
    out
}

fn fp8(element: &str) -> Fp8 {
    match element {
        "e4m3" => Fp8::E4M3Ieee,
        "e4m3fn" => Fp8::E4M3Fn,
        "e5m2" => Fp8::E5M2,
        other => panic!("element {other}"),
    }
}

#[test]
fn matmul_fp8_from_checkpoint_weights() {
    for (seed, checked) in programs::of("matmul_fp8").iter().enumerate() {
        let rng = &mut Rng(seed as u64 + 100);
        let (m, k) = (checked.shape(checked.input("x"))[0], checked.shape(checked.input("x"))[1]);
        let n = checked.shape(&checked.program.outputs()[0])[1];
        let element = |name: &str| fp8(&parameter::<String>(checked, name));
        let (xe, we) = (element("x_element"), element("w_element"));
        let blocks: bool = parameter(checked, "blocks");
        let scheme = |e: Fp8, shape: &[usize], tile: usize| match shape {
            _ if blocks => Scheme::Fp8Blockwise { element: e, n: tile, k: 128 },
            [1, 1] => Scheme::Fp8PerTensor(e),
            _ => Scheme::Fp8PerChannel(e),
        };
        let x = random_matrix(rng, m, k, scheme(xe, checked.shape(checked.input("x_scale")), 1));
        let w = random_matrix(rng, n, k, scheme(we, checked.shape(checked.input("w_scale")), 128));
        let layout = RowsLayout::of(&w.view(), RowElement::Fp8(we)).unwrap();
        let (packed, report) = layout.pack(&w.view(), Parallelism::Serial).unwrap();
        assert_eq!(report.overflowed, 0, "{}", checked.name);
        let bias = bias(checked, rng, n);
        let activation = match checked.program.parameter("activation") {
            Some("none") => Activation::None,
            Some("relu") => Activation::Relu,
            Some("silu") => Activation::Silu,
            Some("gelu") => Activation::GeluTanh,
            other => panic!("{}: activation {other:?}", checked.name),
        };
        let options = MatmulOptions { bias: bias.as_ref().map(|b| &b.0[..]), activation, ..MatmulOptions::default() };
        let mut inputs = vec![
            ("x", x.codes().to_vec()),
            ("w", packed.data().to_vec()),
            ("x_scale", f32_bytes(x.outer_scales())),
            ("w_scale", f32_bytes(packed.scales())),
        ];
        if let Some((_, bytes)) = &bias {
            inputs.push(("bias", bytes.clone()));
        }
        let output = output_type(checked);
        let view = x.view();
        let expected = oracle::matmul(&view, &w.view(), &options, &[], output).unwrap();
        let device = emulate(checked, &inputs, ScaleRule::Trainium);
        assert_eq!(outside(&device, &expected), 0, "{} on the emulator", checked.name);
        let cpu = on_cpu(Activations::Quantized(&view), &w.view(), &options, output);
        assert_eq!(outside(&cpu, &expected), 0, "{} on the CPU", checked.name);

        // The comparison can fail: two partitions of the weights swapped.
        let row = packed.data().len() / 128;
        inputs[1].1.rotate_left(row);
        assert!(
            outside(&emulate(checked, &inputs, ScaleRule::Trainium), &expected) > 0,
            "{}: a moved k goes unseen",
            checked.name
        );
    }
}

fn words<const N: usize, T>(bytes: &[u8], from: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.chunks_exact(N).map(|b| from(b.try_into().unwrap())).collect()
}

#[test]
fn attention_decode_on_its_own_data() {
    for checked in programs::of("attention_decode") {
        let bytes = |name: &str| checked.bytes(&format!("in.{name}"));
        let q_shape = checked.shape(checked.input("q"));
        let cache = checked.shape(checked.input("k_cache"));
        let (batch, heads, dim) = (q_shape[0], q_shape[1], q_shape[2]);
        let format = match checked.dtype(checked.input("k_cache")) {
            Dtype::Bfloat16 => KvFormat::Bf16,
            other => KvFormat::Fp8(other.fp8().expect("an FP8 cache")),
        };
        let shape = KvShape {
            format,
            num_pages: cache[0],
            page_size: cache[1],
            num_kv_heads: cache[2],
            head_dim_qk: dim,
            head_dim_vo: dim,
        };
        let scale = |name: &str| {
            let given = checked.has(&format!("in.{name}"));
            if given { KvScale::Tensor(words(&bytes(name), f32::from_le_bytes)[0]) } else { KvScale::One }
        };
        let (k, v) = (bytes("k_cache"), bytes("v_cache"));
        let plane = |codes, scale| KvPlane { codes, block_scales: &[], scale };
        let kv = PagedKv::new(shape, plane(&k, scale("k_scale")), plane(&v, scale("v_scale"))).unwrap();
        let lens: Vec<usize> = words(&bytes("context_lens"), |b| i32::from_le_bytes(b) as usize);
        let table = words(&bytes("block_table"), i32::from_le_bytes);
        let width = checked.shape(checked.input("block_table"))[1];
        let table = PageTable::from_block_table(cache[1], &table, width, &lens).unwrap();
        let spec = AttentionSpec {
            sm_scale: parameter(&checked, "sm_scale"),
            window_left: parameter::<usize>(&checked, "window").checked_sub(1),
            ..AttentionSpec::new(heads, cache[2], dim)
        };
        let sinks = checked.has("in.sinks").then(|| words(&bytes("sinks"), f32::from_le_bytes));
        let q: Vec<bf16> = words(&bytes("q"), bf16::from_le_bytes);
        let q = || HeadsRef::new(&q, batch, heads, dim).unwrap();

        let indptr: Vec<usize> = (0..=batch).collect();
        let queries = Queries { q: q(), indptr: &indptr, sinks: sinks.as_deref() };
        let reference = attention_oracle::paged(&spec, queries, &kv, &table).unwrap();
        let plan = plan_decode(&spec, &kv, &table).unwrap();
        let mut out = vec![bf16::ZERO; batch * heads * dim];
        let y = AttentionOut { out: HeadsMut::new(&mut out, batch, heads, dim).unwrap(), lse: None };
        Cpu::detect().decode(&plan, q(), &kv, sinks.as_deref(), y, &mut Workspace::new()).unwrap();

        check_attention(&checked, &reference, &out);
    }
}

/// Device and CPU against the oracle, each within its own bound, and against each other.
fn check_attention(checked: &Checked, reference: &Reference, cpu: &[bf16]) {
    let port = &checked.program.outputs()[0];
    let device = values(checked.dtype(port), &checked.run(&Options::default())[0]);
    // The exported bound is twice the kernel's own distance from the exact result.
    let bound = checked.bound(&port.name).expect("a bound");
    assert_eq!([device.len(), bound.len(), cpu.len()], [reference.out.len(); 3], "{}", checked.name);
    for (i, want) in reference.out.iter().enumerate() {
        let (near, tolerance) = (bound[i] / 2.0, reference.tolerance::<bf16>(i));
        let (device, cpu) = (device[i], cpu[i].to_f64());
        let place = format!("{} element {i}: exact {want}, device {device}, cpu {cpu}", checked.name);
        assert!((device - want).abs() <= near, "{place}: the device is further than {near}");
        assert!((cpu - want).abs() <= tolerance, "{place}: the CPU is further than {tolerance}");
        assert!((device - cpu).abs() <= near + tolerance, "{place}: further apart than {near} + {tolerance}");
    }
}

#[test]
fn attention_prefill_on_its_own_data() {
    for checked in programs::of("attention_prefill") {
        let bytes = |name: &str| checked.bytes(&format!("in.{name}"));
        let halves = |name: &str| -> Vec<bf16> { words(&bytes(name), bf16::from_le_bytes) };
        let (q_shape, k_shape) = (checked.shape(checked.input("q")), checked.shape(checked.input("k")));
        let [batch, queries, heads, dim] = q_shape[..] else { panic!("{}: q {q_shape:?}", checked.name) };
        let (tokens, kv_heads) = (k_shape[1], k_shape[2]);
        let row = kv_heads * dim;
        // A sequence is its prior keys and the chunk's.
        let prior_slots = if checked.has("in.k_prior") { checked.shape(checked.input("k_prior"))[1] } else { 0 };
        let prior: Vec<usize> = match checked.has("in.prior_len") {
            true => words(&bytes("prior_len"), |b| i32::from_le_bytes(b) as usize),
            false => vec![prior_slots; batch],
        };
        let joined = |name: &str| {
            let before = if prior_slots > 0 { halves(&format!("{name}_prior")) } else { vec![] };
            let chunk = halves(name);
            let mut all = vec![];
            for (b, used) in prior.iter().enumerate() {
                all.extend_from_slice(&before[b * prior_slots * row..][..used * row]);
                all.extend_from_slice(&chunk[b * tokens * row..][..tokens * row]);
            }
            all
        };
        let (q, k, v) = (halves("q"), joined("k"), joined("v"));
        let mut kv_indptr = vec![0];
        prior.iter().for_each(|used| kv_indptr.push(kv_indptr[kv_indptr.len() - 1] + used + tokens));
        let indptr: Vec<usize> = (0..=batch).map(|b| b * queries).collect();
        let all = kv_indptr[batch];
        let spec = AttentionSpec {
            sm_scale: parameter(&checked, "sm_scale"),
            causal: parameter(&checked, "causal"),
            window_left: parameter::<usize>(&checked, "window").checked_sub(1),
            ..AttentionSpec::new(heads, kv_heads, dim)
        };
        let sinks = checked.has("in.sinks").then(|| words(&bytes("sinks"), f32::from_le_bytes));
        let queries = Queries {
            q: HeadsRef::new(&q, indptr[batch], heads, dim).unwrap(),
            indptr: &indptr,
            sinks: sinks.as_deref(),
        };
        let kv = RaggedKv {
            k: HeadsRef::new(&k, all, kv_heads, dim).unwrap(),
            v: HeadsRef::new(&v, all, kv_heads, dim).unwrap(),
            indptr: &kv_indptr,
        };
        let reference = attention_oracle::prefill(&spec, queries, kv).unwrap();
        let mut out = vec![bf16::ZERO; q.len()];
        let y = AttentionOut { out: HeadsMut::new(&mut out, indptr[batch], heads, dim).unwrap(), lse: None };
        Cpu::detect().prefill(&spec, queries, kv, y, &mut Workspace::new()).unwrap();
        check_attention(&checked, &reference, &out);
    }
}

/// An append in place: the caches that come back are this crate's own after `append_kv`, byte for byte.
#[test]
fn kv_append_into_the_same_pages() {
    let checked = programs::of("kv_append").into_iter().find(|c| c.name.ends_with(".bf16")).expect("a bf16 cache");
    let [pages, page_size, heads, dim] = checked.shape(checked.input("k_cache")).try_into().unwrap();
    let tokens = checked.shape(checked.input("k"))[0];
    for before in 0..page_size {
        // A neighbour takes the first page; the last row of the bucket is padding.
        let new = tokens - 1;
        let mut pool = KvPool::new(KvConfig::new(KvFormat::Bf16, 1, pages, page_size, heads, dim)).unwrap();
        let (mut neighbour, mut sequence) = (KvSequence::new(&pool), KvSequence::new(&pool));
        neighbour.grow(&mut pool, 1).unwrap();
        let rng = &mut Rng(before as u64);
        let mut rows = |n: usize| -> Vec<bf16> { (0..n * heads * dim).map(|_| bf16::from_f32(rng.normal())).collect() };
        let mut append = |pool: &mut KvPool, n: usize, k: &[bf16], v: &[bf16]| {
            sequence.grow(pool, n).unwrap();
            let table = PageTable::from_sequences([&sequence]).unwrap();
            let part = |x| HeadsRef::new(x, n, heads, dim).unwrap();
            append_kv(pool, 0, &table, &[0, n], part(&k[..n * heads * dim]), part(&v[..n * heads * dim])).unwrap();
            sequence.pages().to_vec()
        };
        append(&mut pool, before, &rows(before), &rows(before));
        let codes = |pool: &KvPool| {
            let kv = pool.layer(0).unwrap();
            [kv.k().codes.to_vec(), kv.v().codes.to_vec()]
        };
        let [k_cache, v_cache] = codes(&pool);
        let (k, v) = (rows(tokens), rows(tokens));
        let at = append(&mut pool, new, &k, &v);
        let slot = |i: usize| at[i / page_size] as i32 * page_size as i32 + (i % page_size) as i32;
        let slots: Vec<i32> = (before..before + new).map(slot).chain([-1]).collect();

        let bytes = |x: &[bf16]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let inputs = [
            ("k", bytes(&k)),
            ("v", bytes(&v)),
            ("slots", slots.iter().flat_map(|s| s.to_le_bytes()).collect()),
            ("k_cache", k_cache),
            ("v_cache", v_cache),
        ];
        let kept = inputs.clone();
        let find = |name: &str| inputs.iter().find(|(n, _)| *n == name).map(|(_, b)| b.as_slice()).unwrap();
        let ordered: Vec<&[u8]> = checked.program.inputs().iter().map(|p| find(&p.name)).collect();
        let got = checked.program.run(&ordered, &Options::default()).unwrap();
        assert_eq!(got, codes(&pool), "{before} tokens before");
        assert!(inputs == kept, "a run changed the caller's bytes");
    }
    // What is changed in place is one tensor under one name, on both sides.
    for port in checked.program.outputs() {
        assert_eq!(checked.input(&port.name).tensor, port.tensor);
    }
}
