//! Decode nodes as a prefill node knows them: one connection per address, what was agreed when the two first met, and how fast the ways between them are.

use std::{
    collections::VecDeque,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use baton_kv::Epoch;
use baton_proto::node::v1::{self as pb, handoff_client::HandoffClient};
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout},
};
use tonic::{
    Code, Status,
    transport::{Channel, ClientTlsConfig, Endpoint},
};

use super::{PushError, configure_endpoint, introduce::refused, probe::probe};
use crate::{
    INTRODUCED_SINCE, PushFailure, Terms, Ticket, Transport, limits,
    path::{Measured, Path, PathState, Preference, SlowPath, choose},
};

/// Something that was learnt of a path, for metrics.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum PathEvent {
    /// A probe's result, bytes a second.
    Probed(Transport, f64),
    /// A transfer was far slower than the path's probe.
    Slow(Transport),
    /// How many peers' path of this transport is bad now.
    Bad(Transport, usize),
}

/// Hears of [`PathEvent`]s. Called anywhere; must not block.
pub type PathObserver = Arc<dyn Fn(PathEvent) + Send + Sync>;

/// What a node's pushes may take.
#[derive(Clone)]
pub struct PathConfig {
    /// Which transport.
    pub preference: Preference,
    /// When one is slow.
    pub slow: SlowPath,
    /// What the node shows to decode nodes, and whom it believes; `None`: no TLS.
    pub tls: Option<ClientTlsConfig>,
    /// Its pool, where it can be mapped.
    pub shared: Option<pb::SharedPool>,
    /// Told what is learnt.
    pub observer: PathObserver,
}

impl PathConfig {
    /// Over gRPC alone, without TLS; a slow path is a line in the log.
    pub fn plain() -> Self {
        Self {
            preference: Preference::Only(Transport::Grpc),
            slow: SlowPath {
                ratio: limits::SLOW_RATIO,
                refuse: false,
            },
            tls: None,
            shared: None,
            observer: Arc::new(|_| {}),
        }
    }
}

impl fmt::Debug for PathConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PathConfig")
            .field("preference", &self.preference)
            .field("slow", &self.slow)
            .finish_non_exhaustive()
    }
}

/// All of them. Channels connect when first used, and again after their connection broke.
pub(super) struct Peers {
    terms: Terms,
    config: PathConfig,
    /// Most recently used last; at most [`limits::MAX_PEERS`].
    peers: Mutex<VecDeque<Arc<Peer>>>,
}

struct Peer {
    address: String,
    channel: Channel,
    met: Mutex<Option<Met>>,
    /// One meeting or probe at a time.
    turn: Semaphore,
    /// Pushes under way.
    pushes: AtomicUsize,
}

/// What came of a meeting.
#[derive(Clone)]
struct Met {
    /// The ticket's epoch that led to it: one that is still older is no reason for another.
    asked: Epoch,
    /// The peer's.
    epoch: Epoch,
    paths: Vec<Path>,
    /// Why the pool that was offered cannot be used.
    shared_refused: String,
    /// Tells one meeting from another.
    at: Instant,
    probed_at: Instant,
}

/// A push's way to its peer. Counts as under way until it is dropped.
pub(super) struct Way {
    pub(super) channel: Channel,
    pub(super) transport: Transport,
    peer: Arc<Peer>,
    path: Path,
    /// The meeting's time.
    met_at: Option<Instant>,
}

impl Peers {
    pub(super) fn new(terms: Terms, config: PathConfig) -> Self {
        Self {
            terms,
            config,
            peers: Mutex::default(),
        }
    }

    /// The way to the ticket's decode node. The first push to it introduces the two and probes, while others wait; a doubtful path is probed again first. Must be
    /// called on a runtime, and bounded. Cancel-safe: another push then takes its turn.
    pub(super) async fn way(&self, ticket: &Ticket) -> Result<Way, PushError> {
        let peer = self.peer(&ticket.address).map_err(|error| PushError::Connect {
            address: ticket.address.clone(),
            message: error.to_string(),
        })?;
        let speaks = ticket.protocol.min(*self.terms.versions.end());
        if speaks < INTRODUCED_SINCE {
            let path = Path::new(Transport::Grpc, None);
            return self.take(peer, &[path], "it speaks version 1 of the handoff", None);
        }
        let known = |met: &Met| met.epoch == ticket.epoch || met.asked == ticket.epoch;
        let mut met = peer.met().clone().filter(known);
        if met.is_none() {
            let _turn = peer.turn.acquire().await;
            met = peer.met().clone().filter(known);
            if met.is_none() {
                met = Some(self.meet(&peer, ticket.epoch).await?);
            }
        }
        let mut met = met.expect("met just now");
        if self.offer_due(&met)
            && let Ok(_turn) = peer.turn.try_acquire()
            && self.offer_again(&peer, met.clone()).await.is_ok()
        {
            met = peer.met().clone().filter(known).unwrap_or(met);
        }
        if self.probe_due(&peer, &met)
            && let Ok(_turn) = peer.turn.try_acquire()
        {
            met = self.meet_again(&peer, met).await;
        }
        self.take(peer, &met.paths, &met.shared_refused, Some(met.at))
    }

    /// Offers this node's pool once more: its peer, to which `way` led, has not mapped it any more. Like [`Peers::way`] otherwise, for the same ticket.
    pub(super) async fn way_anew(&self, ticket: &Ticket, way: &Way) -> Result<Way, PushError> {
        let peer = &way.peer;
        {
            let _turn = peer.turn.acquire().await;
            let met = peer.met().clone();
            // Unless another push has done it.
            if let Some(met) = met.filter(|met| Some(met.at) == way.met_at) {
                self.offer_again(peer, met).await?;
            }
        }
        self.way(ticket).await
    }

    /// Introduces the two anew, for the pool's sake; what is known of other paths stays.
    async fn offer_again(&self, peer: &Peer, mut met: Met) -> Result<(), PushError> {
        let welcome = self.introduce(peer).await?;
        met.paths.retain(|path| path.transport() != Transport::Shm);
        met.paths.extend(self.shared_path(&welcome, &met.shared_refused));
        met.shared_refused = welcome.shared_refused;
        met.at = Instant::now();
        // Another life of it is met when a ticket speaks of it.
        *peer.met() = Some(met).filter(|met| met.epoch.to_bytes()[..] == welcome.epoch);
        Ok(())
    }

    /// Whether the pool is to be offered again to a peer that could not map it: it may have been too busy.
    fn offer_due(&self, met: &Met) -> bool {
        let mapped = || met.paths.iter().any(|path| path.transport() == Transport::Shm);
        self.config.shared.is_some() && !mapped() && met.at.elapsed() >= Duration::from_millis(limits::REOFFER_MS)
    }

    fn take(
        &self,
        peer: Arc<Peer>,
        paths: &[Path],
        shared_refused: &str,
        met_at: Option<Instant>,
    ) -> Result<Way, PushError> {
        let missing = |_| match (&self.config.shared, shared_refused) {
            (None, _) => "this node's pool is not in shared memory".to_owned(),
            (Some(_), "") => "the peer does not know it".to_owned(),
            (Some(_), why) => why.to_owned(),
        };
        let path = *choose(paths, self.config.preference, &self.config.slow, missing)?;
        peer.pushes.fetch_add(1, Ordering::Relaxed);
        Ok(Way {
            channel: peer.channel.clone(),
            transport: path.transport(),
            peer,
            path,
            met_at,
        })
    }

    /// The peer at `address` (host:port); fails when the address makes no sense.
    fn peer(&self, address: &str) -> Result<Arc<Peer>, tonic::transport::Error> {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let peer = match peers.iter().position(|known| known.address == address) {
            Some(at) => peers.remove(at).expect("found just now"),
            None => {
                let endpoint = match &self.config.tls {
                    Some(tls) => Endpoint::from_shared(format!("https://{address}"))?.tls_config(tls.clone())?,
                    None => Endpoint::from_shared(format!("http://{address}"))?,
                };
                Arc::new(Peer {
                    address: address.to_owned(),
                    channel: configure_endpoint(endpoint).connect_lazy(),
                    met: Mutex::default(),
                    turn: Semaphore::new(1),
                    pushes: AtomicUsize::new(0),
                })
            }
        };
        if peers.len() >= limits::MAX_PEERS {
            peers.pop_front();
        }
        peers.push_back(peer.clone());
        Ok(peer)
    }

    async fn introduce(&self, peer: &Peer) -> Result<pb::PeerWelcome, PushError> {
        let hello = self.terms.hello(self.config.shared.clone());
        let mut client = HandoffClient::new(peer.channel.clone());
        let welcome = timeout(Duration::from_millis(limits::MEET_MS), client.introduce(hello)).await;
        welcome
            .unwrap_or_else(|_| Err(Status::unavailable("no answer in time")))
            .map(tonic::Response::into_inner)
            .map_err(|status| match refused(&status) {
                Some(reject) => PushFailure::Rejected(reject).into(),
                None => match status.code() {
                    Code::Unavailable => PushError::Connect {
                        address: peer.address.clone(),
                        message: status.message().to_owned(),
                    },
                    code => PushError::Stream(format!("{code:?}: {}", status.message())),
                },
            })
    }

    /// Introduces the two and probes every path that both have.
    async fn meet(&self, peer: &Peer, asked: Epoch) -> Result<Met, PushError> {
        let welcome = self.introduce(peer).await?;
        let epoch = Epoch::from_slice(&welcome.epoch).ok_or(PushFailure::Protocol)?;
        let grpc = Path::new(Transport::Grpc, self.probe_grpc(peer).await);
        self.tell_probed(&welcome, &grpc);
        let paths = [Some(grpc), self.shared_path(&welcome, "")];
        let now = Instant::now();
        let met = Met {
            asked,
            epoch,
            paths: paths.into_iter().flatten().collect(),
            shared_refused: welcome.shared_refused,
            at: now,
            probed_at: now,
        };
        *peer.met() = Some(met.clone());
        Ok(met)
    }

    /// The path through shared memory, if the peer could map what was offered; `refused` is what it said before.
    fn shared_path(&self, welcome: &pb::PeerWelcome, refused: &str) -> Option<Path> {
        self.config.shared.as_ref()?;
        if !welcome.shared_refused.is_empty() {
            if welcome.shared_refused != refused {
                tracing::info!(
                    peer = welcome.node_id,
                    why = welcome.shared_refused,
                    "no shared memory with this decode node"
                );
            }
            return None;
        }
        let path = Path::new(Transport::Shm, shared(welcome));
        self.tell_probed(welcome, &path);
        Some(path)
    }

    fn tell_probed(&self, welcome: &pb::PeerWelcome, path: &Path) {
        let Some(probe) = path.probe() else { return };
        self.tell(PathEvent::Probed(path.transport(), probe.bytes_per_s));
        tracing::info!(
            peer = welcome.node_id,
            transport = path.transport().name(),
            bytes_per_s = probe.bytes_per_s,
            latency_ms = probe.latency.as_secs_f64() * 1e3,
            "a path to a decode node was probed"
        );
    }

    /// Whether a path is in doubt, and a probe would tell: not while others push, unless that goes on for long. A bad one is looked at again from time to time.
    fn probe_due(&self, peer: &Peer, met: &Met) -> bool {
        let states = || met.paths.iter().map(Path::state);
        let age = met.probed_at.elapsed();
        let alone = peer.pushes.load(Ordering::Relaxed) == 0;
        let waited = age >= Duration::from_millis(limits::REPROBE_BUSY_MS);
        let doubtful = states().any(|state| state == PathState::Doubtful);
        let bad = states().any(|state| state == PathState::Bad) && age >= Duration::from_millis(limits::REPROBE_MS);
        (doubtful || bad) && (alone || waited)
    }

    /// Probes the paths that are not good.
    async fn meet_again(&self, peer: &Peer, mut met: Met) -> Met {
        for path in met.paths.iter_mut().filter(|path| path.state() != PathState::Good) {
            let again = match path.transport() {
                Transport::Grpc => self.probe_grpc(peer).await,
                Transport::Shm => self.introduce(peer).await.ok().as_ref().and_then(shared),
            };
            path.probed(again, &self.config.slow);
            let bytes_per_s = again.map_or(0.0, |again| again.bytes_per_s);
            let transport = path.transport();
            self.tell(PathEvent::Probed(transport, bytes_per_s));
            let (address, transport) = (&peer.address, transport.name());
            if path.state() == PathState::Bad {
                let before = path.probe().map_or(0.0, |probe| probe.bytes_per_s);
                tracing::warn!(
                    address,
                    transport,
                    bytes_per_s,
                    before,
                    "a path to a decode node is far slower than it was"
                );
            } else {
                tracing::info!(
                    address,
                    transport,
                    bytes_per_s,
                    "a path to a decode node is as fast as it was"
                );
            }
        }
        met.probed_at = Instant::now();
        {
            let mut known = peer.met();
            // Another life of the peer may have been met meanwhile.
            if known.as_ref().is_some_and(|known| known.epoch == met.epoch) {
                *known = Some(met.clone());
            }
        }
        for transport in [Transport::Grpc, Transport::Shm] {
            self.tell(PathEvent::Bad(transport, self.bad(transport)));
        }
        met
    }

    fn bad(&self, transport: Transport) -> usize {
        let peers: Vec<_> = self
            .peers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .cloned()
            .collect();
        let bad = |path: &Path| path.transport() == transport && path.state() == PathState::Bad;
        peers
            .iter()
            .filter(|peer| peer.met().as_ref().is_some_and(|met| met.paths.iter().any(bad)))
            .count()
    }

    /// `None` when it cannot be probed: pushes go on without a prediction.
    async fn probe_grpc(&self, peer: &Peer) -> Option<Measured> {
        let probed = timeout(Duration::from_millis(limits::MEET_MS), probe(&peer.channel)).await;
        let probed = probed.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in time")));
        probed
            .inspect_err(|status| {
                tracing::warn!(
                    address = peer.address,
                    "a path could not be probed: {}",
                    status.message()
                )
            })
            .ok()
    }

    /// What a transfer over `way` came to.
    pub(super) fn transferred(&self, way: &Way, bytes: u64, bytes_per_s: f64) {
        let slow = {
            let mut met = way.peer.met();
            let paths = met.iter_mut().flat_map(|met| &mut met.paths);
            paths
                .filter(|path| path.transport() == way.transport)
                .any(|path| path.transferred(bytes, bytes_per_s, &self.config.slow))
        };
        if slow {
            self.tell(PathEvent::Slow(way.transport));
            // No alarm yet: the path, or the machine for a moment? The next probe says.
            tracing::info!(
                peer = way.peer.address,
                transport = way.transport.name(),
                bytes,
                achieved_bytes_per_s = bytes_per_s,
                predicted_bytes_per_s = way.predicted(bytes),
                "a transfer was far slower than its path's probe"
            );
        }
    }

    fn tell(&self, event: PathEvent) {
        (self.config.observer)(event);
    }
}

/// What a welcome says of the pool that was offered.
fn shared(welcome: &pb::PeerWelcome) -> Option<Measured> {
    let usable = welcome.shared_refused.is_empty() && welcome.shared_bytes_per_s > 0.0;
    usable.then_some(Measured {
        bytes_per_s: welcome.shared_bytes_per_s,
        latency: Duration::ZERO,
    })
}

impl Peer {
    fn met(&self) -> MutexGuard<'_, Option<Met>> {
        self.met.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Way {
    /// Bytes a second that a transfer of `bytes` will see; 0 when nothing is known.
    pub(super) fn predicted(&self, bytes: u64) -> f64 {
        self.path.predicted(bytes)
    }
}

impl Drop for Way {
    fn drop(&mut self) {
        self.peer.pushes.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
