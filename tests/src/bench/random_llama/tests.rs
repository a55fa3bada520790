use super::RandomLlama;
use crate::bench::{
    engine::{open, run},
    limits::Work,
    load::Load,
};

#[test]
fn a_random_llama_is_a_model_that_runs() {
    let small = RandomLlama {
        layers: 2,
        embedding: 128,
        feed_forward: 256,
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
        vocabulary: 40_000,
    };
    let folder = tempfile::tempdir().unwrap();
    let [one, other] = ["one.gguf", "other.gguf"].map(|name| folder.path().join(name));
    small.write(&one).unwrap();
    small.write(&other).unwrap();
    assert!(
        std::fs::read(&one).unwrap() == std::fs::read(&other).unwrap(),
        "two files"
    );
    let mut engine = open(&one, 1).unwrap();
    // A step whose logits are not finite fails.
    run(
        &mut engine,
        Load {
            prefill: 40,
            decode: 3,
            sequences: 2,
        },
    );
    let work = Work::of(&one, &engine).unwrap();
    let attention = 2 * 128 * 128 + 2 * 64 * 128;
    assert_eq!(work.layers, f64::from(2 * 2 * (attention + 3 * 256 * 128)));
    assert_eq!(work.head, 2.0 * 40_000.0 * 128.0);
    let logits = engine.logits(1);
    assert!(logits.iter().any(|&logit| logit != logits[0]));
}
