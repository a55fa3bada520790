//! Limits of the worker's own, each with its reason.

use std::time::Duration;

/// Stop ids of one request: the client's own, and the model's, which the router adds.
pub(crate) const STOP_IDS: usize = 4 * baton_node::limits::STOP_TOKEN_IDS;

/// Updates of a prefill beside those about blocks: started, one token, finished.
pub(crate) const PREFILL_UPDATES: usize = 3;

/// Batches of KV events that wait for one router's stream; a stream that falls further behind gets a snapshot.
pub(crate) const KV_EVENT_BATCHES: usize = baton_node::limits::REGISTRY_EVENTS;

/// Between two looks at passed deadlines, whatever the receiver says of the next one.
pub(crate) const TICK_MIN: Duration = Duration::from_millis(1);

/// Bytes of KV, over layers of a prompt's last chunk, that are worth a frame of their own while the step goes on; less than that leaves at its end. Measured over
/// gRPC, from the first token to the verdict, with and without: 0.6 against 3.2 ms for a prompt of 64 tokens (1.5 MB), 2 against 6 for 128, 2 against 11 for 512.
/// Four times as much gives some of that back, a quarter is no better.
pub(crate) const LAYERS_BYTES: usize = 1 << 20;

/// Changes of load are told to a router at most this often: often enough to place by, and no more than 20 messages a second.
pub(crate) const LOAD_COALESCE: Duration = Duration::from_millis(50);

/// Reports that wait for a slow router; behind them load is coalesced, and KV events give way to a snapshot.
pub(crate) const REPORTS: usize = 8;

/// The shortest lease: one that heartbeats can keep, which are never closer than their least distance.
pub(crate) const LEASE_MIN_MS: u64 =
    baton_transfer::limits::HEARTBEATS_PER_LEASE * baton_transfer::limits::HEARTBEAT_MS_MIN;
