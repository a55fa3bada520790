//! One end of a transfer as a process: the benchmark's binary again, asked and answering on its standard streams, one JSON value a line.

use std::{
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, sync_channel},
    time::Duration,
};

use anyhow::Context;
use rustix::time::{ClockId, clock_gettime};
use serde::{Serialize, de::DeserializeOwned};

use super::Role;

/// No answer takes longer.
const ANSWER_LIMIT: Duration = Duration::from_secs(120);

/// The argument that makes the benchmark's binary an end.
pub const ARGUMENT: &str = "end";

/// A running end; killed when dropped.
pub struct End {
    child: Child,
    asked: ChildStdin,
    answers: Receiver<String>,
}

impl End {
    /// Starts `program` as `role`; the first answer says that it is ready, and what others need to know.
    pub fn start<A: DeserializeOwned>(program: &Path, role: &Role) -> anyhow::Result<(Self, A)> {
        let mut child = Command::new(program)
            .arg(ARGUMENT)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("{} does not start", program.display()))?;
        let asked = child.stdin.take().context("its input is piped")?;
        let lines = BufReader::new(child.stdout.take().context("its output is piped")?).lines();
        let (send, answers) = sync_channel(1);
        // Ends with the child.
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        let mut end = Self { child, asked, answers };
        let ready = end.ask(role)?;
        Ok((end, ready))
    }

    /// Asks, and waits for the answer.
    pub fn ask<A: DeserializeOwned>(&mut self, question: &impl Serialize) -> anyhow::Result<A> {
        let line = serde_json::to_string(question)?;
        writeln!(self.asked, "{line}")?;
        let answer = self.answers.recv_timeout(ANSWER_LIMIT);
        let answer = answer.with_context(|| format!("no answer to {:.80}", line))?;
        let answer: Result<A, String> = serde_json::from_str(&answer)?;
        answer.map_err(anyhow::Error::msg)
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The next question; none when nobody asks any more.
pub fn read<Q: DeserializeOwned>() -> anyhow::Result<Option<Q>> {
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    Ok(Some(serde_json::from_str(&line)?))
}

/// Answers.
pub fn answer(answer: &anyhow::Result<impl Serialize>) -> anyhow::Result<()> {
    let told = answer.as_ref().map_err(|error| format!("{error:#}"));
    println!("{}", serde_json::to_string(&told)?);
    Ok(())
}

/// Answers every question with `reply`.
pub fn serve<Q: DeserializeOwned, A: Serialize>(
    ready: impl Serialize,
    mut reply: impl FnMut(Q) -> anyhow::Result<A>,
) -> anyhow::Result<()> {
    answer(&Ok(ready))?;
    while let Some(question) = read()? {
        answer(&reply(question))?;
    }
    Ok(())
}

/// CPU seconds of this process so far, all threads, ended ones too.
pub fn cpu_s() -> f64 {
    let used = clock_gettime(ClockId::ProcessCPUTime);
    used.tv_sec as f64 + used.tv_nsec as f64 / 1e9
}

/// The runtime of a node's process.
pub fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
}
