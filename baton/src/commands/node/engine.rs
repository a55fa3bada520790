//! Which engine a node runs.

use std::path::{Path, PathBuf};

use anyhow::Context;
use baton_engine::{EngineOptions, Isa, ModelConfig, SimulatedConfig, Source};
use baton_worker::NodeConfig;
use clap::Args;

use crate::{
    models::{self, Parts},
    panel_cache::PanelCacheArgs,
};

#[derive(Clone, Debug, Args)]
pub(super) struct EngineArgs {
    /// A GGUF file, a directory as Hugging Face lays it out, or a hub's ORG/NAME (as of `baton up`); every node and router of a cluster needs the same one
    /// [default: the default model, as fetched]
    #[arg(long, env = "BATON_MODEL", value_name = "MODEL")]
    model: Option<PathBuf>,
    /// Compute nothing: take as long as a cost model says, and answer with derived tokens; name and vocabulary are those of the model file
    #[arg(long, env = "BATON_SIMULATED")]
    simulated: bool,
    /// Instruction set of the kernels: portable, avx2, avx512 or avx512bf16; all give the same bits, so leave it out but for tests and measurements [default: the fastest that this CPU has]
    #[arg(long, env = "BATON_ISA", value_name = "SET")]
    isa: Option<Isa>,
    #[command(flatten)]
    panel_cache: PanelCacheArgs,
}

impl EngineArgs {
    /// What to open for a node of this `config`, with a pool that others can map or not; downloads it if it must.
    pub(super) async fn options(&self, config: &NodeConfig, shared_pool: bool) -> anyhow::Result<EngineOptions> {
        let path = models::locate(self.model.as_deref(), Parts::All).await?;
        let source = if self.simulated {
            Source::Simulated(simulated(&path)?)
        } else {
            Source::File(path)
        };
        Ok(EngineOptions {
            source,
            threads: config.threads,
            isa: self.isa,
            kv_bytes: config.kv_bytes,
            shared_pool,
            max_rows: config.scheduler.token_budget,
            max_sequences: config.scheduler.max_running,
            panel_cache: self.panel_cache.directory(),
        })
    }
}

/// A simulated model that passes for the one in `path`, so that a router with that file's tokenizer takes the node.
fn simulated(path: &Path) -> anyhow::Result<SimulatedConfig> {
    let unusable = || format!("cannot take the vocabulary from {}", path.display());
    let (name, model) = ModelConfig::open(path).with_context(unusable)?;
    Ok(SimulatedConfig {
        name,
        vocabulary: model.vocabulary,
        context_length: model.context_length,
        ..SimulatedConfig::default()
    })
}
