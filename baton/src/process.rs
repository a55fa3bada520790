//! How every serving process runs: a runtime, telemetry, signals, one life.

use std::{future::Future, process, time::Duration};

use anyhow::Context;
use baton_node::{
    Lifecycle, Phase,
    announce::Announcer,
    limits, signal,
    telemetry::{self, TelemetryArgs, TelemetryConfig},
};
use clap::Args;
use tokio::runtime::{Builder, Runtime};

/// Threads of a server's async runtime. Two, so that tokenising a long prompt or checking a large frame on one does not hold up probes and other
/// streams; not more, since models compute on threads of their own and should have the cores.
const SERVER_THREADS: usize = 2;

/// Log filter of servers that were given none.
const SERVER_FILTER: &str = "info";

/// Flags of every serving process.
#[derive(Clone, Debug, Args)]
pub(crate) struct ProcessArgs {
    /// Drain when stdin closes: for a parent process that holds the other end, so that its death leaves no orphan
    #[arg(long, env = "BATON_EXIT_WHEN_STDIN_CLOSES")]
    pub(crate) exit_when_stdin_closes: bool,
}

/// A command line that cannot be served; the process exits with 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct UsageError(pub(crate) String);

impl UsageError {
    /// Of anything that says what is wrong.
    pub(crate) fn from(error: impl std::fmt::Display) -> Self {
        Self(error.to_string())
    }
}

/// Runs a server to its end: `serve` gets a life in [`Phase::Starting`] that signals drain, and returns once it has drained.
pub(crate) fn serve<F, Fut>(
    role: &str,
    instance: &str,
    telemetry: &TelemetryArgs,
    args: &ProcessArgs,
    serve: F,
) -> anyhow::Result<()>
where
    F: FnOnce(Lifecycle) -> Fut,
    Fut: Future<Output = anyhow::Result<()>>,
{
    let runtime = Builder::new_multi_thread()
        .worker_threads(SERVER_THREADS)
        .thread_name("baton-async")
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    let config = TelemetryConfig {
        service: format!("baton-{role}"),
        instance: instance.to_owned(),
        otlp_endpoint: telemetry.otlp_endpoint.clone().filter(|endpoint| !endpoint.is_empty()),
        log_format: telemetry.log_format,
        filter: telemetry.filter.clone().unwrap_or_else(|| SERVER_FILTER.to_owned()),
    };
    let guard = {
        let _runtime = runtime.enter();
        telemetry::init(&config).map_err(UsageError::from)?
    };
    let lifecycle = Lifecycle::new();
    let outcome = runtime.block_on(async {
        signal::drain_on_signals(&lifecycle).context("cannot listen for signals")?;
        if args.exit_when_stdin_closes {
            signal::drain_when_stdin_closes(&lifecycle).context("cannot watch stdin")?;
        }
        serve(lifecycle.clone()).await
    });
    lifecycle.set(Phase::Stopped);
    // Out here, where it may block, and before the runtime that it needs is gone.
    guard.shutdown(limits::TELEMETRY_FLUSH);
    runtime.shutdown_timeout(limits::STOP_TIMEOUT);
    outcome
}

/// Runs a client command, on this thread alone.
pub(crate) fn client(
    telemetry: &TelemetryArgs,
    command: impl Future<Output = anyhow::Result<()>>,
) -> anyhow::Result<()> {
    let runtime: Runtime = Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    let config = TelemetryConfig {
        service: "baton".to_owned(),
        instance: process::id().to_string(),
        otlp_endpoint: None,
        log_format: telemetry.log_format,
        filter: telemetry.filter.clone().unwrap_or_else(|| "warn".to_owned()),
    };
    let _guard = telemetry::init(&config).map_err(UsageError::from)?;
    let outcome = runtime.block_on(command);
    // Nobody waits for a thread that still reads stdin.
    runtime.shutdown_timeout(Duration::ZERO);
    outcome
}

/// Prints the `ready` line when `lifecycle` gets there.
pub(crate) fn announce_ready(announcer: Announcer, lifecycle: &Lifecycle) {
    let (mut phase, stop) = (lifecycle.watch(), lifecycle.shutdown_token());
    lifecycle.spawn(async move {
        tokio::select! {
            now = phase.wait_for(|phase| *phase >= Phase::Ready) => {
                if now.is_ok_and(|phase| *phase == Phase::Ready) {
                    announcer.ready();
                }
            }
            () = stop.cancelled() => {}
        }
    });
}
