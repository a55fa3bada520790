//! What may go wrong between a prefill node and a decode node, on every way that KV travels. The test takes the router's place, and a proxy stands between
//! the two nodes. After each mishap: nothing is held within a lease, and the next request is answered right.

mod reference;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use baton_kv::KvIdentity;
use baton_proto::node::v1::{self as pb, push_frame::Frame};
use baton_tests::fault_proxy::{FaultProxy, Message};
use baton_tests::legs::{self, DecodeLeg, PrefillLeg, reason};
use baton_tests::{Cluster, ClusterOptions, Role};
use prost::Message as _;
use reference::Reference;
use tokio::sync::Notify;
use tonic::Status;
use tonic::transport::Channel;

const LIMIT: Duration = Duration::from_secs(30);

/// Short, so that leases end within a test; heartbeats keep it on a busy machine.
const LEASE_MS: u64 = 4_000;

/// Within it whatever was granted comes back: a lease, the drain after it, and the look at it.
const IDLE: Duration = Duration::from_secs(15);

/// Nine whole blocks of 32 tokens and a tail.
const PROMPT: usize = 300;
const BLOCKS: u32 = 10;

const STORY: &str = "Everyone in the village knew the runner who carried letters over the pass, and nobody had ever seen her arrive out of breath. She \
    left before the sun rose, with the bag across her shoulder, and came back when the bells rang in the evening; in winter she wore two coats and \
    walked where others would not. One morning a stranger stood at the gate and asked whether she would take a single sheet of paper, unsealed, to \
    the other side. She read it, folded it twice, and said that she would.";

/// A prompt whose KV fits twice into a stream's window.
const SHORT_PROMPT: usize = 80;

/// A prompt longer than a connection's windows.
const LONG_PROMPT: usize = 1_000;

/// What every node must come to.
struct Known {
    identity: KvIdentity,
    prompt: Vec<u32>,
    answer: Vec<u32>,
    short_answer: Vec<u32>,
    long_prompt: Vec<u32>,
    long_answer: Vec<u32>,
}

static KNOWN: LazyLock<Known> = LazyLock::new(|| {
    let mut reference = Reference::open();
    let long_prompt = reference.prompt(&STORY.repeat(14), LONG_PROMPT);
    let long_answer = reference.run(&long_prompt, 2, None).ids;
    let prompt = long_prompt[..PROMPT].to_vec();
    let answer = reference.run(&prompt, 6, None).ids;
    let short_answer = reference.run(&prompt[..SHORT_PROMPT], 6, None).ids;
    Known {
        short_answer,
        identity: reference.engine.identity(),
        prompt,
        answer,
        long_prompt,
        long_answer,
    }
});

/// How KV travels.
#[derive(Clone, Copy, Debug)]
struct Wire {
    /// Flags of the prefill nodes, and of the decode node.
    args: [&'static [&'static str]; 2],
    transport: &'static str,
    /// Where KV itself passes between the nodes.
    slow: Option<Slow>,
    /// The proxy can look into it.
    plain: bool,
}

/// A link on which a test has time.
#[derive(Clone, Copy, Debug)]
struct Slow {
    /// Bytes that pass in a second.
    rate: u64,
    /// Of them, the bytes after which blocks are on their way, and more are to come.
    midway: u64,
}

const GRPC: Wire = Wire {
    args: [&[], &[]],
    transport: "grpc",
    slow: Some(Slow {
        rate: 2_500_000,
        midway: 1_000_000,
    }),
    plain: true,
};

/// Frames name blocks, and are so small that no rate holds them up: all of them lie in the sockets' buffers at once.
const SHM: Wire = Wire {
    transport: "shm",
    slow: None,
    ..GRPC
};

/// A node of the version before.
const OLDER: &[&str] = &["--protocol-max", "1"];

const FROM_VERSION_1: Wire = Wire {
    args: [OLDER, &[]],
    ..GRPC
};

const TO_VERSION_1: Wire = Wire {
    args: [&[], OLDER],
    ..GRPC
};

type Mangle = Box<dyn FnMut(pb::PushFrame) -> Vec<pb::PushFrame> + Send>;

/// Two prefill nodes, a decode node, and the proxy before it.
struct Bench {
    cluster: Cluster,
    wire: Wire,
    proxy: FaultProxy,
    mangle: Arc<Mutex<Option<Mangle>>>,
    /// Nothing is kept back.
    healed: Arc<AtomicBool>,
    requests: u128,
}

impl Bench {
    async fn start(wire: Wire) -> Self {
        let [prefill_args, decode_args] = wire
            .args
            .map(|args| args.iter().map(|arg| (*arg).to_owned()).collect::<Vec<String>>());
        let mut cluster = Cluster::start(ClusterOptions {
            prefill: 2,
            prefill_args: [prefill_args, vec!["--transport".to_owned(), wire.transport.to_owned()]].concat(),
            decode_args: [decode_args, vec!["--lease-ms".to_owned(), LEASE_MS.to_string()]].concat(),
            ..ClusterOptions::default()
        });
        let mangle: Arc<Mutex<Option<Mangle>>> = Arc::default();
        let proxy = if wire.plain {
            FaultProxy::mangling(frames(mangle.clone()))
        } else {
            FaultProxy::start()
        };
        proxy.forward(cluster.node(Role::Decode, 0).grpc);
        let mut bench = Self {
            cluster,
            wire,
            proxy,
            mangle,
            healed: Arc::default(),
            requests: 0,
        };
        bench.serves().await;
        bench
    }

    fn work(&mut self) -> pb::Work {
        self.requests += 1;
        legs::work(&KNOWN.identity, &KNOWN.prompt, KNOWN.answer.len() as u32, self.requests)
    }

    /// A connection to a node, as a router's.
    async fn node(&mut self, role: Role, index: usize) -> Channel {
        legs::plain(self.cluster.node(role, index).grpc).await
    }

    /// Reserves on the decode node, and has the prompt run on a prefill node, which pushes through the proxy.
    async fn begin(&mut self, work: &pb::Work, prefill: usize) -> (DecodeLeg, PrefillLeg) {
        let node = self.node(Role::Decode, 0).await;
        let decode = DecodeLeg::reserve(node, work).await.expect("room");
        let prefill = self.push(work, &decode.ticket, prefill).await;
        (decode, prefill)
    }

    async fn push(&mut self, work: &pb::Work, ticket: &pb::Ticket, prefill: usize) -> PrefillLeg {
        let ticket = pb::Ticket {
            address: self.proxy.address().to_string(),
            ..ticket.clone()
        };
        let node = self.node(Role::Prefill, prefill).await;
        PrefillLeg::run(node, work, ticket).await.expect("a leg")
    }

    /// The same until some blocks have travelled and others, or at least FINAL, have not: over a slow link, or with frames kept back.
    async fn midway(&mut self, work: &pb::Work, prefill: usize) -> (DecodeLeg, PrefillLeg) {
        let Some(slow) = self.wire.slow else {
            let begun = self.keep_back();
            let legs = self.begin(work, prefill).await;
            let begun = tokio::time::timeout(LIMIT, begun.notified()).await;
            begun.expect("blocks are on their way");
            return legs;
        };
        self.proxy.up().limit(slow.rate);
        let passed = self.proxy.up().passed();
        let legs = self.begin(work, prefill).await;
        self.proxy.up().wait_passed(passed + slow.midway, LIMIT).await;
        legs
    }

    /// Lets the next push's first frame of blocks through, and tells; keeps what follows it back, but for heartbeats, until all is healed. Then it goes on
    /// before the push's next frame, if there is one.
    fn keep_back(&self) -> Arc<Notify> {
        self.healed.store(false, Ordering::Release);
        let (begun, healed) = (Arc::new(Notify::new()), self.healed.clone());
        let (tell, mut kept, mut carried) = (begun.clone(), Vec::new(), false);
        self.mangle(move |frame| {
            if matches!(frame.frame, Some(Frame::Open(_))) {
                // Of another push.
                kept.clear();
            }
            if healed.load(Ordering::Acquire) {
                kept.push(frame);
                return std::mem::take(&mut kept);
            }
            if carried && !matches!(frame.frame, Some(Frame::Heartbeat(_))) {
                kept.push(frame);
                return Vec::new();
            }
            if carries(&frame) {
                carried = true;
                tell.notify_one();
            }
            vec![frame]
        });
        begun
    }

    /// Everything passes again, what was held or kept back first.
    fn heal(&self) {
        self.healed.store(true, Ordering::Release);
        self.proxy.heal();
    }

    /// Runs a request to its end, which is right.
    async fn right(&mut self, work: &pb::Work, prefill: usize) {
        let (decode, prefill) = self.begin(work, prefill).await;
        let (ids, done) = tokio::join!(decode.answer(), prefill.done());
        assert_eq!(ids.expect("an answer"), KNOWN.answer);
        assert_eq!(done.expect("a handoff").kv_blocks, BLOCKS);
    }

    fn mangle(&self, mangle: impl FnMut(pb::PushFrame) -> Vec<pb::PushFrame> + Send + 'static) {
        *self.mangle.lock().expect("a test that goes on") = Some(Box::new(mangle));
    }

    fn unmangle(&self) {
        *self.mangle.lock().expect("a test that goes on") = None;
    }

    /// All is well again: within a lease nothing is held, and requests are answered right.
    async fn serves(&mut self) {
        self.unmangle();
        self.heal();
        self.cluster.assert_idle(IDLE);
        for prefill in 0..2 {
            let work = self.work();
            self.right(&work, prefill).await;
        }
        self.cluster.assert_idle(IDLE);
    }
}

/// Gives the frames of pushes, and of nothing else, to whatever `mangle` holds.
fn frames(mangle: Arc<Mutex<Option<Mangle>>>) -> baton_tests::fault_proxy::Mangler {
    let mut pushes = std::collections::HashSet::new();
    Box::new(move |message: Message| {
        let frame = pb::PushFrame::decode(message.bytes.as_slice()).ok();
        if message.index == 0
            && matches!(&frame, Some(pb::PushFrame { frame: Some(Frame::Open(open)) }) if open.capability.len() == 32)
        {
            pushes.insert((message.connection, message.stream));
        }
        let mut mangle = mangle.lock().expect("a test that goes on");
        match (frame, mangle.as_mut()) {
            (Some(frame), Some(mangle)) if pushes.contains(&(message.connection, message.stream)) => {
                mangle(frame).iter().map(pb::PushFrame::encode_to_vec).collect()
            }
            _ => vec![message.bytes],
        }
    })
}

/// Whether the frame carries blocks.
fn carries(frame: &pb::PushFrame) -> bool {
    matches!(frame.frame, Some(Frame::Piece(_) | Frame::Pieces(_)))
}

/// Changes one bit of the blocks that the frame carries, or one block that it names.
fn flip(frame: &mut pb::PushFrame) {
    match &mut frame.frame {
        Some(Frame::Piece(piece)) => piece.data = flipped(&piece.data).collect(),
        Some(Frame::Pieces(pieces)) if pieces.data.is_empty() => pieces.runs[0].source_block ^= 1,
        Some(Frame::Pieces(pieces)) => pieces.data = flipped(&pieces.data).collect(),
        _ => {}
    }
}

fn flipped(data: &[u8]) -> impl Iterator<Item = u8> {
    let middle = data.len() / 2;
    data.iter()
        .enumerate()
        .map(move |(at, byte)| byte ^ (u8::from(at == middle) << 4))
}

/// The error's stable code is one of these.
#[track_caller]
fn failed<T>(result: Result<T, Status>, expected: &[&str]) -> Status {
    let Err(status) = result else {
        panic!("it ended well, not with one of {expected:?}");
    };
    let (reason, reject) = reason(&status);
    let code = reject.map_or(reason.clone(), |reject| format!("{reason}/{reject}"));
    assert!(
        expected.contains(&code.as_str()),
        "{code} is none of {expected:?}: {status:?}"
    );
    status
}

/// The sender dies while a block is on its way: the decode node knows at once, and another prefill node fills fresh slots for the same request.
async fn sender_killed(bench: &mut Bench) {
    let work = bench.work();
    let (decode, _prefill) = bench.midway(&work, 0).await;
    bench.cluster.node(Role::Prefill, 0).kill();
    failed(decode.answer().await, &["PEER_LOST"]);
    bench.heal();
    bench.right(&again(&work), 1).await;
    bench.cluster.restart(Role::Prefill, 0);
}

/// The sender stands still; the request is dispatched again, to another. Then the first goes on, and its late frames arrive: they change nothing.
async fn sender_stopped_and_continued(bench: &mut Bench) {
    let work = bench.work();
    let (decode, prefill) = bench.midway(&work, 0).await;
    // What the connection holds by now arrives only at the end.
    bench.proxy.up().hold();
    bench.cluster.node(Role::Prefill, 0).stop();
    let next = again(&work);
    let fresh = DecodeLeg::reserve(bench.node(Role::Decode, 0).await, &next)
        .await
        .expect("room");
    failed(decode.answer().await, &["SUPERSEDED"]);
    let slots = |ticket: &pb::Ticket| -> Vec<u32> { ticket.slots.iter().map(|slot| slot.block).collect() };
    assert_eq!(slots(&fresh.ticket).len(), BLOCKS as usize);
    // Straight to the node: the proxy holds everything back.
    let node = bench.node(Role::Prefill, 1).await;
    let other = PrefillLeg::run(node, &next, fresh.ticket.clone()).await.expect("a leg");
    let (ids, done) = tokio::join!(fresh.answer(), other.done());
    assert_eq!(ids.expect("an answer"), KNOWN.answer);
    done.expect("a handoff");
    bench.heal();
    bench.cluster.node(Role::Prefill, 0).resume();
    failed(
        prefill.done().await,
        &[
            "HANDOFF_REJECTED/ABORTED",
            "PEER_LOST",
            "LEASE_ENDED",
            "PEER_UNREACHABLE",
        ],
    );
}

/// The link is cut without a word: both ends give up by themselves when the lease has ended. What was held back arrives later, and changes nothing.
async fn lease_ends_in_flight(bench: &mut Bench) {
    let work = bench.work();
    let (decode, prefill) = bench.midway(&work, 0).await;
    bench.proxy.cut();
    let (decode, prefill) = tokio::join!(decode.answer(), prefill.done());
    failed(decode, &["LEASE_ENDED"]);
    failed(prefill, &["LEASE_ENDED"]);
    bench.cluster.assert_idle(IDLE);
}

/// The connection breaks: both ends know.
async fn connection_reset(bench: &mut Bench) {
    let work = bench.work();
    let (decode, prefill) = bench.midway(&work, 0).await;
    bench.proxy.reset();
    let (decode, prefill) = tokio::join!(decode.answer(), prefill.done());
    failed(decode, &["PEER_LOST"]);
    failed(prefill, &["PEER_LOST"]);
}

/// The decode node dies: the prefill node knows, and holds nothing. A ticket of its former life is refused.
async fn receiver_killed(bench: &mut Bench) {
    let work = bench.work();
    let (decode, prefill) = bench.midway(&work, 0).await;
    let old = decode.ticket.clone();
    bench.cluster.node(Role::Decode, 0).kill();
    failed(
        decode.answer().await,
        &["Unknown", "Unavailable", "Cancelled", "Internal"],
    );
    failed(prefill.done().await, &["PEER_LOST"]);
    bench.heal();
    bench.cluster.restart(Role::Decode, 0);
    let late = bench.push(&work, &old, 1).await;
    failed(late.done().await, &["HANDOFF_REJECTED/STALE_EPOCH"]);
}

/// Both die and come back.
async fn both_restarted(bench: &mut Bench) {
    let work = bench.work();
    let (decode, prefill) = bench.midway(&work, 0).await;
    bench.cluster.node(Role::Prefill, 0).kill();
    bench.cluster.node(Role::Decode, 0).kill();
    drop((decode, prefill));
    bench.heal();
    bench.cluster.restart(Role::Prefill, 0);
    bench.cluster.restart(Role::Decode, 0);
}

/// The client goes away while frames land.
async fn abort_while_frames_land(bench: &mut Bench) {
    let work = bench.work();
    let legs = bench.midway(&work, 0).await;
    drop(legs);
    // The link is still slow: blocks come back at once all the same.
    bench.cluster.assert_idle(IDLE);
}

/// No reservation passes where the pool is full, and what is under way goes on.
async fn full_pool(bench: &mut Bench) {
    let work = bench.work();
    let (decode, prefill) = bench.midway(&work, 0).await;
    let node = bench.node(Role::Decode, 0).await;
    let big: Vec<u32> = (0..8_000).map(|token| 300 + token * 7 % 4_000).collect();
    let mut held = Vec::new();
    let refused = loop {
        bench.requests += 1;
        let work = legs::work(&KNOWN.identity, &big, 2, bench.requests);
        match DecodeLeg::reserve(node.clone(), &work).await {
            Ok(leg) => held.push(leg),
            Err(status) => break status,
        }
        assert!(held.len() < 10, "the pool has an end");
    };
    let refused = failed::<()>(Err(refused), &["KV_EXHAUSTED"]);
    assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
    bench.heal();
    let (ids, done) = tokio::join!(decode.answer(), prefill.done());
    assert_eq!(ids.expect("an answer"), KNOWN.answer);
    done.expect("a handoff");
}

/// A link so slow that the transfer outlasts the lease, though not so slow that what is under way at a time does: the lease is kept.
async fn slow_link(bench: &mut Bench) {
    let (prompt, answer) = (&KNOWN.long_prompt, &KNOWN.long_answer);
    bench.requests += 1;
    let work = legs::work(&KNOWN.identity, prompt, answer.len() as u32, bench.requests);
    bench.proxy.up().limit(4_200_000);
    bench.proxy.up().delay(Duration::from_millis(100));
    bench.proxy.down().delay(Duration::from_millis(100));
    let (decode, prefill) = bench.begin(&work, 0).await;
    let (ids, done) = tokio::join!(decode.answer(), prefill.done());
    assert_eq!(&ids.expect("an answer"), answer);
    done.expect("a handoff");
}

/// Any byte of the connection may be wrong: the answer is right, or there is none.
async fn corrupt_anywhere(bench: &mut Bench) {
    for bytes in [200_003, 1_000_003] {
        let work = bench.work();
        bench.proxy.up().corrupt_every(bytes);
        let (decode, prefill) = bench.begin(&work, 0).await;
        let (ids, _) = tokio::join!(decode.answer(), prefill.done());
        if let Ok(ids) = ids {
            assert_eq!(ids, KNOWN.answer);
        }
        bench.heal();
        bench.cluster.assert_idle(IDLE);
    }
}

/// A block that arrives corrupt is sent once more; one that arrives corrupt twice is never decoded.
async fn corrupt_blocks(bench: &mut Bench) {
    let mut flipped = 0;
    bench.mangle(move |mut frame| {
        if carries(&frame) && flipped < 2 {
            flip(&mut frame);
            flipped += 1;
        }
        vec![frame]
    });
    let work = bench.work();
    bench.right(&work, 0).await;

    bench.mangle(|mut frame| {
        flip(&mut frame);
        vec![frame]
    });
    let work = bench.work();
    let (decode, prefill) = bench.begin(&work, 0).await;
    let (decode, prefill) = tokio::join!(decode.answer(), prefill.done());
    failed(decode, &["HANDOFF_REJECTED/CHECKSUM_MISMATCH"]);
    failed(prefill, &["HANDOFF_REJECTED/CHECKSUM_MISMATCH"]);
}

/// Frames that come twice, in another order, or behind the last one.
async fn repeated_and_swapped(bench: &mut Bench) {
    // What is invented takes room in the decode node's window of which the sender knows nothing: all of it fits in, however slowly it is read.
    bench.mangle(|frame| {
        let times = 1 + usize::from(carries(&frame));
        vec![frame; times]
    });
    let (prompt, answer) = (&KNOWN.prompt[..SHORT_PROMPT], &KNOWN.short_answer);
    bench.requests += 1;
    let work = legs::work(&KNOWN.identity, prompt, answer.len() as u32, bench.requests);
    let (decode, prefill) = bench.begin(&work, 0).await;
    let (ids, done) = tokio::join!(decode.answer(), prefill.done());
    assert_eq!(&ids.expect("an answer"), answer);
    assert!(2 * done.expect("a handoff").kv_bytes <= u64::from(baton_transfer::limits::STREAM_WINDOW_BYTES));

    let mut kept: Option<pb::PushFrame> = None;
    bench.mangle(move |frame| match &frame.frame {
        Some(Frame::Final(_)) => [Some(frame), kept.take()].into_iter().flatten().collect(),
        _ if carries(&frame) => kept.replace(frame).into_iter().collect(),
        _ => vec![frame],
    });
    let work = bench.work();
    bench.right(&work, 0).await;
}

/// A frame that never comes: the request's deadline ends it, at whichever end it is noticed first.
async fn lost_frame(bench: &mut Bench) {
    let mut lost = false;
    bench.mangle(move |frame| {
        if carries(&frame) && !std::mem::replace(&mut lost, true) {
            return Vec::new();
        }
        vec![frame]
    });
    let work = pb::Work {
        deadline_ms: 4_000,
        ..bench.work()
    };
    let (decode, prefill) = bench.begin(&work, 0).await;
    let (decode, prefill) = tokio::join!(decode.answer(), prefill.done());
    failed(decode, &["DEADLINE", "LEASE_ENDED", "PEER_LOST"]);
    // (The decode node's leg, whose deadline it is, too, cancels.)
    failed(
        prefill,
        &[
            "DEADLINE",
            "LEASE_ENDED",
            "HANDOFF_REJECTED/LEASE_ENDED",
            "HANDOFF_REJECTED/ABORTED",
        ],
    );
}

/// A sender that speaks a version which the decode node does not: it is refused, and the reservation is still there for another.
async fn other_version(bench: &mut Bench) {
    bench.mangle(|mut frame| {
        if let Some(Frame::Open(open)) = &mut frame.frame {
            open.protocol = 99;
        }
        vec![frame]
    });
    let work = bench.work();
    let (decode, prefill) = bench.begin(&work, 0).await;
    failed(prefill.done().await, &["HANDOFF_REJECTED/PROTOCOL_MISMATCH"]);
    bench.unmangle();
    let prefill = bench.push(&work, &decode.ticket, 1).await;
    let (ids, done) = tokio::join!(decode.answer(), prefill.done());
    assert_eq!(ids.expect("an answer"), KNOWN.answer);
    done.expect("a handoff");
}

/// The same request, dispatched once more.
fn again(work: &pb::Work) -> pb::Work {
    pb::Work {
        attempt: work.attempt + 1,
        ..work.clone()
    }
}

/// One mishap after the other.
macro_rules! conforms {
    ($bench:ident: $($mishap:ident),+ $(,)?) => {
        $(
            $mishap(&mut $bench).await;
            $bench.serves().await;
        )+
    };
}

async fn conformance(wire: Wire) {
    let mut bench = Bench::start(wire).await;
    for line in ["a node was lost", "push refused"] {
        bench.cluster.allow(line);
    }
    conforms!(bench:
        sender_killed,
        sender_stopped_and_continued,
        lease_ends_in_flight,
        connection_reset,
        receiver_killed,
        both_restarted,
        abort_while_frames_land,
        full_pool,
    );
    // Over shared memory no KV is on the link, so that nothing outlasts a lease there, and next to nothing but what opens a push could be corrupt.
    if wire.slow.is_some() {
        conforms!(bench: slow_link, corrupt_anywhere);
    }
    if wire.plain {
        conforms!(bench: corrupt_blocks, repeated_and_swapped, lost_frame, other_version);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn over_grpc() {
    conformance(GRPC).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn over_shared_memory() {
    conformance(SHM).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn from_a_node_of_version_1() {
    conformance(FROM_VERSION_1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn to_a_node_of_version_1() {
    conformance(TO_VERSION_1).await;
}
