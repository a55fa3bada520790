//! Streams that a sender of ours would not send.

use baton_proto::node::v1::{self as pb, handoff_client::HandoffClient, push_frame::Frame, push_reply::Reply};
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::*;
use crate::{Claims, limits};

fn open(ticket: &Ticket) -> pb::PushOpen {
    Claims {
        protocol: ticket.protocol,
        sender_epoch: Epoch(5),
        sender_node: baton_kv::NodeId("prefill-0".into()),
        request: ticket.request,
        attempt: ticket.attempt,
        epoch: ticket.epoch,
        handoff: ticket.handoff,
        capability: ticket.capability.clone(),
        identity: ticket.identity,
        layout: ticket.layout,
    }
    .to_proto()
}

/// All of slot 0.
fn piece(ticket: &Ticket) -> pb::Piece {
    pb::Piece {
        slot: 0,
        generation: ticket.slots[0].generation.0,
        first_layer: 0,
        layers: 3,
        valid_tokens: 4,
        data: kv_of(&LAYOUT, &PROMPT, 0).into(),
    }
}

/// Sends `frames`, closes, and returns every reply.
async fn send(node: &Node, frames: Vec<Frame>) -> Result<Vec<Reply>, Status> {
    let channel = Endpoint::from_shared(format!("http://{}", node.address))
        .unwrap()
        .connect_lazy();
    let frames = frames.into_iter().map(|frame| pb::PushFrame { frame: Some(frame) });
    let mut replies = HandoffClient::new(channel)
        .push(tokio_stream::iter(frames))
        .await?
        .into_inner();
    let mut all = Vec::new();
    while let Some(reply) = replies.message().await? {
        all.extend(reply.reply);
    }
    Ok(all)
}

/// A stream, frame by frame.
struct Live {
    frames: mpsc::Sender<pb::PushFrame>,
    replies: Streaming<pb::PushReply>,
}

impl Live {
    /// Opened, and accepted.
    async fn open(node: &Node, ticket: &Ticket) -> Self {
        let (frames, outgoing) = mpsc::channel(8);
        let channel = Endpoint::from_shared(format!("http://{}", node.address))
            .unwrap()
            .connect_lazy();
        let push = async move { HandoffClient::new(channel).push(ReceiverStream::new(outgoing)).await };
        let first = Frame::Open(open(ticket));
        frames.send(pb::PushFrame { frame: Some(first) }).await.unwrap();
        let replies = within(push).await.unwrap().into_inner();
        let mut live = Self { frames, replies };
        assert!(matches!(live.next().await, Reply::Accepted(_)));
        live
    }

    async fn send(&self, frame: Frame) {
        self.frames.send(pb::PushFrame { frame: Some(frame) }).await.unwrap();
    }

    async fn next(&mut self) -> Reply {
        let reply = within(self.replies.message()).await.unwrap();
        reply.and_then(|reply| reply.reply).expect("a reply")
    }
}

/// All of one slot.
fn piece_of(ticket: &Ticket, slot: usize) -> Frame {
    Frame::Piece(pb::Piece {
        slot: slot as u32,
        generation: ticket.slots[slot].generation.0,
        valid_tokens: ticket.valid_tokens(slot, PROMPT.len()) as u32,
        data: kv_of(&LAYOUT, &PROMPT, slot).into(),
        ..piece(ticket)
    })
}

fn renewed(reply: Reply) -> u64 {
    match reply {
        Reply::Renewed(renewed) => renewed.frames,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn pieces_are_answered_now_and_then() {
    let node = Node::start(LAYOUT, 4).await;
    let ticket = node.reserve(1, 1, &PROMPT);
    let mut live = Live::open(&node, &ticket).await;
    // Not so soon: the first answer is the heartbeat's.
    live.send(piece_of(&ticket, 0)).await;
    live.send(Frame::Heartbeat(pb::Heartbeat {})).await;
    assert_eq!(renewed(live.next().await), 3);
    node.pass_ms(LEASE_MS / 2);
    live.send(piece_of(&ticket, 1)).await;
    assert_eq!(renewed(live.next().await), 4);
    node.pass_ms(LEASE_MS / 2);
    live.send(piece_of(&ticket, 2)).await;
    assert_eq!(renewed(live.next().await), 5);
}

#[tokio::test]
async fn heartbeats_are_answered_while_blocks_are_summed() {
    let node = Node::start(LAYOUT, 4).await;
    let ticket = node.reserve(1, 1, &PROMPT);
    let mut live = Live::open(&node, &ticket).await;
    for slot in 0..3 {
        live.send(piece_of(&ticket, slot)).await;
    }
    node.memory.hold_reads(true);
    let names = baton_kv::name_blocks(ROOT, &PROMPT, LAYOUT.block_tokens);
    let entry = |slot: usize| crate::ManifestEntry {
        name: names.get(slot).copied(),
        valid_tokens: ticket.valid_tokens(slot, PROMPT.len()),
        checksum: checksum(&kv_of(&LAYOUT, &PROMPT, slot)),
    };
    let last = crate::FinalClaims {
        manifest: (0..3).map(entry).collect(),
        first: first_token(),
    };
    live.send(Frame::Final(last.to_proto())).await;
    for frames in [6, 7] {
        live.send(Frame::Heartbeat(pb::Heartbeat {})).await;
        assert_eq!(renewed(live.next().await), frames);
    }
    node.memory.hold_reads(false);
    assert!(matches!(live.next().await, Reply::Verified(_)));
    node.verified(ticket.handoff).await;
}

fn checksum(data: &[u8]) -> baton_kv::Checksum {
    let mut sum = baton_kv::ChecksumState::default();
    sum.update(data);
    sum.finish()
}

/// The stream ends with `expected`, the handoff with it where the stream was its own, and every block comes back.
async fn check(frames: impl FnOnce(&Ticket) -> Vec<Frame>, expected: Reject) {
    let node = Node::start(LAYOUT, 4).await;
    let ticket = node.reserve(1, 1, &PROMPT);
    let replies = within(send(&node, frames(&ticket))).await.unwrap();
    let Some(Reply::Rejected(rejected)) = replies.last() else {
        panic!("{replies:?} instead of {expected:?}")
    };
    assert_eq!(Reject::from_code(&rejected.code), Some(expected));
    node.pass_ms(LEASE_MS);
    node.aborted(ticket.handoff).await;
    node.idle().await;
}

#[tokio::test]
async fn a_wrong_piece_ends_its_stream() {
    async fn wrong(change: impl FnOnce(&mut pb::Piece), expected: Reject) {
        check(
            |ticket| {
                let mut piece = piece(ticket);
                change(&mut piece);
                vec![Frame::Open(open(ticket)), Frame::Piece(piece)]
            },
            expected,
        )
        .await;
    }
    wrong(|piece| piece.data = Bytes::new(), Reject::Malformed).await;
    wrong(|piece| piece.data = vec![0; 1 << 20].into(), Reject::Malformed).await;
    wrong(
        |piece| (piece.layers, piece.data) = (0, Bytes::new()),
        Reject::Malformed,
    )
    .await;
    wrong(|piece| piece.layers = u32::MAX, Reject::Malformed).await;
    wrong(
        |piece| (piece.first_layer, piece.layers) = (u32::MAX, u32::MAX),
        Reject::Malformed,
    )
    .await;
    wrong(|piece| piece.valid_tokens = 3, Reject::Malformed).await;
    wrong(|piece| piece.valid_tokens = u32::MAX, Reject::Malformed).await;
    wrong(|piece| piece.slot = 3, Reject::Malformed).await;
    wrong(|piece| piece.generation += 1, Reject::StaleGeneration).await;
    wrong(|piece| piece.generation -= 1, Reject::StaleGeneration).await;
}

#[tokio::test]
async fn frames_out_of_turn_end_their_stream() {
    check(|ticket| vec![Frame::Piece(piece(ticket))], Reject::Malformed).await;
    check(
        |ticket| vec![Frame::Open(open(ticket)), Frame::Open(open(ticket))],
        Reject::Malformed,
    )
    .await;
    check(
        |ticket| {
            vec![Frame::Open(pb::PushOpen {
                epoch: vec![1],
                ..open(ticket)
            })]
        },
        Reject::Malformed,
    )
    .await;
    check(
        |ticket| {
            vec![Frame::Open(pb::PushOpen {
                layout: None,
                ..open(ticket)
            })]
        },
        Reject::Malformed,
    )
    .await;
    check(
        |ticket| vec![Frame::Open(open(ticket)), Frame::Final(pb::Final::default())],
        Reject::ManifestMismatch,
    )
    .await;
    let nan = pb::Final {
        logprob: f32::NAN,
        ..pb::Final::default()
    };
    let alternatives = |count, logprob| pb::Final {
        alternatives: vec![pb::Alternative { id: 1, logprob }; count],
        ..pb::Final::default()
    };
    for last in [
        nan,
        alternatives(1, f32::NEG_INFINITY),
        alternatives(limits::ALTERNATIVES + 1, -1.0),
    ] {
        check(
            |ticket| vec![Frame::Open(open(ticket)), Frame::Final(last)],
            Reject::Malformed,
        )
        .await;
    }
}

#[tokio::test]
async fn a_message_over_the_limit_breaks_the_stream_and_ends_the_handoff() {
    let node = Node::start(LAYOUT, 4).await;
    let ticket = node.reserve(1, 1, &PROMPT);
    let huge = pb::Piece {
        data: vec![0; limits::MESSAGE_BYTES + 1].into(),
        ..piece(&ticket)
    };
    let replies = within(send(&node, vec![Frame::Open(open(&ticket)), Frame::Piece(huge)])).await;
    assert!(
        !matches!(replies.as_deref(), Ok([.., Reply::Verified(_)])),
        "{replies:?}"
    );
    assert_eq!(node.aborted(ticket.handoff).await, AbortReason::StreamClosed);
    node.idle().await;
}

#[tokio::test]
async fn a_stream_that_ends_before_final_ends_the_handoff() {
    let node = Node::start(LAYOUT, 4).await;
    let ticket = node.reserve(1, 1, &PROMPT);
    let replies = within(send(
        &node,
        vec![Frame::Open(open(&ticket)), Frame::Piece(piece(&ticket))],
    ))
    .await
    .unwrap();
    assert!(matches!(replies[..], [Reply::Accepted(_)]), "{replies:?}");
    assert_eq!(node.aborted(ticket.handoff).await, AbortReason::StreamClosed);
    node.idle().await;
}
