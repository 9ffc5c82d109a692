//! Head vectors of any plain type, so that one object-safe call takes them all.
#![forbid(unsafe_code)]

use crate::num::{Real, RealSlice, RealSliceMut};
use crate::view::{HeadsMut, HeadsRef};
use half::{bf16, f16};

/// Queries, keys or values `[tokens, heads, head_dim]`.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum HeadsIn<'a> {
    /// f32.
    F32(HeadsRef<'a, f32>),
    /// bf16.
    Bf16(HeadsRef<'a, bf16>),
    /// f16.
    F16(HeadsRef<'a, f16>),
}

/// Attention outputs `[tokens, num_qo_heads, head_dim_vo]`, rounded once to the type they are stored in.
#[derive(Debug)]
#[non_exhaustive]
pub enum HeadsOut<'a> {
    /// f32.
    F32(HeadsMut<'a, f32>),
    /// bf16.
    Bf16(HeadsMut<'a, bf16>),
    /// f16.
    F16(HeadsMut<'a, f16>),
}

impl<'a, T: Real> From<HeadsRef<'a, T>> for HeadsIn<'a> {
    fn from(x: HeadsRef<'a, T>) -> Self {
        let (data, extents) = x.into_parts();
        match T::slice(data) {
            RealSlice::F32(data) => HeadsIn::F32(HeadsRef::from_parts((data, extents))),
            RealSlice::Bf16(data) => HeadsIn::Bf16(HeadsRef::from_parts((data, extents))),
            RealSlice::F16(data) => HeadsIn::F16(HeadsRef::from_parts((data, extents))),
        }
    }
}

impl<'a, T: Real> From<HeadsMut<'a, T>> for HeadsOut<'a> {
    fn from(x: HeadsMut<'a, T>) -> Self {
        let (data, extents) = x.into_parts();
        match T::slice_mut(data) {
            RealSliceMut::F32(data) => HeadsOut::F32(HeadsMut::from_parts((data, extents))),
            RealSliceMut::Bf16(data) => HeadsOut::Bf16(HeadsMut::from_parts((data, extents))),
            RealSliceMut::F16(data) => HeadsOut::F16(HeadsMut::from_parts((data, extents))),
        }
    }
}

impl HeadsIn<'_> {
    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        match self {
            HeadsIn::F32(x) => x.tokens(),
            HeadsIn::Bf16(x) => x.tokens(),
            HeadsIn::F16(x) => x.tokens(),
        }
    }

    /// The element type's name.
    pub fn element(&self) -> &'static str {
        match self {
            HeadsIn::F32(_) => f32::NAME,
            HeadsIn::Bf16(_) => bf16::NAME,
            HeadsIn::F16(_) => f16::NAME,
        }
    }
}

/// Runs `$body` with `$x` bound to the typed view of a [`HeadsIn`].
macro_rules! with_heads_in {
    ($value:expr, $x:ident => $body:expr) => {
        match $value {
            HeadsIn::F32($x) => $body,
            HeadsIn::Bf16($x) => $body,
            HeadsIn::F16($x) => $body,
        }
    };
}

/// Runs `$body` with `$x` bound to the typed view of a [`HeadsOut`].
macro_rules! with_heads_out {
    ($value:expr, $x:ident => $body:expr) => {
        match $value {
            HeadsOut::F32($x) => $body,
            HeadsOut::Bf16($x) => $body,
            HeadsOut::F16($x) => $body,
        }
    };
}

pub(super) use {with_heads_in, with_heads_out};
