//! Writing new tokens into the cache.
#![forbid(unsafe_code)]

use super::encode::encode;
use super::pool::OwnedPlane;
use super::{KvPool, PageTable, check_indptr};
use crate::error::{Error, Result, extent};
use crate::num::Real;
use crate::view::HeadsRef;

/// Tokens that one page of one sequence takes from an append.
struct Write {
    page: usize,
    /// Slots of the page, first and end.
    slots: (usize, usize),
    /// Row of `k` and `v` that goes to the first slot.
    row: usize,
}

/// Appends keys and values of new tokens to the last places of their sequences, quantizing each token by itself.
///
/// `table` is the state *after* the append: sequence b's last `append_indptr[b + 1] - append_indptr[b]` tokens are rows
/// `append_indptr[b]..` of `k` (`[tokens, num_kv_heads, head_dim_qk]`) and `v` (`[tokens, num_kv_heads, head_dim_vo]`). Any way to
/// cut the same tokens into appends gives the same bytes. Values that are not finite never become numbers: they are stored as they
/// are (f32, bf16, f16), as a NaN code (FP8) or as a NaN block (MX, NVFP4).
///
/// # Errors
/// [`Error::Index`] for the layer or a page outside the pool; [`Error::Value`] for a free page, an `append_indptr` that is not one, or
/// a slot that two sequences would share while one of them writes it; [`Error::Extent`] for a shape that does not fit or a sequence
/// shorter than what is appended to it. Nothing is written then.
pub fn append_kv<T: Real>(
    pool: &mut KvPool,
    layer: usize,
    table: &PageTable,
    append_indptr: &[usize],
    k: HeadsRef<'_, T>,
    v: HeadsRef<'_, T>,
) -> Result<()> {
    pool.check_layer(layer)?;
    let shape = *pool.shape();
    for (operand, x, head_dim, axis) in
        [("k", &k, shape.head_dim_qk, "head_dim_qk"), ("v", &v, shape.head_dim_vo, "head_dim_vo")]
    {
        extent(operand, "num_kv_heads", x.heads(), shape.num_kv_heads)?;
        extent(operand, axis, x.head_dim(), head_dim)?;
    }
    extent("v", "tokens", v.tokens(), k.tokens())?;
    shape.check_table(table, pool.used())?;
    check_indptr("append_indptr", append_indptr, k.tokens())?;
    extent("append_indptr", "batch", append_indptr.len() - 1, table.num_sequences())?;
    for (b, rows) in append_indptr.windows(2).enumerate() {
        let (new, len) = (rows[1] - rows[0], table.seq_len(b));
        if new > len {
            let operand = format!("tokens appended to sequence {b}").into();
            return Err(Error::Extent { operand, axis: "tokens", got: new, needed: len });
        }
    }
    check_shared(pool, table, append_indptr)?;

    let rule = pool.config().rule;
    let [k_plane, v_plane] = &mut pool.layers[layer];
    for (x, head_dim, plane) in [(&k, shape.head_dim_qk, k_plane), (&v, shape.head_dim_vo, v_plane)] {
        let (code_bytes, scale_bytes) = shape.vector_bytes(head_dim);
        let OwnedPlane { codes, block_scales, scale } = plane;
        for write in writes(table, append_indptr) {
            for slot in write.slots.0..write.slots.1 {
                let row = write.row + slot - write.slots.0;
                for head in 0..shape.num_kv_heads {
                    let n = shape.vector(write.page, slot, head);
                    let codes = &mut codes[n * code_bytes..][..code_bytes];
                    let scales = &mut block_scales[n * scale_bytes..][..scale_bytes];
                    encode(shape.format, rule, scale.of(head), x.head(row, head).unwrap_or_default(), codes, scales)?;
                }
            }
        }
    }
    Ok(())
}

/// All writes of an append, page by page.
fn writes<'a>(table: &'a PageTable, append_indptr: &'a [usize]) -> impl Iterator<Item = Write> + 'a {
    let size = table.page_size();
    append_indptr.windows(2).enumerate().flat_map(move |(b, rows)| {
        let len = table.seq_len(b);
        let first = len - (rows[1] - rows[0]);
        let pages = table.pages(b);
        // Pages before the first written slot are not touched.
        (first / size..len.div_ceil(size)).filter(move |_| first < len).map(move |at| {
            let from = first.max(at * size);
            let slots = (from - at * size, (len - at * size).min(size));
            Write { page: pages[at] as usize, slots, row: rows[0] + from - first }
        })
    })
}

/// Refuses an append that writes a slot which another place of the table shows too.
fn check_shared(pool: &mut KvPool, table: &PageTable, append_indptr: &[usize]) -> Result<()> {
    let result = find_shared(&mut pool.writes, table, append_indptr);
    for write in writes(table, append_indptr) {
        pool.writes[write.page] = 0;
    }
    result
}

/// `marks`: for each page 0, or 1 + the first slot written.
fn find_shared(marks: &mut [usize], table: &PageTable, append_indptr: &[usize]) -> Result<()> {
    let shared = |at: usize, page: usize| {
        Err(Error::Value {
            operand: "page table indices".into(),
            at,
            got: format!("page {page} a second time"),
            needed: "that no other place of the table show a slot this append writes",
        })
    };
    for write in writes(table, append_indptr) {
        // Both writers show all slots before the end of their writes, so the later one shows what the earlier one writes.
        if marks[write.page] != 0 {
            let at = table.indices().iter().rposition(|&p| p as usize == write.page).unwrap_or(0);
            return shared(at, write.page);
        }
        marks[write.page] = 1 + write.slots.0;
    }
    let size = table.page_size();
    for (b, rows) in append_indptr.windows(2).enumerate() {
        let len = table.seq_len(b);
        let first = len - (rows[1] - rows[0]);
        for (i, &page) in table.pages(b).iter().enumerate() {
            let shown = (len - i * size).min(size);
            // The end of this place's tokens is past `first` only where it is the writer.
            let writer = i * size + shown > first;
            let mark = marks[page as usize];
            if !writer && mark != 0 && shown >= mark {
                return shared(table.indptr()[b] + i, page as usize);
            }
        }
    }
    Ok(())
}
