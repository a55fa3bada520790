//! Frames of a push, taken apart without copying their KV.

use baton_kv::{BlockId, Generation};
use baton_proto::node::v1 as pb;
use prost::Message;

use crate::{Chain, PiecesHeader, Reject, RunHeader, limits};

/// A frame.
pub(super) enum Incoming {
    Open(pb::PushOpen),
    /// And the bytes.
    Pieces(PiecesHeader, Chain),
    Heartbeat,
    Final(pb::Final),
}

/// A field's value on the wire.
enum Field {
    Number(u64),
    Bytes(Chain),
}

impl Incoming {
    /// Of a `PushFrame`; any valid encoding is understood, and fields that are not known are passed over.
    pub(super) fn parse(mut message: Chain) -> Result<Self, Reject> {
        let mut frame = None;
        while !message.is_empty() {
            frame = match field(&mut message)? {
                (1, Field::Bytes(open)) => Some(Self::Open(decode(open)?)),
                (2, Field::Bytes(piece)) => Some(piece_of(piece)?),
                (3, Field::Bytes(_)) => Some(Self::Heartbeat),
                (4, Field::Bytes(last)) => Some(Self::Final(decode(last)?)),
                (5, Field::Bytes(pieces)) => Some(pieces_of(pieces)?),
                _ => frame,
            };
        }
        frame.ok_or(Reject::Malformed)
    }
}

fn decode<M: Message + Default>(message: Chain) -> Result<M, Reject> {
    M::decode(message).map_err(|_| Reject::Malformed)
}

/// `Piece`, of version 1.
fn piece_of(mut message: Chain) -> Result<Incoming, Reject> {
    let (mut run, mut data) = (pb::PieceRun::default(), Chain::default());
    while !message.is_empty() {
        match field(&mut message)? {
            (1, Field::Number(slot)) => run.slot = slot as u32,
            (2, Field::Number(generation)) => run.generation = generation,
            (3, Field::Number(first)) => run.first_layer = first as u32,
            (4, Field::Number(layers)) => run.layers = layers as u32,
            (5, Field::Number(tokens)) => run.valid_tokens = tokens as u32,
            (6, Field::Bytes(bytes)) => data = bytes,
            _ => {}
        }
    }
    let header = PiecesHeader {
        protocol: 1,
        runs: vec![header(&run)?],
        bytes: data.len(),
    };
    Ok(Incoming::Pieces(header, data))
}

/// `Pieces`, of version 2.
fn pieces_of(mut message: Chain) -> Result<Incoming, Reject> {
    let (mut runs, mut data) = (Vec::new(), Chain::default());
    while !message.is_empty() {
        match field(&mut message)? {
            (1, Field::Bytes(_)) if runs.len() == limits::FRAME_RUNS => return Err(Reject::Malformed),
            (1, Field::Bytes(run)) => runs.push(header(&decode(run)?)?),
            (2, Field::Bytes(bytes)) => data = bytes,
            _ => {}
        }
    }
    let header = PiecesHeader {
        protocol: 2,
        runs,
        bytes: data.len(),
    };
    Ok(Incoming::Pieces(header, data))
}

fn header(run: &pb::PieceRun) -> Result<RunHeader, Reject> {
    let end = run.first_layer.checked_add(run.layers).ok_or(Reject::Malformed)?;
    Ok(RunHeader {
        slot: run.slot as usize,
        generation: Generation(run.generation),
        layers: run.first_layer as usize..end as usize,
        valid_tokens: run.valid_tokens as usize,
        source_block: BlockId(run.source_block),
    })
}

/// The next field: its number and value.
fn field(message: &mut Chain) -> Result<(u64, Field), Reject> {
    let key = message.varint().ok_or(Reject::Malformed)?;
    let value = match key & 7 {
        0 => message.varint().map(Field::Number),
        1 => message.split(8).map(Field::Bytes),
        2 => {
            let bytes = message.varint().and_then(|bytes| usize::try_from(bytes).ok());
            bytes.and_then(|bytes| message.split(bytes)).map(Field::Bytes)
        }
        5 => message.split(4).map(Field::Bytes),
        _ => None,
    };
    // Of another type than the field's: fixed numbers are none of ours.
    let number = if matches!(key & 7, 1 | 5) { 0 } else { key >> 3 };
    Ok((number, value.ok_or(Reject::Malformed)?))
}
