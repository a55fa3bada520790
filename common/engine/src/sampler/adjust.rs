//! Bias and penalties: what is asked for beside the model's own logits.
//!
//! The repetition penalty is Keskar et al.'s ("CTRL", 2019), made monotonic by multiplying negative logits; frequency and presence penalty are OpenAI's.

use baton_kv::TokenId;
use baton_scheduler::{Sample, SamplingParams};

/// Set in a count when the token occurs in the prompt.
const PROMPT: u32 = 1 << 31;

/// Logits after bias and penalties, and what they are made with.
#[derive(Default)]
pub(super) struct Adjusted {
    logits: Vec<f32>,
    /// Per token of the vocabulary, how often it occurs in the output, and [`PROMPT`]. All 0 between two calls.
    counts: Vec<u32>,
}

impl Adjusted {
    /// The logits from which `sample` draws. −∞ stays −∞, and what is finite stays finite. Beside one copy of the logits it takes time for the tokens of `history`
    /// and the bias alone.
    pub(super) fn fill(&mut self, logits: &[f32], sample: &Sample, history: &[TokenId]) -> &[f32] {
        let params = &*sample.params;
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        for &(token, bias) in &params.logit_bias {
            self.logits[token as usize] += bias;
        }
        if params.penalises() {
            self.penalise(params, history, sample.index as usize);
        }
        &self.logits
    }

    /// `output` tokens are the last of `history`.
    fn penalise(&mut self, params: &SamplingParams, history: &[TokenId], output: usize) {
        if self.counts.len() < self.logits.len() {
            self.counts.resize(self.logits.len(), 0);
        }
        let (prompt, output) = history.split_at(history.len() - output);
        for &token in prompt {
            self.counts[token as usize] |= PROMPT;
        }
        for &token in output {
            self.counts[token as usize] += 1;
        }
        for &token in history {
            // The first of several equal tokens does it for all.
            let count = std::mem::take(&mut self.counts[token as usize]);
            let logit = &mut self.logits[token as usize];
            if count > 0 && *logit > f32::NEG_INFINITY {
                *logit = penalised(*logit, count & !PROMPT, params);
            }
        }
    }
}

/// The logit of a token that occurs `count` times in the output, and perhaps in the prompt.
fn penalised(logit: f32, count: u32, params: &SamplingParams) -> f32 {
    let repeated = if logit > 0.0 {
        logit / params.repetition_penalty
    } else {
        logit * params.repetition_penalty
    };
    // A penalty next to 0, or beyond all sense, must not make infinities.
    let mut logit = repeated.clamp(f32::MIN, f32::MAX);
    logit -= params.frequency_penalty * count as f32;
    if count > 0 {
        logit -= params.presence_penalty;
    }
    logit
}
