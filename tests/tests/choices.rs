//! Several answers from one prompt: each as if drawn alone, over KV that is computed and handed over once.

mod reference;

use std::time::Duration;

use baton_proto::v1::{GenerateRequest, generate_event::Event};
use baton_tests::{Cluster, ClusterOptions, Role, client, http, leak};
use reference::Reference;

const IDLE: Duration = Duration::from_secs(15);

const STORY: &str = "Four friends sat around a table in the kitchen of an old house by the sea, and each of them had promised to tell a story before the \
    candle burnt down. Nobody wanted to begin. The wind pushed at the windows, the kettle sang, and somewhere above them a door closed by \
    itself. At last the youngest put down her cup, looked at the others one after another, and said in a low voice that she would";

fn several(n: u32, mut request: GenerateRequest) -> GenerateRequest {
    request.sampling.get_or_insert_default().n = Some(n);
    request
}

/// Prompt tokens that a node has computed, and found cached.
fn prompt_tokens(cluster: &mut Cluster, role: Role) -> (f64, f64) {
    let text = http::get(cluster.node(role, 0).http, "/metrics").body;
    let tokens = leak::samples(&text, "baton_tokens_total", "kind");
    let of = |kind: &str| tokens.get(kind).copied().unwrap_or(0.0);
    (of("prompt_computed"), of("prompt_cached"))
}

#[tokio::test(flavor = "multi_thread")]
async fn each_choice_is_as_if_drawn_alone_and_the_prompt_is_computed_once() {
    let mut cluster = Cluster::start(ClusterOptions::default());
    let mut reference = Reference::open();
    let mut api = client::connect(&cluster).await;
    // Two whole blocks of 32 tokens and a tail of 6.
    let prompt = reference.prompt(STORY, 70);
    let answers = client::choices(&mut api, several(3, client::sampled(&prompt, 20, 5))).await;
    let answers = answers.expect("three answers");
    for (answer, choice) in answers.iter().zip(0..) {
        let expected = reference.choice(&prompt, 20, Some(5), choice);
        assert_eq!(
            (&answer.ids, &answer.logprobs),
            (&expected.ids, &expected.logprobs),
            "choice {choice}"
        );
    }
    assert!(answers[0].ids != answers[1].ids && answers[1].ids != answers[2].ids);
    let served = |answer: &client::Answer| {
        let served = answer.finished.served.clone().expect("served");
        (served.prefill_node, served.decode_node, served.kv_blocks)
    };
    let local = || (String::new(), "decode-0".to_owned(), 0);
    let places: Vec<_> = answers.iter().map(served).collect();
    assert_eq!(
        places,
        [("prefill-0".to_owned(), "decode-0".to_owned(), 3), local(), local()]
    );
    let usage = answers.iter().map(|answer| answer.finished.usage.expect("usage"));
    let (prompts, completions): (Vec<u32>, Vec<u32>) = usage
        .map(|usage| (usage.prompt_tokens, usage.completion_tokens))
        .unzip();
    assert_eq!((prompts, completions), (vec![70, 0, 0], vec![20; 3]));
    cluster.assert_idle(IDLE);
    assert_eq!(prompt_tokens(&mut cluster, Role::Prefill), (70.0, 0.0));
    assert_eq!(
        prompt_tokens(&mut cluster, Role::Decode),
        (12.0, 128.0),
        "two tails, and four blocks that were there"
    );

    let alone = client::run(&mut api, client::sampled(&prompt, 20, 5))
        .await
        .expect("an answer");
    let again = client::choices(&mut api, several(3, client::sampled(&prompt, 20, 5))).await;
    let again = again.expect("three answers");
    let expected = reference.run(&prompt, 20, Some(5));
    assert_eq!((&alone.ids, &alone.logprobs), (&expected.ids, &expected.logprobs));
    for (first, again) in answers.iter().zip(&again) {
        assert_eq!((&first.ids, &first.logprobs), (&again.ids, &again.logprobs));
    }
    cluster.assert_idle(IDLE);
}

#[tokio::test(flavor = "multi_thread")]
async fn more_choices_than_blocks_wait_for_each_other() {
    // 256 KV tokens: 8 blocks, of which a choice of 70 + 40 tokens fills four.
    let mut cluster = Cluster::start(ClusterOptions {
        prefill: 0,
        kv_bytes: (256 * 23_040).to_string(),
        ..ClusterOptions::default()
    });
    let mut reference = Reference::open();
    let mut api = client::connect(&cluster).await;
    let prompt = reference.prompt(STORY, 70);
    let answers = client::choices(&mut api, several(8, client::sampled(&prompt, 40, 6))).await;
    for (answer, choice) in answers.expect("eight answers").iter().zip(0..) {
        let expected = reference.choice(&prompt, 40, Some(6), choice);
        assert_eq!(
            (&answer.ids, &answer.logprobs),
            (&expected.ids, &expected.logprobs),
            "choice {choice}"
        );
    }
    let answers = client::choices(&mut api, several(4, client::greedy(&prompt, 8))).await;
    let answers = answers.expect("four answers");
    assert!(
        answers.iter().all(|answer| answer.ids == answers[0].ids),
        "greedy ones are all equal"
    );
    cluster.assert_idle(IDLE);
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_frees_every_choice() {
    let mut cluster = Cluster::start(ClusterOptions::default());
    let reference = Reference::open();
    let mut api = client::connect(&cluster).await;
    let prompt = reference.prompt(STORY, 70);
    // While the first computes the prompt, once it has begun, and while all stream.
    for streaming in [0, 1, 3] {
        let request = several(3, client::sampled(&prompt, 1_000, 7));
        let mut stream = api.generate(request).await.expect("a stream").into_inner();
        let mut seen = std::collections::HashSet::new();
        while seen.len() < streaming {
            let event = client::next(&mut stream).await.expect("no error").expect("an event");
            if let Some(Event::Delta(delta)) = event.event {
                seen.insert(delta.choice);
            }
        }
        drop(stream);
        cluster.assert_idle(IDLE);
    }
}
