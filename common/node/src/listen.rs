//! Listening sockets.

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    str::FromStr,
};

use tokio::net::TcpListener;

/// Where to listen: `127.0.0.1:7070`, `[::1]:7070`, `localhost:7070`, or `:7070` (loopback). Port 0 takes any free port.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ListenAddress(pub SocketAddr);

/// Why an address is none.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} is not an address to listen on: write IP:PORT, as in 127.0.0.1:7070")]
pub struct ListenAddressError(String);

impl FromStr for ListenAddress {
    type Err = ListenAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ListenAddressError(text.to_owned());
        if let Some(port) = text.strip_prefix("localhost:").or_else(|| text.strip_prefix(':')) {
            let port = port.parse().map_err(|_| error())?;
            return Ok(Self(SocketAddr::from((Ipv4Addr::LOCALHOST, port))));
        }
        text.parse().map(Self).map_err(|_| error())
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl From<ListenAddress> for SocketAddr {
    fn from(address: ListenAddress) -> Self {
        address.0
    }
}

/// Why a process cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process has the port.
    #[error(
        "{address} is already in use: stop the process that listens there, or pass {flag} with another port (0 takes a free one)"
    )]
    InUse {
        /// The address asked for.
        address: SocketAddr,
        /// The flag that sets it.
        flag: &'static str,
    },
    /// Ports below 1024 and the like.
    #[error("not permitted to listen on {address}: pass {flag} with a port of 1024 or more")]
    NotPermitted {
        /// The address asked for.
        address: SocketAddr,
        /// The flag that sets it.
        flag: &'static str,
    },
    /// This machine has no such address.
    #[error("{address} is not an address of this machine: pass {flag} with one that is, or with 0.0.0.0 for all")]
    NotHere {
        /// The address asked for.
        address: SocketAddr,
        /// The flag that sets it.
        flag: &'static str,
    },
    /// Anything else.
    #[error("cannot listen on {address} ({flag}): {source}")]
    Other {
        /// The address asked for.
        address: SocketAddr,
        /// The flag that sets it.
        flag: &'static str,
        /// What the system says.
        source: io::Error,
    },
}

/// Listens on `address`, which `flag` (e.g. `"--grpc"`) has set. Warns when others than this machine can connect, since nothing is encrypted or authenticated yet.
pub async fn bind(address: impl Into<SocketAddr>, flag: &'static str) -> Result<TcpListener, ListenError> {
    let address = address.into();
    let listener = TcpListener::bind(address).await.map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => ListenError::InUse { address, flag },
        io::ErrorKind::PermissionDenied => ListenError::NotPermitted { address, flag },
        io::ErrorKind::AddrNotAvailable => ListenError::NotHere { address, flag },
        _ => ListenError::Other { address, flag, source },
    })?;
    if !is_loopback(address.ip()) {
        tracing::warn!(%address, flag, "open to other machines, without encryption or authentication: use it on trusted networks only");
    }
    Ok(listener)
}

fn is_loopback(ip: IpAddr) -> bool {
    ip.to_canonical().is_loopback()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_addresses() {
        for (text, expected) in [
            ("127.0.0.1:7070", Some("127.0.0.1:7070")),
            ("localhost:7070", Some("127.0.0.1:7070")),
            (":0", Some("127.0.0.1:0")),
            ("[::1]:80", Some("[::1]:80")),
            ("0.0.0.0:8080", Some("0.0.0.0:8080")),
            ("7070", None),
            ("localhost", None),
            ("127.0.0.1:70700", None),
            ("http://127.0.0.1:7070", None),
        ] {
            assert_eq!(
                text.parse::<ListenAddress>()
                    .ok()
                    .map(|address| address.to_string())
                    .as_deref(),
                expected,
                "{text}"
            );
        }
    }

    #[tokio::test]
    async fn a_port_in_use_names_the_flag() {
        let first = bind(SocketAddr::from(([127, 0, 0, 1], 0)), "--grpc")
            .await
            .expect("a free port");
        let address = first.local_addr().expect("bound");
        let error = bind(address, "--grpc").await.expect_err("the port is taken");
        assert!(matches!(error, ListenError::InUse { .. }), "{error:?}");
        let message = error.to_string();
        assert!(
            message.contains(&address.to_string()) && message.contains("already in use") && message.contains("--grpc"),
            "{message}"
        );
    }

    #[tokio::test]
    async fn a_foreign_address_is_told_apart() {
        // TEST-NET-1: never an address of this machine.
        let error = bind(SocketAddr::from(([192, 0, 2, 1], 0)), "--http")
            .await
            .expect_err("not ours");
        assert!(matches!(error, ListenError::NotHere { .. }), "{error:?}");
    }
}
