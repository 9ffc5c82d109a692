//! Which codes, which scales, how they tile the matrix.
#![forbid(unsafe_code)]

use crate::num::{Format, Fp8};

/// How a matrix `[n, k]` is quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// Not quantized: bf16 values. Here so that a checkpoint's dense layers take the same path.
    Bf16,
    /// OCP MXFP4: FP4 E2M1 codes, one E8M0 scale for each 32 along k.
    Mxfp4,
    /// OCP MXFP8: FP8 codes, one E8M0 scale for each 32 along k.
    Mxfp8(Fp8),
    /// NVFP4: FP4 E2M1 codes, one E4M3FN scale for each 16 along k, one f32 scale for the matrix.
    Nvfp4,
    /// FP8 codes, one f32 scale for the matrix.
    Fp8PerTensor(Fp8),
    /// FP8 codes, one f32 scale for each row (output channel of a weight, token of an activation).
    Fp8PerChannel(Fp8),
    /// FP8 codes, one f32 scale for each `n` x `k` tile; tiles at the far edges may be partial. DeepSeek weights are 128 x
    /// 128, activations 1 x 128.
    Fp8Blockwise {
        /// The element.
        element: Fp8,
        /// Rows of a tile.
        n: usize,
        /// Columns of a tile.
        k: usize,
    },
}

impl Scheme {
    /// Bits of one code: 4, 8 or 16.
    pub const fn bits(self) -> usize {
        match self {
            Scheme::Bf16 => 16,
            Scheme::Mxfp4 | Scheme::Nvfp4 => 4,
            _ => 8,
        }
    }

    /// Elements along k that share a block scale stored with the codes: 32 (MX), 16 (NVFP4), 1 (no block scale). k must be a
    /// multiple of it.
    pub const fn block(self) -> usize {
        match self {
            Scheme::Mxfp4 | Scheme::Mxfp8(_) => 32,
            Scheme::Nvfp4 => 16,
            _ => 1,
        }
    }

    /// The 8-bit element, if codes are 8-bit.
    pub const fn fp8(self) -> Option<Fp8> {
        match self {
            Scheme::Mxfp8(e) | Scheme::Fp8PerTensor(e) | Scheme::Fp8PerChannel(e) => Some(e),
            Scheme::Fp8Blockwise { element, .. } => Some(element),
            _ => None,
        }
    }

    /// The format of the codes; `None` for bf16.
    pub const fn element(self) -> Option<Format> {
        match self {
            Scheme::Bf16 => None,
            Scheme::Mxfp4 | Scheme::Nvfp4 => Some(Format::E2M1),
            Scheme::Mxfp8(e) | Scheme::Fp8PerTensor(e) | Scheme::Fp8PerChannel(e) => Some(e.format()),
            Scheme::Fp8Blockwise { element, .. } => Some(element.format()),
        }
    }

    /// Bytes of `count` codes, rounded up to whole bytes.
    pub(crate) const fn code_bytes(self, count: usize) -> usize {
        match self.bits() {
            4 => count.div_ceil(2),
            8 => count,
            // Checked by the constructors: a bf16 matrix's byte count fits usize.
            _ => count.saturating_mul(2),
        }
    }
}

/// Which elements the nibbles of an FP4 byte are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum NibbleOrder {
    /// Byte j of a block: low nibble element 2j, high nibble element 2j + 1. gpt-oss, compressed-tensors, ModelOpt.
    #[default]
    Interleaved,
    /// Byte j of a block of B: low nibble element j, high nibble element j + B/2. GGUF.
    Halves,
}

/// The f32 scale of a whole NVFP4 tensor, named by the direction in which a checkpoint stores it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GlobalScale {
    stored: f32,
    divides: bool,
}

impl GlobalScale {
    /// No global scale, written out.
    pub const ONE: GlobalScale = GlobalScale::multiplier(1.0);

    /// value = code x block scale x `scale`: ModelOpt `weight_scale_2`, torchao, GGUF `.scale`.
    pub const fn multiplier(scale: f32) -> Self {
        GlobalScale { stored: scale, divides: false }
    }

    /// value = code x block scale / `scale`: compressed-tensors `weight_global_scale`. Kernels multiply by the f32 nearest
    /// `1 / scale`.
    pub const fn divisor(scale: f32) -> Self {
        GlobalScale { stored: scale, divides: true }
    }

    /// What the checkpoint stores, in its own direction.
    pub(crate) const fn stored(self) -> f32 {
        self.stored
    }

    /// The multiplier: as stored, or the f32 nearest the reciprocal of a divisor.
    pub const fn get(self) -> f32 {
        if self.divides { 1.0 / self.stored } else { self.stored }
    }

    /// The divisor: as stored, or the f32 nearest the reciprocal of a multiplier.
    pub const fn get_divisor(self) -> f32 {
        if self.divides { self.stored } else { 1.0 / self.stored }
    }
}
