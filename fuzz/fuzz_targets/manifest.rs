//! A kernel manifest of any text, and calls of any numbers against what it says: each answers in bounded time. The input is a
//! manifest, then after a zero byte the numbers of a call; or `!` and a check over a tensor and a parameter.
#![no_main]
#![forbid(unsafe_code)]

use trn_kernels::Error;
use trn_kernels::trainium::manifest::{Argument, KernelEntry, Manifest, ParameterKind};
use trn_kernels::trainium::{Dtype, Target};

/// Extents and numbers out of bytes: mostly small ones, sometimes any.
struct Numbers<'a>(&'a [u8]);

impl Numbers<'_> {
    fn next(&mut self) -> u64 {
        let Some((first, rest)) = self.0.split_first() else { return 1 };
        self.0 = rest;
        match first {
            250..=255 => u64::MAX >> (255 - first),
            small => u64::from(*small),
        }
    }
}

/// A manifest of one kernel with this text as a check, a definition and an extent.
fn around(text: &str) -> String {
    let text: String = text.chars().filter(|c| !c.is_control() && !"\"\\".contains(*c)).collect();
    format!(
        r#"[[kernel]]
name = "k"
file = "k.py"
entry = "k"
targets = ["trn1", "trn2", "trn3"]
inputs = [{{ name = "x", dtype = "bf16 | u8", shape = "[M, K] | [M]" }}, {{ name = "y", dtype = "dtype of x", shape = "[M]", optional = true }}]
parameters = [{{ name = "n", kind = "int", optional = true }}, {{ name = "e", kind = "f32", default = 0.5 }}, {{ name = "a", kind = "u | v", default = "u" }}]
definitions = [{{ name = "D", value = "1" }}]
outputs = [{{ name = "z", dtype = "bf16", shape = "[M]" }}]
constraints = [{{ name = "c", text = "t", check = "{text}" }}]
"#
    )
}

fn call(entry: &KernelEntry, numbers: &mut Numbers<'_>) {
    let target = [Target::Trn1, Target::Trn2, Target::Trn3][numbers.next() as usize % 3];
    let types: Vec<Dtype> = Dtype::all().collect();
    let mut inputs = Vec::new();
    for input in entry.inputs() {
        // The first alternative's rank, or now and then another; the type that the manifest begins with is not to be seen.
        let rank = input.shape().split(']').next().unwrap_or_default().matches(',').count() + 1;
        let rank = if numbers.next() == 0 { numbers.next() as usize % 6 } else { rank };
        let dtype = types[numbers.next() as usize % types.len()];
        let shape: Vec<usize> = (0..rank.min(64)).map(|_| numbers.next() as usize).collect();
        if !input.optional() || numbers.next() % 2 == 0 {
            inputs.push((input.name(), dtype, shape));
        }
    }
    let mut parameters = Vec::new();
    for parameter in entry.parameters() {
        let number = numbers.next();
        let value = match parameter.kind() {
            ParameterKind::Int => Argument::Int(number as i64),
            ParameterKind::F32 => Argument::Real(f64::from_bits(number)),
            ParameterKind::Bool => Argument::Bool(number % 2 == 0),
            ParameterKind::OneOf(choices) => Argument::Text(&choices[number as usize % choices.len()]),
            _ => continue,
        };
        if number % 5 != 0 {
            parameters.push((parameter.name(), value));
        }
    }
    match entry.check(target, &inputs, &parameters) {
        Ok(bound) => {
            assert_eq!((bound.inputs().len(), bound.outputs().len()), (inputs.len(), entry.outputs().len()));
            for tensor in bound.inputs().iter().chain(bound.outputs()) {
                let elements = tensor.shape.iter().try_fold(1usize, |n, e| n.checked_mul(*e));
                assert_eq!(elements.and_then(|n| n.checked_mul(tensor.dtype.size())), Some(tensor.bytes));
            }
        }
        Err(Error::Constraint { constraint, .. }) => {
            assert!(entry.constraints().iter().any(|c| c.name() == constraint));
        }
        Err(e) => drop(e.to_string()),
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let at = data.iter().position(|b| *b == 0).unwrap_or(data.len());
    let (text, rest) = data.split_at(at);
    let Ok(text) = std::str::from_utf8(text) else { return };
    let made;
    let text = match text.strip_prefix('!') {
        None => text,
        Some(check) => {
            made = around(check);
            &made
        }
    };
    if let Ok(manifest) = Manifest::parse(text) {
        let mut numbers = Numbers(rest.get(1..).unwrap_or_default());
        for entry in manifest.kernels().iter().take(4) {
            call(entry, &mut numbers);
            call(entry, &mut numbers);
        }
    }
});
