//! The AMX path: rows of x as tiles of bf16, and which loop of `cpu::tier::amx` a task takes.
#![forbid(unsafe_code)]

use super::layout::{GROUP, PackedLayout};
use super::load::pitch;
use super::packed::Facts;
use super::tiles::{AddScaled, Tiles};
use crate::cpu::amx::{Coded, Decoded, FewRows, ManyRows, PANELS, Scaled, Steps, TILE, TileCode};
use crate::cpu::knobs::{FEW_BLOCKS, TILE_RUNS};
use crate::cpu::{AmxToken, Blocking, LANES, LINE, Range, STEP, Tier, flush_free};
use crate::quant::Scheme;
use bytemuck::{cast_slice, cast_slice_mut};

/// Rows of a tile.
pub(super) const TILE_ROWS: usize = 16;
/// Rows of x that share a loaded tile of w.
pub(super) const BLOCK_ROWS: usize = 2 * TILE_ROWS;
/// Panels that share a loaded tile of x.
pub(super) const BLOCK_PANELS: usize = 2;
/// Panels walked in step by few rows.
pub(super) const FEW_PANELS: usize = PANELS;
/// Lines of a tile of x that one pair of panels asks for are this far apart: so many pairs ask for all.
const LINES_APART: usize = TILE_ROWS / 2;
/// f32 in a tile.
const TILE_FLOATS: usize = TILE / size_of::<f32>();

/// Whether the loops can keep apart what f32 scales that change every `tile` k keep apart: they count groups of four steps.
pub(super) fn takes(tile: Option<usize>, k: usize) -> bool {
    tile.is_none_or(|tile| tile >= k || tile.is_multiple_of(GROUP * STEP))
}

/// Whether tiles give the bits of the definition: all weights and all x are finite numbers, exact in bf16, and no subnormal arises.
pub(super) fn allowed(w: Facts, x: Range) -> bool {
    allows(w) && x.top() <= 128 && flush_free(x.smallest, w.smallest())
}

/// As far as the weights tell.
pub(super) fn allows(w: Facts) -> bool {
    w.finite && w.exact
}

fn code(scheme: Scheme) -> TileCode {
    match scheme {
        Scheme::Mxfp4 => TileCode::Mxfp4,
        Scheme::Nvfp4 => TileCode::Nvfp4,
        Scheme::Mxfp8(element) => TileCode::Mxfp8(element),
        Scheme::Fp8PerTensor(element) | Scheme::Fp8PerChannel(element) | Scheme::Fp8Blockwise { element, .. } => {
            TileCode::Fp8(element)
        }
        Scheme::Bf16 => TileCode::Bf16,
    }
}

/// Steps from group `first` on, at most `count` groups.
fn steps(layout: &PackedLayout, first: usize, count: usize) -> Steps {
    let count = (count * GROUP).min(layout.steps() - first * GROUP);
    let last = (count - 1) % GROUP + 1;
    Steps {
        count,
        group_bytes: layout.group_bytes(),
        area: layout.scale_area(GROUP),
        last_area: layout.scale_area(last),
        step_bytes: layout.step_bytes(),
    }
}

/// Sums of rows of x with consecutive panels.
pub(super) struct Amx<'a> {
    pub(super) token: AmxToken,
    pub(super) tier: Tier,
    pub(super) layout: PackedLayout,
    /// Packed bytes from the first panel on, and its index.
    pub(super) data: &'a [u8],
    pub(super) first_panel: usize,
    /// Tiles of 16 rows, [`pitch`] steps apart, the last one perhaps shorter, as [`LoadBf16`](super::load::LoadBf16) makes them.
    pub(super) x: &'a [u16],
    pub(super) rows: usize,
    pub(super) tiles: Option<Tiles<'a>>,
    pub(super) blocking: Blocking,
    /// `[panel][rows]`.
    pub(super) sums: &'a mut [[f32; LANES]],
    /// [`scratch`] floats.
    pub(super) scratch: &'a mut [f32],
}

/// Groups decoded at a time for so many rows: whole runs between f32 scales.
fn chunk(blocking: &Blocking, tile: Option<usize>, steps: usize, rows: usize) -> usize {
    let groups = steps.div_ceil(GROUP).max(1);
    let run = if tile.is_some() { run(tile, groups) } else { 1 };
    let together = if rows <= FEW_BLOCKS * BLOCK_ROWS { 2 * blocking.tile_steps } else { blocking.tile_steps };
    together.div_ceil(GROUP).next_multiple_of(run).min(groups)
}

/// The line of a tile of x, and the one [`LINES_APART`] further, that the `i`-th of `pairs` of panels asks for on behalf of all:
/// spread over them, so that memory is used evenly.
fn line_ahead(i: usize, pairs: usize) -> Option<usize> {
    let share = |i: usize| i * LINES_APART / pairs.max(LINES_APART);
    (i == 0 || share(i) != share(i - 1)).then(|| share(i))
}

/// Steps decoded at a time for so many rows.
pub(super) fn steps_together(blocking: &Blocking, tile: Option<usize>, layout: &PackedLayout, rows: usize) -> usize {
    (chunk(blocking, tile, layout.steps(), rows) * GROUP).min(layout.steps())
}

/// Groups between f32 scales, all if there are none: whole ones, but for a tile that holds all of k ([`takes`]).
fn run(tile: Option<usize>, groups: usize) -> usize {
    tile.map_or(groups, |tile| tile.div_ceil(GROUP * STEP)).min(groups)
}

/// f32 of scratch that a task of so many rows needs.
pub(super) fn scratch(blocking: &Blocking, tile: Option<usize>, layout: &PackedLayout, rows: usize) -> usize {
    let parts = if tile.is_some() { TILE_RUNS * PANELS * TILE_ROWS * LANES } else { 0 };
    let few = 2 * PANELS * TILE_FLOATS + parts;
    if rows <= TILE_ROWS {
        return few;
    }
    // A last block of fewer rows takes more steps at a time.
    let groups = chunk(blocking, tile, layout.steps(), rows.min(FEW_BLOCKS * BLOCK_ROWS));
    let scales = if tile.is_some() { groups * (rows + BLOCK_PANELS * LANES) } else { 0 };
    few.max(groups * GROUP * BLOCK_PANELS * TILE_FLOATS + scales).next_multiple_of(LANES)
}

impl Amx<'_> {
    pub(super) fn run(self) {
        // Without f32 scales sums are stored before they are read.
        if self.tiles.is_some() || self.layout.steps() == 0 {
            self.sums.fill([0.0; LANES]);
        }
        let coded = &Coded::new(code(self.layout.scheme()));
        match self.layout.steps() {
            0 => {}
            _ if self.rows <= TILE_ROWS => self.few(coded),
            _ => self.many(coded),
        }
    }

    fn few(mut self, coded: &Coded) {
        let panels = self.sums.len() / self.rows;
        let mut panel = 0;
        while panel < panels {
            let together = PANELS.min(panels - panel);
            self.few_panels(coded, panel, together);
            panel += together;
        }
    }

    fn few_panels(&mut self, coded: &Coded, panel: usize, panels: usize) {
        let (layout, rows) = (&self.layout, self.rows);
        let (groups, panel_bytes) = (layout.steps().div_ceil(GROUP), layout.panel_bytes());
        let (buffers, part) = self.scratch.split_at_mut(2 * PANELS * TILE_FLOATS);
        let Some(buffers) = cast_slice_mut::<f32, [u8; TILE]>(buffers).first_chunk_mut() else { return };
        let sums = &mut self.sums[panel * rows..(panel + panels) * rows];
        let part = part.as_chunks_mut().0;
        let run = run(self.tiles.map(|t| t.k), groups);
        let runs = TILE_RUNS * TILE_ROWS / rows;
        let mut first = 0;
        while first < groups {
            let count = if self.tiles.is_some() { run * runs } else { groups }.min(groups - first);
            let (steps, offset) = (steps(layout, first, count), first * layout.group_bytes());
            let few = FewRows {
                coded,
                steps,
                data: &self.data[panel * panel_bytes + offset..],
                panel_bytes,
                panels,
                x: &self.x[first * GROUP * rows * STEP..],
                rows,
                run,
                ahead: self.blocking.prefetch,
                ahead_until: panel_bytes - offset,
                // Each stream goes on with the panel that it walks next.
                ahead_next: self.blocking.prefetch.saturating_add((panels - 1) * panel_bytes),
                sums: if self.tiles.is_some() { &mut *part } else { &mut *sums },
                tiles: buffers,
            };
            few.run(self.token);
            if let Some(tiles) = &self.tiles {
                for (r, part) in part.chunks_exact(panels * rows).take(count.div_ceil(run)).enumerate() {
                    let (start, panel) = ((first + r * run) * GROUP * STEP, self.first_panel + panel);
                    self.tier.run(AddScaled { tiles, panel, start, rows, part, acc: &mut *sums });
                }
            }
            first += count;
        }
    }

    fn many(mut self, coded: &Coded) {
        let (panels, groups) = (self.sums.len() / self.rows, self.layout.steps().div_ceil(GROUP));
        let tile = self.tiles.map(|t| t.k);
        let chunk = chunk(&self.blocking, tile, self.layout.steps(), self.rows);
        for first in (0..groups).step_by(chunk) {
            self.many_chunk(coded, panels, first, chunk.min(groups - first));
        }
    }

    fn many_chunk(&mut self, coded: &Coded, panels: usize, first: usize, count: usize) {
        let Amx { token, layout, rows, tiles, .. } = *self;
        let (steps, offset, panel_bytes) =
            (steps(&layout, first, count), first * layout.group_bytes(), layout.panel_bytes());
        let run_steps = tiles.map_or(steps.count, |t| run(Some(t.k), count) * GROUP);
        let runs = steps.count.div_ceil(run_steps);
        let (buffer, scales) = self.scratch.split_at_mut(count * GROUP * BLOCK_PANELS * TILE_FLOATS);
        let buffer = cast_slice_mut::<f32, [u8; TILE]>(buffer);
        let start_of = |r: usize| first * GROUP * STEP + r * run_steps * STEP;
        let (of_rows, of_panels) = scales.split_at_mut(if tiles.is_some() { runs * rows } else { 0 });
        if let Some(tiles) = &tiles {
            for (r, of_rows) in of_rows.chunks_exact_mut(rows).enumerate() {
                of_rows.iter_mut().enumerate().for_each(|(i, scale)| *scale = tiles.row(i, start_of(r)));
            }
        }
        let of_panels = of_panels.as_chunks_mut().0.as_chunks_mut().0;
        // After these steps come the next, or, with other panels, the first.
        let next_steps = if first + count < layout.steps().div_ceil(GROUP) { first + count } else { 0 };
        let to_next = (next_steps * GROUP * TILE).wrapping_sub(first * GROUP * TILE);
        for panel in (0..panels).step_by(BLOCK_PANELS) {
            let together = BLOCK_PANELS.min(panels - panel);
            let data = &self.data[panel * panel_bytes + offset..];
            let (w, panel_stride): (&[u8], usize) = if coded.is_plain() {
                (data, panel_bytes)
            } else {
                for p in 0..together {
                    let tiles = &mut buffer[p * steps.count..(p + 1) * steps.count];
                    let data = &data[p * panel_bytes..];
                    Decoded { coded, steps, data, ahead: self.blocking.prefetch, tiles }.run(token);
                }
                (cast_slice(&*buffer), steps.count * TILE)
            };
            if let Some(tiles) = &tiles {
                for (r, of_panels) in of_panels.iter_mut().enumerate().take(runs) {
                    for (p, lanes) in of_panels.iter_mut().enumerate().take(together) {
                        *lanes = tiles.lanes(self.first_panel + panel + p, start_of(r));
                    }
                }
            }
            // The next panels' codes, or those of the next steps.
            let next = match panel + BLOCK_PANELS {
                next if next < panels => next * panel_bytes + offset,
                _ => offset + count * layout.group_bytes(),
            };
            let next = self.data.get(next..).unwrap_or_default();
            let line = line_ahead(panel / BLOCK_PANELS, panels.div_ceil(BLOCK_PANELS));
            let x_ahead = line.map_or(0, |line| to_next.wrapping_add(line * LINE));
            // Whole runs, and what k leaves of the last one.
            let whole = steps.count / run_steps * run_steps;
            for (from, many) in [(0, whole), (whole, steps.count - whole)] {
                let scaled = tiles.is_some().then(|| Scaled {
                    run: run_steps.min(many),
                    of_rows: &of_rows[from / run_steps * rows..],
                    of_panels: &of_panels[from / run_steps..],
                });
                if many == 0 {
                    continue;
                }
                let many = ManyRows {
                    steps: many,
                    w: &w[from * TILE..],
                    panel_stride,
                    panels: together,
                    x: self.x,
                    pitch: pitch(layout.steps()),
                    first_step: first * GROUP + from,
                    rows,
                    scaled,
                    next,
                    next_panel: panel_bytes,
                    next_bytes: count * layout.group_bytes(),
                    x_ahead,
                    fresh: first == 0 && tiles.is_none(),
                    sums: &mut self.sums[panel * rows..(panel + together) * rows],
                };
                many.run(token);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However many pairs of panels there are, each line is asked for once if they are enough, and by pairs evenly apart.
    #[test]
    fn lines_are_shared_out() {
        for pairs in 1..100 {
            let lines: Vec<usize> = (0..pairs).filter_map(|i| line_ahead(i, pairs)).collect();
            assert_eq!(lines, (0..LINES_APART.min(pairs)).collect::<Vec<_>>(), "{pairs} pairs");
        }
    }
}
