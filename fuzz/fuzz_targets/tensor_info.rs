//! A table of model tensors with any contents: it is refused, or read without asking for an entry or a shape that is not there.
#![no_main]
#![forbid(unsafe_code)]

use std::ffi::c_char;
use trn_kernels::neuron::{Expected, ModelIo, TensorTable, Usage, Version, sys};

/// Entries out of bytes: usage, dtype, ndim, whether there is a shape, then size, then the name up to a zero.
struct Table {
    count: u64,
    entries: Vec<sys::TensorInfo>,
}

fn entry(bytes: &mut &[u8]) -> Option<sys::TensorInfo> {
    let (&[usage, dtype, ndim, shaped, wide, size], mut rest) = bytes.split_first_chunk()?;
    let mut name = [0; sys::TENSOR_NAME_MAX];
    for place in &mut name {
        let Some((&byte, behind)) = rest.split_first() else { break };
        rest = behind;
        *place = c_char::from_ne_bytes([byte]);
        if byte == 0 {
            break;
        }
    }
    *bytes = rest;
    let shape = if shaped % 2 == 0 { std::ptr::null_mut() } else { std::ptr::dangling_mut() };
    let ndim = if wide == 255 { u32::MAX - u32::from(ndim) } else { u32::from(ndim) };
    let size = if wide == 254 { usize::MAX } else { usize::from(size) };
    Some(sys::TensorInfo { name, usage: u32::from(usage), size, dtype: u32::from(dtype), shape, ndim })
}

impl TensorTable for Table {
    fn count(&self) -> u64 {
        self.count
    }

    fn entry(&self, at: usize) -> sys::TensorInfo {
        assert!((at as u64) < self.count, "entry {at} is not there");
        self.entries[at % self.entries.len()]
    }

    fn shape(&self, entry: &sys::TensorInfo) -> Vec<u32> {
        assert!(!entry.shape.is_null() && (1..=64).contains(&entry.ndim), "this shape is not there");
        vec![1; entry.ndim as usize]
    }
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((&minor, mut rest)) = bytes.split_first() else { return };
    let entries: Vec<_> = std::iter::from_fn(|| entry(&mut rest)).collect();
    // Sometimes a count that is not the number of entries; never entries out of nothing.
    let count = if entries.is_empty() { 0 } else { entries.len() as u64 };
    let count = if minor == 255 && count > 0 { u64::MAX / count } else { count };
    let version = Version::new(2, u64::from(minor), 0);
    let Ok(mut io) = ModelIo::read(&Table { count, entries }, version) else { return };
    assert_eq!((io.inputs.len() + io.outputs.len()) as u64, count);
    for usage in [Usage::Input, Usage::Output] {
        for desc in io.side(usage).to_vec() {
            let same = Expected { bytes: desc.bytes, dtype: Some(desc.dtype), packed_x4: true };
            assert_eq!(io.expect(version, usage, &desc.name, &same), Ok(None));
        }
    }
    for &(i, o) in &io.aliases {
        assert_eq!(io.inputs[i].name, format!("{}{}", io.outputs[o].name, trn_kernels::neuron::ALIAS_SUFFIX));
    }
});
