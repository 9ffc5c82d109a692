//! The loops: blocks of rows, tasks of rows and panels, and which kernel a task takes.
#![forbid(unsafe_code)]

use super::amx;
use super::coding::{Coding, with_coding};
use super::decode::Decode;
use super::layout::PackedLayout;
use super::load::{LoadBf16, pitch};
use super::operand::Activations;
use super::packed::{Facts, PackedMatrix, code_range};
use super::prefill::Prefill;
use super::terms::PAIRS;
use super::tiles::Tiles;
use crate::cpu::knobs::PAIR_STREAMS;
use crate::cpu::{AmxToken, Bf16Token, Blocking, Cpu, LANES, LINE, Range, STEP, Smallest, flush_free, for_each};
use crate::error::{Error, Result};
use crate::quant::Scheme;
use bytemuck::{cast_slice, cast_slice_mut};
use std::sync::Mutex;

/// Which rows of x make which rows of y, position by position of the order in which they are computed.
#[derive(Debug, Clone, Copy)]
pub(super) enum Rows<'a> {
    /// Row p at position p.
    Each,
    /// Row `slots[p] / share` of x to row `slots[p]` of y at position p.
    Slots { slots: &'a [usize], share: usize },
}

impl Rows<'_> {
    /// The row of x at a position.
    pub(super) fn source(&self, position: usize) -> usize {
        match self {
            Rows::Each => position,
            Rows::Slots { slots, share, .. } => slots[position] / share,
        }
    }

    /// The row of y at a position.
    pub(super) fn destination(&self, position: usize) -> usize {
        match self {
            Rows::Each => position,
            Rows::Slots { slots, .. } => slots[position],
        }
    }
}

/// How the loops of one problem are cut.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    /// Rows at a time.
    pub(super) rows: usize,
    /// All panels, and those of them that stay together in a task.
    panels: usize,
    unit: usize,
    /// Most panels and rows in a task, and how many tasks there are along each.
    pub(super) task_panels: usize,
    pub(super) task_rows: usize,
    /// Panels that a task finishes before it goes on.
    pub(super) set_panels: usize,
    pub(super) panel_tasks: usize,
    pub(super) row_tasks: usize,
    /// Whether tiles are tried first: what they do not take falls to the kernels below.
    pub(super) amx: Option<AmxToken>,
    /// The same of pairs.
    pub(super) pairs: Option<Bf16Token>,
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
pub(super) fn tile(of_x: Option<usize>, scheme: Scheme, k: usize) -> Result<Option<usize>> {
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
    /// For at most `m` rows of x, which bf16 holds exactly or not, with f32 scales that change every `tile` along k; so many
    /// problems like this are computed together.
    pub(super) fn new(
        cpu: &Cpu<'_>,
        (tile, in_bf16): (Option<usize>, bool),
        w: &PackedLayout,
        m: usize,
        together: usize,
    ) -> Plan {
        let amx = cpu.tier().amx().filter(|_| in_bf16 && amx::takes(tile, w.k()));
        let pairs = cpu.tier().pairs().filter(|_| in_bf16);
        let (block, decode_rows) = cpu.tier().block();
        let mut blocking = cpu.blocking();
        if pairs.is_some() {
            blocking.streams = blocking.streams.min(PAIR_STREAMS);
        }
        let (panels, threads) = (w.panels().max(1), cpu.parallelism().threads().max(1));
        let rows = blocking.rows.min(m.max(1));
        // What a kernel walks together stays together if every thread has a task all the same.
        let unit = match amx {
            Some(_) if rows <= amx::TILE_ROWS => amx::FEW_PANELS,
            Some(_) => amx::BLOCK_PANELS,
            None if rows <= decode_rows => blocking.streams,
            None => block.1,
        };
        let row_unit = if amx.is_some() { amx::BLOCK_ROWS } else { block.0 };
        // A problem among others is cut for fewer threads, but for two: the last tasks of all are then short.
        let threads = threads.div_ceil(together.max(1)).max(threads.min(2));
        let wanted = if threads == 1 { 1 } else { threads.saturating_mul(blocking.tasks) };
        let (unit, wanted_along_n) = if panels.div_ceil(unit) >= threads { (unit, wanted) } else { (1, threads) };
        let units = panels.div_ceil(unit);
        let panel_tasks = units.min(wanted_along_n);
        let task_panels = units.div_ceil(panel_tasks).saturating_mul(unit).min(panels);
        // Few panels and many rows: rows are split too.
        let row_tasks = if panel_tasks >= threads { 1 } else { wanted.div_ceil(panel_tasks) };
        let task_rows = rows.div_ceil(row_tasks).next_multiple_of(if row_tasks == 1 { 1 } else { row_unit });
        let row_tasks = rows.div_ceil(task_rows);
        let sums = if amx.is_some() && rows > amx::TILE_ROWS { blocking.tile_sums } else { blocking.sums };
        let set = (sums / (task_rows * LANES * size_of::<f32>())).max(1);
        let set_panels = set.checked_next_multiple_of(unit).unwrap_or(set).min(task_panels);
        Plan {
            rows,
            panels,
            unit,
            task_panels,
            task_rows,
            set_panels,
            panel_tasks,
            row_tasks,
            amx,
            pairs,
            decode_rows,
            block,
            tile,
            blocking,
        }
    }

    pub(super) fn tasks(&self) -> usize {
        self.panel_tasks * self.row_tasks
    }

    /// Panels of one of [`Plan::panel_tasks`] tasks: any half or quarter of all tasks that a thread gets differs from another by one
    /// unit at most, so that none ends early.
    fn task(&self, task: usize) -> std::ops::Range<usize> {
        let units = self.panels.div_ceil(self.unit);
        let (each, more) = (units / self.panel_tasks, units % self.panel_tasks);
        let start =
            |task: usize| (task * each + task * more / self.panel_tasks).saturating_mul(self.unit).min(self.panels);
        start(task)..start(task + 1)
    }

    /// f32 of a task's sums, `[panel of a set][row][LANES]`.
    pub(super) fn task_sums(&self) -> usize {
        self.set_panels * self.task_rows * LANES
    }

    /// f32 of decoded weights.
    fn chunk(&self) -> usize {
        self.blocking.chunk_steps * STEP * self.block.1 * LANES
    }

    /// Decoded weights, and partial sums between f32 scales.
    pub(super) fn task_scratch(&self, w: &PackedLayout) -> usize {
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
pub(super) fn stride(w: &PackedLayout) -> usize {
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

fn headroom<C: Coding>(_: C) -> i32 {
    C::HEADROOM
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
        let (power, headroom) = with_coding!(scheme, |coding| (coding.power(), headroom(coding)));
        let mx = matches!(scheme, Scheme::Mxfp4 | Scheme::Mxfp8(_));
        // 32 products below 2^(x.top + top) each, rounded 33 times, stay below 2^127.
        let steps =
            !mx || flush_free(x.smallest, Smallest::grid_of(grid)) && x.top() + (top + headroom).max(w.top) + 6 <= 127;
        let shifted = power == 0 || x.top() + power <= 127;
        Quick { values: w.finite && w.exact, flush, sums: !flush && steps && shifted }
    }
}

impl Problem<'_> {
    /// Loads rows of x as bf16 to the beginning of `a`, in tiles or, one by one, in pairs, if the weights are what bf16 holds. Returns
    /// what the magnitudes of the rows are between.
    fn load_bf16(&self, (rows, pairs): (Rows<'_>, bool), first: usize, count: usize, a: &mut [f32]) -> Option<Range> {
        let Problem { cpu, plan, x, w } = *self;
        if !amx::allows(w.facts) {
            return None;
        }
        let steps = w.layout.steps();
        let row = pitch(steps) * STEP;
        let height = if pairs { 1 } else { amx::TILE_ROWS };
        let tile = height * row;
        let out = &mut cast_slice_mut::<f32, u16>(a)[..count * row];
        let (tier, seen) = (cpu.tier(), Mutex::new(Range::new(Smallest::BF16)));
        let part = (2 * plan.blocking.store / tile.max(1)).max(1);
        for_each(cpu.parallelism(), (out, part * tile), |p, out| {
            let mut range = Range::new(Smallest::BF16);
            for (t, out) in out.chunks_mut(tile).enumerate() {
                let first = first + (p * part + t) * height;
                LoadBf16 { x, rows, first, steps, pairs, out, range: &mut range }.run(tier);
            }
            let mut seen = seen.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            *seen = seen.merge(range);
        });
        Some(seen.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }

    /// Loads rows of x and says what their magnitudes allow.
    fn load(&self, rows: Rows<'_>, first: usize, a: &mut [f32], stride: usize) -> Quick {
        let Problem { cpu, plan, x, w } = *self;
        let seen = Mutex::new(Range::new(Smallest::BF16));
        let part = plan.blocking.part(a.len() / stride, stride);
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

/// Whether pairs give the bits of the definition: what tiles need, and that sums of 16 products stay in f32's range, so that it matters neither
/// whether products are rounded before they are added nor what becomes of a sum between two of them.
fn pairs_allowed(w: Facts, x: Range) -> bool {
    amx::allowed(w, x) && x.top() + w.top + 4 <= 127
}

/// A block of rows against all panels.
pub(super) struct Block<'a> {
    problem: Problem<'a>,
    rows: Rows<'a>,
    first: usize,
    count: usize,
    /// Rows of x: as tiles of bf16 with `amx`, in pairs with `pairs`, else as f32 [`stride`] apart.
    a: &'a mut [f32],
    amx: Option<AmxToken>,
    pairs: Option<Bf16Token>,
    quick: Quick,
}

impl<'a> Block<'a> {
    /// The rows at `count` positions from `first` on, loaded to `a`.
    pub(super) fn new(
        problem: Problem<'a>,
        rows: Rows<'a>,
        (first, count): (usize, usize),
        a: &'a mut [f32],
    ) -> Block<'a> {
        Block { problem, rows, first, count, a, amx: None, pairs: None, quick: Quick::NOTHING }
    }

    /// The f32 scale of the row at a position, if that does not change along k.
    pub(super) fn outer_scale(&self, position: usize) -> f32 {
        match self.problem.x.scale_tile() {
            Some(_) => 1.0,
            None => self.problem.x.outer_scale(self.rows.source(position), 0),
        }
    }

    pub(super) fn load(&mut self) {
        let Block { problem, rows, first, count, ref mut a, .. } = *self;
        let facts = problem.w.facts;
        let mut load = |pairs| problem.load_bf16((rows, pairs), first, count, a);
        self.amx = problem.plan.amx.filter(|_| load(false).is_some_and(|seen| amx::allowed(facts, seen)));
        let seen = problem.plan.pairs.and_then(|token| Some((token, load(true)?)));
        let seen = seen.filter(|(_, seen)| pairs_allowed(facts, *seen));
        self.pairs = seen.map(|(token, _)| token);
        self.quick = match (self.amx, seen) {
            (Some(_), _) => Quick::NOTHING,
            (None, Some((_, seen))) => Quick::new(problem.w.scheme(), facts, seen),
            (None, None) => problem.load(rows, first, a, stride(&problem.w.layout)),
        };
    }

    /// The sums of a task, one set of panels after the other: `finish(positions, first panel, sums)`, those `[panel][row]`.
    pub(super) fn task(
        &self,
        task: usize,
        (sums, scratch): (&mut [f32], &mut [f32]),
        finish: impl Fn(std::ops::Range<usize>, usize, &[[f32; LANES]]),
    ) {
        let Block { problem: Problem { plan, .. }, count, .. } = *self;
        let panels = plan.task(task / plan.row_tasks);
        let first_row = task % plan.row_tasks * plan.task_rows;
        // The last block of rows may leave tasks without any.
        let rows_here = plan.task_rows.min(count.saturating_sub(first_row));
        if rows_here == 0 {
            return;
        }
        let positions = self.first + first_row..self.first + first_row + rows_here;
        for set in panels.clone().step_by(plan.set_panels) {
            let set_panels = plan.set_panels.min(panels.end - set);
            let sums = &mut sums.as_chunks_mut().0[..set_panels * rows_here];
            self.set(set, (first_row, rows_here), sums, scratch);
            finish(positions.clone(), set, sums);
        }
    }

    /// The sums of consecutive panels with some rows.
    fn set(
        &self,
        first_panel: usize,
        (first_row, rows_here): (usize, usize),
        sums: &mut [[f32; LANES]],
        scratch: &mut [f32],
    ) {
        let Block { problem: Problem { cpu, plan, x, w }, rows, count, amx, pairs, quick, .. } = *self;
        let stride = if pairs.is_some() { pitch(w.layout.steps()) * PAIRS } else { stride(&w.layout) };
        let data = w.data.get().get(first_panel * w.layout.panel_bytes()..).unwrap_or_default();
        let tiles = plan.tile.map(|k| Tiles { k, x, w, rows, first: self.first + first_row });
        let blocking = plan.blocking;
        if let Some(token) = amx {
            let (tier, layout, rows) = (cpu.tier(), w.layout, rows_here);
            let x = &cast_slice::<f32, u16>(self.a)[first_row * pitch(layout.steps()) * STEP..];
            return amx::Amx { token, tier, layout, data, first_panel, x, rows, tiles, blocking, sums, scratch }.run();
        }
        let a = &self.a[first_row * stride..];
        let (decoded, part) = scratch.split_at_mut(plan.chunk());
        let (decoded, part) = (decoded.as_chunks_mut().0, part.as_chunks_mut().0);
        with_coding!(w.scheme(), |coding| {
            if plan.decodes(count, quick) {
                let decode = Decode {
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
                };
                cpu.tier().run_with(pairs, decode);
            } else {
                let elements = if pairs.is_some() { 2 } else { 1 };
                let prefill = Prefill {
                    tier: cpu.tier(),
                    pairs,
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
                    // As many bytes of pairs as of f32.
                    chunk_steps: blocking.chunk_steps * elements,
                    k_block: blocking.k_block.saturating_mul(elements),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Isa;
    use crate::num::Fp8;
    use crate::quant::QuantizedMatrix;
    use crate::view::MatRef;
    use half::{bf16, f16};

    const N: usize = 16;
    const K: usize = 64;

    /// Whether these rows and weights are multiplied in pairs, and what else is known of them.
    fn loaded(cpu: &Cpu<'_>, x: &Activations<'_>, w: &PackedMatrix) -> (bool, Quick) {
        let tile = tile(x.scale_tile(), w.scheme(), K).unwrap();
        let plan = Plan::new(cpu, (tile, x.exact_in_bf16()), &w.layout, x.m(), 1);
        let mut a = vec![0.0; x.m() * stride(&w.layout)];
        let mut block = Block::new(Problem { cpu, plan, x, w }, Rows::Each, (0, x.m()), &mut a);
        block.load();
        (block.pairs.is_some(), block.quick)
    }

    /// Pairs are taken where they give the bits, up to the bounds and no further.
    #[test]
    fn pairs_are_taken() {
        let Ok(cpu) = Cpu::with_isa(Isa::Avx512Bf16) else { return eprintln!("skipped: no tier avx512bf16") };
        let taken = |x: &[f32], w: &PackedMatrix| {
            let x: Vec<bf16> = x.iter().map(|v| bf16::from_f32(*v)).collect();
            let (pairs, quick) = loaded(&cpu, &MatRef::new(&x, x.len() / K, K).unwrap().into(), w);
            assert!(!pairs || quick.values && !quick.flush);
            pairs
        };
        let (codes, ones) = ([0x2A; N * K * 2], [127; N * K / 16]);
        let e = Fp8::E4M3Fn;
        let weights = [
            QuantizedMatrix::mxfp4(N, K, &codes[..N * K / 2], &ones[..N * K / 32]),
            QuantizedMatrix::nvfp4(
                N,
                K,
                &codes[..N * K / 2],
                &[0x38; N * K / 16][..],
                crate::quant::GlobalScale::multiplier(1.0),
            ),
            QuantizedMatrix::mxfp8(e, N, K, &codes[..N * K], &ones[..N * K / 32]),
            QuantizedMatrix::fp8_per_tensor(e, N, K, &codes[..N * K], 1.0),
            QuantizedMatrix::fp8_blockwise(e, N, K, &codes[..N * K], &[1.0; N * 2][..], (1, 32)),
            QuantizedMatrix::bf16(N, K, &codes[..]),
        ]
        .map(|w| cpu.pack(&w.unwrap()).unwrap());
        for w in &weights {
            let what = w.scheme();
            for m in [1, 20] {
                let mut x = vec![1.5; m * K];
                assert!(taken(&x, w), "{what:?}");
                // Subnormals are zeros; what is no number is not for pairs.
                for (odd, pairs) in [(1e-39, true), (0.0, true), (f32::INFINITY, false), (f32::NAN, false)] {
                    x[m * K - 1] = odd;
                    assert_eq!(taken(&x, w), pairs, "{what:?}, {odd}");
                }
            }
            let (f, h) = (vec![1.5f32; K], vec![f16::ONE; K]);
            assert!(!loaded(&cpu, &MatRef::new(&f, 1, K).unwrap().into(), w).0, "{what:?}, f32");
            assert!(!loaded(&cpu, &MatRef::new(&h, 1, K).unwrap().into(), w).0, "{what:?}, f16");
            let x = QuantizedMatrix::mxfp8(e, 1, K, &codes[..K], &ones[..K / 32]).unwrap();
            assert!(loaded(&cpu, &(&x).into(), w).0, "{what:?}, MXFP8");
        }
        // Ones: multiples of 2^-7 below 2. No product may be smaller than 2^-126, no sum of 16 beyond 2^127.
        let one = bf16::ONE.to_bits().to_le_bytes().repeat(N * K);
        let ones = cpu.pack(&QuantizedMatrix::bf16(N, K, &one).unwrap()).unwrap();
        for (exponent, pairs) in [(-112, true), (-113, false), (121, true), (122, false)] {
            assert_eq!(taken(&[f32::from_bits(((exponent + 127) as u32) << 23); K], &ones), pairs, "2^{exponent}");
        }
        // One weight that is no number, or one that left bf16's range.
        let mut nan = one.clone();
        nan[..2].copy_from_slice(&bf16::NAN.to_le_bytes());
        let nan = cpu.pack(&QuantizedMatrix::bf16(N, K, &nan).unwrap()).unwrap();
        let inexact = QuantizedMatrix::mxfp4(N, K, &codes[..N * K / 2], &[0; N * K / 32][..]).unwrap();
        for w in [nan, cpu.pack(&inexact).unwrap()] {
            assert!(!taken(&[1.0; K], &w), "{:?}", w.scheme());
        }
    }
}
