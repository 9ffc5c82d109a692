//! Reads an emulated NEFF: a 1024-byte header, then a tar archive (gzipped or not) with the variables and the program.
#![forbid(unsafe_code)]

use crate::abi::status;
use crate::calls::{Outcome, refuse};
use flate2::read::GzDecoder;
use sha2::{Digest, Sha256};
use std::io::Read;

/// `pkg_version` of an emulated NEFF; the real runtime knows 1 and 2 only and refuses it.
const EMULATED: u64 = 0xFA4E;
const HEADER: usize = 1024;
/// Bytes that an archive may unpack to.
const UNPACKED_LIMIT: u64 = 512 << 20;

/// What the header and the archive say.
pub(crate) struct Container {
    pub(crate) program: Vec<u8>,
    pub(crate) definition: Vec<u8>,
    /// Physical cores to a logical one; 0 if not said.
    pub(crate) lnc: u32,
    /// Logical cores that the model wants.
    pub(crate) cores: u32,
}

fn invalid<T>(reason: impl Into<String>) -> Outcome<T> {
    refuse(status::INVALID, reason)
}

impl Container {
    /// Takes the bytes of a file apart; `check_hash` as NEURON_RT_VALIDATE_HASH says.
    pub(crate) fn read(neff: &[u8], check_hash: bool) -> Outcome<Container> {
        let Some((header, payload)) = neff.split_at_checked(HEADER) else {
            return invalid(format!("neff: {} bytes, the header alone has {HEADER}", neff.len()));
        };
        let word = |at: usize| header[at..at + 8].iter().rev().fold(0u64, |n, &b| n << 8 | u64::from(b));
        let half = |at: usize| header[at..at + 4].iter().rev().fold(0u32, |n, &b| n << 8 | u32::from(b));
        let (pkg_version, header_size, data_size) = (word(0), word(8), word(16));
        if header_size != HEADER as u64 {
            return invalid(format!("neff: header_size is {header_size}, needed {HEADER}"));
        }
        if data_size != payload.len() as u64 {
            return invalid(format!("neff: data_size is {data_size}, {} bytes follow the header", payload.len()));
        }
        match pkg_version {
            EMULATED => {}
            1 | 2 => {
                return refuse(
                    status::UNSUPPORTED_NEFF,
                    "neff: compiled for a NeuronCore; this library executes emulated NEFFs only",
                );
            }
            other => return refuse(status::UNSUPPORTED_NEFF, format!("neff: pkg_version {other:#x} is not known")),
        }
        if check_hash && header[172..204] != Sha256::digest(payload)[..] {
            return invalid("neff: the payload has another hash than the header says");
        }
        let (mut program, mut definition) = (None, None);
        let mut keep = |path: &str, bytes: Vec<u8>| match path {
            "program.json" => program = Some(bytes),
            "sg00/def.json" => definition = Some(bytes),
            _ => {}
        };
        let archive: Box<dyn Read + '_> =
            if payload.starts_with(&[0x1F, 0x8B]) { Box::new(GzDecoder::new(payload)) } else { Box::new(payload) };
        if let Err(e) = each_file(archive.take(UNPACKED_LIMIT), &mut keep) {
            return invalid(format!("neff: archive: {e}"));
        }
        let (Some(program), Some(definition)) = (program, definition) else {
            return invalid("neff: archive lacks program.json or sg00/def.json");
        };
        Ok(Container { program, definition, lnc: half(552), cores: half(476) })
    }
}

/// Calls `keep` with path and contents of every file of a tar archive.
fn each_file(archive: impl Read, keep: &mut dyn FnMut(&str, Vec<u8>)) -> std::io::Result<()> {
    for entry in tar::Archive::new(archive).entries()? {
        let mut entry = entry?;
        let path = entry.path()?.to_string_lossy().into_owned();
        let mut bytes = vec![];
        entry.read_to_end(&mut bytes)?;
        keep(path.trim_start_matches("./"), bytes);
    }
    Ok(())
}
