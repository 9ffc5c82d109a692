//! Mixture-of-experts matmul: rows sorted by expert, or gathered by router ids.
#![forbid(unsafe_code)]

use super::batch::Call;
use super::driver::Rows;
use super::epilogue::MatmulOptions;
use super::layout::PackedLayout;
use super::operand::{Activations, Output};
use super::packed::PackedMatrix;
use crate::cpu::{Cpu, Workspace};
use crate::error::{Error, Result, extent, length, mul};
use crate::quant::{QuantizedExperts, same_k};

/// One packed matrix `[n, k]` for each expert.
#[derive(Debug, Clone)]
pub struct PackedExperts {
    experts: Vec<PackedMatrix>,
}

impl PackedExperts {
    /// From one packed matrix for each expert (pack them one by one to show progress).
    ///
    /// # Errors
    /// [`Error::Empty`] without experts; [`Error::Extent`] or [`Error::Unsupported`] if shapes or schemes differ.
    pub fn new(experts: Vec<PackedMatrix>) -> Result<Self> {
        let Some(first) = experts.first() else {
            return Err(Error::Empty { operand: "packed experts".into(), axis: "expert" });
        };
        for e in &experts {
            extent("packed experts", "n", e.n(), first.n())?;
            extent("packed experts", "k", e.k(), first.k())?;
            if e.scheme() != first.scheme() {
                return Err(Error::Unsupported {
                    what: format!("experts of {:?} and {:?} in one stack", first.scheme(), e.scheme()),
                    because: "all experts of a stack share one scheme".into(),
                });
            }
        }
        Ok(PackedExperts { experts })
    }

    /// Number of experts.
    pub fn len(&self) -> usize {
        self.experts.len()
    }

    /// Never: a stack has at least one expert.
    pub fn is_empty(&self) -> bool {
        self.experts.is_empty()
    }

    /// Rows (output channels) of each expert.
    pub fn n(&self) -> usize {
        self.experts[0].n()
    }

    /// Columns (contraction axis) of each expert.
    pub fn k(&self) -> usize {
        self.experts[0].k()
    }

    fn parts(&self) -> (&[PackedMatrix], &PackedLayout) {
        (&self.experts, self.experts[0].layout())
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.experts.iter().map(PackedMatrix::bytes).sum()
    }
}

/// Which row of x a slot of the routing table reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowSource {
    /// The token's row: x is `[tokens, k]`. The first matmul of an expert.
    Token,
    /// A row of its own: x is `[tokens * top_k, k]`. The second matmul of an expert.
    Slot,
}

impl Cpu<'_> {
    /// Packs every expert of a stack.
    ///
    /// # Errors
    /// As [`Cpu::pack`].
    pub fn pack_experts(&self, w: &QuantizedExperts<'_>) -> Result<PackedExperts> {
        PackedExperts::new(w.iter().map(|e| self.pack(e)).collect::<Result<_>>()?)
    }

    /// Matmul of rows sorted by expert: rows `offsets[e]..offsets[e + 1]` of x `[rows, k]` meet expert e, into the same rows of
    /// y `[rows, n]`. `options.bias` is `[experts, n]`.
    ///
    /// Each row has the bits that [`Cpu::matmul`] with its expert alone would give it.
    ///
    /// # Errors
    /// [`Error::Length`] unless there are `experts + 1` offsets (or for the bias); [`Error::Value`] if they do not ascend from 0
    /// to the number of rows; [`Error::Extent`]; [`Error::Unsupported`] as [`Cpu::matmul`].
    pub fn grouped_matmul<'a>(
        &self,
        x: impl Into<Activations<'a>>,
        w: &PackedExperts,
        offsets: &[u32],
        y: impl Into<Output<'a>>,
        options: &MatmulOptions<'_>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let (x, mut y) = (x.into(), y.into());
        check(&x, w, &y, x.m(), options)?;
        length("expert offsets", offsets.len(), w.len() + 1)?;
        let mut previous = 0;
        for (at, &offset) in offsets.iter().enumerate() {
            let needed = match at {
                0 if offset != 0 => "0",
                _ if at == w.len() && offset as usize != x.m() => "the number of rows of x",
                _ if offset < previous => "an offset not below the one before",
                _ => {
                    previous = offset;
                    continue;
                }
            };
            return Err(Error::Value { operand: "expert offsets".into(), at, got: offset.to_string(), needed });
        }
        let (floats, ends) = workspace.take_indices(w.len() + 1);
        for (end, offset) in ends.iter_mut().zip(offsets) {
            *end = *offset as usize;
        }
        Call::new(self, &x, w.parts(), (ends, Rows::Each), options)?.run(&mut y, floats);
        Ok(())
    }

    /// Matmul gathered by a routing table: slot s = `token * top_k + j` meets expert `ids[s]`, into row s of y
    /// `[tokens * top_k, n]`. `options.bias` is `[experts, n]`.
    ///
    /// Each row has the bits that [`Cpu::matmul`] with its expert alone would give it.
    ///
    /// # Errors
    /// [`Error::Empty`] for `top_k` 0; [`Error::Multiple`] unless `ids` holds whole tokens; [`Error::Index`] for an id that is
    /// not an expert; [`Error::Extent`], [`Error::Length`]; [`Error::Unsupported`] as [`Cpu::matmul`].
    #[allow(clippy::too_many_arguments)] // operands, not options
    pub fn gather_matmul<'a>(
        &self,
        x: impl Into<Activations<'a>>,
        source: RowSource,
        w: &PackedExperts,
        ids: &[u32],
        top_k: usize,
        y: impl Into<Output<'a>>,
        options: &MatmulOptions<'_>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let (x, mut y) = (x.into(), y.into());
        if top_k == 0 {
            return Err(Error::Empty { operand: "expert ids".into(), axis: "top_k" });
        }
        crate::error::multiple("expert ids", "token * top_k", ids.len(), top_k)?;
        check(&x, w, &y, ids.len(), options)?;
        let share = match source {
            RowSource::Token => top_k,
            RowSource::Slot => 1,
        };
        extent("activations", "m", x.m(), ids.len() / share)?;
        if let Some(at) = ids.iter().position(|id| *id as usize >= w.len()) {
            return Err(Error::Index { operand: "expert ids".into(), at, got: ids[at].into(), limit: w.len() });
        }
        let (floats, indices) = workspace.take_indices(ids.len() + w.len() + 1);
        let (slots, ends) = indices.split_at_mut(ids.len());
        sort_by_expert(ids, slots, ends);
        let rows = Rows::Slots { slots, share };
        Call::new(self, &x, w.parts(), (ends, rows), options)?.run(&mut y, floats);
        Ok(())
    }
}

fn check(
    x: &Activations<'_>,
    w: &PackedExperts,
    y: &Output<'_>,
    rows: usize,
    options: &MatmulOptions<'_>,
) -> Result<()> {
    same_k(x.k(), w.k())?;
    extent("output", "m", y.m(), rows)?;
    extent("output", "n", y.n(), w.n())?;
    match options.bias {
        Some(bias) => length("bias", bias.len(), mul("bias", w.len(), w.n())?),
        None => Ok(()),
    }
}

/// Counting sort: `slots` lists the slots of expert 0, then of expert 1...; expert e's are `ends[e]..ends[e + 1]`.
fn sort_by_expert(ids: &[u32], slots: &mut [usize], ends: &mut [usize]) {
    ends.fill(0);
    for &id in ids {
        ends[id as usize + 1] += 1;
    }
    for e in 1..ends.len() {
        ends[e] += ends[e - 1];
    }
    for (slot, &id) in ids.iter().enumerate() {
        slots[ends[id as usize]] = slot;
        ends[id as usize] += 1;
    }
    // Each start has moved to its end: shift back.
    ends.copy_within(0..ends.len() - 1, 1);
    ends[0] = 0;
}
