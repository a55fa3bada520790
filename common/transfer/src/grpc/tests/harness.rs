//! A decode node without an engine, and a prefill node that computes by looking up the answer.

use std::{
    net::SocketAddr,
    sync::{
        Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use baton_kv::{BlockId, HandoffId, KvMemory, KvMemoryError, NodeId, Pool};
use baton_proto::node::v1::{self as pb, handoff_client::HandoffClient};
use tokio::{net::TcpListener, sync::Notify, time::Instant};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};
use tonic::metadata::MetadataMap;

use super::*;
use crate::{Receiver, ReceiverAction, ReceiverConfig, Terms, path::Preference, shm, testing};

/// Nothing here takes long; a test that hangs fails.
pub(super) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), future)
        .await
        .expect("it hangs")
}

/// The decode node's memory, which can spoil what is written.
pub(super) struct Flaky {
    inner: Arc<TestMemory>,
    corrupt: AtomicUsize,
    written: Notify,
}

impl Flaky {
    /// The next `count` writes go wrong.
    pub(super) fn corrupt_writes(&self, count: usize) {
        self.corrupt.store(count, Ordering::SeqCst);
    }

    pub(super) fn block(&self, block: BlockId, tokens: usize) -> Vec<u8> {
        self.inner.block(block, tokens)
    }
}

impl KvMemory for Flaky {
    fn layout(&self) -> &KvLayout {
        self.inner.layout()
    }

    fn blocks(&self) -> usize {
        self.inner.blocks()
    }

    fn read(&self, layer: usize, block: BlockId, tokens: usize, out: &mut [u8]) -> Result<(), KvMemoryError> {
        self.inner.read(layer, block, tokens, out)
    }

    fn write(&self, layer: usize, block: BlockId, tokens: usize, bytes: &[u8]) -> Result<(), KvMemoryError> {
        let left = self
            .corrupt
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        let mut bytes = bytes.to_vec();
        if left.is_ok() {
            bytes[0] ^= 1;
        }
        self.inner.write(layer, block, tokens, &bytes)?;
        self.written.notify_one();
        Ok(())
    }
}

struct State {
    receiver: Receiver,
    pool: Pool,
    /// All so far.
    actions: Vec<ReceiverAction>,
    sequences: Vec<(HandoffId, Vec<BlockId>)>,
}

/// What the service sees.
struct Port {
    state: Mutex<State>,
    memory: Arc<dyn KvMemory>,
    fences: Fences,
    started: Instant,
    /// Time that passed without anybody waiting, µs.
    skew: AtomicU64,
    acted: Notify,
}

impl Port {
    fn now(&self) -> Time {
        Time(self.started.elapsed().as_micros() as u64 + self.skew.load(Ordering::SeqCst))
    }
}

impl ReceiverPort for Port {
    fn memory(&self) -> &Arc<dyn KvMemory> {
        &self.memory
    }

    fn locked<R>(&self, step: impl FnOnce(&mut Receiver, &mut Pool, Time, &mut Vec<ReceiverAction>) -> R) -> R {
        let mut state = self.state.lock().unwrap();
        let State {
            receiver,
            pool,
            actions: all,
            sequences,
        } = &mut *state;
        let mut actions = Vec::new();
        let result = step(receiver, pool, self.now(), &mut actions);
        for action in &actions {
            match action {
                ReceiverAction::Fence { stream, reject } => self.fences.fence(*stream, *reject),
                ReceiverAction::Verified { handoff, table, .. } => {
                    assert!(receiver.decoding(*handoff));
                    sequences.push((*handoff, table.clone()));
                }
                _ => {}
            }
        }
        pool.check().unwrap();
        all.extend(actions);
        drop(state);
        self.acted.notify_waiters();
        result
    }
}

pub(super) struct Node {
    port: Arc<Port>,
    pub(super) memory: Arc<Flaky>,
    pub(super) address: SocketAddr,
    pub(super) shutdown: CancellationToken,
    tasks: TaskTracker,
    /// Where it meets prefill nodes of its host, and their pools.
    directory: (tempfile::TempDir, shm::Directory),
    pub(super) mappings: shm::Mappings,
    _server: DropGuard,
}

impl Node {
    pub(super) async fn start(layout: KvLayout, blocks: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let config = ReceiverConfig {
            layout,
            address: address.to_string(),
            lease_ms: LEASE_MS,
            ..testing::config()
        };
        let memory = Arc::new(Flaky {
            inner: TestMemory::new(layout, blocks),
            corrupt: AtomicUsize::new(0),
            written: Notify::new(),
        });
        let fences = Fences::default();
        let port = Arc::new(Port {
            state: Mutex::new(State {
                receiver: Receiver::new(config),
                pool: Pool::new(blocks, layout.block_tokens),
                actions: Vec::new(),
                sequences: Vec::new(),
            }),
            memory: memory.clone(),
            fences: fences.clone(),
            started: Instant::now(),
            skew: AtomicU64::new(0),
            acted: Notify::new(),
        });
        let (tasks, shutdown, server) = (TaskTracker::new(), CancellationToken::new(), CancellationToken::new());
        let base = tempfile::tempdir().unwrap();
        let directory = shm::Directory::open(Some(base.path())).unwrap();
        let mappings = shm::Mappings::new(directory.clone(), tasks.clone(), shutdown.clone());
        let service = HandoffService::new(port.clone(), fences, tasks.clone(), shutdown.clone())
            .with_mappings(mappings.clone())
            .into_server();
        let serve = configure_server(Server::builder())
            .add_service(service)
            .serve_with_incoming_shutdown(TcpListenerStream::new(listener), server.clone().cancelled_owned());
        tasks.clone().spawn(async move { serve.await.unwrap() });
        Self {
            port,
            memory,
            address,
            shutdown,
            tasks,
            directory: (base, directory),
            mappings,
            _server: server.drop_guard(),
        }
    }

    pub(super) fn reserve(&self, request: u128, attempt: u32, prompt: &[TokenId]) -> Ticket {
        let wanted = testing::reserve(request, attempt, prompt);
        self.port
            .locked(|receiver, pool, now, actions| receiver.reserve(wanted, now, pool, actions))
            .unwrap()
    }

    /// Waits until `find` finds something in the state.
    async fn wait<T>(&self, find: impl Fn(&mut State) -> Option<T>) -> T {
        within(async {
            loop {
                let acted = self.port.acted.notified();
                if let Some(found) = find(&mut self.port.state.lock().unwrap()) {
                    return found;
                }
                acted.await;
            }
        })
        .await
    }

    /// Waits until the handoff is verified; its table.
    pub(super) async fn verified(&self, handoff: HandoffId) -> Vec<BlockId> {
        self.wait(|state| {
            state
                .sequences
                .iter()
                .find(|(id, _)| *id == handoff)
                .map(|(_, table)| table.clone())
        })
        .await
    }

    /// Waits until the handoff is aborted; why.
    pub(super) async fn aborted(&self, handoff: HandoffId) -> AbortReason {
        self.wait(|state| {
            state.actions.iter().find_map(|action| match action {
                ReceiverAction::Aborted {
                    handoff: id, reason, ..
                } if *id == handoff => Some(*reason),
                _ => None,
            })
        })
        .await
    }

    /// Waits until no handoff is left and every block is free or cached.
    pub(super) async fn idle(&self) {
        self.wait(|state| {
            let counts = state.pool.counts();
            (state.receiver.handoffs() == 0 && counts.free + counts.cached == counts.total).then_some(())
        })
        .await;
    }

    /// Waits until somebody renews the lease.
    pub(super) async fn until_renewed(&self, handoff: HandoffId) {
        let deadline = self.port.state.lock().unwrap().receiver.next_deadline();
        self.wait(|state| {
            assert!(state.receiver.state(handoff).is_some(), "the lease ended");
            (state.receiver.next_deadline() > deadline).then_some(())
        })
        .await;
    }

    /// Waits until a piece is written that no earlier call has waited for.
    pub(super) async fn written(&self) {
        self.memory.written.notified().await;
    }

    pub(super) fn finish_all(&self) {
        let sequences = std::mem::take(&mut self.port.state.lock().unwrap().sequences);
        for (handoff, table) in sequences {
            self.port.locked(|receiver, pool, _, actions| {
                pool.release(&table);
                receiver.released(handoff, actions);
            });
        }
    }

    pub(super) fn abort_all(&self) {
        self.port.locked(|receiver, pool, now, actions| {
            for handoff in (0..100).map(HandoffId) {
                receiver.abort(handoff, AbortReason::Cancelled, now, pool, actions);
            }
        });
    }

    /// Time passes, and deadlines with it.
    pub(super) fn pass_ms(&self, ms: u64) {
        self.port.skew.fetch_add(ms * 1_000, Ordering::SeqCst);
        self.port
            .locked(|receiver, pool, now, actions| receiver.tick(now, pool, actions));
    }
}

/// The prefill node's life.
pub(super) const EPOCH: Epoch = Epoch(5);

fn pusher(paths: PathConfig, memory: Arc<TestMemory>) -> Pusher {
    let config = PusherConfig {
        node: NodeId("prefill-0".into()),
        epoch: EPOCH,
        identity: IDENTITY,
        protocol_max: baton_proto::PROTOCOL_MAX,
        paths,
    };
    Pusher::new(config, memory)
}

/// What `node` says to a prefill node that offers this.
pub(super) async fn introduced(node: &Node, shared: pb::SharedPool) -> pb::PeerWelcome {
    let channel = Endpoint::from_shared(format!("http://{}", node.address)).unwrap();
    let terms = node.port.locked(|receiver, _, _, _| receiver.terms());
    let hello = Terms { epoch: EPOCH, ..terms }.hello(Some(shared));
    let mut client = HandoffClient::new(channel.connect_lazy());
    within(client.introduce(hello)).await.unwrap().into_inner()
}

/// A prefill node.
pub(super) struct Source {
    pub(super) memory: Arc<TestMemory>,
    pusher: Pusher,
    /// What it offers.
    pub(super) offer: Option<pb::SharedPool>,
    /// Cancelled when it dies, as far as its pool is concerned.
    pub(super) gone: CancellationToken,
}

impl Source {
    pub(super) fn new(layout: KvLayout, blocks: usize) -> Self {
        let memory = TestMemory::new(layout, blocks);
        Self {
            pusher: pusher(PathConfig::plain(), memory.clone()),
            memory,
            offer: None,
            gone: CancellationToken::new(),
        }
    }

    /// Pushes over `transport` alone. Over shared memory its pool is on offer where `node` looks, which maps it now.
    pub(super) async fn over(mut self, node: &Node, transport: Transport) -> Self {
        if transport == Transport::Shm {
            let (token, directory) = (Capability::new([4; 32]), &node.directory.1);
            let (tasks, shutdown) = (&node.tasks, self.gone.clone());
            let offer = shm::Offer::open(directory, EPOCH, token, &*self.memory, tasks, shutdown).unwrap();
            let paths = PathConfig {
                preference: Preference::Only(Transport::Shm),
                shared: Some(offer.to_proto()),
                ..PathConfig::plain()
            };
            let welcome = introduced(node, offer.to_proto()).await;
            assert!(
                welcome.shared_refused.is_empty() && welcome.shared_bytes_per_s > 0.0,
                "{welcome:?}"
            );
            self.pusher = pusher(paths, self.memory.clone());
            self.offer = Some(offer.to_proto());
        }
        self
    }

    /// All pushes together read no more than `read_ahead` ahead.
    pub(super) fn with_read_ahead(mut self, read_ahead: ReadAhead) -> Self {
        self.pusher = self.pusher.with_read_ahead(read_ahead);
        self
    }

    pub(super) fn table(&self, tokens: usize) -> Vec<BlockId> {
        (0..self.memory.layout().blocks_for(tokens) as u32)
            .map(BlockId)
            .collect()
    }

    /// A push whose prompt is in memory, and not reported as computed yet.
    pub(super) fn start(
        &self,
        ticket: Ticket,
        prompt: &[TokenId],
    ) -> (PushFeed, impl Future<Output = Result<PushReport, PushError>>) {
        self.memory.compute(prompt, &self.table(prompt.len()));
        let (feed, input) = push_feed();
        let job = PushJob {
            ticket,
            root: ROOT,
            prompt: prompt.to_vec(),
            deadline_ms: 60_000,
            metadata: MetadataMap::new(),
            input,
        };
        (feed, self.pusher.push(job))
    }

    pub(super) async fn push_in_chunks(
        &self,
        ticket: Ticket,
        prompt: &[TokenId],
        chunk: usize,
    ) -> Result<PushReport, PushError> {
        let (feed, push) = self.start(ticket, prompt);
        let compute = async {
            for end in (0..prompt.len())
                .step_by(chunk)
                .map(|start| (start + chunk).min(prompt.len()))
            {
                feed.computed(end, &self.table(end), Arc::new(()));
                tokio::task::yield_now().await;
            }
            feed.first_token(first_token());
        };
        tokio::join!(push, compute).0
    }
}
