//! Starts with a cache of panels.

use std::{fs, path::Path, sync::Mutex};

use baton_engine::{Engine, EngineOptions, LlamaEngine, LoadStage, open_file};
use baton_gguf::TensorType;

use super::common::{Plan, blocks, directory::tiny_path, greedy, model_path, options, tiny::Tiny};

/// Opens a model; what was done for it.
fn opened(path: &Path, cache: Option<&Path>, threads: usize) -> (LlamaEngine, Vec<LoadStage>) {
    let options = EngineOptions {
        threads,
        panel_cache: cache.map(Path::to_owned),
        ..options(path)
    };
    let stages = Mutex::new(Vec::new());
    let engine = open_file(path, &options, &|progress| stages.lock().unwrap().push(progress.stage)).unwrap();
    let mut stages = stages.into_inner().unwrap();
    stages.dedup();
    (engine, stages)
}

fn logits(engine: &mut LlamaEngine) -> Vec<u32> {
    let vocabulary = engine.model().vocabulary as u32;
    let tokens: Vec<u32> = (1..60).map(|token| token % vocabulary).collect();
    Plan::default().span(&tokens, 0, &blocks(0..2), greedy()).run(engine);
    engine.logits(0).iter().map(|logit| logit.to_bits()).collect()
}

#[test]
fn a_second_start_neither_hashes_nor_packs_and_computes_the_same() {
    use LoadStage::{Hashing, Packing, ReadingCache, WritingCache};
    let (path, cache) = (model_path(), tempfile::tempdir().unwrap());
    let (mut without, stages) = opened(&path, None, 1);
    assert_eq!(stages, [Hashing, Packing]);
    let wanted = logits(&mut without);
    for (threads, expected) in [
        (2, &[Hashing, Packing, WritingCache][..]),
        (1, &[ReadingCache]),
        (2, &[ReadingCache]),
    ] {
        let (mut engine, stages) = opened(&path, Some(cache.path()), threads);
        assert_eq!(stages, expected);
        assert_eq!(engine.identity(), without.identity());
        assert_eq!(engine.model(), without.model());
        assert!(logits(&mut engine) == wanted);
    }
    // Safe to delete.
    fs::remove_dir_all(&cache).unwrap();
    assert_eq!(opened(&path, Some(cache.path()), 1).1, [Hashing, Packing, WritingCache]);
}

#[test]
fn damaged_panels_are_packed_anew() {
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("cache");
    for dtype in [TensorType::Q4_1, TensorType::Q6K, TensorType::Bf16] {
        let path = Tiny::of(&[dtype]).file(&folder);
        let (mut engine, _) = opened(&path, Some(&cache), 1);
        let wanted = logits(&mut engine);
        assert!(opened(&path, Some(&cache), 1).1.ends_with(&[LoadStage::ReadingCache]));
        for file in fs::read_dir(&cache).unwrap() {
            let file = file.unwrap().path();
            let mut bytes = fs::read(&file).unwrap();
            *bytes.last_mut().unwrap() ^= 0x10;
            fs::write(&file, bytes).unwrap();
        }
        // What was read before the damage was found leaves no trace.
        for expected in [LoadStage::WritingCache, LoadStage::ReadingCache] {
            let (mut engine, stages) = opened(&path, Some(&cache), 2);
            assert!(stages.ends_with(&[expected]), "{dtype}: {stages:?}");
            assert!(logits(&mut engine) == wanted, "{dtype}");
        }
    }
}

#[test]
fn a_sharded_directory_is_kept_as_one() {
    let (path, cache) = (tiny_path("mistral"), tempfile::tempdir().unwrap());
    let (mut engine, _) = opened(&path, Some(cache.path()), 1);
    let (mut again, stages) = opened(&path, Some(cache.path()), 2);
    assert!(stages.ends_with(&[LoadStage::ReadingCache]), "{stages:?}");
    assert_eq!(engine.identity(), again.identity());
    assert!(logits(&mut engine) == logits(&mut again));
}

#[test]
fn a_changed_model_is_another_model() {
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("cache");
    let path = Tiny::default().file(&folder);
    let (first, _) = opened(&path, Some(&cache), 1);
    let other = Tiny {
        seed: 2,
        ..Tiny::default()
    };
    assert_eq!(other.file(&folder), path, "in its place");
    let (mut second, stages) = opened(&path, Some(&cache), 1);
    assert!(stages.contains(&LoadStage::Packing));
    assert_ne!(second.identity(), first.identity());
    assert!(logits(&mut second) == logits(&mut opened(&path, None, 1).0));
}

#[test]
fn starts_at_the_same_time_compute_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("cache");
    let path = Tiny::default().file(&folder);
    let wanted = logits(&mut opened(&path, None, 1).0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..3 {
                    assert!(logits(&mut opened(&path, Some(&cache), 1).0) == wanted);
                }
            });
        }
    });
    assert!(opened(&path, Some(&cache), 1).1.ends_with(&[LoadStage::ReadingCache]));
}

#[test]
fn a_cache_that_cannot_be_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let path = Tiny::default().file(&folder);
    let (mut engine, stages) = opened(&path, Some(&path.join("below a file")), 1);
    assert_eq!(stages, [LoadStage::Hashing, LoadStage::Packing]);
    assert!(logits(&mut engine) == logits(&mut opened(&path, None, 1).0));
}
