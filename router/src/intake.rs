//! What clients may make the router hold before their requests are understood: a bounded number of bytes, for a bounded time.

use std::{io, sync::Arc};

use axum::body::{Body, BodyDataStream};
use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::spawn_blocking,
    time::{Instant, timeout_at},
};

use crate::limits;

/// Handle; clones share the bounds.
#[derive(Clone)]
pub(crate) struct Intake {
    /// [`limits::RECEIVING_BYTES`].
    bytes: Arc<Semaphore>,
    /// [`limits::PARSING`].
    parsing: Arc<Semaphore>,
}

/// Why a body was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IntakeError {
    /// All clients together send too much.
    #[error("too much is being received")]
    Full,
    /// The body did not come in time.
    #[error("the body did not come in time")]
    Slow,
    /// Over this many bytes.
    #[error("the body exceeds {0} bytes")]
    TooLarge(usize),
    /// The connection broke.
    #[error(transparent)]
    Broken(axum::Error),
}

/// Bytes that count as being received until it is dropped.
pub(crate) struct Charge {
    intake: Intake,
    held: Option<OwnedSemaphorePermit>,
}

impl Charge {
    fn add(&mut self, bytes: usize) -> Result<(), IntakeError> {
        let count = u32::try_from(bytes).map_err(|_| IntakeError::Full)?;
        let more = self.intake.bytes.clone().try_acquire_many_owned(count);
        let more = more.map_err(|_| IntakeError::Full)?;
        match &mut self.held {
            Some(held) => held.merge(more),
            None => self.held = Some(more),
        }
        Ok(())
    }
}

impl Intake {
    pub(crate) fn new() -> Self {
        Self::with_bytes(limits::RECEIVING_BYTES)
    }

    fn with_bytes(bytes: usize) -> Self {
        Self {
            bytes: Arc::new(Semaphore::new(bytes)),
            parsing: Arc::new(Semaphore::new(limits::PARSING)),
        }
    }

    fn charge(&self) -> Charge {
        Charge {
            intake: self.clone(),
            held: None,
        }
    }

    /// `body`, as long as it keeps to the bounds. Its bytes count until the result is dropped.
    pub(crate) fn bounded(
        &self,
        body: Body,
        deadline: Instant,
    ) -> impl Stream<Item = Result<Bytes, IntakeError>> + Send + 'static {
        let open = Some((body.into_data_stream(), self.charge()));
        stream::unfold(open, move |open| async move {
            let (mut body, mut charge) = open?;
            match next(&mut body, &mut charge, deadline).await {
                Ok(Some(bytes)) => Some((Ok(bytes), Some((body, charge)))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        })
    }

    /// The whole of `body`, at most `limit` bytes, which count until the charge is dropped.
    pub(crate) async fn whole(
        &self,
        body: Body,
        limit: usize,
        deadline: Instant,
    ) -> Result<(Vec<u8>, Charge), IntakeError> {
        let (mut body, mut charge, mut whole) = (body.into_data_stream(), self.charge(), Vec::new());
        while let Some(bytes) = next(&mut body, &mut charge, deadline).await? {
            if whole.len() + bytes.len() > limit {
                return Err(IntakeError::TooLarge(limit));
            }
            whole.extend_from_slice(&bytes);
        }
        Ok((whole, charge))
    }

    /// `bytes` as JSON; large ones are parsed off the async threads, a few at a time.
    pub(crate) async fn parse(&self, bytes: Vec<u8>) -> Result<serde_json::Value, serde_json::Error> {
        if bytes.len() <= limits::PARSE_INLINE_BYTES {
            return serde_json::from_slice(&bytes);
        }
        let permit = self.parsing.clone().acquire_owned().await;
        let parsed = spawn_blocking(move || {
            let _permit = permit;
            serde_json::from_slice(&bytes)
        });
        parsed
            .await
            .unwrap_or_else(|error| Err(serde_json::Error::io(io::Error::other(error))))
    }
}

async fn next(body: &mut BodyDataStream, charge: &mut Charge, deadline: Instant) -> Result<Option<Bytes>, IntakeError> {
    let next = timeout_at(deadline, body.next()).await.map_err(|_| IntakeError::Slow)?;
    let Some(bytes) = next.transpose().map_err(IntakeError::Broken)? else {
        return Ok(None);
    };
    charge.add(bytes.len())?;
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[tokio::test]
    async fn bytes_count_while_they_are_held() {
        let intake = Intake::with_bytes(10);
        let (whole, charge) = intake.whole(Body::from("12345678"), 8, soon()).await.expect("it fits");
        assert_eq!(whole, b"12345678");
        let over = intake.whole(Body::from("123"), 8, soon()).await.map(|_| ());
        assert!(matches!(over, Err(IntakeError::Full)), "{over:?}");
        let mut stream = std::pin::pin!(intake.bounded(Body::from("123"), soon()));
        assert!(matches!(stream.next().await, Some(Err(IntakeError::Full))));
        assert!(stream.next().await.is_none());
        drop(charge);
        let mut stream = std::pin::pin!(intake.bounded(Body::from("123"), soon()));
        assert!(matches!(stream.next().await, Some(Ok(bytes)) if bytes == "123"));
        let over = intake.whole(Body::from("12345678"), 8, soon()).await.map(|_| ());
        assert!(matches!(over, Err(IntakeError::Full)), "{over:?}");
        assert!(stream.next().await.is_none());
        let large = intake.whole(Body::from("12345"), 4, soon()).await.map(|_| ());
        assert!(matches!(large, Err(IntakeError::TooLarge(4))), "{large:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_does_not_come_is_given_up() {
        let intake = Intake::new();
        let never = || Body::from_stream(stream::pending::<Result<Bytes, io::Error>>());
        let slow = intake.whole(never(), 8, soon()).await.map(|_| ());
        assert!(matches!(slow, Err(IntakeError::Slow)), "{slow:?}");
        let mut stream = std::pin::pin!(intake.bounded(never(), soon()));
        assert!(matches!(stream.next().await, Some(Err(IntakeError::Slow))));
    }

    #[tokio::test]
    async fn large_bodies_are_parsed_like_small_ones() {
        let intake = Intake::new();
        for length in [10, limits::PARSE_INLINE_BYTES] {
            let text = format!("[\"{}\"]", "x".repeat(length));
            assert_eq!(
                intake.parse(text.into_bytes()).await.expect("JSON")[0]
                    .as_str()
                    .map(str::len),
                Some(length)
            );
            assert!(intake.parse(vec![b'['; length + 1]).await.is_err());
        }
    }
}
