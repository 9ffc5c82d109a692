//! ggml's tensor types.
#![forbid(unsafe_code)]

use std::fmt;

/// A ggml tensor type, by its code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GgmlType(u32);

/// Code, name, elements of a block, bytes of a block. Source: `type_traits` of ggml.c.
const KNOWN: [(u32, &str, usize, usize); 33] = [
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (9, "Q8_1", 32, 36),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (30, "BF16", 1, 2),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
];

impl GgmlType {
    /// 32-bit float.
    pub const F32: GgmlType = GgmlType(0);
    /// 16-bit IEEE float.
    pub const F16: GgmlType = GgmlType(1);
    /// bfloat16.
    pub const BF16: GgmlType = GgmlType(30);
    /// OCP MXFP4: 32 elements in 17 bytes, the scale first.
    pub const MXFP4: GgmlType = GgmlType(39);
    /// NVFP4: 64 elements in 36 bytes, four UE4M3 scales first; the tensor's f32 scale is a tensor of its own, `NAME.scale`.
    pub const NVFP4: GgmlType = GgmlType(40);

    /// The type of a code, known or not.
    pub const fn from_code(code: u32) -> Self {
        GgmlType(code)
    }

    /// The code.
    pub const fn code(self) -> u32 {
        self.0
    }

    /// Elements and bytes of a block, if the type is known. Rows are whole blocks.
    pub fn block(self) -> Option<(usize, usize)> {
        KNOWN.iter().find(|t| t.0 == self.0).map(|t| (t.2, t.3))
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match KNOWN.iter().find(|t| t.0 == self.0) {
            Some((_, name, ..)) => f.write_str(name),
            None => write!(f, "ggml type {}", self.0),
        }
    }
}
