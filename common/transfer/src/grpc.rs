//! The handoff over gRPC: one bidirectional stream per push (`baton.node.v1.Handoff`).

mod feed;
mod fences;
mod incoming;
mod introduce;
mod messages;
mod outgoing;
mod peers;
mod pools;
mod port;
mod probe;
mod pusher;
mod read_ahead;
mod reading;
mod service;
#[cfg(test)]
mod tests;

pub use feed::{Hold, PushFeed, PushInput, push_feed};
pub use fences::Fences;
pub use peers::{PathConfig, PathEvent, PathObserver};
pub use port::ReceiverPort;
pub use pusher::{PushError, PushJob, PushReport, Pusher, PusherConfig};
pub use service::{HandoffServer, HandoffService};

use std::time::Duration;

use tonic::transport::{Endpoint, Server};

use crate::limits;

/// Where pushes are called.
const PUSH_PATH: &str = "/baton.node.v1.Handoff/Push";

/// HTTP/2 settings of a server that serves handoffs: windows and frame size of [`limits`].
pub fn configure_server<L>(server: Server<L>) -> Server<L> {
    server
        .initial_stream_window_size(limits::STREAM_WINDOW_BYTES)
        .initial_connection_window_size(limits::CONNECTION_WINDOW_BYTES)
        .max_frame_size(limits::HTTP_FRAME_BYTES)
        .tcp_nodelay(true)
}

/// HTTP/2 settings of a connection that pushes.
pub fn configure_endpoint(endpoint: Endpoint) -> Endpoint {
    endpoint
        .connect_timeout(Duration::from_millis(limits::CONNECT_MS))
        .http2_keep_alive_interval(Duration::from_millis(limits::KEEPALIVE_MS))
        .keep_alive_timeout(Duration::from_millis(limits::KEEPALIVE_MS))
        .tcp_nodelay(true)
}
