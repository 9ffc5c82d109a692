//! A `libnrt.so.1` for tests: the C ABI of the AWS Neuron runtime, executing exported device programs on the emulator.
//!
//! It is a client's examiner. Every call's order and every handle's lifetime is checked; what the documents forbid is recorded
//! as a *violation* and answered with an error status, never with undefined behaviour. Any status can be injected at any
//! call. Versions and their known bugs, several cores and slow execution are modelled. The control calls (`emunrt_*`) and
//! environment variables are in this folder's README.
//!
//! It is deliberately an independent reading of the ABI and of the NEFF container: it shares no type, constant or parser with
//! `trn_kernels::neuron`, so that one mistake cannot stand on both sides. Shared is the emulator, which computes.
#![deny(unsafe_code)]

mod abi;
#[allow(unsafe_code)]
mod caller;
mod calls;
mod container;
mod dtype;
mod entry;
mod execute;
#[allow(unsafe_code)]
mod exports;
mod handle;
mod info;
mod model;
mod settings;
mod storage;
mod world;
