//! Reads golden files: tensors from `NAME.safetensors`, cases and conventions from `NAME.json`.
//!
//! The directory is `TRN_KERNELS_GOLDEN` if set, else `tests/golden`. Nothing about the data is known here but its format.
#![allow(dead_code, unreachable_pub)] // each test binary uses its part

use half::bf16;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Mutex;

/// Where the golden files are.
pub fn golden_dir() -> PathBuf {
    match std::env::var_os("TRN_KERNELS_GOLDEN") {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden"),
    }
}

/// One golden file with its manifest.
pub struct Golden {
    name: String,
    /// The manifest.
    pub manifest: Value,
    bytes: Vec<u8>,
    read: Mutex<BTreeSet<String>>,
}

impl Golden {
    /// Opens `NAME.safetensors` and `NAME.json` (`NAME` may hold a folder).
    pub fn open(name: &str) -> Golden {
        let read = |suffix: &str| {
            let path = golden_dir().join(format!("{name}.{suffix}"));
            std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
        };
        let manifest = serde_json::from_slice(&read("json")).expect("manifest is JSON");
        Golden { name: name.into(), manifest, bytes: read("safetensors"), read: Mutex::default() }
    }

    /// The manifest's cases; fails if there are none, so that a loop over them cannot be empty by accident.
    pub fn cases(&self) -> &[Value] {
        let cases = self.manifest["cases"].as_array().expect("cases");
        assert!(!cases.is_empty(), "{}: the manifest has no cases", self.name);
        cases
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).expect("golden file is safetensors")
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.tensors().names().iter().map(|n| n.to_string()).collect();
        names.sort();
        names
    }

    /// Whether there is such a tensor.
    pub fn has(&self, tensor: &str) -> bool {
        self.tensors().tensor(tensor).is_ok()
    }

    /// A tensor's shape.
    pub fn shape(&self, tensor: &str) -> Vec<usize> {
        let all = self.tensors();
        let t = all.tensor(tensor).unwrap_or_else(|e| panic!("{}: tensor {tensor}: {e}", self.name));
        t.shape().to_vec()
    }

    /// A tensor's two extents.
    pub fn shape2(&self, tensor: &str) -> (usize, usize) {
        match self.shape(tensor)[..] {
            [rows, cols] => (rows, cols),
            ref other => panic!("{}: {tensor} has shape {other:?}, not two axes", self.name),
        }
    }

    /// What stands before `suffix` in the names that end with it, sorted; fails if there is no such name.
    pub fn stems(&self, suffix: &str) -> Vec<String> {
        let stems: Vec<String> = self.names().iter().filter_map(|n| Some(n.strip_suffix(suffix)?.to_owned())).collect();
        assert!(!stems.is_empty(), "{}: no tensor is named *{suffix}", self.name);
        stems
    }

    /// Fails if the data of some tensor was never asked for: a test that covers the file uses all of it.
    pub fn assert_all_read(&self) {
        let read = self.read.lock().expect("no test panicked while reading");
        let unread: Vec<String> = self.names().into_iter().filter(|n| !read.contains(n)).collect();
        assert!(unread.is_empty(), "{}: tensors that no check used: {unread:?}", self.name);
    }

    fn get(&self, tensor: &str) -> (Dtype, Vec<usize>, Vec<u8>) {
        let all = self.tensors();
        let t = all.tensor(tensor).unwrap_or_else(|e| panic!("{}: tensor {tensor}: {e}", self.name));
        self.read.lock().expect("no test panicked while reading").insert(tensor.into());
        (t.dtype(), t.shape().to_vec(), t.data().to_vec())
    }

    fn words<const N: usize, T>(&self, tensor: &str, want: Dtype, from: impl Fn([u8; N]) -> T) -> Vec<T> {
        let (dtype, _, data) = self.get(tensor);
        assert_eq!(dtype, want, "{}: dtype of {tensor}", self.name);
        data.chunks_exact(N).map(|c| from(c.try_into().unwrap())).collect()
    }

    /// Raw bytes of a tensor of any dtype.
    pub fn bytes(&self, tensor: &str) -> Vec<u8> {
        self.get(tensor).2
    }

    /// A U8 tensor.
    pub fn u8(&self, tensor: &str) -> Vec<u8> {
        self.words(tensor, Dtype::U8, |[b]: [u8; 1]| b)
    }

    /// A U32 tensor.
    pub fn u32(&self, tensor: &str) -> Vec<u32> {
        self.words(tensor, Dtype::U32, u32::from_le_bytes)
    }

    /// An I32 tensor.
    pub fn i32(&self, tensor: &str) -> Vec<i32> {
        self.words(tensor, Dtype::I32, i32::from_le_bytes)
    }

    /// An I64 tensor.
    pub fn i64(&self, tensor: &str) -> Vec<i64> {
        self.words(tensor, Dtype::I64, i64::from_le_bytes)
    }

    /// An F32 tensor.
    pub fn f32(&self, tensor: &str) -> Vec<f32> {
        self.words(tensor, Dtype::F32, f32::from_le_bytes)
    }

    /// An F64 tensor.
    pub fn f64(&self, tensor: &str) -> Vec<f64> {
        self.words(tensor, Dtype::F64, f64::from_le_bytes)
    }

    /// A BF16 tensor.
    pub fn bf16(&self, tensor: &str) -> Vec<bf16> {
        self.words(tensor, Dtype::BF16, bf16::from_le_bytes)
    }

    /// F32, F64 or BF16 as f64: for comparisons.
    pub fn real(&self, tensor: &str) -> Vec<f64> {
        match self.get(tensor).0 {
            Dtype::F32 => self.f32(tensor).into_iter().map(f64::from).collect(),
            Dtype::F64 => self.f64(tensor),
            Dtype::BF16 => self.bf16(tensor).into_iter().map(f64::from).collect(),
            other => panic!("{}: {tensor} is {other:?}, not a real tensor", self.name),
        }
    }
}

/// An unsigned field of a case.
pub fn uint(case: &Value, key: &str) -> usize {
    case[key].as_u64().unwrap_or_else(|| panic!("case {case}: no unsigned field {key}")) as usize
}

/// A number field of a case.
pub fn number(case: &Value, key: &str) -> f64 {
    case[key].as_f64().unwrap_or_else(|| panic!("case {case}: no number {key}"))
}

/// A text field of a case.
pub fn text<'a>(case: &'a Value, key: &str) -> &'a str {
    case[key].as_str().unwrap_or_else(|| panic!("case {case}: no text {key}"))
}

/// A flag of a case.
pub fn flag(case: &Value, key: &str) -> bool {
    case[key].as_bool().unwrap_or_else(|| panic!("case {case}: no flag {key}"))
}
