//! Limits of the router alone, each with its reason; those that others share are in [`baton_node::limits`].

use std::time::Duration;

pub(crate) use baton_node::limits::{
    CHAT_MESSAGES, IDENTIFIER_BYTES, LOAD_STALE, LOGIT_BIAS_MAX, LOGIT_BIASES, PENALTY_MAX, PROMPT_BYTES,
    REQUEST_TIMEOUT_DEFAULT, REQUEST_TIMEOUT_MAX, REQUESTS_IN_FLIGHT, SHED_RETRY, STOP_STRING_CHARS, STOP_STRINGS,
    STOP_TOKEN_IDS, TOKEN_CHANNEL, TOP_LOGPROBS,
};

/// Bytes of one HTTP body.
pub(crate) const MAX_HTTP_BODY_BYTES: usize = baton_node::limits::HTTP_BODY_BYTES;

/// One message of a client over gRPC, bytes: a prompt as text, or of as many token ids as are taken, of three bytes each, and as much again for the rest.
pub(crate) const GRPC_REQUEST_BYTES: usize = 4 << 20;

/// One report of a node, bytes: a part of a snapshot, or the KV events of a step, each of some 70 bytes.
pub(crate) const REPORT_BYTES: usize = 4 << 20;

/// Bytes of requests that are still being received, or read, over all clients, HTTP and gRPC: what comes in beyond them is shed. Most requests have a few
/// KiB and come within milliseconds. Objects made of them can take twenty times their bytes.
pub(crate) const RECEIVING_BYTES: usize = 64 << 20;

/// JSON bodies over this are parsed off the async threads: smaller ones take less time than to hand them over.
pub(crate) const PARSE_INLINE_BYTES: usize = 64 << 10;

/// Larger bodies that are parsed at a time: as with tokenising.
pub(crate) const PARSING: usize = 2;

/// gRPC connections at a time: those of clients, which open one each, and of all nodes. More are closed at once.
pub(crate) const GRPC_CONNECTIONS: usize = 4_096;

/// Streams on one gRPC connection: a client has one for each of its requests.
pub(crate) const GRPC_STREAMS: u32 = 256;

/// Window of one gRPC connection, bytes: what a client may have sent and nobody read.
pub(crate) const GRPC_CONNECTION_WINDOW_BYTES: u32 = 4 << 20;

/// A call's deadline passes here this much before its client's, so that the answer says why, and is not a bare cancellation by the connection.
pub(crate) const DEADLINE_MARGIN: Duration = Duration::from_millis(10);

/// The longest wait that a shed client is told: beyond it our estimate is worth nothing.
pub(crate) const SHED_RETRY_MAX: Duration = Duration::from_secs(60);

/// Choices of one request: each is a unit of its own in the queue and on the nodes, and whoever wants more can ask again with another seed.
pub(crate) const CHOICES: u32 = 16;

/// Ids of one prompt or Detokenize call: as many as prompt text of one byte per token can have.
pub(crate) const INPUT_TOKENS: usize = PROMPT_BYTES;

/// For a decode node to answer a reservation: it only looks into its tables, so a node that takes longer is stuck.
pub(crate) const RESERVE_MS: u64 = 5_000;

/// After the last token, for the prefill node to say how it went; and, when one leg failed, for the other to say whether it was lost.
pub(crate) const CLOSING_MS: u64 = 500;

/// After a node was lost or failed before a token had left, for another to take its place: a stream that blinked is back within it, and a client hears of it soon.
pub(crate) const REPLACE_MS: u64 = 3_000;

/// Dispatches of one request. A node that refuses had no room although it reported some, which is rare; one that fails is avoided next time.
pub(crate) const ATTEMPTS: u32 = 4;

/// Nodes that are lost with one request begun on them, until it is taken for the cause: the second may be chance.
pub(crate) const LOSSES: u32 = 2;

/// How often a node is asked whether it lives, and how long its answer may take: one that dies without a word is noticed within twice this. Shorter than between
/// other processes, since a client waits.
pub(crate) const NODE_KEEPALIVE: Duration = Duration::from_secs(2);

/// Prompts that are tokenised at a time: more would take cores from each other, and from a model that runs on the same machine.
pub(crate) const TOKENISING: usize = 2;

/// Prompts of at most so many bytes take milliseconds, and have a turn of their own.
pub(crate) const SMALL_PROMPT_BYTES: usize = 16 << 10;

/// For a Tokenize or Detokenize call, turn and work: either takes a second at most, and others may be before it.
pub(crate) const TOKENISE: Duration = Duration::from_secs(30);

/// Characters of a client's own names that an error repeats.
pub(crate) const EXCERPT_CHARS: usize = 64;

/// For a client to send its message over gRPC, or the headers of an HTTP request, and then again its body: slower ones hold a connection for nothing.
pub(crate) const RECEIVE: Duration = Duration::from_secs(30);

/// HTTP connections at a time; beyond them only probes are answered. Each costs a file descriptor and a few buffers, and many clients keep one open between requests.
pub(crate) const HTTP_CONNECTIONS: usize = 4_096;
