//! Nodes in this process, each on a runtime of its own so that it can die, and a router's end written by hand.

#![allow(unreachable_pub)]

pub mod engine;
pub mod router;

use std::{collections::HashMap, time::Duration};

use baton_decode_node::DecodeConfig;
use baton_engine::Engine;
use baton_kv::{BlockName, NodeId, Salt, TokenId};
use baton_node::{Lifecycle, Phase, random};
use baton_prefill_node::PrefillConfig;
use baton_proto::node::v1::{self as pb, decode_client::DecodeClient, prefill_client::PrefillClient};
use baton_scheduler::SchedulerConfig;
use baton_transfer::path::{Preference, SlowPath};
use baton_worker::{Listeners, NodeConfig, NodeError};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    runtime::Runtime,
    task::JoinHandle,
};
use tonic::transport::Channel;

pub use engine::{BLOCK_TOKENS, BLOCKS, VOCABULARY, gated, local, local_with, simulated};
pub use router::Router;

/// Within a bound that only a defect reaches.
pub async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(20), future)
        .await
        .unwrap_or_else(|_| panic!("never: {what}"))
}

pub fn prompt(tokens: usize, seed: u32) -> Vec<TokenId> {
    (0..tokens as u32).map(|i| (i * 7 + seed * 131) % VOCABULARY).collect()
}

pub fn work(prompt: Vec<TokenId>, max_new_tokens: u32) -> pb::Work {
    let identity = simulated().identity();
    pb::Work {
        request_id: random::request_id().to_bytes().to_vec(),
        attempt: 1,
        prompt,
        output: vec![],
        max_new_tokens,
        stop_ids: vec![],
        sampling: Some(pb::Sampling {
            top_p: 1.0,
            seed: 1,
            repetition_penalty: 1.0,
            ..pb::Sampling::default()
        }),
        root: BlockName::root(&identity, &Salt([0; 32])).0.to_vec(),
        kv_identity: identity.0.to_vec(),
        deadline_ms: 60_000,
    }
}

/// A node in this process. Dropping it kills it.
pub struct TestNode {
    pub id: String,
    pub lifecycle: Lifecycle,
    address: String,
    ops: String,
    runtime: Option<Runtime>,
    ended: Option<JoinHandle<Result<(), NodeError>>>,
}

fn config(id: &str, router: &Router) -> NodeConfig {
    NodeConfig {
        grpc: ([127, 0, 0, 1], 0).into(),
        ops: ([127, 0, 0, 1], 0).into(),
        routers: vec![router.address()],
        node: NodeId(id.to_owned()),
        advertise: None,
        threads: 1,
        kv_bytes: 0,
        scheduler: SchedulerConfig {
            token_budget: 16,
            chunk_tokens: 16,
            max_running: 8,
            max_waiting: 8,
            max_context: usize::MAX,
            block_tokens: 0,
        },
        lease_ms: 10_000,
        handoff_drain_ms: 500,
        max_updates: 1_024,
        protocol_max: baton_proto::PROTOCOL_MAX,
        drain: Duration::from_secs(10),
        shm_dir: None,
        tls: None,
    }
}

impl TestNode {
    pub async fn decode(id: &str, router: &Router) -> Self {
        Self::decode_with(id, router, Box::new(simulated()), |_| {}).await
    }

    pub async fn prefill(id: &str, router: &Router) -> Self {
        Self::prefill_with(id, router, Box::new(simulated())).await
    }

    pub async fn decode_with(
        id: &str,
        router: &Router,
        engine: Box<dyn Engine>,
        change: impl FnOnce(&mut NodeConfig),
    ) -> Self {
        let mut node = config(id, router);
        change(&mut node);
        Self::start(node, router, move |node, lifecycle, listeners| {
            baton_decode_node::run(DecodeConfig { node }, engine, lifecycle, listeners)
        })
        .await
    }

    pub async fn prefill_with(id: &str, router: &Router, engine: Box<dyn Engine>) -> Self {
        Self::start(config(id, router), router, move |node, lifecycle, listeners| {
            baton_prefill_node::run(
                PrefillConfig {
                    node,
                    preference: Preference::Auto,
                    slow: SlowPath {
                        ratio: 0.25,
                        refuse: false,
                    },
                },
                engine,
                lifecycle,
                listeners,
            )
        })
        .await
    }

    async fn start<F>(
        config: NodeConfig,
        router: &Router,
        run: impl FnOnce(NodeConfig, Lifecycle, Listeners) -> F + Send + 'static,
    ) -> Self
    where
        F: Future<Output = Result<(), NodeError>> + Send + 'static,
    {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let (id, lifecycle) = (config.node.0.clone(), Lifecycle::new());
        let (life, (bound, addresses)) = (lifecycle.clone(), tokio::sync::oneshot::channel());
        // The runtime is the owner that its shutdown ends.
        #[allow(clippy::disallowed_methods)]
        let ended = runtime.spawn(async move {
            let listeners = Listeners::bind(&config).await?;
            let _ = bound.send(listeners.addresses()?);
            run(config, life, listeners).await
        });
        let (grpc, ops) = soon("bound", addresses).await.expect("bound");
        router.wait(&id, "ready", |node| node.phase() == pb::Phase::Ready).await;
        Self {
            id,
            lifecycle,
            address: grpc.to_string(),
            ops: ops.to_string(),
            runtime: Some(runtime),
            ended: Some(ended),
        }
    }

    async fn channel(&self) -> Channel {
        let endpoint = baton_node::grpc::endpoint(&self.address, None).expect("an address");
        endpoint.connect().await.expect("the node listens")
    }

    pub async fn decode_client(&self) -> DecodeClient<Channel> {
        DecodeClient::new(self.channel().await)
    }

    pub async fn prefill_client(&self) -> PrefillClient<Channel> {
        PrefillClient::new(self.channel().await)
    }

    pub async fn health(&self) -> tonic_health::pb::health_check_response::ServingStatus {
        let mut client = tonic_health::pb::health_client::HealthClient::new(self.channel().await);
        let request = tonic_health::pb::HealthCheckRequest { service: String::new() };
        client
            .check(request)
            .await
            .expect("health is served")
            .into_inner()
            .status()
    }

    /// Its metrics, now.
    async fn metrics(&self) -> HashMap<String, f64> {
        let mut stream = TcpStream::connect(&self.ops).await.expect("ops are served");
        let request = "GET /metrics HTTP/1.1\r\nhost: node\r\nconnection: close\r\n\r\n";
        stream.write_all(request.as_bytes()).await.expect("sent");
        let mut text = String::new();
        stream.read_to_string(&mut text).await.expect("an answer");
        let samples = text.lines().filter_map(|line| line.rsplit_once(' '));
        samples
            .filter_map(|(name, value)| Some((name.to_owned(), value.trim().parse().ok()?)))
            .collect()
    }

    /// Waits until a push fills blocks of it.
    pub async fn pushed_to(&self) {
        soon("a push", async {
            while self.metrics().await["baton_handoff_streams"] == 0.0 {}
        })
        .await
    }

    /// Handoffs that came to nothing for `reason`.
    pub async fn aborts(&self, reason: &str) -> f64 {
        let metrics = self.metrics().await;
        let name = format!("baton_handoff_aborts_total{{reason=\"{reason}\"}}");
        metrics.get(&name).copied().unwrap_or_default()
    }

    /// Waits until nothing is left of any request: asks until it is so.
    pub async fn idle(&self) {
        let none = |metrics: &HashMap<String, f64>, name: &str| metrics[name] == 0.0;
        let quiet = [
            "baton_scheduler_waiting",
            "baton_scheduler_running",
            "baton_handoffs",
            "baton_kv_blocks{state=\"held\"}",
            "baton_kv_blocks{state=\"granted\"}",
            "baton_kv_blocks{state=\"quarantined\"}",
        ];
        soon(&format!("{} idle", self.id), async {
            loop {
                let metrics = self.metrics().await;
                if quiet.iter().all(|name| none(&metrics, name)) {
                    let left =
                        ["free", "cached"].map(|state| metrics[&format!("baton_kv_blocks{{state=\"{state}\"}}")]);
                    assert_eq!(left[0] + left[1], metrics["baton_kv_blocks_total"]);
                    return;
                }
            }
        })
        .await
    }

    /// Its end, once it was told to drain or its engine was lost.
    pub async fn ended(&mut self) -> Result<(), NodeError> {
        let ended = self.ended.take().expect("asked once");
        soon("the node's end", ended).await.expect("it did not panic")
    }

    /// As if the process had been killed.
    pub fn kill(mut self) {
        self.runtime.take().expect("alive").shutdown_background();
    }

    pub fn drain(&self) {
        self.lifecycle.set(Phase::Draining);
    }
}

impl Drop for TestNode {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
