//! The loops: blocks of rows, tasks of rows and panels, and which kernel a task takes.
#![forbid(unsafe_code)]

use super::amx;
use super::coding::{Coding, with_coding};
use super::decode::Decode;
use super::epilogue::{RowEpilogue, Sums};
use super::layout::PackedLayout;
use super::operand::{Activations, Output};
use super::packed::{Facts, PackedMatrix, code_range};
use super::prefill::Prefill;
use super::tiles::Tiles;
use crate::cpu::{AmxToken, Blocking, Cpu, LANES, LINE, Range, STEP, Smallest, flush_free, for_each, for_each_zip};
use crate::error::{Error, Result};
use crate::quant::Scheme;
use bytemuck::{cast_slice, cast_slice_mut};
use std::sync::Mutex;

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

    pub(super) fn source(&self, i: usize) -> usize {
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
    pub(super) rows: usize,
    /// Panels and rows in a task, and how many tasks there are along each.
    pub(super) task_panels: usize,
    pub(super) task_rows: usize,
    pub(super) panel_tasks: usize,
    pub(super) row_tasks: usize,
    /// Whether tiles are tried first: what they do not take falls to the kernels below.
    pub(super) amx: Option<AmxToken>,
    /// Most rows the decode kernel takes.
    pub(super) decode_rows: usize,
    /// Rows and panels of the prefill kernel's register block.
    pub(super) block: (usize, usize),
    /// k of one f32 scale tile; `None` if f32 scales do not change along k.
    pub(super) tile: Option<usize>,
    pub(super) blocking: Blocking,
}

/// The k of the scale tiles of a problem.
///
/// # Errors
/// [`Error::Unsupported`] if the tiles of both operands do not nest or do not fall on steps.
fn tile(of_x: Option<usize>, scheme: Scheme, k: usize) -> Result<Option<usize>> {
    let of_weights = match scheme {
        Scheme::Fp8Blockwise { k, .. } => Some(k),
        _ => None,
    };
    let tile = match (of_x, of_weights) {
        (Some(a), Some(b)) if a.is_multiple_of(b) || b.is_multiple_of(a) => Some(a.min(b)),
        (Some(a), Some(b)) => {
            return Err(refused(format!("scale tiles of {a} (activations) and {b} (weights) along k")));
        }
        (a, b) => a.or(b),
    };
    match tile {
        Some(tile) if !tile.is_multiple_of(STEP) && tile < k => Err(refused(format!("scale tiles of {tile} along k"))),
        tile => Ok(tile),
    }
}

fn refused(what: String) -> Error {
    Error::Unsupported { what, because: format!("tiles must nest and be multiples of the canonical step of {STEP}") }
}

impl Plan {
    /// For at most `m` rows of x, which bf16 holds exactly or not, with f32 scales that change every `of_x` along k.
    ///
    /// # Errors
    /// As [`tile`].
    pub(super) fn new(
        cpu: &Cpu<'_>,
        (of_x, in_bf16): (Option<usize>, bool),
        w: &PackedLayout,
        m: usize,
    ) -> Result<Plan> {
        let tile = tile(of_x, w.scheme(), w.k())?;
        let amx = cpu.tier().amx().filter(|_| in_bf16 && amx::takes(tile, w.k()));
        let (block, decode_rows) = cpu.tier().block();
        let (blocking, panels, threads) = (cpu.blocking(), w.panels().max(1), cpu.parallelism().threads().max(1));
        let rows = (blocking.sums / panels.saturating_mul(LANES)).clamp(1, blocking.rows).min(m.max(1));
        // What a kernel walks together stays together if every thread has a task all the same.
        let unit = match amx {
            Some(_) if rows <= amx::TILE_ROWS => amx::FEW_PANELS,
            Some(_) => amx::BLOCK_PANELS,
            None if rows <= decode_rows => blocking.streams,
            None => block.1,
        };
        let row_unit = if amx.is_some() { amx::BLOCK_ROWS } else { block.0 };
        let wanted = if threads == 1 { 1 } else { threads.saturating_mul(blocking.tasks) };
        let together = panels.div_ceil(wanted).checked_next_multiple_of(unit).unwrap_or(panels);
        let task_panels = if panels.div_ceil(together) >= threads { together } else { panels.div_ceil(threads) };
        let panel_tasks = panels.div_ceil(task_panels);
        // Few panels and many rows: rows are split too.
        let row_tasks = if panel_tasks >= threads { 1 } else { wanted.div_ceil(panel_tasks) };
        let task_rows = rows.div_ceil(row_tasks).next_multiple_of(if row_tasks == 1 { 1 } else { row_unit });
        let row_tasks = rows.div_ceil(task_rows);
        Ok(Plan { rows, task_panels, task_rows, panel_tasks, row_tasks, amx, decode_rows, block, tile, blocking })
    }

    /// f32 of scratch that [`Problem::run`] needs.
    pub(super) fn scratch(&self, w: &PackedLayout, m: usize) -> usize {
        if w.n() == 0 || m == 0 {
            return 0;
        }
        self.rows * stride(w) + self.tasks() * (self.task_sums() + self.task_scratch(w))
    }

    /// Rows of so many elements that a thread loads or stores at a time.
    fn part(&self, rows: usize, elements: usize) -> usize {
        let parts = rows.saturating_mul(elements) / self.blocking.store.max(1);
        rows.div_ceil(parts.max(1)).max(1)
    }

    fn tasks(&self) -> usize {
        self.panel_tasks * self.row_tasks
    }

    /// f32 of a task's sums, `[panel][row][LANES]`.
    fn task_sums(&self) -> usize {
        self.task_panels * self.task_rows * LANES
    }

    /// f32 of decoded weights.
    fn chunk(&self) -> usize {
        self.blocking.chunk_steps * STEP * self.block.1 * LANES
    }

    /// Decoded weights, and partial sums between f32 scales.
    fn task_scratch(&self, w: &PackedLayout) -> usize {
        let part = (self.blocking.streams * self.decode_rows).max(self.block.1 * self.task_rows);
        let any = self.chunk() + if self.tile.is_some() { part * LANES } else { 0 };
        let amx = self.amx.map_or(0, |_| amx::scratch(&self.blocking, self.tile, w, self.task_rows));
        any.max(amx)
    }
}

/// Multiply-adds of so many rows with weights: what is worth a fork or not.
pub(super) fn work(rows: usize, w: &PackedLayout) -> usize {
    rows.saturating_mul(w.n()).saturating_mul(w.k())
}

/// f32 from one loaded row of x to the next: a line more than k needs, so that rows do not fall on the same sets of a cache.
fn stride(w: &PackedLayout) -> usize {
    w.steps() * STEP + LINE / size_of::<f32>()
}

/// One weight matrix and the activations that meet it; extents were checked.
#[derive(Clone, Copy)]
pub(super) struct Problem<'a> {
    pub(super) cpu: &'a Cpu<'a>,
    pub(super) plan: Plan,
    pub(super) x: &'a Activations<'a>,
    pub(super) w: &'a PackedMatrix,
}

/// What the operands' magnitudes allow. Each shortcut gives the bits of the definition (docs/numerics.md, section 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Quick {
    /// Codes may be read by the instructions of [`Simd`](crate::cpu::Simd): none is NaN or infinite, no value left its range.
    pub(super) values: bool,
    /// Subnormals may arise.
    pub(super) flush: bool,
    /// Sums of a step may be scaled by powers of two before or after: nothing leaves the normal range in between.
    pub(super) sums: bool,
}

impl Quick {
    /// Where tiles are taken it is not asked.
    const NOTHING: Quick = Quick { values: false, flush: true, sums: false };

    fn new(scheme: Scheme, w: Facts, x: Range) -> Quick {
        let flush = !flush_free(x.smallest, w.smallest());
        let Some(format) = scheme.element() else {
            return Quick { values: true, flush, sums: !flush };
        };
        let (grid, top) = code_range(format);
        let power = with_coding!(scheme, |coding| coding.power());
        let mx = matches!(scheme, Scheme::Mxfp4 | Scheme::Mxfp8(_));
        // 32 products below 2^(x.top + top) each, rounded 33 times, stay below 2^127.
        let steps = !mx || flush_free(x.smallest, Smallest::grid_of(grid)) && x.top() + top.max(w.top) + 6 <= 127;
        let shifted = power == 0 || x.top() + power <= 127;
        Quick { values: w.finite && w.exact, flush, sums: !flush && steps && shifted }
    }
}

impl Problem<'_> {
    /// Computes the given rows of y. `scratch` holds [`Plan::scratch`].
    pub(super) fn run(&self, rows: Rows<'_>, epilogue: &RowEpilogue<'_>, y: &mut Output<'_>, scratch: &mut [f32]) {
        let Problem { cpu, plan, x, w } = *self;
        if w.n() == 0 || rows.len() == 0 {
            return;
        }
        let stride = stride(&w.layout);
        let (a, scratch) = scratch.split_at_mut(plan.rows * stride);
        let (sums, scratch) = scratch.split_at_mut(plan.tasks() * plan.task_sums());
        let scratch = &mut scratch[..plan.tasks() * plan.task_scratch(&w.layout)];
        let mut first = 0;
        while first < rows.len() {
            let count = plan.rows.min(rows.len() - first);
            let a = &mut a[..count * stride];
            let amx = plan.amx.filter(|_| self.load_tiles(rows, first, count, a));
            let quick = if amx.is_some() { Quick::NOTHING } else { self.load(rows, first, a, stride) };
            let block = Block { problem: *self, rows, first, count, a, stride, amx, quick };
            let (task, task_scratch) = (plan.task_sums(), plan.task_scratch(&w.layout));
            for_each_zip(cpu.parallelism(), (&mut *sums, task), (&mut *scratch, task_scratch), |t, sums, scratch| {
                block.task(t, sums, scratch);
            });
            let Plan { row_tasks, task_rows, task_panels, .. } = plan;
            let sums = Sums { sums, task, rows: count, row_tasks, task_rows, task_panels };
            let of_row = |i: usize| match x.scale_tile() {
                Some(_) => 1.0,
                None => x.outer_scale(rows.source(first + i), 0),
            };
            match rows {
                Rows::Range { start, .. } => {
                    let part = plan.part(count, w.n());
                    epilogue.store(cpu, y, (start + first, count, part), (&sums, 0), w.outer(), of_row);
                }
                Rows::Slots { .. } => {
                    for i in 0..count {
                        let at = rows.destination(first + i);
                        epilogue.store(cpu, y, (at, 1, 1), (&sums, i), w.outer(), of_row);
                    }
                }
            }
            first += count;
        }
    }

    /// Loads rows of x as tiles of bf16 to the beginning of `a`, if weights and rows are what tiles take.
    fn load_tiles(&self, rows: Rows<'_>, first: usize, count: usize, a: &mut [f32]) -> bool {
        let Problem { cpu, plan, x, w } = *self;
        if !amx::allows(w.facts) {
            return false;
        }
        let steps = w.layout.steps();
        let tile = amx::TILE_ROWS * steps * STEP;
        let out = &mut cast_slice_mut::<f32, u16>(a)[..count * steps * STEP];
        let (tier, seen) = (cpu.tier(), Mutex::new(Range::new(Smallest::BF16)));
        let part = (2 * plan.blocking.store / tile.max(1)).max(1);
        for_each(cpu.parallelism(), (out, part * tile), |p, out| {
            let mut range = Range::new(Smallest::BF16);
            for (t, out) in out.chunks_mut(tile).enumerate() {
                let first = first + (p * part + t) * amx::TILE_ROWS;
                amx::LoadTile { x, rows, first, steps, out, range: &mut range }.run(tier);
            }
            let mut seen = seen.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            *seen = seen.merge(range);
        });
        amx::allowed(w.facts, seen.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }

    /// Loads rows of x and says what their magnitudes allow.
    fn load(&self, rows: Rows<'_>, first: usize, a: &mut [f32], stride: usize) -> Quick {
        let Problem { cpu, plan, x, w } = *self;
        let seen = Mutex::new(Range::new(Smallest::BF16));
        let part = plan.part(a.len() / stride, stride);
        for_each(cpu.parallelism(), (&mut *a, part * stride), |p, a| {
            let mut range = Range::new(Smallest::BF16);
            for (i, row) in a.chunks_exact_mut(stride).enumerate() {
                range = range.merge(x.load(cpu.tier(), rows.source(first + p * part + i), row));
            }
            let mut seen = seen.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            *seen = seen.merge(range);
        });
        let seen = seen.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
        let quick = Quick::new(w.scheme(), w.facts, seen);
        let power = with_coding!(w.scheme(), |coding| coding.power());
        if power != 0 && plan.decodes(a.len() / stride, quick) {
            let factor = (power as f32).exp2();
            a.iter_mut().for_each(|v| *v *= factor);
        }
        quick
    }
}

impl Plan {
    /// Whether so many rows take the decode kernel.
    fn decodes(&self, rows: usize, quick: Quick) -> bool {
        rows <= self.decode_rows && quick.values && quick.sums
    }
}

/// A block of rows against all panels.
#[derive(Clone, Copy)]
struct Block<'a> {
    problem: Problem<'a>,
    rows: Rows<'a>,
    first: usize,
    count: usize,
    /// Rows of x: as tiles of bf16 with `amx`, as f32 `stride` apart without.
    a: &'a [f32],
    stride: usize,
    amx: Option<AmxToken>,
    quick: Quick,
}

impl Block<'_> {
    fn task(&self, task: usize, sums: &mut [f32], scratch: &mut [f32]) {
        let Block { problem: Problem { cpu, plan, x, w }, rows, count, stride, amx, quick, .. } = *self;
        let first_panel = task / plan.row_tasks * plan.task_panels;
        let first_row = task % plan.row_tasks * plan.task_rows;
        // The last block of rows may leave tasks without any.
        let rows_here = plan.task_rows.min(count.saturating_sub(first_row));
        let panels = plan.task_panels.min(w.layout.panels().saturating_sub(first_panel));
        if rows_here == 0 || panels == 0 {
            return;
        }
        let sums = &mut sums.as_chunks_mut().0[..panels * rows_here];
        let data = w.data.get().get(first_panel * w.layout.panel_bytes()..).unwrap_or_default();
        let tiles = plan.tile.map(|k| Tiles { k, x, w, rows, first: self.first + first_row });
        let blocking = plan.blocking;
        if let Some(token) = amx {
            let (tier, layout, rows) = (cpu.tier(), w.layout, rows_here);
            let x = &cast_slice::<f32, u16>(self.a)[first_row * layout.steps() * STEP..];
            return amx::Amx { token, tier, layout, data, first_panel, x, rows, tiles, blocking, sums, scratch }.run();
        }
        let a = &self.a[first_row * stride..];
        let (decoded, part) = scratch.split_at_mut(plan.chunk());
        let (decoded, part) = (decoded.as_chunks_mut().0, part.as_chunks_mut().0);
        with_coding!(w.scheme(), |coding| {
            if plan.decodes(count, quick) {
                cpu.tier().run(Decode {
                    coding,
                    layout: w.layout,
                    data,
                    first_panel,
                    x: a,
                    stride,
                    rows: rows_here,
                    tiles,
                    streams: blocking.streams,
                    prefetch: blocking.prefetch,
                    sums,
                    part,
                });
            } else {
                let prefill = Prefill {
                    tier: cpu.tier(),
                    coding: quick.values.then_some(coding),
                    layout: w.layout,
                    data,
                    first_panel,
                    x: a,
                    stride,
                    rows: rows_here,
                    tiles,
                    flush: quick.flush,
                    together: plan.block.1,
                    chunk_steps: blocking.chunk_steps,
                    k_block: blocking.k_block,
                    prefetch: blocking.prefetch,
                    sums,
                    part,
                    decoded,
                };
                prefill.run();
            }
        });
    }
}
