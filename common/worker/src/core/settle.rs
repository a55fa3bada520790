//! What follows from each turn: the receiver's actions are carried out, and the scheduler's events reach their readers.

use std::time::Duration;

use baton_kv::{BlockId, HandoffId, Time, TokenId};
use baton_scheduler::{FinishReason, NewSequence, Role, SequenceEvent, SequenceId, Start};
use baton_transfer::{AbortReason, ReceiverAction};

use super::{Core, Member, Stage};
use crate::{HeldBlocks, SequenceError, Update, error::abort_code, metrics::TokenKind};

impl Core {
    /// Carries out the receiver's actions and delivers the scheduler's events, until both are quiet.
    pub(crate) fn settle(&mut self, now: Time) {
        while !self.actions.is_empty() || !self.events.is_empty() {
            for action in std::mem::take(&mut self.actions) {
                self.act(action, now);
            }
            let events = std::mem::take(&mut self.events);
            for event in events {
                self.deliver(event, now);
            }
        }
    }

    fn act(&mut self, action: ReceiverAction, now: Time) {
        match action {
            ReceiverAction::Verified {
                handoff,
                table,
                first,
                kv_bytes,
                kv_blocks,
                final_at,
                ..
            } => {
                // From here on the table's blocks are ours.
                if !self.receiver.decoding(handoff) {
                    return;
                }
                self.metrics.received(kv_bytes);
                let Some((id, sequence)) = self.handed(handoff) else {
                    // Its stream left in this very round.
                    self.pool.release(&table);
                    self.receiver.released(handoff, &mut self.actions);
                    return;
                };
                let verified = Update::Verified {
                    kv_bytes,
                    kv_blocks,
                    verify: elapsed(final_at, now),
                };
                let token = Update::Token {
                    index: 0,
                    token: first.token,
                    logprob: first.logprob,
                    alternatives: first.alternatives,
                };
                if self.send(id, verified, now) && self.send(id, token, now) {
                    self.start_handed(id, *sequence, table, first.token, now);
                } else {
                    self.pool.release(&table);
                }
            }
            ReceiverAction::Aborted { handoff, reason, .. } => {
                if let Some(id) = self.handoffs.remove(&handoff) {
                    let reserved = self.reservation(id).is_some();
                    if let Some(member) = self.members.remove(&id) {
                        member.updates.fail(SequenceError::Handoff(reason));
                    }
                    if reserved {
                        self.metrics.handoff_aborted(abort_code(reason));
                    } else {
                        self.scheduler.cancel(id, &mut self.pool, &mut self.events);
                    }
                }
            }
            ReceiverAction::Fence { stream, reject } => self.fences.fence(stream, reject),
            ReceiverAction::Released { .. } => {}
            ReceiverAction::DrainOverdue { handoff, in_flight } => {
                tracing::error!(
                    handoff = handoff.0,
                    in_flight,
                    "an aborted handoff has not drained: its blocks stay quarantined"
                );
            }
        }
    }

    /// The member whose handoff was verified, now scheduled, and the sequence that waited for it.
    fn handed(&mut self, handoff: HandoffId) -> Option<(SequenceId, Box<NewSequence>)> {
        let id = *self.handoffs.get(&handoff)?;
        let member = self.members.get_mut(&id)?;
        match std::mem::replace(&mut member.stage, Stage::Scheduled { handoff: Some(handoff) }) {
            Stage::Reserved { sequence, .. } => Some((id, sequence)),
            _ => None,
        }
    }

    /// Queues a sequence whose prompt and first token are here. (If that token ends the answer, the scheduler says so.)
    fn start_handed(
        &mut self,
        id: SequenceId,
        mut sequence: NewSequence,
        table: Vec<BlockId>,
        first_token: TokenId,
        now: Time,
    ) {
        if let Some(member) = self.members.get_mut(&id) {
            member.first_token = Some(now);
        }
        sequence.output.push(first_token);
        sequence.start = Start::Handed { table: table.clone() };
        match self.scheduler.submit(sequence, &self.pool) {
            Ok(()) => self.queued = true,
            Err(error) => {
                self.pool.release(&table);
                self.fail(id, error.into(), now);
            }
        }
    }

    fn deliver(&mut self, event: SequenceEvent, now: Time) {
        match event {
            SequenceEvent::Started {
                id,
                cached_tokens,
                table,
            } => {
                let Some(member) = self.members.get_mut(&id) else {
                    return;
                };
                member.started = Some(now);
                let queued = elapsed(member.submitted, now);
                self.metrics.tokens(TokenKind::PromptCached, cached_tokens);
                if !self.send(id, Update::Started { cached_tokens, queued }, now) {
                    return;
                }
                self.report_blocks(id, cached_tokens, table, now);
            }
            SequenceEvent::Computed { id, computed, table } => self.report_blocks(id, computed, table, now),
            SequenceEvent::Token {
                id,
                index,
                token,
                logprob,
                alternatives,
            } => {
                self.metrics.tokens(TokenKind::Generated, 1);
                let Some(member) = self.members.get_mut(&id) else {
                    return;
                };
                match member.first_token {
                    None => {
                        member.first_token = Some(now);
                        member.timings.prefill = elapsed(member.started.unwrap_or(member.submitted), now);
                    }
                    Some(first) if member.timings.first_step.is_zero() => {
                        member.timings.first_step = elapsed(first, now)
                    }
                    Some(_) => {}
                }
                self.send(
                    id,
                    Update::Token {
                        index,
                        token,
                        logprob,
                        alternatives,
                    },
                    now,
                );
            }
            SequenceEvent::Finished { id, reason } => self.finished(id, reason, now),
            SequenceEvent::Preempted { id } => {
                if let Some(member) = self.members.get_mut(&id) {
                    member.timings.preemptions += 1;
                }
            }
        }
    }

    fn finished(&mut self, id: SequenceId, reason: FinishReason, now: Time) {
        let Some(member) = self.members.get(&id) else { return };
        let finished = Update::Finished {
            reason,
            timings: member.timings,
        };
        if !self.send(id, finished, now) {
            return;
        }
        match self.members.get_mut(&id) {
            Some(member) if member.role == Role::Prefill => member.stage = Stage::Finished,
            _ => {
                if let Some(Member {
                    stage: Stage::Scheduled { handoff },
                    ..
                }) = self.members.remove(&id)
                {
                    self.release_handoff(handoff);
                }
            }
        }
    }

    /// Tells a prefill's reader of further complete blocks, held for it. (A prefill is never preempted: its table only grows.)
    fn report_blocks(&mut self, id: SequenceId, computed_tokens: usize, table: Vec<BlockId>, now: Time) {
        let Some(member) = self.members.get_mut(&id) else {
            return;
        };
        if member.role != Role::Prefill {
            return;
        }
        let complete = match computed_tokens >= member.prompt_tokens {
            true => self.layout.blocks_for(member.prompt_tokens),
            false => computed_tokens / self.layout.block_tokens,
        };
        if complete <= member.reported_blocks {
            return;
        }
        let blocks = table[member.reported_blocks..complete].to_vec();
        member.reported_blocks = complete;
        self.pool.retain(&blocks);
        self.held_reads += blocks.len();
        let hold = HeldBlocks::new(blocks, self.mailbox.clone());
        self.send(
            id,
            Update::Computed {
                computed_tokens,
                table,
                hold,
            },
            now,
        );
    }

    /// Sends an update; a reader that is gone or too slow loses its sequence.
    fn send(&mut self, id: SequenceId, update: Update, now: Time) -> bool {
        let sent = self.members.get(&id).is_some_and(|member| member.updates.send(update));
        if !sent && let Some(member) = self.members.remove(&id) {
            self.give_up(id, &member.stage, AbortReason::Cancelled, now);
        }
        sent
    }
}

fn elapsed(from: Time, to: Time) -> Duration {
    Duration::from_micros(to.0.saturating_sub(from.0))
}
