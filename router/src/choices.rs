//! What the choices of one request share, while each lives a life of its own ([`crate::life`]).
//!
//! One bounded stream takes the events of all, each in its turn. The request ends once: when its last choice is complete, or with the first failure, which ends the
//! other choices too, whose own ends then nobody hears of.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use baton_kv::Time;
use baton_node::{clock, limits as shared};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_util::sync::CancellationToken;
use tracing::Span;

use crate::{
    error::GenerateError,
    metrics::{InFlight, RouterMetrics},
    request::{AnswerEvent, Finished},
};

/// What a client gets.
pub(crate) type Item = Result<AnswerEvent, GenerateError>;

/// A request of one choice or more.
pub(crate) struct Choices {
    pub(crate) arrived: Time,
    pub(crate) deadline: Time,
    pub(crate) metrics: RouterMetrics,
    /// How many.
    count: u32,
    events: mpsc::Sender<Item>,
    /// The client has gone, or a choice has failed.
    over: CancellationToken,
    router_stops: CancellationToken,
    span: Span,
    progress: Mutex<Progress>,
    _held: (OwnedSemaphorePermit, InFlight),
}

#[derive(Default)]
struct Progress {
    complete: u32,
    completion_tokens: u32,
    failed: bool,
}

impl Choices {
    /// `over` is the client's to cancel, and a failure's.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn new(
        count: u32,
        arrived: Time,
        deadline: Time,
        metrics: RouterMetrics,
        events: mpsc::Sender<Item>,
        over: CancellationToken,
        router_stops: CancellationToken,
        span: Span,
        held: (OwnedSemaphorePermit, InFlight),
    ) -> Self {
        Self {
            arrived,
            deadline,
            metrics,
            count,
            events,
            over,
            router_stops,
            span,
            progress: Mutex::default(),
            _held: held,
        }
    }

    /// Whether there are others than the first.
    pub(crate) fn several(&self) -> bool {
        self.count > 1
    }

    /// When a choice must end because the request does.
    pub(crate) async fn over(&self) {
        self.over.cancelled().await;
    }

    /// When a choice must end because the router does.
    pub(crate) async fn router_stops(&self) {
        self.router_stops.cancelled().await;
    }

    /// A place for one event. Waits for a slow client, but not for one that is gone, and not beyond the deadline.
    pub(crate) async fn place(&self) -> Option<mpsc::OwnedPermit<Item>> {
        tokio::select! {
            biased;
            place = self.events.clone().reserve_owned() => place.ok(),
            () = self.over() => None,
            () = self.router_stops() => None,
            () = clock::sleep_until(self.deadline) => None,
        }
    }

    /// Why [`Choices::place`] gave none.
    pub(crate) fn cut_by(&self) -> GenerateError {
        if self.over.is_cancelled() {
            GenerateError::Cancelled
        } else if self.router_stops.is_cancelled() {
            GenerateError::Draining
        } else {
            GenerateError::DeadlineExceeded("before the client had read the answer")
        }
    }

    /// A choice drew so many tokens, which leave for the client.
    pub(crate) fn drew(&self, tokens: u32) {
        self.progress(|progress| progress.completion_tokens += tokens);
    }

    /// A choice is complete, and its end has its place.
    pub(crate) fn completed(&self, finished: &Finished) {
        self.metrics.finished(finished);
        let last = self.progress(|progress| {
            progress.complete += 1;
            progress.complete == self.count
        });
        if last {
            self.ended("ok");
            let timings = &finished.timings;
            let (ttft_ms, total_ms) = (timings.ttft_ms, timings.total_ms);
            self.span.in_scope(|| tracing::info!(ttft_ms, total_ms, "answered"));
        }
    }

    /// A choice has failed: the first failure is the request's.
    pub(crate) async fn failed(&self, error: GenerateError) {
        if self.progress(|progress| std::mem::replace(&mut progress.failed, true)) {
            return;
        }
        self.ended(error.code());
        tracing::info!(code = error.code(), "failed: {error}");
        self.over.cancel();
        // It reaches a client that reads, even after the deadline: its buffer has room, or gets some in a moment.
        let _ = self.events.send_timeout(Err(error), shared::CALL_TIMEOUT).await;
    }

    fn ended(&self, outcome: &'static str) {
        let took = Duration::from_micros(clock::now().0.saturating_sub(self.arrived.0));
        self.metrics.ended(outcome, took);
        let tokens = self.progress(|progress| progress.completion_tokens);
        self.span.record("completion_tokens", tokens);
        self.span.record("outcome", outcome);
    }

    fn progress<T>(&self, change: impl FnOnce(&mut Progress) -> T) -> T {
        change(&mut self.progress.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
