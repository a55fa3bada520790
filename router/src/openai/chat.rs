//! `POST /v1/chat/completions`.

use axum::{extract::State, http::HeaderMap, response::Response};
use serde_json::{Value, json};

use super::{
    answer::{self, Shape},
    body::Body,
    error::{ApiError, Endpoint, excerpt},
    fields::{self, Delivery, Fields},
};
use crate::{
    Front,
    request::{ChatMessage, FinishReason, GenerateRequest, Input},
};

pub(super) async fn create(State(front): State<Front>, headers: HeaderMap, body: Body) -> Result<Response, ApiError> {
    let (mut request, delivery) = parse(body.0)?;
    request.span = crate::request_span(&headers);
    answer::respond(&front, request, delivery, Chat).await
}

/// Reads the request. [`GenerateRequest::span`] is left for the caller.
pub(super) fn parse(mut fields: Fields) -> Result<(GenerateRequest, Delivery), ApiError> {
    let items = fields
        .array("messages")?
        .ok_or_else(|| ApiError::invalid_field("messages", "is required"))?;
    let messages = items
        .into_iter()
        .enumerate()
        .map(|(index, item)| message(index, item))
        .collect::<Result<_, _>>()?;
    let mut request = GenerateRequest::new(Input::Chat(messages));
    let delivery = fields::shared(&mut fields, &mut request)?;
    request.max_tokens = match (fields.count("max_completion_tokens")?, fields.count("max_tokens")?) {
        (Some(new), Some(old)) if new != old => {
            return Err(ApiError::invalid_field(
                "max_tokens",
                "contradicts max_completion_tokens",
            ));
        }
        (new, old) => new.or(old),
    };
    request.logprobs = fields.flag("logprobs")?.unwrap_or(false);
    request.top_logprobs = fields.count("top_logprobs")?.unwrap_or(0);

    let no = |value: &Value| value == &Value::Bool(false);
    let empty = |value: &Value| value.as_array().is_some_and(Vec::is_empty);
    fields.not_built("tools", empty)?;
    fields.not_built("tool_choice", |value| value == "none")?;
    fields.not_built("functions", empty)?;
    fields.not_built("function_call", |value| value == "none")?;
    // Without tools neither value changes anything.
    fields.not_built("parallel_tool_calls", Value::is_boolean)?;
    fields.not_built("response_format", |value| value == &json!({ "type": "text" }))?;
    fields.not_built("modalities", |value| value == &json!(["text"]))?;
    fields.not_built("store", no)?;
    for name in [
        "audio",
        "metadata",
        "prediction",
        "prompt_cache_key",
        "reasoning_effort",
        "safety_identifier",
        "service_tier",
        "verbosity",
        "web_search_options",
    ] {
        fields.not_built(name, |_| false)?;
    }
    fields.finish()?;
    Ok((request, delivery))
}

fn message(index: usize, item: Value) -> Result<ChatMessage, ApiError> {
    let at = |name: &str| format!("messages[{index}].{name}");
    let Value::Object(map) = item else {
        return Err(ApiError::invalid_field(
            &format!("messages[{index}]"),
            "must be an object",
        ));
    };
    let mut fields = Fields::new(map);
    let role = match fields.string("role")?.as_deref() {
        Some("system" | "developer") => "system",
        Some("user") => "user",
        Some("assistant") => "assistant",
        Some("tool" | "function") => return Err(ApiError::not_built(&at("role (tool)"))),
        Some(_) => {
            return Err(ApiError::invalid_field(
                &at("role"),
                "must be system, developer, user or assistant",
            ));
        }
        None => return Err(ApiError::invalid_field(&at("role"), "is required")),
    };
    let content = match fields.take("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => parts
            .into_iter()
            .map(|part| text_part(part, &at("content")))
            .collect::<Result<_, _>>()?,
        Some(_) => {
            return Err(ApiError::invalid_field(
                &at("content"),
                "must be a string or a list of parts",
            ));
        }
        None => return Err(ApiError::invalid_field(&at("content"), "is required")),
    };
    for name in [
        "name",
        "tool_calls",
        "tool_call_id",
        "function_call",
        "refusal",
        "audio",
    ] {
        if fields.take(name).is_some() {
            return Err(ApiError::not_built(&at(name)));
        }
    }
    fields.finish()?;
    Ok(ChatMessage {
        role: role.to_owned(),
        content,
    })
}

fn text_part(part: Value, at: &str) -> Result<String, ApiError> {
    let invalid = || ApiError::invalid_field(at, "each part must have a type and a text");
    let Value::Object(map) = part else {
        return Err(invalid());
    };
    let mut fields = Fields::new(map);
    match fields.string("type")?.as_deref() {
        Some("text") => {}
        Some(kind) => return Err(ApiError::not_built(&format!("{at} (part of type {})", excerpt(kind)))),
        None => return Err(invalid()),
    }
    let text = fields.string("text")?.ok_or_else(invalid)?;
    fields.finish()?;
    Ok(text)
}

/// What a chat answer looks like.
pub(super) struct Chat;

impl Shape for Chat {
    const ENDPOINT: Endpoint = Endpoint::Chat;
    const ID: &'static str = "chatcmpl";
    const OBJECT: &'static str = "chat.completion";
    const CHUNK: &'static str = "chat.completion.chunk";

    fn choice(text: &str, logprobs: Value, reason: FinishReason) -> Value {
        json!({
            "message": { "role": "assistant", "content": text, "refusal": null },
            "logprobs": logprobs,
            "finish_reason": answer::reason(reason),
        })
    }

    fn chunk_choice(text: Option<&str>, logprobs: Value, reason: Option<FinishReason>, first: bool) -> Value {
        let mut delta = serde_json::Map::new();
        if first {
            delta.insert("role".to_owned(), json!("assistant"));
        }
        if let Some(text) = text {
            delta.insert("content".to_owned(), json!(text));
        }
        json!({ "delta": delta, "logprobs": logprobs, "finish_reason": reason.map(answer::reason) })
    }

    fn logprobs(tokens: &[answer::TokenLogprob]) -> Value {
        let entry =
            |text: &str, bytes: &[u8], logprob: f32| json!({ "token": text, "logprob": logprob, "bytes": bytes });
        let content = tokens.iter().map(|token| {
            let others = token.alternatives.iter();
            let others = others.map(|other| entry(&other.text, &other.bytes, other.logprob));
            let mut content = entry(&token.text, &token.bytes, token.logprob);
            content["top_logprobs"] = others.collect();
            content
        });
        json!({ "content": content.collect::<Vec<_>>(), "refusal": null })
    }
}
