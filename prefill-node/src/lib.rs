//! The prefill node: runs prompts, and pushes their KV to the decode node that invited it.
//!
//! One leg per `Prefill.Run` stream: check → queue → chunks, each pushed as it is computed (the last layer by layer) → FINAL with the first token → the
//! decode node's verdict → blocks given back.
//!
//! **Architecture invariants**
//! - A leg is one future. Dropping it (the router closed the stream, the deadline passed, the node stops) cancels the sequence, aborts the push, and
//!   gives every block back.
//! - Every wait in it has a deadline: the request's, and those of the push.
//! - Blocks stay held until the push has read them for the last time.
//!
//! Deliberately absent: placement, text, decoding beyond the first token.

mod args;
mod leg;
mod push_status;
mod service;

pub use args::{PrefillArgs, PrefillArgsError, PrefillConfig, SlowPathAction};
pub use service::run;

pub use baton_worker::{Listeners, NodeError};
