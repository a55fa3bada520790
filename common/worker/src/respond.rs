//! One leg of a request as a task: its events are the response stream, and whoever closes the stream ends it.

use std::future::Future;

use baton_kv::Time;
use baton_node::{Lifecycle, Phase, clock, limits, status};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};
use tracing::Instrument;

/// The response stream of a leg.
pub type Responses<T> = ReceiverStream<Result<T, Status>>;

/// Where a leg's events go. Sending waits for a slow reader, as long as the leg's deadline allows.
pub struct Events<T>(mpsc::Sender<Result<T, Status>>);

impl<T> Events<T> {
    /// Sends one event. When the reader is gone the leg is being ended already.
    pub async fn send(&self, event: T) {
        let _ = self.0.send(Ok(event)).await;
    }

    /// Resolves when the reader has closed the stream. Cancel-safe.
    pub async fn closed(&self) {
        self.0.closed().await;
    }

    /// Sends one event unless the reader is behind: for events that only inform.
    pub fn inform(&self, event: T) {
        let _ = self.0.try_send(Ok(event));
    }
}

/// What ends a leg from outside.
#[derive(Clone, Debug)]
pub struct Respond {
    lifecycle: Lifecycle,
}

impl Respond {
    /// Legs are `lifecycle`'s requests.
    pub fn new(lifecycle: Lifecycle) -> Self {
        Self { lifecycle }
    }

    /// Whether new legs are taken; UNAVAILABLE `DRAINING` (or `STARTING`) otherwise.
    pub fn admit(&self) -> Result<(), Status> {
        match self.lifecycle.phase() {
            Phase::Ready => Ok(()),
            Phase::Starting => Err(status::unavailable(
                "STARTING",
                "the node is not ready yet",
                limits::SHED_RETRY,
            )),
            Phase::Draining | Phase::Stopped => Err(draining()),
        }
    }

    /// Runs `leg` until it ends, its deadline passes, the reader closes the stream, or the process stops; in each case its future is dropped,
    /// which gives back what it holds. An error goes to the reader as the stream's last item.
    pub fn run<T, F>(&self, deadline: Time, leg: impl FnOnce(Events<T>) -> F) -> Responses<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<(), Status>> + Send + 'static,
    {
        let (sender, receiver) = mpsc::channel(limits::TOKEN_CHANNEL);
        let leg = leg(Events(sender.clone()));
        let stop = self.lifecycle.shutdown_token();
        let task = async move {
            let ended = tokio::select! {
                biased;
                ended = leg => ended,
                () = sender.closed() => {
                    tracing::info!("the router closed the stream: cancelled");
                    return;
                }
                () = clock::sleep_until(deadline) => Err(deadline_passed()),
                () = stop.cancelled() => Err(draining()),
            };
            if let Err(status) = ended {
                tracing::info!(code = ?status.code(), reason = status::reason(&status), "failed: {}", status.message());
                let _ = sender.send_timeout(Err(status), limits::CALL_TIMEOUT).await;
            }
        };
        self.lifecycle.requests().spawn(task.in_current_span());
        ReceiverStream::new(receiver)
    }
}

fn draining() -> Status {
    status::unavailable(
        status::reasons::DRAINING,
        "the node is about to stop",
        limits::SHED_RETRY,
    )
}

fn deadline_passed() -> Status {
    status::error(
        Code::DeadlineExceeded,
        status::reasons::DEADLINE,
        "the request's deadline has passed",
    )
    .build()
}
