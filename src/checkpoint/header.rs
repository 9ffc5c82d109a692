//! The header of a safetensors file.
//!
//! The `safetensors` crate defines dtypes and entries. Its own check of a whole file sums lengths unchecked and does not
//! always name the tensor that is wrong, so the check is made here: checked, and with names.
#![forbid(unsafe_code)]

use super::bad;
use crate::error::Result;
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use std::ops::Range;

/// Largest header that is parsed: the bound that the `safetensors` crate sets.
const MAX_HEADER: u64 = 100_000_000;

/// One tensor as the header describes it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Its bytes in the file.
    pub(super) range: Range<usize>,
}

/// Entries in the order of the file, `__metadata__` left out.
struct Entries(Vec<(String, TensorInfo)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Map;
        impl<'de> Visitor<'de> for Map {
            type Value = Entries;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    // By way of a value, so that the message can say which tensor.
                    let info = serde_json::from_value(map.next_value()?)
                        .map_err(|e| A::Error::custom(format!("tensor `{name}`: {e}")))?;
                    entries.push((name, info));
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Map)
    }
}

/// Parses and checks the header of `file`: tensors lie one after another and cover the file to its end, each as long as its
/// shape says, no name twice.
pub(super) fn parse(at: &str, file: &[u8]) -> Result<Vec<Entry>> {
    let Some((prefix, rest)) = file.split_first_chunk() else {
        return Err(bad(at, format!("{} bytes, a safetensors file has at least 8", file.len())));
    };
    let header_len = u64::from_le_bytes(*prefix);
    if header_len > MAX_HEADER {
        return Err(bad(at, format!("the header is said to be {header_len} bytes, allowed are {MAX_HEADER}")));
    }
    // Fits: at most MAX_HEADER.
    let header_len = header_len as usize;
    let Some((header, data)) = rest.split_at_checked(header_len) else {
        return Err(bad(at, format!("the header is said to be {header_len} bytes, the file has {}", rest.len())));
    };
    let Entries(mut entries) =
        serde_json::from_slice(header).map_err(|e| bad(at, format!("the header is not what safetensors says: {e}")))?;

    entries.sort_by_key(|(_, info)| info.data_offsets);
    let mut end = 0;
    let mut checked = Vec::with_capacity(entries.len());
    for (name, info) in entries {
        let refuse = |problem: String| Err(bad(format!("{at}: tensor `{name}`"), problem));
        let (from, to) = info.data_offsets;
        if from != end || to < from {
            return refuse(format!(
                "lies at {from}..{to}, needed a range that starts at {end}, where the last one ends"
            ));
        }
        if to > data.len() {
            return refuse(format!("ends at {to}, the file's data has {} bytes", data.len()));
        }
        let elements = info.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        let Some(bits) = elements.and_then(|n| n.checked_mul(info.dtype.bitsize())) else {
            return refuse(format!("the product of its shape {:?} overflows", info.shape));
        };
        if bits % 8 != 0 || bits / 8 != to - from {
            let (shape, dtype) = (&info.shape, info.dtype);
            return refuse(format!("{shape:?} of {dtype} takes {bits} bits, its range has {} bytes", to - from));
        }
        end = to;
        let start = 8 + header_len;
        // No overflow: `to` is at most the length of the data behind the header.
        checked.push(Entry { name, dtype: info.dtype, shape: info.shape, range: start + from..start + to });
    }
    if end != data.len() {
        return Err(bad(at, format!("the tensors end at {end}, the file's data has {} bytes", data.len())));
    }
    Ok(checked)
}
