//! What nodes say, as events of a request's life.

use baton_kv::{Attempt, TokenId};
use baton_proto::node::v1::{self as pb, decode_event, prefill_event};
use tonic::Status;

use crate::{
    core::{
        admission::Leg,
        pairs::{Transport, Travelled},
        request::{EndReason, Event, LegError, Token},
    },
    nodes::leg_error,
};

/// The next item of the decode leg, `None` for its end. A ticket is its driver's, who has more to check: it is given back as `Err`.
pub(super) fn decode_event(item: Option<Result<Option<pb::DecodeEvent>, Status>>) -> Result<Event, Box<pb::Ticket>> {
    use decode_event::Event as Decode;
    let event = match item {
        Some(Ok(Some(event))) => event.event,
        Some(Ok(None)) => return Ok(Event::Opened(Leg::Decode)),
        Some(Err(status)) => return Ok(Event::DecodeFailed(broke(Leg::Decode, &status))),
        None => return Ok(Event::DecodeFailed(protocol("the decode stream ended without a word"))),
    };
    Ok(match event {
        Some(Decode::Ticket(ticket)) => return Err(Box::new(ticket)),
        Some(Decode::Admitted(admitted)) => Event::Admitted {
            cached_tokens: admitted.cached_tokens,
            queue_ms: admitted.queue_ms,
        },
        Some(Decode::Verified(verified)) => Event::Verified {
            kv_bytes: verified.kv_bytes,
            kv_blocks: verified.kv_blocks,
        },
        Some(Decode::Tokens(message)) => match tokens(message.ids, message.logprobs, message.alternatives) {
            Some(tokens) => Event::Tokens {
                attempt: Attempt(message.attempt),
                index: message.index,
                tokens,
            },
            None => Event::DecodeFailed(protocol("tokens and log-probabilities that do not belong together")),
        },
        Some(Decode::Ended(ended)) => match end_reason(ended.reason) {
            Some(reason) => Event::DecodeEnded {
                reason,
                prefill_ms: ended.prefill_ms,
                first_step_ms: ended.first_step_ms,
            },
            None => Event::DecodeFailed(protocol("an end without a reason")),
        },
        None => Event::DecodeFailed(protocol("an event that this router does not know")),
    })
}

/// The next item of the prefill leg, `None` for its end.
pub(super) fn prefill_event(item: Option<Result<Option<pb::PrefillEvent>, Status>>) -> Event {
    use prefill_event::Event as Prefill;
    let event = match item {
        Some(Ok(Some(event))) => event.event,
        Some(Ok(None)) => return Event::Opened(Leg::Prefill),
        Some(Err(status)) => return Event::PrefillFailed(broke(Leg::Prefill, &status)),
        None => return Event::PrefillFailed(protocol("the prefill stream ended without a word")),
    };
    match event {
        Some(Prefill::Started(started)) => Event::PrefillStarted {
            queue_ms: started.queue_ms,
            cached_tokens: started.cached_tokens,
        },
        // Of interest to people only, so far.
        Some(Prefill::Progress(_)) => Event::Tick,
        Some(Prefill::Done(done)) => Event::PrefillDone {
            first: Token {
                id: done.first_token,
                logprob: done.logprob,
                alternatives: pairs(done.alternatives),
            },
            ended: end_reason(done.ended),
            prefill_ms: done.prefill_ms,
            transfer_ms: done.transfer_ms,
            kv_bytes: done.kv_bytes,
            kv_blocks: done.kv_blocks,
            travelled: Transport::from_name(&done.transport).map(|transport| Travelled {
                transport,
                bytes_per_s: done.bytes_per_s,
                predicted_bytes_per_s: done.predicted_bytes_per_s,
            }),
        },
        None => Event::PrefillFailed(protocol("an event that this router does not know")),
    }
}

/// `None` unless there is one log-probability for each id, and alternatives for each or for none.
fn tokens(ids: Vec<TokenId>, logprobs: Vec<f32>, alternatives: Vec<pb::Alternatives>) -> Option<Vec<Token>> {
    if logprobs.len() != ids.len() || ![0, ids.len()].contains(&alternatives.len()) {
        return None;
    }
    let mut alternatives = alternatives.into_iter();
    let token = |(id, logprob)| Token {
        id,
        logprob,
        alternatives: alternatives.next().map_or(Vec::new(), |others| pairs(others.tokens)),
    };
    Some(ids.into_iter().zip(logprobs).map(token).collect())
}

fn pairs(alternatives: Vec<pb::Alternative>) -> Vec<(TokenId, f32)> {
    alternatives
        .into_iter()
        .map(|other| (other.id, other.logprob))
        .collect()
}

fn broke(leg: Leg, status: &Status) -> LegError {
    let error = leg_error(status);
    tracing::info!(?leg, code = ?status.code(), ?error, "a leg broke: {}", status.message());
    error
}

fn end_reason(reason: i32) -> Option<EndReason> {
    match pb::EndReason::try_from(reason) {
        Ok(pb::EndReason::Stop) => Some(EndReason::Stop),
        Ok(pb::EndReason::Length) => Some(EndReason::Length),
        _ => None,
    }
}

/// The node broke the protocol.
pub(super) fn protocol(what: &str) -> LegError {
    LegError::Failed {
        code: "PROTOCOL".to_owned(),
        message: what.to_owned(),
        retryable: false,
    }
}

#[cfg(test)]
mod tests;
