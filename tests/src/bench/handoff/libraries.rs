//! Programs and libraries of others, each as it comes from its makers.

use std::{net::TcpListener, path::Path, process::Stdio, time::Duration};

use anyhow::Context;
use serde::Deserialize;
use tokio::{process::Command, time::timeout};

use super::runs::Runs;
use crate::workspace;

/// No program runs longer.
const RUN_LIMIT: Duration = Duration::from_secs(90);

/// How bytes get from one process to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Over {
    /// Sockets.
    Tcp,
    /// Memory that both see.
    Shm,
}

/// One setting of NIXL or Mooncake.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// As the table calls it.
    pub name: &'static str,
    /// How it gets there.
    pub over: Over,
    /// `nixl` or `mooncake`.
    pub library: &'static str,
    /// Its environment.
    pub env: &'static [(&'static str, &'static str)],
}

/// What came out for one block size.
#[derive(Debug)]
pub struct Outcome {
    /// The block.
    pub block_kib: usize,
    /// Its runs; why there are none.
    pub runs: Result<Runs, String>,
}

#[derive(Deserialize)]
struct Line {
    block_kib: Option<usize>,
    #[serde(default)]
    gbps: Vec<f64>,
    #[serde(default)]
    cpu_s_per_gb: Vec<f64>,
    error: Option<String>,
}

/// Runs a library's setting with `python`, WRITEs of so many MiB in blocks of each size.
pub async fn run(
    python: &Path,
    setting: &Setting,
    payload_mib: usize,
    repeats: usize,
    blocks_kib: &[usize],
) -> anyhow::Result<Vec<Outcome>> {
    let mut command = Command::new(python);
    command
        .arg(workspace().join("tests/python/transfer_speed.py"))
        .args([setting.library, &payload_mib.to_string(), &repeats.to_string()])
        .args(blocks_kib.iter().map(usize::to_string))
        .envs(setting.env.iter().copied());
    let lines: Vec<Line> = output(command)
        .await?
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?;
    let outcome = |line: Line| {
        let Line {
            block_kib,
            gbps,
            cpu_s_per_gb,
            error,
        } = line;
        let runs = error.map_or(Ok(Runs { gbps, cpu_s_per_gb }), Err);
        match block_kib {
            Some(block_kib) => Ok(Outcome { block_kib, runs }),
            // It does not even start.
            None => Err(anyhow::anyhow!(runs.err().unwrap_or_default())),
        }
    };
    lines.into_iter().map(outcome).collect()
}

/// GB/s of iperf3 over loopback for `seconds`, with writes of 1 MiB and so many streams.
pub async fn iperf3(streams: usize, seconds: usize) -> anyhow::Result<f64> {
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port().to_string();
    let mut server = Command::new("iperf3")
        .args(["-s", "-1", "-B", "127.0.0.1", "-p", &port])
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .context("iperf3 does not start")?;
    let asked = seconds.to_string();
    let streams = streams.to_string();
    let mut gbps = None;
    // The server says nowhere that it listens.
    for _ in 0..50 {
        let mut client = Command::new("iperf3");
        client.args(["-c", "127.0.0.1", "-p", &port, "-J", "-l", "1M", "-O", "0.5"]);
        client.args(["-t", &asked, "-P", &streams]);
        gbps = output(client).await.ok().and_then(|told| received(&told));
        if gbps.is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // It has ended after its one test, or is of no use.
    let _ = server.kill().await;
    gbps.context("it says no rate")
}

/// GB/s, of what iperf3 says at its end.
fn received(told: &str) -> Option<f64> {
    let told: serde_json::Value = serde_json::from_str(told).ok()?;
    let bits = told["end"]["sum_received"]["bits_per_second"].as_f64()?;
    Some(bits / 8e9)
}

async fn output(mut command: Command) -> anyhow::Result<String> {
    command.stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    let output = timeout(RUN_LIMIT, command.output())
        .await
        .context("it does not end")??;
    let text = String::from_utf8(output.stdout)?;
    // What it says of itself tells more than its exit status.
    anyhow::ensure!(
        output.status.success() || !text.is_empty(),
        "it ended with {}",
        output.status
    );
    Ok(text)
}
