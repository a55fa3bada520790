//! An engine under a test's control, and workers around it.

use std::{
    sync::{Arc, mpsc},
    time::Duration,
};

use baton_engine::{
    Engine, ModelSpec, StepError,
    simulated::{CostModel, SimulatedConfig, SimulatedEngine},
};
use baton_kv::{BlockName, KvIdentity, KvMemory, NodeId, RequestId, Salt, TokenId};
use baton_node::{Lifecycle, clock};
use baton_scheduler::{SamplingParams, SchedulerConfig, StepOutput, StepPlan};
use prometheus_client::registry::Registry;

use crate::{Load, SequenceError, SequenceStream, Update, Work, Worker, WorkerConfig, WorkerMetrics};

pub(crate) const BLOCK_TOKENS: usize = 8;
pub(crate) const BLOCKS: usize = 64;

/// What a [`Scripted`] engine does instead of its next step.
pub(crate) enum Script {
    Step,
    Fail(StepError),
    Panic,
}

/// The simulated engine, whose every step waits for a word of the test's (and runs freely once the test has dropped its end).
pub(crate) struct Scripted {
    engine: SimulatedEngine,
    script: Option<mpsc::Receiver<Script>>,
}

pub(crate) fn engine() -> SimulatedEngine {
    engine_with(BLOCKS)
}

/// With a pool of `blocks`; the model's context is 400 tokens.
pub(crate) fn engine_with(blocks: usize) -> SimulatedEngine {
    let config = SimulatedConfig {
        vocabulary: 1_000,
        context_length: 400,
        cost: CostModel::FREE,
        ..SimulatedConfig::default()
    };
    SimulatedEngine::new(config, BLOCK_TOKENS, blocks, 64, 16)
}

/// An engine that waits for the test at each step.
pub(crate) fn scripted() -> (mpsc::SyncSender<Script>, Box<dyn Engine>) {
    scripted_with(BLOCKS)
}

/// With a pool of `blocks`.
pub(crate) fn scripted_with(blocks: usize) -> (mpsc::SyncSender<Script>, Box<dyn Engine>) {
    let (sender, script) = mpsc::sync_channel(1_000);
    (
        sender,
        Box::new(Scripted {
            engine: engine_with(blocks),
            script: Some(script),
        }),
    )
}

impl Engine for Scripted {
    fn model(&self) -> &ModelSpec {
        self.engine.model()
    }

    fn identity(&self) -> KvIdentity {
        self.engine.identity()
    }

    fn memory(&self) -> Arc<dyn KvMemory> {
        self.engine.memory()
    }

    fn step(&mut self, plan: &StepPlan, output: &mut StepOutput) -> Result<(), StepError> {
        match self.script.as_ref().map(|script| script.recv()) {
            Some(Ok(Script::Fail(error))) => return Err(error),
            Some(Ok(Script::Panic)) => panic!("as the test wants it"),
            Some(Ok(Script::Step)) => {}
            Some(Err(_)) | None => self.script = None,
        }
        self.engine.step(plan, output)
    }
}

pub(crate) fn config() -> WorkerConfig {
    let scheduler = SchedulerConfig {
        token_budget: 16,
        chunk_tokens: 16,
        max_running: 8,
        max_waiting: 4,
        max_context: usize::MAX,
        block_tokens: 0,
    };
    WorkerConfig::new(NodeId("node-0".into()), "127.0.0.1:1".into(), scheduler)
}

pub(crate) fn start(engine: Box<dyn Engine>, config: WorkerConfig) -> (Worker, Lifecycle) {
    let lifecycle = Lifecycle::new();
    let metrics = WorkerMetrics::register(&mut Registry::default());
    let worker = Worker::start(engine, config, metrics, &lifecycle).expect("a thread");
    (worker, lifecycle)
}

pub(crate) fn work(worker: &Worker, prompt: Vec<TokenId>, max_new_tokens: usize) -> Work {
    let identity = worker.facts().identity;
    Work {
        request: RequestId(
            prompt
                .iter()
                .fold(1, |id: u128, &token| id.wrapping_mul(31).wrapping_add(token.into())),
        ),
        attempt: baton_kv::Attempt(1),
        root: BlockName::root(&identity, &Salt([0; 32])),
        identity,
        prompt,
        output: Vec::new(),
        max_new_tokens,
        stop_ids: Vec::new(),
        sampling: SamplingParams::greedy(),
        deadline: clock::now().after_ms(60_000),
    }
}

pub(crate) fn prompt(tokens: usize, seed: u32) -> Vec<TokenId> {
    (0..tokens as u32).map(|i| (i * 7 + seed * 131) % 1_000).collect()
}

/// Within a bound that only a defect reaches.
pub(crate) async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(20), future)
        .await
        .unwrap_or_else(|_| panic!("never: {what}"))
}

/// The next update.
pub(crate) async fn next(stream: &mut SequenceStream) -> Result<Update, SequenceError> {
    soon("an update", stream.next()).await
}

/// Reads to the end: the tokens, or the error.
pub(crate) async fn tokens(stream: &mut SequenceStream) -> Result<Vec<TokenId>, SequenceError> {
    let mut tokens = Vec::new();
    loop {
        match next(stream).await? {
            Update::Token { index, token, .. } => {
                assert_eq!(index as usize, tokens.len(), "no gap, no repeat");
                tokens.push(token);
            }
            Update::Finished { .. } => return Ok(tokens),
            _ => {}
        }
    }
}

/// Waits for a load that fits.
pub(crate) async fn load_where(worker: &Worker, what: &str, fits: impl Fn(&Load) -> bool) -> Load {
    let mut loads = worker.watch_load();
    let load = soon(what, loads.wait_for(|load| fits(load)))
        .await
        .expect("the worker lives");
    *load
}

/// Waits until nothing runs, and finds every block given back.
pub(crate) async fn idle(worker: &Worker) {
    let load = load_where(worker, "idle", Load::is_idle).await;
    assert_eq!(load.pool.free + load.pool.cached, load.pool.total, "{load:?}");
}
