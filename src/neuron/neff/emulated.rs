//! Builds the NEFF of an exported program, for `tests/emulated-libnrt` to execute.
//!
//! It is a real container (header, tar archive, `sg00/def.json`) around a program instead of instructions. Its `pkg_version`
//! is one that no runtime accepts, so that it cannot be taken for a compiled kernel.
#![forbid(unsafe_code)]

use crate::trainium::emulator::{Limits, Program};
use crate::{Error, Result};
use flate2::{Compression, write::GzEncoder};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::io::Write;

/// Bytes of the header.
const HEADER_BYTES: usize = 1024;
/// `pkg_version` of an emulated NEFF.
const PKG_VERSION: u64 = 0xFA4E;
/// Bytes of a name in the header and of a tensor's name, with their NUL.
const NAME_BYTES: usize = 256;
/// Ending of an input's name that the program updates in place; its output has the name without it.
const ALIAS: &str = ".must_alias_input";

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
    let mut neff = header(&name, &payload);
    neff.extend_from_slice(&payload);
    Ok(neff)
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
        let name = if in_place { format!("{}{ALIAS}", port.name) } else { port.name.clone() };
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

/// The 1024-byte header, little-endian.
fn header(name: &str, payload: &[u8]) -> Vec<u8> {
    let mut header = vec![0; HEADER_BYTES];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    let hash = Sha256::digest(payload);
    put(0, &PKG_VERSION.to_le_bytes());
    put(8, &(HEADER_BYTES as u64).to_le_bytes());
    put(16, &(payload.len() as u64).to_le_bytes());
    put(24, &2u64.to_le_bytes()); // neff_version_major of today's compilers
    put(40, concat!("trn-kernels ", env!("CARGO_PKG_VERSION")).as_bytes()); // build_version
    put(168, &1u32.to_le_bytes()); // num_tpb
    put(172, &hash);
    put(204, &hash[..16]); // uuid: the payload's, so that equal programs are equal files
    put(220, name.as_bytes());
    put(476, &1u32.to_le_bytes()); // requested_tpb_count
    put(480, &[1]); // tpb_per_node
    header
}
