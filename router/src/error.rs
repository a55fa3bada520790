//! Why a request was not answered. The edges map [`ErrorKind`] to their own statuses; the code is the same everywhere.

use std::{fmt, time::Duration};

use baton_kv::{NodeId, TokenId};
use baton_node::status::reasons;

use crate::limits;

/// A field of a request, so that an error can name it. Edges translate it to their own spelling.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[allow(missing_docs)]
pub enum Field {
    Model,
    /// The prompt: text, messages or token ids.
    Input,
    Temperature,
    /// The number of choices.
    N,
    TopK,
    TopP,
    MinP,
    Seed,
    RepetitionPenalty,
    PresencePenalty,
    FrequencyPenalty,
    LogitBias,
    TopLogprobs,
    MaxTokens,
    Stop,
    StopTokenIds,
    Timeout,
    /// The ids of a Detokenize call.
    Ids,
}

impl Field {
    /// In snake case, e.g. `top_p`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Input => "input",
            Self::Temperature => "temperature",
            Self::N => "n",
            Self::TopK => "top_k",
            Self::TopP => "top_p",
            Self::MinP => "min_p",
            Self::Seed => "seed",
            Self::RepetitionPenalty => "repetition_penalty",
            Self::PresencePenalty => "presence_penalty",
            Self::FrequencyPenalty => "frequency_penalty",
            Self::LogitBias => "logit_bias",
            Self::TopLogprobs => "top_logprobs",
            Self::MaxTokens => "max_tokens",
            Self::Stop => "stop",
            Self::StopTokenIds => "stop_token_ids",
            Self::Timeout => "timeout",
            Self::Ids => "ids",
        }
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What kind of failure, independent of HTTP and gRPC.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ErrorKind {
    /// The request cannot be served as it is. (400, INVALID_ARGUMENT)
    InvalidArgument,
    /// Unknown model. (404, NOT_FOUND)
    NotFound,
    /// Refused for load; retry later. (429, RESOURCE_EXHAUSTED)
    Shed,
    /// No node, or a node died on the way. (503, UNAVAILABLE)
    Unavailable,
    /// (504, DEADLINE_EXCEEDED)
    DeadlineExceeded,
    /// The client went away. (499, CANCELLED)
    Cancelled,
    /// A defect. (500, INTERNAL)
    Internal,
}

/// Why a request was not answered, or not to its end. Messages are fit for a client.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum GenerateError {
    /// No token in the prompt.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// More bytes (text) or ids than are looked at.
    #[error("the input has {size} {unit}; at most {limit} are taken")]
    InputTooLarge {
        /// What was sent.
        size: usize,
        /// What is taken.
        limit: usize,
        /// "bytes", "tokens" or "messages".
        unit: &'static str,
    },
    /// The prompt leaves no room for one output token.
    #[error("the prompt has {tokens} tokens or more, and the context of {limit} must hold at least one after it")]
    PromptTooLong {
        /// Of the prompt.
        tokens: usize,
        /// The context.
        limit: usize,
    },
    /// An id that the model does not have.
    #[error("{field}: token id {id} is outside the vocabulary of {vocabulary}")]
    TokenOutOfVocabulary {
        /// Where.
        field: Field,
        /// The id.
        id: TokenId,
        /// Ids are below it.
        vocabulary: usize,
    },
    /// A value outside its range.
    #[error("{field}: {problem}")]
    InvalidField {
        /// Which.
        field: Field,
        /// E.g. "must be between 0 and 2, not -1".
        problem: String,
    },
    /// The chat template refused the messages.
    #[error("the model's chat template refused the messages: {0}")]
    ChatRefused(String),
    /// The model file has no chat template.
    #[error("this model has no chat template: send text or tokens")]
    NoChatTemplate,
    /// The model file's chat template does not parse.
    #[error("this model's chat template is broken ({0}): send text or tokens")]
    ChatTemplateBroken(String),
    /// No such model here.
    #[error("the model {model:?} is not served here; {served:?} is")]
    UnknownModel {
        /// Asked for.
        model: String,
        /// What is served.
        served: String,
    },
    /// The router's queue is full.
    #[error("the router's queue is full ({limit} requests wait)")]
    QueueFull {
        /// Requests that may wait.
        limit: usize,
        /// When to try again.
        retry_after: Duration,
    },
    /// Too much is being received from all clients at a time.
    #[error("the router is receiving as much as it can take")]
    Overloaded,
    /// It waited as long as a request may wait, or would have to.
    #[error("no node had room for the request within its time in the queue")]
    QueueTimeout {
        /// When to try again.
        retry_after: Duration,
    },
    /// Every node that it was sent to had no room after all.
    #[error("no node had room for the request ({attempts} were asked)")]
    NodesFull {
        /// Dispatches.
        attempts: u32,
    },
    /// The prompt needs more blocks than any node has.
    #[error("the request needs {needed} KV blocks, and the largest decode node has {largest}")]
    TooLargeForNodes {
        /// Blocks.
        needed: u64,
        /// Blocks of the largest node.
        largest: u64,
    },
    /// No decode node is ready.
    #[error("no node can decode at the moment")]
    NoNodes,
    /// This router is being shut down.
    #[error("this router is draining")]
    Draining,
    /// A node that was serving the request died or became unreachable.
    #[error("the node {node} was lost while it served the request")]
    NodeLost {
        /// Which.
        node: NodeId,
    },
    /// A node gave up on the request for a reason of its own.
    #[error("the node {node} could not serve the request ({code}): {message}")]
    NodeFailed {
        /// Which.
        node: NodeId,
        /// The node's stable code.
        code: String,
        /// Its message.
        message: String,
        /// Whether a retry may help.
        retryable: bool,
    },
    /// By the node's measure it is too long after all.
    #[error("the node {node} cannot hold the request: {message}")]
    TooLongForNode {
        /// Which.
        node: NodeId,
        /// Its message.
        message: String,
    },
    /// The client read too slowly: what was generated for it would have had to be kept.
    #[error("the answer was not read in time")]
    SlowReader,
    /// The request's deadline passed.
    #[error("the request's deadline passed {0}")]
    DeadlineExceeded(&'static str),
    /// The client went away.
    #[error("the request was cancelled")]
    Cancelled,
    /// A defect.
    #[error("internal error: {0}")]
    Internal(String),
}

impl GenerateError {
    /// Stable, UPPER_SNAKE_CASE: for clients to branch on.
    pub fn code(&self) -> &'static str {
        match self {
            Self::EmptyPrompt => "EMPTY_PROMPT",
            Self::InputTooLarge { .. } => "INPUT_TOO_LARGE",
            Self::PromptTooLong { .. } | Self::TooLongForNode { .. } => reasons::CONTEXT_LENGTH,
            Self::TokenOutOfVocabulary { .. } => "TOKEN_OUT_OF_VOCABULARY",
            Self::InvalidField { .. } => reasons::INVALID_FIELD,
            Self::ChatRefused(_) => "CHAT_REFUSED",
            Self::NoChatTemplate => "NO_CHAT_TEMPLATE",
            Self::ChatTemplateBroken(_) => "CHAT_TEMPLATE_BROKEN",
            Self::UnknownModel { .. } => reasons::UNKNOWN_MODEL,
            Self::QueueFull { .. } => "QUEUE_FULL",
            Self::Overloaded => reasons::OVERLOADED,
            Self::QueueTimeout { .. } => "QUEUE_TIMEOUT",
            Self::NodesFull { .. } => "NODES_FULL",
            Self::TooLargeForNodes { .. } => "TOO_LARGE_FOR_NODES",
            Self::NoNodes => reasons::NO_NODES,
            Self::Draining => reasons::DRAINING,
            Self::NodeLost { .. } => reasons::NODE_LOST,
            Self::NodeFailed { .. } => "NODE_FAILED",
            Self::SlowReader => "SLOW_READER",
            Self::DeadlineExceeded(_) => "DEADLINE_EXCEEDED",
            Self::Cancelled => "CANCELLED",
            Self::Internal(_) => reasons::INTERNAL,
        }
    }

    /// What kind of failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::EmptyPrompt
            | Self::InputTooLarge { .. }
            | Self::PromptTooLong { .. }
            | Self::TokenOutOfVocabulary { .. }
            | Self::InvalidField { .. }
            | Self::ChatRefused(_)
            | Self::NoChatTemplate
            | Self::ChatTemplateBroken(_)
            | Self::TooLongForNode { .. }
            | Self::TooLargeForNodes { .. } => ErrorKind::InvalidArgument,
            Self::UnknownModel { .. } => ErrorKind::NotFound,
            Self::QueueFull { .. }
            | Self::Overloaded
            | Self::QueueTimeout { .. }
            | Self::NodesFull { .. }
            | Self::SlowReader => ErrorKind::Shed,
            Self::NoNodes | Self::Draining | Self::NodeLost { .. } => ErrorKind::Unavailable,
            Self::NodeFailed { retryable: true, .. } => ErrorKind::Unavailable,
            Self::NodeFailed { retryable: false, .. } | Self::Internal(_) => ErrorKind::Internal,
            Self::DeadlineExceeded(_) => ErrorKind::DeadlineExceeded,
            Self::Cancelled => ErrorKind::Cancelled,
        }
    }

    /// When to try again, where a retry helps.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::QueueFull { retry_after, .. } | Self::QueueTimeout { retry_after } => Some(*retry_after),
            Self::Overloaded
            | Self::NodesFull { .. }
            | Self::NoNodes
            | Self::Draining
            | Self::NodeLost { .. }
            | Self::NodeFailed { retryable: true, .. } => Some(limits::SHED_RETRY),
            _ => None,
        }
    }

    /// The field at fault, where there is one.
    pub fn field(&self) -> Option<Field> {
        match self {
            Self::EmptyPrompt
            | Self::InputTooLarge { .. }
            | Self::PromptTooLong { .. }
            | Self::ChatRefused(_)
            | Self::NoChatTemplate
            | Self::ChatTemplateBroken(_)
            | Self::TooLongForNode { .. }
            | Self::TooLargeForNodes { .. } => Some(Field::Input),
            Self::TokenOutOfVocabulary { field, .. } | Self::InvalidField { field, .. } => Some(*field),
            Self::UnknownModel { .. } => Some(Field::Model),
            _ => None,
        }
    }
}
