//! A bounded number of connections.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::{Stream, StreamExt};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tonic::transport::server::{Connected, TcpConnectInfo, TcpIncoming};

/// A connection that counts until it is dropped.
pub(crate) struct Connection {
    stream: TcpStream,
    _permit: OwnedSemaphorePermit,
}

/// At most `limit` connections at a time; more are closed as they come.
pub(crate) fn bounded(incoming: TcpIncoming, limit: usize) -> impl Stream<Item = io::Result<Connection>> {
    let permits = Arc::new(Semaphore::new(limit));
    incoming.filter_map(move |accepted| {
        let connection = match accepted {
            Ok(stream) => match permits.clone().try_acquire_owned() {
                Ok(permit) => Some(Ok(Connection {
                    stream,
                    _permit: permit,
                })),
                Err(_) => {
                    tracing::warn!(limit, "a gRPC connection was closed: there are too many");
                    None
                }
            },
            Err(error) => Some(Err(error)),
        };
        std::future::ready(connection)
    })
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{io::AsyncReadExt, net::TcpListener, time::timeout};

    use super::*;

    #[tokio::test]
    async fn one_too_many_is_closed() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let mut incoming = std::pin::pin!(bounded(TcpIncoming::from(listener), 1));
        let mut next = async || {
            let next = timeout(Duration::from_secs(20), incoming.next()).await;
            next.expect("a connection").expect("open").expect("accepted")
        };
        let _first = TcpStream::connect(address).await.expect("it listens");
        let held = next().await;
        let mut second = TcpStream::connect(address).await.expect("it listens");
        let third = async {
            let mut rest = Vec::new();
            assert_eq!(second.read_to_end(&mut rest).await.expect("closed"), 0);
            drop(held);
            TcpStream::connect(address).await.expect("it listens")
        };
        let (_third, _held) = tokio::join!(third, next());
    }
}
