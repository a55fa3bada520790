//! A sequence as it is submitted.

use baton_kv::{BlockId, BlockName, TokenId};

use crate::{SamplingParams, SequenceId};

/// What becomes of a sequence after its first token.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// It decodes to its end here.
    Decode,
    /// It stops after the first token and holds its blocks until [`Scheduler::release`](crate::Scheduler::release) (they are being pushed).
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
    /// If they hold a stop token, or `max_new_tokens` tokens, the sequence ends at the next `plan` and nothing is computed.
    pub output: Vec<TokenId>,
    /// Output tokens in all at most, `output` included; at least 1.
    pub max_new_tokens: usize,
    /// A drawn token that is one of these ends the answer (it is emitted, with [`FinishReason::Stop`](crate::FinishReason::Stop)).
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
