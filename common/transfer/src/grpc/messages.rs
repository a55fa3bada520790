//! gRPC messages out of a body, in the parts in which they came.

use std::{future::poll_fn, pin::Pin};

use bytes::Buf;
use http_body::Body as _;
use tonic::{Status, body::Body};

use crate::Chain;

/// Flag and length before each message.
pub(super) const PREFIX_BYTES: usize = 5;

/// The messages of one body.
pub(super) struct Messages {
    body: Body,
    come: Chain,
    /// Bytes of the message whose prefix was taken.
    awaited: Option<usize>,
    /// Bytes of a message at most.
    pub(super) limit: usize,
}

impl Messages {
    pub(super) fn new(body: Body, limit: usize) -> Self {
        Self {
            body,
            come: Chain::default(),
            awaited: None,
            limit,
        }
    }

    /// The next message; `None` at the end. One that says that it is longer than `limit` is refused before it has come. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Option<Chain>, Status> {
        loop {
            if let Some(message) = self.whole()? {
                return Ok(Some(message));
            }
            match poll_fn(|cx| Pin::new(&mut self.body).poll_frame(cx)).await {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.come.push(data),
                    Err(frame) => {
                        let trailers = frame.into_trailers().unwrap_or_default();
                        match Status::from_header_map(&trailers) {
                            Some(status) if status.code() != tonic::Code::Ok => return Err(status),
                            _ => {}
                        }
                    }
                },
                Some(Err(status)) => return Err(status),
                None if self.come.is_empty() && self.awaited.is_none() => return Ok(None),
                None => return Err(Status::internal("the body ends within a message")),
            }
        }
    }

    /// The first message, if all of it is here.
    fn whole(&mut self) -> Result<Option<Chain>, Status> {
        if self.awaited.is_none() {
            let Some(mut prefix) = self.come.split(PREFIX_BYTES) else {
                return Ok(None);
            };
            if prefix.get_u8() != 0 {
                return Err(Status::unimplemented("messages are not compressed here"));
            }
            let bytes = prefix.get_u32() as usize;
            if bytes > self.limit {
                return Err(Status::out_of_range("the message is too long"));
            }
            self.awaited = Some(bytes);
        }
        let message = self.awaited.and_then(|bytes| self.come.split(bytes));
        if message.is_some() {
            self.awaited = None;
        }
        Ok(message)
    }
}
