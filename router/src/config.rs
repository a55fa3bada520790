//! The router's flags.

use std::{net::SocketAddr, time::Duration};

use baton_kv::NodeId;
use baton_node::{ByteSize, ListenAddress, Tls, TlsArgs, limits, random};

use crate::core::{admission::AdmissionConfig, placement::PlacementConfig, prefix_index::ENTRY_BYTES};

/// Bytes of the prefix index, unless told otherwise.
const PREFIX_INDEX_BYTES: ByteSize = ByteSize((limits::PREFIX_INDEX_NAMES * ENTRY_BYTES) as u64);

/// Flags of a router. The model's path is the command's own flag.
#[derive(Clone, Debug, clap::Args)]
pub struct RouterArgs {
    /// Where to serve gRPC, to clients and to nodes: IP:PORT, port 0 takes a free one
    #[arg(long, env = "BATON_GRPC", value_name = "ADDRESS", default_value = "127.0.0.1:7070")]
    pub grpc: ListenAddress,
    /// Where to serve the OpenAI API, /health, /ready and /metrics: IP:PORT, port 0 takes a free one
    #[arg(long, env = "BATON_HTTP", value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    pub http: ListenAddress,
    /// This router's name, unique in the cluster [default: router and four random digits]
    #[arg(long, env = "BATON_NODE_ID", value_name = "NAME")]
    pub node_id: Option<String>,
    /// Requests that wait for a node at most; one more is shed. As many as clients would rather wait for than be told to come back
    #[arg(long, env = "BATON_MAX_QUEUE", value_name = "N", default_value_t = limits::REQUESTS_WAITING)]
    pub max_queue: usize,
    /// How long a request waits for a node at most, seconds
    #[arg(long, env = "BATON_QUEUE_TIMEOUT_S", value_name = "SECONDS", default_value_t = 30)]
    pub queue_timeout_s: u64,
    /// Prompts of which at most this many tokens must be computed run on the decode node itself; 0 hands over whenever there is a prefill node
    #[arg(long, env = "BATON_LOCAL_PREFILL_TOKENS", value_name = "TOKENS", default_value_t = 0)]
    pub local_prefill_tokens: usize,
    /// Memory for the index of which node holds which blocks
    #[arg(long, env = "BATON_PREFIX_INDEX_BYTES", value_name = "BYTES", default_value_t = PREFIX_INDEX_BYTES)]
    pub prefix_index_bytes: ByteSize,
    /// What keeps tenants' prefixes apart: 64 hex digits, the same on every router so that they share prefixes [default: random]
    #[arg(long, env = "BATON_CLUSTER_SECRET", value_name = "HEX", hide_env_values = true)]
    pub cluster_secret: Option<String>,
    /// How long a drain waits for requests that run, seconds
    #[arg(long, env = "BATON_DRAIN_S", value_name = "SECONDS", default_value_t = limits::DRAIN_TIMEOUT.as_secs())]
    pub drain_s: u64,
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
    /// Not a name.
    #[error("--node-id {0:?}: use 1 to {max} of a-z, A-Z, 0-9, '-', '_' and '.'", max = NodeId::MAX_BYTES)]
    NodeId(String),
    /// Not a secret. (The message does not repeat it.)
    #[error("--cluster-secret must be 64 hex digits")]
    Secret,
    /// Files that cannot be used.
    #[error("{0}")]
    Tls(String),
}

/// Flags, checked.
#[derive(Clone)]
pub struct RouterConfig {
    /// Where to serve gRPC.
    pub grpc: SocketAddr,
    /// Where to serve HTTP.
    pub http: SocketAddr,
    /// The router's name.
    pub router_id: String,
    /// Bounds of the queue, and how requests are placed.
    pub admission: AdmissionConfig,
    /// How long a request waits for a node.
    pub queue_timeout: Duration,
    /// Key of the tenants' salts.
    pub secret: [u8; 32],
    /// How long a drain waits for requests.
    pub drain: Duration,
    /// What it shows, and whom it believes; `None`: no TLS.
    pub tls: Option<Tls>,
}

impl RouterArgs {
    /// Checks the flags, and draws what is absent.
    pub fn config(&self) -> Result<RouterConfig, ArgsError> {
        for (flag, value) in [
            ("--max-queue", self.max_queue as u64),
            ("--queue-timeout-s", self.queue_timeout_s),
        ] {
            if value == 0 {
                return Err(ArgsError::Zero(flag));
            }
        }
        let router_id = match &self.node_id {
            Some(name) if NodeId(name.clone()).is_valid() => name.clone(),
            Some(name) => return Err(ArgsError::NodeId(name.clone())),
            None => format!("router-{}", random::suffix()),
        };
        let secret = match &self.cluster_secret {
            Some(hex) => secret(hex).ok_or(ArgsError::Secret)?,
            None => random::secret(),
        };
        Ok(RouterConfig {
            grpc: self.grpc.into(),
            http: self.http.into(),
            router_id,
            admission: AdmissionConfig {
                max_queue: self.max_queue,
                prefix_index_bytes: usize::try_from(self.prefix_index_bytes.0).unwrap_or(usize::MAX),
                placement: PlacementConfig {
                    local_prefill_tokens: self.local_prefill_tokens,
                },
            },
            queue_timeout: Duration::from_secs(self.queue_timeout_s),
            secret,
            drain: Duration::from_secs(self.drain_s),
            tls: self.tls.load().map_err(|error| ArgsError::Tls(error.to_string()))?,
        })
    }
}

fn secret(hex: &str) -> Option<[u8; 32]> {
    if hex.len() != 64 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut secret = [0; 32];
    for (i, byte) in secret.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(secret)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: RouterArgs,
    }

    fn config(flags: &[&str]) -> Result<RouterConfig, ArgsError> {
        let command = Command::try_parse_from([&["router"], flags].concat()).expect("parses");
        command.args.config()
    }

    #[test]
    fn flags_are_checked() {
        let defaults = config(&[]).expect("valid");
        assert_eq!((defaults.grpc.port(), defaults.http.port()), (7070, 8080));
        assert_eq!(defaults.admission.placement.local_prefill_tokens, 0);
        assert_ne!(defaults.secret, config(&[]).expect("valid").secret);

        let secret = "0f".repeat(32);
        let set = config(&["--cluster-secret", &secret, "--node-id", "r-1"]).expect("valid");
        assert_eq!((set.secret, set.router_id.as_str()), ([0x0f; 32], "r-1"));

        for (flags, error) in [
            (["--max-queue", "0"], ArgsError::Zero("--max-queue")),
            (["--queue-timeout-s", "0"], ArgsError::Zero("--queue-timeout-s")),
            (["--node-id", "a b"], ArgsError::NodeId("a b".to_owned())),
            (["--cluster-secret", "zz"], ArgsError::Secret),
            (
                ["--tls-ca", "ca.pem"],
                ArgsError::Tls("--tls-cert, --tls-key and --tls-ca belong together: --tls-cert is missing".to_owned()),
            ),
        ] {
            assert_eq!(config(&flags).map(|_| ()), Err(error));
        }
    }
}
