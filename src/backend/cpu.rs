//! The CPU kernels as a backend.
#![forbid(unsafe_code)]

use super::heads::{with_heads_in, with_heads_out};
use super::store::Store;
use super::{
    AttentionId, Backend, CacheId, ExpertWeights, ExpertsId, HeadsIn, HeadsOut, Inner, MatrixId, Problem, check_bias,
    of_expert,
};
use crate::attention::{AttentionOut, AttentionSpec, Queries, plan_decode};
use crate::cpu::{Cpu, Workspace};
use crate::error::{Error, Result, length, mul};
use crate::kv::{KvConfig, KvPool, PageTable, append_kv};
use crate::layer::{GateLayout, SwigluSpec, swiglu};
use crate::matmul::{Activations, MatmulOptions, Output, PackedExperts, PackedMatrix, RowSource};
use crate::num::{Fp8, Real};
use crate::quant::{QuantizeOptions, QuantizedExperts, QuantizedMatrix, QuantizedMatrixBuf, Scheme, quantize_into};
use crate::view::{MatMut, MatRef};
use half::bf16;

/// [`Cpu`] behind the trait: same kernels, same bits. Serves every call.
#[derive(Debug)]
pub struct CpuBackend<'p> {
    cpu: Cpu<'p>,
    matrices: Store<(PackedMatrix, Vec<f32>)>,
    experts: Store<Experts>,
    attentions: Store<(AttentionSpec, Vec<f32>)>,
    caches: Store<KvPool>,
    workspace: Workspace,
    scratch: Scratch,
}

#[derive(Debug)]
struct Experts {
    gate_up: PackedExperts,
    gate_up_bias: Vec<f32>,
    down: PackedExperts,
    down_bias: Vec<f32>,
    swiglu: SwigluSpec,
    gates: GateLayout,
    inner: Inner,
}

/// What lies between gate_up and down; grows to what the largest call needs.
#[derive(Debug, Default)]
struct Scratch {
    gate_up: Vec<f32>,
    f32: Vec<f32>,
    bf16: Vec<bf16>,
    quantized: QuantizedMatrixBuf,
}

impl<'p> CpuBackend<'p> {
    /// On this machine, with these threads.
    pub fn new(cpu: Cpu<'p>) -> Self {
        CpuBackend {
            cpu,
            matrices: Store::default(),
            experts: Store::default(),
            attentions: Store::default(),
            caches: Store::default(),
            workspace: Workspace::new(),
            scratch: Scratch::default(),
        }
    }

    fn pack(&self, weight: &QuantizedMatrix<'_>) -> Result<PackedMatrix> {
        let packed = self.cpu.pack(weight)?;
        if packed.is_finite() {
            return Ok(packed);
        }
        weight.check_finite()?;
        // Every code and scale is a number: their product is not.
        Err(Error::Value {
            operand: "weights".into(),
            at: 0,
            got: "a weight beyond the range of bf16".into(),
            needed: "code x scale within bf16's range",
        })
    }

    fn pack_experts(&self, stack: &'static str, weights: &QuantizedExperts<'_>) -> Result<PackedExperts> {
        let packed = weights.iter().enumerate().map(|(e, w)| self.pack(w).map_err(of_expert(stack, e)));
        PackedExperts::new(packed.collect::<Result<_>>()?)
    }
}

impl<'w> Backend<'w> for CpuBackend<'_> {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn supports(&self, _: &Problem) -> Result<()> {
        Ok(())
    }

    fn load_matrix(&mut self, weight: &QuantizedMatrix<'w>, bias: &[f32]) -> Result<MatrixId> {
        check_bias(bias, weight.n())?;
        let packed = self.pack(weight)?;
        Ok(self.matrices.add((packed, bias.to_vec())))
    }

    fn load_experts(&mut self, experts: &ExpertWeights<'w, '_>) -> Result<ExpertsId> {
        experts.check()?;
        let packed = Experts {
            gate_up: self.pack_experts("gate_up", experts.gate_up)?,
            gate_up_bias: experts.gate_up_bias.to_vec(),
            down: self.pack_experts("down", experts.down)?,
            down_bias: experts.down_bias.to_vec(),
            swiglu: experts.swiglu,
            gates: experts.gates,
            inner: experts.inner,
        };
        Ok(self.experts.add(packed))
    }

    fn load_attention(&mut self, spec: &AttentionSpec, sinks: &[f32]) -> Result<AttentionId> {
        load_attention(&mut self.attentions, spec, sinks)
    }

    fn create_cache(&mut self, config: &KvConfig) -> Result<CacheId> {
        Ok(self.caches.add(all_pages(config)?))
    }

    fn matmul(&mut self, w: MatrixId, x: Activations<'_>, y: Output<'_>, accumulate: bool) -> Result<()> {
        let (weight, bias) = self.matrices.get(w)?;
        let options = MatmulOptions { bias: given(bias), accumulate, ..MatmulOptions::default() };
        self.cpu.matmul(x, weight, y, &options, &mut self.workspace)
    }

    fn moe(&mut self, w: ExpertsId, x: Activations<'_>, ids: &[u32], top_k: usize, y: MatMut<'_, f32>) -> Result<()> {
        let (cpu, experts, workspace) = (&self.cpu, self.experts.get(w)?, &mut self.workspace);
        let Scratch { gate_up, f32: plain, bf16: rounded, quantized } = &mut self.scratch;
        let (slots, width) = (ids.len(), experts.down.k());
        let options = MatmulOptions { bias: Some(&experts.gate_up_bias), ..MatmulOptions::default() };
        let out = matrix(gate_up, slots, experts.gate_up.n())?;
        cpu.gather_matmul(x, RowSource::Token, &experts.gate_up, ids, top_k, out, &options, workspace)?;
        let gate_up = MatRef::new(gate_up, slots, experts.gate_up.n())?;
        let view;
        let inner: Activations<'_> = match experts.inner {
            Inner::F32 => {
                swiglu(cpu, experts.swiglu, experts.gates, gate_up, matrix(plain, slots, width)?)?;
                MatRef::new(plain, slots, width)?.into()
            }
            Inner::Bf16 | Inner::Mxfp8(_) => {
                swiglu(cpu, experts.swiglu, experts.gates, gate_up, matrix(rounded, slots, width)?)?;
                let rounded = MatRef::new(rounded, slots, width)?;
                match experts.inner {
                    Inner::Mxfp8(rule) => {
                        let options = QuantizeOptions { rule, ..QuantizeOptions::default() };
                        quantize_into(rounded, Scheme::Mxfp8(Fp8::E4M3Fn), &options, quantized)?;
                        view = quantized.view();
                        (&view).into()
                    }
                    _ => rounded.into(),
                }
            }
        };
        let options = MatmulOptions { bias: Some(&experts.down_bias), ..MatmulOptions::default() };
        cpu.gather_matmul(inner, RowSource::Slot, &experts.down, ids, top_k, y, &options, workspace)
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
        let (cpu, cache, workspace) = (&self.cpu, self.caches.get(cache)?.layer(layer)?, &mut self.workspace);
        with_heads_in!(q, q => with_heads_out!(out, out => {
            let queries = Queries { q, indptr, sinks: given(sinks) };
            cpu.prefill_paged(spec, queries, &cache, table, AttentionOut { out, lse: None }, workspace)
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
        let (spec, sinks) = self.attentions.get(attention)?;
        let (cpu, cache, workspace) = (&self.cpu, self.caches.get(cache)?.layer(layer)?, &mut self.workspace);
        let plan = plan_decode(spec, &cache, table)?;
        with_heads_in!(q, q => with_heads_out!(out, out => {
            cpu.decode(&plan, q, &cache, given(sinks), AttentionOut { out, lse: None }, workspace)
        }))
    }
}

/// What is empty was not given.
pub(super) fn given(values: &[f32]) -> Option<&[f32]> {
    if values.is_empty() { None } else { Some(values) }
}

/// Keeps a valid attention.
pub(super) fn load_attention(
    store: &mut Store<(AttentionSpec, Vec<f32>)>,
    spec: &AttentionSpec,
    sinks: &[f32],
) -> Result<AttentionId> {
    spec.validate()?;
    if !sinks.is_empty() {
        length("sinks", sinks.len(), spec.num_qo_heads)?;
    }
    Ok(store.add((*spec, sinks.to_vec())))
}

/// A pool with every page taken: the runtime's own allocator says which of them a sequence has.
pub(super) fn all_pages(config: &KvConfig) -> Result<KvPool> {
    let mut pool = KvPool::new(*config)?;
    for _ in 0..config.shape.num_pages {
        pool.alloc()?;
    }
    Ok(pool)
}

/// [`append_kv`] of any element type.
pub(super) fn append(
    pool: &mut KvPool,
    layer: usize,
    table: &PageTable,
    append_indptr: &[usize],
    k: HeadsIn<'_>,
    v: HeadsIn<'_>,
) -> Result<()> {
    match (k, v) {
        (HeadsIn::F32(k), HeadsIn::F32(v)) => append_kv(pool, layer, table, append_indptr, k, v),
        (HeadsIn::Bf16(k), HeadsIn::Bf16(v)) => append_kv(pool, layer, table, append_indptr, k, v),
        (HeadsIn::F16(k), HeadsIn::F16(v)) => append_kv(pool, layer, table, append_indptr, k, v),
        (k, v) => Err(mixed(&k, &v)),
    }
}

pub(super) fn mixed(k: &HeadsIn<'_>, v: &HeadsIn<'_>) -> Error {
    Error::Unsupported {
        what: format!("keys of {} with values of {}", k.element(), v.element()),
        because: "keys and values of a token have one type".into(),
    }
}

/// `data` made `rows` x `cols` large, as a matrix.
fn matrix<T: Real>(data: &mut Vec<T>, rows: usize, cols: usize) -> Result<MatMut<'_, T>> {
    data.resize(mul("expert activations", rows, cols)?, T::default());
    MatMut::new(data, rows, cols)
}
