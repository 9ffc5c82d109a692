//! A matrix whose parts go to many threads: not whole rows, which slices can be cut into, but some columns of some rows.
#![allow(unsafe_code)] // parts of a row are made from a pointer; that no part is made twice is checked when it is asked for

use super::simd::LANES;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Bits of a claim word: panels of 16 columns.
const BITS: usize = usize::BITS as usize;

/// `[rows, cols]`, handed out in panels of 16 columns of a row, each panel once.
pub(crate) struct Handout<'a, T> {
    data: *mut T,
    rows: usize,
    cols: usize,
    stride: usize,
    /// Claim words of a row.
    words: usize,
    /// A bit for each panel of each row: whether it was handed out.
    claims: &'a [AtomicUsize],
    lent: PhantomData<&'a mut [T]>,
}

// SAFETY: threads get from it disjoint `&mut [T]`, which may be sent where T may; the claims are atomic.
unsafe impl<T: Send> Sync for Handout<'_, T> {}

impl<'a, T> Handout<'a, T> {
    /// Words that claims of so many rows and columns need.
    pub(crate) fn claims(rows: usize, cols: usize) -> usize {
        rows.saturating_mul(cols.div_ceil(LANES).div_ceil(BITS))
    }

    /// Rows of `cols` elements, `stride` apart, in `data`; `claims` has [`Handout::claims`] words of any contents. `None` if the
    /// matrix does not fit into `data` or the claims not into theirs.
    pub(crate) fn new(
        data: &'a mut [T],
        (rows, cols, stride): (usize, usize, usize),
        claims: &'a mut [usize],
    ) -> Option<Self> {
        let needed = match rows {
            0 => 0,
            _ if cols == 0 => 0,
            _ => (rows - 1).checked_mul(stride)?.checked_add(cols)?,
        };
        let words = cols.div_ceil(LANES).div_ceil(BITS);
        if needed > data.len() || (rows > 1 && stride < cols) || claims.len() < rows.checked_mul(words)? {
            return None;
        }
        claims.fill(0);
        let claims: *const [usize] = claims;
        // SAFETY: an AtomicUsize has the size, alignment and bits of a usize; the words are borrowed exclusively for 'a, and from here
        // on are reached through this reference only.
        let claims = unsafe { &*(claims as *const [AtomicUsize]) };
        Some(Handout { data: data.as_mut_ptr(), rows, cols, stride, words, claims, lent: PhantomData })
    }

    /// The columns of some panels of a row; `None` outside the matrix, for no panels, and if any of them was handed out before.
    pub(crate) fn take(&self, row: usize, panels: Range<usize>) -> Option<&'a mut [T]> {
        let (start, end) = (panels.start.checked_mul(LANES)?, panels.end.checked_mul(LANES)?.min(self.cols));
        if row >= self.rows || start >= end {
            return None;
        }
        let mut free = true;
        for word in panels.start / BITS..=(end - 1) / LANES / BITS {
            let (from, to) = (panels.start.max(word * BITS) % BITS, panels.end.min((word + 1) * BITS) - word * BITS);
            let bits = usize::MAX >> (BITS - (to - from)) << from;
            free &= self.claims[row * self.words + word].fetch_or(bits, Relaxed) & bits == 0;
        }
        let part = self.data.wrapping_add(row * self.stride + start);
        // SAFETY: `row < rows` and `end <= cols`, so the elements lie inside `data` as `new` checked. No other slice holds any of
        // them: a slice is made only for panels whose claims this call was the one to set (a read-modify-write sees every earlier
        // one of its word), panels of a row do not overlap, nor do rows, for `stride >= cols`. `data` is borrowed exclusively for 'a.
        free.then(|| unsafe { std::slice::from_raw_parts_mut(part, end - start) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_once() {
        let (rows, cols, stride) = (3, 2100, 2103);
        let (mut data, mut claims) =
            (vec![0u32; 2 * stride + cols], vec![usize::MAX; Handout::<u32>::claims(rows, cols)]);
        let all = Handout::new(&mut data, (rows, cols, stride), &mut claims).unwrap();
        // 132 panels: three words.
        let cuts = [0, 1, 5, 63, 64, 65, 100, 128, 131, 132];
        std::thread::scope(|scope| {
            for (row, cut) in (0..rows).flat_map(|row| cuts.windows(2).map(move |cut| (row, cut[0]..cut[1]))) {
                let all = &all;
                scope.spawn(move || {
                    let part = all.take(row, cut.clone()).unwrap();
                    assert_eq!(part.len(), (cut.end * LANES).min(cols) - cut.start * LANES);
                    part.iter_mut().for_each(|v| *v += 1);
                    assert!(all.take(row, cut).is_none());
                });
            }
        });
        assert!(all.take(0, 130..132).is_none() && all.take(3, 0..1).is_none() && all.take(0, 132..133).is_none());
        for (i, v) in data.iter().enumerate() {
            assert_eq!(*v, u32::from(i % stride < cols), "{i}");
        }
    }

    #[test]
    fn what_does_not_fit() {
        let (mut data, mut claims) = ([0u8; 40], [0; 4]);
        assert!(Handout::new(&mut data, (2, 20, 21), &mut claims).is_none());
        assert!(Handout::new(&mut data, (2, 20, 19), &mut claims).is_none());
        assert!(Handout::new(&mut data, (usize::MAX, 20, 20), &mut claims).is_none());
        assert!(Handout::new(&mut data, (2, 20, 20), &mut claims[..1]).is_none());
        assert!(Handout::new(&mut data, (2, 20, 20), &mut claims).is_some());
        assert!(Handout::new(&mut data[..0], (0, 20, 20), &mut claims).is_some());
        assert!(Handout::new(&mut data[..0], (5, 0, 100), &mut claims).is_some_and(|h| h.take(0, 0..1).is_none()));
    }
}
