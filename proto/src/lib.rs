//! The wire contracts and their generated code, nothing else.
//!
//! [`v1`] is public (clients); [`node::v1`] is between routers and nodes.

#![allow(missing_docs, unreachable_pub, clippy::all)]

/// The public generation API.
pub mod v1 {
    tonic::include_proto!("baton.v1");
}

/// Between routers and nodes.
pub mod node {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("baton.node.v1");
    }
}

/// The oldest version of the handoff that this build speaks. In version 1 each frame carries layers of one block.
pub const PROTOCOL_MIN: u32 = 1;

/// The newest version of the handoff that this build speaks: `Pieces`, `Introduce`, shared memory.
pub const PROTOCOL_MAX: u32 = 2;

/// Descriptors of every service, for reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("baton");
