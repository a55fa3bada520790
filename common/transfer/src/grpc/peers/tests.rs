//! Both ends over loopback; decode nodes as others would be are written by hand.

use std::sync::atomic::AtomicU64;

use baton_kv::{KvIdentity, NodeId};
use baton_proto::node::v1::handoff_server::{Handoff, HandoffServer};
use tokio::net::TcpListener;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Streaming, transport::Server};

use super::*;
use crate::{
    Capability, Reject,
    grpc::introduce,
    path::PathError,
    testing::{IDENTITY, LAYOUT},
};

const SLOW: SlowPath = SlowPath {
    ratio: 0.25,
    refuse: true,
};

fn terms(node: &str, epoch: u128, newest: u32) -> Terms {
    Terms {
        node: NodeId(node.to_owned()),
        epoch: Epoch(epoch),
        identity: IDENTITY,
        layout: LAYOUT,
        versions: 1..=newest,
    }
}

/// A decode node that takes no pushes, and counts who came.
struct Decode {
    terms: Mutex<Terms>,
    met: AtomicUsize,
    probes: AtomicUsize,
    /// What a probe is told, bytes a second; 0: that it failed.
    rate: AtomicU64,
}

#[tonic::async_trait]
impl Handoff for Decode {
    type PushStream = ReceiverStream<Result<pb::PushReply, Status>>;

    async fn push(&self, _: Request<Streaming<pb::PushFrame>>) -> Result<Response<Self::PushStream>, Status> {
        Err(Status::unimplemented("no pushes here"))
    }

    async fn introduce(&self, request: Request<pb::PeerHello>) -> Result<Response<pb::PeerWelcome>, Status> {
        self.met.fetch_add(1, Ordering::SeqCst);
        let terms = self.terms.lock().unwrap().clone();
        introduce::welcome(&terms, request.get_ref(), None)
            .await
            .map(Response::new)
    }

    async fn probe(&self, request: Request<Streaming<pb::ProbeFrame>>) -> Result<Response<pb::ProbeReport>, Status> {
        let terms = self.terms.lock().unwrap().clone();
        let mut report = introduce::probe(&terms, request.into_inner()).await?;
        if report.bytes > 0 {
            self.probes.fetch_add(1, Ordering::SeqCst);
            report.bytes = self.rate.load(Ordering::SeqCst);
            report.seconds = 1.0;
        }
        Ok(Response::new(report))
    }
}

struct Setup {
    decode: Arc<Decode>,
    address: String,
    peers: Arc<Peers>,
    events: Arc<Mutex<Vec<PathEvent>>>,
    _tasks: TaskTracker,
}

impl Setup {
    async fn new(preference: Preference, newest: u32) -> Self {
        let decode = Arc::new(Decode {
            terms: Mutex::new(terms("decode-0", 1, 2)),
            met: AtomicUsize::new(0),
            probes: AtomicUsize::new(0),
            rate: AtomicU64::new(4_000_000_000),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let serve = Server::builder()
            .add_service(HandoffServer::from_arc(decode.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        let tasks = TaskTracker::new();
        tasks.spawn(serve);
        let events = Arc::new(Mutex::new(Vec::new()));
        let told = events.clone();
        let config = PathConfig {
            preference,
            slow: SLOW,
            tls: None,
            shared: None,
            observer: Arc::new(move |event| told.lock().unwrap().push(event)),
        };
        Self {
            decode,
            address,
            peers: Arc::new(Peers::new(terms("prefill-0", 9, newest), config)),
            events,
            _tasks: tasks,
        }
    }

    fn ticket(&self, epoch: u128) -> Ticket {
        Ticket {
            request: baton_kv::RequestId(1),
            attempt: baton_kv::Attempt(1),
            decode_node: NodeId("decode-0".to_owned()),
            address: self.address.clone(),
            epoch: Epoch(epoch),
            handoff: baton_kv::HandoffId(1),
            held_blocks: 0,
            slots: Vec::new(),
            lease_ms: 10_000,
            identity: IDENTITY,
            layout: LAYOUT,
            capability: Capability::new([1; 32]),
            protocol: *self.decode.terms.lock().unwrap().versions.end(),
        }
    }

    async fn way(&self, epoch: u128) -> Result<Way, PushError> {
        let ticket = self.ticket(epoch);
        timeout(Duration::from_secs(20), self.peers.way(&ticket))
            .await
            .expect("it hangs")
    }

    /// How often the two introduced themselves, and probed.
    fn counts(&self) -> (usize, usize) {
        let count = |count: &AtomicUsize| count.load(Ordering::SeqCst);
        (count(&self.decode.met), count(&self.decode.probes))
    }
}

#[tokio::test]
async fn two_nodes_meet_once_per_life_of_the_decode_node() {
    let setup = Setup::new(Preference::Auto, 2).await;
    let (one, two, three) = tokio::join!(setup.way(1), setup.way(1), setup.way(1));
    for way in [one, two, three] {
        let way = way.unwrap();
        assert_eq!(way.transport, Transport::Grpc);
        let predicted = way.predicted(1 << 30);
        assert!(predicted > 1e9 && predicted <= 4e9, "{predicted}");
    }
    assert_eq!(setup.counts(), (1, 1));
    assert_eq!(*setup.events.lock().unwrap(), [PathEvent::Probed(Transport::Grpc, 4e9)]);
    // It has begun a new life; a ticket of the old one changes nothing.
    setup.decode.terms.lock().unwrap().epoch = Epoch(2);
    setup.way(2).await.unwrap();
    assert_eq!(setup.counts(), (2, 2));
    for epoch in [1, 1, 2, 1, 2] {
        setup.way(epoch).await.unwrap();
    }
    assert_eq!(setup.counts().0, 3);
}

#[tokio::test]
async fn version_1_needs_no_introduction() {
    for (ours, theirs) in [(1, 2), (2, 1)] {
        let setup = Setup::new(Preference::Auto, ours).await;
        setup.decode.terms.lock().unwrap().versions = 1..=theirs;
        let way = setup.way(1).await.unwrap();
        assert_eq!((way.transport, way.predicted(1 << 30)), (Transport::Grpc, 0.0));
        assert_eq!(setup.counts(), (0, 0));
    }
}

#[tokio::test]
async fn who_does_not_fit_is_refused_with_its_reason() {
    let setup = Setup::new(Preference::Auto, 2).await;
    let check = async |change: fn(&mut Terms), expected: Reject| {
        let mut changed = terms("decode-0", 1, 2);
        change(&mut changed);
        *setup.decode.terms.lock().unwrap() = changed;
        let error = setup.way(1).await.err().expect("refused");
        assert_eq!(error.code(), expected.code(), "{error}");
    };
    check(|terms| terms.identity = KvIdentity([8; 32]), Reject::IdentityMismatch).await;
    check(|terms| terms.layout.heads += 1, Reject::LayoutMismatch).await;
    check(|terms| terms.versions = 3..=4, Reject::ProtocolMismatch).await;
    // A failure is not remembered.
    *setup.decode.terms.lock().unwrap() = terms("decode-0", 1, 2);
    setup.way(1).await.unwrap();
}

#[tokio::test]
async fn a_required_transport_that_cannot_be_had_is_named() {
    let setup = Setup::new(Preference::Only(Transport::Shm), 2).await;
    let error = setup.way(1).await.err().expect("refused");
    assert_eq!(error.code(), "TRANSPORT_UNAVAILABLE");
    assert!(
        matches!(&error, PushError::Path(PathError::Unavailable { why, .. }) if why.contains("shared memory")),
        "{error}"
    );
}

#[tokio::test]
async fn a_slow_path_is_probed_again_refused_and_taken_once_it_recovers() {
    let setup = Setup::new(Preference::Auto, 2).await;
    let way = setup.way(1).await.unwrap();
    setup.peers.transferred(&way, 64 << 20, 0.5e9);
    assert!(setup.events.lock().unwrap().contains(&PathEvent::Slow(Transport::Grpc)));
    // Another push is under way: what a probe would say now counts for nothing.
    let beside = setup.way(1).await.unwrap();
    assert_eq!(setup.counts(), (1, 1));
    drop((way, beside));

    // Only busy.
    let way = setup.way(1).await.unwrap();
    assert_eq!(setup.counts(), (1, 2));
    setup.peers.transferred(&way, 64 << 20, 0.5e9);
    drop(way);

    // Slow indeed.
    setup.decode.rate.store(900_000_000, Ordering::SeqCst);
    let error = setup.way(1).await.err().expect("refused");
    assert_eq!(error.code(), "PATH_SLOW");
    assert!(
        setup
            .events
            .lock()
            .unwrap()
            .contains(&PathEvent::Bad(Transport::Grpc, 1))
    );
    // Not probed again at once.
    let probes = setup.counts();
    assert_eq!(setup.way(1).await.err().expect("refused").code(), "PATH_SLOW");
    assert_eq!(setup.counts(), probes);

    setup.decode.rate.store(3_000_000_000, Ordering::SeqCst);
    // As if the time had passed.
    let peer = setup.peers.peer(&setup.address).unwrap();
    peer.met().as_mut().expect("met").probed_at -= Duration::from_millis(limits::REPROBE_MS);
    setup.way(1).await.unwrap();
    assert_eq!(
        setup.events.lock().unwrap()[..]
            .iter()
            .rev()
            .find(|event| matches!(event, PathEvent::Bad(Transport::Grpc, _))),
        Some(&PathEvent::Bad(Transport::Grpc, 0))
    );
}
