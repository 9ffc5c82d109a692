//! What is behind the header: files, and the names and sizes of inputs and outputs, without a device.
#![forbid(unsafe_code)]

use super::{HEADER_BYTES, Header, PkgVersion, is_gzip, split};
use crate::neuron::Usage;
use crate::neuron::error::{NeuronError, Result};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::Read;

/// Unpacked bytes beyond which an archive is not read: a small gzip can unpack to a thousand times its size.
const MAX_UNPACKED: u64 = 8 << 30;
/// Bytes of a `def.json` beyond which it is not read.
const MAX_DEFINITION: u64 = 64 << 20;
/// Files beyond which an archive is not listed.
const MAX_FILES: usize = 1 << 20;

fn problem(problem: impl Into<String>) -> NeuronError {
    NeuronError::Neff { problem: problem.into() }
}

/// A file of a NEFF.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileEntry {
    /// Path in the archive, without a leading `./`.
    pub name: String,
    /// Bytes.
    pub bytes: u64,
}

/// An input or output as a subgraph's `def.json` states it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Variable {
    /// The folder: `sg00`, one for each physical core of a logical one.
    pub subgraph: String,
    /// Name, as the runtime knows it.
    pub name: String,
    /// Which side it is on.
    pub usage: Usage,
    /// Its number in the file.
    pub id: u64,
    /// Bytes.
    pub bytes: u64,
}

/// Whether the payload is what the header's hash says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HashCheck {
    /// It is.
    Same,
    /// It is not.
    Different,
    /// MD5, which this crate does not compute.
    NotComputed,
}

/// The contents of a NEFF.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Archive {
    /// Its header.
    pub header: Header,
    /// Whether the payload has the header's hash. The runtime does not check by default.
    pub hash: HashCheck,
    /// Regular files, in their order.
    pub files: Vec<FileEntry>,
    /// Inputs and outputs of all subgraphs, by subgraph and name.
    pub variables: Vec<Variable>,
}

/// The part of `def.json` that is read.
#[derive(Deserialize)]
struct Definition {
    #[serde(default)]
    var: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    var_id: u64,
    size: Option<u64>,
}

impl Archive {
    /// Reads a whole NEFF: the header, the list of files, and every `sgNN/def.json`.
    ///
    /// # Errors
    /// [`NeuronError::Neff`] for a bad header, a damaged archive or definition, an input or output without a size, and for
    /// archives beyond reason (8 GiB unpacked, a million files, a definition of 64 MiB).
    pub fn read(neff: &[u8]) -> Result<Archive> {
        let header = Header::parse(neff)?;
        let (_, payload) = split(neff)?;
        let hash = match header.pkg_version {
            PkgVersion::Md5 => HashCheck::NotComputed,
            _ if Sha256::digest(payload)[..] == header.hash => HashCheck::Same,
            _ => HashCheck::Different,
        };
        let (mut files, mut variables) = (Vec::new(), Vec::new());
        walk(payload, &mut |name, bytes, contents| {
            if files.len() >= MAX_FILES {
                return Err(problem(format!("more than {MAX_FILES} files")));
            }
            if let Some(subgraph) = definition_of(&name) {
                variables.extend(definition(subgraph, &name, &whole(&name, bytes, MAX_DEFINITION, contents)?)?);
            }
            files.push(FileEntry { name, bytes });
            Ok(true)
        })?;
        variables.sort_by(|a: &Variable, b| (&a.subgraph, &a.name).cmp(&(&b.subgraph, &b.name)));
        Ok(Archive { header, hash, files, variables })
    }
}

/// The contents of one file of a NEFF, if it has one of that name.
///
/// # Errors
/// As [`Archive::read`], and for a file of more than `limit` bytes.
pub fn read_file(neff: &[u8], name: &str, limit: u64) -> Result<Option<Vec<u8>>> {
    Header::parse(neff)?;
    let mut found = None;
    walk(neff.get(HEADER_BYTES..).unwrap_or_default(), &mut |entry, bytes, contents| {
        if entry == name {
            found = Some(whole(&entry, bytes, limit, contents)?);
        }
        Ok(found.is_none())
    })?;
    Ok(found)
}

/// Calls `visit` with name, size and contents of every regular file, until it has seen enough.
fn walk(payload: &[u8], visit: &mut dyn FnMut(String, u64, &mut dyn Read) -> Result<bool>) -> Result<()> {
    if is_gzip(payload) {
        walk_tar(flate2::read::MultiGzDecoder::new(payload).take(MAX_UNPACKED), visit)
    } else {
        walk_tar(payload, visit)
    }
}

fn walk_tar(tar: impl Read, visit: &mut dyn FnMut(String, u64, &mut dyn Read) -> Result<bool>) -> Result<()> {
    let damaged = |e: std::io::Error| problem(format!("the archive is damaged: {e}"));
    let mut archive = tar::Archive::new(tar);
    // Raw: extension headers are passed over as entries of their own. Following them would let a file of any bytes choose how
    // much memory a name takes, and no name that matters here is long.
    for entry in archive.entries().map_err(damaged)?.raw(true) {
        let mut entry = entry.map_err(damaged)?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let name = name.strip_prefix("./").map_or(name.clone(), str::to_owned);
        let size = entry.size();
        if !visit(name, size, &mut entry)? {
            break;
        }
    }
    Ok(())
}

/// All of a file, if it is not too long and all there.
fn whole(name: &str, bytes: u64, limit: u64, contents: &mut dyn Read) -> Result<Vec<u8>> {
    if bytes > limit {
        return Err(problem(format!("{name} has {bytes} bytes, at most {limit} are read")));
    }
    let mut all = Vec::new();
    contents.read_to_end(&mut all).map_err(|e| problem(format!("{name}: {e}")))?;
    if all.len() as u64 == bytes { Ok(all) } else { Err(problem(format!("{name} ends early"))) }
}

/// The subgraph that a file defines.
fn definition_of(name: &str) -> Option<&str> {
    let folder = name.strip_suffix("/def.json")?;
    let digits = folder.strip_prefix("sg")?;
    (!digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())).then_some(folder)
}

fn definition(subgraph: &str, file: &str, json: &[u8]) -> Result<Vec<Variable>> {
    let parsed: Definition = serde_json::from_slice(json).map_err(|e| problem(format!("{file}: {e}")))?;
    let mut variables = Vec::new();
    for (name, Entry { kind, var_id, size }) in parsed.var {
        let usage = match kind.as_str() {
            "input" => Usage::Input,
            "output" => Usage::Output,
            _ => continue,
        };
        let bytes = size.ok_or_else(|| problem(format!("{file}: {name} has no size")))?;
        variables.push(Variable { subgraph: subgraph.into(), name, usage, id: var_id, bytes });
    }
    Ok(variables)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    const DEFINITION: &str = r#"{"dma_queue":{}, "var":{
        "x":{"type":"input","var_id":1,"size":64,"alignment":64}, "output_0":{"type":"output","var_id":0,"size":8},
        "w":{"type":"file","var_id":2,"size":4,"file_name":"w.npy"}}}"#;

    fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, contents) in files {
            let mut header = tar::Header::new_ustar();
            header.set_size(contents.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, *contents).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn neff(payload: &[u8]) -> Vec<u8> {
        let header = Header {
            pkg_version: PkgVersion::Sha256,
            data_size: payload.len() as u64,
            neff_version: (2, 0),
            build_version: String::new(),
            num_tpb: 1,
            hash: Sha256::digest(payload).into(),
            uuid: [0; 16],
            name: "n".into(),
            requested_tpb_count: 1,
            tpb_per_node: [0; 64],
            feature_bits: 0,
            lnc_size: None,
        };
        [&header.to_bytes()[..], payload].concat()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn good() -> Vec<u8> {
        tar(&[("neff.json", b"{}"), ("sg00/def.json", DEFINITION.as_bytes()), ("sg00/pe.bin", &[1; 700])])
    }

    #[test]
    fn inputs_and_outputs_without_a_device_packed_or_not() {
        for payload in [good(), gzip(&good())] {
            let archive = Archive::read(&neff(&payload)).unwrap();
            assert_eq!(archive.hash, HashCheck::Same);
            let files: Vec<_> = archive.files.iter().map(|f| (f.name.as_str(), f.bytes)).collect();
            assert_eq!(files, [("neff.json", 2), ("sg00/def.json", DEFINITION.len() as u64), ("sg00/pe.bin", 700)]);
            let variables: Vec<_> =
                archive.variables.iter().map(|v| (v.name.as_str(), v.usage, v.id, v.bytes)).collect();
            assert_eq!(variables, [("output_0", Usage::Output, 0, 8), ("x", Usage::Input, 1, 64)]);
            assert_eq!(read_file(&neff(&payload), "sg00/pe.bin", 700).unwrap(), Some(vec![1; 700]));
            assert_eq!(read_file(&neff(&payload), "absent", 700).unwrap(), None);
            assert!(read_file(&neff(&payload), "sg00/pe.bin", 699).is_err());
        }
    }

    #[test]
    fn a_changed_payload_has_another_hash() {
        let mut bytes = neff(&good());
        bytes[1024 + 512] ^= 1; // a byte of neff.json
        assert_eq!(Archive::read(&bytes).unwrap().hash, HashCheck::Different);
        bytes[0] = 2;
        assert_eq!(Archive::read(&bytes).unwrap().hash, HashCheck::NotComputed);
    }

    #[test]
    fn damage_is_named() {
        let problem = |payload: &[u8]| Archive::read(&neff(payload)).unwrap_err().to_string();
        let bad_json = tar(&[("sg00/def.json", b"{")]);
        assert!(problem(&bad_json).contains("sg00/def.json"));
        let sizeless = tar(&[("./sg01/def.json", br#"{"var":{"x":{"type":"input"}}}"#)]);
        assert!(problem(&sizeless).contains("x has no size"));
        let whole = good();
        assert!(problem(&whole[..512 + 512 + 512 + 100]).starts_with("NEFF: sg00/def.json"));
        let packed = gzip(&whole);
        assert!(problem(&packed[..packed.len() / 2]).contains("NEFF: "));
        let mut checksum = whole;
        checksum[0] ^= 1;
        assert!(problem(&checksum).contains("damaged"));
    }

    #[test]
    fn only_numbered_folders_define() {
        assert_eq!(definition_of("sg12/def.json"), Some("sg12"));
        assert!(
            ["def.json", "sg/def.json", "sgx/def.json", "a/sg00/def.json"].iter().all(|n| definition_of(n).is_none())
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn spoilt_archives_give_an_answer(spoilt in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), packed: bool) {
            let mut payload = if packed { gzip(&good()) } else { good() };
            for (at, byte) in spoilt {
                let at = at.index(payload.len());
                payload[at] = byte;
            }
            let _any = Archive::read(&neff(&payload));
        }
    }
}
