//! `baton up`: a whole cluster on this machine, each part a process of this same binary.
//!
//! A node that dies is reported, and the rest goes on while it can serve: as long as the router and one decode node live. `up` itself ends with status 1 if
//! any process died on its own.

mod cluster;
mod members;
mod process;

use std::{
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

use anyhow::Context;
use baton_node::{ByteSize, ListenAddress, limits, telemetry::TelemetryArgs};
use clap::{Args, value_parser};
use tokio::signal::unix::{Signal, SignalKind, signal};

use self::cluster::{Cluster, Plan};
use crate::{
    models::{self, Parts},
    output,
    panel_cache::PanelCacheArgs,
};

#[derive(Clone, Debug, Args)]
pub(crate) struct UpArgs {
    /// Prefill nodes: more when many long prompts come at once; 0 runs prompts on the decode nodes
    #[arg(long, env = "BATON_PREFILL", value_name = "N", default_value_t = 1, value_parser = value_parser!(u32).range(0..=i64::from(limits::UP_NODES)))]
    prefill: u32,
    /// Decode nodes: more when many answers run at once
    #[arg(long, env = "BATON_DECODE", value_name = "N", default_value_t = 1, value_parser = value_parser!(u32).range(1..=i64::from(limits::UP_NODES)))]
    decode: u32,
    /// The model for all: a GGUF file, a directory as Hugging Face lays it out (config.json, tokenizer.json, *.safetensors), or a hub's ORG/NAME, ORG/NAME@REVISION
    /// or ORG/NAME/FILE.gguf, which is downloaded once; HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are heeded [default: the default model, fetched when it is
    /// missing]
    #[arg(long, env = "BATON_MODEL", value_name = "MODEL")]
    model: Option<PathBuf>,
    /// Compute nothing: nodes take as long as a cost model says, and answer with derived tokens; to try the system without its arithmetic
    #[arg(long, env = "BATON_SIMULATED")]
    simulated: bool,
    /// Where the router serves gRPC; port 0 takes a free one
    #[arg(long, env = "BATON_GRPC", value_name = "ADDRESS", default_value = "127.0.0.1:7070")]
    grpc: ListenAddress,
    /// Where the router serves the OpenAI API, probes and metrics; port 0 takes a free one
    #[arg(long, env = "BATON_HTTP", value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    http: ListenAddress,
    /// Threads that compute, per node [default: this machine's cores, shared out evenly, so that nodes that compute at the same time do not slow each other down;
    /// for a single user, whose prefill and decode take turns, all cores per node is faster]
    #[arg(long, env = "BATON_THREADS", value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Memory for KV, per node
    #[arg(long, env = "BATON_KV_BYTES", value_name = "BYTES", default_value = "512MiB")]
    kv_bytes: ByteSize,
    #[command(flatten)]
    panel_cache: PanelCacheArgs,
    /// Keep each process's log in this directory [default: a temporary one, kept only if a process died]
    #[arg(long, env = "BATON_LOGS", value_name = "DIR")]
    logs: Option<PathBuf>,
}

/// Threads per node, shared out.
fn share(cores: usize, nodes: usize) -> usize {
    (cores / nodes.max(1)).max(1)
}

pub(crate) async fn run(args: UpArgs, telemetry: &TelemetryArgs) -> anyhow::Result<()> {
    let mut stop = Stop::listen()?;
    let model = tokio::select! {
        model = model(args.model.as_deref()) => model?,
        () = stop.asked() => anyhow::bail!("interrupted"),
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = args
        .threads
        .map_or_else(|| share(cores, (args.prefill + args.decode) as usize), usize::from);
    let plan = Plan {
        args,
        model,
        threads,
        telemetry: telemetry.clone(),
    };
    let mut cluster = Cluster::new(plan)?;
    let outcome = tokio::select! {
        outcome = start_and_watch(&mut cluster) => outcome,
        () = stop.asked() => {
            output::note(format_args!("\nstopping: answers that run may finish; Ctrl-C once more kills"));
            Ok(())
        }
    };
    cluster.stop(&mut stop).await;
    cluster.finish(outcome)
}

async fn start_and_watch(cluster: &mut Cluster) -> anyhow::Result<()> {
    cluster.start().await?;
    // A banner that nobody reads is no reason to stop.
    let _ = output::line(cluster.welcome());
    cluster.watch().await
}

/// The model's path; the default one is fetched when it is missing.
async fn model(explicit: Option<&Path>) -> anyhow::Result<PathBuf> {
    if explicit.is_some() {
        return models::locate(explicit, Parts::All).await;
    }
    let path = models::default_path();
    if path.is_file() {
        // Its digest was checked when it was fetched.
        return Ok(path);
    }
    let directory = path.parent().context("the model directory has no name")?;
    Ok(models::fetch(directory).await?.path().to_owned())
}

/// SIGINT and SIGTERM.
pub(super) struct Stop {
    interrupt: Signal,
    terminate: Signal,
}

impl Stop {
    fn listen() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
        })
    }

    /// Resolves at the next one. Cancel-safe.
    pub(super) async fn asked(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_shared_out() {
        for (cores, nodes, expected) in [(2, 2, 1), (8, 2, 4), (8, 3, 2), (1, 4, 1), (4, 1, 4)] {
            assert_eq!(share(cores, nodes), expected, "{cores} cores, {nodes} nodes");
        }
    }

    #[tokio::test]
    async fn a_model_that_is_not_there_says_how_to_get_one() {
        let error = model(Some(Path::new("/nonexistent/model.gguf")))
            .await
            .expect_err("no such file");
        assert!(error.to_string().contains("baton model fetch"), "{error}");
    }
}
