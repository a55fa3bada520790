//! `baton prefill` and `baton decode`: one node, its engine opened here.

mod engine;
mod loading;

use std::future::Future;

use anyhow::Context;
use baton_decode_node::DecodeArgs;
use baton_engine::{Engine, EngineOptions};
use baton_node::{Lifecycle, announce::Announcer, telemetry::TelemetryArgs};
use baton_prefill_node::PrefillArgs;
use baton_worker::{Listeners, NodeConfig, NodeError};
use clap::Args;

use self::{engine::EngineArgs, loading::Loading};
use crate::process::{self, ProcessArgs, UsageError};

/// A node: its engine, its role's own flags, and those of every process.
#[derive(Clone, Debug, Args)]
pub(crate) struct NodeCommand<A: Args> {
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    role: A,
    #[command(flatten)]
    process: ProcessArgs,
}

pub(crate) fn prefill(command: NodeCommand<PrefillArgs>, telemetry: &TelemetryArgs) -> anyhow::Result<()> {
    let config = command.role.validate().map_err(UsageError::from)?;
    let (node, shared_pool) = (config.node.clone(), config.shares_pool());
    run(
        "prefill",
        node,
        shared_pool,
        command.engine,
        &command.process,
        telemetry,
        |engine, lifecycle, listeners| baton_prefill_node::run(config, engine, lifecycle, listeners),
    )
}

pub(crate) fn decode(command: NodeCommand<DecodeArgs>, telemetry: &TelemetryArgs) -> anyhow::Result<()> {
    let config = command.role.validate().map_err(UsageError::from)?;
    let node = config.node.clone();
    run(
        "decode",
        node,
        false,
        command.engine,
        &command.process,
        telemetry,
        |engine, lifecycle, listeners| baton_decode_node::run(config, engine, lifecycle, listeners),
    )
}

/// Opens sockets and engine, and lets `role` run on them.
fn run<Fut>(
    name: &'static str,
    config: NodeConfig,
    shared_pool: bool,
    engine: EngineArgs,
    process: &ProcessArgs,
    telemetry: &TelemetryArgs,
    role: impl FnOnce(Box<dyn Engine>, Lifecycle, Listeners) -> Fut,
) -> anyhow::Result<()>
where
    Fut: Future<Output = Result<(), NodeError>>,
{
    let instance = config.node.0.clone();
    process::serve(name, &instance, telemetry, process, async |lifecycle| {
        // Sockets first: a taken port is told at once, and whoever started us learns the addresses.
        let listeners = Listeners::bind(&config).await?;
        let (grpc, ops) = listeners.addresses()?;
        let announcer = Announcer::listening(name, &config.node.0, grpc, ops);
        process::announce_ready(announcer.clone(), &lifecycle);
        let options = tokio::select! {
            options = engine.options(&config, shared_pool) => options?,
            () = lifecycle.draining() => return Ok(()),
        };
        if let Some(engine) = open(options, Loading::new(announcer), &lifecycle).await? {
            role(engine, lifecycle, listeners).await?;
        }
        Ok(())
    })
}

/// Opens the engine on a thread of its own; `None` when told to stop meanwhile.
async fn open(
    options: EngineOptions,
    loading: Loading,
    lifecycle: &Lifecycle,
) -> anyhow::Result<Option<Box<dyn Engine>>> {
    tracing::info!(source = ?options.source, threads = options.threads, kv_bytes = options.kv_bytes, "opening the model");
    let opening = tokio::task::spawn_blocking(move || baton_engine::open(&options, &|progress| loading.at(progress)));
    let engine = tokio::select! {
        engine = opening => engine.context("the thread that opens the model panicked")?,
        () = lifecycle.draining() => return Ok(None),
    };
    let engine = engine.map_err(|error| {
        let code = error.code();
        anyhow::Error::new(error).context(format!("cannot open the model ({code})"))
    })?;
    let model = engine.model();
    tracing::info!(model = model.name, parameters = model.parameters, identity = %engine.identity(), "the model is open");
    Ok(Some(engine))
}
