//! On-chip copies, casts, constants and transposes.
#![forbid(unsafe_code)]

use super::super::fault::Result;
use super::super::machine::Execution;
use super::super::memory::{Elements, Psum};
use super::super::op::{Op, TileOrBits};
use super::converted;

pub(in super::super) fn execute(x: &mut Execution<'_, '_>) -> Result<()> {
    match x.instruction.op {
        Op::Copy { dst, src } => {
            let data = converted(&x.elements(src)?, x.dtype(src), x.dtype(dst))?;
            x.store(dst, &data, None, Psum::Other)
        }
        Op::Memset { dst, bits } => {
            let count = x.access(dst).count();
            x.store(dst, &Elements::defined(vec![bits; count]), None, Psum::Other)
        }
        Op::CopyPredicated { dst, src, predicate, reverse } => {
            let take: Vec<bool> = x.bits(predicate)?.into_iter().map(|b| (b != 0) != reverse).collect();
            let data = match src {
                TileOrBits::Tile(slot) => x.elements(slot)?,
                TileOrBits::Bits(bits) => Elements::defined(vec![bits; take.len()]),
            };
            x.store(dst, &data, Some(&take), Psum::Other)
        }
        Op::Transpose { dst, data } => {
            let (rows, columns) = (x.access(data).partitions(), x.access(data).free());
            let turned = x.elements(data)?.permuted(|i| i % rows * columns + i / rows);
            x.store(dst, &turned, None, Psum::Other)
        }
        _ => Ok(()),
    }
}
