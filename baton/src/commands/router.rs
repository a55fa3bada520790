//! `baton router`: the model's text side opened here.

use std::path::PathBuf;

use anyhow::Context;
use baton_node::{Lifecycle, announce::Announcer, listen, telemetry::TelemetryArgs};
use baton_router::{Listeners, RouterArgs, RouterConfig};
use baton_text::ModelText;
use clap::Args;

use crate::{
    models::{self, Parts},
    process::{self, ProcessArgs, UsageError},
};

#[derive(Debug, Args)]
pub(crate) struct RouterCommand {
    /// A GGUF file, a directory as Hugging Face lays it out, or a hub's ORG/NAME (as of `baton up`), for its tokenizer and chat template; the nodes need the same
    /// one [default: the default model, as fetched]
    #[arg(long, env = "BATON_MODEL", value_name = "MODEL")]
    model: Option<PathBuf>,
    #[command(flatten)]
    router: RouterArgs,
    #[command(flatten)]
    process: ProcessArgs,
}

pub(crate) fn run(command: RouterCommand, telemetry: &TelemetryArgs) -> anyhow::Result<()> {
    let RouterCommand { model, router, process } = command;
    let config = router.config().map_err(UsageError::from)?;
    let instance = config.router_id.clone();
    process::serve("router", &instance, telemetry, &process, |lifecycle| {
        serve(config, model, lifecycle)
    })
}

async fn serve(config: RouterConfig, model: Option<PathBuf>, lifecycle: Lifecycle) -> anyhow::Result<()> {
    // Sockets first: a taken port is told at once, and whoever started us learns the addresses.
    let listeners = Listeners {
        grpc: listen::bind(config.grpc, "--grpc").await?,
        http: listen::bind(config.http, "--http").await?,
    };
    let (grpc, http) = (listeners.grpc.local_addr()?, listeners.http.local_addr()?);
    process::announce_ready(
        Announcer::listening("router", &config.router_id, grpc, http),
        &lifecycle,
    );
    let path = tokio::select! {
        path = models::locate(model.as_deref(), Parts::Text) => path?,
        () = lifecycle.draining() => return Ok(()),
    };
    let shown = path.display().to_string();
    let opening = tokio::task::spawn_blocking(move || ModelText::open(&path));
    let text = tokio::select! {
        text = opening => text.context("the thread that opens the model panicked")?,
        () = lifecycle.draining() => return Ok(()),
    };
    let text = text.with_context(|| format!("cannot open the tokenizer of {shown}"))?;
    baton_router::run(config, text, lifecycle, listeners).await?;
    Ok(())
}
