//! What a loaded model takes and gives: the library's table of tensors, read without believing it.
#![forbid(unsafe_code)]

use super::error::{NeuronError, Result};
use super::{DeviceDtype, DtypeNumbering, Version, sys};
use std::collections::BTreeMap;

/// Tensors of one model beyond which a count is not believed.
const MAX_TENSORS: u64 = 1 << 16;
/// Extents of one tensor beyond which a count is not believed.
const MAX_NDIM: u32 = 64;
/// Suffix of the input half of a tensor that a model updates in place; the output half has the name without it.
pub const ALIAS_SUFFIX: &str = ".must_alias_input";

const OP: &str = "nrt_get_model_tensor_info";

/// Which side of a model a tensor is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Usage {
    /// The model reads it.
    Input,
    /// The model writes it.
    Output,
}

impl Usage {
    /// `input` or `output`.
    pub const fn name(self) -> &'static str {
        match self {
            Usage::Input => "input",
            Usage::Output => "output",
        }
    }
}

/// An input or output of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorDesc {
    /// Variable name in the NEFF, exactly.
    pub name: String,
    /// Bytes that a tensor bound to it has: what the library reports, or what [`Model::expect`](super::Model::expect) put right.
    pub bytes: u64,
    /// The element type the library reports: a hint, never a fact (see [`DtypeNumbering::of`]).
    pub dtype: DeviceDtype,
    /// Extents the library reports, outermost first; packed types count as the library pleases.
    pub shape: Vec<u32>,
}

/// What the caller knows of a tensor from where the kernel was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// True bytes.
    pub bytes: u64,
    /// Element type, if the library has one for it.
    pub dtype: Option<DeviceDtype>,
    /// Whether it is of a packed `_x4` type: runtimes before 2.33 report a quarter of its size.
    pub packed_x4: bool,
}

/// A table of tensors as the library hands it out. Implemented over its memory, and in tests over anything.
pub trait TensorTable {
    /// Number of entries.
    fn count(&self) -> u64;
    /// Entry `at`, which is below the count.
    fn entry(&self, at: usize) -> sys::TensorInfo;
    /// The `ndim` extents of an entry whose `shape` is not null.
    fn shape(&self, entry: &sys::TensorInfo) -> Vec<u32>;
}

/// All inputs and outputs of a model.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ModelIo {
    /// Inputs by ascending name.
    pub inputs: Vec<TensorDesc>,
    /// Outputs by ascending name.
    pub outputs: Vec<TensorDesc>,
    /// In-place pairs: positions in `inputs` and `outputs`.
    pub aliases: Vec<(usize, usize)>,
}

impl ModelIo {
    /// Copies a table. Counts are checked before anything is walked, and names and shapes are copied, since the library takes
    /// its memory back.
    ///
    /// # Errors
    /// [`NeuronError::Answer`] for counts beyond reason, extents that are not there, unknown usages, names that are empty, not
    /// UTF-8 or twice on one side.
    pub fn read(table: &dyn TensorTable, version: Version) -> Result<ModelIo> {
        let wrong = |problem: String| NeuronError::Answer { op: OP, problem };
        let count = table.count();
        let count = usize::try_from(count).ok().filter(|_| count <= MAX_TENSORS);
        let count = count.ok_or_else(|| wrong(format!("counted {} tensors", table.count())))?;
        let numbering = DtypeNumbering::of(version);
        let (mut inputs, mut outputs) = (BTreeMap::new(), BTreeMap::new());
        for at in 0..count {
            let entry = table.entry(at);
            let name = text(&entry.name).map_err(|problem| wrong(format!("tensor {at}: {problem}")))?;
            if entry.ndim > MAX_NDIM {
                return Err(wrong(format!("{name} has {} extents", entry.ndim)));
            }
            if entry.ndim > 0 && entry.shape.is_null() {
                return Err(wrong(format!("{name} has {} extents and no shape", entry.ndim)));
            }
            let shape = if entry.ndim == 0 { Vec::new() } else { table.shape(&entry) };
            let side = match entry.usage {
                sys::USAGE_INPUT => &mut inputs,
                sys::USAGE_OUTPUT => &mut outputs,
                usage => return Err(wrong(format!("{name} has usage {usage}"))),
            };
            let dtype = numbering.decode(entry.dtype);
            let desc = TensorDesc { name: name.clone(), bytes: entry.size as u64, dtype, shape };
            if side.insert(name, desc).is_some() {
                return Err(wrong(format!("tensor {at} has the name of another")));
            }
        }
        let aliases = inputs.keys().enumerate().filter_map(|(i, name)| {
            let half = name.strip_suffix(ALIAS_SUFFIX)?;
            Some((i, outputs.keys().position(|o: &String| o == half)?))
        });
        let aliases = aliases.collect();
        Ok(ModelIo { inputs: inputs.into_values().collect(), outputs: outputs.into_values().collect(), aliases })
    }

    /// One side.
    pub fn side(&self, usage: Usage) -> &[TensorDesc] {
        match usage {
            Usage::Input => &self.inputs,
            Usage::Output => &self.outputs,
        }
    }

    /// Compares a tensor with what the caller knows of it. Bytes decide; a quarter of them is accepted, and put right, for packed
    /// x4 types of runtimes that report them so. Types are a hint: what differs is returned as a warning.
    ///
    /// # Errors
    /// [`NeuronError::NoSuchTensor`], [`NeuronError::SizeMismatch`].
    pub fn expect(
        &mut self,
        version: Version,
        usage: Usage,
        name: &str,
        expected: &Expected,
    ) -> Result<Option<String>> {
        let side = match usage {
            Usage::Input => &mut self.inputs,
            Usage::Output => &mut self.outputs,
        };
        let Ok(at) = side.binary_search_by(|d| d.name.as_str().cmp(name)) else {
            let known = side.iter().map(|d| d.name.clone()).collect();
            return Err(NeuronError::NoSuchTensor { tensor: name.into(), usage: Some(usage), known });
        };
        let desc = &mut side[at];
        let quarter = expected.packed_x4 && version.reports_quarter_x4_sizes() && expected.bytes.is_multiple_of(4);
        let mut warnings = Vec::new();
        if desc.bytes != expected.bytes {
            if !(quarter && desc.bytes == expected.bytes / 4) {
                return Err(NeuronError::SizeMismatch { tensor: name.into(), got: desc.bytes, needed: expected.bytes });
            }
            warnings.push(format!("{} bytes reported by runtime {version} for {} of x4", desc.bytes, expected.bytes));
            desc.bytes = expected.bytes;
        }
        match expected.dtype {
            Some(dtype) if dtype.is_fp8() && desc.dtype == DeviceDtype::Int8 => {
                warnings.push(format!("{dtype} is reported as int8, as this runtime does"));
            }
            Some(dtype) if dtype != desc.dtype => warnings.push(format!("{dtype} is reported as {}", desc.dtype)),
            _ => {}
        }
        Ok((!warnings.is_empty()).then(|| format!("{name}: {}", warnings.join("; "))))
    }
}

/// A name field up to its NUL or its end.
fn text(field: &[std::ffi::c_char]) -> Result<String, &'static str> {
    // `c_char` is signed on some platforms: the byte is what counts.
    let bytes: Vec<u8> = field.iter().map(|&c| c.to_ne_bytes()[0]).take_while(|&b| b != 0).collect();
    match String::from_utf8(bytes) {
        Ok(name) if name.is_empty() => Err("no name"),
        Ok(name) => Ok(name),
        Err(_) => Err("a name that is not UTF-8"),
    }
}

/// As [`text`], for messages: whatever the bytes are.
pub(super) fn lossy(field: &[std::ffi::c_char]) -> String {
    let bytes: Vec<u8> = field.iter().map(|&c| c.to_ne_bytes()[0]).take_while(|&b| b != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NEW: Version = Version::new(2, 34, 10);

    struct Table {
        count: u64,
        entries: Vec<sys::TensorInfo>,
    }

    impl TensorTable for Table {
        fn count(&self) -> u64 {
            self.count
        }

        fn entry(&self, at: usize) -> sys::TensorInfo {
            self.entries[at % self.entries.len()]
        }

        fn shape(&self, entry: &sys::TensorInfo) -> Vec<u32> {
            assert!(entry.ndim <= MAX_NDIM && !entry.shape.is_null(), "a shape that is not there is not read");
            vec![1; entry.ndim as usize]
        }
    }

    fn entry(name: &[u8], usage: u32, size: usize, dtype: u32, ndim: u32) -> sys::TensorInfo {
        let mut field = [0; sys::TENSOR_NAME_MAX];
        for (to, from) in field.iter_mut().zip(name) {
            *to = std::ffi::c_char::from_ne_bytes([*from]);
        }
        let shape = if ndim == 0 { std::ptr::null_mut() } else { std::ptr::dangling_mut() };
        sys::TensorInfo { name: field, usage, size, dtype, shape, ndim }
    }

    fn read(entries: Vec<sys::TensorInfo>) -> Result<ModelIo> {
        ModelIo::read(&Table { count: entries.len() as u64, entries }, NEW)
    }

    #[test]
    fn a_table_is_sorted_and_paired() {
        let io = read(vec![
            entry(b"output_0", 1, 8, 0xA, 2),
            entry(b"x", 0, 4, 0x6, 1),
            entry(b"kv.must_alias_input", 0, 64, 0xE, 0),
            entry(b"kv", 1, 64, 0xE, 0),
        ])
        .unwrap();
        assert_eq!(io.inputs.iter().map(|d| d.name.as_str()).collect::<Vec<_>>(), ["kv.must_alias_input", "x"]);
        assert_eq!(io.outputs.iter().map(|d| d.name.as_str()).collect::<Vec<_>>(), ["kv", "output_0"]);
        assert_eq!(io.aliases, [(0, 0)]);
        assert_eq!((io.outputs[1].dtype, io.outputs[1].shape.len(), io.inputs[1].bytes), (DeviceDtype::Float32, 2, 4));
        assert_eq!(ModelIo::read(&Table { count: 0, entries: vec![] }, NEW).unwrap(), ModelIo::default());
    }

    #[test]
    fn long_names_are_whole() {
        for len in [255, 256] {
            let io = read(vec![entry(&vec![b'n'; len], 0, 1, 0, 0)]).unwrap();
            assert_eq!(io.inputs[0].name.len(), len);
        }
    }

    #[test]
    fn what_cannot_be_is_refused_and_not_walked() {
        let problem = |e: Result<ModelIo>| match e.unwrap_err() {
            NeuronError::Answer { problem, .. } => problem,
            other => panic!("{other:?}"),
        };
        for count in [MAX_TENSORS + 1, u64::MAX] {
            let table = Table { count, entries: vec![entry(b"x", 0, 1, 0, 0)] };
            assert!(problem(ModelIo::read(&table, NEW)).contains("counted"));
        }
        assert!(problem(read(vec![entry(b"x", 0, 1, 0, 65)])).contains("65 extents"));
        let mut shapeless = entry(b"x", 0, 1, 0, 2);
        shapeless.shape = std::ptr::null_mut();
        assert!(problem(read(vec![shapeless])).contains("no shape"));
        assert!(problem(read(vec![entry(b"x", 2, 1, 0, 0)])).contains("usage 2"));
        assert!(problem(read(vec![entry(b"", 0, 1, 0, 0)])).contains("no name"));
        assert!(problem(read(vec![entry(&[0xff], 0, 1, 0, 0)])).contains("UTF-8"));
        assert!(problem(read(vec![entry(b"x", 0, 1, 0, 0), entry(b"x", 0, 2, 0, 0)])).contains("another"));
        assert!(read(vec![entry(b"x", 0, 1, 0, 0), entry(b"x", 1, 2, 0, 0)]).is_ok(), "the sides may share names");
    }

    #[test]
    fn sizes_decide_types_warn() {
        let io = || read(vec![entry(b"w", 0, 100, 2, 0)]).unwrap();
        let expect = |version, bytes, dtype, packed_x4| {
            let mut io = io();
            let answer = io.expect(version, Usage::Input, "w", &Expected { bytes, dtype, packed_x4 });
            answer.map(|w| (w, io.inputs[0].bytes))
        };
        let (old, new) = (Version::new(2, 32, 31), Version::new(2, 33, 0));
        assert_eq!(expect(new, 100, None, false), Ok((None, 100)));
        let fp8 = expect(new, 100, Some(DeviceDtype::Fp8E4), false).unwrap();
        assert!(fp8.0.unwrap().contains("reported as int8") && fp8.1 == 100);
        let quarter = expect(old, 400, None, true).unwrap();
        assert!(quarter.0.unwrap().contains("100 bytes") && quarter.1 == 400);
        let mismatch = Err(NeuronError::SizeMismatch { tensor: "w".into(), got: 100, needed: 400 });
        assert_eq!(expect(new, 400, None, true), mismatch);
        assert_eq!(expect(old, 400, None, false), mismatch);
        assert!(expect(old, 401, None, true).is_err());
        let unknown = io().expect(new, Usage::Output, "w", &Expected { bytes: 1, dtype: None, packed_x4: false });
        assert!(matches!(unknown, Err(NeuronError::NoSuchTensor { .. })));
    }

    proptest! {
        #[test]
        fn any_table_gives_an_answer(
            count in prop_oneof![0u64..8, any::<u64>()],
            fields in prop::collection::vec((any::<[u8; 4]>(), 0u32..3, any::<usize>(), any::<u32>(), any::<u32>(), any::<bool>()), 1..8),
        ) {
            let entries: Vec<_> = fields.into_iter().map(|(name, usage, size, dtype, ndim, small)| {
                entry(&name, usage, size, dtype, if small { ndim % 4 } else { ndim })
            }).collect();
            let count = if count > 8 { count } else { count.min(entries.len() as u64) };
            if let Ok(io) = ModelIo::read(&Table { count, entries }, NEW) {
                prop_assert_eq!(io.inputs.len() + io.outputs.len(), count as usize);
            }
        }
    }
}
