//! `grouped_matmul_mx`: the experts of a layer, whose weights stay on the device.
#![forbid(unsafe_code)]

use super::bytes;
use super::device::DeviceKernels;
use super::family::Family;
use super::matmul::{element_name, output_bytes};
use super::{Argument, CompiledKernel};
use crate::cpu::Parallelism;
use crate::error::{Error, Result, extent, length, multiple};
use crate::layer::{GateLayout, SwigluSpec};
use crate::quant::{QuantizedExperts, Scheme};
use crate::trainium::layout::{ColumnOrder, GateUp, MxLayout, PackedMxExperts};
use crate::view::{MatMut, MatRef};
use half::bf16;
use std::sync::Arc;

/// A layer's experts as a checkpoint has them.
#[derive(Debug, Clone, Copy)]
pub struct ExpertTensors<'a> {
    /// `[2 i, h]` for each expert, gate and up rows interleaved.
    pub gate_up: &'a QuantizedExperts<'a>,
    /// `[experts, 2 i]`, as the rows of `gate_up`.
    pub gate_up_bias: &'a [f32],
    /// `[h, i]` for each expert.
    pub down: &'a QuantizedExperts<'a>,
    /// `[experts, h]`, exact in bf16.
    pub down_bias: &'a [f32],
}

/// `down(swiglu(gate_up(x)))` of each token's experts through `kernels/grouped_matmul_mx.py`.
#[derive(Debug)]
pub struct MoeKernel {
    family: Family,
    hidden: usize,
    experts: usize,
    output_bytes: usize,
    shapes: Vec<Shape>,
}

/// Extents of a compiled shape.
#[derive(Debug, Clone, Copy)]
struct Shape {
    x: usize,
    y: usize,
    blocks: usize,
    rows: usize,
}

impl Shape {
    fn of(kernel: &CompiledKernel) -> Shape {
        let y = kernel.int("rows_out").and_then(|rows| usize::try_from(rows).ok()).unwrap_or(0);
        Shape { x: kernel.dim("X"), y, blocks: kernel.dim("B"), rows: kernel.dim("R") }
    }

    /// Tokens that fit whatever their experts are.
    fn tokens(&self, top_k: usize, experts: usize) -> usize {
        let fits = |tokens: usize| {
            let slots = tokens.saturating_mul(top_k);
            slots <= self.y && worst_blocks(slots, experts, self.rows) <= self.blocks
        };
        // Both grow with the tokens.
        (1..=self.x).take_while(|t| fits(*t)).last().unwrap_or(0)
    }
}

/// Most blocks of `rows` that `slots` rows of `experts` experts can take: one row each, then whole blocks.
fn worst_blocks(slots: usize, experts: usize, rows: usize) -> usize {
    let begun = slots.min(experts);
    begun + (slots - begun) / rows.max(1)
}

const GATE_UP: (GateUp, ColumnOrder) = (GateUp::Split, ColumnOrder::Quads);

impl MoeKernel {
    #[allow(clippy::too_many_arguments)] // what makes a problem, each once
    fn compiled<'d>(
        device: &'d DeviceKernels,
        scheme: Scheme,
        experts: usize,
        hidden: usize,
        intermediate: usize,
        swiglu: &SwigluSpec,
        terms: usize,
    ) -> Result<Vec<&'d CompiledKernel>> {
        let refused = |what: String, because: &str| Err(Error::Unsupported { what, because: because.into() });
        if (swiglu.alpha, swiglu.up_offset) != (SwigluSpec::GPT_OSS.alpha, SwigluSpec::GPT_OSS.up_offset) {
            return refused(format!("{swiglu:?}"), "grouped_matmul_mx computes gpt-oss's swiglu: alpha 1.702, up + 1");
        }
        let Some(limit) = swiglu.limit else {
            return refused(format!("{swiglu:?}"), "grouped_matmul_mx clamps gate and up");
        };
        if !matches!(scheme, Scheme::Mxfp4 | Scheme::Mxfp8(_)) {
            return refused(format!("experts of {scheme:?}"), "grouped_matmul_mx takes MXFP4 and MXFP8");
        }
        let up = MxLayout::new(scheme, 2 * intermediate, hidden, GATE_UP.0, GATE_UP.1)?;
        let element = element_name(up.element());
        let wanted =
            format!("E {experts}, H {hidden}, I {intermediate}, w_element {element}, limit {limit}, x_terms {terms}");
        device.set().family("grouped_matmul_mx", "X", &wanted, |kernel| {
            kernel.dim("E") == experts
                && kernel.dim("H") == hidden
                && kernel.int("intermediate") == i64::try_from(intermediate).ok()
                && kernel.text("w_element").unwrap_or("e2m1") == element
                && kernel.int("x_terms").unwrap_or(1) == terms as i64
                && limit_of(kernel) == limit
        })
    }

    /// Asks whether such experts are compiled, and for how many tokens of `top_k` experts at a time.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with what is compiled.
    #[allow(clippy::too_many_arguments)] // what makes a problem, each once
    pub fn served(
        device: &DeviceKernels,
        scheme: Scheme,
        experts: usize,
        hidden: usize,
        intermediate: usize,
        swiglu: &SwigluSpec,
        terms: usize,
        top_k: usize,
    ) -> Result<()> {
        let kernels = Self::compiled(device, scheme, experts, hidden, intermediate, swiglu, terms)?;
        if kernels.iter().any(|k| Shape::of(k).tokens(top_k, experts) > 0) {
            return Ok(());
        }
        Err(too_few(top_k))
    }

    /// Packs the experts and writes them to the device. `terms` as in [`MatmulMxKernel::new`](super::MatmulMxKernel::new).
    ///
    /// # Errors
    /// [`Error::Unsupported`] if no such kernel is compiled, or for a down bias that is not exact in bf16; [`Error::Extent`],
    /// [`Error::Length`]; [`Error::Device`].
    pub fn new(
        device: &Arc<DeviceKernels>,
        weights: &ExpertTensors<'_>,
        swiglu: &SwigluSpec,
        gates: GateLayout,
        terms: usize,
        parallelism: Parallelism<'_>,
    ) -> Result<Self> {
        let ExpertTensors { gate_up, gate_up_bias, down, down_bias } = *weights;
        if gates != GateLayout::Interleaved {
            return Err(Error::Unsupported {
                what: "gate and up in two halves".into(),
                because: "the packer for grouped_matmul_mx takes interleaved rows".into(),
            });
        }
        let (experts, hidden, width) = (gate_up.len(), gate_up.k(), down.k());
        extent("down experts", "expert", down.len(), experts)?;
        extent("down experts", "n", down.n(), hidden)?;
        extent("gate_up experts", "n", gate_up.n(), 2 * width)?;
        length("gate_up bias", gate_up_bias.len(), experts * 2 * width)?;
        length("down bias", down_bias.len(), experts * hidden)?;
        let kernels = Self::compiled(device, gate_up.scheme(), experts, hidden, width, swiglu, terms)?;
        let columns = MxLayout::new(gate_up.scheme(), 2 * width, hidden, GATE_UP.0, GATE_UP.1)?;
        let padded = kernels.first().and_then(|k| k.input("w_down")).and_then(|t| t.shape.get(3)).copied();

        let up = PackedMxExperts::pack(gate_up, GATE_UP.0, GATE_UP.1, parallelism)?;
        let mut resident = vec![("w_gate_up", device.resident(up.data(), "w_gate_up")?)];
        resident.push(("s_gate_up", device.resident(up.scales(), "s_gate_up")?));
        drop(up);
        let back = PackedMxExperts::pack(down, GateUp::Together, ColumnOrder::Natural, parallelism)?;
        extent("w_down", "columns", back.layout().columns().count(), padded.unwrap_or(0))?;
        resident.push(("w_down", device.resident(back.data(), "w_down")?));
        resident.push(("s_down", device.resident(back.scales(), "s_down")?));
        let (mut up_bias, mut bias) = (vec![], vec![]);
        for e in 0..experts {
            up_bias.extend(columns.columns().pack(&gate_up_bias[e * 2 * width..(e + 1) * 2 * width], 0.0)?);
            let row = back.layout().columns().pack(&down_bias[e * hidden..(e + 1) * hidden], 0.0)?;
            bias.extend(row.iter().map(|v| bf16::from_f32(*v)));
            if row.iter().any(|v| bf16::from_f32(*v).to_f32().to_bits() != v.to_bits()) {
                return Err(Error::Unsupported {
                    what: format!("the down bias of expert {e}"),
                    because: "grouped_matmul_mx takes it in bf16, and it is not exact in bf16".into(),
                });
            }
        }
        resident.push(("b_gate_up", device.resident(&bytes::of_f32(&up_bias), "b_gate_up")?));
        let mut down_bias = vec![];
        bytes::put_bf16(&mut down_bias, &bias);
        resident.push(("b_down", device.resident(&down_bias, "b_down")?));
        Ok(MoeKernel {
            output_bytes: output_bytes(&kernels)?,
            shapes: kernels.iter().map(|k| Shape::of(k)).collect(),
            family: Family::new(device, &kernels, "X", &resident)?,
            hidden,
            experts,
        })
    }

    /// `x` is `[tokens, h]`; slot `token * top_k + j` of `y` (`[tokens * top_k, h]`) is what expert `ids[slot]` makes of the token.
    ///
    /// # Errors
    /// [`Error::Value`] for an activation that is no finite number; [`Error::Empty`] for `top_k` 0; [`Error::Multiple`], [`Error::Extent`], [`Error::Index`]; [`Error::Unsupported`] for more
    /// experts of a token than compiled; [`Error::Device`]. `y` is untouched but after [`Error::Device`].
    pub fn run(&self, x: MatRef<'_, bf16>, ids: &[u32], top_k: usize, mut y: MatMut<'_, f32>) -> Result<()> {
        if top_k == 0 {
            return Err(Error::Empty { operand: "expert ids".into(), axis: "top_k" });
        }
        multiple("expert ids", "token * top_k", ids.len(), top_k)?;
        extent("activations", "m", x.rows(), ids.len() / top_k)?;
        extent("activations", "k", x.cols(), self.hidden)?;
        extent("output", "m", y.rows(), ids.len())?;
        extent("output", "n", y.cols(), self.hidden)?;
        if let Some(at) = ids.iter().position(|id| *id as usize >= self.experts) {
            return Err(Error::index("expert ids", at, ids[at] as usize, self.experts));
        }
        bytes::check_finite("activations", x)?;
        let caps: Vec<usize> = self.shapes.iter().map(|s| s.tokens(top_k, self.experts)).collect();
        if caps.iter().all(|cap| *cap == 0) {
            return Err(too_few(top_k));
        }
        let pieces = self.family.pieces_within(x.rows(), &caps);
        let (mut sent, mut got) = (Vec::new(), Vec::new());
        let (family, row) = (&self.family, self.hidden * self.output_bytes);
        family.run(
            &pieces,
            |piece| {
                sent.clear();
                for i in piece.start..piece.start + piece.len {
                    bytes::put_bf16(&mut sent, x.row(i).unwrap_or_default());
                }
                sent.resize(piece.size * self.hidden * size_of::<bf16>(), 0);
                family.tensor(piece, "x")?.write(0, &sent)?;
                let shape = self.shapes[piece.bucket()];
                let ids = &ids[piece.start * top_k..(piece.start + piece.len) * top_k];
                let route = Route::new(ids, top_k, self.experts, &shape);
                family.tensor(piece, "take")?.write(0, &bytes::of_i32(&route.take))?;
                family.tensor(piece, "put")?.write(0, &bytes::of_i32(&route.put))?;
                Ok(family.tensor(piece, "block_expert")?.write(0, &bytes::of_i32(&route.block_expert))?)
            },
            |piece| {
                got.resize(piece.len * top_k * row, 0);
                family.tensor(piece, "output_0")?.read(0, &mut got)?;
                for (i, row) in got.chunks_exact(row.max(1)).enumerate() {
                    let values = bytes::to_f32(row, self.output_bytes);
                    let to = y.row_mut(piece.start * top_k + i).unwrap_or_default();
                    to.iter_mut().zip(values).for_each(|(y, value)| *y = value);
                }
                Ok(())
            },
        )
    }
}

fn too_few(top_k: usize) -> Error {
    Error::Unsupported {
        what: format!("{top_k} experts for each token"),
        because: "no compiled grouped_matmul_mx has the rows and blocks for one token".into(),
    }
}

fn limit_of(kernel: &CompiledKernel) -> f32 {
    match kernel.parameter("limit") {
        Some(Argument::Real(limit)) => limit as f32,
        Some(Argument::Int(limit)) => limit as f32,
        _ => 7.0,
    }
}

/// Which rows a call's blocks take and put.
struct Route {
    /// `[B, R]`: row of x, `X` for none.
    take: Vec<i32>,
    /// `[B, R]`: row of y, `Y` for none.
    put: Vec<i32>,
    /// `[B]`.
    block_expert: Vec<i32>,
}

impl Route {
    /// Slots sorted by expert, in blocks of one expert each. Rows of y that no slot has, which the kernel must write all the same,
    /// are the results of empty slots.
    fn new(ids: &[u32], top_k: usize, experts: usize, shape: &Shape) -> Route {
        let none = |extent: usize| i32::try_from(extent).unwrap_or(i32::MAX);
        let places = shape.blocks * shape.rows;
        let (mut take, mut put) = (vec![none(shape.x); places], vec![none(shape.y); places]);
        let mut block_expert = vec![0; shape.blocks];
        let mut block = 0;
        for e in 0..experts {
            let slots: Vec<usize> = (0..ids.len()).filter(|slot| ids[*slot] as usize == e).collect();
            for rows in slots.chunks(shape.rows.max(1)) {
                block_expert[block] = none(e);
                for (place, slot) in rows.iter().enumerate() {
                    take[block * shape.rows + place] = none(slot / top_k);
                    put[block * shape.rows + place] = none(*slot);
                }
                block += 1;
            }
        }
        let mut spare = ids.len()..shape.y;
        for (put, _) in put.iter_mut().zip(&take).filter(|(_, take)| **take == none(shape.x)) {
            let Some(row) = spare.next() else { break };
            *put = none(row);
        }
        Route { take, put, block_expert }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Every slot is taken once from its token by its expert, and every row of y is put once.
        #[test]
        fn routes_are_complete(
            experts in 1usize..6,
            top_k in 1usize..4,
            rows in 1usize..5,
            spare in 0usize..9,
            picks in prop::collection::vec(any::<u32>(), 0..24),
        ) {
            let ids: Vec<u32> = picks[..picks.len() / top_k * top_k].iter().map(|p| p % experts as u32).collect();
            let y = ids.len() + spare;
            let blocks = worst_blocks(ids.len(), experts, rows).max(y.div_ceil(rows));
            let shape = Shape { x: ids.len() / top_k + 1, y, blocks, rows };
            prop_assert!(shape.tokens(top_k, experts) * top_k >= ids.len());
            let route = Route::new(&ids, top_k, experts, &shape);
            let mut seen = vec![0; y];
            for place in 0..blocks * rows {
                let (take, put) = (route.take[place] as usize, route.put[place] as usize);
                if put < y {
                    seen[put] += 1;
                }
                if take < shape.x {
                    prop_assert_eq!(take, put / top_k);
                    prop_assert_eq!(route.block_expert[place / rows] as u32, ids[put]);
                } else {
                    prop_assert!(put >= ids.len(), "an empty slot over a result");
                }
            }
            prop_assert!(seen.iter().all(|n| *n == 1), "{:?}", seen);
        }
    }
}
