//! Promise 1: the answer to a request does not depend on what runs beside it, on chunks, threads, the instruction set, prefix hits, or on where its KV
//! was computed. Bit for bit, tokens and log-probabilities.

use baton_engine::{Engine, EngineOptions, Isa, LlamaEngine};
use baton_gguf::TensorType;
use baton_kv::{BlockId, TokenId};
use proptest::prelude::*;

use crate::common::{
    Drawn, Driver, Plan, Request, blocks, greedy, isas, model_path, opened, opened_file, options, tiny::Tiny,
};

/// Requests with different prompts of these lengths: greedy, sampled, and with penalties in turn.
fn requests(lengths: &[usize], vocabulary: u32, tokens: usize) -> Vec<Request> {
    let request = |(index, &length): (usize, &usize)| {
        let token = |i: u32| (i * i * 31 + i * 7 + index as u32 * 1_009 + 17) % vocabulary;
        let prompt: Vec<TokenId> = (0..length as u32).map(token).collect();
        match index % 3 {
            0 => Request::greedy(&prompt, tokens),
            1 => Request::seeded(&prompt, tokens, index as u64),
            _ => Request::penalised(&prompt, tokens, index as u64),
        }
    };
    lengths.iter().enumerate().map(request).collect()
}

/// Each alone, whole prompts in one chunk, on an empty pool.
fn alone(driver: &mut Driver, requests: &[Request]) -> Vec<Vec<Drawn>> {
    requests
        .iter()
        .map(|request| driver.fresh(512).run_one(request))
        .collect()
}

#[test]
fn the_default_model_gives_the_same_bits_alone_and_in_a_batch_in_any_chunks_on_any_threads() {
    let path = model_path();
    let requests = requests(&[1, 5, 31, 32, 33, 64, 90, 200], 49_152, 6);
    let mut driver = Driver::new(opened(&options(&path)));
    let expected = alone(&mut driver, &requests);
    for threads in [2, 1, 3] {
        let mut driver = Driver::new(opened(&EngineOptions {
            threads,
            ..options(&path)
        }));
        for chunk in [512, 13] {
            assert_eq!(
                driver.fresh(chunk).run(&requests),
                expected,
                "{threads} threads, chunks of {chunk}"
            );
        }
        assert_eq!(
            alone(&mut driver, &requests[3..5]),
            expected[3..5],
            "{threads} threads, alone"
        );
    }
}

#[test]
fn the_default_model_gives_the_same_bits_on_every_instruction_set() {
    let path = model_path();
    let requests = requests(&[3, 40], 49_152, 3);
    let expected = alone(&mut Driver::new(opened(&options(&path))), &requests);
    for isa in isas() {
        let engine = opened(&EngineOptions {
            isa: Some(isa),
            ..options(&path)
        });
        assert_eq!(Driver::new(engine).fresh(16).run(&requests), expected, "{isa}");
    }
}

#[test]
fn the_default_model_gives_the_same_bits_after_a_prefix_hit() {
    let mut driver = Driver::new(opened(&options(&model_path())));
    let [short, long] = [70, 150].map(|length| requests(&[length], 49_152, 5).remove(0));
    assert_eq!(long.prompt[..70], short.prompt);
    let expected = alone(&mut driver, &[short.clone(), long.clone()]);

    driver.fresh(512);
    assert_eq!((driver.run_one(&short), driver.cached_tokens), (expected[0].clone(), 0));
    assert_eq!((driver.run_one(&long), driver.cached_tokens), (expected[1].clone(), 64));
    assert_eq!(
        (driver.run_one(&long), driver.cached_tokens),
        (expected[1].clone(), 128)
    );
    assert_eq!(
        (driver.run_one(&short), driver.cached_tokens),
        (expected[0].clone(), 64)
    );
}

#[test]
fn the_default_model_gives_the_same_bits_preempted_and_resumed_evicted_and_recomputed() {
    let path = model_path();
    let mut roomy = Driver::new(opened(&options(&path)));
    let requests = requests(&[20, 45, 70, 33], 49_152, 40);
    let expected = alone(&mut roomy, &requests);
    let kv_bytes = 7 * roomy.engine.memory().layout().block_bytes() as u64;
    let filler = Request::greedy(&(0..200).collect::<Vec<_>>(), 1);
    for (isa, threads, chunk) in [(None, 1, 512), (Some(Isa::Avx2).filter(|isa| isa.available()), 3, 13)] {
        let small = EngineOptions {
            isa,
            threads,
            kv_bytes,
            ..options(&path)
        };
        let mut driver = Driver::new(opened(&small));
        assert_eq!(
            driver.fresh(chunk).run(&requests),
            expected,
            "{threads} threads, chunks of {chunk}"
        );
        assert!(driver.scheduler.load().preemptions > 0, "there is room for all");

        let request = &requests[2];
        assert_eq!(driver.run_one(request), expected[2]);
        driver.run_one(&filler);
        assert_eq!(
            (driver.run_one(request), driver.cached_tokens),
            (expected[2].clone(), 0),
            "all was evicted"
        );
        assert_eq!(
            (driver.run_one(request), driver.cached_tokens),
            (expected[2].clone(), 64)
        );
    }
}

#[test]
fn the_default_model_gives_the_same_logits_in_any_chunks_and_batch_on_any_threads() {
    let path = model_path();
    let prompt = requests(&[75], 49_152, 1).remove(0).prompt;
    let other = requests(&[75, 40], 49_152, 1).remove(1).prompt;
    let bits = |engine: &LlamaEngine, index| {
        engine
            .logits(index)
            .iter()
            .map(|logit| logit.to_bits())
            .collect::<Vec<_>>()
    };
    let mut engine = opened_file(&path, &options(&path));
    Plan::default()
        .span(&prompt, 0, &blocks(0..3), greedy())
        .run(&mut engine);
    let expected = bits(&engine, 0);
    for threads in [1, 2, 3] {
        let mut engine = opened_file(
            &path,
            &EngineOptions {
                threads,
                ..options(&path)
            },
        );
        let (table, beside) = (blocks(5..8), blocks(1..3));
        for (context, end) in [(0, 31), (31, 38), (38, 74)] {
            Plan::default()
                .span(&prompt[..end], context, &table, None)
                .run(&mut engine);
        }
        Plan::default()
            .span(&other, 0, &beside, greedy())
            .span(&prompt, 74, &table, greedy())
            .run(&mut engine);
        assert!(bits(&engine, 1) == expected, "{threads} threads");
    }
}

/// Copies the KV of the first `tokens` positions from one engine's blocks to another's.
fn hand_over(from: &dyn Engine, source: &[BlockId], to: &dyn Engine, target: &[BlockId], tokens: usize) {
    assert_eq!(from.identity(), to.identity());
    let (from, to) = (from.memory(), to.memory());
    let layout = *from.layout();
    let pairs = source.iter().zip(target).take(layout.blocks_for(tokens));
    for (index, (&source, &target)) in pairs.enumerate() {
        let valid = (tokens - index * layout.block_tokens).min(layout.block_tokens);
        let mut piece = vec![0; layout.valid_bytes(valid) / layout.layers];
        for layer in 0..layout.layers {
            from.read(layer, source, valid, &mut piece).unwrap();
            to.write(layer, target, valid, &piece).unwrap();
        }
    }
}

/// Decodes `steps` tokens greedily after `tokens`, of which `context` are in the pool.
fn decode(engine: &mut dyn Engine, tokens: &[TokenId], context: usize, table: &[BlockId], steps: usize) -> Vec<Drawn> {
    let (mut tokens, mut context) = (tokens.to_vec(), context);
    (0..steps)
        .map(|_| {
            let drawn = Plan::default().span(&tokens, context, table, greedy()).run(engine)[0];
            context = tokens.len();
            tokens.push(drawn.token);
            drawn
        })
        .collect()
}

#[test]
fn kv_handed_over_in_the_middle_of_a_sequence_decodes_to_the_same_bits() {
    let options = options(&model_path());
    let mut local = opened(&options);
    let mut remote = opened(&EngineOptions {
        threads: 2,
        isa: Some(Isa::Avx2).filter(|isa| isa.available()),
        ..options
    });
    let prompt = requests(&[75], 49_152, 1).remove(0).prompt;
    let table = blocks(0..4);
    let expected = decode(&mut *local, &prompt, 0, &table, 12);

    // The prompt and five tokens on one engine, the rest on the other, in other blocks that held something else.
    let first = decode(&mut *remote, &prompt, 0, &table, 5);
    let tokens = [&prompt[..], &first.iter().map(|drawn| drawn.token).collect::<Vec<_>>()].concat();
    let elsewhere = [7, 2, 9, 4].map(BlockId);
    decode(&mut *local, &tokens[20..], 0, &elsewhere, 1);
    let computed = tokens.len() - 1;
    hand_over(&*remote, &table, &*local, &elsewhere, computed);
    let rest = decode(&mut *local, &tokens, computed, &elsewhere, 7);
    assert_eq!([first, rest].concat(), expected);
}

#[test]
fn a_wrong_byte_of_kv_changes_the_bits() {
    let folder = tempfile::tempdir().unwrap();
    let mut engine = opened(&options(&Tiny::default().file(&folder)));
    let prompt = requests(&[40], 200, 1).remove(0).prompt;
    let table = blocks(0..2);
    let right = decode(&mut *engine, &prompt, 0, &table, 1);
    let memory = engine.memory();
    let mut piece = vec![0; memory.layout().layer_block_bytes()];
    memory.read(1, table[0], 32, &mut piece).unwrap();
    // The high byte of an element: its sign.
    piece[1] ^= 0x80;
    memory.write(1, table[0], 32, &piece).unwrap();
    assert_ne!(decode(&mut *engine, &prompt, 39, &table, 1), right);
}

fn storage_types() -> impl Strategy<Value = Vec<TensorType>> {
    let all = [
        TensorType::Q4_1,
        TensorType::Q4_0,
        TensorType::Q8_0,
        TensorType::Q5_0,
        TensorType::Q5_1,
        TensorType::Q4K,
        TensorType::Q5K,
        TensorType::Q6K,
        TensorType::Bf16,
        TensorType::F16,
        TensorType::F32,
    ];
    prop::collection::vec(prop::sample::select(all.to_vec()), 1..4)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn tiny_models_give_the_same_bits_however_they_are_run(
        types in storage_types(),
        architecture in prop::sample::select(vec!["llama", "llama", "qwen2", "qwen3"]),
        window in prop::option::of(1u32..90),
        rope_factors: bool,
        seed: u64,
        lengths in prop::collection::vec(1usize..120, 1..9),
        runs in prop::collection::vec((1usize..5, prop::sample::select(isas()), 1usize..130), 1..4),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let window = window.filter(|_| architecture == "llama");
        let path = Tiny { seed, architecture, window, rope_factors, ..Tiny::of(&types) }.file(&folder);
        let requests = requests(&lengths, 203, 5);
        let portable = EngineOptions { threads: 1, isa: Some(Isa::Portable), ..options(&path) };
        let expected = alone(&mut Driver::new(opened(&portable)), &requests);
        for (threads, isa, chunk) in runs {
            let engine = opened(&EngineOptions { threads, isa: Some(isa), ..options(&path) });
            let mut driver = Driver::new(engine);
            prop_assert_eq!(driver.fresh(chunk).run(&requests), &expected[..], "{} threads, {}, chunks of {}", threads, isa, chunk);
            // Again, with whatever the pool kept.
            prop_assert_eq!(driver.run(&requests), &expected[..], "with prefix hits");
            // In a pool that holds little more than the longest: preempted, evicted and recomputed.
            let kv_bytes = 5 * driver.engine.memory().layout().block_bytes() as u64;
            let engine = opened(&EngineOptions { threads, isa: Some(isa), kv_bytes, ..options(&path) });
            let mut driver = Driver::new(engine);
            prop_assert_eq!(driver.fresh(chunk).run(&requests), &expected[..], "in a small pool");
            prop_assert_eq!(driver.run(&requests), &expected[..], "in a small pool, again");
        }
    }
}
