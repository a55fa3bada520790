//! The handoff through memory that two processes of one host share: the prefill node offers its pool's file ([`Offer`]), the decode node maps it for
//! reading ([`Mapping`]), and copies from it what frames name. Frames, and all that decides, stay on the gRPC stream.
//!
//! **Architecture invariants**
//! - The receiver copies; no byte of its memory can be written by a peer, and none of the peer's by it.
//! - What a peer says is checked before it is used: only sockets in the node's own private directory are spoken to, only sealed memory of the expected size is mapped.
//! - A mapping lives as long as its peer holds the socket's other end: a dead peer's memory goes back to the system.

mod copy;
mod directory;
mod mapping;
mod mappings;
mod offer;
#[cfg(test)]
mod tests;

pub(crate) use copy::MappedPool;
pub use directory::Directory;
pub use mapping::{Mapping, ShmError};
pub use mappings::Mappings;
pub use offer::{Offer, OfferError};
