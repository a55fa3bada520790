//! One `baton` process.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Log lines kept of each process.
const LOG_LINES: usize = 4_000;

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

/// A running process; killed when dropped.
pub struct Process {
    /// What it is.
    pub role: Role,
    /// Its gRPC address.
    pub grpc: SocketAddr,
    /// Its HTTP address: the OpenAI API of a router, the ops endpoints of a node.
    pub http: SocketAddr,
    child: Child,
    events: Receiver<serde_json::Value>,
    log: Arc<Mutex<VecDeque<String>>>,
    readers: Vec<JoinHandle<()>>,
}

impl Process {
    /// Starts `baton ROLE ARGS` and waits until it listens.
    pub fn start(role: Role, args: &[String], env: &[(String, String)]) -> Self {
        let mut child = Command::new(crate::baton())
            .arg(role.command())
            .args(args)
            // A test that wants it says so.
            .env("BATON_PANEL_CACHE", "off")
            .envs(env.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("baton starts");
        let log = Arc::new(Mutex::new(VecDeque::new()));
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
                    let mut kept = kept.lock().expect("log");
                    if kept.len() == LOG_LINES {
                        kept.pop_front();
                    }
                    kept.push_back(line);
                }
            }),
        ];
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut process = Self {
            role,
            grpc: nowhere,
            http: nowhere,
            child,
            events,
            log,
            readers,
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

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it runs.
    pub fn alive(&mut self) -> bool {
        self.child.try_wait().expect("wait").is_none()
    }

    /// kill -9, and waits for its end.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Sends a signal by name, e.g. `STOP`, `CONT`, `TERM`.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill")
            .args([format!("-{name}"), self.id().to_string()])
            .status()
            .expect("kill");
        assert!(status.success(), "kill -{name}");
    }

    /// Waits for its end.
    pub fn wait_exit(&mut self, limit: Duration) -> ExitStatus {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().expect("wait") {
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
            .iter()
            .fold(String::new(), |mut text, line| {
                text.push_str(line);
                text.push('\n');
                text
            })
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
