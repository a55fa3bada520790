//! The decode node's table of incoming handoffs.

mod fill;
mod handoff;
#[cfg(test)]
mod tests;
mod types;

use std::collections::{BTreeMap, HashMap};

use baton_kv::{Checksum, HandoffId, Lease, Pool, RequestId, Time};
use baton_proto::PROTOCOL_MIN;

use crate::{Claims, FinalClaims, Reject, Terms, Ticket, Transport};
use fill::Fill;
use handoff::{Handoff, Phase};

pub use types::{
    AbortReason, HandoffState, PieceWrite, PiecesHeader, ReceiverAction, ReceiverConfig, Reserve, ReserveError,
    RunHeader, StreamId, Verdict, WritePermit,
};

/// The table of incoming handoffs. Pure; the driver keeps it beside the pool, behind one lock, and calls [`Receiver::tick`] at
/// [`Receiver::next_deadline`].
///
/// Who owns what: the prefix that was found is held once by the handoff; slots are granted to it; from `Verified` on all of them are held once for
/// the sequence to come, and from [`Receiver::decoding`] on they are that sequence's.
pub struct Receiver {
    config: ReceiverConfig,
    /// Ordered, so that equal inputs give equal actions.
    handoffs: BTreeMap<HandoffId, Handoff>,
    /// The live handoff of each request; aborting ones are not listed.
    by_request: HashMap<RequestId, HandoffId>,
    /// The handoff that each open stream fills.
    streams: HashMap<StreamId, HandoffId>,
    next_handoff: u64,
}

impl Receiver {
    /// What a peer must agree to.
    pub fn terms(&self) -> Terms {
        Terms {
            node: self.config.node.clone(),
            epoch: self.config.epoch,
            identity: self.config.identity,
            layout: self.config.layout,
            versions: PROTOCOL_MIN..=self.config.protocol_max,
        }
    }

    /// Empty.
    pub fn new(config: ReceiverConfig) -> Self {
        Self {
            config,
            handoffs: BTreeMap::new(),
            by_request: HashMap::new(),
            streams: HashMap::new(),
            next_handoff: 1,
        }
    }

    /// Finds the prompt's prefix in the pool (at most all but its last token) and grants blocks for the rest. An older attempt of the
    /// same request is aborted first.
    pub fn reserve(
        &mut self,
        reserve: Reserve,
        now: Time,
        pool: &mut Pool,
        actions: &mut Vec<ReceiverAction>,
    ) -> Result<Ticket, ReserveError> {
        if reserve.prompt.is_empty() {
            return Err(ReserveError::EmptyPrompt);
        }
        if reserve.identity != self.config.identity {
            return Err(ReserveError::IdentityMismatch);
        }
        if now >= reserve.deadline {
            return Err(ReserveError::DeadlinePassed);
        }
        if let Some(&older) = self.by_request.get(&reserve.request) {
            let current = self.handoffs[&older].attempt;
            if current >= reserve.attempt {
                return Err(ReserveError::StaleAttempt { current });
            }
            self.abort(older, AbortReason::Superseded, now, pool, actions);
        }
        if self.handoffs.len() >= self.config.max_handoffs {
            return Err(ReserveError::TooManyHandoffs {
                limit: self.config.max_handoffs,
            });
        }

        let layout = self.config.layout;
        let id = HandoffId(self.next_handoff);
        let mut prompt = reserve.prompt;
        let hit = pool.acquire_prefix(reserve.root, &prompt, prompt.len() - 1);
        let held_blocks = hit.blocks.len();
        let slots = match pool.grant(id, layout.blocks_for(prompt.len()) - held_blocks) {
            Ok(slots) => slots,
            Err(error) => {
                pool.release(&hit.blocks);
                return Err(error.into());
            }
        };
        self.next_handoff += 1;

        let lease = Lease::grant(now, self.config.lease_ms, reserve.deadline);
        let ticket = Ticket {
            request: reserve.request,
            attempt: reserve.attempt,
            decode_node: self.config.node.clone(),
            address: self.config.address.clone(),
            epoch: self.config.epoch,
            handoff: id,
            held_blocks,
            slots: slots.clone(),
            lease_ms: lease.remaining_ms(now),
            identity: self.config.identity,
            layout,
            capability: reserve.capability.clone(),
            protocol: self.config.protocol_max,
        };
        self.by_request.insert(reserve.request, id);
        self.handoffs.insert(
            id,
            Handoff {
                request: reserve.request,
                attempt: reserve.attempt,
                capability: reserve.capability,
                parent: hit.names.last().copied().unwrap_or(reserve.root),
                tokens: prompt.split_off(held_blocks * layout.block_tokens),
                deadline: reserve.deadline,
                lease,
                phase: Phase::Reserved,
                held: hit.blocks,
                fill: Fill::new(slots.len(), layout.layers),
                slots,
                stream: None,
                in_flight: 0,
                claims: None,
                final_at: now,
                resent: false,
            },
        );
        Ok(ticket)
    }

    /// Extends the lease (the router, until it has dispatched; the sender's heartbeats do it through [`Receiver::heartbeat`]).
    /// Returns what remains, ms; once verified, what remains until the request's deadline.
    pub fn renew(&mut self, handoff: HandoffId, now: Time) -> Result<u64, Reject> {
        let lease_ms = self.config.lease_ms;
        let row = self.handoffs.get_mut(&handoff).ok_or(Reject::UnknownHandoff)?;
        match row.phase {
            Phase::Reserved | Phase::Filling { .. } if row.lease.renew(now, lease_ms) => {
                Ok(row.lease.remaining_ms(now))
            }
            Phase::Reserved | Phase::Filling { .. } => Err(Reject::LeaseEnded),
            Phase::Verified { .. } | Phase::Decoding => Ok(now.ms_until(row.deadline)),
            Phase::Aborting { reject, .. } => Err(reject),
        }
    }

    /// A stream's first frame. On success the stream is the only one that may fill the handoff; returns what remains of the lease, ms.
    pub fn opened(&mut self, stream: StreamId, claims: &Claims, now: Time) -> Result<u64, Reject> {
        let known = (PROTOCOL_MIN..=self.config.protocol_max).contains(&claims.protocol);
        // Before version 2 there was one transport.
        if !known || (claims.protocol < 2 && claims.transport != Transport::Grpc) {
            return Err(Reject::ProtocolMismatch);
        }
        if claims.epoch != self.config.epoch {
            return Err(Reject::StaleEpoch);
        }
        let row = self.handoffs.get_mut(&claims.handoff).ok_or(Reject::UnknownHandoff)?;
        if !row.capability.matches(&claims.capability) {
            return Err(Reject::BadCapability);
        }
        if claims.request != row.request || claims.attempt != row.attempt {
            return Err(Reject::UnknownHandoff);
        }
        if claims.identity != self.config.identity {
            return Err(Reject::IdentityMismatch);
        }
        if claims.layout != self.config.layout {
            return Err(Reject::LayoutMismatch);
        }
        match row.phase {
            Phase::Reserved => {}
            Phase::Filling { .. } => return Err(Reject::StreamActive),
            Phase::Verified { .. } | Phase::Decoding => return Err(Reject::UnknownHandoff),
            Phase::Aborting { reject, .. } => return Err(reject),
        }
        if self.streams.contains_key(&stream) {
            return Err(Reject::Malformed);
        }
        if !row.lease.renew(now, self.config.lease_ms) {
            return Err(Reject::LeaseEnded);
        }
        row.phase = Phase::Filling {
            protocol: claims.protocol,
            transport: claims.transport,
        };
        row.stream = Some(stream);
        self.streams.insert(stream, claims.handoff);
        Ok(row.lease.remaining_ms(now))
    }

    /// The sender is alive. Returns what remains of the lease, ms.
    pub fn heartbeat(&mut self, stream: StreamId, now: Time) -> Result<u64, Reject> {
        let lease_ms = self.config.lease_ms;
        let (_, row) = self.filling(stream, now)?;
        row.lease.renew(now, lease_ms);
        Ok(row.lease.remaining_ms(now))
    }

    /// KV has come: says where it goes and renews the lease; `None` when all of it is here already (or being copied) and is to be dropped.
    pub fn begin_write(
        &mut self,
        stream: StreamId,
        frame: &PiecesHeader,
        now: Time,
    ) -> Result<Option<WritePermit>, Reject> {
        let (layout, lease_ms) = (self.config.layout, self.config.lease_ms);
        let (handoff, row) = self.filling(stream, now)?;
        let (protocol, transport) = row.check_filling(now)?;
        if frame.protocol != protocol {
            return Err(Reject::Malformed);
        }
        let writes = row.begin(frame, transport, &layout)?;
        if writes.is_empty() {
            return Ok(None);
        }
        row.lease.renew(now, lease_ms);
        row.in_flight += 1;
        Ok(Some(WritePermit { handoff, writes }))
    }

    /// The copies have ended: `sums` has for each of the permit's writes, in their order, the checksum of what lies there now; `None` when they could not
    /// be made: then the handoff aborts. Returns the verdict, if this was the last and FINAL is here.
    pub fn landed(
        &mut self,
        permit: WritePermit,
        sums: Option<&[Checksum]>,
        now: Time,
        pool: &mut Pool,
        actions: &mut Vec<ReceiverAction>,
    ) -> Option<Result<Verdict, Reject>> {
        let layout = self.config.layout;
        let WritePermit { handoff, writes } = permit;
        let row = self.handoffs.get_mut(&handoff).expect("a handoff outlives its permits");
        row.in_flight -= 1;
        match row.phase {
            Phase::Filling { .. } => {}
            Phase::Aborting { .. } => {
                self.drain(handoff, pool, actions);
                return None;
            }
            Phase::Reserved | Phase::Verified { .. } | Phase::Decoding => {
                unreachable!("no permit is out in this state")
            }
        }
        let Some(sums) = sums.filter(|sums| sums.len() == writes.len()) else {
            self.abort(handoff, AbortReason::Node, now, pool, actions);
            return None;
        };
        for (write, sum) in writes.iter().zip(sums) {
            let layer_bytes = layout.valid_bytes(write.valid_tokens) / layout.layers;
            row.fill.landed(write.slot, &write.layers, layer_bytes, *sum);
        }
        self.judge(handoff, now, pool, actions)
    }

    /// FINAL has come. Returns the verdict if every run has landed. A second FINAL that says the same changes nothing.
    pub fn finished(
        &mut self,
        stream: StreamId,
        claims: &FinalClaims,
        now: Time,
        pool: &mut Pool,
        actions: &mut Vec<ReceiverAction>,
    ) -> Result<Option<Verdict>, Reject> {
        let ReceiverConfig {
            layout,
            lease_ms,
            vocabulary,
            ..
        } = self.config;
        let (handoff, row) = self.filling(stream, now)?;
        row.check_manifest(claims, &layout)?;
        // The first token would be an engine's input in the next step.
        let first = &claims.first;
        if first.token as usize >= vocabulary || first.alternatives.iter().any(|&(id, _)| id as usize >= vocabulary) {
            return Err(Reject::Malformed);
        }
        if let Some(known) = &row.claims {
            return if known == claims {
                Ok(None)
            } else {
                Err(Reject::ManifestMismatch)
            };
        }
        row.lease.renew(now, lease_ms);
        row.claims = Some(claims.clone());
        row.final_at = now;
        self.judge(handoff, now, pool, actions).transpose()
    }

    /// Compares what lies in the slots with FINAL, once all is here. An error says what to tell the sender, and that the handoff has ended.
    fn judge(
        &mut self,
        id: HandoffId,
        now: Time,
        pool: &mut Pool,
        actions: &mut Vec<ReceiverAction>,
    ) -> Option<Result<Verdict, Reject>> {
        let row = self.handoffs.get_mut(&id).expect("checked by the caller");
        let wrong = row.wrong_slots()?;
        if wrong.is_empty() {
            self.verified(id, pool, actions);
            return Some(Ok(Verdict::Verified));
        }
        if row.resent {
            self.abort(id, AbortReason::Rejected(Reject::ChecksumMismatch), now, pool, actions);
            return Some(Err(Reject::ChecksumMismatch));
        }
        row.resent = true;
        row.claims = None;
        for slot in &wrong {
            row.fill.reset(*slot);
        }
        Some(Ok(Verdict::Resend { slots: wrong }))
    }

    /// Every checksum has matched: the blocks become held for the sequence to come, and the full ones get their names.
    fn verified(&mut self, id: HandoffId, pool: &mut Pool, actions: &mut Vec<ReceiverAction>) {
        let layout = self.config.layout;
        let row = self.handoffs.get_mut(&id).expect("checked by the caller");
        pool.accept(id, &row.slots);
        let mut parent = row.parent;
        for (slot, tokens) in row.slots.iter().zip(row.tokens.chunks_exact(layout.block_tokens)) {
            parent = pool.name(slot.block, parent, tokens);
        }
        let mut table = std::mem::take(&mut row.held);
        table.extend(row.slots.iter().map(|slot| slot.block));
        let kv_bytes = (0..row.slots.len())
            .map(|slot| layout.valid_bytes(row.valid_tokens(slot, &layout)) as u64)
            .sum();
        let claims = row.claims.take().expect("judged after FINAL");
        actions.push(ReceiverAction::Verified {
            handoff: id,
            request: row.request,
            attempt: row.attempt,
            table: table.clone(),
            first: claims.first,
            kv_bytes,
            kv_blocks: row.slots.len(),
            final_at: row.final_at,
        });
        row.phase = Phase::Verified { table };
        // An answer may be long: what concerned the transfer is not kept for it.
        (row.slots, row.tokens) = Default::default();
        row.fill = Fill::new(0, layout.layers);
        // Nothing on the stream concerns this handoff any more.
        if let Some(stream) = row.stream.take() {
            self.streams.remove(&stream);
        }
    }

    /// The sequence was submitted: the table's blocks are its own now. False when the handoff ended meanwhile: it was aborted
    /// ([`ReceiverAction::Aborted`] said so), and its hold on the blocks was given up.
    pub fn decoding(&mut self, handoff: HandoffId) -> bool {
        match self.handoffs.get_mut(&handoff) {
            Some(row) if matches!(row.phase, Phase::Verified { .. }) => {
                row.phase = Phase::Decoding;
                true
            }
            _ => false,
        }
    }

    /// The sequence has ended and the handoff is forgotten. Unknown handoffs and other states are ignored.
    pub fn released(&mut self, handoff: HandoffId, actions: &mut Vec<ReceiverAction>) {
        if self.state(handoff) == Some(HandoffState::Decoding) {
            self.forget(handoff, actions);
        }
    }

    /// Ends a handoff in any state before `Aborting`. In `Decoding` the sequence is the driver's to cancel. Unknown handoffs are ignored.
    pub fn abort(
        &mut self,
        handoff: HandoffId,
        reason: AbortReason,
        now: Time,
        pool: &mut Pool,
        actions: &mut Vec<ReceiverAction>,
    ) {
        let Some(row) = self.handoffs.get_mut(&handoff) else {
            return;
        };
        if matches!(row.phase, Phase::Aborting { .. }) {
            return;
        }
        actions.push(ReceiverAction::Aborted {
            handoff,
            request: row.request,
            attempt: row.attempt,
            reason,
        });
        let reject = match reason {
            AbortReason::Rejected(reject) => reject,
            AbortReason::LeaseEnded | AbortReason::Deadline => Reject::LeaseEnded,
            _ => Reject::Aborted,
        };
        let aborting = Phase::Aborting {
            drain_until: now.after_ms(self.config.drain_ms),
            reject,
        };
        match std::mem::replace(&mut row.phase, aborting) {
            Phase::Decoding => {}
            Phase::Verified { table } => pool.release(&table),
            Phase::Reserved | Phase::Filling { .. } | Phase::Aborting { .. } => {
                pool.release(&std::mem::take(&mut row.held));
                pool.quarantine(handoff, &row.slots);
            }
        }
        if let Some(stream) = row.stream {
            actions.push(ReceiverAction::Fence { stream, reject });
        }
        self.by_request.remove(&row.request);
        self.drain(handoff, pool, actions);
    }

    /// Frees an aborting handoff's blocks if no write can land any more.
    fn drain(&mut self, handoff: HandoffId, pool: &mut Pool, actions: &mut Vec<ReceiverAction>) {
        let row = &self.handoffs[&handoff];
        if row.in_flight == 0 && row.stream.is_none() {
            pool.drained(handoff, &row.slots);
            self.forget(handoff, actions);
        }
    }

    fn forget(&mut self, handoff: HandoffId, actions: &mut Vec<ReceiverAction>) {
        let row = self.handoffs.remove(&handoff).expect("a handoff is released once");
        if self.by_request.get(&row.request) == Some(&handoff) {
            self.by_request.remove(&row.request);
        }
        actions.push(ReceiverAction::Released { handoff });
    }

    /// The transport has closed the stream: no byte can come from it any more. Before `Verified` this aborts the handoff, with
    /// `refused` as the reason where the stream was closed for that.
    pub fn stream_closed(
        &mut self,
        stream: StreamId,
        refused: Option<Reject>,
        now: Time,
        pool: &mut Pool,
        actions: &mut Vec<ReceiverAction>,
    ) {
        let Some(handoff) = self.streams.remove(&stream) else {
            return;
        };
        let row = self
            .handoffs
            .get_mut(&handoff)
            .expect("a stream's handoff is in the table");
        row.stream = None;
        if matches!(row.phase, Phase::Aborting { .. }) {
            self.drain(handoff, pool, actions);
        } else {
            let reason = refused.map_or(AbortReason::StreamClosed, AbortReason::Rejected);
            self.abort(handoff, reason, now, pool, actions);
        }
    }

    /// Ends what has passed its deadline.
    pub fn tick(&mut self, now: Time, pool: &mut Pool, actions: &mut Vec<ReceiverAction>) {
        let due: Vec<HandoffId> = self
            .handoffs
            .iter()
            .filter(|(_, row)| now >= row.ends())
            .map(|(handoff, _)| *handoff)
            .collect();
        for handoff in due {
            let row = self.handoffs.get_mut(&handoff).expect("listed just now");
            if let Phase::Aborting { drain_until, .. } = &mut row.phase {
                // From this state on no frame of the stream gets a permit, so that copies under way are all that can still land.
                *drain_until = now.after_ms(self.config.drain_ms);
                if let Some(stream) = row.stream.take() {
                    self.streams.remove(&stream);
                }
                if row.in_flight > 0 {
                    actions.push(ReceiverAction::DrainOverdue {
                        handoff,
                        in_flight: row.in_flight,
                    });
                }
                self.drain(handoff, pool, actions);
            } else {
                let reason = if now >= row.deadline {
                    AbortReason::Deadline
                } else {
                    AbortReason::LeaseEnded
                };
                self.abort(handoff, reason, now, pool, actions);
            }
        }
    }

    /// When [`Receiver::tick`] has something to do next, if nothing else happens.
    pub fn next_deadline(&self) -> Option<Time> {
        self.handoffs.values().map(Handoff::ends).min()
    }

    /// Where a handoff is; `None` when released or unknown.
    pub fn state(&self, handoff: HandoffId) -> Option<HandoffState> {
        self.handoffs.get(&handoff).map(Handoff::state)
    }

    /// Live handoffs, aborting ones included. 0 when idle.
    pub fn handoffs(&self) -> usize {
        self.handoffs.len()
    }

    /// Open streams that fill a handoff, or filled one that is being aborted.
    pub fn streams(&self) -> usize {
        self.streams.len()
    }

    /// The handoff that `stream` fills, if it takes frames now.
    fn filling(&mut self, stream: StreamId, now: Time) -> Result<(HandoffId, &mut Handoff), Reject> {
        let handoff = *self.streams.get(&stream).ok_or(Reject::UnknownHandoff)?;
        let row = self
            .handoffs
            .get_mut(&handoff)
            .expect("a stream's handoff is in the table");
        row.check_filling(now)?;
        Ok((handoff, row))
    }
}
