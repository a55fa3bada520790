//! The client side of `baton.v1.Generation`, for `generate` and `chat`.

use std::path::{Path, PathBuf};

use baton_node::{TlsError, grpc, limits, status, telemetry, tls};
use baton_proto::v1::{
    Chat, Finished, GenerateEvent, GenerateRequest, ListModelsRequest, Output, Sampling, Started, Stopping, TokenIds,
    generate_event::Event, generate_request::Input, generation_client::GenerationClient,
};
use tonic::{Code, Request, Status, Streaming, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

/// Which cluster to ask.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ClusterArgs {
    /// The router's gRPC address
    #[arg(
        long = "grpc",
        env = "BATON_URL",
        value_name = "URL",
        default_value = "http://127.0.0.1:7070"
    )]
    pub(crate) url: String,
    /// Certificate of the authority that has signed the router's, PEM; needed where the address begins with https://
    #[arg(long, env = "BATON_TLS_CA", value_name = "FILE")]
    pub(crate) tls_ca: Option<PathBuf>,
    /// Which model answers; leave it out when the cluster has one
    #[arg(long = "model-name", value_name = "NAME", default_value = "")]
    pub(crate) model: String,
}

/// How tokens are drawn, and when to stop.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct AnswerArgs {
    /// Longest answer, tokens; without it, what is left of the model's context
    #[arg(long, value_name = "N")]
    pub(crate) max_tokens: Option<u32>,
    /// How freely to choose words: 0 always takes the likeliest, 0.7 varies, over 1.2 rambles
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    pub(crate) temperature: f32,
    /// Choose among the K likeliest tokens only; 0 is no bound
    #[arg(long, value_name = "K")]
    pub(crate) top_k: Option<u32>,
    /// Choose among the likeliest tokens that together have this probability; 0.9 is usual, 1 is no bound
    #[arg(long, value_name = "P")]
    pub(crate) top_p: Option<f32>,
    /// Leave out tokens less likely than this share of the likeliest; 0.05 is usual, 0 is no bound
    #[arg(long, value_name = "P")]
    pub(crate) min_p: Option<f32>,
    /// The same seed gives the same answer; without it one is drawn
    #[arg(long, value_name = "SEED")]
    pub(crate) seed: Option<u64>,
    /// End the answer before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
}

impl AnswerArgs {
    /// The request for `input`.
    pub(crate) fn request(&self, model: &str, input: Input) -> GenerateRequest {
        GenerateRequest {
            model: model.to_owned(),
            input: Some(input),
            sampling: Some(Sampling {
                temperature: Some(self.temperature),
                top_k: self.top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                seed: self.seed,
                ..Sampling::default()
            }),
            stopping: Some(Stopping {
                max_tokens: self.max_tokens,
                stop: self.stop.clone(),
                ..Stopping::default()
            }),
            output: Some(Output::default()),
        }
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    #[error("{0}")]
    Address(#[from] grpc::AddressError),
    #[error("{0}")]
    Tls(#[from] TlsError),
    #[error(
        "no cluster answers at {url} ({why}): start one with `baton up`, or pass --grpc with the router's address (https:// where it serves TLS)"
    )]
    NoCluster { url: String, why: String },
    #[error("{}", describe(.0))]
    Refused(Box<Status>),
    #[error("the connection to the router broke ({0}); the answer is not complete")]
    Broken(String),
    #[error("the router's stream broke the protocol: {0}")]
    Protocol(String),
}

impl ClientError {
    /// Of a status that ended a stream: a router's own always has a reason, a broken connection's has none.
    fn of_stream(status: Status) -> Self {
        match status::reason(&status) {
            None if matches!(status.code(), Code::Unknown | Code::Unavailable | Code::Internal) => {
                Self::Broken(status.message().to_owned())
            }
            _ => status.into(),
        }
    }
}

impl From<Status> for ClientError {
    fn from(status: Status) -> Self {
        Self::Refused(Box::new(status))
    }
}

/// A status as one line: message, reason, field, and when to try again.
fn describe(status: &Status) -> String {
    let message = if status.message().is_empty() {
        status.code().description()
    } else {
        status.message()
    };
    let reason = status::reason(status).unwrap_or_else(|| format!("{:?}", status.code()));
    let mut line = format!("{message} ({reason}");
    if let Some(field) = status::field(status) {
        line += &format!(", field {field}");
    }
    line.push(')');
    if let Some(delay) = status::retry_after(status) {
        line += &format!("; try again in {:.1} s", delay.as_secs_f64());
    }
    line
}

/// A connection to one router.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    inner: GenerationClient<Channel>,
    health: HealthClient<Channel>,
    url: String,
}

impl Client {
    /// Connects, or says that nobody is there. `tls_ca` counts for `https://` only.
    pub(crate) async fn connect(url: &str, tls_ca: Option<&Path>) -> Result<Self, ClientError> {
        let tls_ca = tls_ca.filter(|_| url.starts_with("https://"));
        let tls = tls_ca.map(tls::client_of).transpose()?;
        let no_cluster = |error: tonic::transport::Error| ClientError::NoCluster {
            url: url.to_owned(),
            why: root_cause(&error),
        };
        let channel = grpc::endpoint(url, tls.as_ref())?.connect().await.map_err(no_cluster)?;
        let health = HealthClient::new(channel.clone());
        let inner = GenerationClient::new(channel)
            .max_decoding_message_size(limits::GRPC_MESSAGE_BYTES)
            .max_encoding_message_size(limits::GRPC_MESSAGE_BYTES);
        Ok(Self {
            inner,
            health,
            url: url.to_owned(),
        })
    }

    /// Names of the models that are served now.
    pub(crate) async fn models(&mut self) -> Result<Vec<String>, ClientError> {
        let mut request = telemetry::request(ListModelsRequest {});
        request.set_timeout(limits::CALL_TIMEOUT);
        let answer = self
            .inner
            .list_models(request)
            .await
            .map_err(|status| self.error(status))?;
        Ok(answer.into_inner().models.into_iter().map(|model| model.id).collect())
    }

    /// Whether a request could be served now: the router is up and has a node that decodes.
    pub(crate) async fn serving(&mut self) -> Result<bool, ClientError> {
        let mut request = Request::new(HealthCheckRequest { service: String::new() });
        request.set_timeout(limits::CALL_TIMEOUT);
        let answer = self.health.check(request).await.map_err(|status| self.error(status))?;
        Ok(answer.into_inner().status() == ServingStatus::Serving)
    }

    /// Starts one answer. Dropping it cancels the request on every node.
    pub(crate) async fn generate(&mut self, request: GenerateRequest) -> Result<Answer, ClientError> {
        let mut request = telemetry::request(request);
        request.set_timeout(limits::REQUEST_TIMEOUT_DEFAULT);
        let stream = self
            .inner
            .generate(request)
            .await
            .map_err(|status| self.error(status))?
            .into_inner();
        Ok(Answer::new(stream))
    }

    fn error(&self, status: Status) -> ClientError {
        // A broken connection is nobody's typed error.
        let broken = matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Internal);
        if broken && status::reason(&status).is_none() {
            return ClientError::NoCluster {
                url: self.url.clone(),
                why: root_cause(&status),
            };
        }
        status.into()
    }
}

/// The innermost error: what wraps it says "transport error" only.
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// What the stream says next.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Part {
    /// The request was taken.
    Started(Started),
    /// More text; may be empty.
    Text(String),
    /// The end.
    Finished(Box<Finished>),
}

/// One answer as it arrives; checks that the stream keeps its promises (sequence numbers, token indices without gap or repeat).
#[derive(Debug)]
pub(crate) struct Answer {
    stream: Streaming<GenerateEvent>,
    order: Order,
}

impl Answer {
    fn new(stream: Streaming<GenerateEvent>) -> Self {
        Self {
            stream,
            order: Order::default(),
        }
    }

    /// The next part; an error ends the answer, and so does [`Part::Finished`]. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Result<Part, ClientError> {
        match self.stream.message().await.map_err(ClientError::of_stream)? {
            Some(event) => self.order.take(event),
            None => Err(ClientError::Protocol("it ended without a last event".into())),
        }
    }

    /// Token ids so far.
    pub(crate) fn ids(&self) -> &[u32] {
        &self.order.ids
    }
}

#[derive(Default, Debug)]
struct Order {
    sequence: u64,
    ids: Vec<u32>,
}

impl Order {
    fn take(&mut self, event: GenerateEvent) -> Result<Part, ClientError> {
        if event.sequence != self.sequence {
            return Err(ClientError::Protocol(format!(
                "event {} came where {} was due",
                event.sequence, self.sequence
            )));
        }
        self.sequence += 1;
        match event.event {
            Some(Event::Started(started)) => Ok(Part::Started(started)),
            Some(Event::Delta(delta)) => {
                if !delta.ids.is_empty() && delta.index as usize != self.ids.len() {
                    return Err(ClientError::Protocol(format!(
                        "token {} came where {} was due",
                        delta.index,
                        self.ids.len()
                    )));
                }
                self.ids.extend(&delta.ids);
                Ok(Part::Text(delta.text))
            }
            Some(Event::Finished(finished)) => Ok(Part::Finished(Box::new(finished))),
            None => Err(ClientError::Protocol("an event of an unknown kind".into())),
        }
    }
}

/// Messages as the request's input.
pub(crate) fn chat(messages: Vec<baton_proto::v1::Message>) -> Input {
    Input::Chat(Chat { messages })
}

/// One message.
pub(crate) fn message(role: &str, content: &str) -> baton_proto::v1::Message {
    baton_proto::v1::Message {
        role: role.to_owned(),
        content: content.to_owned(),
    }
}

/// Token ids as the request's input.
pub(crate) fn tokens(ids: Vec<u32>) -> Input {
    Input::Tokens(TokenIds { ids })
}

#[cfg(test)]
mod tests;
