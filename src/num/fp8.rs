//! The 8-bit element types.
#![forbid(unsafe_code)]

use super::format::{Format, Overflow, table};

/// An 8-bit float stored as its code.
pub trait Element: Copy + Send + Sync + 'static {
    /// The format's facts.
    const FORMAT: Format;
    /// Value of every code.
    const VALUES: &'static [f32; 256];
    /// The type with this code.
    fn from_bits(code: u8) -> Self;
    /// The code.
    fn to_bits(self) -> u8;

    /// The exact value.
    fn to_f32(self) -> f32 {
        Self::VALUES[self.to_bits() as usize]
    }

    /// Nearest code, ties to even, rounded once from `x`.
    fn from_f32(x: f32, overflow: Overflow) -> Self {
        Self::from_bits(Self::FORMAT.encode(x, overflow))
    }
}

macro_rules! element {
    ($(#[$doc:meta])* $name:ident, $format:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(u8);

        impl $name {
            /// The format's facts.
            pub const FORMAT: Format = Format::$format;
            /// Largest finite value.
            pub const MAX: f32 = Format::$format.max();

            /// The number with this code.
            pub const fn from_bits(code: u8) -> Self {
                Self(code)
            }

            /// The code.
            pub const fn to_bits(self) -> u8 {
                self.0
            }

            /// The exact value.
            pub const fn to_f32(self) -> f32 {
                const VALUES: [f32; 256] = table(Format::$format);
                VALUES[self.0 as usize]
            }

            /// Nearest code, ties to even, rounded once from the exact value of `x`. NaN gives NaN.
            pub const fn from_f32(x: f32, overflow: Overflow) -> Self {
                Self(Self::FORMAT.encode(x, overflow))
            }

            /// Whether the code is a NaN.
            pub const fn is_nan(self) -> bool {
                self.to_f32().is_nan()
            }
        }

        impl Element for $name {
            const FORMAT: Format = Format::$format;
            const VALUES: &'static [f32; 256] = &table(Format::$format);
            fn from_bits(code: u8) -> Self {
                Self(code)
            }
            fn to_bits(self) -> u8 {
                self.0
            }
        }

        impl From<$name> for f32 {
            fn from(x: $name) -> f32 {
                x.to_f32()
            }
        }
    };
}

element!(
    /// OCP FP8 E4M3: max 448, NaN at magnitude 0x7F, no infinity. Checkpoints and Trainium3.
    F8E4M3Fn,
    E4M3FN
);
element!(
    /// E4M3 as IEEE would have it: max 240, infinities at magnitude 0x78, NaN above. Trainium1 and Trainium2 (FP8_EXP4).
    ///
    /// The same byte means another number than in [`F8E4M3Fn`] from magnitude 0x78 on; [`to_ieee`](super::to_ieee) converts.
    F8E4M3Ieee,
    E4M3_IEEE
);
element!(
    /// OCP FP8 E5M2: max 57344, infinities and NaN as IEEE.
    F8E5M2,
    E5M2
);
element!(
    /// E3M4 as IEEE would have it: max 15.5.
    F8E3M4,
    E3M4
);

/// Which 8-bit element a byte is, at run time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fp8 {
    /// [`F8E4M3Fn`]
    E4M3Fn,
    /// [`F8E4M3Ieee`]
    E4M3Ieee,
    /// [`F8E5M2`]
    E5M2,
    /// [`F8E3M4`]
    E3M4,
}

impl Fp8 {
    /// All of them.
    pub const ALL: [Fp8; 4] = [Fp8::E4M3Fn, Fp8::E4M3Ieee, Fp8::E5M2, Fp8::E3M4];

    /// The format's facts.
    pub const fn format(self) -> Format {
        match self {
            Fp8::E4M3Fn => Format::E4M3FN,
            Fp8::E4M3Ieee => Format::E4M3_IEEE,
            Fp8::E5M2 => Format::E5M2,
            Fp8::E3M4 => Format::E3M4,
        }
    }

    /// Value of every code.
    pub const fn values(self) -> &'static [f32; 256] {
        match self {
            Fp8::E4M3Fn => F8E4M3Fn::VALUES,
            Fp8::E4M3Ieee => F8E4M3Ieee::VALUES,
            Fp8::E5M2 => F8E5M2::VALUES,
            Fp8::E3M4 => F8E3M4::VALUES,
        }
    }
}
