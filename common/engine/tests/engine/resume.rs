//! A sequence whose output is known up to any index goes on as if it had never been interrupted: the same tokens, log-probabilities and alternatives.

use baton_scheduler::SamplingParams;

use crate::common::{Driver, Request, opened, options, tiny::Tiny};

#[test]
fn resumed_at_any_index_with_everything_that_sampling_has() {
    let folder = tempfile::tempdir().unwrap();
    let path = Tiny::default().file(&folder);
    let mut driver = Driver::new(opened(&options(&path)));
    let prompt: Vec<u32> = (0..37).map(|i| (i * 11 + 3) % 50).collect();
    let sampled = Request::penalised(&prompt, 30, 5);
    let greedy = Request {
        sampling: SamplingParams {
            temperature: 0.0,
            ..sampled.sampling.clone()
        },
        ..sampled.clone()
    };
    for request in [sampled, greedy] {
        let whole = driver.fresh(16).run_one(&request);
        let plain = Request {
            sampling: SamplingParams {
                temperature: request.sampling.temperature,
                ..Request::seeded(&prompt, 30, 5).sampling
            },
            ..request.clone()
        };
        let unpenalised = driver.fresh(16).run_one(&plain);
        assert!(
            whole.iter().zip(&unpenalised).any(|(a, b)| a.token != b.token),
            "penalties count"
        );
        let tokens: Vec<u32> = whole.iter().map(|drawn| drawn.token).collect();
        for index in 0..tokens.len() {
            let resumed = Request {
                output: tokens[..index].to_vec(),
                ..request.clone()
            };
            // With an empty pool, and with what the run before has left in it.
            assert_eq!(driver.fresh(16).run_one(&resumed), whole[index..], "from {index}");
            assert_eq!(
                driver.run_one(&resumed),
                whole[index..],
                "from {index}, with a prefix hit"
            );
        }
    }
}
