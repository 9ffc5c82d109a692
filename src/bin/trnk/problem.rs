//! The problem that a program solves, on the roofline: what it must cost whoever computes it.
#![forbid(unsafe_code)]

use trn_kernels::kv::KvFormat;
use trn_kernels::num::Fp8;
use trn_kernels::quant::Scheme;
use trn_kernels::trainium::cost::Cost;
use trn_kernels::trainium::emulator::{Dtype, Program, Tensor};
use trn_kernels::trainium::roofline::{DecodeProblem, ExpertsProblem, MatmulProblem, PrefillProblem, Roofline};
use trn_kernels::trainium::{Chip, MatmulMode};

/// The roofline of a program's problem, and what was counted.
pub(crate) fn roofline(program: &Program, cost: &Cost, chip: &Chip) -> (&'static str, trn_kernels::Result<Roofline>) {
    let ports = Ports(program);
    let known = match program.kernel() {
        "matmul_fp8" => ports.matmul_fp8().map(|p| ("operands and result once", p.on(chip))),
        "matmul_mx" => ports.matmul_mx().map(|p| ("operands and result once", p.on(chip))),
        "attention_decode" => ports.decode().map(|p| ("every page of the block table full and read once", p.on(chip))),
        "attention_prefill" => ports.prefill().map(|p| ("visible pairs; operands and result once", p.on(chip))),
        "grouped_matmul_mx" => {
            ports.experts().map(|p| ("every slot in use; as many experts as blocks at most", p.on(chip)))
        }
        "kv_append" => {
            ports.append().map(|b| ("rows read and written once", Roofline::new(chip, MatmulMode::Bf16, 0.0, b)))
        }
        _ => None,
    };
    known.unwrap_or_else(|| {
        let ports = program.inputs().iter().chain(program.outputs());
        let bytes: f64 = ports.map(|p| program.tensors()[p.tensor].bytes() as f64).sum();
        (
            "the program's own matmuls; its inputs and outputs once",
            Roofline::new(chip, MatmulMode::Bf16, cost.flops, bytes),
        )
    })
}

/// Shapes of a program's inputs and outputs; `None` where they are not what the kernel of that name has.
struct Ports<'a>(&'a Program);

impl Ports<'_> {
    fn input(&self, name: &str) -> Option<&Tensor> {
        self.0.inputs().iter().find(|p| p.name == name).map(|p| &self.0.tensors()[p.tensor])
    }

    fn shape<const N: usize>(&self, name: &str) -> Option<[usize; N]> {
        self.input(name)?.shape().try_into().ok()
    }

    fn result<const N: usize>(&self) -> Option<[usize; N]> {
        let port = self.0.outputs().first()?;
        self.0.tensors()[port.tensor].shape().try_into().ok()
    }

    fn number(&self, name: &str) -> Option<usize> {
        self.0.parameter(name)?.parse().ok()
    }

    fn fp8(&self, name: &str) -> Option<Fp8> {
        match self.0.parameter(name)? {
            "e4m3" => Some(Fp8::E4M3Ieee),
            "e4m3fn" => Some(Fp8::E4M3Fn),
            "e5m2" => Some(Fp8::E5M2),
            _ => None,
        }
    }

    fn mx(&self, name: &str) -> Option<Scheme> {
        if self.0.parameter(name)? == "e2m1" { Some(Scheme::Mxfp4) } else { self.fp8(name).map(Scheme::Mxfp8) }
    }

    fn matmul_fp8(&self) -> Option<MatmulProblem> {
        let ([m, n], [_, k]) = (self.result()?, self.shape("x")?);
        let blocks = self.0.parameter("blocks")? == "true";
        let scheme = |element: Fp8, scale: [usize; 2], rows: usize| match scale {
            _ if blocks => Scheme::Fp8Blockwise { element, n: rows, k: 128 },
            [1, 1] => Scheme::Fp8PerTensor(element),
            _ => Scheme::Fp8PerChannel(element),
        };
        let weights = scheme(self.fp8("w_element")?, self.shape("w_scale")?, 128);
        let activations = scheme(self.fp8("x_element")?, self.shape("x_scale")?, 1);
        Some(MatmulProblem { m, n, k, weights, activations })
    }

    fn matmul_mx(&self) -> Option<MatmulProblem> {
        let [m, n] = self.result()?;
        let (k, activations) = match self.input("x")?.shape() {
            [_, k] => (*k, Scheme::Bf16),
            [_, tiles, _] => (tiles.checked_mul(512)?, self.mx("x_element")?),
            _ => return None,
        };
        Some(MatmulProblem { m, n, k, weights: self.mx("w_element")?, activations })
    }

    fn experts(&self) -> Option<ExpertsProblem> {
        let ([rows, hidden], [_, blocks]) = (self.result()?, self.shape("block_expert")?);
        let [experts, ..] = self.shape::<4>("w_down")?;
        let (intermediate, weights) = (self.number("intermediate")?, self.mx("w_element")?);
        Some(ExpertsProblem { rows, experts: experts.min(blocks), hidden, intermediate, weights })
    }

    fn decode(&self) -> Option<DecodeProblem> {
        let ([sequences, num_qo_heads, head_dim], [_, page, num_kv_heads, _]) =
            (self.shape("q")?, self.shape("k_cache")?);
        let [_, pages] = self.shape("block_table")?;
        let window = self.number("window")?;
        let context = pages.checked_mul(page)?;
        let visible = if window > 0 { context.min(window) } else { context };
        let dtype = self.input("k_cache")?.dtype();
        let format = if dtype == Dtype::Bfloat16 { KvFormat::Bf16 } else { KvFormat::Fp8(dtype.fp8()?) };
        Some(DecodeProblem {
            sequences,
            kv_tokens: sequences.checked_mul(visible)?,
            num_qo_heads,
            num_kv_heads,
            head_dim_qk: head_dim,
            head_dim_vo: head_dim,
            format,
        })
    }

    /// Bytes of an append: rows of K and V in, the same into the caches, and the slots. The rest of the caches stays.
    fn append(&self) -> Option<f64> {
        let bytes = |name: &str| self.input(name).map(|t| t.bytes() as f64);
        Some(2.0 * (bytes("k")? + bytes("v")?) + bytes("slots")?)
    }

    fn prefill(&self) -> Option<PrefillProblem> {
        let ([sequences, queries, num_qo_heads, head_dim], [_, keys, num_kv_heads, _]) =
            (self.shape("q")?, self.shape("k")?);
        let prior = self.shape("k_prior").map_or(0, |[_, slots, _, _]: [usize; 4]| slots);
        let (causal, window) = (self.0.parameter("causal")? == "true", self.number("window")?);
        Some(PrefillProblem { sequences, queries, keys, prior, num_qo_heads, num_kv_heads, head_dim, causal, window })
    }
}
