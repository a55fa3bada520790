//! Limits that more than one crate needs, each with its reason. Those of one crate alone are in its own `limits.rs`: the handoff's in `baton-transfer`, the router's in
//! `baton-router`. A queue, wait or buffer without a limit is a defect.

use std::time::Duration;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

// ---- What a client may send ----

/// Body of one HTTP request, bytes. Holds a prompt of [`PROMPT_BYTES`] with its JSON escapes (at worst six bytes for one, but text is mostly plain).
pub const HTTP_BODY_BYTES: usize = 8 * MIB;

/// Text of one prompt (all messages together), bytes. 128Ki tokens of four bytes, and as much again; tokenising it stays well under a second.
pub const PROMPT_BYTES: usize = MIB;

/// Messages of one chat. A template runs over each, so that their number is bounded apart from their bytes.
pub const CHAT_MESSAGES: usize = 1_024;

/// Stop strings of one request: each is matched against every delta.
pub const STOP_STRINGS: usize = 16;

/// Characters of one stop string: as much text may be held back from the client.
pub const STOP_STRING_CHARS: usize = 256;

/// Stop token ids of one request: compared with every drawn token.
pub const STOP_TOKEN_IDS: usize = 64;

/// Logit biases of one request: each is applied before every token. OpenAI's own bound.
pub const LOGIT_BIASES: usize = 1_024;

/// One bias lies between minus this and this: more than any two logits differ by.
pub const LOGIT_BIAS_MAX: f32 = 100.0;

/// Presence and frequency penalties lie between minus this and this, as with OpenAI.
pub const PENALTY_MAX: f32 = 2.0;

/// Alternatives of each token that a client may ask for, as with OpenAI: each is ranked, sent and written out.
pub const TOP_LOGPROBS: u32 = 20;

/// Bytes of a client's name for a model and other identifiers of its that end up in logs. (Those of nodes: [`baton_kv::NodeId::MAX_BYTES`].)
pub const IDENTIFIER_BYTES: usize = 256;

/// A request's deadline when its client sets none. Long answers on a laptop take minutes; nothing is meant to take longer.
pub const REQUEST_TIMEOUT_DEFAULT: Duration = Duration::from_secs(600);

/// The longest deadline that a client may set: what a request holds is held no longer than this.
pub const REQUEST_TIMEOUT_MAX: Duration = Duration::from_secs(3_600);

// ---- What the router holds ----

/// Requests that one router holds, waiting and running. Each costs a few tasks and its prompt: at [`PROMPT_BYTES`] each, 1 GiB.
pub const REQUESTS_IN_FLIGHT: usize = 1_024;

/// Requests that wait at one router for a node; one more is shed. At more than this the wait passes any client's patience.
pub const REQUESTS_WAITING: usize = 256;

/// What a shed client is told to wait before it tries again, when the router has no better estimate.
pub const SHED_RETRY: Duration = Duration::from_secs(1);

/// Block names in a router's prefix index, over all nodes: up to 196 bytes each, so 400 MB at worst.
pub const PREFIX_INDEX_NAMES: usize = 2_000_000;

/// Deltas between the node's stream and the client's. A client that reads slower than this holds its own request back, and nobody else's.
pub const TOKEN_CHANNEL: usize = 64;

// ---- What a node holds ----

/// Requests waiting at one node; one more is refused. The real queue stands at the router; this absorbs several routers at once.
pub const NODE_WAITING: usize = 128;

/// Sequences in one step.
pub const NODE_RUNNING: usize = 64;

/// Events from the engine thread to one request's stream. A full one belongs to a reader that has stopped: its request is cancelled.
pub const SEQUENCE_EVENTS: usize = 1_024;

/// Load and KV events that wait for one router's stream. When it overflows, events are dropped and a snapshot follows.
pub const REGISTRY_EVENTS: usize = 1_024;

/// Block names in one message of a KV snapshot: with parent names about 70 bytes each, far below [`GRPC_MESSAGE_BYTES`].
pub const SNAPSHOT_PART_BLOCKS: usize = 4_096;

// ---- Connections ----

/// One gRPC message, bytes. Room for a prompt as text or as token ids; pieces have their own server and bound (`baton_transfer::limits`).
pub const GRPC_MESSAGE_BYTES: usize = 16 * MIB;

/// Streams on one gRPC connection. A router has one connection to each node, with a stream for each leg of a request.
pub const GRPC_STREAMS: u32 = 2_048;

/// Window of one gRPC stream, bytes: room for a large prompt or KV snapshot part without a round trip in the middle.
pub const GRPC_STREAM_WINDOW_BYTES: u32 = 2 * MIB as u32;

/// Window of one gRPC connection, bytes: what all of its streams may have sent and nobody read.
pub const GRPC_CONNECTION_WINDOW_BYTES: u32 = 16 * MIB as u32;

/// Headers of one gRPC request, bytes.
pub const GRPC_HEADER_BYTES: u32 = 16 * KIB as u32;

/// Connecting to a node or router. On one network a SYN is answered in milliseconds or not at all.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// How often an idle peer is asked whether it lives.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);

/// How long its answer may take, before its streams break: with the interval, a silent death is noticed within a lease.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// A unary call between processes.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// First pause before a broken connection is tried again; it doubles up to [`RECONNECT_MAX`].
pub const RECONNECT_MIN: Duration = Duration::from_millis(50);

/// Longest pause before a broken connection is tried again: a restarted router has its nodes back within about this.
pub const RECONNECT_MAX: Duration = Duration::from_secs(2);

/// How often a node reports its load, at the least.
pub const LOAD_INTERVAL: Duration = Duration::from_secs(1);

/// A node that has reported nothing for this long is not given new requests, even if its stream still stands.
pub const LOAD_STALE: Duration = Duration::from_secs(5);

/// HTTP connections of an ops port at a time: a scraper and a prober or two each keep one.
pub const OPS_CONNECTIONS: usize = 32;

/// For the headers of a request to an ops port: they are a few hundred bytes.
pub const OPS_HEADERS: Duration = Duration::from_secs(10);

/// HTTP connections beyond a listener's bound at a time: for probes, so that a busy process is not taken for a dead one.
pub const HTTP_PROBES: usize = 64;

/// For one of those, from its first byte to its last.
pub const HTTP_PROBE: Duration = Duration::from_secs(5);

/// Once the process stops, for HTTP answers to say how they ended.
pub const HTTP_LAST_WORD: Duration = Duration::from_millis(200);

// ---- Stopping ----

/// How long a drain waits for the requests that run. Below Kubernetes' default grace period of 30 s, so that a drain ends before SIGKILL.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(20);

/// After the drain, how long tasks may take to end once they are told to.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(3);

/// How long a process that ends waits for its last spans and logs to leave.
pub const TELEMETRY_FLUSH: Duration = Duration::from_secs(2);

/// How long `baton up` waits for its processes to become ready: a cold model file on a slow disk.
pub const UP_READY_TIMEOUT: Duration = Duration::from_secs(180);

/// How long `baton up` waits for its processes to drain before it kills them.
pub const UP_STOP_TIMEOUT: Duration = Duration::from_secs(DRAIN_TIMEOUT.as_secs() + STOP_TIMEOUT.as_secs() + 2);

/// Processes that one `baton up` starts of each role: it is for one machine.
pub const UP_NODES: u32 = 16;
