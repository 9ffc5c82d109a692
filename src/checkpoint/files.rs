//! A checkpoint: one safetensors file or a folder of them.
#![forbid(unsafe_code)]

use super::bytes::Bytes;
use super::quant_config::QuantConfig;
use super::tensor::Tensor;
use super::{bad, header};
use crate::error::{Error, Result};
use safetensors::Dtype;
use serde_json::Value;
use std::collections::btree_map::{BTreeMap, Entry as Slot};
use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::path::{Component, Path};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The tensors of a safetensors checkpoint, by name, with the folder's config.
///
/// ```
/// use trn_kernels::checkpoint::{Checkpoint, Dtype};
/// # fn main() -> trn_kernels::Result<()> {
/// let header = br#"{"w":{"dtype":"BF16","shape":[1,2],"data_offsets":[0,4]}}"#;
/// let mut file = (header.len() as u64).to_le_bytes().to_vec();
/// file.extend_from_slice(header);
/// file.extend_from_slice(&[0x80, 0x3F, 0x00, 0x40]);
/// let checkpoint = Checkpoint::from_bytes("in memory", file)?;
/// let w = checkpoint.tensor("w")?;
/// assert_eq!((w.dtype, w.shape), (Dtype::BF16, &[1, 2][..]));
/// assert_eq!(*w.f32()?, [1.0, 2.0]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Checkpoint {
    at: String,
    files: Vec<Shard>,
    tensors: BTreeMap<String, Place>,
    config: Option<(String, Value)>,
    pub(super) quant: QuantConfig,
}

#[derive(Debug)]
struct Shard {
    at: String,
    bytes: Bytes,
}

/// Where a tensor is.
#[derive(Debug)]
struct Place {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    range: Range<usize>,
}

impl Checkpoint {
    /// Opens a checkpoint and reads its files into memory. For large ones see [`Checkpoint::map`].
    ///
    /// `path` is a safetensors file, or a folder that holds (in this order of preference) `model.safetensors`,
    /// `model.safetensors.index.json` and the shards it names, or any number of `*.safetensors`. `config.json` and
    /// `hf_quant_config.json` of the folder are taken in if they are there.
    ///
    /// # Errors
    /// [`Error::Io`] with the path; [`Error::Checkpoint`] with file and tensor: a header that is not safetensors, offsets
    /// that overlap, leave gaps or leave the file, shapes that overflow or contradict the offsets, a tensor named twice, an
    /// index that names a shard outside the folder or a tensor that its shard lacks, a config that is not JSON.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        Self::open(path.as_ref(), Bytes::read)
    }

    /// One safetensors file that the caller holds in memory or has mapped. `name` stands for it in messages.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] as [`Checkpoint::read`].
    pub fn from_bytes(name: impl Into<String>, bytes: impl AsRef<[u8]> + Send + Sync + 'static) -> Result<Self> {
        let mut checkpoint = Self::empty(name.into());
        checkpoint.add(checkpoint.at.clone(), Bytes::new(bytes))?;
        Ok(checkpoint)
    }

    /// The same tensors with a config: the text of `config.json` or `hf_quant_config.json`. `name` stands for it in messages.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is not JSON or its quantization fields cannot be.
    pub fn with_config(mut self, name: impl Into<String>, json: impl AsRef<[u8]>) -> Result<Self> {
        let at = name.into();
        let json = parse_json(&at, json.as_ref())?;
        self.quant.absorb(&at, &json)?;
        self.config = Some((at, json));
        Ok(self)
    }

    fn empty(at: String) -> Self {
        let (files, tensors) = (Vec::new(), BTreeMap::new());
        Checkpoint { at, files, tensors, config: None, quant: QuantConfig::default() }
    }

    /// Opens `path`, getting each safetensors file through `load`.
    pub(super) fn open(path: &Path, load: impl Fn(&Path) -> Result<Bytes>) -> Result<Self> {
        let mut checkpoint = Self::empty(path.display().to_string());
        if !std::fs::metadata(path).map_err(|e| Error::io(path, &e))?.is_dir() {
            checkpoint.add(path.display().to_string(), load(path)?)?;
            return Ok(checkpoint);
        }
        let (single, index) = (path.join(SINGLE), path.join(INDEX));
        if single.is_file() {
            checkpoint.add(single.display().to_string(), load(&single)?)?;
        } else if index.is_file() {
            checkpoint.add_shards(path, &index, load)?;
        } else {
            for file in safetensors_files(path)? {
                checkpoint.add(file.display().to_string(), load(&file)?)?;
            }
        }
        // The general config last: it is the one that stays.
        for file in ["hf_quant_config.json", "config.json"].map(|name| path.join(name)) {
            if file.is_file() {
                checkpoint = checkpoint.with_config(file.display().to_string(), Bytes::read(&file)?.all())?;
            }
        }
        Ok(checkpoint)
    }

    /// Takes in the tensors of one file.
    fn add(&mut self, at: String, bytes: Bytes) -> Result<()> {
        let file = self.files.len();
        for entry in header::parse(&at, bytes.all())? {
            match self.tensors.entry(entry.name) {
                Slot::Vacant(slot) => {
                    slot.insert(Place { file, dtype: entry.dtype, shape: entry.shape, range: entry.range });
                }
                Slot::Occupied(slot) => {
                    let problem = match self.files.get(slot.get().file) {
                        Some(first) => format!("is already in {}", first.at),
                        None => "is there twice".into(),
                    };
                    return Err(bad(format!("{at}: tensor `{}`", slot.key()), problem));
                }
            }
        }
        self.files.push(Shard { at, bytes });
        Ok(())
    }

    /// Takes in the shards that an index names, and asks that each tensor be where the index says.
    fn add_shards(&mut self, dir: &Path, index: &Path, load: impl Fn(&Path) -> Result<Bytes>) -> Result<()> {
        let at = index.display().to_string();
        let json = parse_json(&at, Bytes::read(index)?.all())?;
        let map = json["weight_map"].as_object().ok_or_else(|| bad(&at, "has no object `weight_map`"))?;
        let mut names = BTreeSet::new();
        for (tensor, file) in map {
            let file = file.as_str().filter(|f| plain_file_name(f)).ok_or_else(|| {
                bad(
                    format!("{at}: tensor `{tensor}`"),
                    format!("is said to be in {file}, needed a file name without folders"),
                )
            })?;
            names.insert(file);
        }
        let mut shards = HashMap::new();
        for name in names {
            let path = dir.join(name);
            shards.insert(name, self.files.len());
            self.add(path.display().to_string(), load(&path)?)?;
        }
        for (tensor, file) in map {
            let place = self.tensors.get(tensor).map(|p| p.file);
            if place.is_none() || place != file.as_str().and_then(|f| shards.get(f).copied()) {
                return Err(bad(
                    format!("{at}: tensor `{tensor}`"),
                    format!("is said to be in {file}, which lacks it"),
                ));
            }
        }
        Ok(())
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
    pub fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        self.tensor_for(name, &self.at)
    }

    /// The tensor of that name, or an error that says what needs it.
    pub(super) fn tensor_for(&self, name: &str, needed_by: &str) -> Result<Tensor<'_>> {
        self.find(name)?
            .ok_or_else(|| Error::Missing { operand: name.to_owned().into(), needed_by: needed_by.to_owned().into() })
    }

    /// The tensor of that name, if there is one.
    pub(super) fn find(&self, name: &str) -> Result<Option<Tensor<'_>>> {
        let Some((name, place)) = self.tensors.get_key_value(name) else {
            return Ok(None);
        };
        let Some(file) = self.files.get(place.file) else {
            return Ok(None);
        };
        let bytes = file.bytes.get(&file.at, place.range.clone())?;
        Ok(Some(Tensor { name, dtype: place.dtype, shape: &place.shape, bytes }))
    }

    /// Where the checkpoint was opened, for messages.
    pub fn path(&self) -> &str {
        &self.at
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> usize {
        self.files.iter().map(|f| f.bytes.all().len()).fold(0, usize::saturating_add)
    }

    /// `config.json` and its path, if the checkpoint has one.
    pub(super) fn config(&self) -> Option<(&str, &Value)> {
        self.config.as_ref().map(|(at, json)| (at.as_str(), json))
    }
}

fn parse_json(at: &str, text: &[u8]) -> Result<Value> {
    serde_json::from_slice(text).map_err(|e| bad(at, format!("is not JSON: {e}")))
}

/// One ordinary path component: no folder, no `..`, no drive, on any system.
fn plain_file_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    let one = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
    one && !name.contains(['/', '\\', ':', '\0'])
}

/// All `*.safetensors` of a folder, sorted.
fn safetensors_files(dir: &Path) -> Result<Vec<std::path::PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|e| Error::io(dir, &e))? {
        let path = entry.map_err(|e| Error::io(dir, &e))?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(bad(dir.display().to_string(), "holds no *.safetensors file"));
    }
    files.sort();
    Ok(files)
}
