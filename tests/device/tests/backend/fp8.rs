//! FP8 weights with FP8 activations, f32 scales: the emulator's bits, within the oracle's bound, and the CPU's result within both.

use crate::Device;
use crate::bits::{direct, f32_bytes};
use crate::conformance;
use crate::random::{RandomMatrix, Rng};
use trn_kernels::backend::{ActivationTerms, Backend, CpuBackend, Element, Problem};
use trn_kernels::matmul::oracle::{self, OutputType};
use trn_kernels::matmul::{Activations, MatmulOptions};
use trn_kernels::num::Fp8;
use trn_kernels::quant::{QuantizedMatrix, Scheme};
use trn_kernels::trainium::layout::{RowElement, RowsLayout};
use trn_kernels::{Cpu, Error, MatMut, Parallelism};

const E: Fp8 = Fp8::E4M3Fn;

/// Codes and f32 scales of activations as the kernel takes them, in the rows of a compiled shape.
fn activations(x: &QuantizedMatrix<'_>, bucket: usize) -> (Vec<u8>, Vec<u8>) {
    let (m, k) = (x.n(), x.k());
    let mut codes: Vec<u8> = (0..m * k).map(|i| x.code(i / k, i % k).unwrap() as u8).collect();
    codes.resize(bucket * k, 0);
    let columns = if matches!(x.scheme(), Scheme::Fp8Blockwise { .. }) { k / 128 } else { 1 };
    let rows = if matches!(x.scheme(), Scheme::Fp8PerTensor(_)) { 1 } else { bucket };
    let scale = |i: usize| x.outer_scale((i / columns).min(m - 1), i % columns * 128).unwrap();
    (codes, f32_bytes(&(0..rows * columns).map(scale).collect::<Vec<_>>()))
}

fn run<'w>(
    backend: &mut dyn Backend<'w>,
    (w, bias): (&QuantizedMatrix<'w>, &[f32]),
    x: &QuantizedMatrix<'_>,
    y: &mut [f32],
) {
    let id = backend.load_matrix(w, bias).unwrap();
    let y = MatMut::new(y, x.n(), w.n()).unwrap();
    backend.matmul(id, Activations::Quantized(x), y.into(), false).unwrap();
}

#[test]
fn every_scaling_gives_the_emulators_bits_within_the_bound() {
    let blockwise = |n| Scheme::Fp8Blockwise { element: E, n, k: 128 };
    let rng = &mut Rng(41);
    for (w_scheme, x_scheme, n, k) in [
        (Scheme::Fp8PerTensor(E), Scheme::Fp8PerTensor(E), 48, 96),
        (Scheme::Fp8PerChannel(E), Scheme::Fp8PerChannel(E), 48, 96),
        (blockwise(128), blockwise(1), 160, 256),
    ] {
        let device = Device::new();
        let w = RandomMatrix::new(rng, w_scheme, n, k, 0);
        let biases = if n == 48 { vec![vec![], rng.wide(n, -1..=1)] } else { vec![vec![]] };
        for bias in biases {
            for m in [1, 5, 8] {
                let bucket = if m == 1 && n == 48 { 1 } else { 8 };
                let x = RandomMatrix::new(rng, x_scheme, m, k, 0);
                let (x, w) = (x.view(), w.view());
                let mut backend = device.backend(ActivationTerms::Two, Some(x_scheme));
                let problem = Problem::Matmul {
                    scheme: w_scheme,
                    n,
                    k,
                    m,
                    bias: !bias.is_empty(),
                    activations: Element::Quantized(x_scheme),
                };
                backend.supports(&problem).unwrap();
                let (mut y, mut on_cpu) = (vec![0f32; m * n], vec![0f32; m * n]);
                run(&mut backend, (&w, &bias), &x, &mut y);
                run(&mut CpuBackend::new(Cpu::detect()), (&w, &bias), &x, &mut on_cpu);

                let layout = RowsLayout::of(&w, RowElement::Fp8(E)).unwrap();
                let (packed, _) = layout.pack(&w, Parallelism::Serial).unwrap();
                let (codes, scales) = activations(&x, bucket);
                let shape = format!("x uint8 [{bucket}, {k}]");
                let w_scale =
                    if w_scheme == Scheme::Fp8PerTensor(E) { "w_scale float32 [1, 1]," } else { "w_scale float32 [" };
                let x_scale = match x_scheme {
                    Scheme::Fp8PerTensor(_) => "x_scale float32 [1, 1]".to_owned(),
                    Scheme::Fp8PerChannel(_) => format!("x_scale float32 [{bucket}, 1]"),
                    _ => format!("x_scale float32 [{bucket}, 2]"),
                };
                let mut inputs = vec![
                    ("x", codes),
                    ("x_scale", scales),
                    ("w", packed.data().to_vec()),
                    ("w_scale", f32_bytes(packed.scales())),
                ];
                let all = device.kernels.set().kernels().iter().filter(|k| k.kernel() == "matmul_fp8");
                let fits = |text: String| {
                    [shape.as_str(), w_scale, &x_scale].iter().all(|w| text.contains(w))
                        && text.contains("bias float32") != bias.is_empty()
                        && (w_scheme == Scheme::Fp8PerTensor(E)) == text.contains("w_scale float32 [1, 1]")
                };
                if !bias.is_empty() {
                    inputs.push(("bias", f32_bytes(&layout.columns().pack(&bias, 0.0).unwrap())));
                }
                let found: Vec<_> = all.filter(|k| fits(k.describe())).collect();
                assert_eq!(found.len(), 1, "{w_scheme:?} {shape}");
                let wanted = direct(found[0], &inputs).remove(0);
                assert!(f32_bytes(&y) == wanted[..m * n * 4], "{w_scheme:?} m {m}: not the emulator's bits");

                let options = MatmulOptions { bias: Some(&bias[..]).filter(|b| !b.is_empty()), ..Default::default() };
                let exact = oracle::matmul(&x, &w, &options, &[], OutputType::F32).unwrap();
                for (i, want) in exact.iter().enumerate() {
                    // The oracle counts more roundings than the device makes: it sums whole tiles in f32, once.
                    assert!(want.admits(y[i].into()), "{w_scheme:?} [{i}]: {} is not {want:?}", y[i]);
                    let apart = (f64::from(y[i]) - f64::from(on_cpu[i])).abs();
                    assert!(apart <= 2.0 * want.bound, "{w_scheme:?} [{i}]: {apart:e} from the CPU, {want:?}");
                }
            }
        }
        device.end();
    }
}

/// Without a scheme of the activations, with another one, or with other types: the same reason ahead and in the call.
#[test]
fn activations_that_were_not_announced_are_refused() {
    let (device, rng) = (Device::new(), &mut Rng(42));
    let w = RandomMatrix::new(rng, Scheme::Fp8PerTensor(E), 48, 96, 0);
    let mut served = conformance::Served::default();
    let rules = conformance::Rules {
        activations: 0.0,
        weights: 0.0,
        inner: trn_kernels::backend::Inner::Bf16,
        attention: &|_| 0.0,
        seed: 43,
    };
    // bf16 and f32 activations, loaded for FP8 ones.
    let mut backend = device.backend(ActivationTerms::Two, Some(Scheme::Fp8PerTensor(E)));
    conformance::matmul(&mut backend, &w, (Scheme::Fp8PerTensor(E), 2, 48, 96), &rules, &mut served);
    assert_eq!((served.served, served.tried), (0, 6));
    // FP8 of another scaling.
    let id = backend.load_matrix(&w.view(), &[]).unwrap();
    let x = RandomMatrix::new(rng, Scheme::Fp8PerChannel(E), 2, 96, 0);
    let x = x.view();
    let problem = Problem::Matmul {
        scheme: Scheme::Fp8PerTensor(E),
        n: 48,
        k: 96,
        m: 2,
        bias: false,
        activations: Element::Quantized(x.scheme()),
    };
    let mut y = vec![7f32; 2 * 48];
    let said = backend.matmul(id, Activations::Quantized(&x), MatMut::new(&mut y, 2, 48).unwrap().into(), false);
    assert!(
        matches!(&said, Err(Error::Unsupported { because, .. }) if because.contains("fp8_activations")),
        "{said:?}"
    );
    assert_eq!(backend.supports(&problem), said);
    assert_eq!(y, [7.0; 96]);
    // Trainium has no way for 3-bit exponents, and none for scales of another tile.
    for scheme in [Scheme::Fp8PerChannel(Fp8::E3M4), Scheme::Fp8Blockwise { element: E, n: 64, k: 128 }] {
        let w = RandomMatrix::new(rng, scheme, 48, 96, 0);
        let said = backend.load_matrix(&w.view(), &[]).map(drop);
        assert_eq!(
            said,
            backend.supports(&Problem::Matmul {
                scheme,
                n: 48,
                k: 96,
                m: 1,
                bias: false,
                activations: Element::Quantized(Scheme::Fp8PerTensor(E))
            })
        );
        assert!(matches!(said, Err(Error::Unsupported { .. })), "{said:?}");
    }
    drop(backend);
    device.end();
}
