//! Values as the little-endian bytes that a device holds, and back.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::view::MatRef;
use half::bf16;

/// Appends values.
pub(super) fn put_bf16<'a>(out: &mut Vec<u8>, values: impl IntoIterator<Item = &'a bf16>) {
    values.into_iter().for_each(|v| out.extend_from_slice(&v.to_le_bytes()));
}

/// The bytes of f32 values.
pub(in crate::neuron) fn of_f32(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// The bytes of i32 values.
pub(super) fn of_i32(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Values of f32 (4 bytes) or bf16 (2 bytes) elements.
pub(super) fn to_f32(bytes: &[u8], size: usize) -> impl Iterator<Item = f32> + '_ {
    bytes.chunks_exact(size).map(move |b| match b {
        [a, b, c, d] => f32::from_le_bytes([*a, *b, *c, *d]),
        [a, b] => bf16::from_le_bytes([*a, *b]).to_f32(),
        _ => f32::NAN,
    })
}

/// Asks that every element be a finite number.
pub(super) fn check_finite(operand: &'static str, x: MatRef<'_, bf16>) -> Result<()> {
    for i in 0..x.rows() {
        let row = x.row(i).unwrap_or_default();
        if let Some(at) = row.iter().position(|v| !v.is_finite()) {
            let (got, needed) = (row[at].to_string(), "a finite number: quantize_mx is documented for no other");
            return Err(Error::Value { operand: operand.into(), at: i * x.cols() + at, got, needed });
        }
    }
    Ok(())
}
