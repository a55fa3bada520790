//! llama.cpp, in a process of its own: its threads spin while they wait, and would take cores from whatever shares their process.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::Context;
use baton_kv::TokenId;
use serde_json::{Value, json};

use super::load::{Load, Series, Times};
use crate::workspace;

/// One model file in llama.cpp. Idle until asked; ends when dropped.
pub struct Peer {
    /// Its version and system info.
    pub about: String,
    /// `llama.cpp FORMAT`.
    name: String,
    child: Child,
    asked: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Peer {
    /// Loads `model`, whose weights are of `format`.
    pub fn start(python: &str, model: &Path, format: &str, threads: usize) -> anyhow::Result<Self> {
        let mut child = Command::new(python)
            .arg(workspace().join("tests/python/llama_cpp_speed.py"))
            .arg(model)
            .arg(threads.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("{python} does not start"))?;
        let mut peer = Self {
            about: String::new(),
            name: format!("llama.cpp {format}"),
            asked: child.stdin.take(),
            answers: BufReader::new(child.stdout.take().context("its output is piped")?),
            child,
        };
        let about = peer.answer()?;
        let said = |key: &str| about[key].as_str().unwrap_or("?").to_owned();
        peer.about = format!("llama-cpp-python {}: {}", said("version"), said("system_info"));
        Ok(peer)
    }

    /// Runs a load with and without flash attention, in batches of each of `batches` tokens, and adds what came out.
    pub fn run(&mut self, load: Load, batches: &[usize], series: &mut Series) -> anyhow::Result<()> {
        for flash in [false, true] {
            for &batch in batches {
                let mut asked = serde_json::to_value(load)?;
                asked["flash"] = flash.into();
                asked["batch"] = batch.into();
                let times: Times = serde_json::from_value(self.ask(&asked)?)?;
                let attention = if flash { "flash attention" } else { "no flash attention" };
                let who = format!("{}, {attention}, batches of {batch}", self.name);
                series.add(&who, load.rates(times));
            }
        }
        Ok(())
    }

    /// Perplexity of all tokens but the first, each predicted from all before it.
    pub fn perplexity(&mut self, tokens: &[TokenId]) -> anyhow::Result<f64> {
        self.ask(&json!({ "perplexity": tokens }))?["perplexity"]
            .as_f64()
            .context("a number")
    }

    fn ask(&mut self, asked: &Value) -> anyhow::Result<Value> {
        let stdin = self.asked.as_mut().context("it listens until it is dropped")?;
        writeln!(stdin, "{asked}")?;
        stdin.flush()?;
        self.answer()
    }

    fn answer(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("{} ended", self.name))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It ends at the end of its input, and may not be listening.
        self.asked = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Writes `model` into `folder` in llama.cpp's other formats: format → file. Says so where it refuses one.
pub fn requantise(python: &str, model: &Path, folder: &Path) -> anyhow::Result<BTreeMap<String, PathBuf>> {
    let output = Command::new(python)
        .arg(workspace().join("tests/python/llama_cpp_quantize.py"))
        .args([model, folder])
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("{python} does not start"))?;
    anyhow::ensure!(output.status.success(), "requantising failed: {}", output.status);
    let files: BTreeMap<String, Option<PathBuf>> = serde_json::from_slice(&output.stdout)?;
    Ok(files
        .into_iter()
        .filter_map(|(format, file)| {
            if file.is_none() {
                println!("llama.cpp does not write {format}: left out");
            }
            Some((format, file?))
        })
        .collect())
}
