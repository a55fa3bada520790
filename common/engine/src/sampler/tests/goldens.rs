//! Against transformers' logits processors (`tests/goldens/sampler.json`).

use std::{fs, path::Path};

use serde_json::Value;

use super::*;
use crate::sampler::adjust::Adjusted;

fn floats(value: &Value) -> Vec<f32> {
    let numbers = value.as_array().unwrap().iter();
    numbers.map(|number| number.as_f64().unwrap() as f32).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    let numbers = value.as_array().unwrap().iter();
    numbers.map(|number| number.as_u64().unwrap() as u32).collect()
}

fn params(asked: &Value) -> SamplingParams {
    let number = |name: &str, default: f64| asked[name].as_f64().unwrap_or(default) as f32;
    let bias = asked["logit_bias"].as_array().into_iter().flatten();
    SamplingParams {
        temperature: number("temperature", 0.0),
        top_k: asked["top_k"].as_u64().unwrap_or(0) as u32,
        top_p: number("top_p", 1.0),
        min_p: number("min_p", 0.0),
        repetition_penalty: number("repetition_penalty", 1.0),
        presence_penalty: number("presence_penalty", 0.0),
        frequency_penalty: number("frequency_penalty", 0.0),
        logit_bias: bias
            .map(|pair| (pair[0].as_u64().unwrap() as u32, pair[1].as_f64().unwrap() as f32))
            .collect(),
        top_logprobs: 20,
        ..warm(77)
    }
}

#[test]
fn adjusted_logits_are_transformers_bit_for_bit_and_draws_are_from_its_distribution() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/sampler.json");
    let golden: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 16);
    let mut scratch = SamplerScratch::default();
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let (logits, logprobs) = (floats(&case["logits"]), floats(&case["logprobs"]));
        let (prompt, output) = (ids(&case["prompt"]), ids(&case["output"]));
        let params = params(&case["params"]);
        let tokens = [&prompt[..], &output].concat();
        let history = params.history(&tokens, prompt.len());
        let sample = sample(params, output.len() as u32);

        let mut adjusted = Adjusted::default();
        let bits = |numbers: &[f32]| {
            numbers
                .iter()
                .map(|number| (number + 0.0).to_bits())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            bits(adjusted.fill(&logits, &sample, history)),
            bits(&floats(&case["adjusted"])),
            "{name}"
        );

        // By rank, each with its probability: a uniform number picks one of them, wherever it is not next to a border.
        let kept: Vec<(u32, f64)> = case["kept"]
            .as_array()
            .unwrap()
            .iter()
            .map(|pair| (pair[0].as_u64().unwrap() as u32, pair[1].as_f64().unwrap()))
            .collect();
        let mut checked = 0;
        for seed in 0..500 {
            let uniform = philox::uniform(seed, 0, sample.index);
            let mut reached = 0.0;
            let sums: Vec<f64> = kept
                .iter()
                .map(|&(_, probability)| {
                    reached += probability;
                    reached
                })
                .collect();
            if sums.iter().any(|sum| (sum - uniform).abs() < 1e-6) {
                continue;
            }
            let expected = kept[sums.iter().position(|&sum| sum > uniform).unwrap()].0;
            let seeded = Sample::new(
                SamplingParams {
                    seed,
                    ..(*sample.params).clone()
                },
                sample.index,
            );
            let drawn = draw(&logits, &seeded, history, &mut scratch).unwrap();
            assert_eq!(drawn.token, expected, "{name}, seed {seed}");
            assert!((drawn.logprob - logprobs[expected as usize]).abs() < 2e-6, "{name}");
            assert_eq!(drawn.alternatives.len(), 20);
            for (token, logprob) in drawn.alternatives.iter() {
                assert!((logprob - logprobs[*token as usize]).abs() < 2e-6, "{name}");
            }
            checked += 1;
        }
        assert!(checked > 490, "{name}: {checked}");
    }
}
