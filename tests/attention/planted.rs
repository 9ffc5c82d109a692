//! Each planted bug moves some output beyond the bound; the kernel itself stays within.
#![forbid(unsafe_code)]

use crate::paged::Paged;
use crate::{Case, Outputs};
use trn_kernels::attention::AttentionSpec;
use trn_kernels::attention::oracle::Reference;
use trn_kernels::kv::KvFormat;
use trn_kernels::num::Fp8;

fn ragged() -> Case<f32> {
    Case::<f32>::new(31, AttentionSpec { window_left: Some(12), ..AttentionSpec::new(4, 2, 32) }, &[(6, 50)], 0..=0)
        .with_sinks()
}

fn caught(bug: &str, good: &Reference, planted: &Outputs) {
    assert!(!planted.within(good), "{bug}: not caught");
}

#[test]
fn nothing_planted_is_within() {
    let case = ragged();
    assert!(case.run().within(&case.oracle()));
}

#[test]
fn window_off_by_one() {
    let case = ragged();
    for window_left in [11, 13] {
        let spec = AttentionSpec { window_left: Some(window_left), ..case.spec };
        caught("window", &case.oracle(), &Case { spec, ..case.clone() }.run());
    }
}

#[test]
fn sink_dropped() {
    let case = ragged();
    caught("sink", &case.oracle(), &Case { sinks: None, ..case.clone() }.run());
}

#[test]
fn sink_scaled() {
    let case = ragged();
    let sinks = case.sinks.as_ref().map(|s| s.iter().map(|s| s * case.spec.sm_scale).collect());
    caught("sink", &case.oracle(), &Case { sinks, ..case.clone() }.run());
}

#[test]
fn sink_in_lse() {
    let case = ragged();
    let mut planted = case.run();
    for (i, lse) in planted.lse.iter_mut().enumerate() {
        *lse = (lse.exp() + case.sinks.as_ref().unwrap()[i % 4].exp()).ln();
    }
    caught("lse", &case.oracle(), &planted);
}

#[test]
fn causal_from_the_top_left() {
    let case = ragged();
    // Query i sees tokens 0..=i: as if there were only as many tokens as queries.
    let rows = 6 * 2 * 32;
    let (k, v) = (case.k[..rows].to_vec(), case.v[..rows].to_vec());
    caught("alignment", &case.oracle(), &Case { k, v, kv_indptr: vec![0, 6], ..case.clone() }.run());
}

#[test]
fn heads_grouped_by_remainder() {
    let case = ragged();
    // Head h reads kv head h % 2: heads 1 and 2 change places on the way in and out.
    let swap = |x: &[f32], dim: usize| -> Vec<f32> {
        let head = |i: usize| [0, 2, 1, 3][i % 4] + i / 4 * 4;
        (0..x.len() / dim).flat_map(|i| x[head(i) * dim..(head(i) + 1) * dim].to_vec()).collect()
    };
    let sinks = case.sinks.as_ref().map(|s| swap(s, 1));
    let planted = Case { q: swap(&case.q, 32), sinks, ..case.clone() }.run();
    let planted = Outputs { out: swap(&planted.out, 32), lse: swap(&planted.lse, 1) };
    caught("groups", &case.oracle(), &planted);
}

#[test]
fn scale_of_k_used_for_v() {
    let paged = Paged::new(KvFormat::Fp8(Fp8::E4M3Fn));
    let (k, v) = paged.scales();
    for (k, v) in [(k.clone(), k.clone()), (v, k)] {
        let planted = paged.decode_with(&paged.spec, &paged.view_with(k, v), Some(&paged.sinks));
        caught("k scale", &paged.oracle(), &planted);
    }
}

#[test]
fn block_scales_shifted() {
    for format in [KvFormat::Mxfp8(Fp8::E4M3Fn), KvFormat::Mxfp4, KvFormat::Nvfp4] {
        let good = Paged::new(format);
        let (mut k, mut v) = (Paged::new(format), Paged::new(format));
        k.k.1.rotate_right(1);
        v.v.1.rotate_right(1);
        caught("k block scales", &good.oracle(), &k.decode());
        caught("v block scales", &good.oracle(), &v.decode());
    }
}

#[test]
fn nibbles_swapped() {
    for format in [KvFormat::Mxfp4, KvFormat::Nvfp4] {
        let good = Paged::new(format);
        let (mut k, mut v) = (Paged::new(format), Paged::new(format));
        k.k.0.iter_mut().for_each(|b| *b = b.rotate_left(4));
        v.v.0.iter_mut().for_each(|b| *b = b.rotate_left(4));
        caught("nibbles of k", &good.oracle(), &k.decode());
        caught("nibbles of v", &good.oracle(), &v.decode());
    }
}

#[test]
fn soft_cap_dropped() {
    let case = ragged();
    let spec = AttentionSpec { logits_soft_cap: Some(2.0), ..case.spec };
    caught("cap", &Case { spec, ..case.clone() }.oracle(), &case.run());
}
