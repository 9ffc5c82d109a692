//! Weights as the kernels read them.
#![forbid(unsafe_code)]

use crate::cpu::{Cpu, LANES, STEP, Smallest, Tier, flush, for_each_zip};
use crate::error::{Error, Result, mul};
use crate::num::{E8M0, F8E4M3Fn};
use crate::quant::{QuantizedMatrix, Scheme};
use half::bf16;

/// Bytes of a decoded step: one f32 for each k and lane.
pub(super) const DECODED: usize = STEP * LANES;

/// Weights `[n, k]` packed for the CPU kernels: the same codes and scales in another order, nothing decoded.
///
/// Layout: panels of 16 rows (n); in a panel one record for each 32 along k. A record holds the codes as 4-byte words, for each
/// word the 16 rows side by side (word w of a row = its code bytes `4w..4w+4`, even element in the low nibble), then the 16
/// rows' block scales (NVFP4: twice 16). Rows past n and columns past k hold zeros. f32 scales lie beside, as they were.
#[derive(Debug, Clone)]
pub struct PackedMatrix {
    scheme: Scheme,
    n: usize,
    k: usize,
    data: Vec<u8>,
    outer: Outer,
    smallest: Smallest,
    finite: bool,
}

/// f32 scales.
#[derive(Debug, Clone)]
pub(super) enum Outer {
    /// The same for all.
    Tensor(f32),
    /// One for each row.
    Channel(Vec<f32>),
    /// A grid of tiles `n` x `k`, `row` scales in a grid row.
    Tiles { n: usize, k: usize, row: usize, scales: Vec<f32> },
}

impl PackedMatrix {
    /// The scheme.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Rows: output channels.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Columns: the contraction axis.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Whether every weight is a number: no NaN or infinite code, no NaN scale (f32 scales always are finite). Known since
    /// packing, at no cost; [`QuantizedMatrix::check_finite`] says where.
    pub fn is_finite(&self) -> bool {
        self.finite
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let outer = match &self.outer {
            Outer::Tensor(_) => 1,
            Outer::Channel(s) => s.len(),
            Outer::Tiles { scales, .. } => scales.len(),
        };
        self.data.len() + outer * size_of::<f32>()
    }

    /// Number of panels.
    pub(super) fn panels(&self) -> usize {
        self.n.div_ceil(LANES)
    }

    /// k rounded up to whole steps.
    pub(super) fn padded_k(&self) -> usize {
        self.k.next_multiple_of(STEP)
    }

    pub(super) fn outer(&self) -> &Outer {
        &self.outer
    }

    pub(super) fn smallest(&self) -> Smallest {
        self.smallest
    }

    /// Decodes steps `steps` of panel `panel` to `[step * 32][LANES]` values: code x block scale, subnormals flushed.
    pub(super) fn decode(&self, tier: Tier, panel: usize, steps: std::ops::Range<usize>, out: &mut [f32]) {
        let record = record_bytes(self.scheme);
        let first = (panel * (self.padded_k() / STEP) + steps.start) * record;
        let records = self.data[first..].chunks_exact(record);
        for (record, out) in records.zip(out.chunks_exact_mut(DECODED)).take(steps.len()) {
            decode_record(tier, self.scheme, record, out);
        }
    }
}

/// Bytes of the codes of a record.
const fn code_bytes(scheme: Scheme) -> usize {
    STEP * LANES * scheme.bits() / 8
}

/// Bytes of a record: codes and block scales of 32 k for 16 rows.
const fn record_bytes(scheme: Scheme) -> usize {
    let scales = match scheme.block() {
        1 => 0,
        block => STEP / block * LANES,
    };
    code_bytes(scheme) + scales
}

fn decode_record(tier: Tier, scheme: Scheme, record: &[u8], out: &mut [f32]) {
    let (codes, scales) = record.split_at(code_bytes(scheme));
    let lanes = |scales: &[u8], f: fn(u8) -> f32| std::array::from_fn(|l| f(scales[l]));
    match scheme {
        Scheme::Bf16 => {
            for (word, codes) in codes.chunks_exact(4 * LANES).enumerate() {
                for (l, pair) in codes.chunks_exact(4).enumerate() {
                    let at = 2 * word * LANES + l;
                    out[at] = flush(bf16::from_le_bytes([pair[0], pair[1]]).to_f32());
                    out[at + LANES] = flush(bf16::from_le_bytes([pair[2], pair[3]]).to_f32());
                }
            }
        }
        Scheme::Mxfp4 => tier.decode_fp4(codes, &lanes(scales, |s| E8M0::from_bits(s).to_f32()), out),
        Scheme::Nvfp4 => {
            let halves = codes.chunks_exact(codes.len() / 2).zip(out.chunks_exact_mut(DECODED / 2));
            for ((codes, out), scales) in halves.zip(scales.chunks_exact(LANES)) {
                tier.decode_fp4(codes, &lanes(scales, |s| F8E4M3Fn::from_bits(s).to_f32()), out);
            }
        }
        Scheme::Mxfp8(e) => tier.decode_fp8(e.values(), codes, &lanes(scales, |s| E8M0::from_bits(s).to_f32()), out),
        Scheme::Fp8PerTensor(e) | Scheme::Fp8PerChannel(e) | Scheme::Fp8Blockwise { element: e, .. } => {
            tier.decode_fp8(e.values(), codes, &[1.0; LANES], out);
        }
    }
}

/// Writes the record of step `step` of the 16 rows from `first`.
fn write_record(w: &QuantizedMatrix<'_>, first: usize, step: usize, record: &mut [u8]) {
    let scheme = w.scheme();
    let (codes, scales) = record.split_at_mut(code_bytes(scheme));
    let mut row_codes = [0u8; STEP * 2];
    let row_codes = &mut row_codes[..STEP * scheme.bits() / 8];
    for l in 0..LANES {
        let row = first + l;
        if row >= w.n() {
            continue;
        }
        w.step_codes(row, step, row_codes);
        for (word, bytes) in row_codes.chunks_exact(4).enumerate() {
            codes[(word * LANES + l) * 4..][..4].copy_from_slice(bytes);
        }
        for (b, scales) in scales.chunks_exact_mut(LANES).enumerate() {
            scales[l] = w.block_scale_code(row, step * STEP + b * scheme.block()).unwrap_or_default();
        }
    }
}

fn outer(w: &QuantizedMatrix<'_>) -> Outer {
    let at = |row, col| w.outer_scale(row, col).unwrap_or(1.0);
    match w.scheme() {
        Scheme::Fp8PerChannel(_) => Outer::Channel((0..w.n()).map(|row| at(row, 0)).collect()),
        Scheme::Fp8Blockwise { n, k, .. } => {
            let row = w.k().div_ceil(k);
            // Without columns any number of rows fits any slice: do not walk them.
            let rows = (0..if row == 0 { 0 } else { w.n() }).step_by(n);
            let scales = rows.flat_map(|i| (0..row).map(move |j| (i, j * k))).map(|(i, j)| at(i, j)).collect();
            Outer::Tiles { n, k, row, scales }
        }
        _ => Outer::Tensor(at(0, 0)),
    }
}

impl Cpu<'_> {
    /// Packs weights once, in parallel; any number of calls then use them, on any tier.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for scale tiles whose k is neither a multiple of 32 nor at least the matrix's k;
    /// [`Error::Overflow`].
    pub fn pack(&self, w: &QuantizedMatrix<'_>) -> Result<PackedMatrix> {
        let scheme = w.scheme();
        if let Scheme::Fp8Blockwise { k, .. } = scheme
            && !k.is_multiple_of(STEP)
            && k < w.k()
        {
            return Err(Error::Unsupported {
                what: format!("weights with scale tiles of {k} along k"),
                because: format!("the canonical sum takes steps of {STEP}: tiles must be a multiple of it"),
            });
        }
        let panels = w.n().div_ceil(LANES);
        let steps = w.k().div_ceil(STEP);
        let panel = mul("packed weights", steps, record_bytes(scheme))?;
        let mut data = vec![0; mul("packed weights", panels, panel)?];
        // One for each panel that holds anything: without columns there is no memory that would bound n.
        let mut seen = vec![(Smallest::BF16, true); if steps == 0 { 0 } else { panels }];
        let tier = self.tier();
        for_each_zip(self.parallelism(), (&mut data, panel), (&mut seen, 1), |p, data, seen| {
            let mut decoded = [0.0; DECODED];
            for (step, record) in data.chunks_exact_mut(record_bytes(scheme)).enumerate() {
                write_record(w, p * LANES, step, record);
                decode_record(tier, scheme, record, &mut decoded);
                for (smallest, finite) in &mut *seen {
                    smallest.see(&decoded);
                    *finite &= decoded.iter().fold(true, |all, v| all & v.is_finite());
                }
            }
        });
        let (smallest, finite) =
            seen.into_iter().fold((Smallest::BF16, true), |(s, all), (seen, finite)| (s.merge(seen), all && finite));
        Ok(PackedMatrix { scheme, n: w.n(), k: w.k(), data, outer: outer(w), smallest, finite })
    }
}
