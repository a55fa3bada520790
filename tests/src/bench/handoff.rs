//! The handoff between two processes of this machine, and what it is measured against.
//!
//! The benchmark's binary starts itself again as each end ([`end`]): `receive` and `push` go the product's way, the others are peers.

pub mod aes;
pub mod copy;
pub mod end;
pub mod first_token;
pub mod libraries;
pub mod limits;
pub mod ours;
pub mod payload;
pub mod peers;
pub mod plain_grpc;
pub mod pushing;
pub mod raw_tcp;
pub mod receiving;
pub mod runs;

/// Which end the benchmark's binary is to be.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub enum Role {
    /// A decode node's end.
    Receive(ours::Setup),
    /// A prefill node's end.
    Push(ours::Setup),
    /// Takes bytes from sockets.
    TcpSink,
    /// Sends bytes through so many sockets.
    TcpSource(usize),
    /// A gRPC service as tonic comes.
    GrpcSink,
    /// Its client.
    GrpcSource,
}

/// Is one end until nobody asks any more. For the benchmark's binary, when it was started as one.
pub fn play() -> anyhow::Result<()> {
    match end::read()?.ok_or_else(|| anyhow::anyhow!("no role was given"))? {
        Role::Receive(setup) => receiving::play(setup),
        Role::Push(setup) => pushing::play(setup),
        Role::TcpSink => raw_tcp::sink(),
        Role::TcpSource(streams) => raw_tcp::source(streams),
        Role::GrpcSink => plain_grpc::sink(),
        Role::GrpcSource => plain_grpc::source(),
    }
}
