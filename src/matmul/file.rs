//! Packed weights as bytes: written once, mapped from then on.
//!
//! A header of 128 bytes, the packed bytes, the f32 scales; all little-endian. Every field is checked before any is believed, and
//! two checksums say whether bytes are those that were written. They do not say who wrote them: what decides which shortcuts kernels
//! take is not in the file, it is found in the packed bytes, and bytes that packing does not write are refused.
#![forbid(unsafe_code)]

use super::check::Check;
use super::checksum::Checksum;
use super::layout::PackedLayout;
use super::pack::check_tiles;
use super::packed::{Bytes, Facts, Outer, PackedMatrix};
use crate::cpu::{Cpu, LINE};
use crate::error::{Error, Result, length, mul};
use crate::num::Fp8;
use crate::quant::Scheme;
use std::io::{self, Write};
use std::sync::Arc;

const MAGIC: [u8; 8] = *b"TRNKPACK";
const HEADER: usize = 2 * LINE;
/// Where the checksum of what follows the header stands.
const CONTENTS_SUM: usize = 72;
/// Where the header's own checksum stands; the bytes before it are what it is of.
const HEADER_SUM: usize = HEADER - 8;
const OPERAND: &str = "packed bytes";
const SCALES: &str = "f32 scales of packed bytes";

/// A scheme as four numbers: kind, element, tile n, tile k.
fn scheme_fields(scheme: Scheme) -> [u64; 4] {
    let of = |element: Fp8| Fp8::ALL.iter().position(|e| *e == element).unwrap_or_default() as u64;
    match scheme {
        Scheme::Bf16 => [0, 0, 0, 0],
        Scheme::Mxfp4 => [1, 0, 0, 0],
        Scheme::Mxfp8(e) => [2, of(e), 0, 0],
        Scheme::Nvfp4 => [3, 0, 0, 0],
        Scheme::Fp8PerTensor(e) => [4, of(e), 0, 0],
        Scheme::Fp8PerChannel(e) => [5, of(e), 0, 0],
        Scheme::Fp8Blockwise { element, n, k } => [6, of(element), n as u64, k as u64],
    }
}

fn scheme_of(fields: [u64; 4]) -> Option<Scheme> {
    let [kind, element, n, k] = fields;
    let element = *Fp8::ALL.get(usize::try_from(element).ok()?)?;
    let scheme = match kind {
        0 => Scheme::Bf16,
        1 => Scheme::Mxfp4,
        2 => Scheme::Mxfp8(element),
        3 => Scheme::Nvfp4,
        4 => Scheme::Fp8PerTensor(element),
        5 => Scheme::Fp8PerChannel(element),
        6 => Scheme::Fp8Blockwise { element, n: usize::try_from(n).ok()?, k: usize::try_from(k).ok()? },
        _ => return None,
    };
    let empty = matches!(scheme, Scheme::Fp8Blockwise { n: 0, .. } | Scheme::Fp8Blockwise { k: 0, .. });
    (!empty && scheme_fields(scheme) == fields).then_some(scheme)
}

fn of_outer(outer: &Outer) -> Vec<u8> {
    outer.scales().iter().flat_map(|scale| scale.to_le_bytes()).collect()
}

fn wrong(at: usize, got: String, needed: &'static str) -> Error {
    Error::Value { operand: OPERAND.into(), at, got, needed }
}

/// Little-endian fields of a header.
struct Fields<'a>(&'a [u8; HEADER]);

impl Fields<'_> {
    fn u64(&self, at: usize) -> u64 {
        self.0[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    fn extent(&self, at: usize) -> Result<usize> {
        usize::try_from(self.u64(at)).map_err(|_| Error::Overflow { operand: OPERAND.into() })
    }
}

impl PackedMatrix {
    /// Bytes that [`PackedMatrix::write_to`] writes: a multiple of 4. What follows each other in a file should start at a multiple
    /// of 64.
    pub fn written_bytes(&self) -> usize {
        HEADER + self.bytes()
    }

    /// Writes the matrix, to be read by [`PackedMatrix::from_bytes`] of this crate's versions with the same
    /// [`PackedLayout::VERSION`].
    ///
    /// # Errors
    /// What `to` says.
    pub fn write_to(&self, mut to: impl Write) -> io::Result<()> {
        let data = &self.data.get()[..self.layout.bytes().min(self.data.get().len())];
        let outer = of_outer(&self.outer);
        let mut sum = Checksum::new();
        sum.take(data);
        sum.take(&outer);
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(&MAGIC);
        let [kind, element, tile_n, tile_k] = scheme_fields(self.scheme());
        let (n, k) = (self.n() as u64, self.k() as u64);
        let version = u64::from(PackedLayout::VERSION);
        let fields = [version, kind, element, tile_n, tile_k, n, k, outer.len() as u64 / 4, sum.finish()];
        for (to, field) in header[8..HEADER_SUM].chunks_exact_mut(8).zip(fields) {
            to.copy_from_slice(&field.to_le_bytes());
        }
        let mut sum = Checksum::new();
        sum.take(&header[..HEADER_SUM]);
        header[HEADER_SUM..].copy_from_slice(&sum.finish().to_le_bytes());
        to.write_all(&header)?;
        to.write_all(data)?;
        to.write_all(&outer)
    }

    /// A matrix over bytes that [`PackedMatrix::write_to`] wrote, at no copy: a map of a file, say, or part of one. All of it is
    /// read once, to check it: its checksums are against accidents (any change within eight aligned bytes is noticed, others but
    /// for one in about 2^64), and whatever has the right ones is a matrix that packing could have written, computed with as that.
    ///
    /// # Errors
    /// [`Error::Length`] if `bytes` is shorter or longer than what was written; [`Error::Value`] if it is not a packed matrix, is
    /// of another layout version, does not begin at a multiple of 64 in memory, is not what was written (its checksums), or holds
    /// what packing does not write (a scale that is not finite, an NVFP4 block scale with the sign bit, a block of zeros without
    /// scale 1, a bf16 subnormal, anything past n and k but zeros); [`Error::Multiple`] if k is not a multiple of the scheme's
    /// block; [`Error::Overflow`]; [`Error::Unsupported`] as [`Cpu::pack`](crate::Cpu::pack).
    pub fn from_bytes(bytes: impl AsRef<[u8]> + Send + Sync + 'static) -> Result<Self> {
        let owner: Arc<dyn AsRef<[u8]> + Send + Sync> = Arc::new(bytes);
        let all = (*owner).as_ref();
        let Some((header, rest)) = all.split_first_chunk::<HEADER>() else {
            return Err(Error::Length { operand: OPERAND.into(), got: all.len(), needed: HEADER });
        };
        if header[..8] != MAGIC {
            return Err(wrong(0, format!("{:02x?}", &header[..8]), "a packed matrix, which begins with TRNKPACK"));
        }
        let fields = Fields(header);
        if fields.u64(8) != u64::from(PackedLayout::VERSION) {
            return Err(wrong(
                8,
                format!("layout version {}", fields.u64(8)),
                "layout version 3: pack the weights again",
            ));
        }
        let offset = all.as_ptr() as usize % LINE;
        if offset != 0 {
            return Err(wrong(
                0,
                format!("an address of {offset} modulo {LINE}"),
                "bytes that begin at a multiple of 64",
            ));
        }
        let mut sum = Checksum::new();
        sum.take(&header[..HEADER_SUM]);
        if sum.finish() != fields.u64(HEADER_SUM) {
            return Err(wrong(HEADER_SUM, "another checksum".into(), "a header as it was written"));
        }
        let Some(scheme) = scheme_of([16, 24, 32, 40].map(|at| fields.u64(at))) else {
            return Err(wrong(16, "an unknown scheme".into(), "a scheme of this layout version"));
        };
        let (n, k) = (fields.extent(48)?, fields.extent(56)?);
        if !k.is_multiple_of(scheme.block()) {
            return Err(Error::Multiple { operand: OPERAND.into(), axis: "k", got: k, of: scheme.block() });
        }
        check_tiles(scheme, k)?;
        let layout = PackedLayout::new(scheme, n, k)?;
        let scales = match scheme {
            Scheme::Fp8PerChannel(_) => n,
            Scheme::Fp8Blockwise { n: tile_n, k: tile_k, .. } => mul(OPERAND, n.div_ceil(tile_n), k.div_ceil(tile_k))?,
            _ => 1,
        };
        length(SCALES, fields.extent(64)?, scales)?;
        let end = HEADER.checked_add(layout.bytes()).and_then(|end| end.checked_add(scales.checked_mul(4)?));
        length(OPERAND, all.len(), end.ok_or(Error::Overflow { operand: OPERAND.into() })?)?;
        let (data, outer) = rest.split_at(layout.bytes());
        let facts = read(layout, data, outer, fields.u64(CONTENTS_SUM))?;
        let outer = outer_of(scheme, k, outer)?;
        let len = layout.bytes();
        Ok(PackedMatrix { layout, data: Bytes::Lent { owner, start: HEADER, len }, outer, facts })
    }
}

/// Reads everything once: the facts of all panels, if the checksum is `expected` and every panel is as packing writes it.
fn read(layout: PackedLayout, data: &[u8], outer: &[u8], expected: u64) -> Result<Facts> {
    let tier = Cpu::detect().tier();
    let (mut sum, mut facts) = (Checksum::new(), Ok(Facts::NONE));
    // Panel by panel, so that what is checked is still in a cache.
    for (panel, bytes) in data.chunks_exact(layout.panel_bytes().max(1)).enumerate() {
        sum.take(bytes);
        if let Ok(before) = facts {
            let mut found = Ok(Facts::NONE);
            tier.run(Check { layout, panel, bytes, found: &mut found });
            facts = found.map(|facts| before.merge(facts)).map_err(|foreign| (panel, foreign));
        }
    }
    sum.take(outer);
    if sum.finish() != expected {
        return Err(wrong(CONTENTS_SUM, "another checksum".into(), "contents as they were written"));
    }
    facts.map_err(|(panel, foreign)| {
        wrong(HEADER + panel * layout.panel_bytes() + foreign.at, foreign.got, foreign.needed)
    })
}

/// The f32 scales from their bytes, as many as the scheme has.
fn outer_of(scheme: Scheme, k: usize, bytes: &[u8]) -> Result<Outer> {
    let scales: Vec<f32> = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    crate::quant::finite(SCALES, &scales)?;
    Ok(match scheme {
        Scheme::Fp8PerChannel(_) => Outer::Channel(scales),
        Scheme::Fp8Blockwise { n, k: tile, .. } => Outer::Tiles { n, k: tile, row: k.div_ceil(tile), scales },
        Scheme::Nvfp4 | Scheme::Fp8PerTensor(_) => Outer::Tensor(scales.first().copied().unwrap_or(1.0)),
        Scheme::Bf16 | Scheme::Mxfp4 | Scheme::Mxfp8(_) => match scales.iter().position(|scale| *scale != 1.0) {
            Some(at) => {
                let got = scales[at].to_string();
                return Err(Error::Value {
                    operand: SCALES.into(),
                    at,
                    got,
                    needed: "1, for the scheme has no f32 scale",
                });
            }
            None => Outer::Tensor(1.0),
        },
    })
}
