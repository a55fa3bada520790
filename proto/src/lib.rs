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

/// The protocol version of the handoff that this build speaks.
pub const PROTOCOL_VERSION: u32 = 1;

/// Descriptors of every service, for reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("baton");
