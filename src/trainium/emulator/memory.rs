//! Bytes of all tensors, and for each byte who wrote it last.
//!
//! A byte is defined for a tensor while that tensor was the last to write it, so tensors that a kernel placed over each other
//! really clobber each other. Bytes without an owner are undefined: copies carry that along, arithmetic refuses it.
#![forbid(unsafe_code)]

use super::check;
use super::dtype::Dtype;
use super::fault::{Result, Rule, fault};
use super::program::{Access, Buffer, PARTITIONS, Program, Tensor};

/// No tensor has written the byte.
const NOBODY: u16 = 0;

/// What a PSUM byte holds, as matmul accumulation sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Psum {
    /// Written by a matmul.
    Matmul,
    /// Written by a matmul, and read since.
    Evicted,
    /// Written by something else, or never.
    Other,
}

/// A piece of memory that tensors lie in.
struct Space {
    bytes: Vec<u8>,
    owner: Vec<u16>,
    psum: Vec<Psum>,
}

impl Space {
    fn new(bytes: usize, psum: bool) -> Space {
        Space {
            bytes: vec![0; bytes],
            owner: vec![NOBODY; bytes],
            psum: vec![Psum::Other; if psum { bytes } else { 0 }],
        }
    }
}

/// Where a tensor's rows are.
#[derive(Clone, Copy)]
struct Place {
    space: usize,
    base: usize,
    row_stride: usize,
    owner: u16,
}

/// An access with every runtime offset filled in, in bytes.
#[derive(Debug, Clone)]
pub(super) struct Region {
    space: usize,
    owner: u16,
    size: usize,
    /// First byte for each index of axis 0; `None` where the index was out of range and is skipped.
    starts: Vec<Option<usize>>,
    /// Stride in bytes and count of the other axes, merged where they continue each other; never empty.
    inner: Vec<(usize, usize)>,
}

impl Region {
    /// Elements for each index of axis 0.
    pub(super) fn free(&self) -> usize {
        self.inner.iter().map(|d| d.1).product()
    }

    /// All elements.
    pub(super) fn count(&self) -> usize {
        self.starts.len() * self.free()
    }

    /// Whether some rows are skipped.
    pub(super) fn skips(&self) -> bool {
        self.starts.contains(&None)
    }

    /// The same free elements at some indices of axis 0 only.
    pub(super) fn rows(&self, rows: impl Iterator<Item = usize>) -> Region {
        Region { starts: rows.map(|r| self.starts[r]).collect(), ..self.clone() }
    }

    /// First byte of each row, for comparing rows of a scatter.
    pub(super) fn starts(&self) -> &[Option<usize>] {
        &self.starts
    }

    /// Calls `f` with the number and first byte of every element that is not skipped, in row-major order.
    fn each(&self, mut f: impl FnMut(usize, usize)) {
        let Some((&(stride, count), outer)) = self.inner.split_last() else { return };
        let mut runs = vec![0usize];
        for &(step, n) in outer {
            runs = runs.iter().flat_map(|at| (0..n).map(move |i| at + i * step)).collect();
        }
        let mut number = 0;
        for start in &self.starts {
            let Some(start) = *start else {
                number += runs.len() * count;
                continue;
            };
            for run in &runs {
                for i in 0..count {
                    f(number, start + run + i * stride);
                    number += 1;
                }
            }
        }
    }
}

/// Elements on their way from one place to another: bits, and for each a mask of its undefined bytes.
#[derive(Debug, Clone, Default)]
pub(super) struct Elements {
    pub(super) bits: Vec<u32>,
    /// Bit b is set if byte b of the element is undefined; empty if everything is defined.
    pub(super) undefined: Vec<u8>,
}

impl Elements {
    /// Elements that are all defined.
    pub(super) fn defined(bits: Vec<u32>) -> Elements {
        Elements { bits, undefined: vec![] }
    }

    /// Undefined bytes of element `i`.
    pub(super) fn undefined(&self, i: usize) -> u8 {
        self.undefined.get(i).copied().unwrap_or(0)
    }

    /// The elements in another order: element i of the result is element `from(i)` of these.
    pub(super) fn permuted(&self, from: impl Fn(usize) -> usize) -> Elements {
        self.picked((0..self.bits.len()).map(from))
    }

    /// The elements at these places.
    pub(super) fn picked(&self, places: impl Iterator<Item = usize>) -> Elements {
        let mut out = Elements::default();
        for i in places {
            out.bits.push(self.bits[i]);
            out.undefined.extend(self.undefined.get(i));
        }
        out
    }
}

/// All memory of a run.
pub(super) struct Memory {
    spaces: Vec<Space>,
    places: Vec<Place>,
}

impl Memory {
    /// Undefined memory for a program's tensors, with its constants filled in.
    pub(super) fn new(program: &Program) -> Memory {
        let mut memory = Memory { spaces: vec![], places: Vec::with_capacity(program.tensors.len()) };
        let mut physical: [Option<usize>; 2] = [None, None];
        for (i, tensor) in program.tensors.iter().enumerate() {
            let owner = i as u16 + 1; // the loader allows fewer than 65535 tensors
            let place = match tensor.address {
                None => {
                    memory.spaces.push(Space::new(tensor.bytes(), tensor.buffer == Buffer::Psum));
                    Place { space: memory.spaces.len() - 1, base: 0, row_stride: tensor.row_bytes, owner }
                }
                Some((partition, byte)) => {
                    let psum = tensor.buffer == Buffer::Psum;
                    let row = if psum { program.target.psum_bytes() } else { program.target.sbuf_bytes() };
                    let space = *physical[usize::from(psum)].get_or_insert_with(|| {
                        memory.spaces.push(Space::new(PARTITIONS * row, psum));
                        memory.spaces.len() - 1
                    });
                    Place { space, base: partition * row + byte, row_stride: row, owner }
                }
            };
            memory.places.push(place);
            if let Some(data) = &tensor.data {
                memory.fill(i, data);
            }
        }
        memory
    }

    /// Sets all bytes of a tensor that has a space of its own; `data` is as long.
    pub(super) fn fill(&mut self, tensor: usize, data: &[u8]) {
        let place = self.places[tensor];
        let space = &mut self.spaces[place.space];
        space.bytes.copy_from_slice(data);
        space.owner.fill(place.owner);
    }

    /// All bytes of an HBM tensor.
    ///
    /// # Errors
    /// [`Rule::Uninitialised`] if some were never written.
    pub(super) fn bytes(&self, tensor: usize) -> Result<&[u8]> {
        let space = &self.spaces[self.places[tensor].space];
        match space.owner.iter().position(|&o| o == NOBODY) {
            None => Ok(&space.bytes),
            Some(at) => fault(Rule::Uninitialised, format!("byte {at} of {} was never written", space.bytes.len())),
        }
    }

    /// The region of an access whose first element is `offset`, with axis 0 as in its pattern.
    ///
    /// # Errors
    /// [`Rule::Bounds`] if it leaves the tensor.
    pub(super) fn region(&self, a: &Access, tensor: &Tensor, offset: usize) -> Result<Region> {
        check::reach(a, tensor, offset, false)?;
        let (stride, n) = a.dims.first().copied().unwrap_or((0, 1));
        let size = a.dtype.size();
        let place = self.places[a.tensor];
        let starts = (0..n).map(|i| {
            Some(if tensor.buffer.on_chip() {
                let row = tensor.row_bytes / size;
                place.base + (offset / row + i * (stride / row)) * place.row_stride + offset % row * size
            } else {
                place.base + (offset + i * stride) * size
            })
        });
        Ok(self.with_starts(a, starts.collect()))
    }

    /// The region of a gather: row i starts `rows[i]` elements after the access's offset, or is skipped.
    ///
    /// # Errors
    /// [`Rule::Bounds`] if a row leaves the tensor.
    pub(super) fn gathered(&self, a: &Access, tensor: &Tensor, rows: &[Option<usize>]) -> Result<Region> {
        let base = self.places[a.tensor].base;
        let mut starts = Vec::with_capacity(rows.len());
        for row in rows {
            starts.push(match row {
                None => None,
                Some(row) => {
                    let Some(offset) = a.offset.checked_add(*row) else {
                        return fault(Rule::Bounds, "a row beyond memory");
                    };
                    check::reach(a, tensor, offset, true)?;
                    Some(base + offset * a.dtype.size())
                }
            });
        }
        Ok(self.with_starts(a, starts))
    }

    fn with_starts(&self, a: &Access, starts: Vec<Option<usize>>) -> Region {
        let place = self.places[a.tensor];
        let size = a.dtype.size();
        let mut inner: Vec<(usize, usize)> = check::collapse(a.dims.get(1..).unwrap_or_default());
        inner.iter_mut().for_each(|d| d.0 *= size);
        if inner.is_empty() {
            inner.push((size, 1));
        }
        Region { space: place.space, owner: place.owner, size, starts, inner }
    }

    /// Reads bits with their definedness; skipped rows are undefined. Reading PSUM counts as evicting it.
    pub(super) fn read(&mut self, r: &Region) -> Elements {
        let space = &mut self.spaces[r.space];
        let mut out = Elements::defined(vec![0; r.count()]);
        let mut undefined = if r.skips() { vec![0xF; r.count()] } else { vec![] };
        let count = r.count();
        r.each(|number, at| {
            let mut bits = [0u8; 4];
            bits[..r.size].copy_from_slice(&space.bytes[at..at + r.size]);
            out.bits[number] = u32::from_le_bytes(bits);
            let mut mask = 0;
            for (byte, &owner) in space.owner[at..at + r.size].iter().enumerate() {
                mask |= u8::from(owner != r.owner) << byte;
            }
            if mask != 0 && undefined.is_empty() {
                undefined = vec![0; count];
            }
            if let Some(u) = undefined.get_mut(number) {
                *u = mask;
            }
        });
        out.undefined = undefined;
        if !space.psum.is_empty() {
            r.each(|_, at| {
                for state in &mut space.psum[at..at + r.size] {
                    if *state == Psum::Matmul {
                        *state = Psum::Evicted;
                    }
                }
            });
        }
        out
    }

    /// Writes elements; undefined bytes become undefined here. With `keep`, elements where it is false stay as they are.
    pub(super) fn write(&mut self, r: &Region, data: &Elements, keep: Option<&[bool]>, psum: Psum) {
        let space = &mut self.spaces[r.space];
        r.each(|number, at| {
            if keep.is_some_and(|k| !k[number]) {
                return;
            }
            space.bytes[at..at + r.size].copy_from_slice(&data.bits[number].to_le_bytes()[..r.size]);
            let undefined = data.undefined(number);
            for (byte, owner) in space.owner[at..at + r.size].iter_mut().enumerate() {
                *owner = if undefined >> byte & 1 == 0 { r.owner } else { NOBODY };
            }
            if let Some(states) = space.psum.get_mut(at..at + r.size) {
                states.fill(psum);
            }
        });
    }

    /// What each element of a PSUM region holds, without counting as a read.
    pub(super) fn psum(&self, r: &Region) -> Vec<Psum> {
        let space = &self.spaces[r.space];
        let mut out = vec![Psum::Other; r.count()];
        r.each(|number, at| {
            let mine = space.owner[at..at + r.size].iter().all(|&o| o == r.owner);
            out[number] = if mine { space.psum.get(at).copied().unwrap_or(Psum::Other) } else { Psum::Other };
        });
        out
    }

    /// Reads bits that must all be defined.
    ///
    /// # Errors
    /// [`Rule::Uninitialised`].
    pub(super) fn read_defined(&mut self, r: &Region, role: &str) -> Result<Vec<u32>> {
        let read = self.read(r);
        match read.undefined.iter().position(|&u| u != 0) {
            None => Ok(read.bits),
            Some(at) => fault(Rule::Uninitialised, format!("{role}: element {at} of {} was never written", r.count())),
        }
    }

    /// Reads values that must all be defined.
    ///
    /// # Errors
    /// [`Rule::Uninitialised`].
    pub(super) fn values(&mut self, r: &Region, dtype: Dtype, role: &str) -> Result<Vec<f32>> {
        Ok(self.read_defined(r, role)?.into_iter().map(|bits| dtype.to_f32(bits)).collect())
    }
}
