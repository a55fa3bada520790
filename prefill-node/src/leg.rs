//! The first leg of one request.

use std::{sync::Arc, time::Duration};

use baton_kv::TokenId;
use baton_node::{clock, limits, telemetry};
use baton_proto::node::v1::{self as pb, prefill_event::Event};
use baton_transfer::{
    FirstToken, Ticket, alternatives_to_proto,
    grpc::{Hold, PushError, PushFeed, PushJob, PushReport, Pusher, push_feed},
};
use baton_worker::{Events, SequenceStream, SequenceTimings, Update, Work, Worker};
use tonic::{Status, metadata::MetadataMap};
use tracing::{Instrument, info_span};

use crate::push_status::push_status;

/// A prompt in the queue, and the right to push its KV. Dropping it gives both back.
pub(crate) struct Leg {
    pub(crate) worker: Worker,
    pub(crate) pusher: Arc<Pusher>,
    pub(crate) work: Work,
    pub(crate) ticket: Ticket,
    pub(crate) stream: SequenceStream,
}

/// What the prompt came to.
struct Computed {
    first: FirstToken,
    timings: SequenceTimings,
}

impl Leg {
    /// Computes and pushes at the same time; ends with the decode node's verdict, or without it when the first token ends the answer.
    pub(crate) async fn run(self, events: Events<pb::PrefillEvent>) -> Result<(), Status> {
        let Self {
            worker,
            pusher,
            work,
            ticket,
            mut stream,
        } = self;
        let (feed, input) = push_feed();
        let span = info_span!("push", to = %ticket.decode_node, transport = tracing::field::Empty);
        let mut metadata = MetadataMap::new();
        span.in_scope(|| telemetry::inject(&mut metadata));
        let push = pusher.push(PushJob {
            ticket,
            root: work.root,
            prompt: work.prompt.clone(),
            deadline_ms: clock::now().ms_until(work.deadline),
            metadata,
            input,
        });
        let mut push = std::pin::pin!(push.instrument(span.clone()));

        // The push is polled all the while: it keeps the lease, and its failure ends the computation.
        let computed = tokio::select! {
            computed = compute(&mut stream, &feed, &events) => computed?,
            failed = &mut push => return Err(match failed {
                Err(error) => push_failed(&worker, &error),
                Ok(_) => baton_node::status::internal("a push ended before its first token"),
            }),
        };
        if let Some(ended) = end_reason(&work, computed.first.token) {
            drop(stream);
            events.send(event(Event::Done(done(&computed, ended, None)))).await;
            // Nothing is handed over: the router closes both legs. A push that closed before would look like a lost peer to the decode node.
            tokio::select! {
                () = events.closed() => {}
                _ = push => {}
                () = tokio::time::sleep(limits::CALL_TIMEOUT) => {}
            }
            return Ok(());
        }
        feed.first_token(computed.first.clone());
        let report = push.await.map_err(|error| push_failed(&worker, &error))?;
        span.record("transport", report.transport.name());
        // Its blocks are not needed any more, however long the router takes to hear of it.
        drop(stream);
        worker.metrics().sent(
            report.kv_bytes,
            report.early_bytes,
            Duration::from_secs_f64(report.transfer_ms / 1_000.0),
            report.transport,
        );
        events
            .send(event(Event::Done(done(
                &computed,
                pb::EndReason::Unspecified,
                Some(&report),
            ))))
            .await;
        Ok(())
    }
}

/// Counts it, and says it to the router.
fn push_failed(worker: &Worker, error: &PushError) -> Status {
    worker.metrics().handoff_aborted(error.code());
    push_status(error)
}

/// Follows the prompt to its first token, and feeds the push on the way.
async fn compute(
    stream: &mut SequenceStream,
    feed: &PushFeed,
    events: &Events<pb::PrefillEvent>,
) -> Result<Computed, Status> {
    let mut first = None;
    loop {
        match stream.next().await? {
            Update::Started { cached_tokens, queued } => events.inform(event(Event::Started(pb::PrefillStarted {
                queue_ms: ms(queued),
                cached_tokens: cached_tokens as u32,
            }))),
            Update::Computed {
                computed_tokens,
                table,
                hold,
            } => {
                feed.computed(computed_tokens, &table, Arc::new(hold));
                events.inform(event(Event::Progress(pb::PrefillProgress {
                    computed_tokens: computed_tokens as u32,
                })));
            }
            Update::Layers {
                computed_tokens,
                layers,
                table,
                hold,
            } => feed.computed_layers(computed_tokens, layers, &table, hold.map(|hold| Arc::new(hold) as Hold)),
            Update::Token {
                token,
                logprob,
                alternatives,
                ..
            } => {
                first = Some(FirstToken {
                    token,
                    logprob,
                    alternatives,
                });
            }
            Update::Finished { timings, .. } => {
                let first = first.ok_or_else(|| baton_node::status::internal("a prefill drew no token"))?;
                return Ok(Computed { first, timings });
            }
            // Of handed sequences only.
            Update::Verified { .. } => {}
        }
    }
}

/// Whether the first token ends the answer.
fn end_reason(work: &Work, token: TokenId) -> Option<pb::EndReason> {
    if work.stop_ids.contains(&token) {
        Some(pb::EndReason::Stop)
    } else if work.max_new_tokens == 1 {
        Some(pb::EndReason::Length)
    } else {
        None
    }
}

fn done(computed: &Computed, ended: pb::EndReason, report: Option<&PushReport>) -> pb::PrefillDone {
    pb::PrefillDone {
        first_token: computed.first.token,
        logprob: computed.first.logprob,
        ended: ended.into(),
        prefill_ms: ms(computed.timings.prefill),
        transfer_ms: report.map_or(0.0, |report| report.transfer_ms),
        kv_bytes: report.map_or(0, |report| report.kv_bytes),
        kv_blocks: report.map_or(0, |report| report.kv_blocks as u32),
        bytes_per_s: report.map_or(0.0, |report| report.bytes_per_s),
        alternatives: alternatives_to_proto(&computed.first.alternatives),
        transport: report.map_or_else(String::new, |report| report.transport.name().to_owned()),
        predicted_bytes_per_s: report.map_or(0.0, |report| report.predicted_bytes_per_s),
    }
}

fn event(event: Event) -> pb::PrefillEvent {
    pb::PrefillEvent { event: Some(event) }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1_000.0
}
