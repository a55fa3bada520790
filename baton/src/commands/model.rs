//! `baton model fetch|info`.

use std::path::PathBuf;

use anyhow::Context;
use baton_engine::ModelSummary;
use baton_text::ModelText;
use clap::{Args, Subcommand};

use crate::{
    models::{self, Fetched, Parts},
    output,
};

/// Fetches models and says what is in them.
#[derive(Debug, Subcommand)]
pub(crate) enum ModelCommand {
    /// Fetch the default model (SmolLM2-135M-Instruct, 94 MiB) and check its SHA-256
    Fetch(FetchArgs),
    /// Say what a model holds
    Info(InfoArgs),
}

#[derive(Debug, Args)]
pub(crate) struct FetchArgs {
    /// Where to keep it [default: $XDG_CACHE_HOME/baton/models, else ~/.cache/baton/models]
    #[arg(long, env = "BATON_MODELS", value_name = "DIR")]
    dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct InfoArgs {
    /// A GGUF file, a directory as Hugging Face lays it out, or a hub's ORG/NAME (as of `baton up`) [default: the default model, as fetched]
    #[arg(value_name = "MODEL")]
    model: Option<PathBuf>,
}

pub(crate) async fn run(command: ModelCommand) -> anyhow::Result<()> {
    match command {
        ModelCommand::Fetch(args) => fetch(args).await,
        ModelCommand::Info(args) => info(args).await,
    }
}

async fn fetch(args: FetchArgs) -> anyhow::Result<()> {
    let directory = models::directory(args.dir);
    let fetched = tokio::select! {
        fetched = models::fetch(&directory) => fetched?,
        interrupted = tokio::signal::ctrl_c() => {
            interrupted.context("cannot listen for Ctrl-C")?;
            anyhow::bail!("interrupted; nothing was kept");
        }
    };
    let what = match &fetched {
        Fetched::AlreadyThere(_) => "already there",
        Fetched::New(_) => "fetched",
    };
    output::line(format!("{what}, SHA-256 verified: {}", fetched.path().display()))
}

async fn info(args: InfoArgs) -> anyhow::Result<()> {
    let path = models::locate(args.model.as_deref(), Parts::All).await?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let read = move || -> anyhow::Result<String> {
        let summary = ModelSummary::of_file(&path, threads)?;
        // What ends an answer is the router's business: the tokenizer says it.
        let ends = ModelText::open(&path).map_or_else(|error| error.to_string(), |text| format!("{:?}", text.eos_ids));
        Ok(format!("{summary}{:<14}{ends}\n", "ends with"))
    };
    let lines = tokio::task::spawn_blocking(read).await?;
    output::write(&lines.context("no summary")?)
}
