//! The bits of the emulator: what a typed call gives is what its program gives when it is run on operands laid out by hand here.

use crate::Device;
use crate::conformance::ExpertData;
use crate::random::{RandomMatrix, Rng};
use device_tests::registry;
use half::bf16;
use trn_kernels::attention::AttentionSpec;
use trn_kernels::backend::{ActivationTerms, Backend, ExpertWeights, Inner};
use trn_kernels::kv::{KvConfig, KvFormat, PageTable};
use trn_kernels::layer::{GateLayout, SwigluSpec};
use trn_kernels::neuron::kernels::CompiledKernel;
use trn_kernels::num::{Fp8, Overflow, encode_slice};
use trn_kernels::quant::{QuantizedExperts, Scheme};
use trn_kernels::trainium::emulator::{Limits, Options, Program};
use trn_kernels::trainium::layout::{ColumnOrder, GateUp, MxLayout, PackedMxExperts};
use trn_kernels::{HeadsMut, HeadsRef, MatMut, MatRef, Parallelism};

/// The one compiled kernel whose description has all these words.
fn kernel<'d>(device: &'d Device, name: &str, words: &[&str]) -> &'d CompiledKernel {
    let all = device.kernels.set().kernels().iter();
    let found: Vec<&CompiledKernel> =
        all.filter(|k| k.kernel() == name && words.iter().all(|w| format!("{}, ", k.describe()).contains(w))).collect();
    let [one] = found[..] else { panic!("{} kernels of {name} with {words:?}", found.len()) };
    one
}

/// Runs a compiled kernel's program on inputs by name, without any runtime.
pub(crate) fn direct(kernel: &CompiledKernel, inputs: &[(&str, Vec<u8>)]) -> Vec<Vec<u8>> {
    let path = registry::data("device-programs").join(kernel.file()).with_extension("json");
    let program = Program::from_json(&std::fs::read(path).unwrap(), &Limits::default()).unwrap();
    let find = |name: &str| inputs.iter().find(|(n, _)| *n == name).unwrap_or_else(|| panic!("no {name}")).1.as_slice();
    let ordered: Vec<&[u8]> = program.inputs().iter().map(|p| find(&p.name)).collect();
    program.run(&ordered, &Options::default()).unwrap()
}

fn bf16_bytes(values: &[bf16]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

pub(crate) fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn i32_bytes(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// `n` values that bf16 holds.
pub(crate) fn random(rng: &mut Rng, n: usize) -> Vec<bf16> {
    rng.wide(n, -2..=1).into_iter().map(bf16::from_f32).collect()
}

/// `bytes`, with zeros behind up to `len`.
fn padded(mut bytes: Vec<u8>, len: usize) -> Vec<u8> {
    bytes.resize(len, 0);
    bytes
}

#[test]
fn mx_matmuls() {
    let (device, rng) = (Device::new(), &mut Rng(31));
    let e5m2 = Scheme::Mxfp8(Fp8::E5M2);
    for (scheme, word, n, k, m, bucket) in [
        (Scheme::Mxfp4, "w_element e2m1", 48, 96, 8, 8),
        (Scheme::Mxfp4, "w_element e2m1", 48, 96, 5, 8),
        (e5m2, "w_element e5m2", 40, 64, 3, 4),
    ] {
        for (terms, word_terms) in [(ActivationTerms::One, "x_terms 1"), (ActivationTerms::Two, "x_terms 2")] {
            let w = RandomMatrix::new(rng, scheme, n, k, 3);
            let bias = if n == 48 { rng.wide(n, -1..=1) } else { vec![] };
            let x = random(rng, m * k);
            let mut backend = device.backend(terms, None);
            let id = backend.load_matrix(&w.view(), &bias).unwrap();
            let mut y = vec![0f32; m * n];
            let x_view = MatRef::new(&x, m, k).unwrap().into();
            backend.matmul(id, x_view, MatMut::new(&mut y, m, n).unwrap().into(), false).unwrap();

            let layout = MxLayout::of(&w.view()).unwrap();
            let packed = layout.pack(&w.view(), Parallelism::Serial).unwrap();
            let rows = format!("x bfloat16 [{bucket}, {k}]");
            let mut inputs = vec![
                ("x", padded(bf16_bytes(&x), bucket * k * 2)),
                ("w", packed.data().to_vec()),
                ("w_scale", packed.scales().to_vec()),
            ];
            let mut words = vec![word, word_terms, &rows];
            if !bias.is_empty() {
                words.push("bias float32");
                inputs.push(("bias", f32_bytes(&layout.columns().pack(&bias, 0.0).unwrap())));
            }
            let wanted = direct(kernel(&device, "matmul_mx", &words), &inputs).remove(0);
            assert!(f32_bytes(&y) == wanted[..m * n * 4], "{scheme:?} {terms:?} m {m}");
        }
    }
    device.end();
}

fn stack(all: &[RandomMatrix]) -> QuantizedExperts<'_> {
    QuantizedExperts::new(all.iter().map(RandomMatrix::view).collect()).unwrap()
}

#[test]
fn experts() {
    let (device, rng) = (Device::new(), &mut Rng(32));
    const H: usize = 64;
    const I: usize = 32;
    let spec = SwigluSpec::GPT_OSS;
    let ids = [2u32, 0, 3, 2];
    for (scheme, word) in [(Scheme::Mxfp4, "w_element e2m1"), (Scheme::Mxfp8(Fp8::E4M3Fn), "w_element e4m3fn")] {
        let data = ExpertData::new(rng, scheme, 4, H, I);
        let (gate_up, down) = (stack(&data.gate_up), stack(&data.down));
        let weights = ExpertWeights {
            gate_up: &gate_up,
            gate_up_bias: &data.gate_up_bias,
            down: &down,
            down_bias: &data.down_bias,
            swiglu: spec,
            gates: GateLayout::Interleaved,
            inner: Inner::Bf16,
        };
        let mut backend = device.backend(ActivationTerms::Two, None);
        let id = backend.load_experts(&weights).unwrap();
        let x = random(rng, H);
        let mut y = vec![0f32; ids.len() * H];
        let out = MatMut::new(&mut y, ids.len(), H).unwrap();
        backend.moe(id, MatRef::new(&x, 1, H).unwrap().into(), &ids, ids.len(), out).unwrap();

        let up = PackedMxExperts::pack(&gate_up, GateUp::Split, ColumnOrder::Quads, Parallelism::Serial).unwrap();
        let back = PackedMxExperts::pack(&down, GateUp::Together, ColumnOrder::Natural, Parallelism::Serial).unwrap();
        let (mut b_up, mut b_down) = (vec![], vec![]);
        for e in 0..4 {
            let of = |all: &[f32], n: usize| all[e * n..(e + 1) * n].to_vec();
            b_up.extend(up.layout().columns().pack(&of(&data.gate_up_bias, 2 * I), 0.0).unwrap());
            b_down.extend(back.layout().columns().pack(&of(&data.down_bias, H), 0.0).unwrap());
        }
        let b_down: Vec<bf16> = b_down.into_iter().map(bf16::from_f32).collect();
        // One row to a block, in the order of the slots: where a row is computed changes nothing.
        let inputs = [
            ("x", bf16_bytes(&x)),
            ("take", i32_bytes(&[0; 4])),
            ("put", i32_bytes(&[0, 1, 2, 3])),
            ("block_expert", i32_bytes(&ids.map(|id| id as i32))),
            ("w_gate_up", up.data().to_vec()),
            ("s_gate_up", up.scales().to_vec()),
            ("b_gate_up", f32_bytes(&b_up)),
            ("w_down", back.data().to_vec()),
            ("s_down", back.scales().to_vec()),
            ("b_down", bf16_bytes(&b_down)),
        ];
        let one = kernel(&device, "grouped_matmul_mx", &[word, "x_terms 2", "x bfloat16 [1, 64]"]);
        assert!(f32_bytes(&y) == direct(one, &inputs)[0], "{scheme:?}");
    }
    device.end();
}

/// Append, prefill and decode over pages 5, 2, 7 against programs that are given the same pages by hand.
#[test]
fn append_prefill_and_decode() {
    const PAGES: [usize; 3] = [5, 2, 7];
    const TOKENS: usize = 20;
    let (spec, row) = (AttentionSpec::new(4, 2, 32), 2 * 32);
    for (format, dtype) in [
        (KvFormat::Bf16, "bfloat16"),
        (KvFormat::Fp8(Fp8::E4M3Fn), "float8_e4m3fn"),
        (KvFormat::Fp8(Fp8::E5M2), "float8_e5m2"),
    ] {
        let (device, rng) = (Device::new(), &mut Rng(33));
        let mut backend = device.backend(ActivationTerms::Two, None);
        let sinks = rng.wide(4, 0..=0);
        let attention = backend.load_attention(&spec, &sinks).unwrap();
        let cache = backend.create_cache(&KvConfig::new(format, 1, 9, 8, 2, 32)).unwrap();
        let table = PageTable::new(8, vec![0, 3], PAGES.map(|p| p as u32).to_vec(), vec![TOKENS - 16]).unwrap();
        let (k, v) = (random(rng, TOKENS * row), random(rng, TOKENS * row));
        let heads = |x: &'static str, data| HeadsRef::new(data, TOKENS, 2, 32).unwrap_or_else(|e| panic!("{x}: {e}"));
        backend.append(cache, 0, &table, &[0, TOKENS], heads("k", &k).into(), heads("v", &v).into()).unwrap();

        // The cache's bytes, by this test's own reading of the format.
        let code = |value: &bf16| match format {
            KvFormat::Fp8(e) => {
                let mut code = vec![0];
                encode_slice(e, &[*value], Overflow::Saturate, &mut code).unwrap();
                code
            }
            _ => value.to_le_bytes().to_vec(),
        };
        let size = code(&bf16::ZERO).len();
        let paged = |x: &[bf16]| {
            let mut bytes = vec![0; 9 * 8 * row * size];
            for t in 0..TOKENS {
                let slot = PAGES[t / 8] * 8 + t % 8;
                let codes: Vec<u8> = x[t * row..(t + 1) * row].iter().flat_map(code).collect();
                bytes[slot * row * size..(slot + 1) * row * size].copy_from_slice(&codes);
            }
            bytes
        };
        let q = random(rng, 4 * 32);
        let mut out = vec![bf16::ZERO; 4 * 32];
        let view = HeadsMut::new(&mut out, 1, 4, 32).unwrap();
        backend.decode(attention, cache, 0, &table, HeadsRef::new(&q, 1, 4, 32).unwrap().into(), view.into()).unwrap();
        let mut pages = PAGES.map(|p| p as i32).to_vec();
        pages.resize(9, -1);
        let inputs = [
            ("q", bf16_bytes(&q)),
            ("k_cache", paged(&k)),
            ("v_cache", paged(&v)),
            ("block_table", i32_bytes(&pages)),
            ("context_lens", i32_bytes(&[TOKENS as i32])),
            ("sinks", f32_bytes(&sinks)),
            ("k_scale", f32_bytes(&[1.0])),
            ("v_scale", f32_bytes(&[1.0])),
        ];
        let words = ["q bfloat16 [1, 4, 32]", &format!("k_cache {dtype} "), "window 0,"];
        assert!(
            bf16_bytes(&out) == direct(kernel(&device, "attention_decode", &words), &inputs)[0],
            "decode, {format:?}"
        );

        // Prefill of the last four tokens, after sixteen; the kernel reads contiguous keys.
        let q = random(rng, 4 * 4 * 32);
        let mut out = vec![bf16::ZERO; q.len()];
        let view = HeadsMut::new(&mut out, 4, 4, 32).unwrap();
        let q_view = HeadsRef::new(&q, 4, 4, 32).unwrap().into();
        let call = backend.prefill(attention, cache, 0, &table, q_view, &[0, 4], view.into());
        if format == KvFormat::Bf16 {
            call.unwrap();
            let of = |x: &[bf16], tokens: std::ops::Range<usize>, room| {
                padded(bf16_bytes(&x[tokens.start * row..tokens.end * row]), room * row * 2)
            };
            let inputs = [
                ("q", padded(bf16_bytes(&q), 16 * 4 * 32 * 2)),
                ("k", of(&k, 16..20, 16)),
                ("v", of(&v, 16..20, 16)),
                ("k_prior", of(&k, 0..16, 64)),
                ("v_prior", of(&v, 0..16, 64)),
                ("prior_len", i32_bytes(&[16])),
                ("sinks", f32_bytes(&sinks)),
            ];
            let wanted = direct(kernel(&device, "attention_prefill", &["k_prior", "window 0,"]), &inputs).remove(0);
            assert!(bf16_bytes(&out) == wanted[..q.len() * 2], "prefill");
        } else {
            assert!(call.unwrap_err().to_string().contains("bf16"), "prefill over FP8 is refused with its reason");
        }
        drop(backend);
        device.end();
    }
}
