//! Resident memory of a process that runs the default model. A program of its own: other tests' memory would count.

#[path = "engine/common/mod.rs"]
#[allow(dead_code, reason = "shared with the engine's other tests")]
mod common;

use std::fs;

use baton_engine::{Engine, EngineOptions, LoadStage, open_file};
use common::{Plan, blocks, greedy, model_path, options};

/// Anonymous memory that this process has taken, bytes.
fn anonymous_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
}

/// Panels and KV and a quarter, whether the panels were packed or read, once every buffer has been used in full.
#[test]
fn resident_memory_is_panels_and_kv_and_little_more() {
    let (path, cache) = (model_path(), tempfile::tempdir().unwrap());
    for expected in [LoadStage::WritingCache, LoadStage::ReadingCache] {
        let options = EngineOptions {
            threads: 2,
            panel_cache: Some(cache.path().to_owned()),
            ..options(&path)
        };
        let before = anonymous_bytes();
        let last = std::sync::Mutex::new(None);
        let mut engine = open_file(&path, &options, &|progress| {
            *last.lock().unwrap() = Some(progress.stage)
        })
        .unwrap();
        assert_eq!(*last.lock().unwrap(), Some(expected));

        let (memory, tokens) = (engine.memory(), vec![7; 2 * options.max_rows]);
        let block_tokens = memory.layout().block_tokens;
        // Every block of the pool is filled, in steps of as many rows as there may be.
        let step_blocks = options.max_rows / block_tokens;
        for first in (0..memory.blocks() as u32).step_by(step_blocks) {
            let table = blocks(first..(first + step_blocks as u32).min(memory.blocks() as u32));
            let rows = table.len() * block_tokens;
            Plan::default()
                .span(&tokens[..rows], 0, &table, greedy())
                .run(&mut engine);
        }
        // And a step of as many sequences as there may be.
        let mut plan = Plan::default();
        for sequence in 0..options.max_sequences as u32 {
            plan = plan.span(&tokens[..block_tokens], 0, &blocks(sequence..sequence + 1), greedy());
        }
        plan.run(&mut engine);

        let taken = anonymous_bytes() - before;
        let kv = (memory.blocks() * memory.layout().block_bytes()) as u64;
        let panels = engine.model().weight_bytes;
        println!("{expected:?}: {taken} bytes taken, {panels} of panels, {kv} of KV");
        assert!(taken >= panels + kv, "all of it was used");
        assert!(
            taken <= (panels + kv) * 5 / 4,
            "{taken} bytes for {panels} of panels and {kv} of KV"
        );
    }
}
