//! Builds the NEFF of an exported program, for `tests/emulated-libnrt` to execute.
//!
//! It is a whole container (header, tar archive, `sg00/def.json`) around a program instead of instructions. Its `pkg_version`
//! is one that no runtime accepts, so that it cannot be taken for a compiled kernel.
#![forbid(unsafe_code)]

use super::{Header, PkgVersion};
use crate::neuron::ALIAS_SUFFIX;
use crate::trainium::emulator::{Limits, Program};
use crate::{Error, Result};
use flate2::{Compression, write::GzEncoder};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::io::Write;

/// Bytes of a name in the header and of a tensor's name, with their NUL.
const NAME_BYTES: usize = 256;

/// The NEFF of a program: `program_json` are the bytes of a file of `kernels/programs`, which it holds unchanged.
///
/// Inputs and outputs have the names of the program's ports. A tensor that is both is updated in place, as Neuron compilers
/// name it: input `NAME.must_alias_input` and output `NAME`, where NAME is the input port's, bound to one tensor. `var_id` in
/// `def.json` counts the inputs, then the outputs. The same program gives the same bytes.
///
/// # Errors
/// [`Error::Program`] if it is no program, or if a name is used twice, empty, has a NUL or more than 255 bytes.
pub fn emulated(program_json: &[u8], gzip: bool) -> Result<Vec<u8>> {
    let program = Program::from_json(program_json, &Limits::default())?;
    let name = format!("trn-kernels.{}.{}", program.kernel(), program.example());
    check_name(&name)?;
    let definition = definition(&program)?;
    let payload = archive(&[("sg00/def.json", &definition), ("program.json", program_json)], gzip);
    let payload = payload.map_err(|e| problem(format!("neff archive: {e}")))?;
    Ok([&header(&name, &payload).to_bytes()[..], &payload].concat())
}

fn problem(problem: String) -> Error {
    Error::Program { problem }
}

fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || name.len() >= NAME_BYTES || name.contains('\0') {
        return Err(problem(format!("neff name {name:?}: needed 1 to {} bytes without NUL", NAME_BYTES - 1)));
    }
    Ok(())
}

/// `def.json`: the variables with their sizes.
fn definition(program: &Program) -> Result<Vec<u8>> {
    let tensor_of_input = |tensor| program.inputs().iter().find(|p| p.tensor == tensor);
    let inputs = program.inputs().iter().map(|port| {
        let in_place = program.outputs().iter().any(|o| o.tensor == port.tensor);
        let name = if in_place { format!("{}{ALIAS_SUFFIX}", port.name) } else { port.name.clone() };
        ("input", name, port.tensor)
    });
    let outputs = program.outputs().iter().map(|port| {
        let name = tensor_of_input(port.tensor).map_or(&port.name, |input| &input.name);
        ("output", name.clone(), port.tensor)
    });
    let mut variables = Map::new();
    for (id, (kind, name, tensor)) in inputs.chain(outputs).enumerate() {
        check_name(&name)?;
        let size = program.tensors()[tensor].bytes();
        let variable = json!({ "type": kind, "var_id": id, "size": size });
        if variables.insert(name.clone(), variable).is_some() {
            return Err(problem(format!("two of its variables are named {name:?}")));
        }
    }
    let definition: Value = json!({ "dma_queue": {}, "var": variables });
    Ok(definition.to_string().into_bytes())
}

/// A tar archive of some files, without times and owners.
fn archive(files: &[(&str, &[u8])], gzip: bool) -> std::io::Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, bytes) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, path, *bytes)?;
    }
    let bytes = tar.into_inner()?;
    if !gzip {
        return Ok(bytes);
    }
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(&bytes)?;
    encoder.finish()
}

/// The header: one core, no features asked for.
fn header(name: &str, payload: &[u8]) -> Header {
    let hash: [u8; 32] = Sha256::digest(payload).into();
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&hash[..16]); // the payload's, so that equal programs are equal files
    let mut tpb_per_node = [0; 64];
    tpb_per_node[0] = 1;
    Header {
        pkg_version: PkgVersion::Emulated,
        data_size: payload.len() as u64,
        neff_version: (2, 0),
        build_version: concat!("trn-kernels ", env!("CARGO_PKG_VERSION")).into(),
        num_tpb: 1,
        hash,
        uuid,
        name: name.into(),
        requested_tpb_count: 1,
        tpb_per_node,
        feature_bits: 0,
        lnc_size: None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::HEADER_BYTES;
    use super::*;
    use std::io::Read;

    /// A program that copies `a` to an output and writes `b` in place; the names are the caller's.
    fn program(a: &str, output: &str) -> Vec<u8> {
        let access = |tensor: usize| json!([tensor, "uint8", 0, [[1, 3]]]);
        let copy = |to: usize, from: usize| json!({"name": "dma_copy", "engine": "dma", "writes": {"dst": access(to)}, "reads": {"src": access(from)}, "attrs": {}});
        let tensor = json!({"name": "", "shape": [3], "dtype": "uint8", "buffer": "private_hbm"});
        let program = json!({
            "format": "trn-kernels.program.1", "kernel": "copy", "example": "e", "target": "trn2", "sources": {},
            "parameters": {}, "inputs": [{"name": a, "tensor": 0}, {"name": "b", "tensor": 1}],
            "outputs": [{"name": output, "tensor": 2}, {"name": "output_1", "tensor": 1}],
            "tensors": [tensor, tensor, tensor], "instructions": [copy(2, 0), copy(1, 0)]
        });
        program.to_string().into_bytes()
    }

    fn files(payload: &[u8]) -> Vec<(String, Vec<u8>)> {
        let mut archive = tar::Archive::new(payload);
        let read = |entry: std::io::Result<tar::Entry<'_, &[u8]>>| {
            let mut entry = entry.unwrap();
            let (path, mut bytes) = (entry.path().unwrap().display().to_string(), vec![]);
            entry.read_to_end(&mut bytes).unwrap();
            (path, bytes)
        };
        archive.entries().unwrap().map(read).collect()
    }

    #[test]
    fn the_container_is_as_documented() {
        let program = program("a", "output_0");
        let neff = emulated(&program, false).unwrap();
        let (header, payload) = neff.split_at(HEADER_BYTES);
        let word = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().unwrap());
        assert_eq!([word(0), word(8), word(16)], [0xFA4E, 1024, payload.len() as u64]);
        assert_eq!(header[172..204], Sha256::digest(payload)[..]);
        assert_eq!(header[220..238], *b"trn-kernels.copy.e");
        assert!(header[238..476].iter().chain(&header[556..]).all(|&b| b == 0));
        let files = files(payload);
        assert_eq!(files[1], ("program.json".into(), program.clone()));
        let (path, definition) = &files[0];
        let wanted = json!({"dma_queue": {}, "var": {
            "a": {"type": "input", "var_id": 0, "size": 3}, "b.must_alias_input": {"type": "input", "var_id": 1, "size": 3},
            "output_0": {"type": "output", "var_id": 2, "size": 3}, "b": {"type": "output", "var_id": 3, "size": 3}}});
        assert_eq!((path.as_str(), serde_json::from_slice::<Value>(definition).unwrap()), ("sg00/def.json", wanted));
        assert_eq!(Header::parse(&neff).unwrap(), super::header("trn-kernels.copy.e", payload));
        let zipped = emulated(&program, true).unwrap();
        let mut unzipped = vec![];
        flate2::read::GzDecoder::new(&zipped[HEADER_BYTES..]).read_to_end(&mut unzipped).unwrap();
        assert_eq!(unzipped, payload);
        assert_eq!(emulated(&program, true).unwrap(), zipped, "the same program gives the same bytes");
    }

    #[test]
    fn bad_programs_and_names_are_refused() {
        let message = |json: &[u8]| emulated(json, true).unwrap_err().to_string();
        assert!(message(b"{}").contains("missing field"), "{}", message(b"{}"));
        assert!(message(&program("a", "b")).contains("two of its variables are named \"b\""));
        for name in ["", "nul\0", &"n".repeat(256)] {
            assert!(message(&program(name, "output_0")).contains("needed 1 to 255 bytes without NUL"), "{name:?}");
        }
        assert!(emulated(&program(&"n".repeat(255), "output_0"), true).is_ok());
    }
}
