//! The definition in f64 as a backend: slow, plain, and what the others are compared with.
#![forbid(unsafe_code)]

use super::cpu::{all_pages, append, given, load_attention};
use super::heads::{with_heads_in, with_heads_out};
use super::store::Store;
use super::{
    AttentionId, Backend, CacheId, ExpertWeights, ExpertsId, HeadsIn, HeadsOut, Inner, MatrixId, Problem, check_bias,
    of_expert,
};
use crate::attention::{AttentionSpec, Queries, oracle as attention};
use crate::error::{Error, Result, extent, multiple};
use crate::kv::{KvConfig, KvPool, PageTable};
use crate::layer::{GateLayout, SwigluSpec};
use crate::matmul::oracle::{self, OutputType};
use crate::matmul::{Activations, MatmulOptions, Output};
use crate::num::{Fp8, Real};
use crate::quant::{QuantizeOptions, QuantizedExperts, QuantizedMatrix, Scheme, quantize};
use crate::view::{HeadsMut, HeadsRef, MatMut, MatRef};
use half::{bf16, f16};

/// The f64 oracles behind the trait. Each result is exact but for f64 and one rounding to its type; between gate_up and down, and
/// in the cache, values are rounded as [`Inner`] and the cache's format say. Serves every call.
#[derive(Debug, Default)]
pub struct OracleBackend<'w> {
    matrices: Store<(QuantizedMatrix<'w>, Vec<f32>)>,
    experts: Store<Experts<'w>>,
    attentions: Store<(AttentionSpec, Vec<f32>)>,
    caches: Store<KvPool>,
}

#[derive(Debug)]
struct Experts<'w> {
    gate_up: QuantizedExperts<'w>,
    gate_up_bias: Vec<f32>,
    down: QuantizedExperts<'w>,
    down_bias: Vec<f32>,
    swiglu: SwigluSpec,
    gates: GateLayout,
    inner: Inner,
}

impl OracleBackend<'_> {
    /// Without weights or caches.
    pub fn new() -> Self {
        Self::default()
    }
}

impl<'w> Backend<'w> for OracleBackend<'w> {
    fn name(&self) -> &'static str {
        "oracle"
    }

    fn supports(&self, _: &Problem) -> Result<()> {
        Ok(())
    }

    fn load_matrix(&mut self, weight: &QuantizedMatrix<'w>, bias: &[f32]) -> Result<MatrixId> {
        check_bias(bias, weight.n())?;
        weight.check_finite()?;
        Ok(self.matrices.add((weight.clone(), bias.to_vec())))
    }

    fn load_experts(&mut self, experts: &ExpertWeights<'w, '_>) -> Result<ExpertsId> {
        experts.check()?;
        for (stack, weights) in [("gate_up", experts.gate_up), ("down", experts.down)] {
            for (e, weight) in weights.iter().enumerate() {
                weight.check_finite().map_err(of_expert(stack, e))?;
            }
        }
        Ok(self.experts.add(Experts {
            gate_up: experts.gate_up.clone(),
            gate_up_bias: experts.gate_up_bias.to_vec(),
            down: experts.down.clone(),
            down_bias: experts.down_bias.to_vec(),
            swiglu: experts.swiglu,
            gates: experts.gates,
            inner: experts.inner,
        }))
    }

    fn load_attention(&mut self, spec: &AttentionSpec, sinks: &[f32]) -> Result<AttentionId> {
        load_attention(&mut self.attentions, spec, sinks)
    }

    fn create_cache(&mut self, config: &KvConfig) -> Result<CacheId> {
        Ok(self.caches.add(all_pages(config)?))
    }

    fn matmul(&mut self, w: MatrixId, x: Activations<'_>, y: Output<'_>, accumulate: bool) -> Result<()> {
        let (weight, bias) = self.matrices.get(w)?;
        extent("output", "m", y.m(), x.m())?;
        extent("output", "n", y.n(), weight.n())?;
        let options = MatmulOptions { bias: given(bias), accumulate, ..MatmulOptions::default() };
        match y {
            Output::F32(y) => dense(weight, x, y, &options, OutputType::F32),
            Output::Bf16(y) => dense(weight, x, y, &options, OutputType::Bf16),
            Output::F16(y) => dense(weight, x, y, &options, OutputType::F16),
        }
    }

    fn moe(
        &mut self,
        w: ExpertsId,
        x: Activations<'_>,
        ids: &[u32],
        top_k: usize,
        mut y: MatMut<'_, f32>,
    ) -> Result<()> {
        let experts = self.experts.get(w)?;
        if top_k == 0 {
            return Err(Error::Empty { operand: "expert ids".into(), axis: "top_k" });
        }
        multiple("expert ids", "token * top_k", ids.len(), top_k)?;
        extent("activations", "m", x.m(), ids.len() / top_k)?;
        extent("activations", "k", x.k(), experts.gate_up.k())?;
        extent("output", "m", y.rows(), ids.len())?;
        extent("output", "n", y.cols(), experts.down.n())?;
        let limit = experts.gate_up.len();
        if let Some(at) = ids.iter().position(|id| *id as usize >= limit) {
            return Err(Error::Index { operand: "expert ids".into(), at, got: ids[at].into(), limit });
        }
        for (slot, &id) in ids.iter().enumerate() {
            let row = experts.row(&x, slot / top_k, id as usize)?;
            for (y, value) in y.row_mut(slot).unwrap_or_default().iter_mut().zip(row) {
                *y = value as f32;
            }
        }
        Ok(())
    }

    fn append(
        &mut self,
        cache: CacheId,
        layer: usize,
        table: &PageTable,
        append_indptr: &[usize],
        k: HeadsIn<'_>,
        v: HeadsIn<'_>,
    ) -> Result<()> {
        append(self.caches.get_mut(cache)?, layer, table, append_indptr, k, v)
    }

    fn prefill(
        &mut self,
        attention: AttentionId,
        cache: CacheId,
        layer: usize,
        table: &PageTable,
        q: HeadsIn<'_>,
        indptr: &[usize],
        out: HeadsOut<'_>,
    ) -> Result<()> {
        let (spec, sinks) = self.attentions.get(attention)?;
        let pool = self.caches.get(cache)?;
        with_heads_in!(q, q => with_heads_out!(out, out => {
            attend(pool, layer, spec, given(sinks), table, q, indptr, out)
        }))
    }

    fn decode(
        &mut self,
        attention: AttentionId,
        cache: CacheId,
        layer: usize,
        table: &PageTable,
        q: HeadsIn<'_>,
        out: HeadsOut<'_>,
    ) -> Result<()> {
        extent("q", "tokens", q.tokens(), table.num_sequences())?;
        let indptr: Vec<usize> = (0..=q.tokens()).collect();
        self.prefill(attention, cache, layer, table, q, &indptr, out)
    }
}

fn dense<T: Real>(
    weight: &QuantizedMatrix<'_>,
    x: Activations<'_>,
    mut y: MatMut<'_, T>,
    options: &MatmulOptions<'_>,
    output: OutputType,
) -> Result<()> {
    let mut previous = Vec::new();
    for i in 0..if options.accumulate { y.rows() } else { 0 } {
        previous.extend(y.row(i).unwrap_or_default().iter().map(|v| f64::from(v.to_f32())));
    }
    let n = y.cols();
    let results = oracle::matmul(x, weight, options, &previous, output)?;
    for (i, row) in results.chunks_exact(n.max(1)).enumerate() {
        for (y, result) in y.row_mut(i).unwrap_or_default().iter_mut().zip(row) {
            *y = nearest(result.value);
        }
    }
    Ok(())
}

impl Experts<'_> {
    /// One slot's result.
    fn row(&self, x: &Activations<'_>, token: usize, expert: usize) -> Result<Vec<f64>> {
        let one;
        let x = match x {
            Activations::F32(x) => Activations::F32(x.rows_at(token, 1)?),
            Activations::Bf16(x) => Activations::Bf16(x.rows_at(token, 1)?),
            Activations::F16(x) => Activations::F16(x.rows_at(token, 1)?),
            Activations::Quantized(x) => {
                one = x.slice_n(token..token + 1)?;
                Activations::Quantized(&one)
            }
        };
        let gate_up = product(&self.gate_up, &self.gate_up_bias, expert, x)?;
        let width = self.down.k();
        let inner = (0..width).map(|j| {
            let (gate, up) = match self.gates {
                GateLayout::Interleaved => (gate_up[2 * j], gate_up[2 * j + 1]),
                GateLayout::Split => (gate_up[j], gate_up[width + j]),
            };
            swiglu(&self.swiglu, gate, up)
        });
        match self.inner {
            Inner::F32 => {
                let inner: Vec<f32> = inner.map(|v| v as f32).collect();
                product(&self.down, &self.down_bias, expert, MatRef::new(&inner, 1, width)?.into())
            }
            Inner::Bf16 | Inner::Mxfp8(_) => {
                let inner: Vec<bf16> = inner.map(nearest::<bf16>).collect();
                let inner = MatRef::new(&inner, 1, width)?;
                match self.inner {
                    Inner::Mxfp8(rule) => {
                        let options = QuantizeOptions { rule, ..QuantizeOptions::default() };
                        let codes = quantize(inner, Scheme::Mxfp8(Fp8::E4M3Fn), &options)?;
                        product(&self.down, &self.down_bias, expert, (&codes.view()).into())
                    }
                    _ => product(&self.down, &self.down_bias, expert, inner.into()),
                }
            }
        }
    }
}

/// `x w^T + bias` of one row and one expert.
fn product(weights: &QuantizedExperts<'_>, bias: &[f32], expert: usize, x: Activations<'_>) -> Result<Vec<f64>> {
    let Some(weight) = weights.get(expert) else {
        return Err(Error::index("expert ids", 0, expert, weights.len()));
    };
    let n = weight.n();
    let options = MatmulOptions { bias: bias.get(expert * n..(expert + 1) * n), ..MatmulOptions::default() };
    let results = oracle::matmul(x, weight, &options, &[], OutputType::F32)?;
    Ok(results.iter().map(|result| result.value).collect())
}

/// [`SwigluSpec::apply`] in f64.
fn swiglu(spec: &SwigluSpec, gate: f64, up: f64) -> f64 {
    let limit = f64::from(spec.limit.unwrap_or(f32::INFINITY));
    let g = if gate > limit { limit } else { gate };
    let u = if up > limit { limit } else { up };
    let u = if u < -limit { -limit } else { u };
    g / (1.0 + (-f64::from(spec.alpha) * g).exp()) * (u + f64::from(spec.up_offset))
}

#[allow(clippy::too_many_arguments)] // the operands of attention, each once
fn attend<T: Real, O: Real>(
    pool: &KvPool,
    layer: usize,
    spec: &AttentionSpec,
    sinks: Option<&[f32]>,
    table: &PageTable,
    q: HeadsRef<'_, T>,
    indptr: &[usize],
    mut out: HeadsMut<'_, O>,
) -> Result<()> {
    extent("attention output", "tokens", out.tokens(), q.tokens())?;
    extent("attention output", "num_qo_heads", out.heads(), spec.num_qo_heads)?;
    extent("attention output", "head_dim_vo", out.head_dim(), spec.head_dim_vo)?;
    let reference = attention::paged(spec, Queries { q, indptr, sinks }, &pool.layer(layer)?, table)?;
    let mut values = reference.out.iter();
    for t in 0..out.tokens() {
        for h in 0..out.heads() {
            for (y, value) in out.head_mut(t, h).unwrap_or_default().iter_mut().zip(&mut values) {
                *y = nearest(*value);
            }
        }
    }
    Ok(())
}

/// `value` rounded once to `T`.
fn nearest<T: Real>(value: f64) -> T {
    match T::NAME {
        "bf16" => T::from_f32(bf16::from_f64(value).to_f32()),
        "f16" => T::from_f32(f16::from_f64(value).to_f32()),
        _ => T::from_f32(value as f32),
    }
}
