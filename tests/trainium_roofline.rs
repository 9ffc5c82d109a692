//! The chip table against AWS's quoted figures, and the roofline against arithmetic done by hand.

use trn_kernels::Error;
use trn_kernels::kv::KvFormat;
use trn_kernels::num::Fp8;
use trn_kernels::quant::Scheme;
use trn_kernels::trainium::chip::TensorEngine;
use trn_kernels::trainium::roofline::{Bound, DecodeProblem, ExpertsProblem, MatmulProblem, PrefillProblem, Roofline};
use trn_kernels::trainium::{Chip, MatmulMode};

/// Within half a unit of the last digit that a document prints.
fn rounds_to(value: f64, printed: f64, digit: f64) {
    assert!((value - printed).abs() <= digit / 2.0, "{value} is not {printed}");
}

#[test]
fn peaks_are_those_of_the_documents() {
    let tflops = |chip: &Chip, mode| chip.tensor.peak_flops(mode).map(|f| f / 1e12);
    let (trn1, trn2, trn3) = (Chip::trn1(), Chip::trn2(), Chip::trn3());
    for chip in [&trn2, &trn3] {
        rounds_to(tflops(chip, MatmulMode::Bf16).unwrap(), 78.6, 0.1);
        rounds_to(tflops(chip, MatmulMode::Fp8).unwrap(), 78.6, 0.1);
        rounds_to(tflops(chip, MatmulMode::Fp8DoubleRow).unwrap(), 157.3, 0.1);
        rounds_to(tflops(chip, MatmulMode::F32).unwrap(), 20.0, 1.0);
    }
    rounds_to(tflops(&trn3, MatmulMode::Mx).unwrap(), 314.6, 0.1);
    rounds_to(tflops(&trn1, MatmulMode::Bf16).unwrap(), 91.8, 0.1);
    rounds_to(tflops(&trn1, MatmulMode::F32).unwrap(), 23.0, 1.0);
    assert_eq!((tflops(&trn1, MatmulMode::Fp8DoubleRow), tflops(&trn2, MatmulMode::Mx)), (None, None));

    for (chip, sbuf, dma, core) in [(&trn1, 24, 272.0, 272.0), (&trn2, 28, 368.0, 362.5), (&trn3, 32, 528.0, 528.0)] {
        assert_eq!((chip.sbuf_bytes(), chip.psum_bytes()), (sbuf << 20, 2 << 20));
        rounds_to(chip.dma.bandwidth() / 1e9, dma, 0.1);
        rounds_to(chip.core_bandwidth() / 1e9, core, 0.1);
        assert_eq!(Chip::named(&chip.name), Some(chip.clone()));
    }
    assert_eq!(Chip::named("trn4"), None);
}

/// A stream of full tiles reaches the peak that the table names: cycles of the cost formulas, not the peak formula itself.
#[test]
fn an_ideal_stream_runs_at_the_peak() {
    for chip in Chip::documented() {
        for mode in MatmulMode::ALL.into_iter().filter(|mode| chip.tensor.has(*mode)) {
            let (columns, side) = (512, chip.tensor.side);
            let cycles = chip.tensor.moving_cycles(mode, columns);
            assert!(chip.tensor.load_cycles(side) <= cycles, "loads hide behind matmuls");
            let flops = 2.0 * (side * side * mode.k_per_partition() * columns) as f64;
            let rate = flops / (cycles / chip.tensor.clock);
            assert!((rate / chip.tensor.peak_flops(mode).unwrap() - 1.0).abs() < 1e-12, "{} {mode:?}", chip.name);
        }
        assert_eq!(chip.tensor.moving_cycles(MatmulMode::Bf16, 1), 64.0, "a short operand takes the least there is");
        assert_eq!(chip.tensor.load_cycles(128), 32.0);
    }
}

fn matmul(m: usize, weights: Scheme, activations: Scheme) -> MatmulProblem {
    MatmulProblem { m, n: 2880, k: 2880, weights, activations }
}

#[test]
fn matmul_by_hand() {
    let chip = Chip::trn3();
    let decode = matmul(1, Scheme::Mxfp4, Scheme::Bf16).on(&chip).unwrap();
    assert_eq!(decode.mode, MatmulMode::Mx);
    assert_eq!(decode.flops, 2.0 * 2880.0 * 2880.0);
    // 16 bytes of codes and a scale for 32 weights; x and y in bf16.
    assert_eq!(decode.bytes, 2880.0 * 90.0 * 17.0 + 2.0 * 2880.0 + 2.0 * 2880.0);
    assert_eq!((decode.bound(), decode.memory_share()), (Bound::Memory, 1.0));
    assert!((decode.seconds() - decode.bytes / 528e9).abs() < 1e-18);
    assert!(decode.compute_share() < 0.01 && decode.intensity() < decode.ridge());

    let prefill = matmul(8192, Scheme::Mxfp4, Scheme::Bf16).on(&chip).unwrap();
    assert_eq!((prefill.bound(), prefill.compute_share()), (Bound::Compute, 1.0));
    assert!((prefill.seconds() - prefill.flops / (128.0 * 128.0 * 8.0 * 2.4e9)).abs() < 1e-15);
    assert!(prefill.intensity() > prefill.ridge());

    // Scales of the other schemes.
    let bytes = |w| matmul(1, w, Scheme::Bf16).on(&chip).unwrap().bytes - 4.0 * 2880.0;
    let codes = 2880.0 * 2880.0;
    assert_eq!(bytes(Scheme::Bf16), 2.0 * codes);
    assert_eq!(bytes(Scheme::Mxfp8(Fp8::E4M3Fn)), codes + codes / 32.0);
    assert_eq!(bytes(Scheme::Fp8PerTensor(Fp8::E4M3Fn)), codes + 4.0);
    assert_eq!(bytes(Scheme::Fp8PerChannel(Fp8::E4M3Fn)), codes + 4.0 * 2880.0);
    assert_eq!(bytes(Scheme::Fp8Blockwise { element: Fp8::E4M3Fn, n: 128, k: 128 }), codes + 4.0 * 23.0 * 23.0);
}

#[test]
fn modes_follow_operands_and_chip() {
    let (trn2, trn3) = (Chip::trn2(), Chip::trn3());
    let channel = Scheme::Fp8PerChannel(Fp8::E4M3Fn);
    let tiles = |k| Scheme::Fp8Blockwise { element: Fp8::E4M3Fn, n: 1, k };
    let mx = Scheme::Mxfp8(Fp8::E4M3Fn);
    for (weights, activations, chip, mode) in [
        (Scheme::Mxfp4, Scheme::Bf16, &trn3, MatmulMode::Mx),
        (Scheme::Mxfp4, mx, &trn3, MatmulMode::Mx),
        (Scheme::Mxfp4, Scheme::Bf16, &trn2, MatmulMode::Bf16),
        (Scheme::Mxfp4, mx, &trn2, MatmulMode::Bf16),
        (channel, channel, &trn2, MatmulMode::Fp8DoubleRow),
        (channel, channel, &trn3, MatmulMode::Fp8DoubleRow),
        (channel, channel, &Chip::trn1(), MatmulMode::Fp8),
        (channel, tiles(256), &trn2, MatmulMode::Fp8DoubleRow),
        (channel, tiles(128), &trn2, MatmulMode::Fp8),
        (channel, Scheme::Bf16, &trn2, MatmulMode::Bf16),
        (Scheme::Bf16, channel, &trn2, MatmulMode::Bf16),
    ] {
        let got = matmul(64, weights, activations).on(chip).unwrap().mode;
        assert_eq!(got, mode, "{weights:?} x {activations:?} on {}", chip.name);
    }
    for (weights, activations) in [
        (Scheme::Nvfp4, Scheme::Bf16),
        (Scheme::Bf16, Scheme::Nvfp4),
        (Scheme::Mxfp4, channel),
        (channel, mx),
        (Scheme::Fp8PerTensor(Fp8::E3M4), Scheme::Bf16),
    ] {
        let refused = matmul(64, weights, activations).on(&trn3);
        assert!(matches!(refused, Err(Error::Unsupported { .. })), "{weights:?} x {activations:?}");
    }
    let empty = MatmulProblem { n: 0, ..matmul(1, channel, channel) }.on(&trn2);
    assert_eq!(empty.unwrap_err().to_string(), "matmul: axis n is empty, needed at least 1");
    let broken = Chip { tensor: TensorEngine { clock: f64::NAN, ..trn2.tensor }, ..trn2 };
    assert!(matches!(matmul(1, channel, channel).on(&broken), Err(Error::Value { .. })));
    let huge = MatmulProblem { m: usize::MAX, n: usize::MAX, k: usize::MAX, weights: channel, activations: channel };
    assert!(huge.on(&trn3).unwrap().seconds().is_finite());
}

#[test]
fn decode_attention_by_hand() {
    let problem = DecodeProblem {
        sequences: 16,
        kv_tokens: 16 * 4096,
        num_qo_heads: 64,
        num_kv_heads: 8,
        head_dim_qk: 64,
        head_dim_vo: 64,
        format: KvFormat::Bf16,
    };
    let on = |format| DecodeProblem { format, ..problem }.on(&Chip::trn2());
    let bf16 = on(KvFormat::Bf16).unwrap();
    assert_eq!(bf16.flops, 2.0 * 65536.0 * 64.0 * 128.0);
    assert_eq!(bf16.bytes, 65536.0 * 8.0 * 128.0 * 2.0 + 16.0 * 64.0 * 128.0 * 2.0);
    // Eight query heads share a key: 2 * 8 operations for 2 bytes.
    assert_eq!((bf16.intensity().round(), bf16.bound()), (8.0, Bound::Memory));
    let fp8 = on(KvFormat::Fp8(Fp8::E4M3Fn)).unwrap();
    assert!(fp8.seconds() < 0.51 * bf16.seconds());
    for format in [KvFormat::F32, KvFormat::F16, KvFormat::Mxfp4, KvFormat::Nvfp4, KvFormat::Mxfp8(Fp8::E4M3Fn)] {
        assert!(matches!(on(format), Err(Error::Unsupported { .. })));
    }
    let empty = DecodeProblem { kv_tokens: 0, ..problem }.on(&Chip::trn2());
    assert_eq!(empty.unwrap_err().to_string(), "decode attention: axis kv_tokens is empty, needed at least 1");
}

#[test]
fn it_calls_itself_a_model() {
    let line: Roofline = matmul(1, Scheme::Mxfp4, Scheme::Bf16).on(&Chip::trn3()).unwrap();
    let text = line.to_string();
    assert!(text.starts_with("model, not a measurement: bound by memory, 8.367e-6 s\n"), "{text}");
    assert!(text.contains("100.0 % of bandwidth in use"), "{text}");
}

/// Pairs counted one by one.
#[test]
fn prefill_counts_what_a_query_sees() {
    let base = PrefillProblem {
        sequences: 3,
        queries: 13,
        keys: 13,
        prior: 0,
        num_qo_heads: 8,
        num_kv_heads: 2,
        head_dim: 64,
        causal: true,
        window: 0,
    };
    for prior in [0, 1, 7, 30] {
        for (causal, window) in [(false, 0), (true, 0), (true, 1), (true, 5), (true, 14), (true, 20), (true, 1000)] {
            let problem = PrefillProblem { prior, causal, window, ..base };
            let sees = |q: usize, k: usize| {
                let position = prior + q;
                !causal || (k <= position && (window == 0 || k + window > position))
            };
            let keys = prior + base.keys;
            let pairs =
                (0..base.queries).flat_map(|q| (0..keys).map(move |k| (q, k))).filter(|&(q, k)| sees(q, k)).count();
            let read = (0..keys).filter(|&k| (0..base.queries).any(|q| sees(q, k))).count();
            let got = problem.on(&Chip::trn2()).unwrap();
            assert_eq!(got.flops, (3 * pairs * 8 * 64 * 4) as f64, "{problem:?}");
            assert_eq!(got.bytes, (3 * (2 * 13 * 8 * 64 * 2 + 2 * read * 2 * 64 * 2)) as f64, "{problem:?}");
        }
    }
    for empty in [PrefillProblem { keys: 0, ..base }, PrefillProblem { head_dim: 0, ..base }] {
        assert!(matches!(empty.on(&Chip::trn2()), Err(Error::Empty { .. })));
    }
}

/// gpt-oss-20b's experts: 32 tokens of one expert each read 32 experts' weights.
#[test]
fn experts_read_their_weights_once() {
    let problem = ExpertsProblem { rows: 32, experts: 32, hidden: 2880, intermediate: 2880, weights: Scheme::Mxfp4 };
    let got = problem.on(&Chip::trn3()).unwrap();
    let weights = 3 * 2880 * 2880;
    assert_eq!((got.mode, got.bound()), (MatmulMode::Mx, Bound::Memory));
    assert_eq!(got.flops, (2 * 32 * weights) as f64);
    assert_eq!(got.bytes, (32 * (weights / 2 + weights / 32) + 2 * 32 * 2880 * 2) as f64);
    let none = ExpertsProblem { experts: 0, ..problem };
    assert!(matches!(none.on(&Chip::trn3()), Err(Error::Empty { axis: "experts", .. })));
}
