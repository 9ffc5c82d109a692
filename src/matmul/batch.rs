//! A call in batches: blocks of rows, of one weight matrix or of several experts, that are loaded, computed and stored together, so
//! that few rows of many experts take one fork and not one each.
#![forbid(unsafe_code)]

use super::driver::{Block, Plan, Problem, Rows, stride, tile, work};
use super::epilogue::{Finish, MatmulOptions, RowEpilogue, Target};
use super::layout::PackedLayout;
use super::operand::{Activations, Output};
use super::packed::PackedMatrix;
use crate::cpu::knobs::BATCH_BLOCKS;
use crate::cpu::{Blocking, Cpu, Scratch, for_each, for_each_zip};
use crate::error::{Result, length};

/// All that a call says; extents were checked.
#[derive(Clone, Copy)]
pub(super) struct Call<'a> {
    cpu: Cpu<'a>,
    x: &'a Activations<'a>,
    /// One for each expert, all of one layout.
    w: &'a [PackedMatrix],
    layout: &'a PackedLayout,
    /// Expert e takes positions `ends[e]..ends[e + 1]` of `rows`.
    ends: &'a [usize],
    rows: Rows<'a>,
    options: &'a MatmulOptions<'a>,
    /// k of one f32 scale tile.
    tile: Option<usize>,
}

/// Some positions of one expert.
struct Piece {
    expert: usize,
    first: usize,
    count: usize,
    plan: Plan,
}

/// How much a batch is.
#[derive(Clone, Copy, Default)]
struct Size {
    blocks: usize,
    rows: usize,
    tasks: usize,
    /// f32 of any task's sums and of its scratch.
    task_sums: usize,
    task_scratch: usize,
}

impl Size {
    /// Of the pieces, as many of the first as one batch takes.
    fn of(pieces: impl Iterator<Item = Piece>, layout: &PackedLayout, blocking: &Blocking) -> Size {
        let mut size = Size::default();
        for Piece { count, plan, .. } in pieces {
            let more = Size {
                blocks: size.blocks + 1,
                rows: size.rows + count,
                tasks: size.tasks + plan.tasks(),
                task_sums: size.task_sums.max(plan.task_sums()),
                task_scratch: size.task_scratch.max(plan.task_scratch(layout)),
            };
            let memory = more.tasks.saturating_mul(more.task_sums + more.task_scratch);
            let fits = more.rows <= blocking.rows && memory <= blocking.scratch;
            if size.blocks > 0 && (more.blocks > BATCH_BLOCKS || !fits) {
                break;
            }
            size = more;
        }
        size
    }

    fn floats(&self, layout: &PackedLayout) -> usize {
        self.rows * stride(layout) + self.tasks * (self.task_sums + self.task_scratch)
    }
}

impl<'a> Call<'a> {
    /// # Errors
    /// As [`tile`]; [`Error::Length`](crate::Error::Length) if the owner of lent weights has taken some away.
    pub(super) fn new(
        cpu: &Cpu<'a>,
        x: &'a Activations<'a>,
        (w, layout): (&'a [PackedMatrix], &'a PackedLayout),
        (ends, rows): (&'a [usize], Rows<'a>),
        options: &'a MatmulOptions<'a>,
    ) -> Result<Call<'a>> {
        let tile = tile(x.scale_tile(), layout.scheme(), layout.k())?;
        // Lent bytes are whatever their owner says now.
        w.iter().try_for_each(|w| length("packed weights", w.data.get().len(), layout.bytes()))?;
        let cpu = cpu.for_work(work(ends.last().copied().unwrap_or_default(), layout));
        Ok(Call { cpu, x, w, layout, ends, rows, options, tile })
    }

    /// All blocks of rows.
    fn pieces(&self) -> impl Iterator<Item = Piece> + Clone {
        let Call { cpu, x, layout, ends, tile, .. } = *self;
        let counts = move || ends.windows(2).map(|ends| ends[1] - ends[0]).enumerate();
        // Without columns there is nothing to compute.
        let busy = counts().filter(move |(_, count)| *count > 0 && layout.n() > 0);
        let experts = busy.clone().count();
        busy.flat_map(move |(expert, count)| {
            let together = experts.min(cpu.blocking().rows / count);
            let plan = Plan::new(&cpu, (tile, x.exact_in_bf16()), layout, count, together);
            let firsts = (0..count).step_by(plan.rows);
            firsts.map(move |i| Piece { expert, first: ends[expert] + i, count: plan.rows.min(count - i), plan })
        })
    }

    /// f32 of scratch memory that the largest batch needs.
    fn scratch(&self) -> usize {
        let (mut most, mut pieces) = (0, self.pieces());
        loop {
            let size = Size::of(pieces.clone(), self.layout, &self.cpu.blocking());
            if size.blocks == 0 {
                return most;
            }
            most = most.max(size.floats(self.layout));
            pieces.by_ref().take(size.blocks).for_each(drop);
        }
    }

    /// Computes y.
    pub(super) fn run(&self, y: &mut Output<'_>, scratch: &mut Scratch) {
        let (scratch, claims) = scratch.take(self.scratch(), Target::claims(y));
        let Some(y) = &Target::new(y, claims) else { return debug_assert!(false, "a view beyond its slice") };
        self.cpu.parallelism().enter(|| {
            let mut pieces = self.pieces();
            loop {
                let size = Size::of(pieces.clone(), self.layout, &self.cpu.blocking());
                if size.blocks == 0 {
                    return;
                }
                self.batch(size, pieces.by_ref().take(size.blocks), y, scratch);
            }
        });
    }

    fn batch(&self, size: Size, pieces: impl Iterator<Item = Piece>, y: &Target<'_>, scratch: &mut [f32]) {
        let Call { cpu, x, w, layout, rows, .. } = self;
        let (threads, stride) = (cpu.parallelism(), stride(layout));
        let (mut a, scratch) = scratch.split_at_mut(size.rows * stride);
        let (sums, scratch) = scratch.split_at_mut(size.tasks * size.task_sums);
        let scratch = &mut scratch[..size.tasks * size.task_scratch];

        let mut blocks = [const { None }; BATCH_BLOCKS];
        let blocks = &mut blocks[..size.blocks];
        let mut task = 0;
        for (block, Piece { expert, first, count, plan }) in blocks.iter_mut().zip(pieces) {
            let own;
            (own, a) = a.split_at_mut(count * stride);
            let problem = Problem { cpu, plan, x, w: &w[expert] };
            *block = Some((expert, task, Block::new(problem, *rows, (first, count), own)));
            task += plan.tasks();
        }

        let part = cpu.blocking().part(size.blocks, size.rows.div_ceil(size.blocks) * stride);
        for_each(threads, (&mut *blocks, part), |_, blocks| {
            blocks.iter_mut().flatten().for_each(|(_, _, block)| block.load());
        });

        let blocks = &*blocks;
        for_each_zip(threads, (&mut *sums, size.task_sums), (scratch, size.task_scratch), |t, sums, scratch| {
            let Some((expert, first, block)) = blocks.iter().flatten().rfind(|(_, first, _)| *first <= t) else {
                return;
            };
            let n = layout.n();
            let bias = self.options.bias.map(|bias| &bias[expert * n..(expert + 1) * n]);
            block.task(t - first, (sums, scratch), |positions, first_panel, sums| {
                let epilogue = RowEpilogue::new(self.options, bias);
                let finish = Finish { epilogue, first_panel, sums, outer: w[*expert].outer() };
                finish.run(cpu.tier(), y, positions.len(), |i| {
                    let position = positions.start + i;
                    (rows.destination(position), block.outer_scale(position))
                });
            });
        });
    }
}
