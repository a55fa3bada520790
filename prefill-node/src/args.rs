//! The prefill node's flags.

use baton_transfer::{
    Transport,
    limits::SLOW_RATIO,
    path::{Preference, SlowPath},
};
use baton_worker::{ArgsError, NodeArgs, NodeConfig};
use clap::ValueEnum;

/// Flags of `baton prefill`.
#[derive(Clone, Debug, clap::Args)]
pub struct PrefillArgs {
    /// Those that both kinds of node have.
    #[command(flatten)]
    pub node: NodeArgs,
    /// How KV travels to decode nodes: auto takes what was fastest when the two first met; grpc or shm takes that one, or refuses
    #[arg(long, env = "BATON_TRANSPORT", value_name = "TRANSPORT", default_value_t = Preference::Auto)]
    pub transport: Preference,
    /// What follows when a path is far slower than it was, and a new probe says so too: only warn, or refuse to push over it until it has recovered
    #[arg(long, env = "BATON_SLOW_PATH", value_name = "WHAT", value_enum, default_value_t = SlowPathAction::Warn)]
    pub slow_path: SlowPathAction,
    /// A transfer is slow below this share of what its path gave when it was probed
    #[arg(long, env = "BATON_SLOW_PATH_RATIO", value_name = "SHARE", default_value_t = SLOW_RATIO)]
    pub slow_path_ratio: f64,
}

/// What follows on a slow path.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum SlowPathAction {
    /// A line in the log, and the metrics.
    Warn,
    /// Pushes over it fail as well, with a code of their own.
    Refuse,
}

/// Flags, checked.
#[derive(Clone, PartialEq, Debug)]
pub struct PrefillConfig {
    /// What both kinds of node have.
    pub node: NodeConfig,
    /// Which transport pushes take.
    pub preference: Preference,
    /// When a path is slow, and what follows.
    pub slow: SlowPath,
}

impl PrefillConfig {
    /// Whether the pool is to lie in memory that decode nodes of this host can map.
    pub fn shares_pool(&self) -> bool {
        self.preference != Preference::Only(Transport::Grpc)
    }
}

/// A flag that cannot be served.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
pub enum PrefillArgsError {
    /// One that both kinds of node have.
    #[error(transparent)]
    Node(#[from] ArgsError),
    /// Not a share.
    #[error("--slow-path-ratio {0} must lie between 0 and 1")]
    Ratio(f64),
}

impl PrefillArgs {
    /// Checks the flags.
    pub fn validate(self) -> Result<PrefillConfig, PrefillArgsError> {
        if !(0.0..=1.0).contains(&self.slow_path_ratio) {
            return Err(PrefillArgsError::Ratio(self.slow_path_ratio));
        }
        Ok(PrefillConfig {
            node: self.node.validate("prefill")?,
            preference: self.transport,
            slow: SlowPath {
                ratio: self.slow_path_ratio,
                refuse: self.slow_path == SlowPathAction::Refuse,
            },
        })
    }
}
