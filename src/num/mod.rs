//! What a number is: 8-bit and 4-bit element formats, the E8M0 scale, rounding, and conversions of slices.
//!
//! Every format is five facts ([`Format`]) read by one engine. Storage types are the bytes themselves.
#![forbid(unsafe_code)]

mod bridge;
mod convert;
mod e8m0;
mod format;
mod fp4;
mod fp8;
pub mod math;

pub use bridge::{BridgeReport, halve_for_ieee, to_ieee};
pub(crate) use convert::rounded;
pub use convert::{
    Real, RealSlice, RealSliceMut, bf16_from_f64, decode_fp4_slice, decode_slice, encode_fp4_slice, encode_slice,
};
pub use e8m0::E8M0;
pub use format::{Format, Overflow, Specials};
pub use fp4::F4E2M1x2;
pub use fp8::{Element, F8E3M4, F8E4M3Fn, F8E4M3Ieee, F8E5M2, Fp8};
