//! Model files → logits → token ids.
//!
//! [`Engine`] is what a node drives: it runs one [`StepPlan`] at a time on its own memory. `cpu` computes; `simulated` takes as long as a
//! cost model says and derives its tokens from all KV bytes before them, so that any corruption changes the answer.
//!
//! The decoder is one piece of code over [`ops::Ops`], about a dozen fused operations on a planned arena; a backend implements those.
//!
//! Deliberately absent: text, networking, scheduling policy.

pub mod cpu;
pub mod ops;

mod engine;

pub use engine::{Engine, ModelSpec, StepError};
