//! Making a step: first who gets how many rows, then the plan.

use baton_kv::Pool;

use super::{Flight, Scheduler, Sequence};
use crate::{Role, Sample, SequenceEvent, Span, StepPlan};

/// Of the rows that decoding sequences leave, this part is kept for prompts that end within the step: a short prompt does not wait until long ones
/// are through, and these are slowed down by no more than that.
const SHORT_PART: usize = 4;

/// What became of a sequence that needed room in its table.
enum Room {
    /// It has it.
    There,
    /// Not in this step: nobody else can be preempted.
    Stalled,
    /// It was the one to be preempted.
    Preempted,
}

/// What the step being planned still has to give.
struct Left {
    rows: usize,
    spans: usize,
}

impl Scheduler {
    /// Plans the next step. False, and an empty plan, when nothing can run: nothing is here, or what is here waits for blocks that handoffs,
    /// pushes or finished prefills hold. Must not be called between `plan` and `complete` or `failed`.
    ///
    /// Rows go, by arrival each time:
    /// 1. one to the oldest running sequence, whatever it does;
    /// 2. one to each that decodes;
    /// 3. to prompts, a chunk each; but a quarter of what is left then only to those that end in this step;
    /// 4. to the queue's head, as long as it fits;
    /// 5. what nobody took of that quarter, to prompts again.
    ///
    /// When the pool is out as sequences grow, the most recently arrived running [`Role::Decode`] sequence that has no row yet is preempted, never the
    /// oldest running one. So the oldest always comes to its end, and then the next: no sequence starves.
    pub fn plan(&mut self, pool: &mut Pool, plan: &mut StepPlan, events: &mut Vec<SequenceEvent>) -> bool {
        assert!(self.flight.is_empty(), "the running step is not complete");
        plan.clear();
        for (mut sequence, reason) in self.ended.drain(..) {
            sequence.give_back(pool);
            let id = sequence.id;
            events.push(SequenceEvent::Finished { id, reason });
        }
        for sequence in &mut self.running {
            sequence.catch_up(self.config.block_tokens, pool);
        }
        let preemptions = self.preemptions;
        let left = &mut Left {
            rows: self.config.token_budget,
            spans: self.config.max_running,
        };
        if !self.running.is_empty() {
            self.grant(0, 1, left, pool, events);
        }
        self.share(left, pool, events, |sequence, _| usize::from(sequence.remaining() == 1));
        let (chunk, reserve) = (self.config.chunk_tokens, left.rows / SHORT_PART);
        self.share(left, pool, events, |sequence, rows| match sequence.remaining() {
            last if last <= chunk.min(sequence.rows + rows) => last,
            _ => chunk.min(sequence.rows + rows.saturating_sub(reserve)),
        });
        // Who was just preempted would only take back what it gave.
        if self.preemptions == preemptions {
            while left.rows > 0 && left.spans > 0 && self.running.len() < self.config.max_running {
                let Some(at) = self.admit(pool, events) else { break };
                let rows = self.running[at].remaining().min(chunk).min(left.rows);
                self.grant(at, rows, left, pool, events);
            }
        }
        self.share(left, pool, events, |sequence, rows| {
            sequence.remaining().min(chunk).min(sequence.rows + rows)
        });

        // Decode rows first.
        for decoding in [true, false] {
            for at in 0..self.running.len() {
                let sequence = &self.running[at];
                if sequence.rows > 0 && (sequence.remaining() == 1) == decoding {
                    self.push_span(at, plan);
                }
            }
        }
        !plan.spans.is_empty()
    }

    /// Gives rows to the running sequences, oldest first: as many as `wanted` says that it should have in all, told how many are left.
    fn share(
        &mut self,
        left: &mut Left,
        pool: &mut Pool,
        events: &mut Vec<SequenceEvent>,
        wanted: impl Fn(&Sequence, usize) -> usize,
    ) {
        let mut at = 0;
        while at < self.running.len() && left.rows > 0 {
            let rows = wanted(&self.running[at], left.rows);
            if !matches!(self.grant(at, rows, left, pool, events), Room::Preempted) {
                at += 1;
            }
        }
    }

    /// Sees to it that `running[at]` has `rows` rows in the step, if it has fewer and its table can have room for them.
    fn grant(
        &mut self,
        at: usize,
        rows: usize,
        left: &mut Left,
        pool: &mut Pool,
        events: &mut Vec<SequenceEvent>,
    ) -> Room {
        let before = self.running[at].rows;
        let spans = usize::from(before == 0);
        if rows <= before || spans > left.spans {
            return Room::There;
        }
        let room = self.make_room(at, rows, pool, events);
        if matches!(room, Room::There) {
            self.running[at].rows = rows;
            left.rows -= rows - before;
            left.spans -= spans;
        }
        room
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

    /// Adds the rows of `running[at]` to the plan.
    fn push_span(&mut self, at: usize, plan: &mut StepPlan) {
        let sequence = &self.running[at];
        let end = sequence.context + sequence.rows;
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

impl Sequence {
    /// Takes over blocks that another sequence of the same prompt has filled since this one came in, instead of computing them again.
    /// (The same bits: a row's KV depends on its sequence's tokens alone.)
    fn catch_up(&mut self, block_tokens: usize, pool: &mut Pool) {
        let own = self.named_blocks;
        let full = (self.tokens.len() - 1) / block_tokens;
        if full <= own {
            return;
        }
        self.name_until(full * block_tokens, block_tokens);
        let (names, tokens) = (&self.names[own..full], &self.tokens[own * block_tokens..]);
        let hit = pool.acquire_named(self.parent_of(own), names, tokens);
        if hit.blocks.is_empty() {
            return;
        }
        let named = own + hit.blocks.len();
        let replaced = own..named.min(self.table.len());
        let replaced: Vec<_> = self.table.splice(replaced, hit.blocks).collect();
        pool.release(&replaced);
        self.named_blocks = named;
        self.context = named * block_tokens;
    }
}
