//! Calls on tensor sets.

use super::{Inner, lock};
use crate::neuron::error::{NeuronError, Result};
use crate::neuron::storage::Ranges;
use crate::neuron::{Tensor, sys};
use std::ffi::{CStr, CString};
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::Arc;

/// A set of named tensors. It keeps its members alive until it is destroyed.
#[derive(Debug)]
pub(in crate::neuron) struct SetHandle {
    pub(super) runtime: Arc<Inner>,
    pub(super) pointer: NonNull<sys::TensorSet>,
    /// By ascending name. Dropped after the set is destroyed, as fields are dropped after `drop`.
    members: Vec<(CString, Arc<Tensor>)>,
    /// Tensors of failed insertions: the library may or may not have taken them.
    strays: Vec<Arc<Tensor>>,
}

// SAFETY: a set belongs to the process and not to a thread. It is destroyed by the drop of its only owner. (It is not `Sync`:
// nothing is promised for two threads on one set.)
unsafe impl Send for SetHandle {}

impl SetHandle {
    pub(in crate::neuron) fn new(runtime: &Arc<Inner>) -> Result<Self> {
        runtime.enter()?;
        let _alone = lock(&runtime.manage);
        let mut pointer = ptr::null_mut();
        // SAFETY: the library is initialised (`enter`, and `runtime` keeps it so); the out-pointer is a variable of our own.
        let status = unsafe { (runtime.api().nrt_allocate_tensor_set)(&mut pointer) };
        runtime.check("nrt_allocate_tensor_set", status)?;
        let pointer = Inner::given("nrt_allocate_tensor_set", pointer)?;
        Ok(SetHandle { runtime: Arc::clone(runtime), pointer, members: Vec::new(), strays: Vec::new() })
    }

    pub(in crate::neuron) fn runtime(&self) -> &Arc<Inner> {
        &self.runtime
    }

    /// By ascending name.
    pub(in crate::neuron) fn members(&self) -> &[(CString, Arc<Tensor>)] {
        &self.members
    }

    fn position(&self, name: &CStr) -> Result<usize, usize> {
        self.members.binary_search_by(|(n, _)| n.as_c_str().cmp(name))
    }

    /// Adds a tensor, or puts it in the place of the one with its name. After an error the set has none of that name.
    pub(in crate::neuron) fn insert(&mut self, name: CString, tensor: Arc<Tensor>) -> Result<()> {
        if !Arc::ptr_eq(tensor.handle.runtime(), &self.runtime) {
            return Err(NeuronError::OtherRuntime { tensor: tensor.name().into() });
        }
        self.runtime.enter()?;
        // SAFETY: the set exists and is ours alone (`&mut`); the name ends with a NUL and is copied; the tensor is alive and,
        // whatever the answer, stays so until the set is destroyed or has another in its place, as one of the fields holds it.
        let status = unsafe {
            (self.runtime.api().nrt_add_tensor_to_tensor_set)(
                self.pointer.as_ptr(),
                name.as_ptr(),
                tensor.handle.pointer().as_ptr(),
            )
        };
        let added = self.runtime.check("nrt_add_tensor_to_tensor_set", status);
        match (self.position(&name), &added) {
            (Ok(at), Ok(())) => self.members[at].1 = tensor,
            (Err(at), Ok(())) => self.members.insert(at, (name, tensor)),
            (Ok(at), Err(_)) => self.strays.extend([self.members.remove(at).1, tensor]),
            (Err(_), Err(_)) => self.strays.push(tensor),
        }
        added
    }

    /// The tensor of that name, if this set and the library's agree that there is one.
    pub(in crate::neuron) fn get(&self, name: &CStr) -> Result<Option<&Arc<Tensor>>> {
        self.runtime.enter()?;
        let mut pointer = ptr::null_mut();
        // SAFETY: the set exists and no other thread uses it (not `Sync`); the name ends with a NUL; the out-pointer is a
        // variable of our own. What it is set to is compared, never used.
        let status = unsafe {
            (self.runtime.api().nrt_get_tensor_from_tensor_set)(self.pointer.as_ptr(), name.as_ptr(), &mut pointer)
        };
        let op = "nrt_get_tensor_from_tensor_set";
        let ours = self.position(name).ok().map(|at| &self.members[at].1);
        match (self.runtime.check(op, status), ours) {
            (Ok(()), Some(tensor)) if tensor.handle.pointer().as_ptr() == pointer => Ok(Some(tensor)),
            (Ok(()), _) => Err(NeuronError::Answer { op, problem: format!("{name:?} is another tensor") }),
            (Err(_), None) => Ok(None), // a miss is a plain failure
            (Err(e), Some(_)) => Err(e),
        }
    }

    /// Changes what is known of the bytes that an execution writes: all of every member.
    pub(super) fn each_written(&mut self, change: fn(&mut Ranges, Range<usize>)) {
        for (_, tensor) in &self.members {
            tensor.handle.change(change);
        }
    }
}

impl Drop for SetHandle {
    fn drop(&mut self) {
        if self.runtime.enter().is_err() {
            return;
        }
        let _alone = lock(&self.runtime.manage);
        let mut pointer = self.pointer.as_ptr();
        // SAFETY: allocated by the library, owned by this value alone, destroyed here once, before its members are dropped.
        unsafe { (self.runtime.api().nrt_destroy_tensor_set)(&mut pointer) };
    }
}
