//! From logits to a token, as a pure function.
//!
//! Every result is bit-equal on every machine: only additions, multiplications, divisions and comparisons of IEEE floats in a fixed order,
//! no libm and no fma (see `math.rs`). The draw for (seed, choice, index) depends on nothing but those three, the logits and the tokens so far, so
//! a sequence can be resumed, or replayed, at any index.
//!
//! Order of the steps, as in vLLM: logit bias, repetition, frequency and presence penalty, temperature, min-p, top-k, top-p (whose mass is that of the tokens
//! still kept). Tokens are ranked by logit, highest first, and by id, lowest first, among equals. Log-probabilities are those of the model's own distribution:
//! no bias, no penalties, temperature 1, whole vocabulary.

mod adjust;
mod math;
mod philox;
mod ranking;

#[cfg(test)]
mod tests;

use baton_kv::TokenId;
use baton_scheduler::{Alternatives, Sample, Sampled, SamplingParams, SequenceId};

pub(crate) use math::{RUN, higher};

use adjust::Adjusted;
use ranking::Ranking;

/// Why no token could be drawn. The engine's numbers cannot be trusted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SampleError {
    /// A logit is NaN or +∞, or none is finite.
    #[error("the logits are not finite numbers")]
    NotFinite,
}

/// Buffers that [`draw`] reuses: 16 bytes per token of the vocabulary at most.
#[derive(Default)]
pub struct SamplerScratch {
    keys: Vec<u64>,
    adjusted: Adjusted,
}

/// What [`draw`] found.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Drawn {
    /// The token.
    pub token: TokenId,
    /// Its natural log-probability.
    pub logprob: f32,
    /// The most probable tokens with theirs, `top_logprobs` of them; fewer if fewer can be drawn at all.
    pub alternatives: Alternatives,
}

impl Drawn {
    /// As the token of a sequence.
    pub fn of(self, sequence: SequenceId) -> Sampled {
        Sampled {
            sequence,
            token: self.token,
            logprob: self.logprob,
            alternatives: self.alternatives,
        }
    }
}

/// Draws the token of `sample` from `logits` (one per token of the vocabulary), and says its log-probability under softmax(`logits`). −∞ marks a token that
/// cannot be drawn. `history` is what [`Sample::history`] refers to.
///
/// # Panics
/// When the history is shorter than the output, or a token of it or of the bias is outside the vocabulary.
pub fn draw(
    logits: &[f32],
    sample: &Sample,
    history: &[TokenId],
    scratch: &mut SamplerScratch,
) -> Result<Drawn, SampleError> {
    draw_within(logits, Spread::of(logits)?, sample, history, scratch)
}

/// [`draw`] where the logits' spread is known.
pub(crate) fn draw_within(
    logits: &[f32],
    spread: Spread,
    sample: &Sample,
    history: &[TokenId],
    scratch: &mut SamplerScratch,
) -> Result<Drawn, SampleError> {
    let max = spread.max;
    let params = &*sample.params;
    let token = if params.adjusts() {
        let adjusted = scratch.adjusted.fill(logits, sample, history);
        let max = math::max_finite(adjusted).ok_or(SampleError::NotFinite)?;
        choose(adjusted, max, params, sample.index, &mut scratch.keys)
    } else {
        choose(logits, max, params, sample.index, &mut scratch.keys)
    };
    let log_sum = math::ln(spread.sum);
    let logprob = |token: usize| (f64::from(logits[token] - max) - log_sum) as f32;
    let mut alternatives = Alternatives::NONE;
    let wanted = (params.top_logprobs as usize).min(logits.len());
    if wanted > 0 {
        let mut ranking = Ranking::new(logits, max - LIKELY, &mut scratch.keys);
        let ranked = (0..wanted).map(|rank| ranking.token(rank));
        for token in ranked.take_while(|&token| logits[token] > f32::NEG_INFINITY) {
            alternatives.push(token as TokenId, logprob(token));
        }
    }
    Ok(Drawn {
        token: token as TokenId,
        logprob: logprob(token),
        alternatives,
    })
}

/// What log-probabilities need of a whole row of logits: the highest, and the sum of `exp(logit − highest)`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spread {
    max: f32,
    sum: f64,
}

impl Spread {
    pub(crate) fn of(logits: &[f32]) -> Result<Self, SampleError> {
        let max = math::max_finite(logits).ok_or(SampleError::NotFinite)?;
        Self::new(max, math::sum_exp(logits, max, 1.0, 0.0))
    }

    /// Of a row that was gone over in parts: `max` is the [`higher`] of their [`highest`], and `sum` that of the [`run_sum`]s of each [`RUN`] logits, added in
    /// order.
    pub(crate) fn new(max: f32, sum: f64) -> Result<Self, SampleError> {
        if max.is_finite() {
            Ok(Self { max, sum })
        } else {
            Err(SampleError::NotFinite)
        }
    }
}

/// The highest logit; NaN if one is, −∞ if there is none.
pub(crate) fn highest(logits: &[f32]) -> f32 {
    math::max(logits)
}

/// One run's part of the sum in a [`Spread`].
pub(crate) fn run_sum(run: &[f32], max: f32) -> f64 {
    math::sum_exp(run, max, 1.0, 0.0)
}

/// A token so far below the best, times the temperature, has less than a millionth of its weight: few rankings get there.
const LIKELY: f32 = 14.0;

/// The token, from logits of which `max` is the highest.
fn choose(logits: &[f32], max: f32, params: &SamplingParams, index: u32, keys: &mut Vec<u64>) -> usize {
    if params.temperature > 0.0 {
        draw_random(logits, max, params, index, keys)
    } else {
        math::position(logits, max).expect("the maximum is among the logits")
    }
}

/// A token drawn from the kept ones in proportion to their weights `exp((logit − max) / temperature)`.
fn draw_random(logits: &[f32], max: f32, params: &SamplingParams, index: u32, keys: &mut Vec<u64>) -> usize {
    let weight = |logit: f32| f64::from(math::exp((logit - max) / params.temperature));
    // The heaviest weight is 1, so min-p is a bound on the weight itself.
    let kept = |weight: f64| weight > 0.0 && weight >= f64::from(params.min_p);

    let mut ranking = Ranking::new(logits, max - LIKELY * params.temperature, keys);
    let mut limit = logits.len();
    let mut mass = 0.0;
    if params.top_k > 0 && (params.top_k as usize) < limit {
        limit = params.top_k as usize;
        for rank in 0..limit {
            let weight = weight(logits[ranking.token(rank)]);
            if !kept(weight) {
                break;
            }
            mass += weight;
        }
    } else {
        mass = math::sum_exp(logits, max, params.temperature, params.min_p);
    }
    if params.top_p < 1.0 {
        let wanted = f64::from(params.top_p) * mass;
        let mut reached = 0.0;
        for rank in 0..limit {
            let weight = weight(logits[ranking.token(rank)]);
            if !kept(weight) {
                break;
            }
            reached += weight;
            if reached >= wanted {
                limit = rank + 1;
                break;
            }
        }
        mass = reached;
    }

    let target = philox::uniform(params.seed, params.choice, index) * mass;
    let mut reached = 0.0;
    for rank in 0..limit {
        let token = ranking.token(rank);
        let weight = weight(logits[token]);
        if !kept(weight) {
            break;
        }
        reached += weight;
        if reached > target {
            return token;
        }
    }
    // The mass was summed in another order, and is larger by a rounding error.
    ranking.token(0)
}
