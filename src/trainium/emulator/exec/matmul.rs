//! TensorE: contraction over partitions, and accumulation in PSUM.
#![forbid(unsafe_code)]

use super::super::args::Slot;
use super::super::fault::{Result, Rule, fault};
use super::super::machine::Execution;
use super::super::memory::{Elements, Psum};
use super::super::op::Op;
use super::super::program::Target;

pub(in super::super) fn execute(x: &mut Execution<'_, '_>) -> Result<()> {
    match x.instruction.op {
        Op::Matmul { dst, stationary, moving, depth, accumulate } => {
            let (s, v) = (x.values(stationary)?, x.values(moving)?);
            // With double_row a partition holds two contraction rows one after the other.
            let rows = x.access(stationary).partitions() * depth;
            let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<_>>();
            let product = contract(&wide(s), &wide(v), rows);
            store_product(x, dst, &product, accumulate)
        }
        Op::MatmulTranspose { dst, stationary, moving } => {
            let k = x.access(moving).partitions();
            let identity = x.values(moving)?;
            if identity.iter().enumerate().any(|(i, &e)| e != f32::from(u8::from(i / k == i % k))) {
                return fault(Rule::Operand, "moving: a transpose needs the identity");
            }
            let (rows, columns) = (x.access(stationary).partitions(), x.access(stationary).free());
            let turned = x.elements(stationary)?.permuted(|i| i % rows * columns + i / rows);
            x.store(dst, &turned, None, Psum::Other)
        }
        _ => Ok(()),
    }
}

/// `sT v` for `s` of `rows` x M and `v` of `rows` x N, rounded to f32 once. Products of f32 are exact in f64.
pub(super) fn contract(s: &[f64], v: &[f64], rows: usize) -> Vec<f32> {
    let (m, n) = (s.len() / rows, v.len() / rows);
    let mut sums = vec![0f64; m * n];
    for (s, v) in s.chunks_exact(m).zip(v.chunks_exact(n)) {
        for (&a, sums) in s.iter().zip(sums.chunks_exact_mut(n)) {
            for (sum, &b) in sums.iter_mut().zip(v) {
                *sum += a * b;
            }
        }
    }
    sums.into_iter().map(|x| x as f32).collect()
}

/// Writes a product into PSUM, or adds it to what a matmul left there: in f32, rounded to dst by every instruction.
pub(super) fn store_product(
    x: &mut Execution<'_, '_>,
    dst: Slot,
    product: &[f32],
    accumulate: Option<bool>,
) -> Result<()> {
    let region = x.region(dst, false)?;
    let states = x.machine.memory.psum(&region);
    let old = x.machine.memory.read(&region);
    let dtype = x.dtype(dst);
    let mut values = product.to_vec();
    for (i, value) in values.iter_mut().enumerate() {
        let defined = old.undefined(i) == 0;
        let add = match (accumulate, states[i]) {
            (Some(false), _) => false,
            (Some(true), Psum::Matmul | Psum::Evicted) => true,
            (Some(true), Psum::Other) if defined && x.machine.program.target >= Target::Trn3 => true,
            (Some(true), Psum::Other) => {
                return fault(
                    Rule::Accumulate,
                    format!("dst: accumulates onto element {i}, which no matmul has written"),
                );
            }
            (None, Psum::Matmul) => true,
            (None, Psum::Other) if !defined => false,
            (None, _) => {
                return fault(
                    Rule::Accumulate,
                    format!("dst: element {i} may be added to or overwritten; pass accumulate"),
                );
            }
        };
        if add {
            *value += dtype.to_f32(old.bits[i]);
        }
    }
    let bits = x.rounded(dst, &values)?;
    x.machine.memory.write(&region, &Elements::defined(bits), None, Psum::Matmul);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contraction_is_over_rows() {
        // s = [[1, 2], [3, 4], [5, 6]], v = [[1, 0, 2], [0, 1, 1], [1, 1, 0]]
        let got = contract(&[1., 2., 3., 4., 5., 6.], &[1., 0., 2., 0., 1., 1., 1., 1., 0.], 3);
        assert_eq!(got, [6., 8., 5., 8., 10., 8.]);
    }
}
