use baton_engine::{Engine, ModelSpec, StepError};
use baton_kv::{KvIdentity, KvLayout, KvMemoryError};
use baton_scheduler::{StepOutput, StepPlan};
use tokio::sync::mpsc;

use super::*;
use crate::testing::*;

/// Says which blocks it is asked to prepare.
struct Recording {
    memory: Arc<dyn KvMemory>,
    asked: mpsc::Sender<Vec<BlockId>>,
}

impl KvMemory for Recording {
    fn layout(&self) -> &KvLayout {
        self.memory.layout()
    }
    fn blocks(&self) -> usize {
        self.memory.blocks()
    }
    fn read(&self, layer: usize, block: BlockId, tokens: usize, out: &mut [u8]) -> Result<(), KvMemoryError> {
        self.memory.read(layer, block, tokens, out)
    }
    fn write(&self, layer: usize, block: BlockId, tokens: usize, bytes: &[u8]) -> Result<(), KvMemoryError> {
        self.memory.write(layer, block, tokens, bytes)
    }
    fn prepare(&self, blocks: &[BlockId]) {
        let _ = self.asked.try_send(blocks.to_vec());
    }
}

struct RecordingEngine(Box<dyn Engine>, Arc<Recording>);

impl Engine for RecordingEngine {
    fn model(&self) -> &ModelSpec {
        self.0.model()
    }
    fn identity(&self) -> KvIdentity {
        self.0.identity()
    }
    fn memory(&self) -> Arc<dyn KvMemory> {
        self.1.clone()
    }
    fn step(&mut self, plan: &StepPlan, output: &mut StepOutput) -> Result<(), StepError> {
        self.0.step(plan, output)
    }
}

#[tokio::test]
async fn what_a_handoff_will_fill_is_prepared_once() {
    let (asked, mut prepared) = mpsc::channel(8);
    let memory = engine().memory();
    let engine = RecordingEngine(Box::new(engine()), Arc::new(Recording { memory, asked }));
    let (worker, _) = start(Box::new(engine), config());

    let reserve = |tokens, seed| {
        worker
            .reserve(work(&worker, prompt(tokens, seed), 4))
            .expect("reserved")
    };
    let blocks = |ticket: &baton_transfer::Ticket| ticket.slots.iter().map(|slot| slot.block).collect::<Vec<_>>();
    let (first, stream) = reserve(3 * BLOCK_TOKENS, 1);
    assert_eq!(soon("prepared", prepared.recv()).await, Some(blocks(&first)));
    drop(stream);
    idle(&worker).await;

    // The same three again, and two others.
    let (second, _stream) = reserve(5 * BLOCK_TOKENS, 2);
    let known = blocks(&first);
    let new: Vec<_> = blocks(&second)
        .into_iter()
        .filter(|block| !known.contains(block))
        .collect();
    assert!(new.len() < 5, "the pool gives out what came back: {second:?}");
    assert_eq!(soon("prepared", prepared.recv()).await, Some(new));
}
