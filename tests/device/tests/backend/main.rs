//! Compiled kernels and the Neuron backend, end to end: pack, write, execute on the emulated library, read, compare with the
//! emulator's bits, the CPU kernels and the oracle. Programs: `tests/data/device-programs`, as a folder of NEFFs.
#![forbid(unsafe_code)]

#[path = "../../../support/conformance.rs"]
mod conformance;
#[path = "../../../support/random.rs"]
mod random;

mod bits;
mod buckets;
mod conforms;
mod faults;
mod fp8;
mod residency;

use device_tests::{Session, registry};
use std::sync::Arc;
use tempfile::TempDir;
use trn_kernels::backend::{ActivationTerms, NeuronBackend, NeuronOptions};
use trn_kernels::neuron::kernels::{DeviceKernels, KernelSet};
use trn_kernels::quant::Scheme;

/// Compiled kernels on core 0 of an emulated device.
struct Device {
    kernels: Arc<DeviceKernels>,
    session: Session,
    _folder: TempDir,
}

impl Device {
    /// The kernels for these tests.
    fn new() -> Device {
        Device::of("device-programs")
    }

    /// A set of `tests/data`.
    fn of(set: &str) -> Device {
        let (session, folder) = (Session::open(), registry::neffs(set));
        let kernels = KernelSet::open(folder.path()).unwrap().on(&session.runtime, 0);
        Device { kernels, session, _folder: folder }
    }

    /// A backend whose FP8 matmuls get activations of `fp8`.
    fn backend(&self, terms: ActivationTerms, fp8: Option<Scheme>) -> NeuronBackend<'static> {
        NeuronBackend::new(&self.kernels, NeuronOptions { terms, fp8_activations: fp8, ..NeuronOptions::default() })
    }

    /// As [`Session::end`], once the kernels are gone.
    fn end(self) {
        let Device { kernels, session, _folder } = self;
        assert_eq!(Arc::strong_count(&kernels), 1, "a kernel or backend is left");
        drop(kernels);
        session.end();
    }
}
