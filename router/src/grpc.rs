//! `baton.v1.Generation` over [`Front`], and reflection for what is public.

use std::{
    pin::Pin,
    time::{Duration, UNIX_EPOCH},
};

use axum::http::HeaderMap;
use baton_kv::TokenId;
use baton_node::status::{self, invalid_field};
use baton_proto::v1::{self as pb, generate_event, generate_request, generation_server::Generation, tokenize_request};
use futures_util::{Stream, StreamExt};
use prost::Message;
use prost_types::FileDescriptorSet;
use tonic::{Code, Request, Response, Status};
use tonic_reflection::server::{
    Builder,
    v1::{ServerReflection, ServerReflectionServer},
    v1alpha::{ServerReflection as ServerReflectionAlpha, ServerReflectionServer as ServerReflectionServerAlpha},
};

use crate::{
    Front,
    error::{ErrorKind, Field, GenerateError},
    limits,
    request::{
        AnswerEvent, ChatMessage, FinishReason, Finished, GenerateRequest, Input, Matched, SamplingRequest, Tenant,
    },
    trace::request_span,
};

use edge::Arrived;

pub(crate) mod edge;
pub(crate) mod incoming;

/// The public service's name.
pub(crate) const GENERATION: &str = "baton.v1.Generation";

const TIMEOUT: &str = "grpc-timeout";

/// Packages that clients may know of; what routers and nodes say to each other is none of them.
const PUBLIC: [&str; 2] = ["baton.v1", "grpc.health.v1"];

/// The service.
pub(crate) struct GenerationService {
    front: Front,
}

impl GenerationService {
    pub(crate) fn new(front: Front) -> Self {
        Self { front }
    }
}

type Events = Pin<Box<dyn Stream<Item = Result<pb::GenerateEvent, Status>> + Send>>;

#[tonic::async_trait]
impl Generation for GenerationService {
    type GenerateStream = Events;

    async fn generate(&self, request: Request<pb::GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let span = request_span(request.metadata().as_ref());
        let timeout = time_left(&request)?;
        let input = Spelling::of_generate(request.get_ref());
        let mut request = generate_request(request.into_inner())?;
        request.span = span;
        request.timeout = timeout;
        let answer = self.front.generate(request).await;
        let answer = answer.map_err(|error| input.status(&error))?;
        let events = answer.enumerate().map(move |(sequence, event)| match event {
            Ok(event) => Ok(event_to_proto(sequence as u64, event)),
            Err(error) => Err(input.status(&error)),
        });
        Ok(Response::new(Box::pin(events)))
    }

    async fn tokenize(&self, request: Request<pb::TokenizeRequest>) -> Result<Response<pb::TokenizeResponse>, Status> {
        let request = request.into_inner();
        let (input, spelling) = match request.input {
            Some(tokenize_request::Input::Text(text)) => (Input::Text(text), Spelling("text")),
            Some(tokenize_request::Input::Chat(chat)) => (chat_input(chat), Spelling("chat")),
            None => return Err(invalid_field("input", "text or chat must be set")),
        };
        let ids = self.front.tokenize(model(&request.model), input).await;
        let ids = ids.map_err(|error| spelling.status(&error))?;
        Ok(Response::new(pb::TokenizeResponse { ids }))
    }

    async fn detokenize(
        &self,
        request: Request<pb::DetokenizeRequest>,
    ) -> Result<Response<pb::DetokenizeResponse>, Status> {
        let request = request.into_inner();
        let text = self.front.detokenize(model(&request.model), request.ids).await;
        let text = text.map_err(|error| Spelling("ids").status(&error))?;
        Ok(Response::new(pb::DetokenizeResponse { text }))
    }

    async fn list_models(
        &self,
        _request: Request<pb::ListModelsRequest>,
    ) -> Result<Response<pb::ListModelsResponse>, Status> {
        let model = |model: crate::Model| {
            let created = model.created.duration_since(UNIX_EPOCH).unwrap_or_default();
            let hex = |identity: baton_kv::KvIdentity| identity.0.iter().map(|byte| format!("{byte:02x}")).collect();
            pb::Model {
                id: model.id,
                context_length: model.context_length,
                vocabulary: model.vocabulary,
                kv_identity: model.kv_identity.map(hex).unwrap_or_default(),
                created: created.as_secs() as i64,
            }
        };
        let models = self.front.models().into_iter().map(model).collect();
        Ok(Response::new(pb::ListModelsResponse { models }))
    }
}

fn model(name: &str) -> Option<&str> {
    Some(name).filter(|name| !name.is_empty())
}

fn chat_input(chat: pb::Chat) -> Input {
    let message = |message: pb::Message| ChatMessage {
        role: message.role,
        content: message.content,
    };
    Input::Chat(chat.messages.into_iter().map(message).collect())
}

/// From the wire. Fields that are not built yet are refused unless absent or neutral.
fn generate_request(request: pb::GenerateRequest) -> Result<GenerateRequest, Status> {
    let sampling = request.sampling.unwrap_or_default();
    let stopping = request.stopping.unwrap_or_default();
    let output = request.output.unwrap_or_default();
    let input = match request.input {
        Some(generate_request::Input::Text(text)) => Input::Text(text),
        Some(generate_request::Input::Chat(chat)) => chat_input(chat),
        Some(generate_request::Input::Tokens(tokens)) => Input::Tokens(tokens.ids),
        None => return Err(invalid_field("input", "text, chat or tokens must be set")),
    };
    Ok(GenerateRequest {
        model: Some(request.model).filter(|model| !model.is_empty()),
        input,
        sampling: SamplingRequest {
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
            seed: sampling.seed,
            repetition_penalty: sampling.repetition_penalty,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            logit_bias: sampling.logit_bias.into_iter().collect(),
        },
        n: sampling.n.unwrap_or(1),
        max_tokens: stopping.max_tokens,
        stop: stopping.stop,
        stop_token_ids: stopping.stop_token_ids,
        ignore_eos: stopping.ignore_eos.unwrap_or(false),
        logprobs: output.logprobs.unwrap_or(false),
        top_logprobs: output.top_logprobs.unwrap_or(0),
        tenant: Tenant::default(),
        timeout: None,
        span: tracing::Span::none(),
    })
}

/// How long the call may still take, if its client set a timeout: a little less than it said.
fn time_left<T>(request: &Request<T>) -> Result<Option<Duration>, Status> {
    let headers = request.metadata().as_ref();
    if !headers.contains_key(TIMEOUT) {
        return Ok(None);
    }
    let timeout =
        timeout(headers).ok_or_else(|| invalid_field(TIMEOUT, "not a number of up to 8 digits and a unit"))?;
    let arrived = request.extensions().get::<Arrived>();
    let taken = arrived.map_or(Duration::ZERO, |Arrived(at)| at.elapsed());
    Ok(Some(timeout.saturating_sub(taken + limits::DEADLINE_MARGIN)))
}

/// A client's timeout: up to 8 digits and a unit. `None` when it is absent or malformed.
fn timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(TIMEOUT)?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3_600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

/// How this call spells the prompt's field.
#[derive(Clone, Copy)]
struct Spelling(&'static str);

impl Spelling {
    fn of_generate(request: &pb::GenerateRequest) -> Self {
        Self(match request.input {
            Some(generate_request::Input::Text(_)) => "text",
            Some(generate_request::Input::Chat(_)) => "chat",
            Some(generate_request::Input::Tokens(_)) => "tokens",
            None => "input",
        })
    }

    fn field(self, field: Field) -> &'static str {
        match field {
            Field::Model => "model",
            Field::Input => self.0,
            Field::Temperature => "sampling.temperature",
            Field::N => "sampling.n",
            Field::TopK => "sampling.top_k",
            Field::TopP => "sampling.top_p",
            Field::MinP => "sampling.min_p",
            Field::Seed => "sampling.seed",
            Field::RepetitionPenalty => "sampling.repetition_penalty",
            Field::PresencePenalty => "sampling.presence_penalty",
            Field::FrequencyPenalty => "sampling.frequency_penalty",
            Field::LogitBias => "sampling.logit_bias",
            Field::TopLogprobs => "output.top_logprobs",
            Field::MaxTokens => "stopping.max_tokens",
            Field::Stop => "stopping.stop",
            Field::StopTokenIds => "stopping.stop_token_ids",
            Field::Timeout => TIMEOUT,
            Field::Ids => "ids",
        }
    }

    fn status(self, error: &GenerateError) -> Status {
        let code = match error.kind() {
            ErrorKind::InvalidArgument => Code::InvalidArgument,
            ErrorKind::NotFound => Code::NotFound,
            ErrorKind::Shed => Code::ResourceExhausted,
            ErrorKind::Unavailable => Code::Unavailable,
            ErrorKind::DeadlineExceeded => Code::DeadlineExceeded,
            ErrorKind::Cancelled => Code::Cancelled,
            ErrorKind::Internal => Code::Internal,
        };
        let mut status = status::error(code, error.code(), error.to_string());
        if let Some(field) = error.field() {
            status = status.field(self.field(field));
        }
        if let Some(delay) = error.retry_after() {
            status = status.retry_after(delay);
        }
        match error {
            GenerateError::NodeLost { node } | GenerateError::TooLongForNode { node, .. } => {
                status = status.with("node", node)
            }
            GenerateError::NodeFailed { node, code, .. } => status = status.with("node", node).with("node_code", code),
            _ => {}
        }
        status.build()
    }
}

fn event_to_proto(sequence: u64, event: AnswerEvent) -> pb::GenerateEvent {
    let event = match event {
        AnswerEvent::Started(started) => generate_event::Event::Started(pb::Started {
            request_id: started.request_id.to_string(),
            model: started.model,
            prompt_tokens: started.prompt_tokens,
            seed: started.seed,
        }),
        AnswerEvent::Delta(delta) => generate_event::Event::Delta(pb::TokenDelta {
            choice: delta.choice,
            index: delta.index,
            ids: delta.ids,
            text: delta.text,
            logprobs: delta.logprobs,
            top_logprobs: delta.top_logprobs.into_iter().map(top_logprobs).collect(),
        }),
        AnswerEvent::Finished(finished) => generate_event::Event::Finished(finished_to_proto(*finished)),
    };
    pb::GenerateEvent {
        sequence,
        event: Some(event),
    }
}

fn top_logprobs(alternatives: Vec<(TokenId, f32)>) -> pb::TopLogprobs {
    let token = |(id, logprob)| pb::TokenLogprob { id, logprob };
    pb::TopLogprobs {
        tokens: alternatives.into_iter().map(token).collect(),
    }
}

fn finished_to_proto(finished: Finished) -> pb::Finished {
    let reason = match finished.reason {
        FinishReason::Stop => pb::FinishReason::Stop,
        FinishReason::Length => pb::FinishReason::Length,
    };
    let matched = finished.matched.map(|matched| match matched {
        Matched::Stop(stop) => pb::finished::Matched::Stop(stop),
        Matched::TokenId(id) => pb::finished::Matched::StopTokenId(id),
    });
    let (usage, timings, served) = (finished.usage, finished.timings, finished.served);
    let node = |node: Option<baton_kv::NodeId>| node.map(|node| node.0).unwrap_or_default();
    pb::Finished {
        choice: finished.choice,
        reason: reason.into(),
        matched,
        usage: Some(pb::Usage {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            cached_tokens: usage.cached_tokens,
        }),
        timings: Some(pb::Timings {
            queue_ms: timings.queue_ms,
            prefill_ms: timings.prefill_ms,
            transfer_ms: timings.transfer_ms,
            first_step_ms: timings.first_step_ms,
            ttft_ms: timings.ttft_ms,
            total_ms: timings.total_ms,
        }),
        served: Some(pb::Served {
            router: served.router,
            prefill_node: node(served.prefill_node),
            decode_node: node(served.decode_node),
            kv_bytes: served.kv_bytes,
            kv_blocks: served.kv_blocks,
            attempts: served.attempts,
            transport: served.transport.to_owned(),
        }),
    }
}

/// Reflection, v1 and v1alpha, of the public services, health, and itself.
pub(crate) fn reflection() -> Result<
    (
        ServerReflectionServer<impl ServerReflection>,
        ServerReflectionServerAlpha<impl ServerReflectionAlpha>,
    ),
    tonic_reflection::server::Error,
> {
    let mut all = FileDescriptorSet::decode(baton_proto::FILE_DESCRIPTOR_SET)?;
    all.file.retain(|file| PUBLIC.contains(&file.package()));
    let builder = || {
        Builder::configure()
            .register_file_descriptor_set(all.clone())
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    Ok((builder().build_v1()?, builder().build_v1alpha()?))
}

#[cfg(test)]
mod tests;
