//! Streams that a sender of ours would not send.

use std::ops::Range;

use baton_proto::node::v1::{self as pb, handoff_client::HandoffClient, push_frame::Frame, push_reply::Reply};
use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::*;
use crate::{Claims, limits};

/// Of version 2.
fn open(ticket: &Ticket) -> pb::PushOpen {
    open_as(ticket, 2)
}

fn open_as(ticket: &Ticket, protocol: u32) -> pb::PushOpen {
    Claims {
        protocol,
        sender_epoch: Epoch(5),
        sender_node: baton_kv::NodeId("prefill-0".into()),
        request: ticket.request,
        attempt: ticket.attempt,
        epoch: ticket.epoch,
        handoff: ticket.handoff,
        capability: ticket.capability.clone(),
        identity: ticket.identity,
        layout: ticket.layout,
        transport: crate::Transport::Grpc,
    }
    .to_proto()
}

/// All of one slot.
fn run(ticket: &Ticket, slot: usize) -> pb::PieceRun {
    pb::PieceRun {
        slot: slot as u32,
        generation: ticket.slots[slot].generation.0,
        first_layer: 0,
        layers: 3,
        valid_tokens: ticket.valid_tokens(slot, PROMPT.len()) as u32,
        source_block: 0,
    }
}

/// All of some slots, in one frame.
pub(super) fn pieces(ticket: &Ticket, slots: Range<usize>) -> pb::Pieces {
    pb::Pieces {
        runs: slots.clone().map(|slot| run(ticket, slot)).collect(),
        data: slots.flat_map(|slot| kv_of(&LAYOUT, &PROMPT, slot)).collect(),
    }
}

/// All of slot 0, in version 1.
fn piece(ticket: &Ticket) -> pb::Piece {
    let run = run(ticket, 0);
    pb::Piece {
        slot: run.slot,
        generation: run.generation,
        first_layer: run.first_layer,
        layers: run.layers,
        valid_tokens: run.valid_tokens,
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
pub(super) struct Live {
    frames: mpsc::Sender<pb::PushFrame>,
    replies: Streaming<pb::PushReply>,
}

impl Live {
    /// Opened, and accepted.
    async fn open(node: &Node, ticket: &Ticket) -> Self {
        Self::open_over(node, ticket, Transport::Grpc).await
    }

    pub(super) async fn open_over(node: &Node, ticket: &Ticket, transport: Transport) -> Self {
        let (frames, outgoing) = mpsc::channel(8);
        let channel = Endpoint::from_shared(format!("http://{}", node.address))
            .unwrap()
            .connect_lazy();
        let push = async move { HandoffClient::new(channel).push(ReceiverStream::new(outgoing)).await };
        let first = Frame::Open(pb::PushOpen {
            transport: transport.name().to_owned(),
            ..open(ticket)
        });
        frames.send(pb::PushFrame { frame: Some(first) }).await.unwrap();
        let replies = within(push).await.unwrap().into_inner();
        let mut live = Self { frames, replies };
        assert!(matches!(live.next().await, Reply::Accepted(_)));
        live
    }

    pub(super) async fn send(&self, frame: Frame) {
        self.frames.send(pb::PushFrame { frame: Some(frame) }).await.unwrap();
    }

    pub(super) async fn next(&mut self) -> Reply {
        let reply = within(self.replies.message()).await.unwrap();
        reply.and_then(|reply| reply.reply).expect("a reply")
    }
}

/// All of one slot.
fn piece_of(ticket: &Ticket, slot: usize) -> Frame {
    Frame::Pieces(pieces(ticket, slot..slot + 1))
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

fn checksum(data: &[u8]) -> baton_kv::Checksum {
    let mut sum = baton_kv::ChecksumState::default();
    sum.update(data);
    sum.finish()
}

#[tokio::test]
async fn the_verdict_comes_with_the_last_of_final_and_pieces() {
    let node = Node::start(LAYOUT, 4).await;
    let ticket = node.reserve(1, 1, &PROMPT);
    let mut live = Live::open(&node, &ticket).await;
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
    live.send(Frame::Pieces(pieces(&ticket, 0..3))).await;
    assert!(matches!(live.next().await, Reply::Verified(_)));
    node.verified(ticket.handoff).await;
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
async fn a_wrong_frame_of_kv_ends_its_stream() {
    async fn wrong(change: impl FnOnce(&mut pb::Pieces), expected: Reject) {
        check(
            |ticket| {
                let mut pieces = pieces(ticket, 0..2);
                change(&mut pieces);
                vec![Frame::Open(open(ticket)), Frame::Pieces(pieces)]
            },
            expected,
        )
        .await;
    }
    wrong(|pieces| pieces.data = Bytes::new(), Reject::Malformed).await;
    wrong(|pieces| pieces.data = vec![0; 1 << 20].into(), Reject::Malformed).await;
    wrong(|pieces| pieces.runs.clear(), Reject::Malformed).await;
    wrong(|pieces| *pieces = pb::Pieces::default(), Reject::Malformed).await;
    wrong(|pieces| pieces.runs[1].layers = 0, Reject::Malformed).await;
    wrong(|pieces| pieces.runs[1].layers = u32::MAX, Reject::Malformed).await;
    wrong(
        |pieces| (pieces.runs[1].first_layer, pieces.runs[1].layers) = (u32::MAX, u32::MAX),
        Reject::Malformed,
    )
    .await;
    wrong(|pieces| pieces.runs[1].valid_tokens = 3, Reject::Malformed).await;
    wrong(|pieces| pieces.runs[1].valid_tokens = u32::MAX, Reject::Malformed).await;
    wrong(|pieces| pieces.runs[1].slot = 3, Reject::Malformed).await;
    wrong(|pieces| pieces.runs[1].generation += 1, Reject::StaleGeneration).await;
    wrong(|pieces| pieces.runs[1].generation -= 1, Reject::StaleGeneration).await;
}

#[tokio::test]
async fn a_stream_takes_the_frames_of_its_version_only() {
    check(
        |ticket| vec![Frame::Open(open(ticket)), Frame::Piece(piece(ticket))],
        Reject::Malformed,
    )
    .await;
    check(
        |ticket| vec![Frame::Open(open_as(ticket, 1)), Frame::Pieces(pieces(ticket, 0..1))],
        Reject::Malformed,
    )
    .await;
    check(|ticket| vec![Frame::Open(open_as(ticket, 0))], Reject::ProtocolMismatch).await;
    check(|ticket| vec![Frame::Open(open_as(ticket, 3))], Reject::ProtocolMismatch).await;
    // Nobody here offered a pool.
    for (transport, expected) in [("shm", Reject::PoolNotMapped), ("pigeon", Reject::Malformed)] {
        check(
            |ticket| {
                vec![Frame::Open(pb::PushOpen {
                    transport: transport.to_owned(),
                    ..open(ticket)
                })]
            },
            expected,
        )
        .await;
    }
}

#[tokio::test]
async fn frames_out_of_turn_end_their_stream() {
    check(|ticket| vec![piece_of(ticket, 0)], Reject::Malformed).await;
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
        |ticket| vec![Frame::Open(open(ticket)), Frame::Final(summed(pb::Final::default()))],
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
    // A bit of the first token was turned on the way.
    let other = pb::Final {
        first_token: 1,
        ..summed(pb::Final::default())
    };
    for last in [
        other,
        summed(nan),
        summed(alternatives(1, f32::NEG_INFINITY)),
        summed(alternatives(limits::ALTERNATIVES + 1, -1.0)),
    ] {
        check(
            |ticket| vec![Frame::Open(open(ticket)), Frame::Final(last)],
            Reject::Malformed,
        )
        .await;
    }
}

#[tokio::test]
async fn a_message_over_the_limit_is_refused_and_ends_the_handoff() {
    let node = Node::start(LAYOUT, 4).await;
    let ticket = node.reserve(1, 1, &PROMPT);
    let huge = pb::Pieces {
        data: vec![0; limits::MESSAGE_BYTES + 1].into(),
        ..pieces(&ticket, 0..1)
    };
    let replies = within(send(&node, vec![Frame::Open(open(&ticket)), Frame::Pieces(huge)])).await;
    assert!(
        !matches!(replies.as_deref(), Ok([.., Reply::Verified(_)])),
        "{replies:?}"
    );
    assert_eq!(
        node.aborted(ticket.handoff).await,
        AbortReason::Rejected(Reject::Malformed)
    );
    node.idle().await;
}

#[tokio::test]
async fn a_stream_that_ends_before_final_ends_the_handoff() {
    let node = Node::start(LAYOUT, 4).await;
    let ticket = node.reserve(1, 1, &PROMPT);
    let replies = within(send(&node, vec![Frame::Open(open(&ticket)), piece_of(&ticket, 0)]))
        .await
        .unwrap();
    assert!(matches!(replies[..], [Reply::Accepted(_)]), "{replies:?}");
    assert_eq!(node.aborted(ticket.handoff).await, AbortReason::StreamClosed);
    node.idle().await;
}

/// With the checksum of what it says.
fn summed(last: pb::Final) -> pb::Final {
    let first_checksum = crate::wire::first_checksum(&last);
    pb::Final { first_checksum, ..last }
}
