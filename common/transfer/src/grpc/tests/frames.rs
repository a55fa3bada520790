//! Streams that a sender of ours would not send.

use baton_proto::node::v1::{self as pb, handoff_client::HandoffClient, push_frame::Frame, push_reply::Reply};
use bytes::Bytes;
use tonic::Status;

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
    check(
        |ticket| vec![Frame::Open(open(ticket)), Frame::Final(nan)],
        Reject::Malformed,
    )
    .await;
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
