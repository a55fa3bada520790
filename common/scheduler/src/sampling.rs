//! How a token is drawn, as plain data: what is asked for, and what comes of it.

use std::{fmt, ops::Deref, ops::Range, sync::Arc};

use baton_kv::TokenId;

use crate::SequenceId;

/// Alternatives of one token at most: what OpenAI's API allows.
pub const TOP_LOGPROBS_MAX: usize = 20;

/// How the next token is drawn from the logits. Plain values, validated at the edge. They act in this order: bias, repetition penalty, frequency and presence
/// penalty, all on the model's own logits; then temperature, min-p, top-k, top-p.
#[derive(Clone, PartialEq, Debug)]
pub struct SamplingParams {
    /// 0 is greedy: the highest logit, the lowest id among equals.
    pub temperature: f32,
    /// Keep the `top_k` most probable; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most probable tokens whose mass reaches `top_p`; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less probable than `min_p` times the most probable; 0 keeps all.
    pub min_p: f32,
    /// With (`choice`, output index) the only source of randomness.
    pub seed: u64,
    /// Which of the `n` answers to one prompt.
    pub choice: u32,
    /// Over 0; 1 is neutral. A token that occurs in prompt or output has a positive logit divided by it, a negative one multiplied.
    pub repetition_penalty: f32,
    /// Subtracted from the logit of a token that occurs in the output; 0 is neutral.
    pub presence_penalty: f32,
    /// Subtracted from a token's logit once for each time that it occurs in the output; 0 is neutral.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens; each id once.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Alternatives to report beside each token, [`TOP_LOGPROBS_MAX`] at most. What is drawn does not depend on it.
    pub top_logprobs: u32,
}

impl SamplingParams {
    /// Greedy, and nothing else asked for.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            choice: 0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            top_logprobs: 0,
        }
    }

    /// Whether the logits are changed before a token is drawn from them.
    pub fn adjusts(&self) -> bool {
        !self.logit_bias.is_empty() || self.penalises()
    }

    /// Whether the tokens so far count.
    pub fn penalises(&self) -> bool {
        self.repetition_penalty != 1.0 || self.penalises_output()
    }

    fn penalises_output(&self) -> bool {
        self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// Of a sequence's tokens (prompt, then output) those that count: all, the output alone, or none.
    pub fn history<'a>(&self, tokens: &'a [TokenId], prompt_tokens: usize) -> &'a [TokenId] {
        if self.repetition_penalty != 1.0 {
            tokens
        } else if self.penalises_output() {
            &tokens[prompt_tokens..]
        } else {
            &[]
        }
    }
}

/// Draw one token from the logits of a span's last row.
#[derive(Clone, PartialEq, Debug)]
pub struct Sample {
    /// How.
    pub params: Arc<SamplingParams>,
    /// Output index of the token to be drawn (0 for the first after the prompt).
    pub index: u32,
    /// Range into [`StepPlan::history`](crate::StepPlan::history): the tokens that the penalties count, as [`SamplingParams::history`] says; the last `index` are the
    /// output.
    pub history: Range<usize>,
}

impl Sample {
    /// Of params that count no history.
    pub fn new(params: SamplingParams, index: u32) -> Self {
        Self {
            params: Arc::new(params),
            index,
            history: 0..0,
        }
    }
}

/// The most probable tokens and their natural log-probabilities, by rank: highest first, among equals the lowest id. Held in place, so that a step allocates
/// nothing for them.
#[derive(Clone, Copy)]
pub struct Alternatives {
    len: usize,
    entries: [(TokenId, f32); TOP_LOGPROBS_MAX],
}

impl Alternatives {
    /// None.
    pub const NONE: Self = Self {
        len: 0,
        entries: [(0, 0.0); TOP_LOGPROBS_MAX],
    };

    /// Adds the next by rank. Panics beyond [`TOP_LOGPROBS_MAX`].
    pub fn push(&mut self, token: TokenId, logprob: f32) {
        self.entries[self.len] = (token, logprob);
        self.len += 1;
    }
}

impl Default for Alternatives {
    fn default() -> Self {
        Self::NONE
    }
}

impl Deref for Alternatives {
    type Target = [(TokenId, f32)];

    fn deref(&self) -> &Self::Target {
        &self.entries[..self.len]
    }
}

impl PartialEq for Alternatives {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl fmt::Debug for Alternatives {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

/// A drawn token.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Sampled {
    /// Whose.
    pub sequence: SequenceId,
    /// The token.
    pub token: TokenId,
    /// Its natural log-probability under the model's own distribution (temperature 1, before bias, penalties, top-k, top-p and min-p).
    pub logprob: f32,
    /// Of the same distribution the most probable tokens, `top_logprobs` of them, the drawn one among them if it is one. Fewer if fewer can be drawn at all.
    pub alternatives: Alternatives,
}
