//! Time to the first token through whole clusters, with the prompt computed elsewhere and handed over, and locally.

use std::time::{Duration, Instant};

use anyhow::Context;
use baton_proto::v1::{Timings, generate_event::Event, generation_client::GenerationClient};
use tonic::transport::Channel;

use crate::{Cluster, ClusterOptions, bench::median, client};

/// One answer, as the client and the cluster saw it, ms.
#[derive(Clone, Copy, Debug, Default)]
pub struct FirstToken {
    /// From the call to the first token's arrival.
    pub ttft_ms: f64,
    /// Waiting for nodes.
    pub queue_ms: f64,
    /// Computing.
    pub prefill_ms: f64,
    /// What was left to transfer when the first token was drawn.
    pub transfer_ms: f64,
}

/// Medians over pairs: the same prompt in both clusters, one after the other.
#[derive(Clone, Debug, Default)]
pub struct Pairs {
    handed_over: Vec<FirstToken>,
    local: Vec<FirstToken>,
}

impl Pairs {
    /// Median of what the handoff adds to a prompt's time to its first token, ms.
    pub fn added_ms(&self) -> f64 {
        let added = self.handed_over.iter().zip(&self.local);
        median(added.map(|(handed, local)| handed.ttft_ms - local.ttft_ms).collect())
    }

    /// The same without what the two differ in computing.
    pub fn exposed_ms(&self) -> f64 {
        let rest = |all: &[FirstToken]| median(all.iter().map(|one| one.ttft_ms - one.prefill_ms).collect());
        rest(&self.handed_over) - rest(&self.local)
    }

    /// Prints the parts, and how far the differences lie apart.
    pub fn show(&self, what: &str) {
        for (name, all) in [("handed over", &self.handed_over), ("local", &self.local)] {
            let part = |of: fn(&FirstToken) -> f64| median(all.iter().map(of).collect());
            println!(
                "  {what}, {name}: {:.2} ms = queue {:.2} + prefill {:.2} + exposed transfer {:.2} + the rest {:.2}",
                part(|one| one.ttft_ms),
                part(|one| one.queue_ms),
                part(|one| one.prefill_ms),
                part(|one| one.transfer_ms),
                part(|one| one.ttft_ms - one.queue_ms - one.prefill_ms - one.transfer_ms),
            );
        }
        let pairs = self.handed_over.iter().zip(&self.local);
        let mut added: Vec<f64> = pairs.map(|(handed, local)| handed.ttft_ms - local.ttft_ms).collect();
        added.sort_by(f64::total_cmp);
        println!(
            "  {what}: added {:.2} ms (quartiles {:.2} and {:.2} of {} pairs); without what they differ in computing {:.2} ms",
            self.added_ms(),
            added[added.len() / 4],
            added[added.len() * 3 / 4],
            added.len(),
            self.exposed_ms(),
        );
    }
}

/// Two clusters of real nodes: one hands over, one does not.
pub struct Clusters {
    handing_over: Cluster,
    local: Cluster,
    prompts: u32,
}

impl Clusters {
    /// Starts them, `threads` to a node; `prefill_args` are the prefill node's.
    pub fn start(threads: usize, prefill_args: &[&str]) -> Self {
        let options = |prefill| ClusterOptions {
            prefill,
            threads,
            prefill_args: prefill_args.iter().map(|&argument| argument.to_owned()).collect(),
            ..ClusterOptions::default()
        };
        Self {
            handing_over: Cluster::start(options(1)),
            local: Cluster::start(options(0)),
            prompts: 0,
        }
    }

    /// Prompts of so many tokens that nobody holds, each in both clusters; one pair to warm up.
    pub async fn pairs(&mut self, tokens: u32, pairs: usize) -> anyhow::Result<Pairs> {
        let mut handing_over = client::connect(&self.handing_over).await;
        let mut local = client::connect(&self.local).await;
        let mut out = Pairs::default();
        for pair in 0..=pairs {
            self.prompts += 1;
            let prompt: Vec<u32> = (0..tokens)
                .map(|at| (2_000 + 11 * at + 997 * self.prompts) % 40_000)
                .collect();
            let (handed, here) = if pair % 2 == 0 {
                let handed = first_token(&mut handing_over, &prompt).await?;
                (handed, first_token(&mut local, &prompt).await?)
            } else {
                let here = first_token(&mut local, &prompt).await?;
                (first_token(&mut handing_over, &prompt).await?, here)
            };
            if pair > 0 {
                out.handed_over.push(handed);
                out.local.push(here);
            }
        }
        Ok(out)
    }

    /// CPU seconds a second of the two nodes between which KV has crossed, with nothing to do, over `span`.
    pub fn idle_cpu(&self, span: Duration) -> anyhow::Result<f64> {
        let nodes = &self.handing_over.nodes;
        let used = || nodes.iter().map(|node| used_s(node.id())).sum::<anyhow::Result<f64>>();
        let (before, started) = (used()?, Instant::now());
        wait(span);
        Ok((used()? - before) / started.elapsed().as_secs_f64())
    }
}

/// CPU seconds of another process's living threads.
fn used_s(process: u32) -> anyhow::Result<f64> {
    let mut ns = 0.0;
    for thread in std::fs::read_dir(format!("/proc/{process}/task"))? {
        let text = std::fs::read_to_string(thread?.path().join("schedstat"))?;
        ns += text.split(' ').next().context("time on the CPU")?.parse::<f64>()?;
    }
    Ok(ns / 1e9)
}

/// Lets time pass in which others are watched doing nothing.
#[expect(
    clippy::disallowed_methods,
    reason = "what is measured is that nothing happens for so long"
)]
fn wait(span: Duration) {
    std::thread::sleep(span);
}

async fn first_token(client: &mut GenerationClient<Channel>, prompt: &[u32]) -> anyhow::Result<FirstToken> {
    let started = Instant::now();
    // Two, so that the first does not end the answer where it was drawn.
    let mut stream = client.generate(client::greedy(prompt, 2)).await?.into_inner();
    let mut ttft_ms = None;
    loop {
        let event = client::next(&mut stream)
            .await?
            .context("the answer ends with Finished")?;
        match event.event {
            Some(Event::Delta(_)) => {
                ttft_ms.get_or_insert(started.elapsed().as_secs_f64() * 1e3);
            }
            Some(Event::Finished(finished)) => {
                let Timings {
                    queue_ms,
                    prefill_ms,
                    transfer_ms,
                    ..
                } = finished.timings.context("timings")?;
                return Ok(FirstToken {
                    ttft_ms: ttft_ms.context("a token before the end")?,
                    queue_ms,
                    prefill_ms,
                    transfer_ms,
                });
            }
            _ => {}
        }
    }
}
