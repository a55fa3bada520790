//! A request's life, from the queue to its one end.
//!
//! ```text
//! Queued ──granted──▶ Reserving ──ticket / admitted──▶ Prefilling ──verified / first token──▶ Decoding ──▶ Ended
//!   ▲                     │                                │                                     │
//!   └────── requeue ◀─────┴── a node had no room, or failed ┘
//! ```
//!
//! Until a token has left, what fails (and may go well elsewhere) is dispatched anew, on other nodes where there are some: into fresh slots, under the next attempt's
//! number, so that whatever the earlier attempt still sends is stale. After `max_attempts` the last failure is the request's.
//!
//! While the leg that is left may still say that it lost the other, or how it went, the life is *failing* or *closing*: each for a moment only.
//! Tokens pass only from the current attempt, and only with the next index; the end is said exactly once; at the end both legs are closed.

use baton_kv::{Attempt, NodeId, Time};

pub use event::{Action, EndReason, Event, LegError, Place, Placement, Record, Token};

use super::{admission::Leg, member::MemberId};
use crate::{error::GenerateError, limits::SHED_RETRY};

mod event;

/// However short a lease is, it is not renewed more often.
const MIN_RENEW_MS: u64 = 10;

/// Bounds of a life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LifeConfig {
    /// For a decode node to answer a reservation: it only looks into its tables.
    pub reserve_ms: u64,
    /// After the last token, for the other leg to say how it went.
    pub closing_ms: u64,
    /// After a node failed, for another to take its place.
    pub replace_ms: u64,
    /// Dispatches of one request.
    pub max_attempts: u32,
    /// Nodes that may be lost with this request begun on them, the last included.
    pub max_losses: u32,
    /// Ids are below it.
    pub vocabulary: usize,
}

#[derive(Clone, PartialEq, Debug)]
enum State {
    Queued {
        since: Time,
    },
    Reserving {
        until: Time,
    },
    Prefilling,
    Decoding,
    Closing {
        until: Time,
        reason: EndReason,
    },
    /// One leg gave up on the other; whether the other was lost is the better reason.
    Failing {
        until: Time,
        error: GenerateError,
        /// Whom another dispatch avoids; `None` when none would help.
        avoid: Option<MemberId>,
    },
    Ended,
}

/// One request.
#[derive(Clone, PartialEq, Debug)]
pub struct Life {
    config: LifeConfig,
    state: State,
    /// When the router stops waiting for a node.
    queue_deadline: Time,
    /// How long each wait for a node may be.
    queue_ms: u64,
    /// It waits again because of this.
    failed: Option<GenerateError>,
    /// When the request ends, wherever it is.
    deadline: Time,
    max_new_tokens: u32,
    attempt: u32,
    /// Nodes that were lost with it.
    losses: u32,
    placement: Option<Placement>,
    decode_open: bool,
    prefill_open: bool,
    verified: bool,
    /// While the router is the one who renews.
    renew_at: Option<Time>,
    renew_ms: u64,
    /// Output index of the next token.
    next: u32,
    record: Record,
}

impl Life {
    /// Queued at `now`: until `queue_deadline` a node must have room, until `deadline` the answer must be complete.
    pub fn new(config: LifeConfig, now: Time, queue_deadline: Time, deadline: Time, max_new_tokens: u32) -> Self {
        Self {
            config,
            state: State::Queued { since: now },
            queue_deadline,
            queue_ms: now.ms_until(queue_deadline),
            failed: None,
            deadline,
            max_new_tokens,
            attempt: 0,
            losses: 0,
            placement: None,
            decode_open: false,
            prefill_open: false,
            verified: false,
            renew_at: None,
            renew_ms: 0,
            next: 0,
            record: Record::default(),
        }
    }

    /// Whether the end has been said.
    pub fn ended(&self) -> bool {
        self.state == State::Ended
    }

    /// Whether it waits for admission.
    pub fn queued(&self) -> bool {
        matches!(self.state, State::Queued { .. })
    }

    /// How it went so far.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// When [`Event::Tick`] is due.
    pub fn wake_at(&self) -> Time {
        let own = match self.state {
            State::Queued { .. } => self.queue_deadline,
            State::Reserving { until } | State::Closing { until, .. } | State::Failing { until, .. } => until,
            State::Prefilling | State::Decoding | State::Ended => self.deadline,
        };
        own.min(self.deadline).min(self.renew_at.unwrap_or(self.deadline))
    }

    /// Takes in one event. Events of a leg that is closed change nothing, nor does anything after the end.
    pub fn step(&mut self, event: Event, now: Time, actions: &mut Vec<Action>) {
        if self.ended() {
            return;
        }
        if now >= self.deadline {
            return self.fail(GenerateError::DeadlineExceeded(self.place_in_life()), actions);
        }
        match event {
            Event::Granted(placement) => self.granted(placement, now, actions),
            Event::Refused(error) if self.queued() => self.fail(error, actions),
            Event::Refused(_) => {}
            Event::StopMatched if self.next > 0 => self.finish(EndReason::Stop, now, actions),
            Event::StopMatched => {}
            Event::ClientGone => self.fail(GenerateError::Cancelled, actions),
            Event::RouterStopped => self.fail(GenerateError::Draining, actions),
            Event::Tick => self.tick(now, actions),
            Event::Opened(leg) => {
                let open = match leg {
                    Leg::Decode => self.decode_open,
                    Leg::Prefill => self.prefill_open,
                };
                if open {
                    actions.push(Action::Acknowledged(leg));
                }
            }
            Event::Ticket { .. }
            | Event::Admitted { .. }
            | Event::Verified { .. }
            | Event::Tokens { .. }
            | Event::DecodeEnded { .. }
            | Event::DecodeFailed(_) => {
                if self.decode_open && self.heard(&event) {
                    self.decode(event, now, actions);
                }
            }
            Event::PrefillStarted { .. } | Event::PrefillDone { .. } | Event::PrefillFailed(_) => {
                if self.prefill_open && self.heard(&event) {
                    self.prefill(event, now, actions);
                }
            }
        }
    }

    /// While failing, only how the other leg fares matters, and whether the answer is there: a first token that ended it leaves nothing to hand over, and the
    /// decode node may be the first to say that nothing came.
    fn heard(&self, event: &Event) -> bool {
        let counts = matches!(
            event,
            Event::DecodeFailed(_) | Event::PrefillFailed(_) | Event::PrefillDone { ended: Some(_), .. }
        );
        counts || !matches!(self.state, State::Failing { .. })
    }

    fn place_in_life(&self) -> &'static str {
        match self.state {
            State::Queued { .. } => "while it waited for a node",
            State::Reserving { .. } => "while blocks were being reserved",
            State::Prefilling | State::Failing { .. } => "before the first token",
            State::Decoding | State::Closing { .. } | State::Ended => "before the answer was complete",
        }
    }

    fn granted(&mut self, placement: Placement, now: Time, actions: &mut Vec<Action>) {
        let State::Queued { since } = self.state else {
            return;
        };
        self.attempt += 1;
        self.verified = false;
        self.record = Record {
            router_queue_ms: self.record.router_queue_ms + ms_between(since, now),
            attempts: self.attempt,
            prefill_node: placement.prefill.as_ref().map(|place| place.node.clone()),
            decode_node: Some(placement.decode.node.clone()),
            ..Record::default()
        };
        let reserve = placement.prefill.is_some();
        // A node that runs the prompt itself says so when it leaves its queue, however long that is.
        let until = if reserve {
            now.after_ms(self.config.reserve_ms)
        } else {
            self.deadline
        };
        self.state = State::Reserving { until };
        self.decode_open = true;
        actions.push(Action::OpenDecode {
            member: placement.decode.member,
            attempt: Attempt(self.attempt),
            reserve,
        });
        self.placement = Some(placement);
    }

    fn handoff(&self) -> bool {
        self.placement
            .as_ref()
            .is_some_and(|placement| placement.prefill.is_some())
    }

    fn decode(&mut self, event: Event, now: Time, actions: &mut Vec<Action>) {
        let reserving = matches!(self.state, State::Reserving { .. });
        match event {
            Event::Ticket { lease_ms } if reserving && self.handoff() => self.ticket(lease_ms, now, actions),
            Event::Admitted {
                cached_tokens,
                queue_ms,
            } if reserving && !self.handoff() => {
                self.record.cached_tokens = cached_tokens;
                self.record.node_queue_ms = queue_ms;
                self.state = State::Prefilling;
            }
            Event::Verified { kv_bytes, kv_blocks } if self.state == State::Prefilling && self.handoff() => {
                self.record.kv_bytes = kv_bytes;
                self.record.kv_blocks = kv_blocks;
                self.verified = true;
                self.renew_at = None;
                self.state = State::Decoding;
            }
            Event::Tokens { attempt, index, tokens } => self.tokens(attempt, index, tokens, actions),
            Event::DecodeEnded {
                reason,
                prefill_ms,
                first_step_ms,
            } if self.state == State::Decoding && self.next > 0 => {
                if !self.handoff() {
                    self.record.prefill_ms = prefill_ms;
                }
                self.record.first_step_ms = first_step_ms;
                self.finish(reason, now, actions);
            }
            Event::DecodeFailed(error) => self.leg_failed(Leg::Decode, error, now, actions),
            Event::Ticket { .. } | Event::Admitted { .. } => {
                self.protocol(Leg::Decode, "an answer to no question", actions)
            }
            Event::Verified { .. } => self.protocol(Leg::Decode, "KV verified that was not handed over", actions),
            _ => self.protocol(Leg::Decode, "an end before the first token", actions),
        }
    }

    fn ticket(&mut self, lease_ms: u64, now: Time, actions: &mut Vec<Action>) {
        let Some(prefill) = self.placement.as_ref().and_then(|placement| placement.prefill.as_ref()) else {
            return;
        };
        self.state = State::Prefilling;
        // Until the prefill node has started the router renews: the node may still have to queue the prompt.
        self.renew_ms = (lease_ms / 3).max(MIN_RENEW_MS);
        self.renew_at = Some(now.after_ms(self.renew_ms));
        self.prefill_open = true;
        actions.push(Action::RunPrefill {
            member: prefill.member,
            attempt: Attempt(self.attempt),
        });
    }

    fn tokens(&mut self, attempt: Attempt, index: u32, mut tokens: Vec<Token>, actions: &mut Vec<Action>) {
        if attempt != Attempt(self.attempt) {
            return;
        }
        let ready = match self.state {
            State::Prefilling => !self.handoff(),
            State::Decoding => !self.handoff() || self.verified,
            _ => false,
        };
        if !ready {
            return self.protocol(Leg::Decode, "tokens before their time", actions);
        }
        if !tokens.iter().all(|token| self.knows(token)) {
            return self.protocol(Leg::Decode, "malformed tokens", actions);
        }
        if index > self.next {
            return self.protocol(Leg::Decode, "a gap in the tokens", actions);
        }
        let repeated = (self.next - index) as usize;
        if tokens.len() <= repeated {
            return;
        }
        tokens.drain(..repeated);
        self.deliver(Leg::Decode, tokens, actions);
    }

    /// Whether all of its ids are in the vocabulary.
    fn knows(&self, token: &Token) -> bool {
        let mut ids = std::iter::once(token.id).chain(token.alternatives.iter().map(|&(id, _)| id));
        ids.all(|id| (id as usize) < self.config.vocabulary)
    }

    fn deliver(&mut self, leg: Leg, tokens: Vec<Token>, actions: &mut Vec<Action>) {
        let index = self.next;
        if tokens.len() as u64 + u64::from(index) > u64::from(self.max_new_tokens) {
            return self.protocol(leg, "more tokens than asked for", actions);
        }
        self.next += tokens.len() as u32;
        self.state = State::Decoding;
        actions.push(Action::Deliver { index, tokens });
    }

    fn prefill(&mut self, event: Event, now: Time, actions: &mut Vec<Action>) {
        match event {
            Event::PrefillStarted {
                queue_ms,
                cached_tokens,
            } => {
                self.record.node_queue_ms = queue_ms;
                self.record.cached_tokens = cached_tokens;
                self.renew_at = None;
            }
            Event::PrefillDone {
                first,
                ended,
                prefill_ms,
                transfer_ms,
                kv_bytes,
                kv_blocks,
                travelled,
            } => {
                if let (Some(travelled), Some(prefill), Some(decode)) =
                    (travelled, self.place(Leg::Prefill), self.place(Leg::Decode))
                {
                    actions.push(Action::Travelled {
                        prefill: prefill.member,
                        decode: decode.member,
                        travelled,
                    });
                    self.record.transport = Some(travelled.transport);
                }
                self.record.prefill_ms = prefill_ms;
                self.record.transfer_ms = transfer_ms;
                self.record.kv_bytes = kv_bytes;
                self.record.kv_blocks = kv_blocks;
                self.renew_at = None;
                if ended.is_some() {
                    // First, so that the decode node hears of a cancellation, and not of a push that broke.
                    self.close(Leg::Decode, actions);
                }
                self.close(Leg::Prefill, actions);
                match (ended, &self.state) {
                    (Some(reason), State::Prefilling | State::Failing { .. }) => {
                        self.ended_by_first(first, reason, now, actions)
                    }
                    (None, State::Prefilling | State::Decoding) => {}
                    (None, &State::Closing { reason, .. }) => self.end(Ok(reason), actions),
                    _ => self.protocol(Leg::Prefill, "a first token that ended an answer under way", actions),
                }
            }
            Event::PrefillFailed(error) => self.leg_failed(Leg::Prefill, error, now, actions),
            _ => {}
        }
    }

    /// The first token ended the answer: nothing was handed over.
    fn ended_by_first(&mut self, first: Token, reason: EndReason, now: Time, actions: &mut Vec<Action>) {
        if !self.knows(&first) {
            return self.protocol(Leg::Prefill, "malformed tokens", actions);
        }
        self.record.decode_node = None;
        self.deliver(Leg::Prefill, vec![first], actions);
        if !self.ended() {
            self.finish(reason, now, actions);
        }
    }

    fn leg_failed(&mut self, leg: Leg, error: LegError, now: Time, actions: &mut Vec<Action>) {
        if let State::Closing { reason, .. } = self.state {
            self.close(leg, actions);
            return self.end(Ok(reason), actions);
        }
        // The KV is verified and decoding goes on: the prefill node is no longer needed.
        if leg == Leg::Prefill && self.state == State::Decoding {
            return self.close(leg, actions);
        }
        let Some(Place { member, node }) = self.place(leg).cloned() else {
            return;
        };
        if let State::Failing {
            error: first, avoid, ..
        } = &self.state
        {
            let (error, avoid) = match error {
                LegError::Lost => (GenerateError::NodeLost { node }, Some(member)),
                _ => (first.clone(), *avoid),
            };
            return self.give_up(error, avoid, now, actions);
        }
        match error {
            LegError::Refused if self.next == 0 && self.attempt < self.config.max_attempts => {
                self.requeue(member, None, now, actions)
            }
            LegError::Refused if self.failed.is_some() => {
                let error = self.failed.take().expect("checked just now");
                self.fail(error, actions)
            }
            // It stops in the middle of the answer.
            LegError::Refused if self.next > 0 => self.fail(GenerateError::NodeLost { node }, actions),
            LegError::SlowReader => self.fail(GenerateError::SlowReader, actions),
            LegError::TooLong(message) => self.fail(GenerateError::TooLongForNode { node, message }, actions),
            LegError::Refused => self.fail(GenerateError::NodesFull { attempts: self.attempt }, actions),
            LegError::Lost => self.give_up(GenerateError::NodeLost { node }, Some(member), now, actions),
            LegError::Deadline => self.fail(GenerateError::DeadlineExceeded(self.place_in_life()), actions),
            LegError::Failed {
                code,
                message,
                retryable,
            } => {
                let at_fault = self.place(self.at_fault(leg, &code)).map(|place| place.member);
                let error = GenerateError::NodeFailed {
                    node,
                    code,
                    message,
                    retryable,
                };
                let avoid = at_fault.filter(|_| retryable);
                self.close(leg, actions);
                if self.decode_open || self.prefill_open {
                    self.renew_at = None;
                    let until = now.after_ms(self.config.closing_ms);
                    self.state = State::Failing { until, error, avoid };
                } else {
                    self.give_up(error, avoid, now, actions);
                }
            }
        }
    }

    /// Which leg's node another attempt should avoid, when `leg` failed with `code`: one leg may suffer from the other.
    fn at_fault(&self, leg: Leg, code: &str) -> Leg {
        let handing_over = self.handoff() && !self.verified;
        match (leg, code) {
            (Leg::Decode, "LEASE_ENDED" | "PEER_LOST" | "HANDOFF_REJECTED") if handing_over => Leg::Prefill,
            (Leg::Prefill, "PEER_UNREACHABLE" | "PEER_LOST") => Leg::Decode,
            _ => leg,
        }
    }

    /// This attempt has failed: another without `avoid`, if that may help and nothing has left yet; else the end.
    fn give_up(&mut self, error: GenerateError, avoid: Option<MemberId>, now: Time, actions: &mut Vec<Action>) {
        let lost = match &error {
            GenerateError::NodeLost { .. } => self.begun(),
            GenerateError::NodeFailed { code, .. } => code == "ENGINE_LOST",
            _ => false,
        };
        // What kills its nodes is not let loose on all of them.
        self.losses += u32::from(lost);
        let again = self.attempt < self.config.max_attempts && self.losses < self.config.max_losses;
        match avoid {
            Some(member) if self.next == 0 && again => {
                self.requeue(member, Some(error), now, actions);
            }
            _ => self.fail(error, actions),
        }
    }

    /// Whether a node works on it.
    fn begun(&self) -> bool {
        !matches!(self.state, State::Queued { .. } | State::Reserving { .. })
    }

    /// Back to the queue; `by` is asked again only once it has reported anew. `failed`: why, if not for want of room.
    fn requeue(&mut self, by: MemberId, failed: Option<GenerateError>, now: Time, actions: &mut Vec<Action>) {
        // Admission hears of the credits with the requeueing, so that nobody else is sent to `by` in between.
        for (open, leg) in [
            (&mut self.decode_open, Leg::Decode),
            (&mut self.prefill_open, Leg::Prefill),
        ] {
            if std::mem::take(open) {
                actions.push(Action::Close(leg));
            }
        }
        self.renew_at = None;
        self.state = State::Queued { since: now };
        let wait_ms = match failed {
            Some(_) => self.queue_ms.min(self.config.replace_ms),
            None => self.queue_ms,
        };
        self.failed = failed.or(self.failed.take());
        self.queue_deadline = now.after_ms(wait_ms).min(self.deadline);
        actions.push(Action::Requeue { by });
    }

    fn place(&self, leg: Leg) -> Option<&Place> {
        let placement = self.placement.as_ref()?;
        match leg {
            Leg::Prefill => placement.prefill.as_ref(),
            Leg::Decode => Some(&placement.decode),
        }
    }

    fn tick(&mut self, now: Time, actions: &mut Vec<Action>) {
        match self.state {
            State::Queued { .. } if now >= self.queue_deadline => {
                let error = self.failed.take().unwrap_or(GenerateError::QueueTimeout {
                    retry_after: SHED_RETRY,
                });
                self.fail(error, actions);
            }
            State::Reserving { until } if now >= until => {
                let error = LegError::Failed {
                    code: "RESERVE_TIMEOUT".to_owned(),
                    message: "no answer to the reservation in time".to_owned(),
                    retryable: true,
                };
                self.leg_failed(Leg::Decode, error, now, actions);
            }
            State::Closing { until, reason } if now >= until => {
                self.close(Leg::Prefill, actions);
                self.end(Ok(reason), actions);
            }
            State::Failing {
                until,
                ref error,
                avoid,
            } if now >= until => {
                let error = error.clone();
                self.give_up(error, avoid, now, actions);
            }
            _ if self.renew_at.is_some_and(|at| now >= at) => {
                self.renew_at = Some(now.after_ms(self.renew_ms));
                actions.push(Action::Renew);
            }
            _ => {}
        }
    }

    /// The answer is complete: ends now, or when the prefill leg has said how it went.
    fn finish(&mut self, reason: EndReason, now: Time, actions: &mut Vec<Action>) {
        if matches!(self.state, State::Closing { .. }) {
            return;
        }
        self.close(Leg::Decode, actions);
        self.renew_at = None;
        if self.prefill_open {
            let until = now.after_ms(self.config.closing_ms);
            self.state = State::Closing { until, reason };
        } else {
            self.end(Ok(reason), actions);
        }
    }

    fn close(&mut self, leg: Leg, actions: &mut Vec<Action>) {
        let open = match leg {
            Leg::Prefill => &mut self.prefill_open,
            Leg::Decode => &mut self.decode_open,
        };
        if std::mem::take(open) {
            actions.push(Action::Close(leg));
            actions.push(Action::Settled(leg));
        }
    }

    /// `leg`'s node broke the protocol.
    fn protocol(&mut self, leg: Leg, what: &str, actions: &mut Vec<Action>) {
        let node = match self.place(leg) {
            Some(place) => place.node.clone(),
            None => NodeId("unknown".to_owned()),
        };
        let error = GenerateError::NodeFailed {
            node,
            code: "PROTOCOL".to_owned(),
            message: what.to_owned(),
            retryable: false,
        };
        self.fail(error, actions);
    }

    fn fail(&mut self, error: GenerateError, actions: &mut Vec<Action>) {
        // A complete answer stays one, whatever happens while the last figures are waited for.
        let outcome = match self.state {
            State::Closing { reason, .. } => Ok(reason),
            _ => Err(error),
        };
        self.close(Leg::Decode, actions);
        self.close(Leg::Prefill, actions);
        self.end(outcome, actions);
    }

    fn end(&mut self, outcome: Result<EndReason, GenerateError>, actions: &mut Vec<Action>) {
        self.renew_at = None;
        self.state = State::Ended;
        actions.push(Action::End(outcome));
    }
}

fn ms_between(earlier: Time, later: Time) -> f64 {
    later.0.saturating_sub(earlier.0) as f64 / 1_000.0
}

#[cfg(test)]
mod tests;
