//! From logits to a token, as a pure function.
//!
//! Every result is bit-equal on every machine: only additions, multiplications, divisions and comparisons of IEEE floats in a fixed order,
//! no libm and no fma (see `math.rs`). The draw for (seed, choice, index) depends on nothing but those three and the logits, so
//! a sequence can be resumed, or replayed, at any index.
//!
//! Order of the steps, as in vLLM: temperature, min-p, top-k, top-p (whose mass is that of the tokens still kept). Tokens are ranked by logit,
//! highest first, and by id, lowest first, among equals. The log-probability is that of the model's own distribution: temperature 1, whole vocabulary.

mod math;
mod philox;
mod ranking;

#[cfg(test)]
mod tests;

use baton_kv::TokenId;
use baton_scheduler::Sample;

use ranking::Ranking;

/// Why no token could be drawn. The engine's numbers cannot be trusted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SampleError {
    /// A logit is NaN or +∞, or none is finite.
    #[error("the logits are not finite numbers")]
    NotFinite,
}

/// Buffers that [`draw`] reuses.
#[derive(Default)]
pub struct SamplerScratch {
    keys: Vec<u64>,
}

/// Draws the token of `sample` from `logits` (one per token of the vocabulary), and says its natural log-probability under
/// softmax(`logits`). −∞ marks a token that cannot be drawn.
pub fn draw(logits: &[f32], sample: &Sample, scratch: &mut SamplerScratch) -> Result<(TokenId, f32), SampleError> {
    let max = math::max_finite(logits).ok_or(SampleError::NotFinite)?;
    let params = &sample.params;
    let token = if params.temperature > 0.0 {
        draw_random(logits, max, sample, &mut scratch.keys)
    } else {
        math::position(logits, max).expect("the maximum is among the logits")
    };
    let logprob = f64::from(logits[token] - max) - math::ln(math::sum_exp(logits, max, 1.0, 0.0));
    Ok((token as TokenId, logprob as f32))
}

/// A token drawn from the kept ones in proportion to their weights `exp((logit − max) / temperature)`.
fn draw_random(logits: &[f32], max: f32, sample: &Sample, keys: &mut Vec<u64>) -> usize {
    let params = &sample.params;
    let weight = |logit: f32| f64::from(math::exp((logit - max) / params.temperature));
    // The heaviest weight is 1, so min-p is a bound on the weight itself.
    let kept = |weight: f64| weight > 0.0 && weight >= f64::from(params.min_p);

    // A token further below has less than a millionth of the best one's weight.
    let mut ranking = Ranking::new(logits, max - 14.0 * params.temperature, keys);
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

    let target = philox::uniform(params.seed, params.choice, sample.index) * mass;
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
