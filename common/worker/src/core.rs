//! Pool, scheduler and receiver of one node, and who wants to know what happens to each sequence. Pure: no I/O, no clock, no task.
//!
//! Everything here runs behind one lock ([`crate::shared`]) and is short: it never waits, and never copies KV bytes.

mod settle;

use std::{collections::HashMap, sync::Arc};

use baton_kv::{HandoffId, KvLayout, OutOfBlocks, Pool, Time};
use baton_scheduler::{
    FinishReason, NewSequence, Role, Scheduler, SchedulerConfig, SequenceEvent, SequenceId, StepOutput, StepPlan,
    SubmitError,
};
use baton_transfer::{
    AbortReason, Receiver, ReceiverAction, ReceiverConfig, Reserve, ReserveError, Ticket, grpc::Fences,
};

use crate::{
    HeldBlocks, Load, SequenceError, SequenceStream, SequenceTimings, Work, WorkerMetrics,
    error::abort_code,
    last_chunks::LastChunk,
    limits,
    load::Rates,
    mailbox::{Mailbox, Posted},
    stream::{UpdateSender, stream},
};

/// How far a sequence is.
enum Stage {
    /// Blocks are granted; the sequence starts when the handoff is verified.
    Reserved {
        handoff: HandoffId,
        sequence: Box<NewSequence>,
    },
    /// The scheduler has it. `handoff` is the one that it came from.
    Scheduled { handoff: Option<HandoffId> },
    /// A prefill that has finished: the scheduler holds its blocks until the stream is dropped.
    Finished,
}

/// One sequence or reservation, for as long as its stream lives.
struct Member {
    stage: Stage,
    updates: UpdateSender,
    role: Role,
    prompt_tokens: usize,
    /// Prefill: blocks of the prompt that were reported as complete.
    reported_blocks: usize,
    submitted: Time,
    started: Option<Time>,
    first_token: Option<Time>,
    timings: SequenceTimings,
}

/// The composition.
pub(crate) struct Core {
    pub(crate) pool: Pool,
    pub(crate) receiver: Receiver,
    scheduler: Scheduler,
    config: SchedulerConfig,
    layout: KvLayout,
    members: HashMap<SequenceId, Member>,
    handoffs: HashMap<HandoffId, SequenceId>,
    next_id: u64,
    held_reads: usize,
    lost: bool,
    /// Something was queued since the last look.
    queued: bool,
    pub(crate) rates: Rates,
    /// Filled by the scheduler, emptied by [`Core::settle`].
    events: Vec<SequenceEvent>,
    /// Filled by the receiver, emptied by [`Core::settle`].
    pub(crate) actions: Vec<ReceiverAction>,
    mailbox: Arc<Mailbox>,
    fences: Fences,
    metrics: WorkerMetrics,
    update_capacity: usize,
}

impl Core {
    pub(crate) fn new(
        blocks: usize,
        scheduler: SchedulerConfig,
        receiver: ReceiverConfig,
        update_capacity: usize,
        mailbox: Arc<Mailbox>,
        fences: Fences,
        metrics: WorkerMetrics,
    ) -> Self {
        let layout = receiver.layout;
        Self {
            pool: Pool::new(blocks, layout.block_tokens),
            receiver: Receiver::new(receiver),
            scheduler: Scheduler::new(scheduler),
            config: scheduler,
            layout,
            members: HashMap::new(),
            handoffs: HashMap::new(),
            next_id: 1,
            held_reads: 0,
            lost: false,
            queued: false,
            rates: Rates::default(),
            events: Vec::new(),
            actions: Vec::new(),
            mailbox,
            fences,
            metrics,
            update_capacity,
        }
    }

    /// Takes a sequence into the queue.
    pub(crate) fn submit(&mut self, work: Work, role: Role, now: Time) -> Result<SequenceStream, SequenceError> {
        if self.lost {
            return Err(SequenceError::EngineLost);
        }
        let sequence = work.into_sequence(self.draw_id(), role);
        let (id, prompt_tokens) = (sequence.id, sequence.prompt.len());
        self.scheduler.submit(sequence, &self.pool)?;
        self.queued = true;
        Ok(self.join(id, Stage::Scheduled { handoff: None }, role, prompt_tokens, now))
    }

    /// Grants blocks for a prompt that is computed elsewhere; the sequence is queued when its KV is verified.
    pub(crate) fn reserve(
        &mut self,
        work: Work,
        capability: baton_transfer::Capability,
        now: Time,
    ) -> Result<(Ticket, SequenceStream), SequenceError> {
        if self.lost {
            return Err(SequenceError::EngineLost);
        }
        let reserved = self
            .members
            .values()
            .filter(|member| matches!(member.stage, Stage::Reserved { .. }))
            .count();
        // What is handed over runs at once, before the queue: while somebody waits there, no more is promised than may run beside each other, and
        // the head.
        let (load, limit, running) = (self.scheduler.load(), self.config.max_waiting, self.config.max_running);
        let slots = if load.waiting > 0 { running - 1 } else { running + limit };
        if load.waiting + reserved >= limit || load.running + reserved >= slots {
            return Err(SubmitError::QueueFull { limit }.into());
        }
        // Nor are the blocks granted that the queue's head waits for.
        let (head, counts) = (self.scheduler.head_blocks(), self.pool.counts());
        let (needed, available) = (
            self.layout.blocks_for(work.prompt.len()) + head,
            counts.free + counts.cached,
        );
        if head > 0 && needed > available {
            return Err(ReserveError::OutOfBlocks(OutOfBlocks { needed, available }).into());
        }
        let reserve = Reserve {
            request: work.request,
            attempt: work.attempt,
            identity: work.identity,
            root: work.root,
            prompt: work.prompt.clone(),
            deadline: work.deadline,
            capability,
        };
        let sequence = Box::new(work.into_sequence(self.draw_id(), Role::Decode));
        // So that it is not refused when its KV has been sent.
        self.scheduler.check(&sequence, &self.pool)?;
        let ticket = self.receiver.reserve(reserve, now, &mut self.pool, &mut self.actions)?;
        let (id, handoff, prompt_tokens) = (sequence.id, ticket.handoff, sequence.prompt.len());
        self.handoffs.insert(handoff, id);
        let stream = self.join(
            id,
            Stage::Reserved { handoff, sequence },
            Role::Decode,
            prompt_tokens,
            now,
        );
        Ok((ticket, stream))
    }

    fn draw_id(&mut self) -> SequenceId {
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        id
    }

    fn join(&mut self, id: SequenceId, stage: Stage, role: Role, prompt_tokens: usize, now: Time) -> SequenceStream {
        // A prefill reports each block and each layer at most once, and a few things more: its stream never overflows.
        let capacity = match role {
            Role::Prefill => self.layout.blocks_for(prompt_tokens) + self.layout.layers + limits::PREFILL_UPDATES,
            Role::Decode => self.update_capacity,
        };
        let (updates, stream) = stream(id, capacity, self.mailbox.clone());
        let member = Member {
            stage,
            updates,
            role,
            prompt_tokens,
            reported_blocks: 0,
            submitted: now,
            started: None,
            first_token: None,
            timings: SequenceTimings::default(),
        };
        self.members.insert(id, member);
        stream
    }

    /// The reservation of a stream that is still waiting for its KV.
    pub(crate) fn reservation(&self, id: SequenceId) -> Option<HandoffId> {
        match self.members.get(&id)?.stage {
            Stage::Reserved { handoff, .. } => Some(handoff),
            _ => None,
        }
    }

    /// Plans a step; false when there is nothing to run.
    pub(crate) fn plan(&mut self, plan: &mut StepPlan) -> bool {
        plan.clear();
        !self.lost && self.scheduler.plan(&mut self.pool, plan, &mut self.events)
    }

    /// The prompts that `plan`, which was just made, ends, as far as their layers are worth telling of: every `layers_bytes` bytes.
    pub(crate) fn last_chunks(&mut self, plan: &StepPlan, layers_bytes: usize) -> Vec<LastChunk> {
        let mut chunks = Vec::new();
        for span in plan.sampling_spans() {
            let member = self.members.get(&span.sequence);
            let Some(member) = member.filter(|member| member.role == Role::Prefill) else {
                continue;
            };
            let (layout, tokens, table) = (&self.layout, member.prompt_tokens, plan.table(span));
            let first = member.reported_blocks;
            let bytes = (tokens - first * layout.block_tokens) * layout.token_bytes();
            let every = layers_bytes.div_ceil(bytes.div_ceil(layout.layers));
            if every < layout.layers {
                let blocks = table[first..layout.blocks_for(tokens)].to_vec();
                self.pool.retain(&blocks);
                self.held_reads += blocks.len();
                let hold = HeldBlocks::new(blocks, self.mailbox.clone());
                chunks.push(LastChunk::new(
                    member.updates.downgrade(),
                    tokens,
                    every,
                    layout.layers,
                    table,
                    hold,
                ));
            }
        }
        chunks
    }

    /// Takes in the planned step's result.
    pub(crate) fn complete(&mut self, output: &StepOutput) {
        self.scheduler.complete(output, &mut self.pool, &mut self.events);
    }

    /// The engine refused the planned step: its sequences end, the others go on.
    pub(crate) fn step_refused(&mut self, message: &str, now: Time) {
        self.scheduler.failed(&mut self.pool, &mut self.events);
        let events = std::mem::take(&mut self.events);
        for event in events {
            match event {
                // Whoever was cancelled has left already: these are the step's own.
                SequenceEvent::Finished {
                    id,
                    reason: FinishReason::Cancelled,
                } => {
                    self.fail(id, SequenceError::StepRefused(message.to_owned()), now);
                }
                event => self.events.push(event),
            }
        }
    }

    /// The engine is gone: every sequence ends with a typed error, and none is taken any more. The tables are not touched again: they may be what broke.
    pub(crate) fn lose(&mut self) {
        self.lost = true;
        self.events.clear();
        for (_, member) in self.members.drain() {
            member.updates.fail(SequenceError::EngineLost);
        }
    }

    /// Whether the engine's thread may find something to run. Forgets what was queued since the last call.
    pub(crate) fn take_runnable(&mut self, load: &Load) -> bool {
        std::mem::take(&mut self.queued) || load.scheduler.waiting + load.scheduler.running > 0
    }

    /// Ends the handoffs whose time has passed.
    pub(crate) fn tick(&mut self, now: Time) {
        self.receiver.tick(now, &mut self.pool, &mut self.actions);
    }

    /// Bytes of one block.
    pub(crate) fn block_bytes(&self) -> usize {
        self.layout.block_bytes()
    }

    /// Whether the engine is gone.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost
    }

    /// Takes in what guards gave up.
    pub(crate) fn take_posted(&mut self, posted: &mut Vec<Posted>, now: Time) {
        for posted in posted.drain(..) {
            match posted {
                _ if self.lost => {}
                Posted::Closed(id) => {
                    if let Some(member) = self.members.remove(&id) {
                        self.give_up(id, &member.stage, AbortReason::Cancelled, now);
                    }
                }
                Posted::Release(blocks) => {
                    self.held_reads -= blocks.len();
                    self.pool.release(&blocks);
                }
            }
        }
    }

    /// Ends a member with an error, and gives back what it has.
    fn fail(&mut self, id: SequenceId, error: SequenceError, now: Time) {
        if let Some(member) = self.members.remove(&id) {
            let abort = match &error {
                SequenceError::Handoff(reason) => *reason,
                _ => AbortReason::Node,
            };
            member.updates.fail(error);
            self.give_up(id, &member.stage, abort, now);
        }
    }

    /// Gives back what a member that has left had.
    fn give_up(&mut self, id: SequenceId, stage: &Stage, reason: AbortReason, now: Time) {
        match *stage {
            Stage::Reserved { handoff, .. } => {
                self.handoffs.remove(&handoff);
                self.metrics.handoff_aborted(abort_code(reason));
                self.receiver
                    .abort(handoff, reason, now, &mut self.pool, &mut self.actions);
            }
            Stage::Scheduled { handoff } => {
                self.scheduler.cancel(id, &mut self.pool, &mut self.events);
                self.release_handoff(handoff);
            }
            Stage::Finished => self.scheduler.release(id, &mut self.pool),
        }
    }

    fn release_handoff(&mut self, handoff: Option<HandoffId>) {
        if let Some(handoff) = handoff {
            self.handoffs.remove(&handoff);
            self.receiver.released(handoff, &mut self.actions);
        }
    }

    /// The node's load now.
    pub(crate) fn load(&self) -> Load {
        Load {
            pool: self.pool.counts(),
            scheduler: self.scheduler.load(),
            sequences: self.members.len(),
            handoffs: self.receiver.handoffs(),
            streams: self.receiver.streams(),
            held_reads: self.held_reads,
            prefill_tokens_per_s: self.rates.prefill_tokens_per_s,
            decode_step_ms: self.rates.decode_step_ms,
        }
    }

    /// When nothing runs, free + cached = total. A violation is logged: blocks have leaked. Called between steps.
    pub(crate) fn check_idle(&self) {
        let load = self.load();
        if self.lost || !load.is_idle() {
            return;
        }
        if load.pool.free + load.pool.cached != load.pool.total {
            tracing::error!(pool = ?load.pool, "KV blocks have leaked: the node is idle and holds some");
        }
        #[cfg(debug_assertions)]
        if let Err(broken) = self.pool.check() {
            tracing::error!(broken, "the pool's table is broken");
        }
    }
}
