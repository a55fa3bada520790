//! What a scheduler tells its driver.

use baton_kv::{BlockId, TokenId};

use crate::SequenceId;

/// Why a sequence ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FinishReason {
    /// A stop token was drawn.
    Stop,
    /// `max_new_tokens` were drawn.
    Length,
    /// [`Scheduler::cancel`](crate::Scheduler::cancel), or the engine failed.
    Cancelled,
}

/// What happened to a sequence in a step.
#[derive(Clone, PartialEq, Debug)]
pub enum SequenceEvent {
    /// It left the queue; `cached_tokens` of its prompt were found in the pool. Sent once: not again when it returns from a preemption,
    /// and not for [`Start::Handed`](crate::Start::Handed), which never waits in the queue.
    Started {
        /// Whose.
        id: SequenceId,
        /// Prompt tokens found.
        cached_tokens: usize,
        /// Its table so far: the cached blocks.
        table: Vec<BlockId>,
    },
    /// A chunk of its prompt was computed: positions `0..computed` are in the pool. Sent before `Token` of the same step.
    /// Sent again, from a lower `computed`, for what is recomputed after a preemption ([`Role::Decode`](crate::Role::Decode) only).
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
        /// As [`Sampled::alternatives`](crate::Sampled::alternatives).
        alternatives: Vec<(TokenId, f32)>,
    },
    /// It ended. A [`Role::Prefill`](crate::Role::Prefill) sequence ends after its first token (reason `Length` unless that was a stop token) and its blocks stay
    /// held until `release`. In the other role, and when cancelled in either, its blocks are given back already.
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
