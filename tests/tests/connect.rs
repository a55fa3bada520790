//! What two nodes settle when they first meet: versions, transports, and how fast the way is.

mod reference;

use baton_tests::{Cluster, ClusterOptions, Role, client, leak};
use reference::Reference;

const STORY: &str =
    "A lighthouse keeper counts the ships that pass, and writes each of them into a book that nobody reads. ";

fn args(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_work_together_and_only_the_newer_ones_probe() {
    let mut reference = Reference::open();
    let prompt = reference.prompt(&STORY.repeat(5), 70);
    let expected = reference.run(&prompt, 8, Some(5));
    for (prefill, decode, probed) in [
        ("", "", true),
        ("--protocol-max 1", "", false),
        ("", "--protocol-max 1", false),
    ] {
        let mut cluster = Cluster::start(ClusterOptions {
            prefill_args: args(prefill),
            decode_args: args(decode),
            ..ClusterOptions::default()
        });
        let mut api = client::connect(&cluster).await;
        let answer = client::run(&mut api, client::sampled(&prompt, 8, 5))
            .await
            .expect("an answer");
        assert_eq!((&answer.ids, &answer.logprobs), (&expected.ids, &expected.logprobs));
        let served = answer.finished.served.expect("served");
        assert_eq!(
            (served.prefill_node.as_str(), served.decode_node.as_str()),
            ("prefill-0", "decode-0")
        );
        let metrics = cluster.node(Role::Prefill, 0).metrics();
        let rates = leak::samples(&metrics, "baton_handoff_probe_bytes_per_second", "transport");
        assert_eq!(
            rates.get("grpc").is_some_and(|rate| *rate > 0.0),
            probed,
            "{prefill}/{decode}: {rates:?}"
        );
        // The prefill node's last word may come after the answer's end.
        let kinds = leak::samples(&cluster.router.metrics(), "baton_handoff_bytes_per_second", "kind");
        assert!(kinds.get("achieved").is_none_or(|rate| *rate > 0.0), "{kinds:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_required_transport_that_cannot_be_had_fails_with_its_reason() {
    let cluster = Cluster::start(ClusterOptions {
        prefill_args: args("--transport shm"),
        decode_args: args("--protocol-max 1"),
        ..ClusterOptions::default()
    });
    let mut api = client::connect(&cluster).await;
    let prompt = Reference::open().prompt(&STORY.repeat(3), 40);
    let error = client::run(&mut api, client::greedy(&prompt, 4))
        .await
        .expect_err("no way for its KV");
    assert!(error.message().contains("TRANSPORT_UNAVAILABLE"), "{error:?}");
}
