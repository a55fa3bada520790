//! A TCP proxy inside the test that harms what it carries, as the test says, while it runs.
//!
//! Bytes: each way can be slow, late, held back without a word, or corrupt, and connections can be closed, reset or refused. Whole gRPC messages, on their
//! way from whoever connects: a [`Mangler`] drops, repeats, swaps, changes or invents them. (Of TCP's own packets nothing can be lost, doubled or swapped
//! from here: the kernel on both sides repairs it.)

mod lane;
mod messages;
#[cfg(test)]
mod tests;

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use tokio::task::JoinSet;

pub use lane::Lane;
pub use messages::{Mangler, Message};

use messages::Messages;

/// How connections end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    /// FIN, both ways.
    Close,
    /// RST, both ways.
    Reset,
}

/// A proxy on a port of its own. Everything ends when it is dropped.
pub struct FaultProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    /// Its own thread: a test that blocks its runtime does not stop the proxy.
    runtime: Option<Runtime>,
}

struct Shared {
    upstream: Mutex<Option<SocketAddr>>,
    up: Lane,
    down: Lane,
    /// How many times connections were ended, and how the last time.
    ends: watch::Sender<(u64, End)>,
    mangler: Option<Mutex<Mangler>>,
}

impl FaultProxy {
    /// Listens on loopback, and refuses connections until [`FaultProxy::forward`] was called.
    pub fn start() -> Self {
        Self::with(None)
    }

    /// The same, with every gRPC message that comes from whoever connects given to `mangler`, whose answer goes on instead. For HTTP/2 without TLS.
    pub fn mangling(mangler: Mangler) -> Self {
        Self::with(Some(Mutex::new(mangler)))
    }

    fn with(mangler: Option<Mutex<Mangler>>) -> Self {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        listener.set_nonblocking(true).expect("a socket");
        let address = listener.local_addr().expect("its address");
        let shared = Arc::new(Shared {
            upstream: Mutex::default(),
            up: Lane::default(),
            down: Lane::default(),
            ends: watch::Sender::new((0, End::Close)),
            mangler,
        });
        let sockets = shared.clone();
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).expect("within a runtime");
            accept(listener, sockets).await;
        });
        Self {
            address,
            shared,
            runtime: Some(runtime),
        }
    }

    /// Where to connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// New connections go to `upstream` from now on.
    pub fn forward(&self, upstream: SocketAddr) {
        *self.shared.upstream() = Some(upstream);
    }

    /// New connections are reset at once from now on.
    pub fn refuse(&self) {
        *self.shared.upstream() = None;
    }

    /// What goes from whoever connects to the upstream.
    pub fn up(&self) -> &Lane {
        &self.shared.up
    }

    /// What comes back.
    pub fn down(&self) -> &Lane {
        &self.shared.down
    }

    /// From now on nothing passes, either way, and nobody is told. (New connections are still taken, and stay silent.)
    pub fn cut(&self) {
        self.up().hold();
        self.down().hold();
    }

    /// Everything passes again, in time, at full speed and unharmed; what was held back first.
    pub fn heal(&self) {
        self.up().heal();
        self.down().heal();
    }

    /// Closes every connection: FIN to both ends.
    pub fn close(&self) {
        self.end(End::Close);
    }

    /// Resets every connection: RST to both ends.
    pub fn reset(&self) {
        self.end(End::Reset);
    }

    fn end(&self, how: End) {
        self.shared.ends.send_modify(|(times, last)| {
            *times += 1;
            *last = how;
        });
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Shared {
    fn upstream(&self) -> std::sync::MutexGuard<'_, Option<SocketAddr>> {
        self.upstream.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    let mut number = 0;
    while let Ok((client, _)) = listener.accept().await {
        number += 1;
        connections.spawn(connection(client, number, shared.clone()));
        while connections.try_join_next().is_some() {}
    }
}

/// One connection, to its end.
async fn connection(client: TcpStream, number: u64, shared: Arc<Shared>) {
    let mut ends = shared.ends.subscribe();
    let upstream = *shared.upstream();
    let Some(Ok(server)) = connect(upstream).await else {
        let _ = client.set_zero_linger();
        return;
    };
    let _ = client.set_nodelay(true);
    carry_both(client, server, number, &shared, &mut ends).await;
}

async fn connect(upstream: Option<SocketAddr>) -> Option<io::Result<TcpStream>> {
    let server = TcpStream::connect(upstream?).await;
    if let Ok(server) = &server {
        let _ = server.set_nodelay(true);
    }
    Some(server)
}

/// Carries both ways until both have ended, one broke, or the test ends it.
async fn carry_both(
    mut client: TcpStream,
    mut server: TcpStream,
    number: u64,
    shared: &Shared,
    ends: &mut watch::Receiver<(u64, End)>,
) {
    let ended = {
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        let messages = shared.mangler.as_ref().map(|mangler| Messages::new(number, mangler));
        tokio::select! {
            _ = ends.changed() => Some(ends.borrow().1),
            carried = async {
                tokio::try_join!(
                    shared.up.carry(from_client, to_server, messages),
                    shared.down.carry(from_server, to_client, None),
                )
            } => carried.err().map(|_| End::Reset),
        }
    };
    if ended == Some(End::Reset) {
        let _ = client.set_zero_linger();
        let _ = server.set_zero_linger();
    }
}
