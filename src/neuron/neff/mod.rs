//! NEFF: what the compiler makes and the runtime loads. A header of 1024 bytes, then a tar archive, usually gzipped.
//!
//! [`Header::parse`] needs nothing; what is in the archive is read with feature `neff`. Layout: AWS's developer guide. The format
//! has no magic number, so the checks here are all there is between any bytes and the library.
#![forbid(unsafe_code)]

#[cfg(feature = "neff")]
mod archive;
#[cfg(all(feature = "neff", feature = "emulator"))]
mod emulated;

#[cfg(feature = "neff")]
pub use archive::{Archive, FileEntry, HashCheck, Variable, read_file};
#[cfg(all(feature = "neff", feature = "emulator"))]
pub use emulated::emulated;

use super::error::{NeuronError, Result};

/// Bytes of the header.
pub const HEADER_BYTES: usize = 1024;

/// How the payload is hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PkgVersion {
    /// 1: SHA-256, 32 bytes.
    Sha256,
    /// 2: MD5, the first 16 bytes of the field.
    Md5,
    /// 0xFA4E: this project's emulated library runs it, and the true one refuses it. SHA-256.
    Emulated,
}

impl PkgVersion {
    /// The number in the header.
    pub const fn number(self) -> u64 {
        match self {
            PkgVersion::Sha256 => 1,
            PkgVersion::Md5 => 2,
            PkgVersion::Emulated => 0xFA4E,
        }
    }

    /// The version with a number.
    pub const fn from_number(number: u64) -> Option<PkgVersion> {
        match number {
            1 => Some(PkgVersion::Sha256),
            2 => Some(PkgVersion::Md5),
            0xFA4E => Some(PkgVersion::Emulated),
            _ => None,
        }
    }
}

/// Where each field is.
mod at {
    use std::ops::Range;

    pub(super) const PKG_VERSION: usize = 0;
    pub(super) const HEADER_SIZE: usize = 8;
    pub(super) const DATA_SIZE: usize = 16;
    pub(super) const MAJOR: usize = 24;
    pub(super) const MINOR: usize = 32;
    pub(super) const BUILD_VERSION: Range<usize> = 40..168;
    pub(super) const NUM_TPB: usize = 168;
    pub(super) const HASH: Range<usize> = 172..204;
    pub(super) const UUID: Range<usize> = 204..220;
    pub(super) const NAME: Range<usize> = 220..476;
    pub(super) const REQUESTED_TPB: usize = 476;
    pub(super) const TPB_PER_NODE: Range<usize> = 480..544;
    pub(super) const FEATURE_BITS: usize = 544;
    pub(super) const LNC_SIZE: usize = 552;
}

/// The header of a NEFF.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// How the payload is hashed.
    pub pkg_version: PkgVersion,
    /// Bytes behind the header.
    pub data_size: u64,
    /// Version of the NEFF format.
    pub neff_version: (u64, u64),
    /// Version of the compiler, as text.
    pub build_version: String,
    /// Physical cores used.
    pub num_tpb: u32,
    /// Hash of the payload; see [`PkgVersion`] for how much of it counts.
    pub hash: [u8; 32],
    /// Identity.
    pub uuid: [u8; 16],
    /// Name of the network.
    pub name: String,
    /// Physical cores asked for.
    pub requested_tpb_count: u32,
    /// Physical cores on each node.
    pub tpb_per_node: [u8; 64],
    /// Features that the runtime must have.
    pub feature_bits: u64,
    /// Physical cores of a logical one; old files do not say.
    pub lnc_size: Option<u32>,
}

/// `N` bytes of a whole header.
fn bytes<const N: usize>(header: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    header.get(at..).and_then(|tail| tail.first_chunk()).copied().unwrap_or([0; N])
}

/// A text field up to its NUL or its end. It is for messages: bytes that are not UTF-8 are replaced.
fn text(header: &[u8; HEADER_BYTES], at: std::ops::Range<usize>) -> String {
    let field = header.get(at).unwrap_or_default();
    let text = field.split(|b| *b == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}

/// Header and payload, if there is a header.
fn split(neff: &[u8]) -> Result<(&[u8; HEADER_BYTES], &[u8])> {
    neff.split_first_chunk().ok_or_else(|| NeuronError::Neff {
        problem: format!("{} bytes, the header alone has {HEADER_BYTES}", neff.len()),
    })
}

/// Whether a payload is gzipped.
fn is_gzip(payload: &[u8]) -> bool {
    payload.starts_with(&[0x1f, 0x8b])
}

impl Header {
    /// Reads and checks the header of a whole NEFF: that it is long enough, of a known kind, that its sizes are those of the bytes
    /// given, and that an archive follows.
    ///
    /// # Errors
    /// [`NeuronError::Neff`].
    pub fn parse(neff: &[u8]) -> Result<Header> {
        let refused = |problem| Err(NeuronError::Neff { problem });
        let (header, payload) = split(neff)?;
        let word = |at| u64::from_le_bytes(bytes(header, at));
        let half = |at| u32::from_le_bytes(bytes(header, at));
        let Some(pkg_version) = PkgVersion::from_number(word(at::PKG_VERSION)) else {
            return refused(format!("package version {}, known are 1 (SHA-256) and 2 (MD5)", word(at::PKG_VERSION)));
        };
        if word(at::HEADER_SIZE) != HEADER_BYTES as u64 {
            return refused(format!("a header of {} bytes, needed {HEADER_BYTES}", word(at::HEADER_SIZE)));
        }
        let data_size = word(at::DATA_SIZE);
        if data_size != payload.len() as u64 {
            return refused(format!("the header says {data_size} bytes follow it, {} do", payload.len()));
        }
        let is_tar = payload.get(257..262) == Some(b"ustar");
        if !is_gzip(payload) && !is_tar {
            return refused("no tar archive follows the header".into());
        }
        Ok(Header {
            pkg_version,
            data_size,
            neff_version: (word(at::MAJOR), word(at::MINOR)),
            build_version: text(header, at::BUILD_VERSION),
            num_tpb: half(at::NUM_TPB),
            hash: bytes(header, at::HASH.start),
            uuid: bytes(header, at::UUID.start),
            name: text(header, at::NAME),
            requested_tpb_count: half(at::REQUESTED_TPB),
            tpb_per_node: bytes(header, at::TPB_PER_NODE.start),
            feature_bits: word(at::FEATURE_BITS),
            lnc_size: Some(half(at::LNC_SIZE)).filter(|lnc| *lnc > 0),
        })
    }

    /// The 1024 bytes. Texts that do not fit their field are cut; the header's own size is what it must be.
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        let mut put = |at: usize, room: usize, bytes: &[u8]| {
            let field = header.iter_mut().skip(at).take(room);
            field.zip(bytes).for_each(|(to, from)| *to = *from);
        };
        let (major, minor) = self.neff_version;
        let words = [
            (at::PKG_VERSION, self.pkg_version.number()),
            (at::HEADER_SIZE, HEADER_BYTES as u64),
            (at::DATA_SIZE, self.data_size),
            (at::MAJOR, major),
            (at::MINOR, minor),
            (at::FEATURE_BITS, self.feature_bits),
        ];
        words.iter().for_each(|(at, word)| put(*at, 8, &word.to_le_bytes()));
        let halves = [
            (at::NUM_TPB, self.num_tpb),
            (at::REQUESTED_TPB, self.requested_tpb_count),
            (at::LNC_SIZE, self.lnc_size.unwrap_or(0)),
        ];
        halves.iter().for_each(|(at, half)| put(*at, 4, &half.to_le_bytes()));
        let fields: [(_, &[u8]); 5] = [
            (at::BUILD_VERSION, self.build_version.as_bytes()),
            (at::HASH, &self.hash),
            (at::UUID, &self.uuid),
            (at::NAME, self.name.as_bytes()),
            (at::TPB_PER_NODE, &self.tpb_per_node),
        ];
        fields.iter().for_each(|(at, field)| put(at.start, at.len(), field));
        header
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(payload: &[u8]) -> Header {
        Header {
            pkg_version: PkgVersion::Sha256,
            data_size: payload.len() as u64,
            neff_version: (2, 1),
            build_version: "2.21.0".into(),
            num_tpb: 2,
            hash: std::array::from_fn(|i| i as u8),
            uuid: [7; 16],
            name: "kernel.example".into(),
            requested_tpb_count: 1,
            tpb_per_node: [1; 64],
            feature_bits: 1 << 40,
            lnc_size: Some(2),
        }
    }

    /// A header with a payload that looks like one.
    fn neff() -> Vec<u8> {
        let payload = [&[0x1f, 0x8b][..], &[0; 30]].concat();
        [&header(&payload).to_bytes()[..], &payload].concat()
    }

    fn problem(neff: &[u8]) -> String {
        match Header::parse(neff).unwrap_err() {
            NeuronError::Neff { problem } => problem,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn written_and_read() {
        let neff = neff();
        assert_eq!(Header::parse(&neff).unwrap(), header(&neff[1024..]));
        // Offsets of the guide, apart from the code's own table.
        assert_eq!((neff[8], neff[9], neff[16], neff[24], neff[32]), (0, 4, 32, 2, 1));
        assert_eq!((&neff[40..46], neff[168], neff[172 + 31], neff[204]), (&b"2.21.0"[..], 2, 31, 7));
        assert_eq!((&neff[220..226], neff[476], neff[480], neff[549], neff[552]), (&b"kernel"[..], 1, 1, 1, 2));
    }

    #[test]
    fn fields_that_are_full_or_old() {
        let mut neff = neff();
        neff[220..476].fill(b'n');
        neff[552] = 0;
        let parsed = Header::parse(&neff).unwrap();
        assert_eq!((parsed.name.len(), parsed.lnc_size), (256, None));
        neff[220] = 0xff;
        assert!(Header::parse(&neff).unwrap().name.starts_with('\u{fffd}'));
        let long = Header { name: "x".repeat(300), ..header(&[]) }.to_bytes();
        assert_eq!((long[475], long[476]), (b'x', 1));
    }

    #[test]
    fn each_check_is_made() {
        let good = neff();
        let with = |at: usize, byte: u8| {
            let mut bad = good.clone();
            bad[at] = byte;
            problem(&bad)
        };
        assert!(problem(&[]).contains("0 bytes"));
        assert!(problem(&good[..1023]).contains("1023 bytes"));
        assert!(problem(&good[..1024]).contains("32 bytes follow it, 0 do"));
        assert!(problem(&good[..good.len() - 1]).contains("31 do"));
        assert!(with(0, 3).contains("package version 3"));
        assert!(with(9, 5).contains("header of 1280"));
        assert!(with(16, 33).contains("says 33"));
        assert!(with(23, 0x80).contains("follow"));
        assert!(with(1024, 0).contains("no tar"));
    }

    #[test]
    fn a_plain_tar_is_seen_by_its_mark() {
        let mut payload = vec![0; 512];
        payload[257..262].copy_from_slice(b"ustar");
        let emulated = Header { pkg_version: PkgVersion::Emulated, ..header(&payload) };
        let neff = [&emulated.to_bytes()[..], &payload].concat();
        assert_eq!(Header::parse(&neff).unwrap().pkg_version, PkgVersion::Emulated);
    }

    proptest! {
        #[test]
        fn any_bytes_give_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..1200)) {
            let _any = Header::parse(&bytes);
        }

        /// What is accepted says the truth about its bytes; and is written as it was read.
        #[test]
        fn a_spoilt_header_is_refused_or_true(spoilt in prop::collection::vec((0usize..1056, any::<u8>()), 0..4)) {
            let mut bytes = neff();
            spoilt.iter().for_each(|(at, byte)| bytes[*at] = *byte);
            if let Ok(header) = Header::parse(&bytes) {
                prop_assert_eq!(header.data_size, 32);
                let written = header.to_bytes();
                let whole = [&written[..], &bytes[1024..]].concat();
                prop_assert_eq!(written[..40].to_vec(), bytes[..40].to_vec());
                let again = Header::parse(&whole).unwrap();
                prop_assert_eq!((again.hash, again.uuid, again.lnc_size), (header.hash, header.uuid, header.lnc_size));
            }
        }
    }
}
