//! Rules on operands that can be checked before a program runs (NKI 0.6 API reference and architecture guides).
#![forbid(unsafe_code)]

use super::args::{Factor, Slot};
use super::dtype::Dtype;
use super::fault::{Result, Rule, fault};
use super::program::{Access, Buffer, Operand, PARTITIONS, Target, Tensor};

/// Elements one operand may have: far above any instruction's, and a bound on what a run allocates.
const MAX_ELEMENTS: usize = 1 << 26;
/// Axes an access may have.
const MAX_DIMS: usize = 8;

/// Checks that an access names elements of its tensor and returns nothing else: counts are positive and bounded, and a
/// static access (a dynamic one apart from its runtime part) stays inside.
pub(super) fn access(a: &Access, tensors: &[Tensor]) -> Result<()> {
    let Some(tensor) = tensors.get(a.tensor) else {
        return fault(Rule::Reference, format!("tensor {} of {}", a.tensor, tensors.len()));
    };
    if a.dims.is_empty() || a.dims.len() > MAX_DIMS || (tensor.buffer.on_chip() && a.dims.len() < 2) {
        return fault(Rule::Malformed, format!("an access pattern with {} levels", a.dims.len()));
    }
    let mut count = 1usize;
    for &(_, n) in &a.dims {
        count = match count.checked_mul(n) {
            Some(c) if c > 0 && c <= MAX_ELEMENTS => c,
            _ => return fault(Rule::Limit, format!("an operand of 0 or more than {MAX_ELEMENTS} elements")),
        };
    }
    reach(a, tensor, a.offset, a.dynamic.as_ref().is_some_and(|d| d.vector))
}

/// Checks that `a`, starting at element `offset`, stays inside its tensor (on chip: inside the rows). With `one_row` axis 0
/// counts once: its positions are only known at run time.
pub(super) fn reach(a: &Access, tensor: &Tensor, offset: usize, one_row: bool) -> Result<()> {
    let size = a.dtype.size();
    if !tensor.row_bytes.is_multiple_of(size) {
        return fault(Rule::Bounds, format!("rows of {} bytes seen as {}", tensor.row_bytes, a.dtype.name()));
    }
    let row = tensor.row_bytes / size;
    let span = |dims: &[(usize, usize)]| -> Option<usize> {
        dims.iter().try_fold(0usize, |sum, &(stride, n)| sum.checked_add(stride.checked_mul(n.checked_sub(1)?)?))
    };
    let (first, free) = a.dims.split_at(1);
    let inside = if tensor.buffer.on_chip() {
        let (stride, n) = first[0];
        let partition = offset / row.max(1);
        let whole = stride % row.max(1) == 0 || n == 1;
        let last = (n - 1).checked_mul(stride / row.max(1)).and_then(|p| p.checked_add(partition));
        let end = span(free).and_then(|s| s.checked_add(offset % row.max(1)));
        row > 0 && whole && last.is_some_and(|p| p < tensor.rows) && end.is_some_and(|e| e < row)
    } else {
        let span = if one_row { span(free) } else { span(&a.dims) };
        span.and_then(|s| s.checked_add(offset)).is_some_and(|e| e < row)
    };
    if inside {
        return Ok(());
    }
    let (what, dims) = (tensor.buffer.name(), &a.dims);
    fault(
        Rule::Bounds,
        format!("offset {offset}, pattern {dims:?} leaves its {what} tensor of shape {:?}", tensor.shape),
    )
}

/// Levels of a pattern after those that continue each other are merged.
pub(super) fn collapse(dims: &[(usize, usize)]) -> Vec<(usize, usize)> {
    let mut out: Vec<(usize, usize)> = vec![];
    for &(stride, n) in dims.iter().filter(|d| d.1 != 1) {
        match out.last_mut() {
            Some(outer) if outer.0 == stride * n => *outer = (stride, outer.1 * n),
            _ => out.push((stride, n)),
        }
    }
    out
}

/// Whether a pattern names some element twice.
fn overlaps(dims: &[(usize, usize)]) -> bool {
    let mut sorted: Vec<(usize, usize)> = dims.iter().copied().filter(|d| d.1 > 1).collect();
    sorted.sort_unstable();
    let mut end = 0;
    for &(stride, n) in &sorted {
        if stride <= end {
            // Interleaved strides (2 x 3 and 3 x 2) need a look at every element.
            return overlaps_exactly(&sorted);
        }
        end += stride * (n - 1);
    }
    false
}

/// Marks every element; each product `stride x (n - 1)` was bounded by [`reach`].
fn overlaps_exactly(dims: &[(usize, usize)]) -> bool {
    let count: usize = dims.iter().map(|d| d.1).product();
    let span = 1 + dims.iter().map(|&(stride, n)| stride * (n - 1)).sum::<usize>();
    if count > span {
        return true;
    }
    let mut seen = vec![0u64; span.div_ceil(64)];
    (0..count).any(|mut i| {
        let mut at = 0;
        for &(stride, n) in dims {
            at += i % n * stride;
            i /= n;
        }
        let (word, bit) = (at / 64, 1u64 << (at % 64));
        let again = seen[word] & bit != 0;
        seen[word] |= bit;
        again
    })
}

/// What an instruction's checks look at.
pub(super) struct Checker<'a> {
    pub(super) target: Target,
    pub(super) tensors: &'a [Tensor],
    pub(super) operands: &'a [Operand],
}

impl Checker<'_> {
    /// The access of an operand.
    pub(super) fn access(&self, slot: Slot) -> &Access {
        &self.operands[slot].access
    }

    /// Its element type.
    pub(super) fn dtype(&self, slot: Slot) -> Dtype {
        self.access(slot).dtype
    }

    /// Its name.
    pub(super) fn role(&self, slot: Slot) -> &'static str {
        self.operands[slot].role
    }

    /// Its tensor.
    pub(super) fn tensor(&self, slot: Slot) -> &Tensor {
        &self.tensors[self.access(slot).tensor]
    }

    /// Physical partition of its first element.
    pub(super) fn start_partition(&self, slot: Slot) -> usize {
        let (a, tensor) = (self.access(slot), self.tensor(slot));
        tensor.start_partition() + a.offset * a.dtype.size() / tensor.row_bytes.max(1)
    }

    /// What every instruction asks of an operand: partitions start where the hardware can start them (`free_start` lifts
    /// that), at most four free levels, nothing written twice, no runtime address but in DMA.
    pub(super) fn common(&self, slot: Slot, dma: bool, free_start: bool) -> Result<()> {
        let (a, role) = (self.access(slot), self.role(slot));
        if self.operands[slot].written && a.dynamic.is_none() && overlaps(&a.dims) {
            return fault(Rule::Bounds, format!("{role}: pattern {:?} writes an element twice", a.dims));
        }
        if !self.tensor(slot).buffer.on_chip() {
            return if dma || a.dynamic.is_none() {
                Ok(())
            } else {
                fault(Rule::Operand, format!("{role}: a runtime address"))
            };
        }
        let levels = collapse(&a.dims[1..]).len();
        if levels > 4 {
            return fault(Rule::Operand, format!("{role}: {levels} free levels, the hardware has 4"));
        }
        let (n, start) = (a.partitions(), self.start_partition(slot));
        let row = self.tensor(slot).row_bytes / a.dtype.size();
        if !dma && n > 1 && a.dims[0].0 != row {
            return fault(
                Rule::Operand,
                format!("{role}: a step between partitions of {} elements, a row has {row}", a.dims[0].0),
            );
        }
        let step = match n {
            ..=32 => 32,
            33..=64 => 64,
            _ => PARTITIONS,
        };
        let fits = dma || free_start || start.is_multiple_of(step);
        if fits { Ok(()) } else { fault(Rule::Operand, format!("{role}: {n} partitions cannot start at {start}")) }
    }

    /// Asks that it lives in one of these buffers.
    pub(super) fn buffer(&self, slot: Slot, allowed: &[Buffer]) -> Result<()> {
        let got = self.tensor(slot).buffer;
        if allowed.contains(&got) {
            return Ok(());
        }
        let names: Vec<_> = allowed.iter().map(|b| b.name()).collect();
        fault(Rule::Operand, format!("{} is in {}, needed {}", self.role(slot), got.name(), names.join(" or ")))
    }

    /// Asks for SBUF or PSUM.
    pub(super) fn on_chip(&self, slot: Slot) -> Result<()> {
        self.buffer(slot, &[Buffer::Sbuf, Buffer::Psum])
    }

    /// Asks for one of these types.
    pub(super) fn dtype_in(&self, slot: Slot, allowed: &[Dtype]) -> Result<()> {
        let got = self.dtype(slot);
        if allowed.contains(&got) {
            return Ok(());
        }
        let names: Vec<_> = allowed.iter().map(|d| d.name()).collect();
        fault(Rule::Operand, format!("{} is {}, needed {}", self.role(slot), got.name(), names.join(" or ")))
    }

    /// Asks for a type that arithmetic knows.
    pub(super) fn arithmetic(&self, slot: Slot) -> Result<()> {
        if self.dtype(slot).is_arithmetic() {
            return Ok(());
        }
        fault(Rule::Operand, format!("{} is {}, which has no arithmetic", self.role(slot), self.dtype(slot).name()))
    }

    /// Asks for an integer type.
    pub(super) fn integer(&self, slot: Slot) -> Result<()> {
        if self.dtype(slot).is_integer() {
            return Ok(());
        }
        fault(Rule::Operand, format!("{} is {}, needed an integer type", self.role(slot), self.dtype(slot).name()))
    }

    /// Asks for equal types.
    pub(super) fn same_dtype(&self, a: Slot, b: Slot) -> Result<()> {
        let (x, y) = (self.dtype(a), self.dtype(b));
        if x == y {
            return Ok(());
        }
        fault(Rule::Operand, format!("{} is {}, {} is {}", self.role(a), x.name(), self.role(b), y.name()))
    }

    /// Asks for `partitions` x `free` elements.
    pub(super) fn extent(&self, slot: Slot, partitions: usize, free: usize) -> Result<()> {
        let a = self.access(slot);
        if (a.partitions(), a.free()) == (partitions, free) {
            return Ok(());
        }
        let role = self.role(slot);
        fault(Rule::Operand, format!("{role} is {} x {}, needed {partitions} x {free}", a.partitions(), a.free()))
    }

    /// Asks that `a` has the partitions and free elements of `b`.
    pub(super) fn like(&self, a: Slot, b: Slot) -> Result<()> {
        let b = self.access(b);
        self.extent(a, b.partitions(), b.free())
    }

    /// Asks for one on-chip element in each of `partitions` partitions.
    pub(super) fn column(&self, slot: Slot, partitions: usize) -> Result<()> {
        self.on_chip(slot)?;
        self.arithmetic(slot)?;
        self.extent(slot, partitions, 1)
    }

    /// Asks that a column is fp32 (all vector operands but the bias of an activation).
    pub(super) fn factor(&self, factor: Factor, partitions: usize) -> Result<()> {
        let Factor::Column(slot) = factor else { return Ok(()) };
        self.dtype_in(slot, &[Dtype::Float32])?;
        self.column(slot, partitions)
    }

    /// Asks that `dst` and `data` are on-chip tiles of one shape that arithmetic knows.
    pub(super) fn elementwise(&self, dst: Slot, data: Slot) -> Result<()> {
        for slot in [dst, data] {
            self.on_chip(slot)?;
            self.arithmetic(slot)?;
        }
        self.like(dst, data)
    }

    /// Asks that not both inputs are in PSUM: a two-input VectorE instruction has one port there.
    pub(super) fn one_in_psum(&self, a: Slot, b: Slot) -> Result<()> {
        if self.tensor(a).buffer == Buffer::Psum && self.tensor(b).buffer == Buffer::Psum {
            return fault(Rule::Operand, format!("{} and {} are both in psum", self.role(a), self.role(b)));
        }
        Ok(())
    }

    /// Asks for `needed` or a newer device.
    pub(super) fn needs(&self, needed: Target, what: &str) -> Result<()> {
        if self.target >= needed {
            return Ok(());
        }
        fault(Rule::Operand, format!("{what} needs {} or newer, the target is {}", needed.name(), self.target.name()))
    }

    /// Asks that a type exists on the device: OCP E4M3FN, the packed types and E8M0 came with Trn3.
    pub(super) fn on_target(&self, slot: Slot) -> Result<()> {
        let dtype = self.dtype(slot);
        if dtype.is_packed() || matches!(dtype, Dtype::Float8E8M0Fnu | Dtype::Float8E4M3Fn) {
            return self.needs(Target::Trn3, dtype.name());
        }
        Ok(())
    }

    /// Asks that a matmul's destination is a PSUM tile of a legal type and, before Trn3, inside one bank.
    pub(super) fn matmul_dst(&self, dst: Slot, m: usize, n: usize) -> Result<()> {
        self.buffer(dst, &[Buffer::Psum])?;
        self.extent(dst, m, n)?;
        if self.target >= Target::Trn3 {
            return self.dtype_in(dst, &[Dtype::Float32, Dtype::Bfloat16]);
        }
        self.dtype_in(dst, &[Dtype::Float32])?;
        self.one_bank(dst)
    }

    /// Asks that an operand in PSUM lies in one bank of each partition.
    pub(super) fn one_bank(&self, slot: Slot) -> Result<()> {
        let (a, tensor) = (self.access(slot), self.tensor(slot));
        let size = a.dtype.size();
        let start = tensor.address.map_or(0, |(_, byte)| byte) + a.offset * size % tensor.row_bytes.max(1);
        let span: usize = a.dims[1..].iter().map(|(stride, n)| stride * (n - 1)).sum();
        let last = start + (span + 1) * size - 1;
        let bank = self.target.chip().psum_bank_bytes;
        if start / bank == last / bank {
            return Ok(());
        }
        fault(Rule::Operand, format!("{}: bytes {start}..={last} of a partition cross PSUM banks", self.role(slot)))
    }

    /// Asks that contraction happens over at most 128 partitions, the same on both sides, in SBUF.
    pub(super) fn matmul_inputs(&self, stationary: Slot, moving: Slot) -> Result<()> {
        for slot in [stationary, moving] {
            self.buffer(slot, &[Buffer::Sbuf])?;
            self.on_target(slot)?;
        }
        let (s, v) = (self.access(stationary).partitions(), self.access(moving).partitions());
        if s == v && s <= PARTITIONS {
            return Ok(());
        }
        fault(Rule::Operand, format!("stationary has {s} partitions, moving {v}; needed equal, at most {PARTITIONS}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlap_is_found_and_only_overlap() {
        assert!(!overlaps(&[(10, 4), (1, 10)]));
        assert!(!overlaps(&[(1, 2), (2, 5)]));
        assert!(overlaps(&[(0, 2)]));
        assert!(overlaps(&[(9, 4), (1, 10)]));
        assert!(overlaps(&[(2, 4), (3, 4)]), "0+6 = 6+0");
        assert!(!overlaps(&[(2, 3), (3, 2)]), "0 2 4 3 5 7");
        assert!(!overlaps(&[(0, 1), (0, 1)]));
    }

    #[test]
    fn levels_that_continue_each_other_are_one() {
        assert_eq!(collapse(&[(12, 2), (4, 3), (1, 4)]), vec![(1, 24)]);
        assert_eq!(collapse(&[(16, 2), (4, 3), (7, 1), (1, 4)]), vec![(16, 2), (1, 12)]);
    }
}
