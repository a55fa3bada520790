//! What the engine's tests share: models, and a driver of pool, scheduler and engine.

pub(crate) mod directory;
pub(crate) mod tiny;

use std::path::{Path, PathBuf};

pub(crate) use baton_engine::sampler::Drawn;
use baton_engine::{Engine, EngineOptions, Isa, LlamaEngine, Source, open, open_file};
use baton_kv::{BlockId, BlockName, Pool, Salt, TokenId};
use baton_scheduler::{
    Alternatives, NewSequence, Role, Sample, SamplingParams, Scheduler, SchedulerConfig, SequenceEvent, SequenceId,
    Span, Start, StepOutput, StepPlan,
};

/// The default model's file: `BATON_MODEL`, or where the Makefile puts it.
pub(crate) fn model_path() -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let path = match std::env::var_os("BATON_MODEL") {
        Some(path) => PathBuf::from(path),
        None => workspace.join(".models/SmolLM2-135M-Instruct.Q4_1.gguf"),
    };
    assert!(path.is_file(), "{} is missing: `make model` fetches it", path.display());
    path
}

/// Options for tests, which run side by side: one thread, 64 MiB of KV.
pub(crate) fn options(path: &Path) -> EngineOptions {
    EngineOptions {
        source: Source::File(path.to_owned()),
        threads: 1,
        isa: None,
        kv_bytes: 64 << 20,
        shared_pool: false,
        max_rows: 512,
        max_sequences: 16,
        panel_cache: None,
    }
}

pub(crate) fn opened(options: &EngineOptions) -> Box<dyn Engine> {
    open(options, &|_| {}).unwrap()
}

pub(crate) fn opened_file(path: &Path, options: &EngineOptions) -> LlamaEngine {
    open_file(path, options, &|_| {}).unwrap()
}

/// Instruction sets that this machine has.
pub(crate) fn isas() -> Vec<Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.available()).collect()
}

/// What to generate.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) prompt: Vec<TokenId>,
    pub(crate) tokens: usize,
    pub(crate) sampling: SamplingParams,
    /// The answer's beginning, if it is known: it is not drawn again.
    pub(crate) output: Vec<TokenId>,
}

impl Request {
    pub(crate) fn greedy(prompt: &[TokenId], tokens: usize) -> Self {
        Self {
            prompt: prompt.to_vec(),
            tokens,
            sampling: SamplingParams::greedy(),
            output: Vec::new(),
        }
    }

    pub(crate) fn seeded(prompt: &[TokenId], tokens: usize, seed: u64) -> Self {
        let sampling = SamplingParams {
            temperature: 0.9,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.02,
            seed,
            ..SamplingParams::greedy()
        };
        Self {
            sampling,
            ..Self::greedy(prompt, tokens)
        }
    }
}

impl Request {
    /// With every penalty, a bias and alternatives.
    pub(crate) fn penalised(prompt: &[TokenId], tokens: usize, seed: u64) -> Self {
        let seeded = Self::seeded(prompt, tokens, seed);
        let sampling = SamplingParams {
            repetition_penalty: 1.3,
            presence_penalty: 0.4,
            frequency_penalty: 0.7,
            logit_bias: vec![(0, -100.0), (3, 1.5), (40, 2.0)],
            top_logprobs: 20,
            ..seeded.sampling
        };
        Self { sampling, ..seeded }
    }
}

fn scheduler(engine: &dyn Engine, chunk_tokens: usize) -> Scheduler {
    Scheduler::new(SchedulerConfig {
        token_budget: 512,
        chunk_tokens,
        max_running: 16,
        max_waiting: 64,
        max_context: engine.model().context_length,
        block_tokens: engine.memory().layout().block_tokens,
    })
}

/// Pool, scheduler and engine, as a node drives them.
pub(crate) struct Driver {
    pub(crate) engine: Box<dyn Engine>,
    pub(crate) pool: Pool,
    pub(crate) scheduler: Scheduler,
    next: u64,
    /// Prompt tokens of the last `run` that were found in the pool.
    pub(crate) cached_tokens: usize,
}

impl Driver {
    /// With an empty pool.
    pub(crate) fn new(engine: Box<dyn Engine>) -> Self {
        let pool = Pool::new(engine.memory().blocks(), engine.memory().layout().block_tokens);
        let scheduler = scheduler(&*engine, 512);
        Self {
            engine,
            pool,
            scheduler,
            next: 0,
            cached_tokens: 0,
        }
    }

    /// Forgets what the pool holds, and runs in chunks of `chunk_tokens` from now on.
    pub(crate) fn fresh(&mut self, chunk_tokens: usize) -> &mut Self {
        self.pool = Pool::new(
            self.engine.memory().blocks(),
            self.engine.memory().layout().block_tokens,
        );
        self.scheduler = scheduler(&*self.engine, chunk_tokens);
        self
    }

    /// Runs all requests together to their ends.
    pub(crate) fn run(&mut self, requests: &[Request]) -> Vec<Vec<Drawn>> {
        let first = self.next;
        let root = BlockName::root(&self.engine.identity(), &Salt([0; 32]));
        for request in requests {
            let sequence = NewSequence {
                id: SequenceId(self.next),
                root,
                prompt: request.prompt.clone(),
                output: request.output.clone(),
                max_new_tokens: request.tokens,
                stop_ids: Vec::new(),
                sampling: request.sampling.clone(),
                role: Role::Decode,
                start: Start::Compute,
            };
            self.scheduler.submit(sequence, &self.pool).unwrap();
            self.next += 1;
        }
        self.cached_tokens = 0;
        let mut drawn = vec![Vec::new(); requests.len()];
        let (mut plan, mut output, mut events) = (StepPlan::default(), StepOutput::default(), Vec::new());
        while self.scheduler.plan(&mut self.pool, &mut plan, &mut events) {
            self.engine.step(&plan, &mut output).unwrap();
            self.scheduler.complete(&output, &mut self.pool, &mut events);
            for event in events.drain(..) {
                match event {
                    SequenceEvent::Token {
                        id,
                        token,
                        logprob,
                        alternatives: others,
                        ..
                    } => {
                        let mut alternatives = Alternatives::NONE;
                        others.iter().for_each(|&(id, logprob)| alternatives.push(id, logprob));
                        drawn[(id.0 - first) as usize].push(Drawn {
                            token,
                            logprob,
                            alternatives,
                        });
                    }
                    SequenceEvent::Started { cached_tokens, .. } => self.cached_tokens += cached_tokens,
                    _ => {}
                }
            }
        }
        for (drawn, request) in drawn.iter().zip(requests) {
            assert_eq!(request.output.len() + drawn.len(), request.tokens);
        }
        self.pool.check().unwrap();
        drawn
    }

    pub(crate) fn run_one(&mut self, request: &Request) -> Vec<Drawn> {
        self.run(std::slice::from_ref(request)).remove(0)
    }
}

/// A plan made by hand.
#[derive(Default)]
pub(crate) struct Plan(pub(crate) StepPlan);

impl Plan {
    /// Computes `tokens[context..]` of a sequence whose blocks are `table`; draws greedily after the last if `draw`.
    pub(crate) fn span(
        mut self,
        tokens: &[TokenId],
        context: usize,
        table: &[BlockId],
        sample: Option<Sample>,
    ) -> Self {
        let plan = &mut self.0;
        let (row, first) = (plan.tokens.len(), plan.tables.len());
        plan.tokens.extend(&tokens[context..]);
        plan.tables.extend(table);
        plan.spans.push(Span {
            sequence: SequenceId(plan.spans.len() as u64),
            rows: row..plan.tokens.len(),
            context,
            table: first..plan.tables.len(),
            sample,
        });
        self
    }

    pub(crate) fn run(&self, engine: &mut dyn Engine) -> Vec<Drawn> {
        let mut output = StepOutput::default();
        engine.step(&self.0, &mut output).unwrap();
        output
            .sampled
            .iter()
            .map(|sampled| Drawn {
                token: sampled.token,
                logprob: sampled.logprob,
                alternatives: sampled.alternatives,
            })
            .collect()
    }
}

/// The first token, greedily.
pub(crate) fn greedy() -> Option<Sample> {
    Some(Sample::new(SamplingParams::greedy(), 0))
}

pub(crate) fn blocks(range: std::ops::Range<u32>) -> Vec<BlockId> {
    range.map(BlockId).collect()
}
