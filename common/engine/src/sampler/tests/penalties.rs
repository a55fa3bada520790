//! Bias, penalties and alternatives against the rules written down plainly.

use super::*;

/// What is asked for, and what came before.
#[derive(Clone, Debug)]
struct Case {
    logits: Vec<f32>,
    prompt: Vec<u32>,
    output: Vec<u32>,
    params: SamplingParams,
}

impl Case {
    fn tokens(&self) -> Vec<u32> {
        [&self.prompt[..], &self.output].concat()
    }

    fn sample(&self) -> Sample {
        sample(self.params.clone(), self.output.len() as u32)
    }

    fn draw(&self, scratch: &mut SamplerScratch) -> Drawn {
        let tokens = self.tokens();
        let history = self.params.history(&tokens, self.prompt.len());
        draw(&self.logits, &self.sample(), history, scratch).unwrap()
    }

    /// The logits that the token is drawn from: each token of the vocabulary on its own.
    fn adjusted(&self) -> Vec<f32> {
        let adjust = |(id, &logit): (u32, &f32)| {
            let params = &self.params;
            let bias = params.logit_bias.iter().find(|(token, _)| *token == id);
            let mut logit = logit + bias.map_or(0.0, |&(_, bias)| bias);
            if self.tokens().contains(&id) {
                logit = match logit {
                    logit if logit > 0.0 => logit / params.repetition_penalty,
                    logit => logit * params.repetition_penalty,
                };
            }
            let times = self.output.iter().filter(|&&token| token == id).count();
            logit -= params.frequency_penalty * times as f32;
            logit -= if times > 0 { params.presence_penalty } else { 0.0 };
            logit
        };
        (0..).zip(&self.logits).map(adjust).collect()
    }

    /// Ids by rank.
    fn ranked(&self) -> Vec<u32> {
        let mut ids: Vec<u32> = (0..self.logits.len() as u32).collect();
        let logit = |id: u32| self.logits[id as usize];
        ids.sort_by(|&a, &b| logit(b).partial_cmp(&logit(a)).unwrap().then(a.cmp(&b)));
        ids
    }
}

fn penalty() -> impl Strategy<Value = f32> {
    prop_oneof![1 => Just(0.0f32), 2 => -2.0f32..2.0]
}

fn case() -> impl Strategy<Value = Case> {
    let params = (
        prop_oneof![Just(0.0f32), 0.05f32..4.0],
        prop_oneof![Just(0u32), 1u32..50],
        prop_oneof![Just(1.0f32), 0.1f32..1.0],
        prop_oneof![Just(1.0f32), 0.3f32..3.0],
        penalty(),
        penalty(),
        prop::collection::btree_map(0u32..400, -100.0f32..100.0, 0..6),
        0u32..=20,
        any::<u64>(),
    )
        .prop_map(
            |(temperature, top_k, top_p, repetition, presence, frequency, bias, top_logprobs, seed)| SamplingParams {
                temperature,
                top_k,
                top_p,
                repetition_penalty: repetition,
                presence_penalty: presence,
                frequency_penalty: frequency,
                logit_bias: bias.into_iter().collect(),
                top_logprobs,
                ..warm(seed)
            },
        );
    // Few distinct numbers, so that there are equals; few distinct tokens, so that they repeat.
    let logits = prop::collection::vec((-40i32..40).prop_map(|x| x as f32 / 4.0), 1..400);
    let tokens = || prop::collection::vec(prop_oneof![3 => 0u32..12, 1 => 0u32..400], 0..40);
    (logits, tokens(), tokens(), params).prop_map(|(logits, mut prompt, mut output, mut params)| {
        let vocabulary = logits.len() as u32;
        for token in prompt.iter_mut().chain(&mut output) {
            *token %= vocabulary;
        }
        params.logit_bias.retain(|&(id, _)| id < vocabulary);
        Case {
            logits,
            prompt,
            output,
            params,
        }
    })
}

proptest! {
    #[test]
    fn agrees_with_the_plain_rules(case in case(), other in case()) {
        let mut scratch = SamplerScratch::default();
        let drawn = case.draw(&mut scratch);
        let adjusted = case.adjusted();
        let expected = if case.params.temperature > 0.0 {
            plain(&adjusted, &case.sample())
        } else {
            let best = adjusted.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            adjusted.iter().position(|&logit| logit == best).unwrap() as u32
        };
        prop_assert_eq!(drawn.token, expected);

        let probabilities = softmax(&case.logits, 1.0);
        let close = |id: u32, logprob: f32| (f64::from(logprob) - probabilities[id as usize].ln()).abs() < 4e-6;
        prop_assert!(close(drawn.token, drawn.logprob));
        let ranked = case.ranked();
        let wanted = (case.params.top_logprobs as usize).min(ranked.len());
        let ids: Vec<u32> = drawn.alternatives.iter().map(|&(id, _)| id).collect();
        prop_assert_eq!(&ids[..], &ranked[..wanted]);
        for &(id, logprob) in drawn.alternatives.iter() {
            prop_assert!(close(id, logprob));
            prop_assert!(id != drawn.token || logprob == drawn.logprob);
        }

        // Whatever was drawn before with the same buffers.
        other.draw(&mut scratch);
        prop_assert_eq!(case.draw(&mut scratch), drawn);
        // The prompt makes no difference to penalties of the output, nor alternatives to what is drawn.
        if case.params.repetition_penalty == 1.0 {
            let all = draw(&case.logits, &case.sample(), &case.tokens(), &mut scratch).unwrap();
            prop_assert_eq!(all, drawn);
        }
        let without = Case { params: SamplingParams { top_logprobs: 0, ..case.params.clone() }, ..case };
        let without = without.draw(&mut scratch);
        prop_assert_eq!((without.token, without.logprob, without.alternatives.len()), (drawn.token, drawn.logprob, 0));
    }
}

fn greedy_of(logits: &[f32], history: &[u32], index: u32, params: SamplingParams) -> u32 {
    let sample = sample(params, index);
    draw(logits, &sample, history, &mut SamplerScratch::default())
        .unwrap()
        .token
}

#[test]
fn numbers_beyond_all_sense_make_no_infinities() {
    let logits = [80.0, -80.0, 3.0, f32::NEG_INFINITY];
    for (penalty, expected) in [(f32::MIN_POSITIVE, 0), (f32::MAX, 2)] {
        let params = SamplingParams {
            repetition_penalty: penalty,
            ..SamplingParams::greedy()
        };
        assert_eq!(greedy_of(&logits, &[0, 1, 3], 0, params.clone()), expected, "{penalty}");
        let warm = SamplingParams {
            temperature: 1.0,
            ..params
        };
        assert_eq!(greedy_of(&logits, &[0, 1, 3], 0, warm), expected, "{penalty}");
    }
}

#[test]
fn what_cannot_be_drawn_stays_so_and_is_no_alternative() {
    let logits = [f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY, 0.5];
    let params = SamplingParams {
        repetition_penalty: 0.5,
        presence_penalty: -2.0,
        frequency_penalty: -2.0,
        logit_bias: vec![(2, 100.0)],
        top_logprobs: 4,
        ..SamplingParams::greedy()
    };
    let sample = sample(params, 2);
    let drawn = draw(&logits, &sample, &[0, 2, 0], &mut SamplerScratch::default()).unwrap();
    assert_eq!(drawn.token, 1);
    let ids: Vec<u32> = drawn.alternatives.iter().map(|&(id, _)| id).collect();
    assert_eq!(ids, [1, 3]);
}

#[test]
fn a_bias_bans_and_forces() {
    let logits = spread(1_000);
    let best = greedy_of(&logits, &[], 0, SamplingParams::greedy());
    let biased = |bias| SamplingParams {
        logit_bias: vec![bias],
        temperature: 1.0,
        ..warm(3)
    };
    for seed in 0..200 {
        let with = |bias| SamplingParams { seed, ..biased(bias) };
        assert_ne!(greedy_of(&logits, &[], 0, with((best, -100.0))), best);
        assert_eq!(greedy_of(&logits, &[], 0, with((999, 100.0))), 999);
    }
}
