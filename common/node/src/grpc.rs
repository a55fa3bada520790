//! gRPC servers and connections with the limits that all of ours have.

use tonic::transport::{Channel, Endpoint, Server};

use crate::limits;

/// A server builder with windows, keepalive and stream bounds set. Services still set their own message size with
/// `max_decoding_message_size(limits::GRPC_MESSAGE_BYTES)` and `max_encoding_message_size(…)`.
pub fn server() -> Server {
    Server::builder()
        .tcp_nodelay(true)
        .max_concurrent_streams(limits::GRPC_STREAMS)
        .initial_stream_window_size(limits::GRPC_STREAM_WINDOW_BYTES)
        .initial_connection_window_size(limits::GRPC_CONNECTION_WINDOW_BYTES)
        .http2_keepalive_interval(Some(limits::KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(limits::KEEPALIVE_TIMEOUT))
        .http2_max_header_list_size(limits::GRPC_HEADER_BYTES)
}

/// A peer's address that is none.
#[derive(Debug, thiserror::Error)]
#[error("{address:?} is not a gRPC address: write http://HOST:PORT")]
pub struct AddressError {
    address: String,
}

/// An endpoint with connect timeout, keepalive and windows set. `address` is `http://host:port` or `host:port`.
pub fn endpoint(address: &str) -> Result<Endpoint, AddressError> {
    let error = || AddressError {
        address: address.to_owned(),
    };
    let uri = if address.contains("://") {
        address.to_owned()
    } else {
        format!("http://{address}")
    };
    let endpoint = Endpoint::from_shared(uri).map_err(|_| error())?;
    if endpoint.uri().scheme_str() != Some("http") || endpoint.uri().port().is_none() {
        return Err(error());
    }
    Ok(endpoint
        .tcp_nodelay(true)
        .connect_timeout(limits::CONNECT_TIMEOUT)
        .initial_stream_window_size(limits::GRPC_STREAM_WINDOW_BYTES)
        .initial_connection_window_size(limits::GRPC_CONNECTION_WINDOW_BYTES)
        .http2_keep_alive_interval(limits::KEEPALIVE_INTERVAL)
        .keep_alive_timeout(limits::KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true))
}

/// A channel that connects on first use, and again after its connection broke.
pub fn connect_lazy(address: &str) -> Result<Channel, AddressError> {
    Ok(endpoint(address)?.connect_lazy())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (address, good) in [
            ("http://127.0.0.1:7070", true),
            ("127.0.0.1:7070", true),
            ("router.baton.svc:7070", true),
            ("https://127.0.0.1:7070", false),
            ("127.0.0.1", false),
            ("", false),
            ("http://", false),
        ] {
            assert_eq!(endpoint(address).is_ok(), good, "{address}");
        }
    }
}
