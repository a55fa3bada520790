//! The handoff: how the KV of a prompt gets from the prefill node that computed it to the decode node that invited it.
//!
//! ```text
//! decode node:  Reserved ─▶ Filling ─▶ Verified ─▶ Decoding ─▶ Released
//!                   └─────────┴──────────┴─▶ Aborting ─▶ Drained ─▶ Released
//! ```
//!
//! [`Receiver`] (decode node) and [`Sender`] (prefill node) are pure: no I/O, no clock, no task, no randomness. [`grpc`] carries their
//! frames over one gRPC stream per push. Before the first one the two nodes meet: [`Terms`] say whether they fit, and [`path`] which way is the fastest.
//!
//! **Architecture invariants**
//! - A peer writes only where it was just invited: into a slot of a live ticket, in the slot's generation, on the one open stream.
//! - A granted block leaves through verification (`Pool::accept`) or through `Pool::drained`, and nowhere else.
//! - A late, stale, duplicated, reordered, foreign or forged frame changes nothing.
//! - Every state has a deadline, which [`Receiver::tick`] enforces and [`Receiver::next_deadline`] names.
//! - No lock is held across an await; bytes are copied and summed outside of the lock, under a permit that keeps their block from being reused.
//!
//! When prefill and decode are the same node, nothing travels and nothing here is used: the decode node runs the prompt itself, and the
//! blocks already belong to the sequence.
//!
//! Deliberately absent: resuming a broken stream (the handoff aborts; a new attempt gets fresh slots and keeps what the pool has named),
//! encryption (the channel's), and a keyed MAC (checksums catch accidents, not attackers).

mod capability;
mod chain;
pub mod grpc;
pub mod limits;
pub mod path;
mod receiver;
mod reject;
mod sender;
pub mod shm;
#[cfg(test)]
mod simulation;
mod source;
mod terms;
#[cfg(test)]
mod testing;
mod ticket;
mod wire;

pub use capability::Capability;
pub use chain::Chain;
pub use receiver::{
    AbortReason, HandoffState, PieceWrite, PiecesHeader, Receiver, ReceiverAction, ReceiverConfig, Reserve,
    ReserveError, RunHeader, StreamId, Verdict, WritePermit,
};
pub use reject::Reject;
pub use sender::{PushFailure, RunToSend, Sender, SenderAction, SenderConfig, SenderState};
pub use source::{FrameBytes, PieceSource};
pub use terms::{INTRODUCED_SINCE, Terms};
pub use ticket::{Claims, Ticket, Transport};
pub use wire::{
    FinalClaims, FirstToken, ManifestEntry, WireError, alternatives_to_proto, layout_from_proto, layout_to_proto,
};
