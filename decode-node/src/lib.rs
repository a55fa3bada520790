//! The decode node: receives the KV of prompts computed elsewhere, and answers token by token.
//!
//! One leg per `Decode.Open` stream: reserve → ticket → (renew) → verified → tokens → ended; or run → admitted → tokens → ended. The same port
//! serves `Handoff`, over which prefill nodes push.
//!
//! **Architecture invariants**
//! - A leg is one future. Dropping it (the router closed the stream, the deadline passed, the node stops) gives reservation, sequence and blocks back.
//! - No token leaves before the KV that it was drawn from is verified.
//! - A lease ends by itself: nothing needs the router, or the prefill node, to be alive.
//!
//! Deliberately absent: placement, text, stop strings.

mod args;
mod leg;
mod service;

pub use args::{DecodeArgs, DecodeConfig};
pub use service::run;

pub use baton_worker::{Listeners, NodeError};
