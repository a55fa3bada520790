//! Turns an answer's events into one JSON object, or into a stream of server-sent events.

use std::time::{SystemTime, UNIX_EPOCH};

use axum::{
    Json,
    body::Body,
    http::{HeaderValue, header},
    response::{IntoResponse, Response},
};
use baton_kv::TokenId;
use baton_text::Detokenizer;
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};

use super::{
    error::{ApiError, Endpoint},
    fields::Delivery,
};
use crate::{
    Front,
    request::{AnswerEvent, AnswerStream, Delta, FinishReason, Finished, GenerateRequest, Started, Usage},
};

/// What tells the two endpoints' answers apart.
pub(super) trait Shape: Send + 'static {
    const ENDPOINT: Endpoint;
    /// Prefix of ids.
    const ID: &'static str;
    const OBJECT: &'static str;
    const CHUNK: &'static str;

    /// All but its index.
    fn choice(text: &str, logprobs: Value, reason: FinishReason) -> Value;
    /// All but its index. `text` is `None` in the last chunk.
    fn chunk_choice(text: Option<&str>, logprobs: Value, reason: Option<FinishReason>, first: bool) -> Value;
    fn logprobs(tokens: &[TokenLogprob]) -> Value;
}

/// One token of a list of log-probabilities.
pub(super) struct TokenLogprob {
    /// Lossy, where the token is no whole character.
    pub(super) text: String,
    pub(super) bytes: Vec<u8>,
    pub(super) logprob: f32,
    /// Characters of the answer's text before it.
    pub(super) offset: usize,
    /// The most probable tokens at its place, best first, if asked for.
    pub(super) alternatives: Vec<Alternative>,
}

/// A token that might have been drawn.
pub(super) struct Alternative {
    /// Lossy, as [`TokenLogprob::text`].
    pub(super) text: String,
    pub(super) bytes: Vec<u8>,
    pub(super) logprob: f32,
}

/// OpenAI's word for it.
pub(super) fn reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}

/// Runs the request. Errors before the first token are answers with a status of their own, also when a stream was asked for.
pub(super) async fn respond<S: Shape>(
    front: &Front,
    request: GenerateRequest,
    delivery: Delivery,
    _shape: S,
) -> Result<Response, ApiError> {
    let (n, logprobs) = (request.n, request.logprobs);
    let failed = |error| ApiError::from_generate(&error, S::ENDPOINT);
    let mut events = front.generate(request).await.map_err(failed)?;
    let Some(AnswerEvent::Started(started)) = events.next().await.transpose().map_err(failed)? else {
        return Err(broken::<S>());
    };
    let writer = Writer::<S> {
        front: front.clone(),
        created: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |time| time.as_secs()),
        started,
        logprobs,
        include_usage: delivery.include_usage,
        choices: (0..n).map(|_| Choice::new(front.detokenizer())).collect(),
        usage: Usage::default(),
        unfinished: n,
        shape: std::marker::PhantomData,
    };
    let event = events
        .next()
        .await
        .transpose()
        .map_err(failed)?
        .ok_or_else(broken::<S>)?;
    if delivery.stream {
        Ok(writer.stream(event, events))
    } else {
        writer.whole(event, events).await
    }
}

/// The router's stream broke its own contract.
fn broken<S: Shape>() -> ApiError {
    ApiError::from_generate(
        &crate::GenerateError::Internal("the answer ended early".to_owned()),
        S::ENDPOINT,
    )
}

struct Writer<S> {
    front: Front,
    started: Started,
    created: u64,
    logprobs: bool,
    include_usage: bool,
    /// By index.
    choices: Vec<Choice>,
    /// Of the choices that have finished.
    usage: Usage,
    unfinished: u32,
    shape: std::marker::PhantomData<S>,
}

/// A choice under way.
struct Choice {
    /// Of its whole answer, for `offset`: a character may take several tokens, and a control token shows none.
    detokenizer: Detokenizer,
    /// Characters of the tokens so far.
    offset: usize,
    /// No chunk has been written.
    first: bool,
}

impl Choice {
    fn new(detokenizer: Detokenizer) -> Self {
        Self {
            detokenizer,
            offset: 0,
            first: true,
        }
    }
}

impl<S: Shape> Writer<S> {
    async fn whole(mut self, first: AnswerEvent, mut events: AnswerStream) -> Result<Response, ApiError> {
        let mut texts: Vec<_> = self.choices.iter().map(|_| (String::new(), Vec::new())).collect();
        let (mut choices, mut details) = (vec![Value::Null; self.choices.len()], Value::Null);
        let mut event = first;
        loop {
            match event {
                AnswerEvent::Delta(delta) => {
                    let (text, tokens) = &mut texts[delta.choice as usize];
                    text.push_str(&delta.text);
                    if self.logprobs {
                        tokens.extend(self.token_logprobs(&delta));
                    }
                }
                AnswerEvent::Finished(finished) => {
                    let (text, tokens) = &texts[finished.choice as usize];
                    let logprobs = if self.logprobs {
                        S::logprobs(tokens)
                    } else {
                        Value::Null
                    };
                    let choice = S::choice(text, logprobs, finished.reason);
                    choices[finished.choice as usize] = indexed(choice, finished.choice);
                    if finished.choice == 0 {
                        details = self.details(&finished);
                    }
                    if self.ends_with(&finished) {
                        break;
                    }
                }
                AnswerEvent::Started(_) => return Err(broken::<S>()),
            }
            let next = events.next().await.transpose();
            event = next
                .map_err(|error| ApiError::from_generate(&error, S::ENDPOINT))?
                .ok_or_else(broken::<S>)?;
        }
        let mut answer = self.envelope(S::OBJECT, Value::Array(choices));
        answer["usage"] = usage(&self.usage);
        answer["baton"] = details;
        Ok(Json(answer).into_response())
    }

    fn stream(self, first: AnswerEvent, events: AnswerStream) -> Response {
        let events = stream::once(std::future::ready(Ok(first))).chain(events);
        let chunks = stream::unfold((self, events, false), |(mut writer, mut events, ended)| async move {
            if ended {
                return None;
            }
            let (text, ended) = match events.next().await {
                Some(Ok(event)) => writer.chunks(event),
                Some(Err(error)) => (sse(&ApiError::from_generate(&error, S::ENDPOINT).json()), true),
                None => (sse(&broken::<S>().json()), true),
            };
            Some((
                Ok::<_, std::convert::Infallible>(Bytes::from(text)),
                (writer, events, ended),
            ))
        });
        let mut response = Body::from_stream(chunks).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        // Proxies that buffer would hide the stream.
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        response
    }

    /// The server-sent events for one event, and whether they are the last.
    fn chunks(&mut self, event: AnswerEvent) -> (String, bool) {
        match event {
            AnswerEvent::Delta(delta) => {
                let logprobs = if self.logprobs {
                    S::logprobs(&self.token_logprobs(&delta))
                } else {
                    Value::Null
                };
                let first = self.choices[delta.choice as usize].first;
                let choice = S::chunk_choice(Some(&delta.text), logprobs, None, first);
                (self.chunk(delta.choice, choice, None), false)
            }
            AnswerEvent::Finished(finished) => {
                let first = self.choices[finished.choice as usize].first;
                let choice = S::chunk_choice(None, Value::Null, Some(finished.reason), first);
                let mut text = self.chunk(finished.choice, choice, Some(&finished));
                if !self.ends_with(&finished) {
                    return (text, false);
                }
                if self.include_usage {
                    let mut last = self.envelope(S::CHUNK, json!([]));
                    last["usage"] = usage(&self.usage);
                    text.push_str(&sse(&last));
                }
                text.push_str("data: [DONE]\n\n");
                (text, true)
            }
            AnswerEvent::Started(_) => (sse(&broken::<S>().json()), true),
        }
    }

    /// Counts a choice's end, and says whether it was the last.
    fn ends_with(&mut self, finished: &Finished) -> bool {
        self.usage.prompt_tokens += finished.usage.prompt_tokens;
        self.usage.completion_tokens += finished.usage.completion_tokens;
        self.usage.cached_tokens += finished.usage.cached_tokens;
        self.unfinished -= 1;
        self.unfinished == 0
    }

    fn chunk(&mut self, index: u32, choice: Value, finished: Option<&Finished>) -> String {
        self.choices[index as usize].first = false;
        let mut chunk = self.envelope(S::CHUNK, json!([indexed(choice, index)]));
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        if let Some(finished) = finished {
            chunk["baton"] = self.details(finished);
        }
        sse(&chunk)
    }

    fn envelope(&self, object: &str, choices: Value) -> Value {
        json!({
            "id": format!("{}-{}", S::ID, self.started.request_id),
            "object": object,
            "created": self.created,
            "model": self.started.model,
            "choices": choices,
        })
    }

    /// What Baton adds: where the time went, and which node did what.
    fn details(&self, finished: &Finished) -> Value {
        let (timings, served) = (&finished.timings, &finished.served);
        json!({
            "request_id": self.started.request_id.to_string(),
            "seed": self.started.seed,
            "timings": {
                "queue_ms": timings.queue_ms,
                "prefill_ms": timings.prefill_ms,
                "transfer_ms": timings.transfer_ms,
                "first_step_ms": timings.first_step_ms,
                "ttft_ms": timings.ttft_ms,
                "total_ms": timings.total_ms,
            },
            "served": {
                "router": served.router,
                "prefill_node": served.prefill_node.as_ref().map(|node| &node.0),
                "decode_node": served.decode_node.as_ref().map(|node| &node.0),
                "kv_bytes": served.kv_bytes,
                "kv_blocks": served.kv_blocks,
                "attempts": served.attempts,
                "transport": served.transport,
            },
        })
    }

    fn token_logprobs(&mut self, delta: &Delta) -> Vec<TokenLogprob> {
        let front = self.front.clone();
        let spelled = |id| {
            let bytes = front.token_bytes(id);
            (String::from_utf8_lossy(&bytes).into_owned(), bytes)
        };
        let alternative = |&(id, logprob): &(TokenId, f32)| {
            let (text, bytes) = spelled(id);
            Alternative { text, bytes, logprob }
        };
        let choice = &mut self.choices[delta.choice as usize];
        let mut lists = delta.top_logprobs.iter();
        let pairs = delta.ids.iter().zip(&delta.logprobs);
        pairs
            .map(|(&id, &logprob)| {
                let (text, bytes) = spelled(id);
                let alternatives = lists.next().into_iter().flatten().map(alternative).collect();
                let offset = choice.offset;
                let shown = choice.detokenizer.push(id).unwrap_or_default();
                choice.offset += shown.chars().count();
                TokenLogprob {
                    text,
                    bytes,
                    logprob,
                    offset,
                    alternatives,
                }
            })
            .collect()
    }
}

fn indexed(mut choice: Value, index: u32) -> Value {
    choice["index"] = json!(index);
    choice
}

fn usage(usage: &Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": u64::from(usage.prompt_tokens) + u64::from(usage.completion_tokens),
        "prompt_tokens_details": { "cached_tokens": usage.cached_tokens },
    })
}

fn sse(value: &Value) -> String {
    format!("data: {value}\n\n")
}
