//! `nrt_tensor_info_array_t`: the one thing of this library that clients read through pointers.
#![forbid(unsafe_code)]

use crate::abi::{NAME_MAX, info};
use crate::dtype;
use crate::model::{Loaded, Variable};
use crate::settings::{Settings, flag};
use std::ffi::c_void;

/// Freed arrays kept, so that a client that reads one late finds rubbish instead of unmapped memory.
const QUARANTINE: usize = 64;
/// What a freed array is filled with: its count and its ndims are absurd, its shape pointers lead nowhere.
const POISON: u64 = 0xDEAD_DEAD_DEAD_DEAD;

/// One array. Words, so that it is aligned as its C type is.
struct Array {
    words: Vec<u64>,
    shapes: Vec<Vec<u32>>,
}

impl Array {
    fn new(model: &Loaded, settings: &Settings) -> Array {
        let sides = [(0, &model.inputs), (1, &model.outputs)];
        let variables = || sides.into_iter().flat_map(|(usage, all)| all.iter().map(move |v| (usage, v)));
        let mut count = if settings.has(flag::INFO_COUNT_ZERO) { 0 } else { variables().count() };
        let mut words = vec![0u64; (info::FIRST + count * info::STRIDE) / 8];
        let mut shapes = vec![];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
        for ((usage, variable), at) in variables().zip(bytes[info::FIRST..].chunks_exact_mut(info::STRIDE)) {
            shapes.push(describe(at, usage, variable, settings));
        }
        if settings.has(flag::INFO_COUNT_ABSURD) {
            count = 1 << 40;
        }
        words[0] = count as u64;
        Array { words, shapes }
    }

    fn address(&self) -> usize {
        self.words.as_ptr().addr()
    }
}

/// Fills one `nrt_tensor_info_t`; returns the shape that it points to.
fn describe(at: &mut [u8], usage: u32, variable: &Variable, settings: &Settings) -> Vec<u32> {
    // Extents are bounded by the emulator's limit on a tensor's bytes, far below 2^32.
    let mut shape: Vec<u32> = variable.shape.iter().map(|&n| u32::try_from(n).unwrap_or(u32::MAX)).collect();
    let mut ndim = shape.len() as u32;
    // Clients follow this pointer from C; exposing it is what the address of a field of a C struct is.
    let mut pointer = shape.as_mut_ptr().expose_provenance() as u64;
    if settings.has(flag::INFO_NDIM_ZERO) {
        (ndim, pointer) = (0, 0);
    }
    if settings.has(flag::INFO_NDIM_ABSURD) {
        ndim = 1 << 30;
    }
    let name = variable.name.as_bytes();
    if settings.has(flag::INFO_NAME_UNTERMINATED) {
        at[..NAME_MAX].fill(b'n');
    }
    at[..name.len()].copy_from_slice(name);
    at[info::USAGE..info::USAGE + 4].copy_from_slice(&usage.to_ne_bytes());
    at[info::SIZE..info::SIZE + 8].copy_from_slice(&variable.reported_bytes(settings).to_ne_bytes());
    at[info::DTYPE..info::DTYPE + 4].copy_from_slice(&dtype::number(variable.dtype, settings).to_ne_bytes());
    at[info::SHAPE..info::SHAPE + 8].copy_from_slice(&pointer.to_ne_bytes());
    at[info::NDIM..info::NDIM + 4].copy_from_slice(&ndim.to_ne_bytes());
    shape
}

/// All arrays given out.
#[derive(Default)]
pub(crate) struct Arrays {
    live: Vec<Array>,
    freed: std::collections::VecDeque<Array>,
}

impl Arrays {
    /// Makes an array and returns its address.
    pub(crate) fn give(&mut self, model: &Loaded, settings: &Settings) -> *mut c_void {
        let mut array = Array::new(model, settings);
        let pointer = array.words.as_mut_ptr().cast();
        self.live.push(array);
        pointer
    }

    /// Arrays not freed yet.
    pub(crate) fn live(&self) -> usize {
        self.live.len()
    }

    /// Frees an array: `Ok` if it was live, else whether it was freed before.
    pub(crate) fn free(&mut self, pointer: *const c_void) -> Result<(), bool> {
        let Some(at) = self.live.iter().position(|a| a.address() == pointer.addr()) else {
            return Err(self.freed.iter().any(|a| a.address() == pointer.addr()));
        };
        let mut array = self.live.swap_remove(at);
        array.words.fill(POISON);
        array.shapes.iter_mut().for_each(|s| s.fill(POISON as u32));
        self.freed.push_back(array);
        if self.freed.len() > QUARANTINE {
            self.freed.pop_front();
        }
        Ok(())
    }

    /// Frees all, as closing does.
    pub(crate) fn clear(&mut self) {
        while let Some(pointer) = self.live.first().map(|a| a.words.as_ptr()) {
            // It is live, so freeing it cannot fail.
            let _ = self.free(pointer.cast());
        }
    }
}
