//! Flags that both kinds of node have.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use baton_kv::NodeId;
use baton_node::{ByteSize, ListenAddress, Tls, TlsArgs, grpc, limits, random};
use baton_proto::{PROTOCOL_MAX, PROTOCOL_MIN};
use baton_scheduler::SchedulerConfig;

use crate::limits::LEASE_MIN_MS;

/// Flags of a node. The model's path is the command's own flag.
#[derive(Clone, Debug, clap::Args)]
pub struct NodeArgs {
    /// Where to serve gRPC to routers and peers: IP:PORT, port 0 takes a free one
    #[arg(long, env = "BATON_GRPC", value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    pub grpc: ListenAddress,
    /// Where to serve /health, /ready and /metrics: IP:PORT, port 0 takes a free one
    #[arg(long, env = "BATON_OPS", value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    pub ops: ListenAddress,
    /// A router's gRPC address to join, as in http://127.0.0.1:7070 (https:// where it serves TLS); give it once per router
    #[arg(
        long = "router",
        env = "BATON_ROUTERS",
        value_name = "URL",
        value_delimiter = ',',
        default_value = "http://127.0.0.1:7070"
    )]
    pub routers: Vec<String>,
    /// This node's name, unique in the cluster [default: the role and four random digits]
    #[arg(long, env = "BATON_NODE_ID", value_name = "NAME")]
    pub node_id: Option<String>,
    /// host:port at which routers and peers reach this node; needed where it listens on all addresses [default: where it listens]
    #[arg(long, env = "BATON_ADVERTISE", value_name = "HOST:PORT")]
    pub advertise: Option<String>,
    /// Threads that compute: one per physical core that this node may use [default: all that the system offers]
    #[arg(long, env = "BATON_THREADS", value_name = "N")]
    pub threads: Option<usize>,
    /// Memory for the KV pool: what the machine can spare beside the weights
    #[arg(long, env = "BATON_KV_BYTES", value_name = "BYTES", default_value = "1GiB")]
    pub kv_bytes: ByteSize,
    /// Rows of one step at most: more is faster prefill, and slower steps for those who decode
    #[arg(long, env = "BATON_TOKEN_BUDGET", value_name = "TOKENS", default_value_t = 512)]
    pub token_budget: usize,
    /// Prompt tokens of one sequence in one step at most
    #[arg(long, env = "BATON_CHUNK_TOKENS", value_name = "TOKENS", default_value_t = 256)]
    pub chunk_tokens: usize,
    /// Sequences in one step at most
    #[arg(long, env = "BATON_MAX_RUNNING", value_name = "N", default_value_t = limits::NODE_RUNNING)]
    pub max_running: usize,
    /// Requests that wait at most; one more is refused
    #[arg(long, env = "BATON_MAX_WAITING", value_name = "N", default_value_t = limits::NODE_WAITING)]
    pub max_waiting: usize,
    /// Prompt and answer of one request at most, tokens [default: the model's context]
    #[arg(long, env = "BATON_MAX_CONTEXT", value_name = "TOKENS")]
    pub max_context: Option<usize>,
    /// How long granted blocks wait for a sign of life before they are taken back, milliseconds
    #[arg(long, env = "BATON_LEASE_MS", value_name = "MS", default_value_t = baton_transfer::limits::LEASE_MS)]
    pub lease_ms: u64,
    /// Newest version of the handoff to speak: lower it until every node of a rolling upgrade has been replaced
    #[arg(long, env = "BATON_PROTOCOL_MAX", value_name = "N", default_value_t = PROTOCOL_MAX, hide_short_help = true)]
    pub protocol_max: u32,
    /// How long a drain waits for requests that run, seconds
    #[arg(long, env = "BATON_DRAIN_S", value_name = "SECONDS", default_value_t = limits::DRAIN_TIMEOUT.as_secs())]
    pub drain_s: u64,
    /// Where prefill and decode nodes of one host meet to share memory: a directory baton-UID is made in it; every node of the host needs the same one [default: $XDG_RUNTIME_DIR, or else /tmp]
    #[arg(long, env = "BATON_SHM_DIR", value_name = "DIR")]
    pub shm_dir: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub tls: TlsArgs,
}

/// A flag that cannot be served.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ArgsError {
    /// Zero where at least one is needed.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
    /// More rows per sequence than per step.
    #[error("--chunk-tokens {chunk} must not exceed --token-budget {budget}")]
    Chunk {
        /// As given.
        chunk: usize,
        /// As given.
        budget: usize,
    },
    /// More decoding sequences than rows.
    #[error("--max-running {running} must not exceed --token-budget {budget}: each sequence needs a row")]
    Running {
        /// As given.
        running: usize,
        /// As given.
        budget: usize,
    },
    /// Not a name.
    #[error("--node-id {0:?}: use 1 to {max} of a-z, A-Z, 0-9, '-', '_' and '.'", max = NodeId::MAX_BYTES)]
    NodeId(String),
    /// Not a router's address.
    #[error("--router {0}")]
    Router(#[from] grpc::AddressError),
    /// A version that this build does not speak.
    #[error("--protocol-max {0}: this build speaks {PROTOCOL_MIN} to {PROTOCOL_MAX}")]
    Protocol(u32),
    /// Files that cannot be used.
    #[error("{0}")]
    Tls(String),
    /// Not an address.
    #[error("--advertise {0:?} is not an address: write HOST:PORT")]
    Advertise(String),
    /// Nobody else could tell where this node is.
    #[error("--grpc {0} listens on all addresses: pass --advertise HOST:PORT, at which others reach this node")]
    AdvertiseMissing(SocketAddr),
    /// A lease that no heartbeat can keep.
    #[error("--lease-ms {0} is too short: at least {LEASE_MIN_MS}")]
    Lease(u64),
}

/// Flags, checked.
#[derive(Clone, PartialEq, Debug)]
pub struct NodeConfig {
    /// Where to serve gRPC.
    pub grpc: SocketAddr,
    /// Where to serve the ops endpoints.
    pub ops: SocketAddr,
    /// Routers to join.
    pub routers: Vec<String>,
    /// The node's name.
    pub node: NodeId,
    /// Where others reach it; `None`: where it listens.
    pub advertise: Option<String>,
    /// For the engine: threads that compute.
    pub threads: usize,
    /// For the engine: memory of the pool.
    pub kv_bytes: u64,
    /// Bounds of the scheduler; `block_tokens` is set by the engine's layout.
    pub scheduler: SchedulerConfig,
    /// A lease's length.
    pub lease_ms: u64,
    /// How long an aborted handoff waits for its stream to close.
    pub handoff_drain_ms: u64,
    /// Updates of one answer that wait for a slow reader.
    pub max_updates: usize,
    /// Newest version of the handoff to speak.
    pub protocol_max: u32,
    /// How long a drain waits for requests.
    pub drain: Duration,
    /// Where nodes of one host meet to share memory; `None`: the system's own place.
    pub shm_dir: Option<PathBuf>,
    /// What it shows, and whom it believes; `None`: no TLS.
    pub tls: Option<Tls>,
}

impl NodeArgs {
    /// Checks the flags; `role` names a node that was given no name.
    pub fn validate(self, role: &str) -> Result<NodeConfig, ArgsError> {
        let threads = self
            .threads
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |threads| threads.get()));
        for (flag, value) in [
            ("--threads", threads as u64),
            ("--kv-bytes", self.kv_bytes.0),
            ("--token-budget", self.token_budget as u64),
            ("--chunk-tokens", self.chunk_tokens as u64),
            ("--max-running", self.max_running as u64),
            ("--max-waiting", self.max_waiting as u64),
            ("--max-context", self.max_context.unwrap_or(usize::MAX) as u64),
        ] {
            if value == 0 {
                return Err(ArgsError::Zero(flag));
            }
        }
        let (budget, chunk, running) = (self.token_budget, self.chunk_tokens, self.max_running);
        if chunk > budget {
            return Err(ArgsError::Chunk { chunk, budget });
        }
        if running > budget {
            return Err(ArgsError::Running { running, budget });
        }
        if self.lease_ms < LEASE_MIN_MS {
            return Err(ArgsError::Lease(self.lease_ms));
        }
        if !(PROTOCOL_MIN..=PROTOCOL_MAX).contains(&self.protocol_max) {
            return Err(ArgsError::Protocol(self.protocol_max));
        }
        let node = NodeId(self.node_id.unwrap_or_else(|| format!("{role}-{}", random::suffix())));
        if !node.is_valid() {
            return Err(ArgsError::NodeId(node.0));
        }
        let tls = self.tls.load().map_err(|error| ArgsError::Tls(error.to_string()))?;
        let client = tls.as_ref().map(Tls::client);
        for router in &self.routers {
            grpc::endpoint(router, client.as_ref())?;
        }
        match &self.advertise {
            Some(advertise) if advertise.contains("://") || grpc::endpoint(advertise, None).is_err() => {
                return Err(ArgsError::Advertise(advertise.clone()));
            }
            None if self.grpc.0.ip().is_unspecified() => return Err(ArgsError::AdvertiseMissing(self.grpc.0)),
            _ => {}
        }
        Ok(NodeConfig {
            grpc: self.grpc.0,
            ops: self.ops.0,
            routers: self.routers,
            node,
            advertise: self.advertise,
            threads,
            kv_bytes: self.kv_bytes.0,
            scheduler: SchedulerConfig {
                token_budget: budget,
                chunk_tokens: chunk,
                max_running: running,
                max_waiting: self.max_waiting,
                max_context: self.max_context.unwrap_or(usize::MAX),
                block_tokens: 0,
            },
            lease_ms: self.lease_ms,
            handoff_drain_ms: baton_transfer::limits::DRAIN_MS,
            max_updates: limits::SEQUENCE_EVENTS,
            protocol_max: self.protocol_max,
            drain: Duration::from_secs(self.drain_s),
            shm_dir: self.shm_dir,
            tls,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        node: NodeArgs,
    }

    fn validate(flags: &[&str]) -> Result<NodeConfig, ArgsError> {
        let flags = std::iter::once(&"baton").chain(flags);
        Command::try_parse_from(flags)
            .expect("flags parse")
            .node
            .validate("decode")
    }

    #[test]
    fn defaults_are_a_loopback_node() {
        let config = validate(&[]).expect("defaults are valid");
        assert!(config.grpc.ip().is_loopback() && config.ops.ip().is_loopback());
        assert!(config.node.0.starts_with("decode-"), "{}", config.node);
        assert_eq!(config.kv_bytes, 1 << 30);
        assert!(config.threads >= 1);
    }

    #[test]
    fn routers_may_repeat() {
        let config = validate(&["--router", "http://a:1", "--router", "http://b:2"]).expect("valid");
        assert_eq!(config.routers, ["http://a:1", "http://b:2"]);
    }

    #[test]
    fn bad_flags_are_named() {
        let check = |flags: &[&str], expected: ArgsError| {
            assert_eq!(validate(flags).expect_err("refused"), expected, "{flags:?}");
        };
        check(&["--threads", "0"], ArgsError::Zero("--threads"));
        check(&["--kv-bytes", "0"], ArgsError::Zero("--kv-bytes"));
        check(&["--max-context", "0"], ArgsError::Zero("--max-context"));
        check(
            &["--chunk-tokens", "600"],
            ArgsError::Chunk {
                chunk: 600,
                budget: 512,
            },
        );
        check(
            &["--max-running", "600"],
            ArgsError::Running {
                running: 600,
                budget: 512,
            },
        );
        check(&["--lease-ms", "149"], ArgsError::Lease(149));
        check(&["--protocol-max", "0"], ArgsError::Protocol(0));
        check(&["--node-id", "a b"], ArgsError::NodeId("a b".into()));
        let long = "n".repeat(NodeId::MAX_BYTES + 1);
        check(&["--node-id", &long], ArgsError::NodeId(long.clone()));
        let malformed = grpc::AddressError::Malformed {
            address: "nowhere".into(),
            scheme: "http",
        };
        check(&["--router", "nowhere"], ArgsError::Router(malformed));
        let address = "https://a:1".to_owned();
        check(
            &["--router", &address],
            ArgsError::Router(grpc::AddressError::TlsMissing {
                address: address.clone(),
            }),
        );
        check(
            &["--tls-cert", "a.pem"],
            ArgsError::Tls("--tls-cert, --tls-key and --tls-ca belong together: --tls-key is missing".into()),
        );
        check(&["--advertise", "nowhere"], ArgsError::Advertise("nowhere".into()));
        check(
            &["--grpc", "0.0.0.0:7000"],
            ArgsError::AdvertiseMissing(SocketAddr::from(([0, 0, 0, 0], 7000))),
        );
    }
}
