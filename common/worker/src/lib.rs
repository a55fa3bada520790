//! What prefill and decode nodes share: the engine's thread, the pool and the scheduler it runs from, and what routers are told.
//!
//! ```text
//!  role (async) ── submit, reserve, renew ──▶ ┌ one lock ────────────────┐ ◀── plan, complete ── engine thread
//!       ▲                                     │ Pool, Scheduler, Receiver │                          │ step (no lock)
//!       └────── SequenceStream (bounded) ◀─── └──────────────────────────┘ ◀── locked ── HandoffService
//! ```
//!
//! **Architecture invariants**
//! - The lock is never held across an await or an engine step, and no KV bytes are copied under it.
//! - Guards ([`SequenceStream`], [`HeldBlocks`]) only post what they give up; the owner of a block is a field of the pool's table.
//! - A reader that is gone or too slow loses its own sequence, and nobody else's.
//! - An idle node uses no CPU: the engine's thread sleeps, and the timekeeper too.
//! - Every stream ends: with `Finished`, or with a typed [`SequenceError`], whatever becomes of the engine.
//!
//! Deliberately absent: what a role does with a sequence, text, placement.

const _: () = assert!(baton_kv::CHECKED, "a node checks what it takes in");

mod announce;
mod args;
mod core;
mod engine_thread;
mod error;
mod kv_subscription;
mod last_chunks;
mod limits;
mod load;
mod mailbox;
mod metrics;
mod node;
mod prepare;
mod respond;
mod shared;
mod stream;
#[cfg(test)]
mod testing;
mod work;
mod worker;

pub use announce::{AnnounceConfig, announce};
pub use args::{ArgsError, NodeArgs, NodeConfig};
pub use error::SequenceError;
pub use kv_subscription::{KvChange, KvSubscription};
pub use load::Load;
pub use metrics::WorkerMetrics;
pub use node::{Listeners, Node, NodeError};
pub use respond::{Events, Respond, Responses};
pub use shared::Shared;
pub use stream::{HeldBlocks, SequenceStream, SequenceTimings, Update};
pub use work::Work;
pub use worker::{NodeFacts, Worker, WorkerConfig};
