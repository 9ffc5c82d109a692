//! Which kernel a call takes, and why, in words.
#![forbid(unsafe_code)]

use super::amx;
use super::coding::with_coding;
use super::driver::{Plan, tile, work};
use super::layout::PackedLayout;
use crate::cpu::{Cpu, Isa};
use crate::error::{Error, Result};
use crate::quant::Scheme;

/// Extents and scheme of a matmul, as far as its plan depends on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MatmulProblem {
    /// How the weights are quantized.
    pub scheme: Scheme,
    /// Rows of x.
    pub m: usize,
    /// Output channels.
    pub n: usize,
    /// The contraction axis.
    pub k: usize,
}

impl Cpu<'_> {
    /// Which kernel, tile sizes and threads [`Cpu::matmul`] takes for plain activations, and why, in words.
    ///
    /// # Errors
    /// As [`Cpu::pack`](Cpu::pack) for such weights; [`Error::Empty`] for scale tiles without extent.
    pub fn explain(&self, problem: &MatmulProblem) -> Result<String> {
        let MatmulProblem { scheme, m, n, k } = *problem;
        if let Scheme::Fp8Blockwise { n, k, .. } = scheme
            && (n == 0 || k == 0)
        {
            return Err(Error::Empty { operand: "scale tile".into(), axis: if n == 0 { "n" } else { "k" } });
        }
        super::pack::check_tiles(scheme, k)?;
        let layout = PackedLayout::new(scheme, n, k)?;
        let cpu = self.for_work(work(m, &layout));
        let plan = Plan::new(&cpu, (tile(None, scheme, k)?, true), &layout, m, 1);
        let isa = self.isa();
        let mut text = format!("{m} x {n} x {k} (m x n x k), {scheme:?}, on {isa}: {}.\n{layout}.\n", why(isa));
        if m == 0 || n == 0 {
            text.push_str("There is nothing to compute.\n");
            return Ok(text);
        }
        let blocking = plan.blocking;
        if plan.amx.is_some() {
            if plan.rows <= amx::TILE_ROWS {
                text.push_str(&format!(
                    "bf16 and quantized activations: AMX decode kernel: {} rows fill at most one tile, so memory is the limit; each \
                     step of {} panels is decoded to bf16 tiles in L1 and multiplied at once, {} bytes ahead are prefetched.\n",
                    plan.rows,
                    amx::FEW_PANELS,
                    blocking.prefetch,
                ));
            } else {
                text.push_str(&format!(
                    "bf16 and quantized activations: AMX prefill kernel: {} steps of 32 k of {} panels are decoded to bf16 tiles in L1 \
                     and multiplied by all rows, {} at a time; sums of {} panels stay in L2.\n",
                    amx::steps_together(&blocking, plan.tile, &layout, plan.task_rows),
                    amx::BLOCK_PANELS,
                    amx::BLOCK_ROWS,
                    plan.set_panels,
                ));
            }
            text.push_str(
                "f32 and f16 activations, which bf16 does not hold, and numbers for which tiles are not proved exact take what \
                 avx512 takes, with the same bits:\n",
            );
        }
        if isa == Isa::Amx && plan.amx.is_none() {
            text.push_str("Scales that change inside a group of 128 k are not for tiles: what avx512 takes, with the same bits:\n");
        }
        if plan.pairs.is_some() {
            text.push_str(
                "bf16 and quantized activations: pairs of bf16 along k, two multiply-adds a lane and instruction. f32 and f16 activations, which \
                 bf16 does not hold, and numbers for which pairs are not proved exact take what avx512 takes, with the same bits.\n",
            );
        }
        if plan.rows <= plan.decode_rows {
            let power = with_coding!(scheme, |coding| super::coding::Coding::power(coding));
            text.push_str(&format!(
                "Decode kernel: {} rows are at most {}, so memory is the limit; codes are read once, decoded in registers and \
                 multiplied at once. {} panels of 16 columns are walked in step and {} bytes ahead are prefetched, because one \
                 stream does not fill the memory's bandwidth.\n",
                plan.rows, plan.decode_rows, blocking.streams, blocking.prefetch,
            ));
            if power != 0 {
                text.push_str(&format!(
                    "x{} is multiplied by 2^{power} while it is loaded, which decoding leaves out.\n",
                    if plan.pairs.is_some() { ", if not in pairs," } else { "" },
                ));
            }
            text.push_str(
                "Numbers for which a shortcut is not proved exact (subnormals, NaN codes, the ends of f32's range) take the \
                 prefill kernel instead: same bits.\n",
            );
        } else {
            let (rows, panels) = plan.block;
            let elements = if plan.pairs.is_some() { 2 } else { 1 };
            text.push_str(&format!(
                "Prefill kernel: {} rows at a time share each decoded weight, so arithmetic is the limit; {} k of {panels} panels \
                 are decoded to {} in L1, blocks of {} k keep the rows of x in L2, and {rows} rows by {} columns of sums are in \
                 registers.\n",
                plan.rows,
                blocking.chunk_steps * elements * 32,
                if plan.pairs.is_some() { "pairs (or half as many to f32)" } else { "f32" },
                blocking.k_block.saturating_mul(elements),
                panels * 16,
            ));
        }
        if cpu.parallelism().threads() < self.parallelism().threads() {
            text.push_str(&format!("Fewer than {} multiply-adds are not worth a fork.\n", blocking.fork));
        }
        let threads = cpu.parallelism().threads();
        text.push_str(&format!(
            "{threads} thread(s): {} task(s) along n of {} panels by {} along m of {} rows.\n",
            plan.panel_tasks, plan.task_panels, plan.row_tasks, plan.task_rows,
        ));
        if let Some(tile) = plan.tile.filter(|tile| *tile < k) {
            text.push_str(&format!("f32 scales change every {tile} k: the sums between them are apart.\n"));
        }
        Ok(text)
    }
}

/// Why this tier and no better one.
fn why(isa: Isa) -> String {
    if Isa::from_env() == Ok(Some(isa)) {
        return "TRN_KERNELS_ISA asks for it".into();
    }
    let better: Vec<String> = Isa::ALL
        .into_iter()
        .filter(|other| *other > isa)
        .map(|other| match other.missing() {
            Some(missing) => format!("not {other}: {missing}"),
            None => format!("not {other}: {}", other.declined().unwrap_or("another tier was asked for")),
        })
        .collect();
    if better.is_empty() { "the best tier there is".into() } else { better.join("; ") }
}
