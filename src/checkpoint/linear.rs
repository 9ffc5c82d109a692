//! One linear layer, whatever layout its weight is stored in.
//!
//! Layouts and scale directions: compressed-tensors 0.20, NVIDIA ModelOpt, DeepSeek-V3 and Llama FP8 checkpoints. In all of
//! them the codes are `[out, in]` row-major with scales along `in`, and FP4 bytes hold the even column in the low nibble.
#![forbid(unsafe_code)]

use super::quant_config::{FLOAT, MXFP4, MXFP8, NVFP4};
use super::{Checkpoint, Tensor, named};
use crate::error::{Error, Name, Result};
use crate::num::Fp8;
use crate::quant::{GlobalScale, QuantizedMatrix};
use safetensors::Dtype;
use std::borrow::Cow;

/// A linear layer `y = x W^T + b` as stored.
#[derive(Debug, Clone)]
pub struct Linear<'a> {
    /// The weight, `[out, in]`: codes borrowed from the file.
    pub weight: QuantizedMatrix<'a>,
    /// The bias, `[out]`, in f32.
    pub bias: Option<Cow<'a, [f32]>>,
    /// Static FP8 activations: the scale that calibration found, codes are `sat(x / input_scale)`.
    pub input_scale: Option<f32>,
    /// Static NVFP4 activations: the global scale, as a multiplier whichever way the checkpoint stores it.
    pub input_global_scale: Option<GlobalScale>,
}

/// Every name under which a layout keeps something without which the weight would be misread.
const SCALES: [&str; 6] =
    ["weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "weight_zero_point", "weight_g_idx"];

const MODELOPT: &str = "ModelOpt NVFP4";

/// The tensors of a layer.
struct Layer<'c, 'p> {
    checkpoint: &'c Checkpoint,
    prefix: &'p str,
}

impl Checkpoint {
    /// The linear layer whose tensors begin with `prefix` and a dot.
    ///
    /// The layout is told by names and dtypes (`P` is the prefix):
    ///
    /// | layout | tensors | value |
    /// | --- | --- | --- |
    /// | dense | `P.weight` BF16 | as it is |
    /// | compressed-tensors `nvfp4-pack-quantized` | `P.weight_packed` U8 `[out, in/2]`, `P.weight_scale` F8_E4M3 `[out, in/16]`, `P.weight_global_scale` | code x scale **/** global |
    /// | compressed-tensors `mxfp4-pack-quantized` | `P.weight_packed` U8 `[out, in/2]`, `P.weight_scale` U8 `[out, in/32]` | code x 2^(scale - 127) |
    /// | compressed-tensors `mxfp8-quantized` | `P.weight` FP8, `P.weight_scale` U8 `[out, in/32]` | code x 2^(scale - 127) |
    /// | compressed-tensors `float-quantized`, Llama and ModelOpt FP8 | `P.weight` FP8, `P.weight_scale` one element or `[out, 1]` | code x scale |
    /// | block FP8 (DeepSeek) | `P.weight` FP8, `P.weight_scale_inv` (or `P.weight_scale`) `[ceil(out/128), ceil(in/128)]`, tile from the config's `weight_block_size` | code **x** scale |
    /// | ModelOpt FP8_PB_WO | `P.weight` FP8, `P.weight_scale` `[out/128, 1, in/128, 1]` | code x scale |
    /// | ModelOpt NVFP4 | `P.weight` U8 `[out, in/2]`, `P.weight_scale` F8_E4M3 `[out, in/16]`, `P.weight_scale_2` | code x scale **x** global |
    ///
    /// FP8 is F8_E4M3 or F8_E5M2; f32 scales may be stored as F32, BF16 or F16; E8M0 scales as U8 or F8_E8M0. `P.bias`,
    /// `P.input_scale` and `P.input_global_scale` are taken in if they are there.
    ///
    /// # Errors
    /// [`Error::Missing`] for a weight or scale that the layout needs; [`Error::Unexpected`] for a scale that the layout has no
    /// use for (dropping one would be a silent wrong answer); [`Error::Checkpoint`], [`Error::Extent`] and
    /// [`Error::Multiple`] for dtypes and shapes; [`Error::Value`] for scales that are not finite or have no business being
    /// negative; each names the tensor. [`Error::Unsupported`] for other dtypes.
    pub fn linear(&self, prefix: &str) -> Result<Linear<'_>> {
        let layer = Layer { checkpoint: self, prefix };
        let (weight, packed) = (layer.find("weight")?, layer.find("weight_packed")?);
        let modelopt = weight.is_some_and(|w| w.dtype == Dtype::U8);
        let weight = match (weight, packed) {
            (None, None) => Err(layer.missing("weight (or weight_packed)", "the linear layer")),
            (Some(_), Some(p)) => {
                Err(unexpected(p.name, "there is a `weight` as well: which of the two holds is not clear"))
            }
            (Some(w), None) => match w.dtype {
                Dtype::BF16 => layer.dense(w),
                Dtype::F8_E4M3 => layer.fp8(w, Fp8::E4M3Fn),
                Dtype::F8_E5M2 => layer.fp8(w, Fp8::E5M2),
                Dtype::U8 => layer.nvfp4(w, MODELOPT),
                other => Err(Error::Unsupported {
                    what: format!("{}: a weight of {other}", w.name),
                    because: "linear layers are BF16, FP8 or FP4; read other tensors with Checkpoint::tensor".into(),
                }),
            },
            (None, Some(p)) => match layer.need("weight_scale", "a layer with weight_packed")?.dtype {
                Dtype::F8_E4M3 => layer.nvfp4(p, NVFP4),
                _ => layer.mxfp4(p),
            },
        }?;
        let bias = match layer.find("bias")? {
            Some(b) => {
                b.expect_shape(&[("n", weight.n())])?;
                Some(b.f32()?)
            }
            None => None,
        };
        let input_scale = layer.optional_scale("input_scale")?;
        let input_global_scale = match (modelopt, layer.optional_scale("input_global_scale")?) {
            (true, _) => input_scale.map(GlobalScale::multiplier),
            (false, global) => global.map(GlobalScale::divisor),
        };
        let input_scale = if modelopt { None } else { input_scale };
        Ok(Linear { weight, bias, input_scale, input_global_scale })
    }
}

impl<'c> Layer<'c, '_> {
    fn name(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.prefix)
    }

    fn find(&self, suffix: &str) -> Result<Option<Tensor<'c>>> {
        self.checkpoint.find(&self.name(suffix))
    }

    fn missing(&self, suffix: &str, layout: &str) -> Error {
        Error::Missing { operand: self.name(suffix).into(), needed_by: format!("{layout} `{}`", self.prefix).into() }
    }

    fn need(&self, suffix: &str, layout: &str) -> Result<Tensor<'c>> {
        self.find(suffix)?.ok_or_else(|| self.missing(suffix, layout))
    }

    /// Asks that there be no scale beyond those that the layout uses, and that the config name this layout, if any.
    fn only(&self, layout: &'static str, used: &[&str]) -> Result<()> {
        for suffix in SCALES.iter().filter(|s| !used.contains(s)) {
            if let Some(extra) = self.find(suffix)? {
                return Err(unexpected(
                    extra.name,
                    format!("its layer is stored as {layout}, which has no such scale"),
                ));
            }
        }
        if [NVFP4, MXFP4, MXFP8, FLOAT].contains(&layout) {
            self.checkpoint.quant.expect(self.prefix, layout)?;
        }
        Ok(())
    }

    /// A scale that activations are divided by, if it is there.
    fn optional_scale(&self, suffix: &str) -> Result<Option<f32>> {
        self.find(suffix)?.map(|t| positive(&t)).transpose()
    }

    fn dense(&self, weight: Tensor<'c>) -> Result<QuantizedMatrix<'c>> {
        self.only("dense BF16", &[])?;
        weight.bf16_matrix()
    }

    fn mxfp4(&self, codes: Tensor<'c>) -> Result<QuantizedMatrix<'c>> {
        let scale = self.need("weight_scale", MXFP4)?;
        self.only(MXFP4, &["weight_scale"])?;
        let (n, k) = fp4_shape(&codes)?;
        block_scale(&scale, &[Dtype::U8, Dtype::F8_E8M0], n, k, 32)?;
        QuantizedMatrix::mxfp4(n, k, codes.bytes, scale.bytes).map_err(|e| named(e, codes.name, scale.name))
    }

    /// Both NVFP4 layouts: they differ in the name and the direction of the global scale.
    fn nvfp4(&self, codes: Tensor<'c>, layout: &'static str) -> Result<QuantizedMatrix<'c>> {
        let scale = self.need("weight_scale", layout)?;
        let global = if layout == MODELOPT {
            let global = self.need("weight_scale_2", layout)?;
            self.only(layout, &["weight_scale", "weight_scale_2"])?;
            GlobalScale::multiplier(finite(&global)?)
        } else {
            let global = self.need("weight_global_scale", layout)?;
            self.only(layout, &["weight_scale", "weight_global_scale"])?;
            GlobalScale::divisor(positive(&global)?)
        };
        let (n, k) = fp4_shape(&codes)?;
        block_scale(&scale, &[Dtype::F8_E4M3], n, k, 16)?;
        QuantizedMatrix::nvfp4(n, k, codes.bytes, scale.bytes, global).map_err(|e| named(e, codes.name, scale.name))
    }

    fn fp8(&self, codes: Tensor<'c>, element: Fp8) -> Result<QuantizedMatrix<'c>> {
        let (n, k) = codes.matrix_shape()?;
        let quant = &self.checkpoint.quant;
        let scale = match self.find("weight_scale_inv")? {
            Some(inv) => inv,
            None => self.need("weight_scale", "an FP8 layer")?,
        };
        let used = if scale.name.ends_with("_inv") { "weight_scale_inv" } else { "weight_scale" };
        if matches!(scale.dtype, Dtype::U8 | Dtype::F8_E8M0) {
            self.only(MXFP8, &["weight_scale"])?;
            block_scale(&scale, &[Dtype::U8, Dtype::F8_E8M0], n, k, 32)?;
            return QuantizedMatrix::mxfp8(element, n, k, codes.bytes, scale.bytes)
                .map_err(|e| named(e, codes.name, scale.name));
        }
        self.only(FLOAT, &[used])?;
        let scales = scale.f32()?;
        let matrix = match (scale.shape, used) {
            // A single scale is a tile only where tiles were announced.
            (shape @ ([] | [1] | [1, 1]), "weight_scale") if shape.len() < 2 || !quant.has_weight_block() => {
                QuantizedMatrix::fp8_per_tensor(element, n, k, codes.bytes, finite(&scale)?)
            }
            ([rows, 1], "weight_scale") if *rows == n => {
                QuantizedMatrix::fp8_per_channel(element, n, k, codes.bytes, scales)
            }
            (shape, _) => {
                let modelopt = matches!((shape, used), ([_, 1, _, 1], "weight_scale"));
                let block = if modelopt { (128, 128) } else { quant.weight_block() };
                let (rows, cols) = (("n tiles", n.div_ceil(block.0)), ("k tiles", k.div_ceil(block.1)));
                let axes = if modelopt { vec![rows, ("n", 1), cols, ("k", 1)] } else { vec![rows, cols] };
                scale.expect_shape(&axes)?;
                QuantizedMatrix::fp8_blockwise(element, n, k, codes.bytes, scales, block)
            }
        };
        matrix.map_err(|e| named(e, codes.name, scale.name))
    }
}

/// `[n, k]` of FP4 codes stored as U8 `[n, k/2]`.
fn fp4_shape(codes: &Tensor<'_>) -> Result<(usize, usize)> {
    codes.expect_dtype(&[Dtype::U8])?;
    let (n, bytes) = codes.matrix_shape()?;
    let k = bytes.checked_mul(2).ok_or_else(|| Error::Overflow { operand: codes.name.to_owned().into() })?;
    Ok((n, k))
}

/// Asks that `scale` be one byte for each `block` elements of `[n, k]`.
fn block_scale(scale: &Tensor<'_>, dtypes: &[Dtype], n: usize, k: usize, block: usize) -> Result<()> {
    scale.expect_dtype(dtypes)?;
    if !k.is_multiple_of(block) {
        return Err(Error::Multiple { operand: scale.name.to_owned().into(), axis: "k", got: k, of: block });
    }
    scale.expect_shape(&[("n", n), ("k blocks", k / block)])
}

fn unexpected(name: &str, because: impl Into<Name>) -> Error {
    Error::Unexpected { operand: name.to_owned().into(), because: because.into() }
}

/// A scalar that multiplies.
fn finite(t: &Tensor<'_>) -> Result<f32> {
    checked(t, f32::is_finite, "a finite scale")
}

/// A scalar that something is divided by.
fn positive(t: &Tensor<'_>) -> Result<f32> {
    checked(t, |x| x.is_finite() && x > 0.0 && x.recip().is_finite(), "a finite scale above 0 with a finite reciprocal")
}

fn checked(t: &Tensor<'_>, good: impl Fn(f32) -> bool, needed: &'static str) -> Result<f32> {
    let x = t.scalar()?;
    if good(x) {
        return Ok(x);
    }
    Err(Error::Value { operand: t.name.to_owned().into(), at: 0, got: x.to_string(), needed })
}
