//! The engine, with its KV, panels and threads, gives the bits of the naive path, which has none of these.

use crate::common::{Drawn, Driver, Request, isas, model_path, opened, options, tiny::Tiny};
use baton_engine::{EngineOptions, Isa, naive::NaiveModel, sampler::SamplerScratch};
use baton_gguf::TensorType;
use baton_scheduler::Sample;

fn naive(model: &NaiveModel, request: &Request) -> Vec<Drawn> {
    let mut scratch = SamplerScratch::default();
    let mut tokens = request.prompt.clone();
    (0..request.tokens as u32)
        .map(|index| {
            let sample = Sample::new(request.sampling.clone(), index);
            let drawn = model.next(&tokens, &sample, &mut scratch).unwrap();
            tokens.push(drawn.token);
            drawn
        })
        .collect()
}

#[test]
fn tiny_models_of_every_type_agree() {
    use TensorType::{Bf16, F16, F32, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
    let base = Tiny::default();
    let models = [
        Tiny::of(&[Q4_1]),
        Tiny::of(&[Q4_0]),
        Tiny::of(&[Q8_0]),
        Tiny::of(&[F32]),
        Tiny::of(&[F16]),
        Tiny::of(&[Bf16]),
        Tiny::of(&[Q5_0]),
        Tiny::of(&[Q5_1]),
        Tiny::of(&[Q4K]),
        Tiny::of(&[Q5K]),
        Tiny::of(&[Q6K]),
        Tiny::of(&[Q4K, Q6K, Q5_0, Q5K, Bf16, Q8_0]),
        Tiny::of(&[Q8_0, Q4_1, F32, Q4_0, F16]),
        Tiny {
            tied: false,
            ..Tiny::of(&[Q8_0, Q4_1])
        },
        Tiny {
            kv_heads: 4,
            heads: 4,
            ..base.clone()
        },
        Tiny {
            kv_heads: 1,
            heads: 6,
            rope_dim: 8,
            ..base.clone()
        },
        Tiny {
            head_dim: 48,
            rope_dim: 48,
            layers: 1,
            ..base.clone()
        },
        Tiny {
            heads: 26,
            kv_heads: 2,
            ..base.clone()
        },
        Tiny {
            layers: 3,
            vocabulary: 64,
            feed_forward: 32,
            ..base.clone()
        },
        Tiny {
            architecture: "qwen2",
            ..base.clone()
        },
        // Wider heads than the residual has room for.
        Tiny {
            architecture: "qwen3",
            head_dim: 48,
            rope_dim: 48,
            tied: false,
            ..base.clone()
        },
        Tiny {
            rope_factors: true,
            ..base.clone()
        },
        // Within a tile, across one border, across two; more than any prompt here.
        Tiny {
            window: Some(1),
            ..base.clone()
        },
        Tiny {
            window: Some(7),
            ..base.clone()
        },
        Tiny {
            window: Some(33),
            heads: 6,
            kv_heads: 1,
            ..base.clone()
        },
        Tiny {
            window: Some(1000),
            rope_factors: true,
            ..base
        },
    ];
    for tiny in models {
        let folder = tempfile::tempdir().unwrap();
        let path = tiny.file(&folder);
        let model = NaiveModel::open(&path).unwrap();
        // Across the borders of KV tiles and blocks, and within one.
        for length in [1, 31, 32, 70] {
            let prompt: Vec<u32> = (0..length).map(|i| (i * 37 + 5) % tiny.vocabulary as u32).collect();
            for request in [
                Request::greedy(&prompt, 4),
                Request::seeded(&prompt, 4, 11),
                Request::penalised(&prompt, 4, 12),
            ] {
                let expected = naive(&model, &request);
                for isa in isas() {
                    let engine = opened(&options(&path).with_isa(isa));
                    assert_eq!(
                        Driver::new(engine).fresh(24).run_one(&request),
                        expected,
                        "{tiny:?}, {length} tokens, {isa}"
                    );
                }
            }
        }
    }
}

/// Across the borders of attention's partitions, which one thread takes in order and several threads share, with windows that begin within one, and with more
/// query heads of a KV head than a step takes.
#[test]
fn long_contexts_agree() {
    let base = Tiny::of(&[TensorType::Q4_1, TensorType::Q8_0]);
    let many = |heads, kv_heads| Tiny {
        heads,
        kv_heads,
        ..base.clone()
    };
    let window = |window| Tiny {
        window: Some(window),
        ..base.clone()
    };
    for tiny in [base.clone(), window(200), window(40), many(16, 1), many(26, 2)] {
        let folder = tempfile::tempdir().unwrap();
        let path = tiny.file(&folder);
        let model = NaiveModel::open(&path).unwrap();
        // Rows of one tile on both sides of a border, and of a window's.
        for length in [300, 470] {
            let prompt: Vec<u32> = (0..length).map(|i| (i * 37 + 5) % tiny.vocabulary as u32).collect();
            let request = Request::seeded(&prompt, 3, 5);
            let expected = naive(&model, &request);
            for (isa, threads) in isas()
                .into_iter()
                .zip([1, 2, 3].into_iter().cycle())
                .chain([(isas()[0], 2)])
            {
                let options = EngineOptions {
                    threads,
                    ..options(&path).with_isa(isa)
                };
                assert_eq!(
                    Driver::new(opened(&options)).fresh(24).run_one(&request),
                    expected,
                    "{tiny:?}, {length} tokens, {threads} threads, {isa}"
                );
            }
        }
    }
}

#[test]
fn the_default_model_agrees() {
    let path = model_path();
    let model = NaiveModel::open(&path).unwrap();
    let mut driver = Driver::new(opened(&options(&path)));
    // "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    let prompt = [1, 4093, 198, 21805, 2, 198, 1, 520, 9531, 198];
    for request in [
        Request::greedy(&prompt, 5),
        Request::seeded(&prompt, 3, 7),
        Request::penalised(&prompt, 3, 8),
    ] {
        assert_eq!(driver.run_one(&request), naive(&model, &request));
    }
}

trait WithIsa {
    fn with_isa(self, isa: Isa) -> Self;
}

impl WithIsa for baton_engine::EngineOptions {
    fn with_isa(self, isa: Isa) -> Self {
        Self { isa: Some(isa), ..self }
    }
}
