//! A link that is cut without a word: nothing answers any more, and each side must find out for itself. Needs root.

use std::time::{Duration, Instant};

use baton_tests::netns::Namespace;
use baton_tests::{Cluster, ClusterOptions, Role, client, leak};
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt;

/// From the cut to the client's error: a keep-alive's interval and its answer's time, and the wait for another node to take the request.
const NOTICED: Duration = Duration::from_secs(15);
const IDLE: Duration = Duration::from_secs(25);
const LIMIT: Duration = Duration::from_secs(60);

/// Reads until the stream ends with an error.
async fn error_of(stream: &mut Streaming<baton_proto::v1::GenerateEvent>) -> Status {
    loop {
        match client::next(stream).await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the answer ended well although nothing could reach its node"),
            Err(status) => return status,
        }
    }
}

/// The decode node is cut off while blocks are on their way to it, and while tokens come from it. Each time the client hears of it, everything is given
/// back on both sides of the cut while it lasts, and the node serves again once the link is whole.
#[tokio::test(flavor = "multi_thread")]
async fn a_decode_node_is_cut_off_and_comes_back() {
    let namespace = Namespace::new();
    let mut cluster = Cluster::start(ClusterOptions {
        decode_within: Some(namespace.clone()),
        // Of one host all the same: memory would pass where the network is cut.
        prefill_args: vec!["--transport".to_owned(), "grpc".to_owned()],
        ..ClusterOptions::default()
    });
    for line in ["a node was lost", "a router was lost", "open to other machines"] {
        cluster.allow(line);
    }
    let mut api = client::connect(&cluster).await;
    let prompt: Vec<u32> = (0..3_000).map(|token| 300 + token * 7 % 4_000).collect();
    let expected = client::run(&mut api, client::greedy(&prompt[..100], 5))
        .await
        .expect("an answer")
        .ids;

    for while_blocks_travel in [true, false] {
        let length = if while_blocks_travel { prompt.len() } else { 40 };
        let mut stream = api
            .generate(client::greedy(&prompt[..length], 4_000))
            .await
            .expect("a stream")
            .into_inner();
        if while_blocks_travel {
            // Two chunks of the prompt are computed, and the first is on its way.
            let computed = |text: &str| {
                leak::samples(text, "baton_tokens_total", "kind")
                    .get("prompt_computed")
                    .copied()
            };
            let before = computed(&cluster.node(Role::Prefill, 0).metrics()).unwrap_or(0.0);
            cluster
                .node(Role::Prefill, 0)
                .wait_metrics("two chunks", LIMIT, |text| {
                    computed(text).is_some_and(|tokens| tokens >= before + 512.0)
                });
            let granted = leak::samples(&cluster.node(Role::Decode, 0).metrics(), "baton_kv_blocks", "state");
            assert!(granted["granted"] > 0.0, "{granted:?}");
        } else {
            for _ in 0..6 {
                client::next(&mut stream)
                    .await
                    .expect("no error yet")
                    .expect("an event");
            }
        }
        namespace.cut();
        let cut = Instant::now();
        let status = error_of(&mut stream).await;
        assert!(cut.elapsed() < NOTICED, "noticed after {:?}", cut.elapsed());
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        let reason = status.get_error_details().error_info().map(|info| info.reason.clone());
        assert_eq!(reason.as_deref(), Some("NODE_LOST"), "{status:?}");
        cluster.assert_idle(IDLE);

        namespace.heal();
        cluster.wait_members();
        let answer = client::run(&mut api, client::greedy(&prompt[..100], 5)).await;
        assert_eq!(answer.expect("an answer").ids, expected);
        cluster.assert_idle(IDLE);
    }
}
