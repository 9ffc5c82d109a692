//! The checked-in device programs of `kernels/programs`, each with its inputs and the simulator's outputs.
#![allow(dead_code, unreachable_pub)] // each test binary uses its part

use safetensors::SafeTensors;
use std::path::{Path, PathBuf};
use trn_kernels::trainium::emulator::{Dtype, Limits, Options, Port, Program};

/// The folder of the device kernels: beside this package, or above it for the workspace's other members.
pub fn kernels() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let found = package.ancestors().map(|a| a.join("kernels")).find(|k| k.join("programs").is_dir());
    found.expect("kernels/programs")
}

/// A program with its data.
pub struct Checked {
    /// File name without extension.
    pub name: String,
    /// The program's text.
    pub json: Vec<u8>,
    /// The program.
    pub program: Program,
    data: Vec<u8>,
}

/// Every program, sorted by name; fails if there are none.
pub fn all() -> Vec<Checked> {
    let mut names: Vec<String> = std::fs::read_dir(kernels().join("programs"))
        .expect("kernels/programs")
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter_map(|n| n.strip_suffix(".json").map(String::from))
        .collect();
    names.sort();
    assert!(!names.is_empty(), "kernels/programs has no programs");
    names.iter().map(|n| Checked::open(n)).collect()
}

/// The programs of one kernel; fails if there are none.
pub fn of(kernel: &str) -> Vec<Checked> {
    let found: Vec<Checked> = all().into_iter().filter(|c| c.program.kernel() == kernel).collect();
    assert!(!found.is_empty(), "kernels/programs has no program of {kernel}");
    found
}

/// The programs of large shapes, which have no data: their file names and themselves; fails if there are none.
pub fn large() -> Vec<(String, Program)> {
    let folder = kernels().join("programs/large");
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).expect("large").map(|e| e.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "kernels/programs/large has no programs");
    let open = |path: PathBuf| {
        let name = path.file_stem().and_then(|n| n.to_str()).expect("a name").to_owned();
        let program = Program::from_json(&std::fs::read(&path).unwrap(), &Limits::default());
        (name.clone(), program.unwrap_or_else(|e| panic!("{name}: {e}")))
    };
    files.into_iter().map(open).collect()
}

impl Checked {
    /// Opens `NAME.json` and `NAME.safetensors`.
    pub fn open(name: &str) -> Checked {
        let read = |suffix: &str| {
            let path = kernels().join("programs").join(format!("{name}.{suffix}"));
            std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        };
        let json = read("json");
        let program = Program::from_json(&json, &Limits::default()).unwrap_or_else(|e| panic!("{name}: {e}"));
        Checked { name: name.into(), json, program, data: read("safetensors") }
    }

    /// Whether the data has such a tensor.
    pub fn has(&self, tensor: &str) -> bool {
        SafeTensors::deserialize(&self.data).expect("safetensors").tensor(tensor).is_ok()
    }

    /// Bytes of `in.NAME` or `out.NAME`.
    pub fn bytes(&self, tensor: &str) -> Vec<u8> {
        let all = SafeTensors::deserialize(&self.data).expect("safetensors");
        all.tensor(tensor).unwrap_or_else(|e| panic!("{}: {tensor}: {e}", self.name)).data().to_vec()
    }

    /// How far another order of additions may take each element of an output; `None` if not at all.
    pub fn bound(&self, output: &str) -> Option<Vec<f64>> {
        let name = format!("bound.{output}");
        let words = |b: &[u8]| f64::from_le_bytes(b.try_into().unwrap());
        self.has(&name).then(|| self.bytes(&name).chunks_exact(8).map(words).collect())
    }

    /// The program's inputs, in order.
    pub fn inputs(&self) -> Vec<Vec<u8>> {
        self.program.inputs().iter().map(|p| self.bytes(&format!("in.{}", p.name))).collect()
    }

    /// Runs the program on its inputs.
    pub fn run(&self, options: &Options) -> Vec<Vec<u8>> {
        let inputs = self.inputs();
        let inputs: Vec<&[u8]> = inputs.iter().map(Vec::as_slice).collect();
        self.program.run(&inputs, options).unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }

    /// Element type of a port.
    pub fn dtype(&self, port: &Port) -> Dtype {
        self.program.tensors()[port.tensor].dtype()
    }

    /// Shape of a port.
    pub fn shape(&self, port: &Port) -> &[usize] {
        self.program.tensors()[port.tensor].shape()
    }

    /// The input called `name`.
    pub fn input(&self, name: &str) -> &Port {
        let found = self.program.inputs().iter().find(|p| p.name == name);
        found.unwrap_or_else(|| panic!("{}: no input {name}", self.name))
    }
}

/// Values of a tensor's bytes.
pub fn values(dtype: Dtype, bytes: &[u8]) -> Vec<f64> {
    let words = |f: fn(&[u8]) -> f64| bytes.chunks_exact(dtype.size()).map(f).collect();
    match dtype {
        Dtype::Float32 | Dtype::Tfloat32 => words(|b| f32::from_le_bytes(b.try_into().unwrap()).into()),
        Dtype::Bfloat16 => words(|b| half::bf16::from_le_bytes(b.try_into().unwrap()).to_f64()),
        Dtype::Float16 => words(|b| half::f16::from_le_bytes(b.try_into().unwrap()).to_f64()),
        Dtype::Int32 => words(|b| i32::from_le_bytes(b.try_into().unwrap()).into()),
        Dtype::Uint8 => words(|b| b[0].into()),
        Dtype::Float8E4M3 | Dtype::Float8E4M3Fn | Dtype::Float8E5M2 => {
            let table = dtype.fp8().unwrap().values();
            bytes.iter().map(|&b| table[usize::from(b)].into()).collect()
        }
        other => panic!("no values of {}", other.name()),
    }
}
