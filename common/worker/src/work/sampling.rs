//! How tokens are drawn, from the wire.

use baton_node::{limits, status::invalid_field};
use baton_proto::node::v1 as pb;
use baton_scheduler::{SamplingParams, TOP_LOGPROBS_MAX};
use tonic::Status;

// What routers let through has room in a step's output.
const _: () = assert!(limits::TOP_LOGPROBS as usize <= TOP_LOGPROBS_MAX);

/// Refuses what is missing or out of range. Ids are below `vocabulary`.
pub(super) fn from_proto(message: Option<pb::Sampling>, vocabulary: usize) -> Result<SamplingParams, Status> {
    let message = message.ok_or_else(|| invalid_field("work.sampling", "sampling is missing"))?;
    let pb::Sampling {
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        choice,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias,
        top_logprobs,
    } = message;
    let penalty = limits::PENALTY_MAX;
    for (name, value, valid) in [
        (
            "temperature",
            temperature,
            temperature.is_finite() && temperature >= 0.0,
        ),
        ("top_p", top_p, top_p > 0.0 && top_p <= 1.0),
        ("min_p", min_p, (0.0..=1.0).contains(&min_p)),
        (
            "repetition_penalty",
            repetition_penalty,
            repetition_penalty.is_finite() && repetition_penalty > 0.0,
        ),
        ("presence_penalty", presence_penalty, presence_penalty.abs() <= penalty),
        (
            "frequency_penalty",
            frequency_penalty,
            frequency_penalty.abs() <= penalty,
        ),
    ] {
        if !valid {
            return Err(invalid_field(
                &format!("work.sampling.{name}"),
                format!("{value} is out of range"),
            ));
        }
    }
    if top_logprobs > limits::TOP_LOGPROBS {
        let problem = format!("at most {} alternatives", limits::TOP_LOGPROBS);
        return Err(invalid_field("work.sampling.top_logprobs", problem));
    }
    if logit_bias.len() > limits::LOGIT_BIASES {
        let problem = format!("at most {} entries", limits::LOGIT_BIASES);
        return Err(invalid_field("work.sampling.logit_bias", problem));
    }
    let mut logit_bias: Vec<_> = logit_bias.into_iter().collect();
    logit_bias.sort_unstable_by_key(|&(id, _)| id);
    let biases = -limits::LOGIT_BIAS_MAX..=limits::LOGIT_BIAS_MAX;
    for (id, bias) in &logit_bias {
        if *id as usize >= vocabulary || !biases.contains(bias) {
            let problem = format!("{bias} for token {id} is out of range, or the token outside the vocabulary");
            return Err(invalid_field("work.sampling.logit_bias", problem));
        }
    }
    Ok(SamplingParams {
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        choice,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias,
        top_logprobs,
    })
}
