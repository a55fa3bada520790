//! The same engine, alone, in this process, without scheduler, pool or network: what every cluster must answer, bit for bit.

use baton_engine::{Engine, EngineOptions, Source, open};
use baton_kv::BlockId;
use baton_scheduler::{Sample, SamplingParams, SequenceId, Span, StepOutput, StepPlan};
use baton_tests::default_model;
use baton_text::ModelText;

/// An engine and its tokenizer.
pub(crate) struct Reference {
    pub(crate) engine: Box<dyn Engine>,
    text: ModelText,
}

/// An answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Expected {
    /// Token ids.
    pub(crate) ids: Vec<u32>,
    /// Log-probabilities as bits.
    pub(crate) logprobs: Vec<u32>,
    /// Of each token the alternatives, if any, likewise.
    pub(crate) top_logprobs: Vec<Vec<(u32, u32)>>,
}

impl Reference {
    /// Opens the default model on two threads (the clusters under test use one).
    pub(crate) fn open() -> Self {
        let options = EngineOptions {
            source: Source::File(default_model()),
            threads: 2,
            isa: None,
            kv_bytes: 64 << 20,
            shared_pool: false,
            max_rows: 1_024,
            max_sequences: 1,
            panel_cache: None,
        };
        let engine = open(&options, &|_| {}).expect("the default model opens");
        Self {
            engine,
            text: ModelText::open(&default_model()).expect("the default model has a tokenizer"),
        }
    }

    /// The first `length` tokens of a text.
    pub(crate) fn prompt(&self, text: &str, length: usize) -> Vec<u32> {
        let ids = self.text.tokenizer.encode(text, false).expect("text");
        assert!(ids.len() >= length, "the text has {} tokens", ids.len());
        ids[..length].to_vec()
    }

    /// `seed`: as [`baton_tests::client::sampled`]; none: greedy.
    pub(crate) fn run(&mut self, prompt: &[u32], output: u32, seed: Option<u64>) -> Expected {
        self.choice(prompt, output, seed, 0)
    }

    /// The same of any choice.
    pub(crate) fn choice(&mut self, prompt: &[u32], output: u32, seed: Option<u64>, choice: u32) -> Expected {
        let params = seed.map_or_else(SamplingParams::greedy, |seed| SamplingParams {
            temperature: 0.9,
            top_k: 50,
            top_p: 0.95,
            seed,
            choice,
            ..SamplingParams::greedy()
        });
        self.run_with(prompt, output, params)
    }

    /// The whole prompt in one step, then one token a step.
    pub(crate) fn run_with(&mut self, prompt: &[u32], output: u32, params: SamplingParams) -> Expected {
        let mut expected = Expected {
            ids: Vec::new(),
            logprobs: Vec::new(),
            top_logprobs: Vec::new(),
        };
        let mut history = prompt.to_vec();
        let (mut context, mut rows) = (0, prompt.to_vec());
        for index in 0..output {
            let end = context + rows.len();
            let tables: Vec<BlockId> = (0..end.div_ceil(32) as u32).map(BlockId).collect();
            let span = Span {
                sequence: SequenceId(1),
                rows: 0..rows.len(),
                context,
                table: 0..tables.len(),
                sample: Some(Sample {
                    history: 0..history.len(),
                    ..Sample::new(params.clone(), index)
                }),
            };
            let plan = StepPlan {
                tokens: rows,
                spans: vec![span],
                tables,
                history: history.clone(),
            };
            let mut out = StepOutput::default();
            self.engine.step(&plan, &mut out).expect("a step");
            let sampled = out.sampled[0];
            expected.ids.push(sampled.token);
            expected.logprobs.push(sampled.logprob.to_bits());
            let alternatives = sampled.alternatives.iter();
            expected
                .top_logprobs
                .push(alternatives.map(|&(id, logprob)| (id, logprob.to_bits())).collect());
            history.push(sampled.token);
            (context, rows) = (end, vec![sampled.token]);
        }
        expected
    }
}
