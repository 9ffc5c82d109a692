//! Writes small device programs by hand.
#![allow(dead_code, unreachable_pub)] // each test binary uses its part

use serde_json::{Map, Value, json};
use trn_kernels::trainium::emulator::{Fault, Limits, Options, Program};

/// A program being written.
pub struct Device {
    target: &'static str,
    tensors: Vec<Value>,
    inputs: Vec<Value>,
    outputs: Vec<Value>,
    instructions: Vec<Value>,
}

impl Device {
    /// An empty program for a target.
    pub fn new(target: &'static str) -> Device {
        Device { target, tensors: vec![], inputs: vec![], outputs: vec![], instructions: vec![] }
    }

    /// A tensor; returns its number.
    pub fn tensor(&mut self, buffer: &str, dtype: &str, shape: &[usize]) -> usize {
        self.tensors.push(json!({"name": "", "shape": shape, "dtype": dtype, "buffer": buffer}));
        self.tensors.len() - 1
    }

    /// An input in HBM and an SBUF tensor that it is copied to; returns the SBUF tensor.
    pub fn input(&mut self, dtype: &str, shape: &[usize]) -> usize {
        let hbm = self.tensor("private_hbm", dtype, shape);
        self.inputs.push(json!({"name": format!("in_{hbm}"), "tensor": hbm}));
        let sbuf = self.tensor("sbuf", dtype, shape);
        self.copy(sbuf, hbm);
        sbuf
    }

    /// An output in HBM that an on-chip SBUF tensor is copied to.
    pub fn output(&mut self, from: usize) -> usize {
        let (dtype, shape) = (self.tensors[from]["dtype"].clone(), self.tensors[from]["shape"].clone());
        self.tensors.push(json!({"name": "", "shape": shape, "dtype": dtype, "buffer": "shared_hbm"}));
        let hbm = self.tensors.len() - 1;
        self.outputs.push(json!({"name": format!("output_{}", self.outputs.len()), "tensor": hbm}));
        self.copy(hbm, from);
        hbm
    }

    /// A DMA between whole tensors.
    pub fn copy(&mut self, dst: usize, src: usize) {
        let (dst, src) = (self.whole(dst), self.whole(src));
        self.op("dma_copy", "dma", &[("dst", dst)], &[("src", src)], json!({}));
    }

    /// All of a tensor as an operand.
    pub fn whole(&self, tensor: usize) -> Value {
        let shape: Vec<u64> =
            self.tensors[tensor]["shape"].as_array().unwrap().iter().map(|v| v.as_u64().unwrap()).collect();
        let mut dims = vec![];
        let mut stride = 1;
        for n in shape.iter().rev() {
            dims.insert(0, json!([stride, n]));
            stride *= n;
        }
        json!([tensor, self.tensors[tensor]["dtype"], 0, dims])
    }

    /// An instruction.
    pub fn op(&mut self, name: &str, engine: &str, writes: &[(&str, Value)], reads: &[(&str, Value)], attrs: Value) {
        let map = |list: &[(&str, Value)]| list.iter().map(|(k, v)| (k.to_string(), v.clone())).collect::<Map<_, _>>();
        self.instructions
            .push(json!({"name": name, "engine": engine, "writes": map(writes), "reads": map(reads), "attrs": attrs}));
    }

    /// An instruction on whole tensors.
    pub fn on(&mut self, name: &str, engine: &str, writes: &[(&str, usize)], reads: &[(&str, usize)], attrs: Value) {
        let writes: Vec<(&str, Value)> = writes.iter().map(|&(role, t)| (role, self.whole(t))).collect();
        let reads: Vec<(&str, Value)> = reads.iter().map(|&(role, t)| (role, self.whole(t))).collect();
        self.op(name, engine, &writes, &reads, attrs);
    }

    /// The program's text.
    pub fn json(&self) -> Vec<u8> {
        let value = json!({
            "format": "trn-kernels.program.1", "kernel": "test", "example": "test", "target": self.target, "sources": {}, "parameters": {},
            "inputs": self.inputs, "outputs": self.outputs, "tensors": self.tensors, "instructions": self.instructions,
        });
        value.to_string().into_bytes()
    }

    /// The loaded program.
    pub fn load(&self) -> Result<Program, Fault> {
        Program::from_json(&self.json(), &Limits::default())
    }

    /// Loads and runs it.
    pub fn run(&self, inputs: &[&[u8]], options: &Options) -> Result<Vec<Vec<u8>>, Fault> {
        self.load()?.run(inputs, options)
    }
}

/// Little-endian bytes of f32 values.
pub fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// f32 values of little-endian bytes.
pub fn f32_values(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// Little-endian bytes of bf16 values.
pub fn bf16_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect()
}
