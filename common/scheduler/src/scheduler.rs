//! The scheduler's table and what comes in from outside; [`planning`] makes steps, [`completion`] takes their results in.

use std::{collections::VecDeque, sync::Arc};

use baton_kv::{BlockId, BlockName, Pool, TokenId, name_blocks};

use crate::{FinishReason, NewSequence, Role, SamplingParams, SequenceEvent, SequenceId, Start, SubmitError};

mod completion;
mod planning;
#[cfg(test)]
mod tests;

/// Bounds of one node's scheduler.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SchedulerConfig {
    /// Rows in one step at most (decode rows first, the rest is prefill chunks).
    pub token_budget: usize,
    /// Prefill rows of one sequence in one step at most (chunked prefill).
    pub chunk_tokens: usize,
    /// Sequences in one step at most.
    pub max_running: usize,
    /// Sequences waiting at most; one more is refused.
    pub max_waiting: usize,
    /// Prompt + output of one sequence at most, tokens.
    pub max_context: usize,
    /// Tokens of a block.
    pub block_tokens: usize,
}

/// What the node reports to the routers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SchedulerLoad {
    /// Sequences waiting.
    pub waiting: usize,
    /// Sequences running.
    pub running: usize,
    /// Prompt tokens not computed yet, of waiting and running sequences.
    pub queued_prefill_tokens: usize,
    /// Preemptions so far.
    pub preemptions: u64,
}

/// A sequence in the scheduler's hands.
struct Sequence {
    id: SequenceId,
    /// Order of submission, kept through preemptions.
    arrival: u64,
    role: Role,
    root: BlockName,
    /// Prompt, then output.
    tokens: Vec<TokenId>,
    prompt_len: usize,
    max_new_tokens: usize,
    stop_ids: Vec<TokenId>,
    sampling: Arc<SamplingParams>,
    /// Each block held once; room for at least `context` tokens. Empty while it waits.
    table: Vec<BlockId>,
    /// Tokens whose KV is in the pool.
    context: usize,
    /// Leading blocks of the table that have their names. (Set anew on admission.)
    named_blocks: usize,
    /// Of the first full blocks of its tokens, as far as they were needed: computed once.
    names: Vec<BlockName>,
    /// Rows in the running step; 0 when it is not in it.
    rows: usize,
    /// Cancelled while in the running step.
    cancelled: bool,
    /// `Started` was sent, or never will be.
    started: bool,
}

impl Sequence {
    /// Rows until the next token can be drawn; at least 1.
    fn remaining(&self) -> usize {
        self.tokens.len() - self.context
    }

    fn output(&self) -> &[TokenId] {
        &self.tokens[self.prompt_len..]
    }

    /// Whether the output so far ends the answer.
    fn ended(&self) -> Option<FinishReason> {
        if self.output().iter().any(|token| self.stop_ids.contains(token)) {
            return Some(FinishReason::Stop);
        }
        (self.output().len() >= self.max_new_tokens).then_some(FinishReason::Length)
    }

    /// Tokens whose KV is in the pool at the end, if all `max_new_tokens` are drawn: the last one's never is.
    fn final_context(&self) -> usize {
        match self.role {
            Role::Prefill => self.tokens.len(),
            Role::Decode => self
                .prompt_len
                .saturating_add(self.max_new_tokens)
                .saturating_sub(1)
                .max(self.context),
        }
    }

    /// The name of the block before the table's `at`th.
    fn parent_of(&self, at: usize) -> BlockName {
        at.checked_sub(1).map_or(self.root, |before| self.names[before])
    }

    /// Computes the names of the full blocks among the first `tokens`.
    fn name_until(&mut self, tokens: usize, block_tokens: usize) {
        let full = tokens / block_tokens;
        for at in self.names.len()..full {
            let name = self
                .parent_of(at)
                .child(&self.tokens[at * block_tokens..(at + 1) * block_tokens]);
            self.names.push(name);
        }
    }

    /// Blocks to come in with: of its tokens so far, and one more if it will grow beyond.
    fn entry_blocks(&self, block_tokens: usize) -> usize {
        let blocks = self.tokens.len().div_ceil(block_tokens);
        blocks + usize::from(self.final_context().div_ceil(block_tokens) > blocks)
    }

    fn give_back(&mut self, pool: &mut Pool) {
        pool.release(&self.table);
        self.table.clear();
    }
}

/// One span of the running step.
struct Flight {
    /// Finds the sequence in `running`.
    arrival: u64,
    samples: bool,
}

/// A finished [`Role::Prefill`] sequence.
struct Finished {
    id: SequenceId,
    table: Vec<BlockId>,
}

/// The scheduler of one node.
pub struct Scheduler {
    config: SchedulerConfig,
    /// By arrival.
    waiting: VecDeque<Sequence>,
    /// By arrival, oldest first.
    running: Vec<Sequence>,
    /// The spans of the running step, in its order.
    flight: Vec<Flight>,
    /// Had ended when they were submitted; the next `plan` says so.
    ended: Vec<(Sequence, FinishReason)>,
    /// Hold their blocks until released.
    finished: Vec<Finished>,
    next_arrival: u64,
    preemptions: u64,
}

impl Scheduler {
    /// Empty. Panics if a bound of the config is 0 (`max_waiting` may be).
    pub fn new(config: SchedulerConfig) -> Self {
        let bounds = [
            config.token_budget,
            config.chunk_tokens,
            config.max_running,
            config.max_context,
            config.block_tokens,
        ];
        assert!(!bounds.contains(&0), "nothing can ever run: {config:?}");
        Self {
            config,
            waiting: VecDeque::new(),
            running: Vec::new(),
            flight: Vec::new(),
            ended: Vec::new(),
            finished: Vec::new(),
            next_arrival: 0,
            preemptions: 0,
        }
    }

    /// Takes a sequence into the queue; a handed one runs at once, also beyond `max_running` (it has its blocks already), but still
    /// at most `max_running` are in one step, the oldest first. On error its handed blocks stay the caller's.
    ///
    /// Panics if a handed sequence has no output, or its table no room for the prompt: the handoff did not verify it.
    pub fn submit(&mut self, sequence: NewSequence, pool: &Pool) -> Result<(), SubmitError> {
        self.check(&sequence, pool)?;
        let handed = matches!(sequence.start, Start::Handed { .. });
        let sequence = self.take_in(sequence);
        let limit = self.config.max_waiting;
        if !handed && self.waiting.len() + self.ended.len() >= limit {
            return Err(SubmitError::QueueFull { limit });
        }
        self.next_arrival += 1;
        match sequence.ended() {
            Some(reason) => self.ended.push((sequence, reason)),
            None if handed => self.running.push(sequence),
            None => self.waiting.push_back(sequence),
        }
        Ok(())
    }

    /// Whether `sequence` fits the context, and the pool if it were alone there; [`Scheduler::submit`] checks the same.
    pub fn check(&self, sequence: &NewSequence, pool: &Pool) -> Result<(), SubmitError> {
        let block_tokens = self.config.block_tokens;
        assert_eq!(block_tokens, pool.block_tokens(), "the pool has other blocks");
        let prompt = sequence.prompt.len();
        if prompt == 0 {
            return Err(SubmitError::EmptyPrompt);
        }
        let tokens = prompt + sequence.output.len();
        let whole = prompt.saturating_add(sequence.max_new_tokens);
        let (needed, limit) = (whole.max(tokens), self.config.max_context);
        if needed > limit {
            return Err(SubmitError::TooLong { needed, limit });
        }
        let needed = match sequence.role {
            Role::Prefill => tokens,
            Role::Decode => whole.saturating_sub(1).max(prompt),
        };
        let limit = pool.counts().total * block_tokens;
        if needed > limit {
            return Err(SubmitError::TooLong { needed, limit });
        }
        Ok(())
    }

    /// Ends a sequence, wherever it is; unknown ids are ignored. Its blocks are given back now, or at `complete` if the running step uses them.
    /// Emits `Finished { Cancelled }` exactly once (now, or at `complete`), except for a prefill sequence that has finished: that is only released.
    pub fn cancel(&mut self, id: SequenceId, pool: &mut Pool, events: &mut Vec<SequenceEvent>) {
        let mut cancelled = if let Some(at) = self.running.iter().position(|sequence| sequence.id == id) {
            if self.running[at].rows > 0 {
                self.running[at].cancelled = true;
                return;
            }
            self.running.remove(at)
        } else if let Some(at) = self.waiting.iter().position(|sequence| sequence.id == id) {
            self.waiting.remove(at).expect("just found")
        } else if let Some(at) = self.ended.iter().position(|(sequence, _)| sequence.id == id) {
            self.ended.remove(at).0
        } else {
            return self.release(id, pool);
        };
        cancelled.give_back(pool);
        let reason = FinishReason::Cancelled;
        events.push(SequenceEvent::Finished { id, reason });
    }

    /// Gives back the blocks of a finished [`Role::Prefill`] sequence; unknown ids are ignored.
    pub fn release(&mut self, id: SequenceId, pool: &mut Pool) {
        if let Some(at) = self.finished.iter().position(|finished| finished.id == id) {
            pool.release(&self.finished.swap_remove(at).table);
        }
    }

    /// Blocks that the queue's head needs to come in, those included that it would find in the pool; 0 when nobody waits.
    pub fn head_blocks(&self) -> usize {
        let head = self.waiting.front();
        head.map_or(0, |sequence| sequence.entry_blocks(self.config.block_tokens))
    }

    /// For load reports.
    pub fn load(&self) -> SchedulerLoad {
        let sequences = self.waiting.iter().chain(&self.running);
        SchedulerLoad {
            waiting: self.waiting.len(),
            running: self.running.len(),
            queued_prefill_tokens: sequences
                .map(|sequence| sequence.prompt_len.saturating_sub(sequence.context))
                .sum(),
            preemptions: self.preemptions,
        }
    }

    fn take_in(&self, new: NewSequence) -> Sequence {
        let block_tokens = self.config.block_tokens;
        let prompt_len = new.prompt.len();
        let (mut context, mut names) = (0, Vec::new());
        let table = match new.start {
            Start::Compute => Vec::new(),
            Start::Handed { table } => {
                assert!(!new.output.is_empty(), "handed over without its first token");
                assert!(
                    table.len() * block_tokens >= prompt_len,
                    "handed over without its prompt"
                );
                (context, names) = (prompt_len, name_blocks(new.root, &new.prompt, block_tokens));
                table
            }
        };
        let mut tokens = new.prompt;
        tokens.extend(new.output);
        Sequence {
            id: new.id,
            arrival: self.next_arrival,
            role: new.role,
            root: new.root,
            tokens,
            prompt_len,
            max_new_tokens: new.max_new_tokens,
            stop_ids: new.stop_ids,
            sampling: Arc::new(new.sampling),
            started: context > 0,
            table,
            context,
            named_blocks: names.len(),
            names,
            rows: 0,
            cancelled: false,
        }
    }
}
