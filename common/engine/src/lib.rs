//! Model files → logits → token ids.
//!
//! [`open`] gives an [`Engine`], which a node drives: it runs one [`StepPlan`](baton_scheduler::StepPlan) at a time on its own memory. [`cpu`] computes;
//! [`simulated`] takes as long as a cost model says and derives its tokens from all KV bytes before them, so that any corruption changes the answer.
//!
//! The decoder ([`decoder`]) is one piece of code over [`ops::Ops`], about a dozen fused operations on a planned arena; a backend implements
//! those. [`naive`] is the oracle of the whole: no KV, everything recomputed at every step.
//!
//! Deliberately absent: text, networking, scheduling policy.

mod available;
mod checkpoint;
mod config;
pub mod cpu;
pub mod cuda;
pub mod decoder;
mod engine;
mod identity;
mod info;
mod llama;
pub mod naive;
mod open;
pub mod ops;
mod panel_cache;
mod parallel;
mod plan_check;
mod progress;
pub mod sampler;
pub mod simulated;

pub use config::{Architecture, ConfigError, ModelConfig};
pub use cpu::Isa;
pub use engine::{Engine, LayerWatch, ModelSpec, StepError};
pub use identity::{BF16_CLASS, NUMERICS_CLASS};
pub use info::ModelSummary;
pub use llama::LlamaEngine;
pub use open::{BLOCK_TOKENS, EngineOptions, OpenError, Source, open, open_file};
pub use progress::{LoadProgress, LoadStage};
pub use simulated::SimulatedConfig;
