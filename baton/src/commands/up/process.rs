//! One child process.

use std::{
    ffi::OsString,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
};

use anyhow::Context;
use baton_node::announce::Line;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, ChildStdin, ChildStdout, Command},
    sync::mpsc,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Lines of a dead child's log that are shown.
const LAST_LINES: usize = 12;
/// Bytes read from the end of a log to find them.
const LAST_BYTES: u64 = 16 << 10;

/// What a child did.
#[derive(Debug)]
pub(super) enum ChildEvent {
    /// It listens, or is ready.
    Said(Line),
    /// It has ended.
    Exited(std::io::Result<ExitStatus>),
}

/// A child: it drains when told to, or when we die (its stdin closes), and is killed when that takes too long.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) name: String,
    pub(super) log: PathBuf,
    drain: CancellationToken,
    kill: CancellationToken,
    pub(super) ended: bool,
}

impl Process {
    /// Starts this binary with `arguments`; its events come as `(index, event)`.
    pub(super) fn start(
        name: String,
        index: usize,
        arguments: Vec<OsString>,
        logs: &Path,
        events: &mpsc::Sender<(usize, ChildEvent)>,
        tasks: &TaskTracker,
    ) -> anyhow::Result<Self> {
        let log = logs.join(format!("{name}.log"));
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let binary = std::env::current_exe().context("cannot tell where this binary is")?;
        let mut child = Command::new(binary)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(file)
            // A terminal's Ctrl-C is for us; children are told in order.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let (drain, kill) = (CancellationToken::new(), CancellationToken::new());
        let stdin = child.stdin.take().context("stdin is piped")?;
        let stdout = child.stdout.take().context("stdout is piped")?;
        tasks.spawn(attend(
            child,
            stdin,
            stdout,
            index,
            events.clone(),
            drain.clone(),
            kill.clone(),
        ));
        Ok(Self {
            name,
            log,
            drain,
            kill,
            ended: false,
        })
    }

    /// Tells it to drain.
    pub(super) fn drain(&self) {
        self.drain.cancel();
    }

    /// Kills it.
    pub(super) fn kill(&self) {
        self.kill.cancel();
    }

    /// The end of its log.
    pub(super) fn last_lines(&self) -> String {
        last_lines(&self.log)
    }
}

async fn attend(
    mut child: Child,
    stdin: ChildStdin,
    stdout: ChildStdout,
    index: usize,
    events: mpsc::Sender<(usize, ChildEvent)>,
    drain: CancellationToken,
    kill: CancellationToken,
) {
    let mut stdin = Some(stdin);
    let mut lines = BufReader::new(stdout).lines();
    let mut reading = true;
    let exited = loop {
        tokio::select! {
            line = lines.next_line(), if reading => match line {
                Ok(Some(line)) => {
                    if let Some(line) = Line::parse(&line) {
                        // Fails when nobody listens any more, and then we are told to end.
                        let _ = events.send((index, ChildEvent::Said(line))).await;
                    }
                }
                Ok(None) | Err(_) => reading = false,
            },
            () = drain.cancelled(), if stdin.is_some() => drop(stdin.take()),
            () = kill.cancelled() => {
                // Fails when it has ended already.
                let _ = child.start_kill();
                break child.wait().await;
            }
            status = child.wait() => break status,
        }
    };
    let _ = events.send((index, ChildEvent::Exited(exited))).await;
}

fn last_lines(log: &Path) -> String {
    let text = read_end(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LAST_LINES)..]
        .iter()
        .map(|line| format!("    {line}\n"))
        .collect()
}

fn read_end(log: &Path) -> std::io::Result<String> {
    use std::io::{Read, Seek, SeekFrom};
    let length = fs::metadata(log)?.len();
    let mut file = File::open(log)?;
    file.seek(SeekFrom::Start(length.saturating_sub(LAST_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(LAST_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_log_is_shown() {
        let directory = tempfile::tempdir().expect("a directory");
        let log = directory.path().join("node.log");
        assert_eq!(last_lines(&log), "");
        let text: String = (0..10_000).map(|n| format!("line {n}\n")).collect();
        fs::write(&log, text).expect("writes");
        let shown = last_lines(&log);
        assert_eq!(shown.lines().count(), LAST_LINES);
        assert!(shown.ends_with("    line 9999\n"), "{shown}");
    }
}
