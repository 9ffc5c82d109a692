#![doc = include_str!("../README.md")]
//!
//! # Modules
//!
//! Dependencies point one way: [`num`] and [`quant`] say what numbers and matrices are; [`matmul`], [`attention`] (over
//! [`kv`]) and [`layer`] compute on them; [`cpu`] is the machine and [`trainium`] the device on paper. Operations are methods of [`Cpu`] or take one;
//! [`backend`] puts them behind one trait, for runtimes that also run elsewhere.
#![deny(unsafe_code)]

pub mod attention;
pub mod backend;
#[cfg(feature = "checkpoint")]
pub mod checkpoint;
pub mod cpu;
mod error;
pub mod kv;
pub mod layer;
pub mod matmul;
#[cfg(feature = "neuron")]
pub mod neuron;
pub mod num;
pub mod quant;
pub mod trainium;
mod view;

pub use cpu::{Cpu, Isa, Parallelism, Workspace};
pub use error::{Error, Name, Result};
pub use view::{HeadsMut, HeadsRef, MatMut, MatRef};
