//! What a decode node does with pushes that no prefill node of ours would send: forged, stale, truncated, oversized, or no gRPC at all. A frame that is
//! refused changes nothing: where the push was never accepted, the rightful one still is; where it was, nothing of it is ever decoded.

mod reference;

use std::convert::Infallible;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use baton_kv::{BlockName, ChecksumState, KvDtype, KvIdentity, KvLayout, name_blocks};
use baton_proto::node::v1::{self as pb, handoff_client::HandoffClient, push_frame::Frame, push_reply::Reply};
use baton_tests::legs::{self, DecodeLeg, reason};
use baton_tests::{Cluster, ClusterOptions, Role, client};
use baton_transfer::limits;
use http_body_util::{BodyExt, StreamBody};
use prost::Message;
use reference::Reference;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::client::GrpcService;
use tonic::codegen::{Bytes, http};
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};

const LIMIT: Duration = Duration::from_secs(30);
const IDLE: Duration = Duration::from_secs(15);

/// One whole block and a tail of eight.
const PROMPT: usize = 40;
const SLOTS: usize = 2;

/// What the decode node may take for all of it together, beyond what it has: far below what a lying length field names.
const MEMORY: u64 = 256 << 20;

/// The decode node under test.
struct Target {
    cluster: Cluster,
    identity: KvIdentity,
    prompt: Vec<u32>,
    requests: u128,
}

/// A reservation, and what its rightful push is made of. The KV itself is zeros.
struct Invited {
    leg: DecodeLeg,
    address: SocketAddr,
    open: pb::PushOpen,
    pieces: Vec<pb::Piece>,
    last: pb::Final,
}

impl Target {
    async fn invite(&mut self) -> Invited {
        self.requests += 1;
        let work = legs::work(&self.identity, &self.prompt, 3, self.requests);
        let address = self.cluster.node(Role::Decode, 0).grpc;
        let leg = DecodeLeg::reserve(legs::plain(address).await, &work)
            .await
            .expect("room");
        let ticket = &leg.ticket;
        assert_eq!(ticket.slots.len(), SLOTS);
        let layout = layout(ticket.layout.as_ref().expect("a layout"));
        let names = name_blocks(
            BlockName::from_slice(&work.root).expect("a name"),
            &self.prompt,
            layout.block_tokens,
        );
        let mut pieces = Vec::new();
        let mut manifest = Vec::new();
        for (slot, granted) in ticket.slots.iter().enumerate() {
            let valid_tokens = layout.block_tokens.min(PROMPT - slot * layout.block_tokens);
            let data = vec![0; layout.valid_bytes(valid_tokens)];
            let mut sum = ChecksumState::default();
            sum.update(&data);
            manifest.push(pb::ManifestEntry {
                name: names.get(slot).map(|name| name.0.to_vec()).unwrap_or_default(),
                valid_tokens: valid_tokens as u32,
                checksum: sum.finish().0,
            });
            pieces.push(pb::Piece {
                slot: slot as u32,
                generation: granted.generation,
                first_layer: 0,
                layers: layout.layers as u32,
                valid_tokens: valid_tokens as u32,
                data: data.into(),
            });
        }
        Invited {
            address,
            open: pb::PushOpen {
                protocol: 1,
                sender_epoch: vec![7; 16],
                request_id: ticket.request_id.clone(),
                attempt: ticket.attempt,
                epoch: ticket.epoch.clone(),
                handoff_id: ticket.handoff_id,
                capability: ticket.capability.clone(),
                kv_identity: ticket.kv_identity.clone(),
                layout: ticket.layout.clone(),
                sender_node: "forger".to_owned(),
                ..pb::PushOpen::default()
            },
            pieces,
            last: pb::Final {
                manifest,
                first_token: 5,
                logprob: -1.0,
                ..pb::Final::default()
            },
            leg,
        }
    }
}

impl Invited {
    /// The rightful push.
    fn frames(&self) -> Vec<Frame> {
        let mut frames = vec![Frame::Open(self.open.clone())];
        frames.extend(self.pieces.iter().cloned().map(Frame::Piece));
        frames.push(Frame::Final(self.last.clone()));
        frames
    }

    /// The same in version 2: all slots in one frame.
    fn frames_in_runs(&self) -> Vec<Frame> {
        let run = |piece: &pb::Piece| pb::PieceRun {
            slot: piece.slot,
            generation: piece.generation,
            first_layer: piece.first_layer,
            layers: piece.layers,
            valid_tokens: piece.valid_tokens,
            source_block: 0,
        };
        let open = pb::PushOpen {
            protocol: 2,
            ..self.open.clone()
        };
        let pieces = pb::Pieces {
            runs: self.pieces.iter().map(run).collect(),
            data: self.pieces.iter().flat_map(|piece| piece.data.clone()).collect(),
        };
        let mut first = ChecksumState::default();
        first.update(&self.last.first_token.to_le_bytes());
        first.update(&self.last.logprob.to_le_bytes());
        let last = pb::Final {
            first_checksum: first.finish().0,
            ..self.last.clone()
        };
        vec![Frame::Open(open), Frame::Pieces(pieces), Frame::Final(last)]
    }

    async fn push(&self, frames: Vec<Frame>) -> Push {
        Push::start(self.address, frames).await
    }
}

/// A push by hand.
struct Push {
    frames: mpsc::Sender<pb::PushFrame>,
    replies: Streaming<pb::PushReply>,
}

impl Push {
    async fn start(address: SocketAddr, frames: Vec<Frame>) -> Self {
        let mut client = HandoffClient::connect(format!("http://{address}"))
            .await
            .expect("the decode node listens");
        let (sender, outgoing) = mpsc::channel(128);
        for frame in frames {
            sender.try_send(pb::PushFrame { frame: Some(frame) }).expect("room");
        }
        let replies = client.push(Request::new(ReceiverStream::new(outgoing)));
        let replies = replies.await.expect("a stream").into_inner();
        Self {
            frames: sender,
            replies,
        }
    }

    async fn send(&self, frame: Frame) {
        let frame = pb::PushFrame { frame: Some(frame) };
        self.frames.send(frame).await.expect("the stream is open");
    }

    async fn reply(&mut self) -> Option<Reply> {
        let reply = tokio::time::timeout(LIMIT, self.replies.message());
        // A stream that is cut short is over, like one that ends.
        reply.await.expect("a reply in time").ok().flatten()?.reply
    }

    /// The verdict: `VERIFIED`, `RESEND`, a refusal's code, or `ENDED`.
    async fn verdict(&mut self) -> String {
        loop {
            return match self.reply().await {
                Some(Reply::Accepted(_) | Reply::Renewed(_)) => continue,
                Some(Reply::Verified(_)) => "VERIFIED".to_owned(),
                Some(Reply::Resend(_)) => "RESEND".to_owned(),
                Some(Reply::Rejected(rejected)) => rejected.code,
                None => "ENDED".to_owned(),
            };
        }
    }
}

fn layout(layout: &pb::KvLayout) -> KvLayout {
    KvLayout {
        layers: layout.layers as usize,
        heads: layout.heads as usize,
        head_dim: layout.head_dim as usize,
        block_tokens: layout.block_tokens as usize,
        dtype: KvDtype::Bf16,
    }
}

/// Pushes that are refused as they open: the rightful one is accepted after them.
async fn never_accepted(target: &mut Target) {
    type Forge = fn(&mut pb::PushOpen);
    let opens: [(&str, Forge, &str); 14] = [
        ("another life", |open| open.epoch[0] ^= 1, "STALE_EPOCH"),
        ("a short epoch", |open| open.epoch.truncate(15), "MALFORMED"),
        ("no such handoff", |open| open.handoff_id += 1_000, "UNKNOWN_HANDOFF"),
        ("another attempt", |open| open.attempt += 1, "UNKNOWN_HANDOFF"),
        ("another request", |open| open.request_id[15] ^= 1, "UNKNOWN_HANDOFF"),
        ("a guess", |open| open.capability = vec![0; 32], "BAD_CAPABILITY"),
        ("almost", |open| open.capability[31] ^= 0x80, "BAD_CAPABILITY"),
        ("a prefix of it", |open| open.capability.truncate(31), "MALFORMED"),
        ("other KV", |open| open.kv_identity[0] ^= 1, "IDENTITY_MISMATCH"),
        ("other shapes", |open| shape(open).layers += 1, "LAYOUT_MISMATCH"),
        ("absurd shapes", |open| shape(open).heads = u32::MAX, "MALFORMED"),
        (
            "an unknown type",
            |open| shape(open).dtype = "f8".to_owned(),
            "MALFORMED",
        ),
        ("no version", |open| open.protocol = 0, "PROTOCOL_MISMATCH"),
        ("a later version", |open| open.protocol = 99, "PROTOCOL_MISMATCH"),
    ];
    let invited = target.invite().await;
    for (what, forge, expected) in opens {
        let mut frames = invited.frames();
        if let Frame::Open(open) = &mut frames[0] {
            forge(open);
        }
        assert_eq!(invited.push(frames).await.verdict().await, expected, "{what}");
    }
    let no_open = [
        Frame::Heartbeat(pb::Heartbeat {}),
        Frame::Piece(invited.pieces[0].clone()),
        Frame::Final(invited.last.clone()),
    ];
    for first in no_open {
        let verdict = invited.push(vec![first]).await.verdict().await;
        assert_eq!(verdict, "MALFORMED", "no OPEN first");
    }
    rightful(invited).await;
}

/// The push that was invited, and the answer after it.
async fn rightful(invited: Invited) {
    assert_eq!(invited.push(invited.frames()).await.verdict().await, "VERIFIED");
    let answer = invited.leg.answer().await.expect("an answer");
    assert_eq!((answer.len(), answer[0]), (3, invited.last.first_token));
}

fn shape(open: &mut pb::PushOpen) -> &mut pb::KvLayout {
    open.layout.as_mut().expect("a layout")
}

/// Frames that end an accepted push: its handoff comes to nothing, and its client hears why.
async fn refused_later(target: &mut Target) {
    type Forge = fn(&mut Vec<Frame>);
    let pushes: [(&str, Forge, &str); 19] = [
        ("an old generation", |f| piece(f).generation -= 1, "STALE_GENERATION"),
        ("a later generation", |f| piece(f).generation += 1, "STALE_GENERATION"),
        ("no such slot", |f| piece(f).slot = SLOTS as u32, "MALFORMED"),
        ("a slot far out", |f| piece(f).slot = u32::MAX, "MALFORMED"),
        ("no layers", |f| piece(f).layers = 0, "MALFORMED"),
        ("layers that are not", |f| piece(f).first_layer = 1, "MALFORMED"),
        ("layers that overflow", |f| piece(f).first_layer = u32::MAX, "MALFORMED"),
        ("fewer tokens", |f| piece(f).valid_tokens -= 1, "MALFORMED"),
        ("more tokens", |f| piece(f).valid_tokens = u32::MAX, "MALFORMED"),
        ("truncated", |f| drop(piece(f).data.split_off(1_000)), "MALFORMED"),
        ("no bytes", |f| piece(f).data.clear(), "MALFORMED"),
        ("overlapping layers", overlap, "MALFORMED"),
        ("a second OPEN", |f| f.insert(1, f[0].clone()), "MALFORMED"),
        (
            "a short manifest",
            |f| drop(last(f).manifest.pop()),
            "MANIFEST_MISMATCH",
        ),
        (
            "another name",
            |f| last(f).manifest[0].name[0] ^= 1,
            "MANIFEST_MISMATCH",
        ),
        (
            "a named tail",
            |f| last(f).manifest[1].name = vec![1; 32],
            "MANIFEST_MISMATCH",
        ),
        ("no such token", |f| last(f).first_token = u32::MAX, "MALFORMED"),
        ("no number", |f| last(f).logprob = f32::NAN, "MALFORMED"),
        (
            "too many alternatives",
            |f| last(f).alternatives = vec![pb::Alternative::default(); 21],
            "MALFORMED",
        ),
    ];
    for (what, forge, expected) in pushes {
        let invited = target.invite().await;
        let mut frames = invited.frames();
        forge(&mut frames);
        refused(invited, frames, what, expected).await;
    }
}

/// The push is refused, and with it the request.
async fn refused(invited: Invited, frames: Vec<Frame>, what: &str, expected: &str) {
    assert_eq!(invited.push(frames).await.verdict().await, expected, "{what}");
    let status = invited.leg.answer().await.expect_err("nothing is decoded");
    let refused = ("HANDOFF_REJECTED".to_owned(), Some(expected.to_owned()));
    assert_eq!(reason(&status), refused, "{what}");
}

/// Frames of several runs. One run that is wrong refuses its whole frame.
async fn refused_runs(target: &mut Target) {
    type Forge = fn(&mut Vec<Frame>);
    let pushes: [(&str, Forge, &str); 22] = [
        ("no runs", |f| runs(f).clear(), "MALFORMED"),
        ("nothing at all", |f| *pieces(f) = pb::Pieces::default(), "MALFORMED"),
        ("an old generation", |f| runs(f)[1].generation -= 1, "STALE_GENERATION"),
        ("no such slot", |f| runs(f)[1].slot = SLOTS as u32, "MALFORMED"),
        ("a slot far out", |f| runs(f)[1].slot = u32::MAX, "MALFORMED"),
        ("no layers", |f| runs(f)[1].layers = 0, "MALFORMED"),
        ("layers that are not", |f| runs(f)[1].first_layer = 1, "MALFORMED"),
        ("layers without end", |f| runs(f)[1].layers = u32::MAX, "MALFORMED"),
        (
            "layers that overflow",
            |f| runs(f)[1].first_layer = u32::MAX,
            "MALFORMED",
        ),
        ("fewer tokens", |f| runs(f)[1].valid_tokens -= 1, "MALFORMED"),
        ("more tokens", |f| runs(f)[1].valid_tokens = u32::MAX, "MALFORMED"),
        ("truncated", |f| drop(cut(f, 1)), "MALFORMED"),
        ("a byte too many", |f| lengthen(f, 1), "MALFORMED"),
        ("a run without its bytes", |f| repeat(f, 0, 1), "MALFORMED"),
        ("overlapping runs", |f| overlapping_runs(f), "MALFORMED"),
        ("too many runs", |f| repeat(f, 0, limits::FRAME_RUNS), "MALFORMED"),
        ("far too many", |f| repeat(f, 0, 150_000), "MALFORMED"),
        ("a block of whose memory?", |f| named_not_sent(f), "MALFORMED"),
        (
            "a frame of version 1",
            |f| f[1] = Frame::Piece(one_piece(f)),
            "MALFORMED",
        ),
        ("runs in version 1", |f| open(f).protocol = 1, "MALFORMED"),
        ("a changed first token", |f| last(f).first_token ^= 1, "MALFORMED"),
        ("a changed log-probability", |f| last(f).logprob = -1.5, "MALFORMED"),
    ];
    for (what, forge, expected) in pushes {
        let invited = target.invite().await;
        let mut frames = invited.frames_in_runs();
        forge(&mut frames);
        refused(invited, frames, what, expected).await;
    }

    // Refused as they open.
    let invited = target.invite().await;
    for (transport, expected) in [("shm", "POOL_NOT_MAPPED"), ("rdma", "MALFORMED")] {
        let mut frames = invited.frames_in_runs();
        open(&mut frames).transport = transport.to_owned();
        assert_eq!(invited.push(frames).await.verdict().await, expected, "{transport}");
    }
    rightful(invited).await;
}

/// Runs that are odd, and fine.
async fn odd_runs(target: &mut Target) {
    type Forge = fn(&mut Vec<Frame>);
    let pushes: [(&str, Forge); 4] = [
        ("as it should be", |_| {}),
        ("a block that is named as well", |f| runs(f)[0].source_block = u32::MAX),
        // The first of them counts.
        ("a run twice, with other bytes", |f| {
            repeat(f, 1, 1);
            let bytes = tail_bytes(f);
            lengthen(f, bytes);
        }),
        ("the frame twice", |f| f.insert(1, f[1].clone())),
    ];
    let mut answers = Vec::new();
    for (what, forge) in pushes {
        let invited = target.invite().await;
        let mut frames = invited.frames_in_runs();
        forge(&mut frames);
        assert_eq!(invited.push(frames).await.verdict().await, "VERIFIED", "{what}");
        answers.push(invited.leg.answer().await.expect("an answer"));
        assert_eq!(answers[0], answers[answers.len() - 1], "{what}");
    }
}

/// OPEN.
fn open(frames: &mut [Frame]) -> &mut pb::PushOpen {
    match &mut frames[0] {
        Frame::Open(open) => open,
        other => panic!("{other:?} is not OPEN"),
    }
}

/// The first frame of runs.
fn pieces(frames: &mut [Frame]) -> &mut pb::Pieces {
    match &mut frames[1] {
        Frame::Pieces(pieces) => pieces,
        other => panic!("{other:?} has no runs"),
    }
}

fn runs(frames: &mut [Frame]) -> &mut Vec<pb::PieceRun> {
    &mut pieces(frames).runs
}

/// Takes the last bytes away.
fn cut(frames: &mut [Frame], bytes: usize) -> Bytes {
    let data = &mut pieces(frames).data;
    data.split_off(data.len() - bytes)
}

/// Adds bytes that are none of the KV.
fn lengthen(frames: &mut [Frame], bytes: usize) {
    let data = &mut pieces(frames).data;
    *data = [&data[..], &vec![0xa5; bytes]].concat().into();
}

/// A run's header so many times more, behind the others.
fn repeat(frames: &mut [Frame], run: usize, times: usize) {
    let runs = runs(frames);
    let again = runs[run];
    runs.extend(std::iter::repeat_n(again, times));
}

/// Of the last slot.
fn tail_bytes(frames: &mut [Frame]) -> usize {
    let pieces = pieces(frames);
    let tokens: u32 = pieces.runs.iter().take(SLOTS).map(|run| run.valid_tokens).sum();
    pieces.data.len() / tokens as usize * pieces.runs[SLOTS - 1].valid_tokens as usize
}

/// Of the last slot all layers but the first, and then all but the last.
fn overlapping_runs(frames: &mut [Frame]) {
    let layers = runs(frames)[1].layers;
    let layer = tail_bytes(frames) / layers as usize;
    runs(frames)[1].first_layer = 1;
    runs(frames)[1].layers = layers - 1;
    let low = pb::PieceRun {
        first_layer: 0,
        ..runs(frames)[1]
    };
    runs(frames).push(low);
    let bytes = (layers as usize - 2) * layer;
    lengthen(frames, bytes);
}

/// As over shared memory.
fn named_not_sent(frames: &mut [Frame]) {
    let pieces = pieces(frames);
    pieces.data.clear();
    for run in &mut pieces.runs {
        run.source_block = 3;
    }
}

/// Slot 0 as version 1 sends it.
fn one_piece(frames: &mut [Frame]) -> pb::Piece {
    let tail = tail_bytes(frames);
    let pieces = pieces(frames);
    let run = pieces.runs[0];
    pb::Piece {
        slot: run.slot,
        generation: run.generation,
        first_layer: run.first_layer,
        layers: run.layers,
        valid_tokens: run.valid_tokens,
        data: pieces.data.slice(..pieces.data.len() - tail),
    }
}

/// The first piece.
fn piece(frames: &mut [Frame]) -> &mut pb::Piece {
    match &mut frames[1] {
        Frame::Piece(piece) => piece,
        other => panic!("{other:?} is no piece"),
    }
}

/// FINAL.
fn last(frames: &mut [Frame]) -> &mut pb::Final {
    match frames.last_mut() {
        Some(Frame::Final(last)) => last,
        other => panic!("{other:?} is not FINAL"),
    }
}

/// All layers but the last, and then all layers but the first.
fn overlap(frames: &mut Vec<Frame>) {
    let whole = piece(frames).clone();
    let layer = whole.data.len() / whole.layers as usize;
    let layers = whole.layers - 1;
    let front = pb::Piece {
        layers,
        data: whole.data.slice(..whole.data.len() - layer),
        ..whole.clone()
    };
    let back = pb::Piece {
        first_layer: 1,
        layers,
        data: whole.data.slice(layer..),
        ..whole
    };
    frames.splice(1..2, [Frame::Piece(front), Frame::Piece(back)]);
}

/// Frames that are odd, and fine: they are verified, and answered.
async fn odd_and_fine(target: &mut Target) {
    // FINAL first; every piece twice, the last slot's first; layer by layer.
    let invited = target.invite().await;
    let mut frames = invited.frames();
    frames[1..].reverse();
    frames.extend(frames[2..].to_vec());
    assert_eq!(invited.push(frames).await.verdict().await, "VERIFIED");
    assert_eq!(invited.leg.answer().await.expect("an answer").len(), 3);

    let invited = target.invite().await;
    let mut frames = invited.frames();
    let layers = invited.pieces.iter().flat_map(|piece| {
        let layer = piece.data.len() / piece.layers as usize;
        (0..piece.layers).rev().map(move |first_layer| {
            Frame::Piece(pb::Piece {
                first_layer,
                layers: 1,
                data: piece
                    .data
                    .slice(first_layer as usize * layer..(first_layer as usize + 1) * layer),
                ..piece.clone()
            })
        })
    });
    frames.splice(1..=SLOTS, layers);
    assert_eq!(invited.push(frames).await.verdict().await, "VERIFIED");
    assert_eq!(invited.leg.answer().await.expect("an answer").len(), 3);
}

/// A wrong checksum is asked for again, once.
async fn wrong_checksums(target: &mut Target) {
    let invited = target.invite().await;
    let mut wrong = invited.frames();
    last(&mut wrong).manifest[1].checksum ^= 1;
    let mut push = invited.push(wrong.clone()).await;
    assert_eq!(push.verdict().await, "RESEND");
    push.send(wrong[2].clone()).await;
    push.send(Frame::Final(invited.last.clone())).await;
    assert_eq!(push.verdict().await, "VERIFIED");
    assert_eq!(invited.leg.answer().await.expect("an answer").len(), 3);

    let invited = target.invite().await;
    let mut wrong = invited.frames();
    last(&mut wrong).manifest[1].checksum ^= 1;
    let mut push = invited.push(wrong.clone()).await;
    assert_eq!(push.verdict().await, "RESEND");
    push.send(wrong[2].clone()).await;
    push.send(wrong[3].clone()).await;
    assert_eq!(push.verdict().await, "CHECKSUM_MISMATCH");
    let status = invited.leg.answer().await.expect_err("nothing is decoded");
    assert_eq!(reason(&status).1.as_deref(), Some("CHECKSUM_MISMATCH"));
}

/// Two streams for one ticket; a push that is replayed whole; one that ends too early.
async fn replayed_and_cut_short(target: &mut Target) {
    let invited = target.invite().await;
    let mut frames = invited.frames();
    let rest = frames.split_off(2);
    let mut first = invited.push(frames).await;
    assert!(matches!(first.reply().await, Some(Reply::Accepted(_))));
    assert_eq!(invited.push(invited.frames()).await.verdict().await, "STREAM_ACTIVE");
    for frame in rest {
        first.send(frame).await;
    }
    assert_eq!(first.verdict().await, "VERIFIED");
    assert_eq!(invited.push(invited.frames()).await.verdict().await, "UNKNOWN_HANDOFF");
    let replay = invited.frames();
    let address = invited.address;
    assert_eq!(invited.leg.answer().await.expect("an answer").len(), 3);
    let verdict = Push::start(address, replay).await.verdict().await;
    assert_eq!(verdict, "UNKNOWN_HANDOFF", "after the answer's end");

    let invited = target.invite().await;
    let mut frames = invited.frames();
    frames.truncate(2);
    let mut push = invited.push(frames).await;
    assert!(matches!(push.reply().await, Some(Reply::Accepted(_))));
    drop(push);
    let status = invited.leg.answer().await.expect_err("nothing is decoded");
    assert_eq!(reason(&status).0, "PEER_LOST");
}

/// Bytes that are no gRPC messages, on a stream of their own and on one that was accepted. Each ends its stream, at once.
async fn no_messages(target: &mut Target) {
    let node = target.cluster.node(Role::Decode, 0);
    let (address, id) = (node.grpc, node.id());
    let before = resident(id);
    let channel = Channel::from_shared(format!("http://{address}")).expect("an address");
    let channel = channel.connect().await.expect("the decode node listens");
    let too_long = ((4 << 20) + (64 << 10) + 1_u32).to_be_bytes();
    let prefix = |flag: u8, length: [u8; 4], rest: &[u8]| [&[flag], &length[..], rest].concat();
    let bad = [
        ("4 GiB", prefix(0, [0xff; 4], &[0; 1_000])),
        ("just too long", prefix(0, too_long, &[0; 1_000])),
        ("compressed with what?", prefix(1, [0, 0, 0, 4], &[1, 2, 3, 4])),
        ("no such flag", prefix(9, [0, 0, 0, 4], &[1, 2, 3, 4])),
        ("no protobuf", prefix(0, [0, 0, 0, 4], &[0xff; 4])),
        (
            "a field that never ends",
            prefix(0, [0, 0, 0, 6], &[0x12, 0xff, 0xff, 0xff, 0xff, 0x0f]),
        ),
    ];
    for (what, bytes) in &bad {
        raw_push(channel.clone(), what, bytes.clone()).await;
    }
    for (what, bytes) in &bad {
        let invited = target.invite().await;
        let open = Frame::Open(invited.open.clone());
        let open = pb::PushFrame { frame: Some(open) }.encode_to_vec();
        let open = prefix(0, (open.len() as u32).to_be_bytes(), &open);
        raw_push(channel.clone(), what, [open, bytes.clone()].concat()).await;
        let status = invited.leg.answer().await.expect_err("nothing is decoded");
        let code = reason(&status);
        let known = ["PEER_LOST", "HANDOFF_REJECTED"].contains(&code.0.as_str());
        assert!(known, "{what}: {code:?}");
    }
    let grown = resident(id).saturating_sub(before);
    assert!(grown < MEMORY, "the node has taken {grown} bytes");
}

/// Sends bytes as the body of `Handoff.Push`, without an end, and waits for the end of the answer.
async fn raw_push(mut channel: Channel, what: &str, bytes: Vec<u8>) {
    let (sender, frames) = mpsc::channel(4);
    let frame = http_body::Frame::data(Bytes::from(bytes));
    sender.try_send(Ok::<_, Infallible>(frame)).expect("room");
    let request = http::Request::post("/baton.node.v1.Handoff/Push")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(tonic::body::Body::new(StreamBody::new(ReceiverStream::new(frames))))
        .expect("a request");
    let end = async {
        std::future::poll_fn(|context| channel.poll_ready(context))
            .await
            .expect("the connection stands");
        let response = channel.call(request).await;
        // An error is an end as well.
        if let Ok(response) = response {
            let _ = response.into_body().collect().await;
        }
    };
    let ended = tokio::time::timeout(LIMIT, end).await;
    assert!(ended.is_ok(), "{what}: the stream goes on");
    drop(sender);
}

/// Bytes that are no HTTP/2: the node closes the connection, or waits for more, and serves others meanwhile.
fn no_http2(target: &mut Target) {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let address = target.cluster.node(Role::Decode, 0).grpc;
    let noise: Vec<u8> = (0..100_000_u32)
        .map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let with = |frame: &[u8]| [PREFACE, frame].concat();
    let closed = [
        noise.clone(),
        b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n".to_vec(),
        with(&noise),
        // A frame of 16 MiB; DATA on a stream that was never opened; a header block that is none.
        with(&[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1]),
        with(&[0, 0, 1, 0, 0, 0, 0, 0, 1, 7]),
        with(&[0, 0, 4, 1, 4, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff]),
    ];
    for bytes in closed {
        let mut stream = TcpStream::connect(address).expect("the decode node listens");
        stream.set_read_timeout(Some(LIMIT)).expect("a socket");
        // The node may close before it has read everything.
        let _ = stream.write_all(&bytes);
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}"),
        }
    }
    // Connections that end in the middle of something.
    for bytes in [&PREFACE[..10], PREFACE, &with(&[0, 0, 100, 1])] {
        let mut stream = TcpStream::connect(address).expect("the decode node listens");
        stream.write_all(bytes).expect("sent");
    }
}

/// Resident memory of a process, bytes.
fn resident(id: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).expect("the process lives");
    let line = status.lines().find(|line| line.starts_with("VmRSS")).expect("VmRSS");
    let kib: u64 = line
        .split_whitespace()
        .nth(1)
        .and_then(|text| text.parse().ok())
        .expect("kB");
    kib << 10
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_changes_nothing() {
    let mut reference = Reference::open();
    let text = "Nobody hands the baton to a stranger, however fast the stranger runs, and however well the stranger knows the track; ".repeat(3);
    let prompt = reference.prompt(&text, PROMPT);
    let expected = reference.run(&prompt, 6, None).ids;
    let mut target = Target {
        cluster: Cluster::start(ClusterOptions::default()),
        identity: reference.engine.identity(),
        prompt: prompt.clone(),
        requests: 0,
    };
    target.cluster.allow("push refused");
    let mut api = client::connect(&target.cluster).await;

    never_accepted(&mut target).await;
    refused_later(&mut target).await;
    refused_runs(&mut target).await;
    odd_runs(&mut target).await;
    odd_and_fine(&mut target).await;
    wrong_checksums(&mut target).await;
    replayed_and_cut_short(&mut target).await;
    no_messages(&mut target).await;
    no_http2(&mut target);
    target.cluster.assert_idle(IDLE);

    let answer = client::run(&mut api, client::greedy(&prompt, 6)).await;
    let answer: Result<_, Status> = answer;
    assert_eq!(answer.expect("an answer").ids, expected);
}

/// A stream that says nothing is not waited for longer than a few seconds.
#[tokio::test(flavor = "multi_thread")]
async fn a_silent_stream_is_closed() {
    let mut cluster = Cluster::start(ClusterOptions {
        prefill: 0,
        ..ClusterOptions::default()
    });
    cluster.allow("push refused");
    let mut push = Push::start(cluster.node(Role::Decode, 0).grpc, Vec::new()).await;
    assert_eq!(push.verdict().await, "MALFORMED");
}
