//! The residual stream.
#![forbid(unsafe_code)]

use super::rows::{self, RowKernel};
use crate::cpu::Cpu;
use crate::error::{Result, extent};
use crate::num::{Real, rounded};
use crate::view::{MatMut, MatRef};

/// `residual[i, j] += delta[i, j]`, added in f32 and rounded once to the residual's type. Both are `[m, k]`.
///
/// # Errors
/// [`Error::Extent`](crate::Error::Extent) unless the shapes agree.
pub fn add<T: Real, D: Real>(cpu: &Cpu<'_>, delta: MatRef<'_, D>, mut residual: MatMut<'_, T>) -> Result<()> {
    extent("residual", "m", residual.rows(), delta.rows())?;
    extent("residual", "k", residual.cols(), delta.cols())?;
    rows::matrix(cpu, &mut residual, &Add { delta });
    Ok(())
}

struct Add<'a, D> {
    delta: MatRef<'a, D>,
}

impl<T: Real, D: Real> RowKernel<T> for Add<'_, D> {
    #[inline(always)]
    fn row(&self, i: usize, out: &mut [T]) {
        let Some(delta) = self.delta.row(i) else { return };
        for (x, d) in out.iter_mut().zip(delta) {
            *x = rounded(x.to_f32() + d.to_f32());
        }
    }
}
