//! The children together: started in order, watched, stopped in order.

use std::{
    ffi::OsString,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitStatus,
};

use anyhow::{Context, bail};
use baton_node::{
    announce::{Event, Line},
    limits,
    telemetry::{LogFormat, TelemetryArgs},
};
use tempfile::TempDir;
use tokio::{
    sync::mpsc,
    time::{Instant, timeout, timeout_at},
};
use tokio_util::task::TaskTracker;

use super::{
    Stop, UpArgs, members,
    process::{ChildEvent, Process},
};
use crate::{
    client::Client,
    output,
    progress::{Starting, StartingLine},
};

/// Index of the router among the processes.
const ROUTER: usize = 0;
/// Events of all children that wait; each sends a handful in its life.
const EVENTS: usize = 64;

/// What to start.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) args: UpArgs,
    pub(super) model: PathBuf,
    pub(super) threads: usize,
    pub(super) telemetry: TelemetryArgs,
}

impl Plan {
    /// The router's command line.
    fn router(&self) -> Vec<OsString> {
        let mut arguments = words(&["router", "--node-id", "router-0"]);
        arguments.extend(words(&[
            "--grpc",
            &self.args.grpc.to_string(),
            "--http",
            &self.args.http.to_string(),
        ]));
        arguments.extend(["--model".into(), self.model.clone().into_os_string()]);
        self.common(arguments)
    }

    /// A node's command line.
    fn node(&self, role: &str, name: &str, router: SocketAddr) -> Vec<OsString> {
        let mut arguments = words(&[role, "--node-id", name, "--grpc", "127.0.0.1:0", "--ops", "127.0.0.1:0"]);
        arguments.extend(words(&["--router", &format!("http://{router}")]));
        arguments.extend(["--model".into(), self.model.clone().into_os_string()]);
        arguments.extend(words(&[
            "--threads",
            &self.threads.to_string(),
            "--kv-bytes",
            &self.args.kv_bytes.0.to_string(),
        ]));
        arguments.extend(self.args.panel_cache.words());
        if self.args.simulated {
            arguments.push("--simulated".into());
        }
        self.common(arguments)
    }

    fn common(&self, mut arguments: Vec<OsString>) -> Vec<OsString> {
        arguments.push("--exit-when-stdin-closes".into());
        if let Some(filter) = &self.telemetry.filter {
            arguments.extend(words(&["--log", filter]));
        }
        if self.telemetry.log_format == LogFormat::Json {
            arguments.extend(words(&["--log-format", "json"]));
        }
        if let Some(endpoint) = &self.telemetry.otlp_endpoint {
            arguments.extend(words(&["--otlp", endpoint]));
        }
        arguments
    }

    /// Names of the nodes with their role, in the order of their start.
    fn nodes(&self) -> Vec<(&'static str, String)> {
        let of = |role: &'static str, count| (0..count).map(move |index| (role, format!("{role}-{index}")));
        of("prefill", self.args.prefill)
            .chain(of("decode", self.args.decode))
            .collect()
    }
}

fn words(words: &[&str]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}

/// The running processes. Dropping it kills them.
pub(super) struct Cluster {
    plan: Plan,
    processes: Vec<Process>,
    events: mpsc::Receiver<(usize, ChildEvent)>,
    sender: mpsc::Sender<(usize, ChildEvent)>,
    tasks: TaskTracker,
    logs: PathBuf,
    temporary: Option<TempDir>,
    router: Option<Line>,
    models: Vec<String>,
    died: bool,
}

impl Cluster {
    /// Nothing runs yet.
    pub(super) fn new(plan: Plan) -> anyhow::Result<Self> {
        let (logs, temporary) = match &plan.args.logs {
            Some(directory) => {
                fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
                (directory.clone(), None)
            }
            None => {
                let directory = tempfile::Builder::new()
                    .prefix("baton-up-")
                    .tempdir()
                    .context("cannot create a directory for logs: pass --logs")?;
                (directory.path().to_owned(), Some(directory))
            }
        };
        let (sender, events) = mpsc::channel(EVENTS);
        Ok(Self {
            plan,
            processes: Vec::new(),
            events,
            sender,
            tasks: TaskTracker::new(),
            logs,
            temporary,
            router: None,
            models: Vec::new(),
            died: false,
        })
    }

    /// Starts the router, then the nodes, and returns when all are ready and the router has them.
    pub(super) async fn start(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + limits::UP_READY_TIMEOUT;
        let display = Starting::new();
        let mut lines = vec![display.line("router")];
        self.spawn("router".into(), self.plan.router())?;
        let mut ready = vec![false];
        while self.router.is_none() {
            self.starting(deadline, &lines, &mut ready).await?;
        }
        let (router, http) = self
            .router
            .as_ref()
            .map(|line| (line.grpc, line.http))
            .context("it listens")?;
        for (role, name) in self.plan.nodes() {
            lines.push(display.line(&name));
            ready.push(false);
            let arguments = self.plan.node(role, &name, router);
            self.spawn(name, arguments)?;
        }
        while ready.contains(&false) {
            self.starting(deadline, &lines, &mut ready).await?;
        }
        let nodes = self.plan.nodes().len();
        let all = async {
            members::joined(http, nodes).await?;
            let mut client = Client::connect(&format!("http://{router}"), None).await?;
            client.models().await.map_err(anyhow::Error::from)
        };
        let mut all = std::pin::pin!(timeout_at(deadline, all));
        self.models = loop {
            tokio::select! {
                biased;
                joined = &mut all => break joined.context("the nodes did not join the router in time")??,
                // One that ends meanwhile will not join.
                event = self.starting(deadline, &lines, &mut ready) => event?,
            }
        };
        Ok(())
    }

    fn spawn(&mut self, name: String, arguments: Vec<OsString>) -> anyhow::Result<()> {
        let index = self.processes.len();
        self.processes.push(Process::start(
            name,
            index,
            arguments,
            &self.logs,
            &self.sender,
            &self.tasks,
        )?);
        Ok(())
    }

    /// Takes one event while processes start. A process that ends now ends the start.
    async fn starting(&mut self, deadline: Instant, lines: &[StartingLine], ready: &mut [bool]) -> anyhow::Result<()> {
        let (index, event) = match timeout_at(deadline, self.events.recv()).await {
            Ok(event) => event.context("children have ended")?,
            Err(_) => {
                let late: Vec<&str> = self
                    .processes
                    .iter()
                    .zip(ready.iter())
                    .filter(|(_, ready)| !**ready)
                    .map(|(process, _)| process.name.as_str())
                    .collect();
                bail!(
                    "not ready after {} s: {}; logs are in {}",
                    limits::UP_READY_TIMEOUT.as_secs(),
                    late.join(", "),
                    self.logs.display()
                );
            }
        };
        match event {
            ChildEvent::Said(line) => {
                match line.event {
                    Event::Listening => lines[index].update(&format!("listens on {}, loads the model", line.grpc)),
                    Event::Loading => {
                        if let Some(loading) = &line.loading {
                            lines[index].loading(&loading.stage, loading.percent);
                        }
                    }
                    Event::Ready => {
                        ready[index] = true;
                        lines[index].ready(&format!("ready   gRPC {}   HTTP {}", line.grpc, line.http));
                    }
                }
                if index == ROUTER {
                    self.router = Some(line);
                }
                Ok(())
            }
            ChildEvent::Exited(status) => {
                let process = self.ended(index);
                let (name, last) = (process.name.clone(), process.last_lines());
                lines[index].failed(&describe(&status));
                bail!(
                    "{name} did not start: it {}. The end of its log:\n{last}",
                    describe(&status)
                );
            }
        }
    }

    /// Waits until the cluster cannot serve any more; reports each death on the way.
    pub(super) async fn watch(&mut self) -> anyhow::Result<()> {
        loop {
            let (index, event) = self.events.recv().await.context("children have ended")?;
            let ChildEvent::Exited(status) = event else { continue };
            self.died = true;
            let process = self.ended(index);
            output::note(format_args!(
                "\n{} {}. The end of its log ({}):\n{}",
                process.name,
                describe(&status),
                process.log.display(),
                process.last_lines()
            ));
            if index == ROUTER {
                bail!("the router is gone");
            }
            if !self
                .processes
                .iter()
                .any(|process| !process.ended && process.name.starts_with("decode-"))
            {
                bail!("no decode node is left");
            }
            output::note(format_args!("the others go on"));
        }
    }

    fn ended(&mut self, index: usize) -> &Process {
        self.processes[index].ended = true;
        &self.processes[index]
    }

    /// Drains the router, then the nodes; kills what does not end in time, or at the next signal.
    pub(super) async fn stop(&mut self, stop: &mut Stop) {
        let drained = async {
            // Each has its whole time: a router that needs all of it leaves the nodes theirs.
            let router = timeout(limits::UP_STOP_TIMEOUT, self.drain(|index| index == ROUTER));
            let router = router.await.is_ok();
            router
                && timeout(limits::UP_STOP_TIMEOUT, self.drain(|index| index != ROUTER))
                    .await
                    .is_ok()
        };
        let drained = tokio::select! {
            drained = drained => drained,
            () = stop.asked() => false,
        };
        if !drained {
            let left: Vec<&str> = self.running(|_| true).map(|process| process.name.as_str()).collect();
            output::note(format_args!("killing {}", left.join(", ")));
            self.running(|_| true).for_each(Process::kill);
            // SIGKILL ends them, unless the system itself hangs.
            let _ = timeout(limits::STOP_TIMEOUT, self.wait(|_| true)).await;
        }
        self.tasks.close();
    }

    async fn drain(&mut self, which: impl Fn(usize) -> bool + Copy) {
        self.running(which).for_each(Process::drain);
        self.wait(which).await;
    }

    async fn wait(&mut self, which: impl Fn(usize) -> bool + Copy) {
        while self.running(which).next().is_some() {
            match self.events.recv().await {
                Some((index, ChildEvent::Exited(status))) => {
                    let process = self.ended(index);
                    if !status.as_ref().is_ok_and(ExitStatus::success) {
                        output::note(format_args!("{} {}", process.name, describe(&status)));
                    }
                }
                Some((_, ChildEvent::Said(_))) => {}
                None => return,
            }
        }
    }

    fn running(&self, which: impl Fn(usize) -> bool) -> impl Iterator<Item = &Process> {
        self.processes
            .iter()
            .enumerate()
            .filter(move |(index, process)| which(*index) && !process.ended)
            .map(|(_, process)| process)
    }

    /// Keeps the logs if something went wrong, and says how it all ended.
    pub(super) fn finish(self, outcome: anyhow::Result<()>) -> anyhow::Result<()> {
        let failed = outcome.is_err() || self.died;
        if failed && let Some(directory) = self.temporary {
            output::note(format_args!("logs are kept in {}", directory.keep().display()));
        }
        outcome?;
        anyhow::ensure!(!self.died, "a process died on its own");
        Ok(())
    }

    /// What is there, and what to try.
    pub(super) fn welcome(&self) -> String {
        match &self.router {
            Some(router) => welcome(router, &self.models, self.plan.nodes().len(), &self.logs),
            None => String::new(),
        }
    }
}

fn welcome(router: &Line, models: &[String], nodes: usize, logs: &Path) -> String {
    let (grpc, http) = (router.grpc, router.http);
    let model = models.first().map_or("", String::as_str);
    let flag = if grpc.port() == 7070 && grpc.ip().is_loopback() {
        String::new()
    } else {
        format!(" --grpc http://{grpc}")
    };
    format!(
        r#"
{model} is ready on {nodes} node{s} and a router.

  OpenAI API  http://{http}/v1
  gRPC        http://{grpc}  (baton.v1.Generation, reflection)
  metrics     http://{http}/metrics
  logs        {logs}

Try, in another terminal:

  baton generate{flag} "What is a relay race?"
  baton chat{flag}
  curl -N http://{http}/v1/chat/completions -H 'content-type: application/json' \
    -d '{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "What is a relay race?"}}]}}'

Ctrl-C stops it."#,
        s = if nodes == 1 { "" } else { "s" },
        logs = logs.display(),
    )
}

fn describe(status: &std::io::Result<ExitStatus>) -> String {
    match status {
        Ok(status) => format!("ended with {status}"),
        Err(error) => format!("was lost: {error}"),
    }
}

#[cfg(test)]
mod tests;
