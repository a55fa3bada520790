//! The second leg of one request, or all of it.

use std::time::Duration;

use baton_kv::{Attempt, TokenId};
use baton_node::status;
use baton_proto::node::v1::{self as pb, decode_event::Event, decode_request};
use baton_scheduler::FinishReason;
use baton_transfer::{Ticket, alternatives_to_proto};
use baton_worker::{Events, SequenceStream, SequenceTimings, Update, Worker};
use tonic::{Status, Streaming};

/// A reservation or a queued sequence. Dropping it gives everything back.
pub(crate) struct Leg {
    pub(crate) worker: Worker,
    pub(crate) attempt: Attempt,
    /// Of a reservation.
    pub(crate) ticket: Option<Ticket>,
    pub(crate) stream: SequenceStream,
    pub(crate) requests: Streaming<pb::DecodeRequest>,
}

impl Leg {
    /// Reports what happens to the sequence until it has ended.
    pub(crate) async fn run(self, events: Events<pb::DecodeEvent>) -> Result<(), Status> {
        let Self {
            worker,
            attempt,
            ticket,
            mut stream,
            mut requests,
        } = self;
        if let Some(ticket) = &ticket {
            events.send(event(Event::Ticket(ticket.to_proto()))).await;
        }
        let mut listening = true;
        loop {
            let update = tokio::select! {
                update = stream.next() => update?,
                request = requests.message(), if listening => {
                    // The end of the requests is no cancellation: that is the end of the events' reader.
                    listening = take_request(request?, &worker, &stream)?;
                    continue;
                }
            };
            if tell(update, attempt, &mut stream, &events).await {
                return Ok(());
            }
        }
    }
}

/// Takes a further message of the router's. False when there will be none.
fn take_request(request: Option<pb::DecodeRequest>, worker: &Worker, stream: &SequenceStream) -> Result<bool, Status> {
    let Some(request) = request else { return Ok(false) };
    match request.request {
        Some(decode_request::Request::Renew(_)) => {
            // Fails when the lease has ended, which the stream's own end reports, or when nothing is reserved any more.
            if let Err(reject) = worker.renew(stream) {
                tracing::debug!(%reject, "a lease was not renewed");
            }
            Ok(true)
        }
        _ => Err(status::invalid_field(
            "request",
            "only renew may follow the first message",
        )),
    }
}

/// Sends one update, and the tokens that wait behind it. True after the last.
async fn tell(update: Update, attempt: Attempt, stream: &mut SequenceStream, events: &Events<pb::DecodeEvent>) -> bool {
    let mut next = Some(update);
    while let Some(update) = next.take() {
        let message = match update {
            Update::Started { cached_tokens, queued } => Event::Admitted(pb::Admitted {
                cached_tokens: cached_tokens as u32,
                queue_ms: ms(queued),
            }),
            Update::Verified {
                kv_bytes,
                kv_blocks,
                verify,
            } => Event::Verified(pb::Verified {
                kv_bytes,
                kv_blocks: kv_blocks as u32,
                verify_ms: ms(verify),
            }),
            Update::Token {
                index,
                token,
                logprob,
                alternatives,
            } => {
                let mut tokens = pb::Tokens {
                    attempt: attempt.0,
                    index,
                    ..pb::Tokens::default()
                };
                add(&mut tokens, token, logprob, &alternatives);
                next = add_waiting(&mut tokens, stream);
                Event::Tokens(tokens)
            }
            Update::Finished { reason, timings } => {
                events.send(event(Event::Ended(ended(reason, timings)))).await;
                return true;
            }
            // Of prefills only.
            Update::Layers { .. } | Update::Computed { .. } => continue,
        };
        events.send(event(message)).await;
    }
    false
}

/// Adds the tokens that are there already; returns the update that is none.
fn add_waiting(tokens: &mut pb::Tokens, stream: &mut SequenceStream) -> Option<Update> {
    loop {
        match stream.try_next()? {
            Update::Token {
                token,
                logprob,
                alternatives,
                ..
            } => add(tokens, token, logprob, &alternatives),
            other => return Some(other),
        }
    }
}

fn add(tokens: &mut pb::Tokens, token: TokenId, logprob: f32, alternatives: &[(TokenId, f32)]) {
    tokens.ids.push(token);
    tokens.logprobs.push(logprob);
    // Where some were asked for, every token has at least one.
    if !alternatives.is_empty() {
        tokens.alternatives.push(pb::Alternatives {
            tokens: alternatives_to_proto(alternatives),
        });
    }
}

fn ended(reason: FinishReason, timings: SequenceTimings) -> pb::Ended {
    let reason = match reason {
        FinishReason::Stop => pb::EndReason::Stop,
        FinishReason::Length => pb::EndReason::Length,
        // An error, which the stream reports as one.
        FinishReason::Cancelled => pb::EndReason::Unspecified,
    };
    pb::Ended {
        reason: reason.into(),
        prefill_ms: ms(timings.prefill),
        first_step_ms: ms(timings.first_step),
        preemptions: timings.preemptions,
    }
}

fn event(event: Event) -> pb::DecodeEvent {
    pb::DecodeEvent { event: Some(event) }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1_000.0
}
