//! GGUF files: header, metadata, tensors. Little-endian, versions 2 and 3.
//!
//! Source: the GGUF specification in the ggml repository (`docs/gguf.md`) and `ggml/include/gguf.h`.
#![forbid(unsafe_code)]

mod cursor;
mod ggml_type;
mod nvfp4;
mod value;

pub use ggml_type::GgmlType;
pub use nvfp4::Nvfp4;
pub use value::{Array, Value, ValueType};

use super::bad;
use super::bytes::{Bytes, bf16s, f16s, f32s};
use super::tensor::extents;
use crate::error::{Error, Result, mul};
use crate::quant::{QuantizedExperts, QuantizedMatrix};
use cursor::Cursor;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

/// Axes that ggml tensors can have.
const MAX_AXES: usize = 4;

/// Where tensor data begins and each tensor in it, unless `general.alignment` says otherwise.
const DEFAULT_ALIGNMENT: usize = 32;

/// An open GGUF file.
///
/// Extents are given slowest axis first, as everywhere in this crate: the reverse of GGUF's own order.
#[derive(Debug)]
pub struct Gguf {
    at: String,
    bytes: Bytes,
    version: u32,
    alignment: usize,
    /// Where each value's type word is.
    metadata: BTreeMap<String, usize>,
    tensors: BTreeMap<String, Place>,
}

/// Where a tensor is.
#[derive(Debug)]
struct Place {
    ggml_type: GgmlType,
    shape: Vec<usize>,
    range: Range<usize>,
}

/// A tensor of a GGUF file: what the file says and the bytes, borrowed.
#[derive(Debug, Clone, Copy)]
pub struct GgufTensor<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its element or block type.
    pub ggml_type: GgmlType,
    /// Extents, slowest axis first; empty for a scalar.
    pub shape: &'a [usize],
    /// Rows of blocks, one after another; as long as type and shape ask for.
    pub bytes: &'a [u8],
}

impl Gguf {
    /// Opens a file and reads it into memory. For large ones see [`Gguf::map`].
    ///
    /// # Errors
    /// [`Error::Io`] with the path; [`Error::Checkpoint`] naming the file and the key or tensor: not GGUF, another version or
    /// byte order, counts or lengths that the file has no room for, unknown types, a name twice, tensors that overlap, are
    /// misaligned, leave the file or whose extents overflow or do not fill whole blocks.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::parse(path.display().to_string(), Bytes::read(path)?)
    }

    /// A file that the caller holds in memory or has mapped. `name` stands for it in messages.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] as [`Gguf::read`].
    pub fn from_bytes(name: impl Into<String>, bytes: impl AsRef<[u8]> + Send + Sync + 'static) -> Result<Self> {
        Self::parse(name.into(), Bytes::new(bytes))
    }

    pub(super) fn parse(at: String, bytes: Bytes) -> Result<Self> {
        let parsed = Parsed::new(&at, bytes.all())?;
        let Parsed { version, alignment, metadata, tensors } = parsed;
        Ok(Gguf { at, bytes, version, alignment, metadata, tensors })
    }

    /// The format's version: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Bytes that tensors are aligned to within the file's data.
    pub fn alignment(&self) -> usize {
        self.alignment
    }

    /// Keys of the metadata, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.metadata.keys().map(String::as_str)
    }

    /// A metadata value; strings and arrays are borrowed from the file.
    ///
    /// # Errors
    /// [`Error::Missing`].
    pub fn value(&self, key: &str) -> Result<Value<'_>> {
        let Some(&start) = self.metadata.get(key) else {
            return Err(self.missing(key));
        };
        let mut cursor = Cursor::new(&self.at, self.bytes.all());
        cursor.skip(start)?;
        Value::read_typed(&mut cursor)
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor of that name.
    ///
    /// # Errors
    /// [`Error::Missing`].
    pub fn tensor(&self, name: &str) -> Result<GgufTensor<'_>> {
        let (name, place) = self.tensors.get_key_value(name).ok_or_else(|| self.missing(name))?;
        let bytes = self.bytes.get(&self.at, place.range.clone())?;
        Ok(GgufTensor { name, ggml_type: place.ggml_type, shape: &place.shape, bytes })
    }

    fn missing(&self, what: &str) -> Error {
        let needed_by = format!("a reader of {}", self.at).into();
        Error::Missing { operand: what.to_owned().into(), needed_by }
    }

    /// A weight `[n, k]`, borrowed: MXFP4 or BF16.
    ///
    /// # Errors
    /// [`Error::Missing`]; [`Error::Checkpoint`] unless there are two axes; [`Error::Empty`] if one is 0;
    /// [`Error::Unsupported`] for other types; each names the tensor.
    pub fn matrix(&self, name: &str) -> Result<QuantizedMatrix<'_>> {
        let tensor = self.tensor(name)?;
        let [n, k] = extents(name, tensor.shape, ["n", "k"])?;
        tensor.rows(n, k, tensor.bytes)
    }

    /// Expert weights `[experts, n, k]`, borrowed: MXFP4 or BF16.
    ///
    /// # Errors
    /// As [`Gguf::matrix`], with three axes.
    pub fn experts(&self, name: &str) -> Result<QuantizedExperts<'_>> {
        let tensor = self.tensor(name)?;
        let [experts, n, k] = extents(name, tensor.shape, ["expert", "n", "k"])?;
        QuantizedExperts::split(&tensor.rows(mul("experts", experts, n)?, k, tensor.bytes)?, experts)
    }

    /// The elements of an F32, F16 or BF16 tensor as f32, exactly; F32 is borrowed where aligned.
    ///
    /// # Errors
    /// [`Error::Missing`]; [`Error::Unsupported`] for other types.
    pub fn f32(&self, name: &str) -> Result<Cow<'_, [f32]>> {
        let tensor = self.tensor(name)?;
        match tensor.ggml_type {
            GgmlType::F32 => Ok(f32s(tensor.bytes)),
            GgmlType::F16 => Ok(f16s(tensor.bytes).into()),
            GgmlType::BF16 => Ok(bf16s(tensor.bytes).into()),
            _ => Err(tensor.unsupported("F32, F16 and BF16 are read as f32")),
        }
    }
}

impl<'a> GgufTensor<'a> {
    fn rows(&self, n: usize, k: usize, bytes: &'a [u8]) -> Result<QuantizedMatrix<'a>> {
        match self.ggml_type {
            GgmlType::MXFP4 => QuantizedMatrix::mxfp4_gguf(n, k, bytes),
            GgmlType::BF16 => QuantizedMatrix::bf16(n, k, bytes),
            _ => Err(self.unsupported("weights are borrowed as MXFP4 or BF16; other types are read as raw bytes")),
        }
    }

    fn unsupported(&self, because: &str) -> Error {
        Error::Unsupported { what: format!("{}: {}", self.name, self.ggml_type), because: because.into() }
    }
}

/// A file's directory.
struct Parsed {
    version: u32,
    alignment: usize,
    metadata: BTreeMap<String, usize>,
    tensors: BTreeMap<String, Place>,
}

/// A tensor as its entry describes it, before the data's start is known.
struct Entry {
    name: String,
    ggml_type: GgmlType,
    shape: Vec<usize>,
    offset: u64,
    len: usize,
}

impl Parsed {
    fn new(at: &str, file: &[u8]) -> Result<Self> {
        let mut cursor = Cursor::new(at, file);
        if cursor.array::<4>("the magic")? != *b"GGUF" {
            return Err(bad(at, "is not a GGUF file: it does not begin with `GGUF`"));
        }
        let version = cursor.u32("the version")?;
        match version {
            2 | 3 => {}
            v if [2, 3].contains(&v.swap_bytes()) => {
                return Err(bad(at, "is a big-endian GGUF file, needed little-endian"));
            }
            v => return Err(bad(at, format!("is GGUF version {v}, needed 2 or 3"))),
        }
        let tensor_count = cursor.u64("the tensor count")?;
        let key_count = cursor.u64("the metadata count")?;

        // Counts are not trusted with an allocation: each entry must be found in the file before the next is looked for.
        let mut metadata = BTreeMap::new();
        for _ in 0..key_count {
            let key = cursor.name("a metadata key")?.to_owned();
            let start = cursor.position();
            Value::read_typed(&mut cursor).map_err(|e| within(e, at, "key", &key))?;
            if metadata.contains_key(&key) {
                return Err(bad(format!("{at}: key `{key}`"), "is there twice"));
            }
            metadata.insert(key, start);
        }
        let alignment = alignment(at, file, &metadata)?;
        let mut entries = Vec::new();
        for _ in 0..tensor_count {
            entries.push(Entry::read(&mut cursor, at)?);
        }
        let data = cursor.position().checked_next_multiple_of(alignment);
        let tensors = place(at, entries, alignment, data, file.len())?;
        Ok(Parsed { version, alignment, metadata, tensors })
    }
}

/// `general.alignment`, a power of two.
fn alignment(at: &str, file: &[u8], metadata: &BTreeMap<String, usize>) -> Result<usize> {
    let key = "general.alignment";
    let Some(&start) = metadata.get(key) else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    let mut cursor = Cursor::new(at, file);
    cursor.skip(start)?;
    match Value::read_typed(&mut cursor)? {
        Value::U32(a) if a.is_power_of_two() => Ok(a as usize),
        got => Err(bad(format!("{at}: key `{key}`"), format!("is {got:?}, needed a U32 power of two"))),
    }
}

impl Entry {
    fn read(cursor: &mut Cursor<'_>, at: &str) -> Result<Self> {
        let name = cursor.name("a tensor name")?.to_owned();
        Self::describe(cursor, &name).map_err(|e| within(e, at, "tensor", &name))
    }

    fn describe(cursor: &mut Cursor<'_>, name: &str) -> Result<Self> {
        let problem = |problem: String| Err(bad("", problem));
        let axes = cursor.u32("the number of axes")? as usize;
        if axes > MAX_AXES {
            return problem(format!("has {axes} axes, at most {MAX_AXES} are allowed"));
        }
        let mut shape = Vec::with_capacity(axes);
        for _ in 0..axes {
            let extent = cursor.u64("an extent")?;
            match extent.try_into() {
                Ok(extent) => shape.push(extent),
                Err(_) => return problem(format!("has an extent of {extent}, which does not fit usize")),
            }
        }
        let ggml_type = GgmlType::from_code(cursor.u32("the type")?);
        let offset = cursor.u64("the offset")?;
        let Some((block, block_bytes)) = ggml_type.block() else {
            return problem(format!("is of an unknown type: {ggml_type}"));
        };
        let k: usize = shape.first().copied().unwrap_or(1);
        if !k.is_multiple_of(block) {
            return problem(format!("has rows of {k}, needed a multiple of {block} for {ggml_type}"));
        }
        let elements = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        let Some(len) = elements.and_then(|n| (n / block).checked_mul(block_bytes)) else {
            return problem(format!("has extents {shape:?} whose product overflows"));
        };
        shape.reverse();
        Ok(Entry { name: name.to_owned(), ggml_type, shape, offset, len })
    }
}

/// Puts tensors into the file: aligned, inside it, none over another, no name twice.
fn place(
    at: &str,
    mut entries: Vec<Entry>,
    alignment: usize,
    data: Option<usize>,
    file_len: usize,
) -> Result<BTreeMap<String, Place>> {
    entries.sort_by_key(|e| (e.offset, e.len));
    let mut tensors = BTreeMap::new();
    let mut last: Option<(String, usize)> = None;
    for Entry { name, ggml_type, shape, offset, len } in entries {
        let refuse = |problem: String| Err(bad(format!("{at}: tensor `{name}`"), problem));
        if !offset.is_multiple_of(alignment as u64) {
            return refuse(format!("is at offset {offset}, needed a multiple of {alignment}"));
        }
        let start = usize::try_from(offset).ok().and_then(|o| data?.checked_add(o));
        let range = start.and_then(|s| Some(s..s.checked_add(len)?)).filter(|r| r.end <= file_len);
        let Some(range) = range else {
            return refuse(format!("has {len} bytes at offset {offset}, outside the file of {file_len} bytes"));
        };
        if let Some((other, end)) = &last
            && range.start < *end
        {
            return refuse(format!("overlaps tensor `{other}`"));
        }
        last = Some((name.clone(), range.end));
        if tensors.contains_key(&name) {
            return refuse("is there twice".into());
        }
        tensors.insert(name, Place { ggml_type, shape, range });
    }
    Ok(tensors)
}

/// A problem found while reading one key or tensor, with its name.
fn within(e: Error, at: &str, what: &str, name: &str) -> Error {
    match e {
        Error::Checkpoint { problem, .. } => bad(format!("{at}: {what} `{name}`"), problem),
        other => other,
    }
}
