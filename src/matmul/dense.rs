//! Dense matmul.
#![forbid(unsafe_code)]

use super::batch::Call;
use super::driver::Rows;
use super::epilogue::MatmulOptions;
use super::operand::{Activations, Output};
use super::packed::PackedMatrix;
use crate::cpu::{Cpu, Workspace};
use crate::error::{Result, extent, length};
use crate::quant::same_k;

impl Cpu<'_> {
    /// `y = activation(alpha x w^T + bias + y)`: x `[m, k]`, w `[n, k]`, y `[m, n]`; parts as `options` say.
    ///
    /// Bits do not depend on the tier, the number of threads, or what other rows are in x. m, n and k may be 0; with k = 0 the
    /// product is 0. Allocates nothing once `workspace` has grown (in serial mode).
    ///
    /// # Errors
    /// [`Error::Extent`](crate::Error::Extent) if extents disagree; [`Error::Length`](crate::Error::Length) for the bias;
    /// [`Error::Unsupported`](crate::Error::Unsupported) if f32 scale tiles of both operands do not nest.
    pub fn matmul<'a>(
        &self,
        x: impl Into<Activations<'a>>,
        w: &PackedMatrix,
        y: impl Into<Output<'a>>,
        options: &MatmulOptions<'_>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let (x, mut y) = (x.into(), y.into());
        same_k(x.k(), w.k())?;
        extent("output", "m", y.m(), x.m())?;
        extent("output", "n", y.n(), w.n())?;
        if let Some(bias) = options.bias {
            length("bias", bias.len(), w.n())?;
        }
        let (ends, layout) = ([0, x.m()], w.layout());
        let call = Call::new(self, &x, (std::slice::from_ref(w), layout), (&ends, Rows::Each), options)?;
        call.run(&mut y, workspace.take_indices(0).0);
        Ok(())
    }
}
