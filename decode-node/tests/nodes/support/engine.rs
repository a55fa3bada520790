//! Engines: free, under the test's control, and one alone as the oracle.

use std::sync::{Arc, mpsc};

use baton_engine::{
    Engine, ModelSpec, StepError,
    simulated::{CostModel, SimulatedConfig, SimulatedEngine},
};
use baton_kv::{BlockId, KvIdentity, KvMemory, TokenId};
use baton_scheduler::{Sample, Sampled, SamplingParams, SequenceId, Span, StepOutput, StepPlan};

pub const BLOCK_TOKENS: usize = 8;
pub const BLOCKS: usize = 64;
pub const VOCABULARY: u32 = 1_000;

fn with_rows(rows: usize) -> SimulatedEngine {
    let config = SimulatedConfig {
        vocabulary: VOCABULARY as usize,
        context_length: 400,
        cost: CostModel::FREE,
        ..SimulatedConfig::default()
    };
    SimulatedEngine::new(config, BLOCK_TOKENS, BLOCKS, rows, 16)
}

/// Steps take no time.
pub fn simulated() -> SimulatedEngine {
    with_rows(64)
}

/// Each step waits for a message of the test's; an error is the step's result. Free once the test has dropped its end.
pub fn gated() -> (mpsc::SyncSender<Result<(), StepError>>, Box<dyn Engine>) {
    let (sender, gate) = mpsc::sync_channel(1_000);
    (
        sender,
        Box::new(Gated {
            engine: simulated(),
            gate,
        }),
    )
}

struct Gated {
    engine: SimulatedEngine,
    gate: mpsc::Receiver<Result<(), StepError>>,
}

impl Engine for Gated {
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
        self.gate.recv().unwrap_or(Ok(()))?;
        self.engine.step(plan, output)
    }
}

/// What an engine alone answers, greedily.
pub fn local(prompt: &[TokenId], count: usize) -> Vec<TokenId> {
    let drawn = local_with(prompt, count, SamplingParams::greedy());
    drawn.iter().map(|sampled| sampled.token).collect()
}

/// What an engine alone answers: the whole prompt in one step, then token after token.
pub fn local_with(prompt: &[TokenId], count: usize, params: SamplingParams) -> Vec<Sampled> {
    let mut engine = with_rows(400);
    let (mut output, mut answer) = (StepOutput::default(), Vec::new());
    let mut tokens = prompt.to_vec();
    let (mut context, mut next) = (0, prompt.to_vec());
    while answer.len() < count {
        let rows = next.len();
        let tables: Vec<BlockId> = (0..(context + rows).div_ceil(BLOCK_TOKENS) as u32)
            .map(BlockId)
            .collect();
        let span = Span {
            sequence: SequenceId(1),
            rows: 0..rows,
            context,
            table: 0..tables.len(),
            sample: Some(Sample {
                history: 0..tokens.len(),
                ..Sample::new(params.clone(), answer.len() as u32)
            }),
        };
        let plan = StepPlan {
            tokens: next,
            spans: vec![span],
            tables,
            history: tokens.clone(),
        };
        engine.step(&plan, &mut output).expect("a good plan");
        context += rows;
        let sampled = output.sampled[0];
        answer.push(sampled);
        tokens.push(sampled.token);
        next = vec![sampled.token];
    }
    answer
}
