//! The loops: blocks of rows, panels of columns, scale blocks and cache blocks of k.
#![forbid(unsafe_code)]

use super::epilogue::{RowEpilogue, panel_index};
use super::operand::{Activations, Output};
use super::packed::{Outer, PackedMatrix};
use crate::cpu::{Cpu, LANES, PanelDot, STEP, Smallest, flush_free, for_each_zip};
use crate::error::{Error, Result};

/// Steps of k decoded at a time: 8 * 32 * 16 f32 are 16 KiB, half of a small L1.
const STEPS: usize = 8;

/// Most rows of x that share one decoded panel.
const MAX_ROWS: usize = 128;

/// Sums kept at a time, in f32: bounds the workspace when n is a vocabulary.
const MAX_SUMS: usize = 1 << 22;

/// Which rows of x make which rows of y.
#[derive(Debug, Clone, Copy)]
pub(super) enum Rows<'a> {
    /// Rows `start..start + len`, each to itself.
    Range { start: usize, len: usize },
    /// Row `slot / share` of x to row `slot` of y.
    Slots { slots: &'a [usize], share: usize },
}

impl Rows<'_> {
    fn len(&self) -> usize {
        match self {
            Rows::Range { len, .. } => *len,
            Rows::Slots { slots, .. } => slots.len(),
        }
    }

    fn source(&self, i: usize) -> usize {
        match self {
            Rows::Range { start, .. } => start + i,
            Rows::Slots { slots, share } => slots[i] / share,
        }
    }

    fn destination(&self, i: usize) -> usize {
        match self {
            Rows::Range { start, .. } => start + i,
            Rows::Slots { slots, .. } => slots[i],
        }
    }
}

/// How the loops of one problem are cut.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    /// Rows at a time.
    rows: usize,
    /// Panels in a task.
    task_panels: usize,
    /// Tasks.
    tasks: usize,
    /// k of one f32 scale tile; `None` if f32 scales do not change along k.
    tile: Option<usize>,
}

impl Plan {
    /// # Errors
    /// [`Error::Unsupported`] if the scale tiles of both operands do not nest or do not fall on steps.
    pub(super) fn new(cpu: &Cpu<'_>, x: &Activations<'_>, w: &PackedMatrix, m: usize) -> Result<Plan> {
        let of_weights = match w.outer() {
            Outer::Tiles { k, .. } => Some(*k),
            _ => None,
        };
        let tile = match (x.scale_tile(), of_weights) {
            (Some(a), Some(b)) if a.is_multiple_of(b) || b.is_multiple_of(a) => Some(a.min(b)),
            (Some(a), Some(b)) => {
                return Err(refused(format!("scale tiles of {a} (activations) and {b} (weights) along k")));
            }
            (a, b) => a.or(b),
        };
        if let Some(tile) = tile
            && !tile.is_multiple_of(STEP)
            && tile < w.k()
        {
            return Err(refused(format!("scale tiles of {tile} along k")));
        }
        let panels = w.panels();
        // Several tasks a thread, so that a slow core does not hold up the rest.
        let threads = cpu.parallelism().threads();
        let wanted = if threads == 1 { 1 } else { threads * 4 };
        let task_panels = panels.div_ceil(wanted).max(1);
        let rows = (MAX_SUMS / panels.saturating_mul(LANES).max(1)).clamp(1, MAX_ROWS).min(m.max(1));
        Ok(Plan { rows, task_panels, tasks: panels.div_ceil(task_panels), tile })
    }

    /// f32 of scratch that [`Problem::run`] needs for at most `m` rows.
    pub(super) fn scratch(&self, w: &PackedMatrix, m: usize) -> usize {
        if w.n() == 0 || m == 0 {
            return 0;
        }
        self.rows * w.padded_k() + self.sums(w) + self.tasks * self.task_scratch()
    }

    fn sums(&self, w: &PackedMatrix) -> usize {
        w.panels() * self.rows * LANES
    }

    /// A decoded chunk, partial sums, and one f32 scale of each row.
    fn task_scratch(&self) -> usize {
        STEPS * STEP * LANES + self.rows * (LANES + 1)
    }
}

fn refused(what: String) -> Error {
    Error::Unsupported { what, because: format!("tiles must nest and be multiples of the canonical step of {STEP}") }
}

/// One weight matrix and the activations that meet it; extents were checked.
#[derive(Clone, Copy)]
pub(super) struct Problem<'a> {
    pub(super) cpu: &'a Cpu<'a>,
    pub(super) plan: Plan,
    pub(super) x: &'a Activations<'a>,
    pub(super) w: &'a PackedMatrix,
}

impl Problem<'_> {
    /// Computes the given rows of y. `scratch` holds [`Plan::scratch`].
    pub(super) fn run(&self, rows: Rows<'_>, epilogue: &RowEpilogue<'_>, y: &mut Output<'_>, scratch: &mut [f32]) {
        let Problem { cpu, plan, x, w } = *self;
        if w.n() == 0 || rows.len() == 0 {
            return;
        }
        let padded_k = w.padded_k();
        let (a, scratch) = scratch.split_at_mut(plan.rows * padded_k);
        let (sums, scratch) = scratch.split_at_mut(plan.sums(w));
        let mut first = 0;
        while first < rows.len() {
            let count = plan.rows.min(rows.len() - first);
            let mut seen = Smallest::BF16;
            for i in 0..count {
                let row = &mut a[i * padded_k..(i + 1) * padded_k];
                seen = seen.merge(x.load(rows.source(first + i), row));
            }
            let flush = !flush_free(seen, w.smallest());
            let block = Block { problem: *self, rows, first, count, a, flush };
            let sums = &mut sums[..w.panels() * count * LANES];
            let (task, task_scratch) = (plan.task_panels * count * LANES, plan.task_scratch());
            for_each_zip(cpu.parallelism(), (&mut *sums, task), (&mut *scratch, task_scratch), |t, sums, scratch| {
                for (p, sums) in sums.chunks_exact_mut(count * LANES).enumerate() {
                    block.panel(t * plan.task_panels + p, sums.as_chunks_mut().0, scratch);
                }
            });
            for i in 0..count {
                let (source, destination) = (rows.source(first + i), rows.destination(first + i));
                let of_row = if x.scale_tile().is_some() { 1.0 } else { x.outer_scale(source, 0) };
                epilogue.store(y, destination, |j| {
                    let of_column = match w.outer() {
                        Outer::Tensor(s) => *s,
                        Outer::Channel(s) => s[j],
                        Outer::Tiles { .. } => 1.0,
                    };
                    sums[panel_index(j, i, count)] * of_column * of_row
                });
            }
            first += count;
        }
    }
}

/// A block of rows against all panels.
#[derive(Clone, Copy)]
struct Block<'a> {
    problem: Problem<'a>,
    rows: Rows<'a>,
    first: usize,
    count: usize,
    a: &'a [f32],
    flush: bool,
}

impl Block<'_> {
    fn panel(&self, panel: usize, acc: &mut [[f32; LANES]], scratch: &mut [f32]) {
        let Problem { cpu, plan, x, w } = self.problem;
        let (decoded, scratch) = scratch.split_at_mut(STEPS * STEP * LANES);
        let (part, row_scales) = scratch.split_at_mut(plan.rows * LANES);
        let (part, row_scales) = (&mut part.as_chunks_mut().0[..self.count], &mut row_scales[..self.count]);
        acc.fill([0.0; LANES]);
        let padded_k = w.padded_k();
        let Some(tile) = plan.tile else {
            return self.sum(panel, 0, padded_k, decoded, acc);
        };
        for start in (0..w.k()).step_by(tile) {
            part.fill([0.0; LANES]);
            // The last tile may end off a step: it takes the padding too, which is zero.
            let end = start.saturating_add(tile);
            self.sum(panel, start, if end < w.k() { end } else { padded_k }, decoded, part);
            let tiled = x.scale_tile().is_some();
            for (i, scale) in row_scales.iter_mut().enumerate() {
                *scale = if tiled { x.outer_scale(self.rows.source(self.first + i), start) } else { 1.0 };
            }
            let lanes = std::array::from_fn(|l| match w.outer() {
                Outer::Tiles { n, k, row, scales } => {
                    let column = (panel * LANES + l).min(w.n() - 1);
                    scales[column / n * row + start / k]
                }
                _ => 1.0,
            });
            cpu.tier().add_scaled(part, row_scales, &lanes, acc);
        }
    }

    /// `acc += a . w` over k in `start..end`, both on steps.
    fn sum(&self, panel: usize, start: usize, end: usize, decoded: &mut [f32], acc: &mut [[f32; LANES]]) {
        let Problem { cpu, w, .. } = self.problem;
        let tier = cpu.tier();
        let (mut step, last) = (start / STEP, end / STEP);
        while step < last {
            let next = (step + STEPS).min(last);
            w.decode(tier, panel, step..next, decoded);
            let dot = PanelDot {
                a: &self.a[step * STEP..],
                a_stride: w.padded_k(),
                b: decoded,
                b_stride: LANES,
                k: (0, (next - step) * STEP),
                flush: self.flush,
            };
            tier.panel_dot(dot, acc);
            step = next;
        }
    }
}
