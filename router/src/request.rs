//! What the edges (OpenAI over HTTP, `baton.v1.Generation` over gRPC) say to the router, and what they get back: text-level requests and events.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::{Duration, SystemTime},
};

use baton_kv::{KvIdentity, NodeId, RequestId, TokenId};
use futures_util::Stream;
use tokio::sync::mpsc;
use tokio_util::{sync::DropGuard, task::task_tracker::TaskTrackerToken};

use crate::error::GenerateError;

/// A request as an edge hands it to [`crate::Front::generate`], which validates it: every error names the field at fault.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    /// `None` means the cluster's only model.
    pub model: Option<String>,
    /// The prompt.
    pub input: Input,
    /// How tokens are drawn.
    pub sampling: SamplingRequest,
    /// Choices: answers to be drawn from the same prompt, at least 1.
    pub n: u32,
    /// Output tokens of each choice at most; `None` means what is left of the context.
    pub max_tokens: Option<u32>,
    /// The answer ends before the first of these.
    pub stop: Vec<String>,
    /// Further ids that end the answer.
    pub stop_token_ids: Vec<TokenId>,
    /// Go on after an end-of-sequence token.
    pub ignore_eos: bool,
    /// Fill [`Delta::logprobs`].
    pub logprobs: bool,
    /// Alternatives of each token in [`Delta::top_logprobs`], 0 to 20; over 0 only with `logprobs`.
    pub top_logprobs: u32,
    /// Who asks, as authenticated: never what the client claims.
    pub tenant: Tenant,
    /// Time until the answer must be complete; `None` means the router's default. Capped at the router's maximum.
    pub timeout: Option<Duration>,
    /// The request's span, made by [`crate::request_span`], so that an incoming trace context is its parent.
    pub span: tracing::Span,
}

impl GenerateRequest {
    /// Everything at its default: the only model, greedy, up to the end of the context.
    pub fn new(input: Input) -> Self {
        Self {
            model: None,
            input,
            sampling: SamplingRequest::default(),
            n: 1,
            max_tokens: None,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: false,
            top_logprobs: 0,
            tenant: Tenant::default(),
            timeout: None,
            span: tracing::Span::none(),
        }
    }
}

/// A prompt.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Input {
    /// As it is: no chat template, no added tokens.
    Text(String),
    /// Put through the model's chat template.
    Chat(Vec<ChatMessage>),
    /// Tokenised by the client.
    Tokens(Vec<TokenId>),
}

/// One message of a chat.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ChatMessage {
    /// "system", "user" or "assistant".
    pub role: String,
    /// Its text.
    pub content: String,
}

/// Sampling as asked for; what is absent takes the default named here.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct SamplingRequest {
    /// 0 (greedy, the default) to 2. (The OpenAI edge passes 1 where its client says nothing.)
    pub temperature: Option<f32>,
    /// 0 (the default) keeps all.
    pub top_k: Option<u32>,
    /// Over 0, to 1 (the default).
    pub top_p: Option<f32>,
    /// 0 (the default) to 1.
    pub min_p: Option<f32>,
    /// Drawn when absent, and reported in [`Started::seed`].
    pub seed: Option<u64>,
    /// Over 0; 1 is the default.
    pub repetition_penalty: Option<f32>,
    /// -2 to 2; 0 is the default.
    pub presence_penalty: Option<f32>,
    /// -2 to 2; 0 is the default.
    pub frequency_penalty: Option<f32>,
    /// Added to the logits of these tokens, -100 to 100; each id once.
    pub logit_bias: Vec<(TokenId, f32)>,
}

/// Who asks. Until authentication is built there is one: "default".
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Tenant(pub String);

impl Default for Tenant {
    fn default() -> Self {
        Self("default".to_owned())
    }
}

/// What an answer is made of: one `Started`, and for each choice any number of `Delta`s and one `Finished`. Those of several choices come interleaved.
#[derive(Clone, PartialEq, Debug)]
pub enum AnswerEvent {
    /// First, once the request is admitted; it may still wait for a node.
    Started(Started),
    /// Tokens, text, or both.
    Delta(Delta),
    /// Last of its choice.
    Finished(Box<Finished>),
}

/// The request as it was understood.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Started {
    /// The same in logs and traces.
    pub request_id: RequestId,
    /// The model that answers.
    pub model: String,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// The seed in use.
    pub seed: u64,
}

/// A piece of the answer.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Delta {
    /// Of which choice: from 0.
    pub choice: u32,
    /// Output index of the first of `ids`: 0, 1, 2, … over the choice, without gap or repeat.
    pub index: u32,
    /// May be empty, when only held-back text is released.
    pub ids: Vec<TokenId>,
    /// Whole characters only; may be empty while a character or a possible stop string is incomplete.
    pub text: String,
    /// One per id, natural logarithm; empty unless asked for.
    pub logprobs: Vec<f32>,
    /// One list per id: the most probable tokens and their log-probabilities, best first; empty unless asked for.
    pub top_logprobs: Vec<Vec<(TokenId, f32)>>,
}

/// How a choice ended.
#[derive(Clone, PartialEq, Debug)]
pub struct Finished {
    /// Which: from 0.
    pub choice: u32,
    /// Why.
    pub reason: FinishReason,
    /// What ended it, where that was a stop.
    pub matched: Option<Matched>,
    /// Tokens.
    pub usage: Usage,
    /// Where the time went.
    pub timings: Timings,
    /// Where it ran.
    pub served: Served,
}

/// Why an answer ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FinishReason {
    /// An end-of-sequence token, a stop id or a stop string.
    Stop,
    /// `max_tokens`, or the end of the context.
    Length,
}

/// What ended an answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Matched {
    /// A stop string.
    Stop(String),
    /// An end-of-sequence token or a stop id.
    TokenId(TokenId),
}

/// Tokens of a choice; the sum over all choices is the request's. The prompt is the first choice's: the others' are 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    /// Of the prompt.
    pub prompt_tokens: u32,
    /// Of the choice.
    pub completion_tokens: u32,
    /// Prompt tokens that were found in a KV pool and not computed.
    pub cached_tokens: u32,
}

/// Milliseconds; the first four are stages of the time to the first token.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Timings {
    /// Waiting for a node: in the router and on the nodes. Of a choice but the first: for the first one's first token, too.
    pub queue_ms: f64,
    /// Computing the prompt.
    pub prefill_ms: f64,
    /// From the first token drawn on the prefill node to the verified KV on the decode node.
    pub transfer_ms: f64,
    /// The first decode step.
    pub first_step_ms: f64,
    /// Until the first token left the router.
    pub ttft_ms: f64,
    /// Until the last token left the router.
    pub total_ms: f64,
}

/// Where a request ran.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Served {
    /// The router.
    pub router: String,
    /// `None` when the decode node ran the prompt itself.
    pub prefill_node: Option<NodeId>,
    /// `None` when the first token ended the answer on the prefill node.
    pub decode_node: Option<NodeId>,
    /// KV bytes that crossed between the two.
    pub kv_bytes: u64,
    /// KV blocks that crossed.
    pub kv_blocks: u32,
    /// Dispatches; 1 unless a node was lost or full.
    pub attempts: u32,
    /// "local" or "grpc".
    pub transport: &'static str,
}

/// A model that can be asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Model {
    /// As clients name it.
    pub id: String,
    /// Prompt and answer together at most, tokens.
    pub context_length: u32,
    /// Ids are below it.
    pub vocabulary: u32,
    /// `None` until the first node has announced itself.
    pub kv_identity: Option<KvIdentity>,
    /// When this router loaded it.
    pub created: SystemTime,
}

/// An answer under way. Ends after the `Finished` of every choice, or after exactly one `Err`. Dropping it cancels the request on every node.
#[derive(Debug)]
pub struct AnswerStream {
    events: mpsc::Receiver<Result<AnswerEvent, GenerateError>>,
    /// Choices whose `Finished` has not passed; 0 once an error has.
    unfinished: u32,
    /// A drain waits until the answer has been read.
    held: Option<TaskTrackerToken>,
    _cancel: DropGuard,
}

impl AnswerStream {
    /// Reads the `events` of so many `choices`; `cancel` fires when the stream is dropped, and `held` is kept until it has ended.
    pub(crate) fn new(
        events: mpsc::Receiver<Result<AnswerEvent, GenerateError>>,
        choices: u32,
        cancel: DropGuard,
        held: TaskTrackerToken,
    ) -> Self {
        Self {
            events,
            unfinished: choices,
            held: Some(held),
            _cancel: cancel,
        }
    }
}

impl Stream for AnswerStream {
    type Item = Result<AnswerEvent, GenerateError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.unfinished == 0 {
            return Poll::Ready(None);
        }
        let item = ready!(self.events.poll_recv(cx));
        // A choice's task always says how it ended, unless it panicked.
        let item = item.unwrap_or_else(|| Err(GenerateError::Internal("the request's task has died".to_owned())));
        match item {
            Ok(AnswerEvent::Finished(_)) => self.unfinished -= 1,
            Ok(_) => {}
            Err(_) => self.unfinished = 0,
        }
        if self.unfinished == 0 {
            self.held = None;
        }
        Poll::Ready(Some(item))
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt, StreamExt};
    use tokio_util::{sync::CancellationToken, task::TaskTracker};

    use super::*;

    #[tokio::test]
    async fn a_drain_waits_until_the_answer_has_been_read() {
        let requests = TaskTracker::new();
        let (sender, events) = mpsc::channel(4);
        let mut answer = AnswerStream::new(events, 1, CancellationToken::new().drop_guard(), requests.token());
        sender
            .try_send(Ok(AnswerEvent::Delta(Delta::default())))
            .expect("there is room");
        sender.try_send(Err(GenerateError::NoNodes)).expect("there is room");
        drop(sender);
        requests.close();
        for last in [false, true] {
            assert!(requests.wait().now_or_never().is_none());
            assert_eq!(answer.next().await.is_some_and(|item| item.is_err()), last);
        }
        assert!(requests.wait().now_or_never().is_some());

        let requests = TaskTracker::new();
        let (_sender, events) = mpsc::channel(1);
        let unread = AnswerStream::new(events, 1, CancellationToken::new().drop_guard(), requests.token());
        requests.close();
        drop(unread);
        assert!(requests.wait().now_or_never().is_some());
    }
}
