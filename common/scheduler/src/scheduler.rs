//! The scheduler.

use baton_kv::{BlockId, BlockName, Pool, TokenId};

use crate::{SamplingParams, SequenceId, StepOutput, StepPlan};

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

/// What becomes of a sequence after its first token.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// It decodes to its end here.
    Decode,
    /// It stops after the first token and holds its blocks until [`Scheduler::release`] (they are being pushed).
    Prefill,
}

/// Where a sequence starts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Start {
    /// Nothing is computed here, but a prefix may be found in the pool.
    Compute,
    /// Handed over: `table` (each block held once for this sequence) holds the KV of the whole prompt. `output` must not be empty.
    Handed {
        /// Its blocks, in order.
        table: Vec<BlockId>,
    },
}

/// A sequence to run.
#[derive(Clone, PartialEq, Debug)]
pub struct NewSequence {
    /// Its id, unused so far.
    pub id: SequenceId,
    /// Parent of its first block's name (identity and salt are in it).
    pub root: BlockName,
    /// The prompt; at least one token.
    pub prompt: Vec<TokenId>,
    /// Tokens generated already (a replay, a handed first token): they are not emitted again; the next output index is `output.len()`.
    pub output: Vec<TokenId>,
    /// Output tokens in all at most, `output` included; at least 1.
    pub max_new_tokens: usize,
    /// A drawn token that is one of these ends the answer (it is emitted, with [`FinishReason::Stop`]).
    pub stop_ids: Vec<TokenId>,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// What becomes of it after its first token.
    pub role: Role,
    /// Where it starts.
    pub start: Start,
}

/// Why a sequence was not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SubmitError {
    /// `max_waiting` wait already. A retry helps.
    #[error("the node's queue is full ({limit} sequences wait)")]
    QueueFull {
        /// `max_waiting`.
        limit: usize,
    },
    /// Prompt + `max_new_tokens` exceed `max_context`, or the pool could never hold them. A retry does not help.
    #[error("the sequence needs {needed} tokens of context and this node has {limit}")]
    TooLong {
        /// Tokens needed.
        needed: usize,
        /// Tokens that fit.
        limit: usize,
    },
    /// The prompt is empty.
    #[error("the prompt is empty")]
    EmptyPrompt,
}

/// Why a sequence ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FinishReason {
    /// A stop token was drawn.
    Stop,
    /// `max_new_tokens` were drawn.
    Length,
    /// [`Scheduler::cancel`].
    Cancelled,
}

/// What happened to a sequence in a step.
#[derive(Clone, PartialEq, Debug)]
pub enum SequenceEvent {
    /// It left the queue; `cached_tokens` of its prompt were found in the pool.
    Started {
        /// Whose.
        id: SequenceId,
        /// Prompt tokens found.
        cached_tokens: usize,
        /// Its table so far: the cached blocks.
        table: Vec<BlockId>,
    },
    /// A chunk of its prompt was computed: positions `0..computed` are in the pool. Sent before `Token` of the same step.
    Computed {
        /// Whose.
        id: SequenceId,
        /// Prompt tokens in the pool.
        computed: usize,
        /// The whole table: enough blocks for `computed`.
        table: Vec<BlockId>,
    },
    /// A token was drawn.
    Token {
        /// Whose.
        id: SequenceId,
        /// Output index.
        index: u32,
        /// The token.
        token: TokenId,
        /// Its log-probability.
        logprob: f32,
    },
    /// It ended. With [`Role::Prefill`] its blocks stay held until `release`; with [`Role::Decode`] they are given back already.
    /// With [`Role::Prefill`] this is sent after the first token (reason `Length` unless the token was a stop token or the only one allowed).
    Finished {
        /// Whose.
        id: SequenceId,
        /// Why.
        reason: FinishReason,
    },
    /// The pool ran out as sequences grew: its blocks were given back, it waits again and will recompute what it loses.
    Preempted {
        /// Whose.
        id: SequenceId,
    },
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

/// The scheduler of one node.
pub struct Scheduler {
    _private: (),
}

#[allow(unused_variables, clippy::todo)]
impl Scheduler {
    /// Empty.
    pub fn new(config: SchedulerConfig) -> Self {
        todo!()
    }

    /// Takes a sequence into the queue. On error its handed blocks stay the caller's.
    pub fn submit(&mut self, sequence: NewSequence, pool: &Pool) -> Result<(), SubmitError> {
        todo!()
    }

    /// Ends a sequence, wherever it is; unknown ids are ignored. Its blocks are given back now, or at `complete` if the running step uses them.
    /// Emits `Finished { Cancelled }` exactly once (now, or at `complete`), except for a prefill sequence that has finished: that is only released.
    pub fn cancel(&mut self, id: SequenceId, pool: &mut Pool, events: &mut Vec<SequenceEvent>) {
        todo!()
    }

    /// Gives back the blocks of a finished [`Role::Prefill`] sequence; unknown ids are ignored.
    pub fn release(&mut self, id: SequenceId, pool: &mut Pool) {
        todo!()
    }

    /// Plans the next step. False, and an empty plan, when there is nothing to run. Must not be called between `plan` and `complete` or `failed`.
    pub fn plan(&mut self, pool: &mut Pool, plan: &mut StepPlan, events: &mut Vec<SequenceEvent>) -> bool {
        todo!()
    }

    /// Takes in the result of the planned step: names full blocks, emits events, gives back what ended.
    pub fn complete(&mut self, output: &StepOutput, pool: &mut Pool, events: &mut Vec<SequenceEvent>) {
        todo!()
    }

    /// The engine failed: ends every sequence of the step as cancelled, and names none of its blocks.
    pub fn failed(&mut self, pool: &mut Pool, events: &mut Vec<SequenceEvent>) {
        todo!()
    }

    /// For load reports.
    pub fn load(&self) -> SchedulerLoad {
        todo!()
    }
}
