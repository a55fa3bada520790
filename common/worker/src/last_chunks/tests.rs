use std::sync::mpsc as sync;

use baton_engine::{
    Engine, ModelSpec, StepError,
    simulated::{CostModel, SimulatedConfig, SimulatedEngine},
};
use baton_kv::{KvIdentity, KvMemory};
use baton_scheduler::{Role, StepOutput, StepPlan};

use super::*;
use crate::{SequenceStream, WorkerConfig, testing::*};

const LAYERS: usize = 4;

/// The simulated engine, which tells of as many layers as the test says, one message after the other, until the test says 0: then the step ends.
struct Telling {
    engine: SimulatedEngine,
    watch: Option<LayerWatch>,
    layers: sync::Receiver<usize>,
}

impl Engine for Telling {
    fn model(&self) -> &ModelSpec {
        self.engine.model()
    }
    fn identity(&self) -> KvIdentity {
        self.engine.identity()
    }
    fn memory(&self) -> Arc<dyn KvMemory> {
        self.engine.memory()
    }
    fn watch_layers(&mut self, watch: LayerWatch) {
        self.watch = Some(watch);
    }
    fn step(&mut self, plan: &StepPlan, output: &mut StepOutput) -> Result<(), StepError> {
        self.engine.step(plan, output)?;
        let watch = self.watch.as_ref().expect("the worker watches");
        self.layers.iter().take_while(|layers| *layers > 0).for_each(watch);
        Ok(())
    }
}

fn telling() -> (sync::SyncSender<usize>, Box<dyn Engine>) {
    let config = SimulatedConfig {
        vocabulary: 1_000,
        context_length: 400,
        layers: LAYERS,
        cost: CostModel::FREE,
        ..SimulatedConfig::default()
    };
    let (tell, layers) = sync::sync_channel(100);
    let engine = SimulatedEngine::new(config, BLOCK_TOKENS, BLOCKS, 64, 16);
    let watch = None;
    (tell, Box::new(Telling { engine, watch, layers }))
}

/// A worker that tells each time that `tokens` tokens' KV of two layers is complete.
fn config_of(engine: &dyn Engine, tokens: usize) -> WorkerConfig {
    WorkerConfig {
        layers_bytes: 2 * tokens * engine.memory().layout().token_bytes() / LAYERS,
        ..config()
    }
}

/// The next update, if it tells of layers: tokens, layers, blocks of the table, and whether it holds.
async fn layers(stream: &mut SequenceStream) -> Option<(usize, usize, usize, Option<HeldBlocks>)> {
    match next(stream).await.expect("an update") {
        Update::Layers {
            computed_tokens,
            layers,
            table,
            hold,
        } => Some((computed_tokens, layers, table.len(), hold)),
        _ => None,
    }
}

#[tokio::test]
async fn the_last_chunks_layers_are_told_before_its_step_ends() {
    let (tell, engine) = telling();
    let config = config_of(&*engine, 4);
    let (worker, _) = start(engine, config);
    // A chunk of two blocks, then one of half a block.
    let mut stream = worker
        .submit(work(&worker, prompt(20, 1), 1), Role::Prefill)
        .expect("taken");
    assert!(matches!(next(&mut stream).await, Ok(Update::Started { .. })));
    for layers in [1, 2, 4, 0] {
        tell.send(layers).expect("the engine waits");
    }
    assert!(
        matches!(
            next(&mut stream).await,
            Ok(Update::Computed {
                computed_tokens: 16,
                ..
            })
        ),
        "nothing of the first"
    );

    tell.send(1).expect("the engine waits");
    tell.send(2).expect("the engine waits");
    let (tokens, two, blocks, hold) = layers(&mut stream).await.expect("layers");
    assert_eq!((tokens, two, blocks, hold.is_some()), (20, 2, 3, true));
    assert_eq!(worker.load().held_reads, 1, "the block that the step completes");
    tell.send(3).expect("the engine waits");
    tell.send(4).expect("the engine waits");
    let (tokens, four, blocks, none) = layers(&mut stream).await.expect("layers");
    assert_eq!((tokens, four, blocks, none.is_some()), (20, 4, 3, false));

    tell.send(0).expect("the engine waits");
    assert!(matches!(
        next(&mut stream).await,
        Ok(Update::Computed {
            computed_tokens: 20,
            ..
        })
    ));
    assert!(matches!(next(&mut stream).await, Ok(Update::Token { .. })));
    assert!(matches!(next(&mut stream).await, Ok(Update::Finished { .. })));
    drop((stream, hold));
    idle(&worker).await;
}

#[tokio::test]
async fn a_reader_that_leaves_meanwhile_leaves_nothing_behind() {
    let (tell, engine) = telling();
    let config = config_of(&*engine, 4);
    let (worker, _) = start(engine, config);
    let mut stream = worker
        .submit(work(&worker, prompt(12, 1), 1), Role::Prefill)
        .expect("taken");
    assert!(matches!(next(&mut stream).await, Ok(Update::Started { .. })));
    tell.send(2).expect("the engine waits");
    let (.., hold) = layers(&mut stream).await.expect("layers");
    // It reads on, although its sequence has gone.
    drop(stream);
    tell.send(4).expect("the engine waits");
    tell.send(0).expect("the engine waits");
    let load = load_where(&worker, "gone", |load| {
        load.sequences == 0 && load.scheduler.running == 0
    })
    .await;
    assert_eq!((load.held_reads, load.pool.held), (2, 2), "{load:?}");
    drop(hold);
    idle(&worker).await;
}

#[tokio::test]
async fn a_small_chunk_and_a_decoding_prompt_are_not_told_of() {
    for (role, tokens) in [(Role::Prefill, 3), (Role::Decode, 12)] {
        let (tell, engine) = telling();
        // Layers of 4 tokens fill one update of two, those of 3 tokens need all four.
        let config = WorkerConfig {
            layers_bytes: config_of(&*engine, 4).layers_bytes * 3 / 2,
            ..config_of(&*engine, 4)
        };
        let (worker, _) = start(engine, config);
        let mut stream = worker.submit(work(&worker, prompt(tokens, 1), 1), role).expect("taken");
        for layers in [1, 2, 3, 4, 0] {
            tell.send(layers).expect("the engine waits");
        }
        loop {
            match next(&mut stream).await.expect("an update") {
                Update::Layers { layers, .. } => panic!("{layers} layers of {tokens} tokens, {role:?}"),
                Update::Finished { .. } => break,
                _ => {}
            }
        }
        drop(stream);
        idle(&worker).await;
    }
}
