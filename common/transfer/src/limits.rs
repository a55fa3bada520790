//! Every limit of the handoff, each with its reason.

/// How long a grant lasts without being renewed. Long enough for a stalled peer on a busy machine, short enough that a dead one's
/// blocks come back while a client still waits.
pub const LEASE_MS: u64 = 10_000;

/// Heartbeats per lease: two may be lost or late before the lease ends.
pub const HEARTBEATS_PER_LEASE: u64 = 3;

/// Heartbeats are never closer than this, however little of the lease (that is: of the request's deadline) remains.
pub const HEARTBEAT_MS_MIN: u64 = 50;

/// After an abort, how long the receiver waits for its own edge to close the stream before it takes it for closed.
pub const DRAIN_MS: u64 = 2_000;

/// Live handoffs on one decode node. Each holds a prompt's tokens and slots; beyond it a reservation is refused.
pub const MAX_HANDOFFS: usize = 1_024;

/// Push streams on one decode node that may be open at once, unauthenticated ones included.
pub const MAX_STREAMS: usize = 2_048;

/// Alternatives beside a first token: no request may ask for more.
pub const ALTERNATIVES: usize = 20;

/// Payload of one frame at most (one layer of a block travels whole, whatever its size): in version 1, where a frame is layers of one block.
pub const PIECE_BYTES: usize = 4 << 20;

/// Payload of one frame where more waits: enough that what a frame costs does not count, and small enough that the receiver works on one while the next
/// is under way.
pub const FRAME_BYTES: usize = 1 << 20;

/// More than [`FRAME_BYTES`] that a frame may hold if nothing waits behind it: no frame is smaller than this just because of how others were cut.
pub const FRAME_SLACK_BYTES: usize = 256 << 10;

/// Runs in one frame: 4 KiB blocks fill one.
pub const FRAME_RUNS: usize = 1 << 10;

/// A gRPC message at most: the payload and room for its header (below 48 bytes per run), or a manifest (below 64 bytes per block).
pub const MESSAGE_BYTES: usize = PIECE_BYTES + (64 << 10);

/// A push's first message at most, before anybody has shown a capability; and a reply: slots to be sent again, 5 bytes each.
pub const OPEN_BYTES: usize = 256 << 10;

/// HTTP/2 flow-control window of one stream: a few frames in flight, so that the sender does not wait for the receiver's copy, and no more, so that a
/// heartbeat does not wait long behind them on a slow link.
pub const STREAM_WINDOW_BYTES: u32 = 4 << 20;

/// HTTP/2 flow-control window of one connection, over all its streams.
pub const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;

/// HTTP/2 frame size: the largest that keeps other streams of the connection responsive.
pub const HTTP_FRAME_BYTES: u32 = 1 << 20;

/// Frames that wait between the push and its stream: one is sent while the next is ready.
pub const FRAMES_AHEAD: usize = 2;

/// Bytes that all pushes of a node may have read and not sent, so that many pushes to slow peers do not take the node's memory. A block that is
/// larger takes it all.
pub const READ_AHEAD_BYTES: usize = 256 << 20;

/// Answers to pieces per heartbeat's time: a sender whose heartbeats wait behind its own pieces must hear that the lease goes on.
pub const ANSWERS_PER_HEARTBEAT: u64 = 3;

/// Connections that one prefill node keeps to decode nodes; the least recently used goes first.
pub const MAX_PEERS: usize = 256;

/// A transfer of fewer bytes does not tell how fast a path is: it is mostly waiting.
pub const TELLING_BYTES: u64 = 8 << 20;

/// A transfer is slow below this share of what its path gave when it was probed: well below what a busy machine takes from it.
pub const SLOW_RATIO: f64 = 0.25;

/// Bytes of a probe's first part, and of one frame: a path of 2 MB/s takes an eighth of a second for them.
pub const PROBE_FRAME_BYTES: usize = 256 << 10;

/// Each further part of a probe is so many times larger, as long as the last one took less than [`PROBE_TELLING_S`].
pub const PROBE_GROWTH: usize = 8;

/// A part of a probe that took so long tells how fast the path is: scheduling and latency count for little by then.
pub const PROBE_TELLING_S: f64 = 0.02;

/// The largest part of a probe: it tells even at 10 GB/s, and a peer takes no more.
pub const PROBE_BYTES: usize = 16 << 20;

/// For a peer to answer an introduction or a probe: the first push to it waits for both, and pushes go on without a probe that takes longer.
pub const MEET_MS: u64 = 2_000;

/// A bad path is probed again at most this often, and only when something is to be pushed over it.
pub const REPROBE_MS: u64 = 1_000;

/// A doubtful path is probed beside other pushes only after this long: they make it slow.
pub const REPROBE_BUSY_MS: u64 = 10_000;

/// A pool that a peer could not map is offered to it again at most this often, and only when something is to be pushed to it.
pub const REOFFER_MS: u64 = 10_000;

/// To open a connection to a peer.
pub const CONNECT_MS: u64 = 3_000;

/// From a stream's opening to its first frame, and from the open frame to its answer.
pub const OPEN_MS: u64 = 5_000;

/// Between HTTP/2 pings on a connection with open pushes, and for each answer: a connection that lost its peer without a word is closed, so that
/// the next push opens another.
pub const KEEPALIVE_MS: u64 = 5_000;

/// To hand a reply to a sender that does not read.
pub const REPLY_MS: u64 = 5_000;

/// Replies that wait for a slow sender.
pub const REPLIES_AHEAD: usize = 8;

/// Over the socket at which a pool is offered: for the token to come, and for the file. With [`SHM_PROBE_MS`] it is less than [`MEET_MS`]: a peer whose pool
/// cannot be mapped in time is told so, and pushes over gRPC.
pub const SHM_FETCH_MS: u64 = 600;

/// For the probe of a pool that was mapped, and the wait for its turn.
pub const SHM_PROBE_MS: u64 = 1_200;

/// After a connection could not be taken (no descriptors are left, say), before the next try.
pub const SHM_ACCEPT_PAUSE_MS: u64 = 100;

/// Pools of other processes of the host that one decode node maps at once. Maps cost addresses, not memory.
pub const MAX_MAPPINGS: usize = 64;

/// What a probe of shared memory copies: more than a core's own caches hold, and little enough that taking its pages from the system, which may cost
/// milliseconds per MiB, does not hold the first push up for long.
pub const SHM_PROBE_BYTES: usize = 8 << 20;

/// Passes of a probe of shared memory, after one that takes the pages: on a busy machine one or the other waits for the processor.
pub const SHM_PROBE_PASSES: usize = 3;

/// Frames over shared memory that one decode node copies at once, of all pushes, each on a thread: two take what the memory gives, and leave the rest of the
/// processor to the engine.
pub const SHM_COPIES: usize = 2;
