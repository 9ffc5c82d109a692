//! Device programs over chips of any constants, the kernels' manifest over calls of any extents, and manifests of any text.
//! Hostile programs are in `emulator_hostile.rs`.

use crate::{EXTENTS, survives};
use proptest::prelude::*;
use trn_kernels::Error;
use trn_kernels::trainium::emulator::{Limits, Program};
use trn_kernels::trainium::manifest::{Argument, KernelEntry, Manifest, ParameterKind};
use trn_kernels::trainium::{Chip, Dtype, Target, cost};

fn bundled() -> &'static Manifest {
    Manifest::bundled().expect("the crate's own manifest")
}

/// A call whose tensors have the ranks of the first alternative plus `more`, with extents in turn from `extents`.
fn call(entry: &KernelEntry, target: Target, more: usize, dtype: usize, extents: &[usize], number: i64) {
    let types: Vec<Dtype> = Dtype::all().collect();
    let mut extents = extents.iter().copied().cycle();
    let inputs: Vec<(&str, Dtype, Vec<usize>)> = entry
        .inputs()
        .iter()
        .enumerate()
        .map(|(i, input)| {
            let rank = input.shape().split(']').next().unwrap_or("").matches(',').count() + more;
            (input.name(), types[(dtype + i) % types.len()], extents.by_ref().take(rank).collect())
        })
        .collect();
    let parameters: Vec<(&str, Argument<'_>)> = entry
        .parameters()
        .iter()
        .map(|p| match p.kind() {
            ParameterKind::Int => (p.name(), Argument::Int(number)),
            ParameterKind::F32 => (p.name(), Argument::Real(f64::from_bits(number as u64))),
            ParameterKind::Bool => (p.name(), Argument::Bool(number % 2 == 0)),
            _ => (p.name(), Argument::Text(["e4m3fn", "f32", ""][number.unsigned_abs() as usize % 3])),
        })
        .collect();
    let name = format_args!("{} of {inputs:?}, {parameters:?}", entry.name());
    match survives(name, || entry.check(target, &inputs, &parameters)) {
        Ok(bound) => assert!(bound.outputs().iter().all(|t| t.bytes > 0), "{name}"),
        Err(e) => assert!(!e.to_string().is_empty()),
    }
}

#[test]
fn calls_of_any_extents() {
    for entry in bundled().kernels() {
        for target in [Target::Trn1, Target::Trn2, Target::Trn3] {
            for (i, extent) in EXTENTS.into_iter().enumerate() {
                for more in 0..3 {
                    let extents = [extent, EXTENTS[(i + 5) % EXTENTS.len()], extent];
                    for number in [0, 1, 32, -1, i64::MIN, i64::MAX] {
                        call(entry, target, more, i, &extents[..1 + i % 3], number);
                    }
                }
            }
        }
    }
}

#[test]
fn programs_on_chips_of_any_constants() {
    let chips = [
        Chip::trn2(),
        Chip { hbm_bandwidth: 0.0, ..Chip::trn3() },
        Chip { hbm_bandwidth: f64::NAN, cores: 0, sbuf_partition_bytes: 0, ..Chip::trn1() },
        Chip { cores: usize::MAX, psum_banks: usize::MAX, psum_bank_bytes: usize::MAX, ..Chip::trn3() },
    ];
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/programs");
    let mut costed = 0;
    for path in std::fs::read_dir(folder).expect("programs").flatten().map(|e| e.path()) {
        if path.extension().is_none_or(|e| e != "json") {
            continue;
        }
        let json = std::fs::read(&path).expect("a program");
        let program = Program::from_json(&json, &Limits::default()).expect("a checked-in program");
        for chip in &chips {
            let name = format_args!("cost of {} on {chip:?}", path.display());
            let cost = survives(name, || cost::estimate(&program, chip));
            assert_eq!(cost.spans.len(), program.instructions().len());
            let _ = survives(name, || (cost.critical_path(), cost.share_of_roofline(), cost.to_string()));
        }
        costed += 1;
    }
    assert!(costed > 0);
}

/// Pieces that a manifest is made of, and others.
fn piece() -> impl Strategy<Value = String> {
    prop_oneof![
        proptest::sample::select(
            &[
                "fits(x)",
                "(",
                ")",
                "[",
                "]",
                "|",
                "**",
                "/ 0",
                "max(t for t in range(0, 4096))",
                "-",
                "not ",
                " and ",
                "9999999999999999999999999999999999999999",
                "\"",
                "'",
                "M",
                "\n[[kernel]]\n",
                "é",
                "{ ",
                " }",
                "\u{0}",
            ][..]
        )
        .prop_map(String::from),
        "[ -~]{0,6}",
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn manifests_of_any_text(
        kernel in 0usize..7,
        cuts in proptest::collection::vec((any::<proptest::sample::Index>(), 0usize..8, piece()), 1..4),
    ) {
        let text = include_str!("../../kernels/manifest.toml");
        let entry = text.split("[[kernel]]").nth(1 + kernel).expect("seven kernels");
        let mut text: Vec<char> = format!("[[kernel]]{entry}").chars().collect();
        for (at, length, piece) in cuts {
            let at = at.index(text.len());
            text.splice(at..(at + length).min(text.len()), piece.chars());
        }
        let text: String = text.into_iter().collect();
        match survives(format_args!("manifest {text}"), || Manifest::parse(&text)) {
            Ok(manifest) => {
                for entry in manifest.kernels() {
                    call(entry, Target::Trn3, 1, 0, &[128, 1, 64], 64);
                }
            }
            Err(e) => prop_assert!(matches!(e, Error::Manifest { .. }), "{e}"),
        }
    }
}
