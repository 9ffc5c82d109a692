//! The MX instructions of Trainium3.
//!
//! A group is 8 consecutive partitions x the 4 elements of one packed word; its scale is a row of the scale tile
//! ([`scale_row`]).
#![forbid(unsafe_code)]

use super::super::args::Slot;
use super::super::dtype::Dtype;
use super::super::fault::{Result, Rule, fault};
use super::super::machine::Execution;
use super::super::memory::{Elements, Psum};
use super::super::op::Op;
use super::super::rules::scale_row;
use super::matmul::{contract, store_product};
use crate::num::E8M0;
use crate::quant::encode_mx_block;

/// Partitions of a group.
const GROUP: usize = 8;
/// Elements of a packed word.
const LANES: usize = 4;

pub(in super::super) fn execute(x: &mut Execution<'_, '_>) -> Result<()> {
    match x.instruction.op {
        Op::QuantizeMx { dst, src, dst_scale } => quantize(x, dst, src, dst_scale),
        Op::MatmulMx { dst, data, scales, accumulate } => {
            let rows = x.access(data[0]).partitions() * LANES;
            let stationary = dequantize(x, data[0], scales[0])?;
            let moving = dequantize(x, data[1], scales[1])?;
            store_product(x, dst, &contract(&stationary, &moving, rows), accumulate)
        }
        _ => Ok(()),
    }
}

fn quantize(x: &mut Execution<'_, '_>, dst: Slot, src: Slot, dst_scale: Slot) -> Result<()> {
    let values = x.values(src)?;
    if let Some(at) = values.iter().position(|v| !v.is_finite()) {
        return fault(Rule::Value, format!("src: element {at} is {}; the result is not documented", values[at]));
    }
    let (partitions, width) = (x.access(dst).partitions(), x.access(dst).free());
    let format = packed_format(x.dtype(dst))?;
    let scale_width = x.access(dst_scale).free();
    let mut words = vec![0u32; partitions * width];
    let mut scales = vec![0u32; x.access(dst_scale).count()];
    let mut live = vec![false; scales.len()];
    for group in 0..partitions / GROUP {
        for column in 0..width {
            let mut block = [0f32; GROUP * LANES];
            for (p, lanes) in block.chunks_exact_mut(LANES).enumerate() {
                let at = ((group * GROUP + p) * width + column) * LANES;
                lanes.copy_from_slice(&values[at..at + LANES]);
            }
            let mut codes = [0u8; GROUP * LANES];
            let scale = match encode_mx_block(format, x.machine.options.scale_rule, &block, &mut codes) {
                Ok(scale) => scale,
                Err(e) => return fault(Rule::Value, e.to_string()),
            };
            for (p, lanes) in codes.chunks_exact(LANES).enumerate() {
                words[(group * GROUP + p) * width + column] =
                    lanes.iter().rev().fold(0, |word, &c| word << 8 | u32::from(c));
            }
            let at = scale_row(group) * scale_width + column;
            scales[at] = scale.to_bits().into();
            live[at] = true;
        }
    }
    x.store(dst, &Elements::defined(words), None, Psum::Other)?;
    x.store(dst_scale, &Elements::defined(scales), Some(&live), Psum::Other)
}

fn packed_format(dtype: Dtype) -> Result<crate::num::Format> {
    match dtype.lane() {
        Some(format) => Ok(format),
        None => fault(Rule::Operand, format!("{} is not a packed type", dtype.name())),
    }
}

/// Values of a packed tile, contraction rows (partition-major, lane-minor) x columns. Codes times powers of two are exact.
fn dequantize(x: &mut Execution<'_, '_>, data: Slot, scale: Slot) -> Result<Vec<f64>> {
    let format = packed_format(x.dtype(data))?;
    let words = x.bits(data)?;
    let (partitions, width) = (x.access(data).partitions(), x.access(data).free());
    // Only the live rows are read: the others may hold anything.
    let rows = x.region(scale, false)?.rows((0..partitions / GROUP).map(scale_row));
    let role = x.role(scale);
    let mut factors = Vec::with_capacity(partitions / GROUP * width);
    for code in x.machine.memory.read_defined(&rows, role)? {
        let Some(exponent) = E8M0::from_bits(code as u8).exponent() else {
            return fault(Rule::Value, format!("{role}: a scale is NaN (255); the result is not documented"));
        };
        factors.push(2f64.powi(exponent));
    }
    let bits = 8 * x.dtype(data).size() / LANES;
    let table: Vec<f64> = (0..1u32 << bits).map(|code| format.decode(code as u8).into()).collect();
    let mut out = vec![0f64; partitions * LANES * width];
    for p in 0..partitions {
        for column in 0..width {
            let word = words[p * width + column];
            let factor = factors[p / GROUP * width + column];
            for lane in 0..LANES {
                let value = table[(word >> (lane * bits)) as usize & ((1 << bits) - 1)];
                if !value.is_finite() {
                    return fault(
                        Rule::Value,
                        format!("{}: a code is {value}; the result is not documented", x.role(data)),
                    );
                }
                out[(p * LANES + lane) * width + column] = value * factor;
            }
        }
    }
    Ok(out)
}
