//! Making a step: decode rows, then prefill chunks, then who comes in from the queue.

use baton_kv::Pool;

use super::{Flight, Scheduler, Sequence};
use crate::{Role, Sample, SequenceEvent, Span, StepPlan};

/// What became of a sequence that needed room in its table.
enum Room {
    /// It has it.
    There,
    /// Not in this step: nobody else can be preempted.
    Stalled,
    /// It was the one to be preempted.
    Preempted,
}

impl Scheduler {
    /// Plans the next step. False, and an empty plan, when nothing can run: nothing is here, or what is here waits for blocks that handoffs,
    /// pushes or finished prefills hold. Must not be called between `plan` and `complete` or `failed`.
    ///
    /// Decode rows come first, oldest sequence first; then prefill chunks by arrival; then the queue's head, as long as it fits. When the pool is
    /// out as sequences grow, the most recently arrived running [`Role::Decode`] sequence is preempted, never the oldest running one: so that
    /// one always comes to its end, and then the next.
    pub fn plan(&mut self, pool: &mut Pool, plan: &mut StepPlan, events: &mut Vec<SequenceEvent>) -> bool {
        assert!(self.flight.is_empty(), "the running step is not complete");
        plan.clear();
        for (mut sequence, reason) in self.ended.drain(..) {
            sequence.give_back(pool);
            let id = sequence.id;
            events.push(SequenceEvent::Finished { id, reason });
        }
        let preemptions = self.preemptions;
        self.plan_running(1..=1, pool, plan, events);
        self.plan_running(2..=usize::MAX, pool, plan, events);
        // Who was just preempted would only take back what it gave.
        if self.preemptions == preemptions {
            while self.has_room(plan) && self.running.len() < self.config.max_running {
                let Some(at) = self.admit(pool, events) else { break };
                self.push_span(at, plan);
            }
        }
        !plan.spans.is_empty()
    }

    /// Rows and spans are left in the step.
    fn has_room(&self, plan: &StepPlan) -> bool {
        plan.rows() < self.config.token_budget && plan.spans.len() < self.config.max_running
    }

    /// Rows that the next span may have.
    fn chunk(&self, sequence: &Sequence, plan: &StepPlan) -> usize {
        let limit = self.config.chunk_tokens.min(self.config.token_budget - plan.rows());
        sequence.remaining().min(limit)
    }

    /// Adds the running sequences, oldest first, that have `remaining` rows to compute.
    fn plan_running(
        &mut self,
        remaining: std::ops::RangeInclusive<usize>,
        pool: &mut Pool,
        plan: &mut StepPlan,
        events: &mut Vec<SequenceEvent>,
    ) {
        let mut at = 0;
        while at < self.running.len() && self.has_room(plan) {
            if !remaining.contains(&self.running[at].remaining()) {
                at += 1;
                continue;
            }
            match self.make_room(at, self.chunk(&self.running[at], plan), pool, events) {
                Room::There => {
                    self.push_span(at, plan);
                    at += 1;
                }
                Room::Stalled => at += 1,
                Room::Preempted => {}
            }
        }
    }

    /// Sees to it that the table of `running[at]` holds `rows` more tokens, and preempts others, or it, for that.
    fn make_room(&mut self, at: usize, rows: usize, pool: &mut Pool, events: &mut Vec<SequenceEvent>) -> Room {
        loop {
            let sequence = &mut self.running[at];
            let blocks = (sequence.context + rows).div_ceil(self.config.block_tokens);
            let missing = blocks.saturating_sub(sequence.table.len());
            if pool.allocate_into(missing, &mut sequence.table).is_ok() {
                return Room::There;
            }
            let preemptible = |sequence: &Sequence| sequence.role == Role::Decode && sequence.rows == 0;
            match self.running.iter().rposition(preemptible) {
                Some(victim) if victim > 0 && victim >= at => {
                    self.preempt(victim, pool, events);
                    if victim == at {
                        return Room::Preempted;
                    }
                }
                _ => return Room::Stalled,
            }
        }
    }

    /// Back into the queue, at its place by arrival; its full blocks can still be found until they are evicted.
    fn preempt(&mut self, at: usize, pool: &mut Pool, events: &mut Vec<SequenceEvent>) {
        let mut sequence = self.running.remove(at);
        sequence.give_back(pool);
        sequence.context = 0;
        self.preemptions += 1;
        events.push(SequenceEvent::Preempted { id: sequence.id });
        let at = self.waiting.partition_point(|other| other.arrival < sequence.arrival);
        self.waiting.insert(at, sequence);
    }

    /// Lets the head of the queue run if its tokens so far fit, and one block more if it will grow beyond. It gets these blocks now, so that
    /// what was admitted can always be prefilled. Returns its place in `running`.
    fn admit(&mut self, pool: &mut Pool, events: &mut Vec<SequenceEvent>) -> Option<usize> {
        let sequence = self.waiting.front_mut()?;
        let block_tokens = self.config.block_tokens;
        let total = sequence.tokens.len();
        sequence.name_until(total - 1, block_tokens);
        let names = &sequence.names[..(total - 1) / block_tokens];
        let hit = pool.acquire_named(sequence.root, names, &sequence.tokens);
        let missing = total.div_ceil(block_tokens) - hit.blocks.len();
        let counts = pool.counts();
        if sequence.entry_blocks(block_tokens) - hit.blocks.len() > counts.free + counts.cached {
            pool.release(&hit.blocks);
            return None;
        }

        let mut sequence = self.waiting.pop_front().expect("just seen");
        sequence.context = hit.blocks.len() * block_tokens;
        sequence.named_blocks = hit.blocks.len();
        sequence.table = hit.blocks;
        if !sequence.started {
            sequence.started = true;
            events.push(SequenceEvent::Started {
                id: sequence.id,
                cached_tokens: sequence.context.min(sequence.prompt_len),
                table: sequence.table.clone(),
            });
        }
        pool.allocate_into(missing, &mut sequence.table).expect("just counted");
        let at = self.running.partition_point(|other| other.arrival < sequence.arrival);
        self.running.insert(at, sequence);
        Some(at)
    }

    /// Adds the next chunk of `running[at]`, for which its table has room.
    fn push_span(&mut self, at: usize, plan: &mut StepPlan) {
        let rows = self.chunk(&self.running[at], plan);
        let sequence = &mut self.running[at];
        sequence.rows = rows;
        let end = sequence.context + rows;
        let samples = end == sequence.tokens.len();
        let (first_row, first_block) = (plan.tokens.len(), plan.tables.len());
        let blocks = end.div_ceil(self.config.block_tokens);
        plan.tokens.extend_from_slice(&sequence.tokens[sequence.context..end]);
        plan.tables.extend_from_slice(&sequence.table[..blocks]);
        plan.spans.push(Span {
            sequence: sequence.id,
            rows: first_row..plan.tokens.len(),
            context: sequence.context,
            table: first_block..plan.tables.len(),
            sample: samples.then(|| {
                let first = plan.history.len();
                let history = sequence.sampling.history(&sequence.tokens, sequence.prompt_len);
                plan.history.extend_from_slice(history);
                Sample {
                    params: sequence.sampling.clone(),
                    index: sequence.output().len() as u32,
                    history: first..plan.history.len(),
                }
            }),
        });
        self.flight.push(Flight {
            arrival: sequence.arrival,
            samples,
        });
    }
}
