//! The HTTP listener: a bounded number of connections, each with a deadline for its headers.

use std::{sync::Arc, time::Duration};

use axum::Router;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::limits;

/// After a failed accept (no file descriptor is left): connections that end meanwhile give some back.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves `routes` until `stop`; the connections' tasks have ended when it returns. Not a graceful shutdown, which would wait for idle connections.
pub(crate) async fn serve(listener: TcpListener, routes: Router, read_bound: Duration, stop: CancellationToken) {
    let connections = TaskTracker::new();
    let permits = Arc::new(Semaphore::new(limits::HTTP_CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = async {
                let permit = permits.clone().acquire_owned().await;
                (permit, listener.accept().await)
            } => accepted,
        };
        let (permit, socket) = match accepted {
            (permit, Ok((socket, _))) => (permit, socket),
            (_, Err(error)) => {
                tracing::warn!(%error, "an HTTP connection was not accepted");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (routes, stop) = (routes.clone(), stop.clone());
        connections.spawn(async move {
            let _permit = permit;
            tokio::select! {
                () = connection(socket, routes, read_bound) => {}
                () = async { stop.cancelled().await; sleep(limits::HTTP_LAST_WORD).await } => {}
            }
        });
    }
    connections.close();
    // Each ends by itself by then.
    let _ = timeout(2 * limits::HTTP_LAST_WORD, connections.wait()).await;
}

async fn connection(socket: TcpStream, routes: Router, read_bound: Duration) {
    let _ = socket.set_nodelay(true);
    let mut builder = auto::Builder::new(TokioExecutor::new()).http1_only();
    builder.http1().timer(TokioTimer::new()).header_read_timeout(read_bound);
    let served = builder.serve_connection(TokioIo::new(socket), TowerToHyperService::new(routes));
    if let Err(error) = served.await {
        tracing::debug!(error, "an HTTP connection broke");
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn slow_headers_end_the_connection_and_a_stop_ends_all() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let routes = Router::new().route("/", axum::routing::get(async || "hello"));
        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        let server = tasks.spawn(serve(listener, routes, Duration::from_millis(300), stop.clone()));
        let bound = Duration::from_secs(20);

        let mut slow = TcpStream::connect(address).await.expect("it listens");
        slow.write_all(b"GET / HTTP/1.1\r\nHost: x").await.expect("written");
        let mut answer = Vec::new();
        let read = timeout(bound, slow.read_to_end(&mut answer)).await;
        read.expect("it is closed").expect("in order");
        assert!(!answer.starts_with(b"HTTP/1.1 200"), "{answer:?}");

        let mut fast = TcpStream::connect(address).await.expect("it listens");
        fast.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            .await
            .expect("written");
        let mut answer = String::new();
        let read = timeout(bound, fast.read_to_string(&mut answer)).await;
        read.expect("an answer").expect("in order");
        assert!(
            answer.starts_with("HTTP/1.1 200") && answer.ends_with("hello"),
            "{answer}"
        );

        let mut idle = TcpStream::connect(address).await.expect("it listens");
        stop.cancel();
        let mut rest = Vec::new();
        timeout(bound, idle.read_to_end(&mut rest))
            .await
            .expect("it is closed")
            .ok();
        timeout(bound, server).await.expect("it ends").expect("no panic");
    }
}
