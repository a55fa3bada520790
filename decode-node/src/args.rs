//! The decode node's flags.

use baton_worker::{ArgsError, NodeArgs, NodeConfig};

/// Flags of `baton decode`.
#[derive(Clone, Debug, clap::Args)]
pub struct DecodeArgs {
    /// Those that both kinds of node have.
    #[command(flatten)]
    pub node: NodeArgs,
}

/// Flags, checked.
#[derive(Clone, PartialEq, Debug)]
pub struct DecodeConfig {
    /// What both kinds of node have.
    pub node: NodeConfig,
}

impl DecodeArgs {
    /// Checks the flags.
    pub fn validate(self) -> Result<DecodeConfig, ArgsError> {
        Ok(DecodeConfig {
            node: self.node.validate("decode")?,
        })
    }
}
