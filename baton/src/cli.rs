//! The command line.

use baton_decode_node::DecodeArgs;
use baton_node::telemetry::TelemetryArgs;
use baton_prefill_node::PrefillArgs;
use clap::{Parser, Subcommand};

use crate::commands::{
    chat::ChatArgs, generate::GenerateArgs, model::ModelCommand, node::NodeCommand, router::RouterCommand, up::UpArgs,
};

/// Serves large language models on prefill and decode nodes, and passes the KV cache between them.
///
/// `baton up` starts a whole cluster on this machine. Exit status: 0 done, 1 failed, 2 the command line is wrong.
#[derive(Debug, Parser)]
#[command(name = "baton", version)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) telemetry: TelemetryArgs,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start a whole cluster on this machine, and fetch the model if it is missing
    Up(UpArgs),
    /// Answer one prompt, and show where the time went
    Generate(GenerateArgs),
    /// Hold a conversation: Ctrl-C cancels an answer, Ctrl-D ends
    Chat(ChatArgs),
    /// Fetch the default model, or say what a model holds
    #[command(subcommand)]
    Model(ModelCommand),
    /// Run a router: takes requests, places them on nodes
    Router(Box<RouterCommand>),
    /// Run a prefill node: reads prompts, hands their KV over
    Prefill(Box<NodeCommand<PrefillArgs>>),
    /// Run a decode node: takes KV, streams tokens
    Decode(Box<NodeCommand<DecodeArgs>>),
}

#[cfg(test)]
mod tests;
