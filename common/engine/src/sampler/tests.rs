use baton_scheduler::{Sample, SamplingParams};
use proptest::prelude::*;

use super::{Drawn, SampleError, SamplerScratch, draw, math, philox};

mod goldens;
mod penalties;

fn sample(params: SamplingParams, index: u32) -> Sample {
    Sample::new(params, index)
}

/// Without a history: the token and its log-probability.
fn drawn(logits: &[f32], sample: &Sample, scratch: &mut SamplerScratch) -> (u32, f32) {
    let drawn = draw(logits, sample, &[], scratch).unwrap();
    (drawn.token, drawn.logprob)
}

fn warm(seed: u64) -> SamplingParams {
    SamplingParams {
        temperature: 1.0,
        seed,
        ..SamplingParams::greedy()
    }
}

fn tokens(logits: &[f32], params: SamplingParams, draws: u32) -> Vec<u32> {
    let mut scratch = SamplerScratch::default();
    (0..draws)
        .map(|index| drawn(logits, &sample(params.clone(), index), &mut scratch).0)
        .collect()
}

/// A vocabulary whose logits are spread like a model's: few likely tokens, a long tail, in a scrambled order.
fn spread(vocabulary: u32) -> Vec<f32> {
    (0..vocabulary)
        .map(|id| 12.0 - 1.7 * ((id.wrapping_mul(2_654_435_761) % vocabulary) as f32 + 1.0).ln())
        .collect()
}

/// softmax in f64 by the standard library.
fn softmax(logits: &[f32], temperature: f64) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = logits
        .iter()
        .map(|&x| (f64::from(x - max) / temperature).exp())
        .collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}

#[test]
fn philox_gives_the_authors_test_vectors() {
    for (counter, key, expected) in [
        ([0; 4], [0; 2], [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8]),
        (
            [u32::MAX; 4],
            [u32::MAX; 2],
            [0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD],
        ),
        (
            [0x243F_6A88, 0x85A3_08D3, 0x1319_8A2E, 0x0370_7344],
            [0xA409_3822, 0x299F_31D0],
            [0xD16C_FE09, 0x94FD_CCEB, 0x5001_E420, 0x2412_6EA1],
        ),
    ] {
        assert_eq!(philox::philox4x32(counter, key), expected);
    }
}

#[test]
fn randomness_depends_on_seed_choice_and_index() {
    let u = philox::uniform(7, 0, 0);
    assert_eq!(u, philox::uniform(7, 0, 0));
    for other in [
        philox::uniform(8, 0, 0),
        philox::uniform(7 | 1 << 40, 0, 0),
        philox::uniform(7, 1, 0),
        philox::uniform(7, 0, 1),
    ] {
        assert_ne!(u, other);
    }
}

#[test]
fn exp_and_ln_are_close_to_the_real_ones() {
    for step in 0..200_000u32 {
        let x = -(step as f32) * 87.0 / 200_000.0;
        let real = f64::from(x).exp();
        assert!((f64::from(math::exp(x)) / real - 1.0).abs() < 2.4e-7, "exp({x})");
    }
    assert_eq!(
        (
            math::exp(0.0),
            math::exp(-0.0),
            math::exp(f32::NEG_INFINITY),
            math::exp(-1e30)
        ),
        (1.0, 1.0, 0.0, 0.0)
    );
    for step in 1..200_000u32 {
        let x = f64::from(step).powi(2) / 77.0;
        assert!((math::ln(x) - x.ln()).abs() <= 1e-15 * x.ln().abs().max(1.0), "ln({x})");
    }
    assert_eq!(math::ln(1.0), 0.0);
}

#[test]
fn greedy_takes_the_lowest_id_among_the_highest() {
    for (logits, expected) in [
        (vec![1.0, 3.0, 3.0, 2.0], 1),
        (vec![-0.0, 0.0], 0),
        (vec![f32::NEG_INFINITY, -5.0], 1),
        (vec![7.0], 0),
        ([vec![0.0; 40], vec![1.0, 1.0]].concat(), 40),
    ] {
        assert_eq!(tokens(&logits, SamplingParams::greedy(), 1), [expected], "{logits:?}");
    }
}

#[test]
fn the_logprob_is_the_models_own_whatever_the_parameters() {
    let logits = spread(5_003);
    let expected = softmax(&logits, 1.0);
    let mut scratch = SamplerScratch::default();
    let filtered = SamplingParams {
        temperature: 0.7,
        top_k: 50,
        top_p: 0.9,
        min_p: 0.01,
        ..warm(3)
    };
    for params in [SamplingParams::greedy(), warm(5), filtered] {
        for index in 0..50 {
            let (token, logprob) = drawn(&logits, &sample(params.clone(), index), &mut scratch);
            assert!((f64::from(logprob) - expected[token as usize].ln()).abs() < 2e-6);
        }
    }
}

#[test]
fn results_are_the_same_bits_everywhere() {
    // Written down from one machine; any other must agree.
    let logits: Vec<f32> = (0..1000u32).map(|i| ((i * 7919) % 1000) as f32 / 100.0 - 5.0).collect();
    let params = SamplingParams {
        temperature: 0.8,
        top_k: 300,
        top_p: 0.95,
        min_p: 0.001,
        ..warm(0x1234_5678_9ABC_DEF0)
    };
    let mut scratch = SamplerScratch::default();
    let all: Vec<(u32, u32)> = (0..6)
        .map(|index| drawn(&logits, &sample(params.clone(), index), &mut scratch))
        .map(|(token, logprob)| (token, logprob.to_bits()))
        .collect();
    assert_eq!(all, GOLDEN);
}

const GOLDEN: [(u32, u32); 6] = [
    (766, 3231837314),
    (235, 3231606628),
    (136, 3231208168),
    (556, 3231627598),
    (236, 3233305320),
    (853, 3232822976),
];

#[test]
fn numbers_that_are_none_are_an_error() {
    for params in [SamplingParams::greedy(), warm(1)] {
        for bad in [f32::NAN, f32::INFINITY, -f32::NAN] {
            for at in [0, 5, 16, 33] {
                let mut logits = vec![0.5; 34];
                logits[at] = bad;
                let result = draw(&logits, &sample(params.clone(), 0), &[], &mut SamplerScratch::default());
                assert_eq!(result, Err(SampleError::NotFinite), "{bad} at {at}");
            }
        }
        for none in [vec![], vec![f32::NEG_INFINITY; 20]] {
            assert_eq!(
                draw(&none, &sample(params.clone(), 0), &[], &mut SamplerScratch::default()),
                Err(SampleError::NotFinite)
            );
        }
    }
}

#[test]
fn masked_tokens_are_never_drawn() {
    let mut logits = vec![f32::NEG_INFINITY; 100];
    logits[17] = -3.0;
    logits[80] = -3.0;
    let drawn = tokens(
        &logits,
        SamplingParams {
            temperature: 50.0,
            ..warm(2)
        },
        200,
    );
    assert!(drawn.iter().all(|token| [17, 80].contains(token)));
    assert!(drawn.contains(&17) && drawn.contains(&80));
}

/// The set of tokens that `draws` draws gave, ascending.
fn support(logits: &[f32], params: SamplingParams) -> Vec<u32> {
    let mut drawn = tokens(logits, params, 4_000);
    drawn.sort_unstable();
    drawn.dedup();
    drawn
}

#[test]
fn filters_keep_what_they_say() {
    // Probabilities 0.4, 0.3, 0.2, 0.06, 0.04, at ids 3, 0, 4, 2, 1.
    let mut logits = [0.0f32; 5];
    for (id, p) in [(3, 0.4f32), (0, 0.3), (4, 0.2), (2, 0.06), (1, 0.04)] {
        logits[id] = p.ln();
    }
    let check =
        |params: SamplingParams, expected: &[u32]| assert_eq!(support(&logits, params.clone()), expected, "{params:?}");
    check(warm(1), &[0, 1, 2, 3, 4]);
    check(SamplingParams { top_k: 1, ..warm(1) }, &[3]);
    check(SamplingParams { top_k: 3, ..warm(1) }, &[0, 3, 4]);
    check(SamplingParams { top_k: 5, ..warm(1) }, &[0, 1, 2, 3, 4]);
    check(SamplingParams { top_k: 500, ..warm(1) }, &[0, 1, 2, 3, 4]);
    check(SamplingParams { top_p: 0.0, ..warm(1) }, &[3]);
    check(SamplingParams { top_p: 0.39, ..warm(1) }, &[3]);
    check(SamplingParams { top_p: 0.41, ..warm(1) }, &[0, 3]);
    check(SamplingParams { top_p: 0.89, ..warm(1) }, &[0, 3, 4]);
    check(SamplingParams { min_p: 0.45, ..warm(1) }, &[0, 3, 4]);
    check(SamplingParams { min_p: 0.55, ..warm(1) }, &[0, 3]);
    check(SamplingParams { min_p: 1.0, ..warm(1) }, &[3]);
    // Top-p counts the mass that top-k and min-p leave: of 0.9, 0.7 is 0.778.
    check(
        SamplingParams {
            top_k: 3,
            top_p: 0.77,
            ..warm(1)
        },
        &[0, 3],
    );
    check(
        SamplingParams {
            top_k: 3,
            top_p: 0.79,
            ..warm(1)
        },
        &[0, 3, 4],
    );
    check(
        SamplingParams {
            min_p: 0.45,
            top_p: 0.77,
            ..warm(1)
        },
        &[0, 3],
    );
    check(
        SamplingParams {
            min_p: 0.45,
            top_p: 0.79,
            ..warm(1)
        },
        &[0, 3, 4],
    );
    // Temperature comes first: at 0.25 the probabilities go with the fourth power, 0.7 : 0.22 : 0.04 …
    check(
        SamplingParams {
            temperature: 0.25,
            min_p: 0.35,
            ..warm(1)
        },
        &[3],
    );
    check(
        SamplingParams {
            temperature: 0.01,
            ..warm(1)
        },
        &[3],
    );
}

#[test]
fn equals_at_the_edge_of_top_k_go_by_id() {
    let logits = [0.0, 1.0, 1.0, 1.0, 1.0];
    assert_eq!(support(&logits, SamplingParams { top_k: 2, ..warm(9) }), [1, 2]);
}

#[test]
fn frequencies_follow_the_probabilities() {
    let logits = spread(2_000);
    let draws = 40_000u32;
    for (temperature, top_k) in [(1.0, 0), (0.6, 0), (1.7, 0), (1.0, 40)] {
        let params = SamplingParams {
            temperature,
            top_k,
            ..warm(42)
        };
        let mut expected = softmax(&logits, f64::from(temperature));
        if top_k > 0 {
            let mut order: Vec<usize> = (0..expected.len()).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
            order[top_k as usize..].iter().for_each(|&id| expected[id] = 0.0);
            let kept: f64 = expected.iter().sum();
            expected.iter_mut().for_each(|p| *p /= kept);
        }
        let mut counts = vec![0u32; logits.len()];
        for token in tokens(&logits, params, draws) {
            counts[token as usize] += 1;
        }
        // One cell per token that is expected often enough, and one for the rest.
        let (mut chi, mut cells, mut rest) = (0.0, 0, (0.0, 0.0));
        for (&p, &count) in expected.iter().zip(&counts) {
            let wanted = p * f64::from(draws);
            if wanted >= 10.0 {
                chi += (f64::from(count) - wanted).powi(2) / wanted;
                cells += 1;
            } else {
                rest = (rest.0 + wanted, rest.1 + f64::from(count));
            }
        }
        if rest.0 >= 10.0 {
            chi += (rest.1 - rest.0).powi(2) / rest.0;
            cells += 1;
        } else if rest.0 == 0.0 {
            assert_eq!(rest.1, 0.0, "a token outside top-k was drawn");
        }
        // Mean and deviation of chi-square; 4 deviations above the mean is one in some ten thousand, and the seed is fixed.
        let freedom = f64::from(cells - 1);
        assert!(
            cells > 15 && chi < freedom + 4.0 * (2.0 * freedom).sqrt(),
            "T={temperature} k={top_k}: {chi} of {freedom}"
        );
    }
}

/// The rule written down plainly, with a full sort.
fn plain(logits: &[f32], sample: &Sample) -> u32 {
    let params = &sample.params;
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |id: usize| f64::from(math::exp((logits[id] - max) / params.temperature));
    let mut ids: Vec<usize> = (0..logits.len()).collect();
    ids.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap().then(a.cmp(&b)));
    ids.retain(|&id| weight(id) >= f64::from(params.min_p) && weight(id) > 0.0);
    if params.top_k > 0 {
        ids.truncate(params.top_k as usize);
    }
    let mass: f64 = ids.iter().map(|&id| weight(id)).sum();
    let mut kept = 0.0;
    let mut count = 0;
    for &id in &ids {
        kept += weight(id);
        count += 1;
        if params.top_p < 1.0 && kept >= f64::from(params.top_p) * mass {
            break;
        }
    }
    let target = philox::uniform(params.seed, params.choice, sample.index) * kept;
    let mut reached = 0.0;
    for &id in &ids[..count] {
        reached += weight(id);
        if reached > target {
            return id as u32;
        }
    }
    ids[0] as u32
}

proptest! {
    #[test]
    fn agrees_with_the_plain_rule(
        logits in prop::collection::vec((-80i32..80).prop_map(|x| x as f32 / 8.0), 1..700),
        temperature in 0.05f32..4.0,
        top_k in 0u32..800,
        top_p in 0.0f32..1.2,
        min_p in prop_oneof![Just(0.0f32), 0.0f32..1.0],
        seed: u64,
        choice: u32,
        index: u32,
    ) {
        let params = SamplingParams { temperature, top_k, top_p, min_p, seed, choice, ..SamplingParams::greedy() };
        let sample = Sample::new(params.clone(), index);
        let mut scratch = SamplerScratch::default();
        let first = drawn(&logits, &sample, &mut scratch);
        prop_assert_eq!(first.0, plain(&logits, &sample));
        // Whatever was drawn before, and with whatever buffers: the same draw.
        drawn(&[1.0, 2.0, 3.0], &Sample::new(params, index ^ 1), &mut scratch);
        prop_assert_eq!(drawn(&logits, &sample, &mut scratch), first);
    }
}
