//! gRPC servers and connections with the limits that all of ours have.

use tonic::transport::{ClientTlsConfig, Endpoint, Server};

use crate::{Tls, limits, tls::Clients};

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

/// The server over TLS, where there is `tls`; what it was told of windows and frames holds there, too.
pub fn secure(server: Server, tls: Option<&Tls>, clients: Clients) -> Result<Server, tonic::transport::Error> {
    match tls {
        Some(tls) => server.tls_config(tls.server(clients)),
        None => Ok(server),
    }
}

/// A peer's address that is none, or not one for this process.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AddressError {
    /// Not an address.
    #[error("{address:?} is not a gRPC address: write {scheme}://HOST:PORT")]
    Malformed {
        /// As given.
        address: String,
        /// "https" where there is TLS.
        scheme: &'static str,
    },
    /// `https://`, and nothing is known of whom to believe.
    #[error(
        "{address:?} is reached over TLS: pass --tls-ca FILE, with the certificate of the authority that has signed its own"
    )]
    TlsMissing {
        /// As given.
        address: String,
    },
    /// `http://` where everything is TLS.
    #[error("{address:?} would be reached without TLS: write https://")]
    NotTls {
        /// As given.
        address: String,
    },
    /// The TLS settings were refused.
    #[error("{address:?} cannot be reached over TLS: {problem}")]
    Tls {
        /// As given.
        address: String,
        /// Why.
        problem: String,
    },
}

/// An endpoint with connect timeout, keepalive and windows set. `address` is `host:port`, or that after `http://`, or `https://` where there is `tls`.
pub fn endpoint(address: &str, tls: Option<&ClientTlsConfig>) -> Result<Endpoint, AddressError> {
    let scheme = if tls.is_some() { "https" } else { "http" };
    let owned = || address.to_owned();
    let malformed = || AddressError::Malformed {
        address: owned(),
        scheme,
    };
    let uri = if address.contains("://") {
        owned()
    } else {
        format!("{scheme}://{address}")
    };
    let endpoint = Endpoint::from_shared(uri).map_err(|_| malformed())?;
    if endpoint.uri().port().is_none() {
        return Err(malformed());
    }
    let endpoint = match (endpoint.uri().scheme_str(), tls) {
        (Some("http"), None) => endpoint,
        (Some("https"), Some(tls)) => endpoint.tls_config(tls.clone()).map_err(|error| AddressError::Tls {
            address: owned(),
            problem: error.to_string(),
        })?,
        (Some("https"), None) => return Err(AddressError::TlsMissing { address: owned() }),
        (Some("http"), Some(_)) => return Err(AddressError::NotTls { address: owned() }),
        _ => return Err(malformed()),
    };
    Ok(endpoint
        .tcp_nodelay(true)
        .connect_timeout(limits::CONNECT_TIMEOUT)
        .initial_stream_window_size(limits::GRPC_STREAM_WINDOW_BYTES)
        .initial_connection_window_size(limits::GRPC_CONNECTION_WINDOW_BYTES)
        .http2_keep_alive_interval(limits::KEEPALIVE_INTERVAL)
        .keep_alive_timeout(limits::KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (address, plain, tls) in [
            ("http://127.0.0.1:7070", true, false),
            ("127.0.0.1:7070", true, true),
            ("router.baton.svc:7070", true, true),
            ("https://127.0.0.1:7070", false, true),
            ("127.0.0.1", false, false),
            ("", false, false),
            ("http://", false, false),
        ] {
            assert_eq!(endpoint(address, None).is_ok(), plain, "{address}");
            assert_eq!(
                endpoint(address, Some(&ClientTlsConfig::new())).is_ok(),
                tls,
                "{address}"
            );
        }
    }
}
