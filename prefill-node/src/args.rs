//! The prefill node's flags.

use baton_worker::{ArgsError, NodeArgs, NodeConfig};

/// Flags of `baton prefill`.
#[derive(Clone, Debug, clap::Args)]
pub struct PrefillArgs {
    /// Those that both kinds of node have.
    #[command(flatten)]
    pub node: NodeArgs,
}

/// Flags, checked.
#[derive(Clone, PartialEq, Debug)]
pub struct PrefillConfig {
    /// What both kinds of node have.
    pub node: NodeConfig,
}

impl PrefillArgs {
    /// Checks the flags.
    pub fn validate(self) -> Result<PrefillConfig, ArgsError> {
        Ok(PrefillConfig {
            node: self.node.validate("prefill")?,
        })
    }
}
