//! `POST /v1/completions`.

use axum::{extract::State, http::HeaderMap, response::Response};
use serde_json::{Value, json};

use super::{
    answer::{self, Shape},
    body::Body,
    error::{ApiError, Endpoint},
    fields::{self, Delivery, Fields},
};
use crate::{
    Front,
    request::{FinishReason, GenerateRequest, Input},
};

/// What OpenAI's own endpoint gives when `max_tokens` is absent.
const DEFAULT_MAX_TOKENS: u32 = 16;

/// Alternatives that OpenAI's own endpoint gives at most.
const MAX_LOGPROBS: u32 = 5;

pub(super) async fn create(State(front): State<Front>, headers: HeaderMap, body: Body) -> Result<Response, ApiError> {
    let (mut request, delivery) = parse(body.0)?;
    request.span = crate::request_span(&headers);
    answer::respond(&front, request, delivery, Completion).await
}

/// Reads the request. [`GenerateRequest::span`] is left for the caller.
pub(super) fn parse(mut fields: Fields) -> Result<(GenerateRequest, Delivery), ApiError> {
    let prompt = fields
        .take("prompt")
        .ok_or_else(|| ApiError::invalid_field("prompt", "is required"))?;
    let mut request = GenerateRequest::new(input(prompt)?);
    let delivery = fields::shared(&mut fields, &mut request)?;
    request.max_tokens = Some(fields.count("max_tokens")?.unwrap_or(DEFAULT_MAX_TOKENS));
    let logprobs = fields.count("logprobs")?;
    if logprobs.is_some_and(|count| count > MAX_LOGPROBS) {
        return Err(ApiError::invalid_field(
            "logprobs",
            &format!("must be between 0 and {MAX_LOGPROBS}"),
        ));
    }
    (request.logprobs, request.top_logprobs) = (logprobs.is_some(), logprobs.unwrap_or(0));
    fields.not_built("echo", |value| value == &Value::Bool(false))?;
    fields.not_built("suffix", |value| value == "")?;
    fields.finish()?;
    Ok((request, delivery))
}

fn input(prompt: Value) -> Result<Input, ApiError> {
    match prompt {
        Value::String(text) => Ok(Input::Text(text)),
        Value::Array(mut items) => match items.as_mut_slice() {
            [Value::String(text)] => Ok(Input::Text(std::mem::take(text))),
            [Value::Array(ids)] => Ok(Input::Tokens(fields::token_ids("prompt", ids)?)),
            [Value::String(_) | Value::Array(_), ..] => Err(ApiError::not_built("prompt with several prompts")),
            ids => Ok(Input::Tokens(fields::token_ids("prompt", ids)?)),
        },
        _ => Err(ApiError::invalid_field(
            "prompt",
            "must be a string or a list of token ids",
        )),
    }
}

/// What a completion looks like.
pub(super) struct Completion;

impl Shape for Completion {
    const ENDPOINT: Endpoint = Endpoint::Completions;
    const ID: &'static str = "cmpl";
    const OBJECT: &'static str = "text_completion";
    const CHUNK: &'static str = "text_completion";

    fn choice(text: &str, logprobs: Value, reason: FinishReason) -> Value {
        Self::chunk_choice(Some(text), logprobs, Some(reason), false)
    }

    fn chunk_choice(text: Option<&str>, logprobs: Value, reason: Option<FinishReason>, _first: bool) -> Value {
        json!({
            "text": text.unwrap_or_default(),
            "logprobs": logprobs,
            "finish_reason": reason.map(answer::reason),
        })
    }

    fn logprobs(tokens: &[answer::TokenLogprob]) -> Value {
        json!({
            "tokens": tokens.iter().map(|token| &token.text).collect::<Vec<_>>(),
            "token_logprobs": tokens.iter().map(|token| token.logprob).collect::<Vec<_>>(),
            "top_logprobs": top_logprobs(tokens),
            "text_offset": tokens.iter().map(|token| token.offset).collect::<Vec<_>>(),
        })
    }
}

/// Per token, a map from the texts of the most probable ones and of its own to their log-probabilities: of two tokens with one text, the more probable. Null unless
/// asked for.
fn top_logprobs(tokens: &[answer::TokenLogprob]) -> Value {
    if tokens.iter().all(|token| token.alternatives.is_empty()) {
        return Value::Null;
    }
    let map = |token: &answer::TokenLogprob| {
        let mut map = serde_json::Map::new();
        let others = token.alternatives.iter().map(|other| (&other.text, other.logprob));
        for (text, logprob) in others.chain([(&token.text, token.logprob)]) {
            map.entry(text).or_insert_with(|| json!(logprob));
        }
        Value::Object(map)
    };
    tokens.iter().map(map).collect()
}
