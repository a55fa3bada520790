//! Messages into the body of a call, their KV without being copied.

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll, ready},
};

use baton_proto::node::v1 as pb;
use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue};
use http_body::Frame;
use prost::Message as _;
use tokio::sync::mpsc;
use tonic::Status;

use super::messages::PREFIX_BYTES;
use crate::RunToSend;

/// One gRPC message, as it goes into the body.
#[derive(Debug)]
pub(super) struct Outgoing(VecDeque<Bytes>);

impl Outgoing {
    /// A message without KV.
    pub(super) fn of(message: &impl prost::Message) -> Self {
        let mut bytes = BytesMut::with_capacity(PREFIX_BYTES + message.encoded_len());
        bytes.put_u8(0);
        bytes.put_u32(message.encoded_len() as u32);
        message.encode_raw(&mut bytes);
        Self(VecDeque::from([bytes.freeze()]))
    }

    /// `PushFrame` with the runs' bytes, which are `data` one after the other. Of version 1: one run.
    pub(super) fn pieces(protocol: u32, runs: &[RunToSend], data: Vec<Bytes>) -> Self {
        let data_bytes: usize = data.iter().map(Bytes::len).sum();
        // The numbers of the fields of `PushFrame`, and of the data within.
        let (frame_field, data_field, mut inner) = match (protocol, runs) {
            (1, [run]) => {
                let piece = pb::Piece {
                    slot: run.slot as u32,
                    generation: run.generation.0,
                    first_layer: run.layers.start as u32,
                    layers: run.layers.len() as u32,
                    valid_tokens: run.valid_tokens as u32,
                    data: Bytes::new(),
                };
                (2, 6, piece.encode_to_vec())
            }
            _ => {
                let pieces = pb::Pieces {
                    runs: runs.iter().map(run_to_proto).collect(),
                    data: Bytes::new(),
                };
                (5, 2, pieces.encode_to_vec())
            }
        };
        put_length_delimited(&mut inner, data_field, data_bytes);
        let mut outer = Vec::new();
        put_length_delimited(&mut outer, frame_field, inner.len() + data_bytes);
        let mut header = BytesMut::with_capacity(PREFIX_BYTES + outer.len() + inner.len());
        header.put_u8(0);
        header.put_u32((outer.len() + inner.len() + data_bytes) as u32);
        header.extend_from_slice(&outer);
        header.extend_from_slice(&inner);
        let mut parts = VecDeque::with_capacity(1 + data.len());
        parts.push_back(header.freeze());
        parts.extend(data);
        Self(parts)
    }
}

/// The key of a length-delimited field, and its length.
fn put_length_delimited(to: &mut Vec<u8>, field: u8, bytes: usize) {
    to.push(field << 3 | 2);
    let mut rest = bytes;
    while rest >= 0x80 {
        to.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    to.push(rest as u8);
}

fn run_to_proto(run: &RunToSend) -> pb::PieceRun {
    pb::PieceRun {
        slot: run.slot as u32,
        generation: run.generation.0,
        first_layer: run.layers.start as u32,
        layers: run.layers.len() as u32,
        valid_tokens: run.valid_tokens as u32,
        source_block: run.block.0,
    }
}

/// The body of a call: what comes through a channel, until its other end is dropped.
pub(super) struct OutgoingBody {
    messages: mpsc::Receiver<Outgoing>,
    /// Of the message that is going out.
    rest: VecDeque<Bytes>,
    /// A server's, to be sent last.
    trailers: Option<HeaderMap>,
}

impl OutgoingBody {
    /// Of a client, which sends no trailers.
    pub(super) fn request(messages: mpsc::Receiver<Outgoing>) -> Self {
        Self {
            messages,
            rest: VecDeque::new(),
            trailers: None,
        }
    }

    /// Of a server; the status is `OK`.
    pub(super) fn response(messages: mpsc::Receiver<Outgoing>) -> Self {
        let ok = (
            http::HeaderName::from_static("grpc-status"),
            HeaderValue::from_static("0"),
        );
        Self {
            messages,
            rest: VecDeque::new(),
            trailers: Some(HeaderMap::from_iter([ok])),
        }
    }
}

impl http_body::Body for OutgoingBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.rest.is_empty()
            && let Some(Outgoing(parts)) = ready!(self.messages.poll_recv(cx))
        {
            self.rest = parts;
        }
        let part = self.rest.pop_front().map(Frame::data);
        Poll::Ready(part.or_else(|| self.trailers.take().map(Frame::trailers)).map(Ok))
    }
}
