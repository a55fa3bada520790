//! How tokens are to be drawn: what clients may ask for, and what nodes are told.

use baton_kv::TokenId;
use baton_proto::node::v1 as pb;

use crate::{
    error::{Field, GenerateError},
    limits,
    request::SamplingRequest,
    text::Text,
};

/// Refuses what is out of range, and names the field.
pub(crate) fn check(sampling: &SamplingRequest, text: &Text) -> Result<(), GenerateError> {
    in_range(
        Field::Temperature,
        sampling.temperature,
        "must be between 0 and 2",
        |t| (0.0..=2.0).contains(&t),
    )?;
    in_range(Field::TopP, sampling.top_p, "must be over 0 and at most 1", |p| {
        p > 0.0 && p <= 1.0
    })?;
    in_range(Field::MinP, sampling.min_p, "must be between 0 and 1", |p| {
        (0.0..=1.0).contains(&p)
    })?;
    in_range(
        Field::RepetitionPenalty,
        sampling.repetition_penalty,
        "must be over 0",
        |penalty| penalty > 0.0 && penalty.is_finite(),
    )?;
    for (field, penalty) in [
        (Field::PresencePenalty, sampling.presence_penalty),
        (Field::FrequencyPenalty, sampling.frequency_penalty),
    ] {
        in_range(field, penalty, "must be between -2 and 2", |penalty| {
            penalty.abs() <= limits::PENALTY_MAX
        })?;
    }
    let bias = &sampling.logit_bias;
    if bias.len() > limits::LOGIT_BIASES {
        let (count, limit) = (bias.len(), limits::LOGIT_BIASES);
        return Err(GenerateError::InvalidField {
            field: Field::LogitBias,
            problem: format!("{count} entries; at most {limit} are taken"),
        });
    }
    for &(_, bias) in bias {
        in_range(
            Field::LogitBias,
            Some(bias),
            "each must be between -100 and 100",
            |bias| bias.abs() <= limits::LOGIT_BIAS_MAX,
        )?;
    }
    let ids: Vec<TokenId> = bias.iter().map(|&(id, _)| id).collect();
    text.check_ids(&ids, Field::LogitBias)
}

fn in_range(field: Field, value: Option<f32>, rule: &str, holds: fn(f32) -> bool) -> Result<(), GenerateError> {
    match value {
        Some(value) if !holds(value) => Err(GenerateError::InvalidField {
            field,
            problem: format!("{rule}, not {value}"),
        }),
        _ => Ok(()),
    }
}

/// As nodes see it: every default is filled in.
pub(crate) fn to_proto(sampling: SamplingRequest, seed: u64, top_logprobs: u32) -> pb::Sampling {
    pb::Sampling {
        temperature: sampling.temperature.unwrap_or(0.0),
        top_k: sampling.top_k.unwrap_or(0),
        top_p: sampling.top_p.unwrap_or(1.0),
        min_p: sampling.min_p.unwrap_or(0.0),
        seed,
        choice: 0,
        repetition_penalty: sampling.repetition_penalty.unwrap_or(1.0),
        presence_penalty: sampling.presence_penalty.unwrap_or(0.0),
        frequency_penalty: sampling.frequency_penalty.unwrap_or(0.0),
        logit_bias: sampling.logit_bias.into_iter().collect(),
        top_logprobs,
    }
}
