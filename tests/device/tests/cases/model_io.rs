//! NEFFs and what models take and give: cases 18, 19, 21, 22, 34 to 37.
#![forbid(unsafe_code)]

use device_tests::programs::{self, Checked};
use device_tests::{Emulated, Session, flag};
use std::sync::Arc;
use trn_kernels::neuron::{
    ALIAS_SUFFIX, DeviceDtype, Expected, NeuronError, Status, StatusClass, TensorSet, Usage, Version, neff,
};

const SMALL: &str = "matmul_fp8.tensor_exact";

fn neff_of(name: &str) -> Vec<u8> {
    neff::emulated(&Checked::open(name).json, false).unwrap()
}

#[test]
fn case_18_broken_neffs_never_reach_the_library() {
    let session = Session::open();
    let good = neff_of(SMALL);
    let with = |at: usize, bytes: &[u8]| {
        let mut neff = good.clone();
        neff[at..at + bytes.len()].copy_from_slice(bytes);
        neff
    };
    let broken = [
        ("empty", vec![]),
        ("one byte short of a header", good[..1023].to_vec()),
        ("one byte short", good[..good.len() - 1].to_vec()),
        ("one byte too many", [&good[..], &[0]].concat()),
        ("another header size", with(8, &1025u64.to_le_bytes())),
        ("another data size", with(16, &1u64.to_le_bytes())),
        ("a data size that overflows", with(16, &u64::MAX.to_le_bytes())),
        ("an unknown package version", with(0, &9u64.to_le_bytes())),
        ("a payload that is no archive", with(1024, &[0; 1024])),
    ];
    let calls = session.emulated.log();
    for (what, neff) in broken {
        let refused = session.runtime.load(&neff, 0).unwrap_err();
        assert!(matches!(&refused, NeuronError::Neff { problem } if !problem.is_empty()), "{what}: {refused:?}");
    }
    let refused = session.runtime.load(&good, 2).unwrap_err();
    assert_eq!(refused, NeuronError::NoSuchCore { core: 2, visible: 2 });
    assert_eq!(session.emulated.log(), calls, "the library was called");
    // A name that fills its field is a name; the library reads the same header.
    let long = with(220, &[b'n'; 256]);
    drop(session.runtime.load(&long, 0).unwrap());
    // What only the library can see, it refuses: two bytes within the archive.
    let definition = good.windows(5).position(|w| w == b"\"var\"").unwrap();
    let refused = session.runtime.load(&with(definition, b"?"), 0).unwrap_err();
    assert_eq!(refused, NeuronError::Call { op: "nrt_load", status: Status::INVALID });
    session.end();
}

#[test]
fn case_19_refused_loads_have_a_class_and_leave_nothing() {
    use StatusClass::{CallerBug, Capacity, Other, Poison};
    let neff = neff_of(SMALL);
    for (status, class) in [(4, Capacity), (9, Capacity), (10, CallerBug), (1, Other), (2, CallerBug), (6, Poison)] {
        let session = Session::open();
        session.emulated.inject("nrt_load", status, 0, 1);
        let refused = session.runtime.load(&neff, 0).unwrap_err();
        assert_eq!(refused, NeuronError::Call { op: "nrt_load", status: Status(status) });
        assert_eq!(refused.class(), Some(class));
        let again = session.runtime.load(&neff, 0);
        if class == Poison {
            // What a NEFF for another chip answers is also what a broken device answers: the safe reading is the second.
            assert_eq!(again.unwrap_err(), NeuronError::Poisoned { status: Status(status) });
            session.assert_live(0);
        } else {
            drop(again.unwrap());
            session.end();
        }
    }
    // As the library itself answers them.
    let session = Session::open();
    let mut greedy = neff.clone();
    greedy[476] = 3;
    let refused = session.runtime.load(&greedy, 0).unwrap_err();
    assert_eq!((refused.status(), refused.class()), (Some(Status(9)), Some(Capacity)));
    session.emulated.set_memory(16);
    let refused = session.runtime.allocate(0, 17, "too much").unwrap_err();
    assert_eq!((refused.status(), refused.class()), (Some(Status(4)), Some(Capacity)));
    session.end();
}

#[test]
fn case_21_the_bytes_of_a_neff_are_the_callers_again_after_the_load() {
    let session = Session::open();
    let checked = Checked::open(SMALL);
    let mut bytes = neff::emulated(&checked.json, true).unwrap();
    let model = session.runtime.load(&bytes, 0).unwrap();
    bytes.fill(0xEE);
    drop(bytes);
    let mut bound = session.bind(&checked, 0);
    bound.model = Arc::new(model);
    bound.assert_runs();
    drop(bound);
    session.end();
}

#[test]
fn case_22_tables_of_tensors_that_cannot_be_believed() {
    let neff = neff_of(SMALL);
    let refusals =
        [(flag::INFO_COUNT_ABSURD, "counted"), (flag::INFO_NDIM_ABSURD, "extents"), (flag::INFO_NULL, "null")];
    let session = Session::open();
    for (bit, problem) in refusals {
        session.emulated.set_flags(bit);
        match session.runtime.load(&neff, 0).unwrap_err() {
            NeuronError::Answer { op: "nrt_get_model_tensor_info", problem: said } if said.contains(problem) => {}
            other => panic!("{problem}: {other:?}"),
        }
        session.assert_live(0);
    }
    // Every table that was handed out was given back, once, and the models with them.
    let calls = |name| session.emulated.calls(name);
    assert_eq!(
        calls("nrt_free_model_tensor_info"),
        calls("nrt_get_model_tensor_info") - 1,
        "a null table is not freed"
    );
    assert_eq!(calls("nrt_unload"), calls("nrt_load"));

    session.emulated.set_flags(flag::INFO_COUNT_ZERO);
    let model = session.runtime.load(&neff, 0).unwrap();
    assert_eq!((model.inputs(), model.outputs()), (&[][..], &[][..]));
    drop(model);
    session.emulated.set_flags(flag::INFO_NDIM_ZERO);
    let model = session.runtime.load(&neff, 0).unwrap();
    assert!(model.inputs().iter().chain(model.outputs()).all(|d| d.shape.is_empty() && d.bytes > 0));
    drop(model);
    // The array is rubbish once freed; what the model tells is as it was before.
    session.emulated.set_flags(0);
    let checked = Checked::open(SMALL);
    let model = session.runtime.load(&neff, 0).unwrap();
    for port in checked.program.inputs() {
        let tensor = &checked.program.tensors()[port.tensor];
        let desc = model.inputs().iter().find(|d| d.name == port.name).unwrap();
        let shape: Vec<usize> = desc.shape.iter().map(|n| *n as usize).collect();
        assert_eq!((desc.bytes, &shape[..]), (tensor.bytes() as u64, tensor.shape()), "{}", port.name);
    }
    drop(model);
    session.end();
}

/// A program of one input and one output with these names, both of 8 bytes; the output is a copy.
fn copies(input: &str, output: &str) -> Vec<u8> {
    let text = r#"{"format":"trn-kernels.program.1","kernel":"copy","example":"e","target":"trn2","sources":{},"parameters":{},
        "inputs":[{"name":"INPUT","tensor":0}],"outputs":[{"name":"OUTPUT","tensor":1}],
        "tensors":[{"name":"","shape":[8],"dtype":"uint8","buffer":"private_hbm"},
        {"name":"","shape":[8],"dtype":"uint8","buffer":"shared_hbm"}],
        "instructions":[{"name":"dma_copy","engine":"dma","writes":{"dst":[1,"uint8",0,[[1,8]]]},"reads":{"src":[0,"uint8",0,[[1,8]]]},"attrs":{}}]}"#;
    neff::emulated(text.replace("INPUT", input).replace("OUTPUT", output).as_bytes(), false).unwrap()
}

#[test]
fn case_22_names_of_every_length() {
    let session = Session::open();
    for len in [1, 254, 255] {
        let (input, output) = ("i".repeat(len), "o".repeat(len));
        let model = session.runtime.load(&copies(&input, &output), 0).unwrap();
        let (mut inputs, mut outputs) = (set(&session, &[(&input, 8)]), set(&session, &[(&output, 8)]));
        inputs.get(&input).unwrap().write(0, b"by name!").unwrap();
        model.execute(&inputs, &mut outputs).unwrap();
        let mut got = [0; 8];
        outputs.get(&output).unwrap().read(0, &mut got).unwrap();
        assert_eq!(&got, b"by name!");
        // One byte of the name less is another name.
        let wrong = set(&session, &[(&input[1..], 8)]);
        if len > 1 {
            inputs = wrong;
            assert!(matches!(model.execute(&inputs, &mut outputs), Err(NeuronError::NoSuchTensor { .. })));
        }
        drop((model, inputs, outputs));
    }
    session.end();
}

/// Names of 256 bytes without a NUL: the whole field is the name.
#[test]
fn case_22_an_unterminated_name() {
    let session = Session::open();
    session.emulated.set_flags(flag::INFO_NAME_UNTERMINATED);
    let model = session.runtime.load(&copies("x", "y"), 0).unwrap();
    assert_eq!((model.inputs()[0].name.len(), model.outputs()[0].name.len()), (256, 256));
    drop(model);
    session.end();
}

/// A set of fresh tensors on core 0.
fn set(session: &Session, members: &[(&str, usize)]) -> TensorSet {
    let mut set = TensorSet::new(&session.runtime, 0).unwrap();
    for (name, bytes) in members.iter().filter(|(name, _)| !name.is_empty()) {
        set.insert(name, Arc::new(session.runtime.allocate(0, *bytes, name).unwrap())).unwrap();
    }
    set
}

#[test]
fn case_34_tensors_updated_in_place() {
    let session = Session::open();
    for checked in programs::of("kv_append") {
        let mut bound = session.bind(&checked, 0);
        bound.assert_runs();
        let alias = format!("k_cache{ALIAS_SUFFIX}");
        assert_eq!(bound.model.io().aliases.len(), 2);
        assert!(Arc::ptr_eq(bound.inputs.get(&alias).unwrap(), bound.outputs.get("k_cache").unwrap()));
        // Two tensors where one is needed: refused by name before the library is asked.
        let len = bound.output(0).len();
        let calls = session.emulated.log().len();
        let other = Arc::new(session.runtime.allocate(0, len, "other").unwrap());
        bound.outputs.insert("k_cache", Arc::clone(&other)).unwrap();
        assert_eq!(bound.execute(), Err(NeuronError::NotAliased { input: alias.clone() }));
        assert_eq!(session.emulated.log().len(), calls + 3, "allocate, its size, insert; no execute");
        // Both halves changed: it is that tensor which is updated now.
        let recorded = checked.bytes("in.k_cache");
        other.write(0, &recorded).unwrap();
        bound.inputs.insert(&alias, other).unwrap();
        bound.execute().unwrap();
        assert!(bound.read(0).unwrap() == bound.wanted[0].1);
        drop(bound);
        session.assert_live(0);
    }
    session.end();
}

#[test]
fn case_35_sets_that_do_not_fit_are_refused_by_name() {
    let session = Session::open();
    refuse_every_misfit(&session);
    session.end();
}

fn refuse_every_misfit(session: &Session) {
    let checked = Checked::open(SMALL);
    let mut bound = session.bind(&checked, 0);
    bound.execute().unwrap();
    let sizes: Vec<(String, usize)> = bound.model.inputs().iter().map(|d| (d.name.clone(), d.bytes as usize)).collect();
    let inputs: Vec<(&str, usize)> = sizes.iter().map(|(n, b)| (n.as_str(), *b)).collect();
    let output = ("output_0", bound.wanted[0].1.len());
    let calls = session.emulated.calls("nrt_execute");
    let refused = |inputs: &TensorSet, outputs: &mut TensorSet, words: &[&str]| {
        let said = bound.model.execute(inputs, outputs).unwrap_err().to_string();
        assert!(words.iter().all(|w| said.contains(w)), "{said:?} lacks one of {words:?}");
    };
    let good = || (set(session, &inputs), set(session, &[output]));
    let (i, mut o) = (set(session, &inputs[1..]), set(session, &[output]));
    refused(&i, &mut o, &[inputs[0].0, "input not in the set"]);
    let (i, mut o) = (set(session, &[&inputs[..], &[("extra", 4)]].concat()), set(session, &[output]));
    refused(&i, &mut o, &["extra", "no such input", "w_scale"]);
    let (i, mut o) = (set(session, &inputs), set(session, &[output, ("zz", 4)]));
    refused(&i, &mut o, &["zz", "no such output"]);
    let (mut i, o) = good();
    refused(&o, &mut i, &["output_0", "no such input"]);
    let (mut i, mut o) = good();
    i.insert("x", Arc::new(session.runtime.allocate(0, 7, "x").unwrap())).unwrap();
    refused(&i, &mut o, &["x: 7 bytes, needed 8064"]);
    // A set of another core; a tensor of another core does not even enter a set.
    let (i, _) = good();
    let mut far = TensorSet::new(&session.runtime, 1).unwrap();
    refused(&i, &mut far, &["the set of outputs: on core 1, needed on core 0"]);
    let there = Arc::new(session.runtime.allocate(1, output.1, "there").unwrap());
    let (_, mut o) = good();
    let wrong = NeuronError::WrongCore { tensor: "output_0".into(), got: 1, needed: 0 };
    assert_eq!(o.insert("output_0", Arc::clone(&there)), Err(wrong));
    // Another runtime's set and tensor.
    let other = Session::open();
    let mut foreign = set(&other, &[output]);
    refused(&i, &mut foreign, &["the set of outputs: belongs to another runtime"]);
    let foreign_tensor = Arc::new(other.runtime.allocate(0, output.1, "foreign").unwrap());
    assert!(matches!(o.insert("output_0", foreign_tensor), Err(NeuronError::OtherRuntime { .. })));
    drop(foreign);
    other.end();
    // An output in the memory of an input.
    let (mut i, mut o) = good();
    let both = session.runtime.allocate(0, 2 * 8064, "both").unwrap();
    i.insert("x", Arc::new(both.slice(0, 8064, "first").unwrap())).unwrap();
    o.insert("output_0", Arc::new(both.slice(8064 - 4, output.1, "second").unwrap())).unwrap();
    refused(&i, &mut o, &["first to second: the ranges overlap"]);
    // A set that fitted is looked at again once it has changed.
    let (mut i, mut o) = good();
    bound.model.execute(&i, &mut o).unwrap();
    i.insert("x", Arc::new(session.runtime.allocate(0, 8, "x").unwrap())).unwrap();
    assert!(matches!(bound.model.execute(&i, &mut o), Err(NeuronError::SizeMismatch { .. })));
    assert_eq!(session.emulated.calls("nrt_execute"), calls + 1);
}

#[test]
fn case_36_quarter_sizes_of_packed_types_by_version() {
    let name = "matmul_mx.mxfp8";
    let (checked, neff) = (Checked::open(name), neff_of(name));
    let w = checked.program.tensors()[checked.input("w").tensor].bytes() as u64;
    let expected = Expected { bytes: w, dtype: None, packed_x4: true };
    for (version, flags, quarter, taken) in [
        ([2, 32, 31, 0], 0, true, true),
        ([2, 33, 0, 0], flag::X4_QUARTER_SIZE, true, false),
        ([2, 34, 10, 0], 0, false, true),
    ] {
        let emulated = Emulated::new();
        emulated.set_version(version);
        emulated.set_flags(flags);
        let session = Session::on(emulated);
        let mut model = session.runtime.load(&neff, 0).unwrap();
        let reported = model.inputs().iter().find(|d| d.name == "w").unwrap().bytes;
        assert_eq!(reported, if quarter { w / 4 } else { w }, "{version:?}");
        match model.expect(Usage::Input, "w", &expected) {
            Ok(()) if taken => {
                assert_eq!(model.inputs().iter().find(|d| d.name == "w").unwrap().bytes, w, "the true size is used");
                assert_eq!(model.warnings().len(), usize::from(quarter), "{:?}", model.warnings());
                let mut bound = session.bind(&checked, 0);
                bound.model = Arc::new(model);
                bound.assert_runs();
            }
            Err(NeuronError::SizeMismatch { tensor, got, needed }) if !taken => {
                assert_eq!((tensor.as_str(), got, needed), ("w", w / 4, w));
                drop(model);
            }
            other => panic!("{version:?}: {other:?}"),
        }
        session.end();
    }
}

#[test]
fn case_37_reported_types_are_a_hint() {
    let checked = Checked::open("attention_decode.fp8_ieee");
    let neff = neff::emulated(&checked.json, false).unwrap();
    let session = Session::open();
    let bytes = checked.program.tensors()[checked.input("k_cache").tensor].bytes() as u64;
    let expected = Expected { bytes, dtype: Some(DeviceDtype::Fp8E4), packed_x4: false };
    // As it should be; FP8 as INT8; numbers of another release; no type at all.
    for (flags, reported) in [
        (0, DeviceDtype::Fp8E4),
        (flag::FP8_AS_INT8, DeviceDtype::Int8),
        (flag::LEGACY_DTYPES, DeviceDtype::Uint16),
        (flag::INFO_DTYPE_UNKNOWN, DeviceDtype::Unknown),
    ] {
        session.emulated.set_flags(flags);
        let mut model = session.runtime.load(&neff, 0).unwrap();
        let got = model.inputs().iter().find(|d| d.name == "k_cache").unwrap().dtype;
        if flags != flag::LEGACY_DTYPES {
            assert_eq!(got, reported);
        }
        model.expect(Usage::Input, "k_cache", &expected).unwrap();
        let warned = model.warnings().iter().any(|w| w.contains("k_cache"));
        assert_eq!(warned, got != DeviceDtype::Fp8E4, "{got:?}: {:?}", model.warnings());
        let mut bound = session.bind(&checked, 0);
        bound.model = Arc::new(model);
        bound.assert_runs();
    }
    session.end();
    // The old table, by the version.
    let emulated = Emulated::new();
    emulated.set_version([2, 29, 40, 0]);
    let session = Session::on(emulated);
    assert_eq!(session.runtime.version(), Version::new(2, 29, 40));
    let model = session.runtime.load(&neff, 0).unwrap();
    assert_eq!(model.inputs().iter().find(|d| d.name == "q").unwrap().dtype, DeviceDtype::Bfloat16);
    drop(model);
    session.end();
}
