//! The gRPC messages within an HTTP/2 connection, taken out and put back whole.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// What a client sends first (RFC 9113, 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Length, type, flags, stream (RFC 9113, 4.1).
const HEADER: usize = 9;

/// Every peer takes frames of this size (RFC 9113, 4.2).
const FRAME: usize = 16 << 10;

const DATA: u8 = 0;
const END_STREAM: u8 = 0x1;
const PADDED: u8 = 0x8;

/// Compressed flag and length of a gRPC message.
const PREFIX: usize = 5;

/// One gRPC message on its way.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Message {
    /// Of the proxy's connections, from 1.
    pub connection: u64,
    /// HTTP/2 stream: one call.
    pub stream: u32,
    /// Among the call's messages, from 0.
    pub index: u64,
    /// The message.
    pub bytes: Vec<u8>,
}

/// Says what goes on instead of a message: nothing, itself, or any others.
///
/// Flow control is the peers' own: what is invented counts against the receiver's window, so a little of it is fine.
pub type Mangler = Box<dyn FnMut(Message) -> Vec<Vec<u8>> + Send>;

/// One connection's bytes, on their way to the server.
pub(super) struct Messages<'a> {
    connection: u64,
    mangler: &'a Mutex<Mangler>,
    /// Bytes that are no whole frame yet.
    pending: Vec<u8>,
    /// The preface has passed.
    begun: bool,
    /// Bytes of each stream that are no whole message yet, and the next message's index.
    streams: HashMap<u32, (Vec<u8>, u64)>,
}

impl<'a> Messages<'a> {
    pub(super) fn new(connection: u64, mangler: &'a Mutex<Mangler>) -> Self {
        Self {
            connection,
            mangler,
            pending: Vec::new(),
            begun: false,
            streams: HashMap::new(),
        }
    }

    /// Takes bytes in, and returns those that go on now. Panics when they are no HTTP/2.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.pending.extend_from_slice(bytes);
        let mut out = Vec::new();
        if !self.begun {
            if self.pending.len() < PREFACE.len() {
                return out;
            }
            assert!(self.pending.starts_with(PREFACE), "no HTTP/2 client");
            out.extend(self.pending.drain(..PREFACE.len()));
            self.begun = true;
        }
        let pending = std::mem::take(&mut self.pending);
        let mut rest = pending.as_slice();
        while let Some((header, body)) = rest.split_first_chunk::<HEADER>() {
            let length = u32::from_be_bytes([0, header[0], header[1], header[2]]) as usize;
            let stream = u32::from_be_bytes([header[5] & 0x7f, header[6], header[7], header[8]]);
            let Some(payload) = body.get(..length) else {
                break;
            };
            match header[3] {
                DATA => self.data(header[4], stream, payload, &mut out),
                _ => out.extend_from_slice(&rest[..HEADER + length]),
            }
            rest = &body[length..];
        }
        self.pending = rest.to_vec();
        out
    }

    fn data(&mut self, flags: u8, stream: u32, payload: &[u8], out: &mut Vec<u8>) {
        assert_eq!(flags & PADDED, 0, "our peers do not pad");
        let (buffer, index) = self.streams.entry(stream).or_default();
        buffer.extend_from_slice(payload);
        while let Some(length) = message_length(buffer) {
            let message = Message {
                connection: self.connection,
                stream,
                index: *index,
                bytes: buffer[PREFIX..PREFIX + length].to_vec(),
            };
            buffer.drain(..PREFIX + length);
            *index += 1;
            let mut mangle = self.mangler.lock().unwrap_or_else(PoisonError::into_inner);
            for bytes in mangle(message) {
                let mut framed = vec![0];
                framed.extend((bytes.len() as u32).to_be_bytes());
                framed.extend(bytes);
                for part in framed.chunks(FRAME) {
                    push_frame(0, stream, part, out);
                }
            }
        }
        if flags & END_STREAM != 0 {
            push_frame(END_STREAM, stream, &[], out);
            self.streams.remove(&stream);
        }
    }
}

/// The first message's, if all of it is there.
fn message_length(buffer: &[u8]) -> Option<usize> {
    let prefix = buffer.first_chunk::<PREFIX>()?;
    let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
    (buffer.len() >= PREFIX + length).then_some(length)
}

fn push_frame(flags: u8, stream: u32, payload: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes()[1..]);
    out.extend_from_slice(&[DATA, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}
