//! The CPU backend: quantised weights in interleaved panels, int8 activations, bf16 KV, a team of threads.
//!
//! **Architecture invariants**
//! - Bit-equal on every [`Isa`], for any thread count, batch and chunk: everything is defined on 16 virtual lanes with explicit fma and
//!   fixed orders of addition; exp, sin and cos are our own. The portable code is the oracle of the others.
//! - A row's result never depends on other rows: one panel format and one order for 1 row and for many, no split along k, one attention
//!   routine for prefill and decode.
//! - A plan's indices are checked once per step, before any kernel sees them.
//! - No allocation within a step.
//!
//! Deliberately absent: what a decoder is, sampling rules, scheduling.
//!
//! Source of the panel format and of the kernels' order: own measurements; the block formats are GGML's.

mod activations;
mod alloc;
mod arena;
mod attend;
mod attention;
mod backend;
mod builder;
mod draw;
mod isa;
mod linear;
pub(crate) mod math;
mod memory;
mod ops;
mod plan;
mod rows;
mod team;
mod weight;

pub(crate) use attention::PARTIAL_BYTES;

pub use alloc::OutOfMemory;
pub use backend::CpuBackend;
pub use builder::{CpuBackendBuilder, CpuConfig, LoadError};
pub use isa::{Isa, UnsupportedIsa};
pub use memory::CpuKvMemory;
pub use ops::CpuOps;
pub(crate) use weight::Loading;

#[cfg(test)]
mod testing;
