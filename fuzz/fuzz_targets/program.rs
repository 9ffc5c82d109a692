//! A device program of any JSON: loading answers, and what loads can be run and costed. The input is a program; or, if it does not
//! begin with `{`, a choice of one of the checked-in programs and edits of its tree, which stay JSON and so reach further.
#![no_main]
#![forbid(unsafe_code)]

use serde_json::Value;
use std::sync::OnceLock;
use trn_kernels::trainium::Chip;
use trn_kernels::trainium::cost;
use trn_kernels::trainium::emulator::{Limits, Options, Program};

/// Small, but every checked-in program loads under them.
const LIMITS: Limits = Limits { json_bytes: 1 << 17, tensor_bytes: 32 << 20, work: 1 << 28 };
/// Numbers that extents, strides and offsets stumble over.
const NUMBERS: [u64; 16] =
    [0, 1, 2, 3, 4, 31, 127, 128, 129, 512, 1 << 11, 1 << 17, 1 << 31, 1 << 32, u64::MAX >> 1, u64::MAX];

fn programs() -> &'static [Value] {
    static PROGRAMS: OnceLock<Vec<Value>> = OnceLock::new();
    PROGRAMS.get_or_init(|| {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../kernels/programs");
        let mut paths: Vec<_> = std::fs::read_dir(folder).expect("programs").flatten().map(|e| e.path()).collect();
        paths.retain(|p| p.extension().is_some_and(|e| e == "json"));
        paths.sort();
        let read = |path| {
            let json = std::fs::read(path).expect("a program");
            Program::from_json(&json, &LIMITS).expect("limits that the checked-in programs meet");
            serde_json::from_slice(&json).expect("JSON")
        };
        paths.into_iter().map(read).collect()
    })
}

/// Nodes of a tree.
fn size(value: &Value) -> usize {
    1 + match value {
        Value::Array(list) => list.iter().map(size).sum(),
        Value::Object(map) => map.values().map(size).sum(),
        _ => 0,
    }
}

/// Node `n`, counted from the root down.
fn node(value: &mut Value, n: usize) -> Option<&mut Value> {
    let mut left = match n.checked_sub(1) {
        None => return Some(value),
        Some(left) => left,
    };
    let children: Vec<&mut Value> = match value {
        Value::Array(list) => list.iter_mut().collect(),
        Value::Object(map) => map.values_mut().collect(),
        _ => return None,
    };
    for child in children {
        let inside = size(child);
        if left < inside {
            return node(child, left);
        }
        left -= inside;
    }
    None
}

fn edit(program: &mut Value, edit: &[u8; 4]) {
    let [how, high, low, what] = *edit;
    let nodes = size(program);
    let at = usize::from(u16::from_be_bytes([high, low])) % nodes;
    let what = usize::from(what);
    // Something else of the same program, with its meaning.
    let other = node(program, (at + 1 + what) % nodes).map(|v| v.clone()).unwrap_or_default();
    let Some(target) = node(program, at) else { return };
    match (how % 4, &mut *target) {
        (0, Value::Number(_)) => *target = NUMBERS[what % NUMBERS.len()].into(),
        (0, Value::Array(list)) | (1, Value::Array(list)) if !list.is_empty() => {
            let at = what % list.len();
            if how % 4 == 0 { drop(list.remove(at)) } else { list.insert(at, list[at].clone()) }
        }
        (1, Value::Number(n)) => *target = n.as_i64().unwrap_or(0).wrapping_add(what as i64 - 128).into(),
        (2, Value::Object(map)) => {
            if let Some(key) = map.keys().nth(what % map.len().max(1)).cloned() {
                map.remove(&key);
            }
        }
        _ => *target = other,
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((first, rest)) = data.split_first() else { return };
    let edited;
    let json = if *first == b'{' {
        data
    } else {
        let mut program = programs()[usize::from(*first) % programs().len()].clone();
        for change in rest.as_chunks::<4>().0.iter().take(8) {
            edit(&mut program, change);
        }
        edited = program.to_string();
        edited.as_bytes()
    };
    let Ok(program) = Program::from_json(json, &LIMITS) else { return };
    for chip in [program.target().chip(), Chip::trn1()] {
        let cost = cost::estimate(&program, &chip);
        assert!(cost.critical_path().iter().all(|i| *i < program.instructions().len()));
    }
    let inputs: Vec<Vec<u8>> =
        program.inputs().iter().map(|p| vec![0x38; program.tensors()[p.tensor].bytes()]).collect();
    let inputs: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
    if let Ok(outputs) = program.run(&inputs, &Options::default()) {
        assert_eq!(outputs.len(), program.outputs().len());
    }
});
