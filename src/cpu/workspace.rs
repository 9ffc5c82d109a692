//! Scratch memory that the caller owns and lends to every call.
#![forbid(unsafe_code)]

/// Scratch memory for kernels. Make one for each thread that calls the crate and keep it: it grows to what the largest call
/// needed and then stays, so that repeated calls allocate nothing.
#[derive(Debug, Default)]
pub struct Workspace {
    floats: Vec<f32>,
    indices: Vec<usize>,
}

impl Workspace {
    /// Empty; grows on first use.
    pub const fn new() -> Self {
        Workspace { floats: Vec::new(), indices: Vec::new() }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.floats.capacity() * size_of::<f32>() + self.indices.capacity() * size_of::<usize>()
    }

    /// `floats` and `indices` elements of scratch with arbitrary contents.
    pub(crate) fn take(&mut self, floats: usize, indices: usize) -> (&mut [f32], &mut [usize]) {
        if self.floats.len() < floats {
            self.floats.resize(floats, 0.0);
        }
        if self.indices.len() < indices {
            self.indices.resize(indices, 0);
        }
        (&mut self.floats[..floats], &mut self.indices[..indices])
    }
}
