//! The router: admits requests, places them on nodes, and brings each to one end.
//!
//! **Architecture invariants**
//! - Text, templates and stop strings live here; nodes know token ids only.
//! - [`core`] is pure: no I/O, no clock, no task, no randomness.
//! - It never touches KV bytes, and never depends on the engine: it learns the KV identity from the nodes.

mod choices;
mod cluster;
mod config;
pub mod core;
mod error;
mod front;
mod grpc;
mod intake;
mod life;
mod limits;
mod metrics;
mod nodes;
mod openai;
mod registry;
mod request;
mod sampling;
mod server;
mod text;
mod trace;

pub use config::{ArgsError, RouterArgs, RouterConfig};
pub use error::{ErrorKind, Field, GenerateError};
pub use front::Front;
pub use request::{
    AnswerEvent, AnswerStream, ChatMessage, Delta, FinishReason, Finished, GenerateRequest, Input, Matched, Model,
    SamplingRequest, Served, Started, Tenant, Timings, Usage,
};
pub use server::{Listeners, RouterError, run};
pub use trace::request_span;

#[cfg(test)]
mod tests;
