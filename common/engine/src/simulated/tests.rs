use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use baton_kv::BlockId;
use baton_scheduler::{Sample, Sampled, SamplingParams, SequenceId, Span, StepOutput, StepPlan};

use super::{CostModel, SimulatedConfig, SimulatedEngine};
use crate::{Engine, StepError};

const BLOCK: usize = 4;

fn engine(key: u64) -> SimulatedEngine {
    let config = SimulatedConfig {
        key,
        cost: CostModel::FREE,
        vocabulary: 1_000,
        ..SimulatedConfig::default()
    };
    SimulatedEngine::new(config, BLOCK, 64, 128, 8)
}

/// One span: `tokens[context..]` are computed, and a token is drawn.
fn add(plan: &mut StepPlan, sequence: u64, tokens: &[u32], context: usize, table: &[u32], params: SamplingParams) {
    let (row, first) = (plan.tokens.len(), plan.tables.len());
    plan.tokens.extend(&tokens[context..]);
    plan.tables.extend(table.iter().map(|&block| BlockId(block)));
    plan.spans.push(Span {
        sequence: SequenceId(sequence),
        rows: row..plan.tokens.len(),
        context,
        table: first..plan.tables.len(),
        sample: Some(Sample::new(params, 0)),
    });
}

fn step(engine: &mut SimulatedEngine, tokens: &[u32], context: usize, table: &[u32]) -> Sampled {
    let mut plan = StepPlan::default();
    add(&mut plan, 1, tokens, context, table, SamplingParams::greedy());
    run(engine, &plan)[0]
}

fn run(engine: &mut SimulatedEngine, plan: &StepPlan) -> Vec<Sampled> {
    let mut output = StepOutput::default();
    engine.step(plan, &mut output).unwrap();
    output.sampled
}

#[test]
fn chunks_batches_and_places_do_not_change_the_answer() {
    let tokens: Vec<u32> = (0..11).collect();
    let table = [5, 2, 9];
    let whole = step(&mut engine(1), &tokens, 0, &table);

    let mut chunked = engine(1);
    step(&mut chunked, &tokens[..3], 0, &table);
    step(&mut chunked, &tokens[..7], 3, &table);
    assert_eq!(step(&mut chunked, &tokens, 7, &table), whole);

    assert_eq!(step(&mut engine(1), &tokens, 0, &[1, 3, 0]), whole);

    let mut plan = StepPlan::default();
    add(&mut plan, 7, &[999, 1], 0, &[20], SamplingParams::greedy());
    add(&mut plan, 1, &tokens, 0, &table, SamplingParams::greedy());
    assert_eq!(run(&mut engine(1), &plan)[1], whole);

    assert_ne!(step(&mut engine(2), &tokens, 0, &table).token, whole.token);
    assert_ne!(engine(1).identity(), engine(2).identity());
}

#[test]
fn every_token_matters() {
    let tokens: Vec<u32> = (0..11).collect();
    let whole = step(&mut engine(1), &tokens, 0, &[0, 1, 2]);
    for at in 0..tokens.len() {
        let mut other = tokens.clone();
        other[at] += 500;
        assert_ne!(
            step(&mut engine(1), &other, 0, &[0, 1, 2]).token,
            whole.token,
            "token {at}"
        );
    }
}

#[test]
fn any_corrupt_or_misplaced_byte_changes_the_answer() {
    let tokens: Vec<u32> = (0..10).collect();
    let table = [5, 2, 9];
    let next = |engine: &mut SimulatedEngine| step(engine, &[&tokens[..], &[77]].concat(), 10, &table);
    let fresh = || {
        let mut engine = engine(1);
        step(&mut engine, &tokens, 0, &table);
        engine
    };
    let right = next(&mut fresh());

    let layout = *fresh().memory().layout();
    for (index, block) in [(0, 5), (1, 2), (2, 9)] {
        let valid = (tokens.len() - index * BLOCK).min(BLOCK);
        for layer in 0..layout.layers {
            let len = layout.valid_bytes(valid) / layout.layers;
            for byte in (0..len).step_by(3) {
                let mut engine = fresh();
                let memory = engine.memory();
                let mut piece = vec![0; len];
                memory.read(layer, BlockId(block), valid, &mut piece).unwrap();
                piece[byte] ^= 1;
                memory.write(layer, BlockId(block), valid, &piece).unwrap();
                assert_ne!(next(&mut engine), right, "block {block}, layer {layer}, byte {byte}");
            }
        }
    }

    // Two blocks exchanged.
    let mut engine = fresh();
    let wrong = [2, 5, 9];
    assert_ne!(step(&mut engine, &[&tokens[..], &[77]].concat(), 10, &wrong), right);
}

#[test]
fn handed_over_kv_gives_the_same_answer() {
    let tokens: Vec<u32> = (100..110).collect();
    let mut from = engine(1);
    step(&mut from, &tokens, 0, &[5, 2, 9]);
    let mut to = engine(1);
    let layout = *to.memory().layout();
    for (index, (source, target)) in [(5, 30), (2, 10), (9, 31)].into_iter().enumerate() {
        let valid = (tokens.len() - index * BLOCK).min(BLOCK);
        let mut piece = vec![0; layout.valid_bytes(valid) / layout.layers];
        for layer in 0..layout.layers {
            from.memory().read(layer, BlockId(source), valid, &mut piece).unwrap();
            to.memory().write(layer, BlockId(target), valid, &piece).unwrap();
        }
    }
    let longer = [&tokens[..], &[3]].concat();
    assert_eq!(
        step(&mut to, &longer, 10, &[30, 10, 31]),
        step(&mut from, &longer, 10, &[5, 2, 9])
    );
}

#[test]
fn sampling_depends_on_seed_choice_and_index_only_when_warm() {
    let drawn = |temperature, seed, choice| {
        let mut plan = StepPlan::default();
        let params = SamplingParams {
            temperature,
            seed,
            choice,
            ..SamplingParams::greedy()
        };
        add(&mut plan, 1, &[1, 2, 3], 0, &[0], params);
        run(&mut engine(1), &plan)[0].token
    };
    assert_eq!(drawn(0.0, 1, 0), drawn(0.0, 2, 3));
    assert_eq!(drawn(1.0, 1, 0), drawn(1.0, 1, 0));
    assert_ne!(drawn(1.0, 1, 0), drawn(1.0, 2, 0));
    assert_ne!(drawn(1.0, 1, 0), drawn(1.0, 1, 1));
}

#[test]
fn tokens_are_spread_over_the_vocabulary() {
    let mut counts = [0u32; 10];
    for first in 0..1_000 {
        let token = step(&mut engine(3), &[first], 0, &[0]).token;
        counts[token as usize / 100] += 1;
    }
    assert!(counts.iter().all(|&count| (60..150).contains(&count)), "{counts:?}");
}

#[test]
fn defective_plans_are_refused_and_harm_nothing() {
    let mut engine = engine(1);
    let mut good = StepPlan::default();
    add(&mut good, 1, &[1, 2, 3, 4, 5], 0, &[0, 1], SamplingParams::greedy());
    let before = run(&mut engine, &good);
    fn sample(plan: &mut StepPlan) -> &mut Sample {
        plan.history.resize(1, 0);
        plan.spans[0].sample.as_mut().unwrap()
    }
    fn params(plan: &mut StepPlan) -> &mut SamplingParams {
        Arc::make_mut(&mut plan.spans[0].sample.as_mut().unwrap().params)
    }
    type Spoil = fn(&mut StepPlan);
    let spoilt: [(&str, Spoil); 15] = [
        ("token", |plan| plan.tokens[2] = 1_000),
        ("block", |plan| plan.tables[1] = BlockId(64)),
        ("short table", |plan| plan.spans[0].table = 0..1),
        ("table outside", |plan| plan.spans[0].table = 0..3),
        ("rows outside", |plan| plan.spans[0].rows = 0..6),
        ("rows missing", |plan| plan.spans[0].rows = 0..4),
        ("no rows", |plan| plan.spans[0].rows = 0..0),
        ("context", |plan| plan.spans[0].context = usize::MAX),
        ("too many rows", |plan| plan.tokens.resize(129, 0)),
        ("token of the history", |plan| plan.history.push(1_000)),
        ("history outside", |plan| sample(plan).history = 0..2),
        ("history backwards", |plan| {
            sample(plan).history = Range { start: 1, end: 0 }
        }),
        ("history without the output", |plan| {
            sample(plan).index = 2;
            params(plan).presence_penalty = 1.0;
        }),
        ("bias outside", |plan| {
            params(plan).logit_bias = vec![(1, 1.0), (1_000, 1.0)]
        }),
        ("too many alternatives", |plan| params(plan).top_logprobs = 21),
    ];
    for (what, spoil) in spoilt {
        let mut plan = good.clone();
        spoil(&mut plan);
        let result = engine.step(&plan, &mut StepOutput::default());
        assert!(matches!(result, Err(StepError::Plan(_))), "{what}: {result:?}");
    }
    assert_eq!(run(&mut engine, &good), before);
}

#[test]
fn pieces_outside_the_pool_are_refused() {
    let memory = engine(1).memory();
    let mut piece = vec![0; memory.layout().layer_block_bytes()];
    assert!(memory.read(0, BlockId(63), BLOCK, &mut piece).is_ok());
    for (layer, block, tokens) in [(2, 0, BLOCK), (0, 64, BLOCK), (0, 0, BLOCK + 1), (0, 0, 1)] {
        assert!(memory.read(layer, BlockId(block), tokens, &mut piece).is_err());
        assert!(memory.write(layer, BlockId(block), tokens, &piece).is_err());
    }
}

#[test]
fn the_cost_model_adds_up_and_is_waited_for() {
    let cost = CostModel {
        step_us: 1_000.0,
        prefill_token_us: 10.0,
        decode_row_us: 500.0,
        context_token_us: 1.0,
    };
    let mut plan = StepPlan::default();
    add(&mut plan, 1, &[1; 9], 8, &[0, 1, 2], SamplingParams::greedy());
    add(&mut plan, 2, &[1; 4], 0, &[3], SamplingParams::greedy());
    // One decode row over 9 tokens of context; four prefill rows over 1 + 2 + 3 + 4.
    assert_eq!(cost.step_us(&plan), 1_000.0 + 500.0 + 9.0 + 40.0 + 10.0);

    let config = SimulatedConfig {
        cost,
        ..SimulatedConfig::default()
    };
    let mut engine = SimulatedEngine::new(config, BLOCK, 8, 16, 8);
    let start = Instant::now();
    run(&mut engine, &plan);
    assert!(start.elapsed() >= Duration::from_micros(1_559));
}
