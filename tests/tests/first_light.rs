//! A real model answers through three processes, and its KV crosses between two of them, bit for bit.

mod reference;

use std::time::Duration;

use baton_proto::v1::{DetokenizeRequest, FinishReason, ListModelsRequest, TokenizeRequest, tokenize_request};
use baton_scheduler::SamplingParams;
use baton_tests::{Cluster, ClusterOptions, Role, client, http, leak};
use reference::Reference;

const IDLE: Duration = Duration::from_secs(15);

/// A prompt that fills several blocks and leaves a tail.
const STORY: &str = "The relay team had trained for months. On the morning of the race the air was cold and clear, and the four runners \
    stood together at the edge of the track, saying nothing. Each of them knew what had to be done: run as fast as you can, and then let go of \
    the baton at exactly the right moment. The first runner crouched at the line and looked straight ahead, past the crowd, past the \
    flags, to the place where the second runner would be waiting with one hand held out behind her. Nobody in the stadium was breathing";

#[tokio::test(flavor = "multi_thread")]
async fn handed_over_equals_local_bit_for_bit() {
    for transport in ["grpc", "shm"] {
        handed_over_equals_local(transport).await;
    }
}

async fn handed_over_equals_local(transport: &str) {
    let mut cluster = Cluster::start(ClusterOptions {
        prefill_args: vec!["--transport".to_owned(), transport.to_owned()],
        ..ClusterOptions::default()
    });
    let mut reference = Reference::open();
    let mut api = client::connect(&cluster).await;
    // Around a block's border (32 tokens), and longer; greedy and sampled; short and long answers.
    for (length, output, seed) in [
        (1, 40, None),
        (31, 5, Some(7)),
        (32, 3, None),
        (33, 40, Some(1)),
        (70, 2, Some(9)),
        (70, 1, None),
    ] {
        let prompt = reference.prompt(STORY, length);
        let request = seed.map_or_else(
            || client::greedy(&prompt, output),
            |seed| client::sampled(&prompt, output, seed),
        );
        let expected = reference.run(&prompt, output, seed);
        let answer = client::run(&mut api, request).await.expect("an answer");
        assert_eq!(answer.ids, expected.ids, "prompt of {length} tokens, seed {seed:?}");
        assert_eq!(
            answer.logprobs, expected.logprobs,
            "prompt of {length} tokens, seed {seed:?}"
        );
        let finished = &answer.finished;
        assert_eq!(finished.reason(), FinishReason::Length);
        let served = finished.served.clone().expect("served");
        assert_eq!(served.prefill_node, "prefill-0");
        if output > 1 {
            assert_eq!(
                (served.decode_node.as_str(), served.transport.as_str()),
                ("decode-0", transport)
            );
            assert!(served.kv_bytes > 0 && served.kv_blocks > 0, "{served:?}");
        } else {
            assert_eq!(
                (served.kv_bytes, served.decode_node.as_str()),
                (0, ""),
                "one token needs no handoff"
            );
        }
        let usage = finished.usage.expect("usage");
        assert_eq!(
            (usage.prompt_tokens as usize, usage.completion_tokens),
            (prompt.len(), output)
        );
        let timings = finished.timings.expect("timings");
        assert!(
            timings.prefill_ms > 0.0 && timings.ttft_ms >= timings.prefill_ms && timings.total_ms >= timings.ttft_ms,
            "{timings:?}"
        );
    }
    cluster.assert_idle(IDLE);
}

/// As [`client::penalised`].
fn penalised(seed: u64) -> SamplingParams {
    SamplingParams {
        temperature: 0.9,
        top_k: 50,
        top_p: 0.95,
        seed,
        repetition_penalty: 1.2,
        presence_penalty: 0.5,
        frequency_penalty: 0.25,
        logit_bias: (0..10).map(|id| (id, -100.0)).collect(),
        top_logprobs: 20,
        ..SamplingParams::greedy()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn penalties_bias_and_alternatives_are_the_same_handed_over_and_local() {
    let mut reference = Reference::open();
    let cases: Vec<_> = [(33, 24, 1), (70, 1, 2), (64, 24, 3)]
        .into_iter()
        .map(|(length, output, seed)| {
            let prompt = reference.prompt(STORY, length);
            let expected = reference.run_with(&prompt, output, penalised(seed));
            let unpenalised = reference.run(&prompt, output, Some(seed));
            assert!(output == 1 || expected.ids != unpenalised.ids, "penalties count");
            (prompt, output, seed, expected)
        })
        .collect();
    for prefill in [1, 0] {
        let mut cluster = Cluster::start(ClusterOptions {
            prefill,
            ..ClusterOptions::default()
        });
        let mut api = client::connect(&cluster).await;
        for (prompt, output, seed, expected) in &cases {
            let request = client::penalised(prompt, *output, *seed);
            let answer = client::run(&mut api, request).await.expect("an answer");
            let what = format!("{prefill} prefill nodes, a prompt of {}", prompt.len());
            assert_eq!(answer.ids, expected.ids, "{what}");
            assert_eq!(answer.logprobs, expected.logprobs, "{what}");
            assert_eq!(answer.top_logprobs, expected.top_logprobs, "{what}");
            assert!(answer.top_logprobs.iter().all(|top| top.len() == 20));
        }
        cluster.assert_idle(IDLE);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_hit_changes_the_time_and_not_the_tokens() {
    let mut cluster = Cluster::start(ClusterOptions::default());
    let mut reference = Reference::open();
    let mut api = client::connect(&cluster).await;
    let prompt = reference.prompt(STORY, 80);
    let expected = reference.run(&prompt, 20, Some(3));
    let first = client::run(&mut api, client::sampled(&prompt, 20, 3))
        .await
        .expect("an answer");
    let again = client::run(&mut api, client::sampled(&prompt, 20, 3))
        .await
        .expect("an answer");
    let cached = |answer: &client::Answer| answer.finished.usage.expect("usage").cached_tokens;
    assert_eq!(
        (cached(&first), cached(&again)),
        (0, 64),
        "two whole blocks of the 80 tokens"
    );
    for answer in [&first, &again] {
        assert_eq!((&answer.ids, &answer.logprobs), (&expected.ids, &expected.logprobs));
    }
    // The decode node holds the prompt's whole blocks too: only the tail travels the second time.
    let blocks = |answer: &client::Answer| answer.finished.served.clone().expect("served").kv_blocks;
    assert_eq!((blocks(&first), blocks(&again)), (3, 1));
    cluster.assert_idle(IDLE);
}

#[tokio::test(flavor = "multi_thread")]
async fn eight_at_once_on_two_and_two_nodes_answer_as_if_alone() {
    let options = ClusterOptions {
        prefill: 2,
        decode: 2,
        ..ClusterOptions::default()
    };
    let mut cluster = Cluster::start(options);
    let mut reference = Reference::open();
    let prompts: Vec<Vec<u32>> = (0..8)
        .map(|index| reference.prompt(&STORY[index * 3..], 20 + 7 * index))
        .collect();
    let expected: Vec<_> = prompts
        .iter()
        .map(|prompt| reference.run(prompt, 24, Some(11)))
        .collect();
    let api = client::connect(&cluster).await;
    let answers = futures_util::future::join_all(prompts.iter().map(|prompt| {
        let mut api = api.clone();
        async move {
            client::run(&mut api, client::sampled(prompt, 24, 11))
                .await
                .expect("an answer")
        }
    }))
    .await;
    for (answer, expected) in answers.iter().zip(&expected) {
        assert_eq!((&answer.ids, &answer.logprobs), (&expected.ids, &expected.logprobs));
    }
    cluster.assert_idle(IDLE);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decode_node_alone_serves_too() {
    let mut cluster = Cluster::start(ClusterOptions {
        prefill: 0,
        ..ClusterOptions::default()
    });
    let mut reference = Reference::open();
    let mut api = client::connect(&cluster).await;
    let prompt = reference.prompt(STORY, 50);
    let expected = reference.run(&prompt, 10, None);
    let answer = client::run(&mut api, client::greedy(&prompt, 10))
        .await
        .expect("an answer");
    assert_eq!((&answer.ids, &answer.logprobs), (&expected.ids, &expected.logprobs));
    let served = answer.finished.served.expect("served");
    assert_eq!(
        (
            served.prefill_node.as_str(),
            served.decode_node.as_str(),
            served.transport.as_str()
        ),
        ("", "decode-0", "local")
    );
    cluster.assert_idle(IDLE);
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_frees_both_legs() {
    let mut cluster = Cluster::start(ClusterOptions::default());
    let reference = Reference::open();
    let mut api = client::connect(&cluster).await;
    // While the prompt is computed (a long prompt, at once), and while tokens stream (after the third).
    for (length, events) in [(400, 1), (40, 4)] {
        let prompt = reference.prompt(&STORY.repeat(8), length);
        let mut stream = api
            .generate(client::greedy(&prompt, 500))
            .await
            .expect("a stream")
            .into_inner();
        for _ in 0..events {
            client::next(&mut stream).await.expect("no error").expect("an event");
        }
        drop(stream);
        cluster.assert_idle(IDLE);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_prompt_s_layers_leave_before_its_last_step_ends() {
    let mut cluster = Cluster::start(ClusterOptions::default());
    let mut reference = Reference::open();
    let mut api = client::connect(&cluster).await;
    let early = |cluster: &mut Cluster| {
        leak::total(
            &cluster.node(Role::Prefill, 0).metrics(),
            "baton_transfer_early_bytes_total",
        )
    };
    // A chunk of 256 tokens, and one that ends in the middle of a block.
    let prompt = reference.prompt(&STORY.repeat(5), 500);
    let answer = client::run(&mut api, client::greedy(&prompt, 4))
        .await
        .expect("an answer");
    let expected = reference.run(&prompt, 4, None);
    assert_eq!((answer.ids, answer.logprobs), (expected.ids, expected.logprobs));
    let served = answer.finished.served.expect("served");
    let early_bytes = early(&mut cluster);
    assert!(
        early_bytes > 0.0 && early_bytes < served.kv_bytes as f64,
        "{early_bytes} of {served:?}"
    );
    // One whose KV is less than is worth a word.
    client::run(&mut api, client::greedy(&prompt[..20], 4))
        .await
        .expect("an answer");
    assert_eq!(early(&mut cluster), early_bytes);
    cluster.assert_idle(IDLE);
}

#[tokio::test(flavor = "multi_thread")]
async fn text_tools_and_models() {
    let cluster = Cluster::start(ClusterOptions::default());
    let mut api = client::connect(&cluster).await;
    let text = "naïve café 👩‍🚀 <|not special|>";
    let input = Some(tokenize_request::Input::Text(text.to_owned()));
    let ids = api
        .tokenize(TokenizeRequest {
            input,
            ..TokenizeRequest::default()
        })
        .await
        .expect("ids")
        .into_inner()
        .ids;
    let back = api
        .detokenize(DetokenizeRequest {
            ids,
            ..DetokenizeRequest::default()
        })
        .await
        .expect("text")
        .into_inner();
    assert_eq!(back.text, text);
    let models = api
        .list_models(ListModelsRequest {})
        .await
        .expect("models")
        .into_inner()
        .models;
    assert_eq!(models.len(), 1);
    assert_eq!(
        (models[0].id.as_str(), models[0].context_length, models[0].vocabulary),
        ("SmolLM2-135M-Instruct", 8192, 49152)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_string_ends_the_answer_and_the_nodes_are_told() {
    let mut cluster = Cluster::start(ClusterOptions::default());
    let mut api = client::connect(&cluster).await;
    let whole = client::run(&mut api, client::text(STORY, 30)).await.expect("an answer");
    // A stop string that begins in the middle of the answer and crosses a token's border.
    let start = whole.text.char_indices().nth(20).expect("a long answer").0;
    let stop: String = whole.text[start..].chars().take(9).collect();
    let mut request = client::text(STORY, 2_000);
    request.stopping.as_mut().expect("stopping").stop = vec![stop.clone()];
    let answer = client::run(&mut api, request).await.expect("an answer");
    let expected = &whole.text[..whole.text.find(&stop).expect("it occurs")];
    assert_eq!(answer.text, expected);
    assert_eq!(answer.finished.reason(), FinishReason::Stop);
    cluster.assert_idle(IDLE);
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_tell_what_happened() {
    let mut cluster = Cluster::start(ClusterOptions::default());
    let mut api = client::connect(&cluster).await;
    let answer = client::run(&mut api, client::text(STORY, 12)).await.expect("an answer");
    let bytes = answer.finished.served.clone().expect("served").kv_bytes as f64;
    cluster.assert_idle(IDLE);
    let router = http::get(cluster.router.http, "/metrics").body;
    let count = |name: &str| leak::total(&router, name);
    assert_eq!(count("baton_requests_total"), 1.0);
    assert_eq!(count("baton_ttft_seconds_count"), 1.0);
    assert_eq!(count("baton_inter_token_seconds_count"), 11.0);
    let stages = leak::samples(&router, "baton_ttft_stage_seconds_count", "stage");
    for stage in ["queue", "prefill", "transfer", "first_step"] {
        assert_eq!(stages.get(stage), Some(&1.0), "{stage} in {stages:?}");
    }
    for (role, direction) in [(Role::Prefill, "sent"), (Role::Decode, "received")] {
        let text = http::get(cluster.node(role, 0).http, "/metrics").body;
        let moved = leak::samples(&text, "baton_transfer_bytes_total", "direction");
        assert_eq!(moved.get(direction), Some(&bytes), "{role:?}: {moved:?}");
    }
    for process in std::iter::once(&cluster.router).chain(&cluster.nodes) {
        assert_eq!(http::get(process.http, "/health").status, 200);
        assert_eq!(http::get(process.http, "/ready").status, 200);
    }
}
