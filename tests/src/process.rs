//! One `baton` process.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::http;
use crate::netns::Namespace;

/// Log lines kept of each process.
const LOG_LINES: usize = 4_000;

/// Warnings and errors kept of each process: a test that sees more has failed long before.
const STRAY_LINES: usize = 256;

/// What a process is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// `baton router`
    Router,
    /// `baton prefill`
    Prefill,
    /// `baton decode`
    Decode,
}

impl Role {
    /// The subcommand.
    pub fn command(self) -> &'static str {
        match self {
            Self::Router => "router",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

/// How to start a process, and how to start it again.
#[derive(Clone, Debug)]
pub struct Launch {
    /// What it is.
    pub role: Role,
    /// Its arguments.
    pub args: Vec<String>,
    /// Its environment.
    pub env: Vec<(String, String)>,
    /// Where it runs; `None`: in the test's own network.
    pub within: Option<Arc<Namespace>>,
}

/// What a process has written to its standard error.
#[derive(Default)]
struct Log {
    /// The oldest lines are dropped.
    lines: VecDeque<String>,
    /// The first warnings, errors and panics.
    stray: Vec<String>,
}

/// A running process; killed when dropped.
pub struct Process {
    /// What it is.
    pub role: Role,
    /// Its gRPC address.
    pub grpc: SocketAddr,
    /// Its HTTP address: the OpenAI API of a router, the ops endpoints of a node.
    pub http: SocketAddr,
    launch: Launch,
    child: Child,
    events: Receiver<serde_json::Value>,
    log: Arc<Mutex<Log>>,
    readers: Vec<JoinHandle<()>>,
    /// The test ended it, or waited for its end.
    ended: bool,
    stopped: bool,
}

impl Process {
    /// Starts `baton ROLE ARGS` and waits until it listens.
    pub fn start(launch: Launch) -> Self {
        let mut command = match &launch.within {
            None => Command::new(crate::baton()),
            Some(namespace) => namespace.command(&crate::baton()),
        };
        let mut child = command
            .arg(launch.role.command())
            .args(&launch.args)
            // A test that wants it says so.
            .env("BATON_PANEL_CACHE", "off")
            .envs(launch.env.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("baton starts");
        let log = Arc::new(Mutex::new(Log::default()));
        let (send, events) = sync_channel(16);
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        let stderr = BufReader::new(child.stderr.take().expect("piped"));
        let kept = Arc::clone(&log);
        let readers = vec![
            std::thread::spawn(move || {
                for line in stdout.lines().map_while(Result::ok) {
                    // Nobody waits for those, of which there are many.
                    if let Ok(event) = serde_json::from_str::<serde_json::Value>(&line)
                        && event["event"] != "loading"
                    {
                        let _ = send.send(event);
                    }
                }
            }),
            std::thread::spawn(move || {
                for line in stderr.lines().map_while(Result::ok) {
                    kept.lock().expect("log").push(line);
                }
            }),
        ];
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut process = Self {
            role: launch.role,
            grpc: nowhere,
            http: nowhere,
            launch,
            child,
            events,
            log,
            readers,
            ended: false,
            stopped: false,
        };
        let listening = process.wait_event("listening", Duration::from_secs(60));
        let address = |key: &str| -> SocketAddr {
            listening[key]
                .as_str()
                .and_then(|text| text.parse().ok())
                .unwrap_or_else(|| panic!("{key} in {listening}"))
        };
        (process.grpc, process.http) = (address("grpc"), address("http"));
        process
    }

    /// Waits for a line `{"event": NAME, …}` on its standard output.
    pub fn wait_event(&mut self, name: &str, limit: Duration) -> serde_json::Value {
        let deadline = Instant::now() + limit;
        loop {
            match self
                .events
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(event) if event["event"] == name => return event,
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    let status = self.child.try_wait().expect("wait");
                    panic!(
                        "baton {}: no {name:?} event (status {status:?}); its log:\n{}",
                        self.role.command(),
                        self.log()
                    );
                }
            }
        }
    }

    /// Its metrics as text.
    pub fn metrics(&self) -> String {
        let address = self.http;
        let get = move || http::get(address, "/metrics").body;
        match &self.launch.within {
            None => get(),
            Some(namespace) => namespace.enter(get),
        }
    }

    /// Waits until its metrics are as `fit` wants them. Panics at the limit.
    pub fn wait_metrics(&self, what: &str, limit: Duration, fit: impl Fn(&str) -> bool) {
        let deadline = Instant::now() + limit;
        loop {
            let text = self.metrics();
            if fit(&text) {
                return;
            }
            let role = self.role.command();
            assert!(
                Instant::now() < deadline,
                "baton {role}: never {what}; its metrics:\n{text}"
            );
            pause();
        }
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it runs.
    pub fn alive(&mut self) -> bool {
        self.child.try_wait().expect("wait").is_none()
    }

    /// Whether the test has ended it, or has waited for its end.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// kill -9, and waits for its end.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.ended = true;
    }

    /// Kills it if it runs, and starts it with the same arguments at the same addresses. Its log begins anew; what was stray in it is kept.
    pub fn restart(&mut self) {
        self.kill();
        // To the last line.
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
        let stray = self.stray();
        let mut launch = self.launch.clone();
        let http = if self.role == Role::Router { "--http" } else { "--ops" };
        for (flag, address) in [("--grpc", self.grpc), (http, self.http)] {
            let at = launch
                .args
                .iter()
                .position(|arg| arg == flag)
                .expect("every launch names its ports");
            launch.args[at + 1] = address.to_string();
        }
        *self = Self::start(launch);
        self.log.lock().expect("log").keep_stray(stray);
    }

    /// Sends a signal by name, e.g. `TERM`.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill")
            .args([format!("-{name}"), self.id().to_string()])
            .status()
            .expect("kill");
        assert!(status.success(), "kill -{name}");
    }

    /// SIGSTOP: it stands still, its sockets stay open.
    pub fn stop(&mut self) {
        self.signal("STOP");
        self.stopped = true;
    }

    /// SIGCONT, if it was stopped.
    pub fn resume(&mut self) {
        if std::mem::take(&mut self.stopped) {
            self.signal("CONT");
        }
    }

    /// Waits for its end.
    pub fn wait_exit(&mut self, limit: Duration) -> ExitStatus {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().expect("wait") {
                self.ended = true;
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "baton {} did not end; its log:\n{}",
                self.role.command(),
                self.log()
            );
            pause();
        }
    }

    /// What it logged, the oldest lines dropped.
    pub fn log(&self) -> String {
        self.log
            .lock()
            .expect("log")
            .lines
            .iter()
            .fold(String::new(), |mut text, line| {
                text.push_str(line);
                text.push('\n');
                text
            })
    }

    /// Warnings, errors and panics that it logged, the first of them.
    pub fn stray(&self) -> Vec<String> {
        self.log.lock().expect("log").stray.clone()
    }
}

impl Log {
    /// Of an earlier life.
    fn keep_stray(&mut self, mut earlier: Vec<String>) {
        earlier.append(&mut self.stray);
        earlier.truncate(STRAY_LINES);
        self.stray = earlier;
    }

    fn push(&mut self, line: String) {
        let level = line.split_whitespace().nth(1);
        if (matches!(level, Some("WARN" | "ERROR")) || line.contains("panicked at")) && self.stray.len() < STRAY_LINES {
            self.stray.push(line.clone());
        }
        if self.lines.len() == LOG_LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }
}

impl Drop for Process {
    #[expect(clippy::disallowed_macros, reason = "libtest captures it")]
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!(
                "── log of baton {} ({}) ──\n{}",
                self.role.command(),
                self.grpc,
                self.log()
            );
        }
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
    }
}

/// Between two looks at something that sends no event; every loop around it has a deadline.
#[expect(clippy::disallowed_methods, reason = "the one pause between polls, under a deadline")]
pub(crate) fn pause() {
    std::thread::sleep(Duration::from_millis(20));
}
