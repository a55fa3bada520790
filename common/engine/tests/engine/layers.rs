//! What a step tells of its layers while it runs.

use std::sync::{Arc, Mutex};

use baton_engine::EngineOptions;
use baton_kv::{BlockId, Checksum, ChecksumState, KvMemory, TokenId};

use crate::common::{Plan, blocks, greedy, model_path, opened, options};

const TOKENS: usize = 70;

/// The sum of one layer's KV of the first [`TOKENS`] positions, and whether all of it is zero.
fn layer(memory: &dyn KvMemory, layer: usize, table: &[BlockId]) -> (Checksum, bool) {
    let layout = memory.layout();
    let (mut sum, mut zero) = (ChecksumState::default(), true);
    for (index, &block) in table.iter().enumerate() {
        let tokens = layout.block_tokens.min(TOKENS - index * layout.block_tokens);
        let mut piece = vec![1; layout.valid_bytes(tokens) / layout.layers];
        memory.read(layer, block, tokens, &mut piece).unwrap();
        sum.update(&piece);
        zero &= piece.iter().all(|&byte| byte == 0);
    }
    (sum.finish(), zero)
}

#[test]
fn layers_are_told_once_each_when_they_are_complete_and_before_the_next_are() {
    let tokens: Vec<TokenId> = (0..TOKENS as u32).map(|i| (i * 31 + 7) % 49_152).collect();
    for threads in [1, 3] {
        let mut engine = opened(&EngineOptions {
            threads,
            ..options(&model_path())
        });
        let memory = engine.memory();
        let layers = memory.layout().layers;
        let table = blocks(0..memory.layout().blocks_for(TOKENS) as u32);
        let untold = Plan::default().span(&tokens, 0, &blocks(8..8 + table.len() as u32), greedy());
        let expected = untold.run(&mut *engine);

        let told = Arc::new(Mutex::new(Vec::new()));
        let (seen, read, places) = (told.clone(), memory.clone(), table.clone());
        engine.watch_layers(Box::new(move |layers| {
            let next = read.layout().layers > layers;
            let later = next.then(|| layer(&*read, layers, &places).1);
            seen.lock()
                .unwrap()
                .push((layers, layer(&*read, layers - 1, &places), later));
        }));
        let plan = Plan::default().span(&tokens, 0, &table, greedy());
        assert_eq!(plan.run(&mut *engine), expected, "{threads} threads");

        let told = std::mem::take(&mut *told.lock().unwrap());
        assert_eq!(told.len(), layers);
        for (index, (count, (sum, zero), later)) in told.into_iter().enumerate() {
            assert_eq!((count, zero), (index + 1, false), "{threads} threads");
            assert_eq!(sum, layer(&*memory, index, &table).0, "layer {index} was complete");
            assert_eq!(later, (count < layers).then_some(true), "layer {count} was not begun");
        }
    }
}

#[test]
fn every_step_is_told_of() {
    let mut engine = opened(&options(&model_path()));
    let layers = engine.memory().layout().layers;
    let told = Arc::new(Mutex::new(0));
    let count = told.clone();
    engine.watch_layers(Box::new(move |_| *count.lock().unwrap() += 1));
    for steps in 1..=3 {
        Plan::default()
            .span(&[1, 2, 3], 0, &blocks(0..1), greedy())
            .run(&mut *engine);
        assert_eq!(*told.lock().unwrap(), steps * layers);
    }
}
