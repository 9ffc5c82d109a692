//! Checkpoint weights as the device kernels read them from HBM, and back.
//!
//! `docs/layouts.md` is the normative text: names, shapes and index formulas. [`MxLayout`] feeds `nc_matmul_mx`, [`RowsLayout`]
//! the plain and the double-row matmul, [`KvRowsLayout`] attention over a paged cache. A layout is a described object: it gives
//! shapes, maps an element to its place and a place to its element, and prints itself. Packing moves codes and scales and changes
//! none (but where OCP E4M3 is halved for Trainium2, with a report); unpacking is its exact inverse.
#![forbid(unsafe_code)]

mod columns;
mod halve;
mod kv;
mod mx;
mod mx_pack;
mod rows;
mod rows_pack;
mod turn;
mod words;

pub use columns::{ColumnOrder, Columns, GateUp};
pub use kv::{KvHeads, KvRowsLayout, PackedKvRows};
pub use mx::{MxElement, MxLayout, MxPlace, MxScalePlace};
pub use mx_pack::{PackedMx, PackedMxExperts};
pub use rows::{RowElement, RowPlace, RowsLayout};
pub use rows_pack::PackedRows;

use crate::error::{Error, Result};

/// Partitions of SBUF and PSUM: rows of the TensorE array.
pub const PARTITIONS: usize = 128;

/// `len` zeros, or an error where the allocator has no room: padding makes a small matrix large.
fn zeros(what: &str, len: usize) -> Result<Vec<u8>> {
    Vec::<u8>::new()
        .try_reserve_exact(len)
        .map_err(|e| Error::Unsupported { what: format!("{what} of {len} bytes"), because: e.to_string() })?;
    Ok(vec![0; len])
}

/// Refuses bytes that another layout, or another version of this one, made.
fn check_name(got: &str, needed: &'static str) -> Result<()> {
    if got == needed {
        return Ok(());
    }
    Err(Error::Unsupported {
        what: format!("tensors of layout {got:?} read as {needed:?}"),
        because: "packed tensors are only unpacked by the layout and version that made them".into(),
    })
}

/// Refuses a weight of another shape or scheme than a layout was made for.
fn check_weight(
    w: &crate::quant::QuantizedMatrix<'_>,
    (scheme, n, k): (crate::quant::Scheme, usize, usize),
) -> Result<()> {
    crate::error::extent("weight", "n", w.n(), n)?;
    crate::error::extent("weight", "k", w.k(), k)?;
    if w.scheme() != scheme {
        return Err(Error::Unsupported {
            what: format!("a weight of {:?} in a layout of {scheme:?}", w.scheme()),
            because: "a layout serves the scheme it was made for".into(),
        });
    }
    Ok(())
}
