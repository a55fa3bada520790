//! What goes over the wire is protobuf, whoever writes or reads it.

use baton_kv::{BlockId, Generation};
use baton_proto::node::v1::{self as pb, push_frame::Frame};
use bytes::{Buf, Bytes};
use http_body::Body as _;
use prost::Message;

use super::super::{
    incoming::Incoming,
    messages::Messages,
    outgoing::{Outgoing, OutgoingBody},
};
use super::*;
use crate::{Chain, RunToSend, limits};

fn runs() -> Vec<RunToSend> {
    let run = |slot: usize| RunToSend {
        slot,
        generation: Generation(u64::MAX - slot as u64),
        block: BlockId(7),
        layers: slot..3,
        valid_tokens: 4,
    };
    vec![run(1), run(2)]
}

/// The body of these messages.
async fn body(messages: Vec<Outgoing>) -> tonic::body::Body {
    let (send, receive) = tokio::sync::mpsc::channel(8);
    for message in messages {
        send.send(message).await.unwrap();
    }
    tonic::body::Body::new(OutgoingBody::request(receive))
}

async fn bytes_of(mut body: tonic::body::Body) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(frame) = std::future::poll_fn(|cx| std::pin::Pin::new(&mut body).poll_frame(cx)).await {
        all.extend_from_slice(&frame.unwrap().into_data().unwrap());
    }
    all
}

/// As another library would read it.
fn decoded(bytes: &[u8]) -> Frame {
    assert_eq!(
        (bytes[0], u32::from_be_bytes(bytes[1..5].try_into().unwrap())),
        (0, bytes.len() as u32 - 5)
    );
    pb::PushFrame::decode(&bytes[5..]).unwrap().frame.unwrap()
}

#[tokio::test]
async fn frames_of_kv_are_read_by_others() {
    let data: Vec<u8> = (0..100_000_u32).map(|at| at as u8).collect();
    let parts: Vec<Bytes> = data.chunks(70_000).map(Bytes::copy_from_slice).collect();
    let two = Outgoing::pieces(2, &runs(), parts.clone());
    let Frame::Pieces(pieces) = decoded(&bytes_of(body(vec![two]).await).await) else {
        panic!()
    };
    let expected = |run: &RunToSend| pb::PieceRun {
        slot: run.slot as u32,
        generation: run.generation.0,
        first_layer: run.layers.start as u32,
        layers: run.layers.len() as u32,
        valid_tokens: 4,
        source_block: 7,
    };
    assert_eq!(pieces.runs, runs().iter().map(expected).collect::<Vec<_>>());
    assert!(pieces.data == data);

    let one = Outgoing::pieces(1, &runs()[..1], parts);
    let Frame::Piece(piece) = decoded(&bytes_of(body(vec![one]).await).await) else {
        panic!()
    };
    assert_eq!(
        (piece.slot, piece.generation, piece.first_layer, piece.layers),
        (1, u64::MAX - 1, 1, 2)
    );
    assert!(piece.data == data);
}

#[tokio::test]
async fn messages_are_read_however_they_are_cut() {
    let data: Vec<u8> = (0..30_000_u32).map(|at| at as u8).collect();
    let frames = vec![
        Outgoing::of(&pb::PushFrame {
            frame: Some(Frame::Heartbeat(pb::Heartbeat {})),
        }),
        Outgoing::pieces(2, &runs(), vec![Bytes::from(data.clone())]),
        Outgoing::of(&pb::PushFrame {
            frame: Some(Frame::Final(pb::Final::default())),
        }),
    ];
    let bytes = bytes_of(body(frames).await).await;
    for part in [1, 3, 1_000, 29_999, bytes.len()] {
        // A body that comes in such parts.
        let parts = bytes.chunks(part).map(Bytes::copy_from_slice).collect::<Vec<_>>();
        let mut messages = Messages::new(stream_body(parts), limits::MESSAGE_BYTES);
        let mut next = async || {
            within(messages.next())
                .await
                .unwrap()
                .map(|message| Incoming::parse(message).unwrap())
        };
        assert!(matches!(next().await, Some(Incoming::Heartbeat)));
        let Some(Incoming::Pieces(header, mut came)) = next().await else {
            panic!()
        };
        assert_eq!((header.protocol, header.runs.len(), header.bytes), (2, 2, data.len()));
        assert_eq!((header.runs[1].slot, header.runs[1].layers.clone()), (2, 2..3));
        assert!(came.copy_to_bytes(came.remaining()) == data);
        assert!(matches!(next().await, Some(Incoming::Final(_))));
        assert!(next().await.is_none());
    }
}

/// A body of these parts.
fn stream_body(parts: Vec<Bytes>) -> tonic::body::Body {
    struct Parts(std::vec::IntoIter<Bytes>);
    impl http_body::Body for Parts {
        type Data = Bytes;
        type Error = tonic::Status;
        fn poll_frame(
            mut self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<Result<http_body::Frame<Bytes>, tonic::Status>>> {
            std::task::Poll::Ready(self.0.next().map(|part| Ok(http_body::Frame::data(part))))
        }
    }
    tonic::body::Body::new(Parts(parts.into_iter()))
}

#[tokio::test]
async fn a_message_that_says_it_is_too_long_is_not_waited_for() {
    async fn check(bytes: &[u8], expected: tonic::Code) {
        let mut messages = Messages::new(stream_body(vec![Bytes::copy_from_slice(bytes)]), 100);
        assert_eq!(within(messages.next()).await.unwrap_err().code(), expected);
    }
    check(&[0, 0xFF, 0xFF, 0xFF, 0xFF], tonic::Code::OutOfRange).await;
    check(&[0, 0, 0, 0, 101], tonic::Code::OutOfRange).await;
    // Compressed, and cut off.
    check(&[1, 0, 0, 0, 0], tonic::Code::Unimplemented).await;
    check(&[0, 0, 0, 0, 3, 9], tonic::Code::Internal).await;
    check(&[0, 0], tonic::Code::Internal).await;
}

#[test]
fn what_is_no_frame_is_refused_and_what_is_not_known_passed_over() {
    let parse = |bytes: &[u8]| Incoming::parse(Chain::from(Bytes::copy_from_slice(bytes)));
    // A heartbeat behind a number, 8 bytes, a text and 4 bytes of fields that are not known.
    let known = [
        0x78, 0x96, 0x01, 0x79, 1, 2, 3, 4, 5, 6, 7, 8, 0x7A, 1, b'x', 0x7D, 1, 2, 3, 4, 0x1A, 0,
    ];
    assert!(matches!(parse(&known), Ok(Incoming::Heartbeat)));
    for wrong in [
        &[][..],
        &[0x1A],
        &[0x1A, 0x05, 1],
        &[0x0A, 2, 0xFF, 0xFF],
        // A group; a run that is none; a frame that is a number.
        &[0x1B, 0x1C],
        &[0x2A, 2, 0x0A, 9],
        &[0x28, 1],
    ] {
        assert!(matches!(parse(wrong), Err(Reject::Malformed)), "{wrong:?}");
    }
    let pieces = pb::Pieces {
        runs: vec![pb::PieceRun::default(); limits::FRAME_RUNS + 1],
        data: Bytes::new(),
    };
    let many = pb::PushFrame {
        frame: Some(Frame::Pieces(pieces)),
    };
    assert!(matches!(parse(&many.encode_to_vec()), Err(Reject::Malformed)));
}
