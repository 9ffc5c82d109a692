//! Writes small safetensors and GGUF files, good and bad, and reads everything that a file offers.
#![allow(dead_code, unreachable_pub)] // each test binary and fuzz target uses its part

use trn_kernels::checkpoint::{Checkpoint, Gguf, GptOss, gguf::Value};

/// A file with this header text, whatever it says, and these bytes behind it.
pub fn raw_safetensors(header: impl AsRef<[u8]>, data: &[u8]) -> Vec<u8> {
    let header = header.as_ref();
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

/// A good file: name, dtype, shape, bytes.
pub fn safetensors(tensors: &[(&str, &str, &[usize], &[u8])]) -> Vec<u8> {
    let (mut entries, mut data) = (Vec::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let (start, end) = (data.len(), data.len() + bytes.len());
        entries.push(format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#));
        data.extend_from_slice(bytes);
    }
    raw_safetensors(format!("{{{}}}", entries.join(",")), &data)
}

/// A GGUF file in pieces, so that a test can spoil any of them.
pub struct GgufFile {
    pub magic: [u8; 4],
    pub version: u32,
    /// Written instead of the true number of keys and tensors.
    pub counts: Option<(u64, u64)>,
    /// Key, type code, bytes of the value.
    pub keys: Vec<(String, u32, Vec<u8>)>,
    pub tensors: Vec<GgufEntry>,
    pub alignment: usize,
    pub data: Vec<u8>,
}

pub struct GgufEntry {
    pub name: String,
    /// Fastest axis first, as the file has it.
    pub extents: Vec<u64>,
    pub ggml_type: u32,
    pub offset: u64,
}

pub fn gguf_string(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes(), s.as_bytes()].concat()
}

/// The bytes of an array value.
pub fn gguf_array(element: u32, count: u64, elements: &[u8]) -> Vec<u8> {
    [&element.to_le_bytes(), &count.to_le_bytes()[..], elements].concat()
}

impl GgufFile {
    /// A file with every value type and an F32, an MXFP4 and a stacked MXFP4 tensor.
    pub fn good() -> Self {
        let words = [gguf_string("a"), gguf_string("bc")].concat();
        let nested = [gguf_array(0, 2, &[1, 2]), gguf_array(8, 2, &words)].concat();
        let values: [(u32, Vec<u8>); 15] = [
            (0, vec![200]),
            (1, vec![200]),
            (2, 60000u16.to_le_bytes().into()),
            (3, (-2i16).to_le_bytes().into()),
            (4, 7u32.to_le_bytes().into()),
            (5, (-7i32).to_le_bytes().into()),
            (6, 1.5f32.to_le_bytes().into()),
            (7, vec![1]),
            (8, gguf_string("gpt-oss")),
            (9, gguf_array(5, 2, &[1, 0, 0, 0, 2, 0, 0, 0])),
            (10, u64::MAX.to_le_bytes().into()),
            (11, i64::MIN.to_le_bytes().into()),
            (12, 2.5f64.to_le_bytes().into()),
            (9, gguf_array(9, 2, &nested)),
            (9, gguf_array(7, 3, &[0, 1, 0])),
        ];
        let keys =
            values.into_iter().enumerate().map(|(i, (code, bytes))| (format!("key.{i:02}"), code, bytes)).collect();
        let entry = |name: &str, extents: &[u64], ggml_type, offset| GgufEntry {
            name: name.into(),
            extents: extents.into(),
            ggml_type,
            offset,
        };
        // 3 f32 = 12 bytes; 2 rows of 2 blocks of 17 bytes = 68; 2 experts of 1 row of 1 block = 34.
        let tensors =
            vec![entry("norm", &[3], 0, 0), entry("weight", &[64, 2], 39, 32), entry("experts", &[32, 1, 2], 39, 128)];
        let mut data: Vec<u8> = (0..162u32).map(|i| (i * 37 % 127) as u8).collect();
        data[..12].copy_from_slice(&[1.0f32, -2.0, 0.5].map(f32::to_le_bytes).concat());
        GgufFile { magic: *b"GGUF", version: 3, counts: None, keys, tensors, alignment: 32, data }
    }

    pub fn with_key(mut self, key: &str, code: u32, bytes: impl Into<Vec<u8>>) -> Self {
        self.keys.push((key.into(), code, bytes.into()));
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = [&self.magic, &self.version.to_le_bytes()[..]].concat();
        let (tensors, keys) = self.counts.unwrap_or((self.tensors.len() as u64, self.keys.len() as u64));
        out.extend_from_slice(&tensors.to_le_bytes());
        out.extend_from_slice(&keys.to_le_bytes());
        for (key, code, value) in &self.keys {
            out.extend_from_slice(&gguf_string(key));
            out.extend_from_slice(&code.to_le_bytes());
            out.extend_from_slice(value);
        }
        for t in &self.tensors {
            out.extend_from_slice(&gguf_string(&t.name));
            out.extend_from_slice(&(t.extents.len() as u32).to_le_bytes());
            for extent in &t.extents {
                out.extend_from_slice(&extent.to_le_bytes());
            }
            out.extend_from_slice(&t.ggml_type.to_le_bytes());
            out.extend_from_slice(&t.offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend_from_slice(&self.data);
        out
    }
}

/// Reads everything that an opened checkpoint offers: whatever it answers, it must answer.
pub fn exercise_checkpoint(checkpoint: &Checkpoint) {
    for name in checkpoint.names() {
        let tensor = checkpoint.tensor(name).expect("a listed tensor is there");
        let _ = (tensor.f32(), tensor.scalar(), tensor.bf16_matrix());
        for prefix in [name, name.rsplit_once('.').map_or("", |(prefix, _)| prefix)] {
            if let Ok(linear) = checkpoint.linear(prefix) {
                let w = linear.weight;
                let _ = (w.check_finite(), w.value(0, 0), w.value(w.n().wrapping_sub(1), w.k().wrapping_sub(1)));
            }
            let _ = checkpoint.kv_scales(prefix);
        }
    }
    let _ = GptOss::new(checkpoint);
}

/// As [`exercise_checkpoint`].
pub fn exercise_gguf(file: &Gguf) {
    fn walk(value: Value<'_>) {
        let _ = (value.as_u64(), value.as_f64(), value.as_str());
        if let Value::Array(array) = value {
            assert_eq!(array.iter().map(walk).count(), array.len(), "a checked array reads to its end");
        }
    }
    for key in file.keys() {
        walk(file.value(key).expect("a listed key is there"));
    }
    for name in file.names() {
        let _ = (file.tensor(name).expect("a listed tensor is there"), file.f32(name));
        if let Ok(w) = file.matrix(name) {
            let _ = w.check_finite();
        }
        if let Ok(experts) = file.experts(name) {
            experts.iter().for_each(|w| drop(w.check_finite()));
        }
        if let Ok(weights) = file.nvfp4(name) {
            let _ = weights.stack().map(|experts| experts.len());
        }
    }
}
