//! The HTTP listener: a bounded number of connections, each with a deadline for its headers.
//!
//! A client that closes its half of a connection before its answer has come is taken for one that left, and its request is cancelled: over TCP the two look alike.

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

/// What is served, and within what bounds.
#[derive(Clone)]
pub struct Served {
    /// Everything.
    pub routes: Router,
    /// What is answered even when all connections are taken.
    pub probes: Router,
    /// At a time; beyond them only probes are answered. [`files::connections`](crate::files::connections) bounds it.
    pub connections: usize,
    /// For the headers of each request.
    pub read_bound: Duration,
}

/// Serves until `stop`; the connections' tasks have ended when it returns. Not a graceful shutdown, which would wait for idle connections.
pub async fn serve(listener: TcpListener, served: Served, stop: CancellationToken) {
    let connections = TaskTracker::new();
    let permits = Arc::new(Semaphore::new(served.connections));
    let probes = Arc::new(Semaphore::new(limits::HTTP_PROBES));
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let socket = match accepted {
            Ok((socket, _)) => socket,
            Err(error) => {
                tracing::warn!(%error, "an HTTP connection was not accepted");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (served, stop) = (served.clone(), stop.clone());
        if let Ok(permit) = permits.clone().try_acquire_owned() {
            connections.spawn(async move {
                let _permit = permit;
                tokio::select! {
                    () = connection(socket, served.routes, served.read_bound, true) => {}
                    () = async { stop.cancelled().await; sleep(limits::HTTP_LAST_WORD).await } => {}
                }
            });
        } else if let Ok(permit) = probes.clone().try_acquire_owned() {
            connections.spawn(async move {
                let _permit = permit;
                let bound = limits::HTTP_PROBE;
                tokio::select! {
                    _ = timeout(bound, connection(socket, served.probes, bound, false)) => {}
                    () = stop.cancelled() => {}
                }
            });
        } else {
            tracing::warn!(
                limit = served.connections,
                "an HTTP connection was closed: there are too many"
            );
        }
    }
    connections.close();
    // Each ends by itself by then.
    let _ = timeout(2 * limits::HTTP_LAST_WORD, connections.wait()).await;
}

async fn connection(socket: TcpStream, routes: Router, read_bound: Duration, keep_alive: bool) {
    let _ = socket.set_nodelay(true);
    let mut builder = auto::Builder::new(TokioExecutor::new()).http1_only();
    builder
        .http1()
        .keep_alive(keep_alive)
        .timer(TokioTimer::new())
        .header_read_timeout(read_bound);
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
        let served = Served {
            routes: Router::new().route("/", axum::routing::get(async || "hello")),
            probes: Router::new(),
            connections: 8,
            read_bound: Duration::from_millis(300),
        };
        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        let server = tasks.spawn(serve(listener, served, stop.clone()));
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

    #[tokio::test]
    async fn when_all_connections_are_taken_probes_are_answered() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let served = Served {
            routes: Router::new().route("/health", axum::routing::get(async || "all")),
            probes: Router::new().route("/health", axum::routing::get(async || "probe")),
            connections: 1,
            read_bound: Duration::from_secs(20),
        };
        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        let server = tasks.spawn(serve(listener, served, stop.clone()));
        let bound = Duration::from_secs(20);
        let ask = async |socket: &mut TcpStream| {
            let request = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n";
            socket.write_all(request).await.expect("written");
        };
        let mut first = TcpStream::connect(address).await.expect("it listens");
        ask(&mut first).await;
        let mut answer = [0; 4096];
        let read = timeout(bound, first.read(&mut answer))
            .await
            .expect("an answer")
            .expect("in order");
        assert!(answer[..read].ends_with(b"all"));
        // The first is still open.
        let mut second = TcpStream::connect(address).await.expect("it listens");
        ask(&mut second).await;
        let mut answer = String::new();
        let read = timeout(bound, second.read_to_string(&mut answer)).await;
        read.expect("it is closed").expect("in order");
        assert!(answer.ends_with("probe"), "{answer}");
        stop.cancel();
        timeout(bound, server).await.expect("it ends").expect("no panic");
    }
}
