//! A node that dies in the middle of a request: until a token has left, another takes its place; later the client gets one typed error within a bound. The
//! survivors hold nothing one lease later. (Replay of an answer under way comes later.)

use std::time::{Duration, Instant};

use baton_proto::v1::{generate_event::Event, generation_client::GenerationClient};
use baton_tests::{Cluster, ClusterOptions, Role, client, leak::total};
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt;

/// From the kill to the client's error.
const NOTICED: Duration = Duration::from_secs(10);
/// One lease, and the look at it.
const LEASE: Duration = Duration::from_secs(20);

/// Reads until the stream ends with an error.
async fn error_of(stream: &mut tonic::Streaming<baton_proto::v1::GenerateEvent>) -> Status {
    loop {
        match client::next(stream).await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the answer ended well although its node had died"),
            Err(status) => return status,
        }
    }
}

/// Starts an answer, waits for `events` events, does `harm`, and checks what is promised.
async fn harmed(role: Role, prompt_tokens: usize, events: usize, signal: &str) {
    let mut cluster = Cluster::start(ClusterOptions {
        prefill: 2,
        decode: 2,
        ..ClusterOptions::default()
    });
    cluster.allow("a node was lost");
    let mut api = client::connect(&cluster).await;
    let prompt: Vec<u32> = (0..prompt_tokens as u32).map(|token| 300 + token * 7 % 4_000).collect();
    let mut stream = api
        .generate(client::greedy(&prompt, 4_000))
        .await
        .expect("a stream")
        .into_inner();
    for _ in 0..events {
        client::next(&mut stream)
            .await
            .expect("no error yet")
            .expect("an event");
    }
    // Which of the two serves it is the router's business: harm both.
    for index in 0..2 {
        cluster.node(role, index).signal(signal);
    }
    let harmed = Instant::now();
    let status = error_of(&mut stream).await;
    assert!(harmed.elapsed() < NOTICED, "noticed after {:?}", harmed.elapsed());
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    let reason = status.get_error_details().error_info().map(|info| info.reason.clone());
    assert_eq!(reason.as_deref(), Some("NODE_LOST"), "{status:?}");
    for index in 0..2 {
        cluster.node(role, index).kill();
    }
    cluster.assert_idle(LEASE);
    // New nodes join, and the cluster serves again.
    cluster.add_node(role, 2);
    cluster.wait_members();
    let answer = client::run(&mut api, client::greedy(&prompt[..40], 5))
        .await
        .expect("an answer");
    assert_eq!(answer.ids.len(), 5);
    cluster.assert_idle(LEASE);
}

#[tokio::test(flavor = "multi_thread")]
async fn decode_killed_while_tokens_stream() {
    harmed(Role::Decode, 40, 6, "KILL").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn decode_killed_while_the_prompt_is_computed() {
    harmed(Role::Decode, 3_000, 1, "KILL").await;
}

/// An answer of five tokens, under way.
async fn begun(
    api: &mut GenerationClient<Channel>,
    prompt: &[u32],
) -> tonic::Streaming<baton_proto::v1::GenerateEvent> {
    let request = client::greedy(prompt, 5);
    let mut stream = api.generate(request).await.expect("a stream").into_inner();
    client::next(&mut stream).await.expect("no error").expect("an event");
    stream
}

/// The ids, and how many dispatches it took.
async fn rest_of(stream: &mut tonic::Streaming<baton_proto::v1::GenerateEvent>) -> (Vec<u32>, u32) {
    let (mut ids, mut attempts) = (Vec::new(), 0);
    while let Some(event) = client::next(stream).await.expect("another takes its place") {
        match event.event {
            Some(Event::Delta(delta)) => ids.extend(delta.ids),
            Some(Event::Finished(finished)) => attempts = finished.served.expect("it says who served it").attempts,
            _ => {}
        }
    }
    (ids, attempts)
}

/// The decode node that has reserved blocks dies.
#[tokio::test(flavor = "multi_thread")]
async fn another_decode_node_takes_over_before_the_first_token() {
    let prompt: Vec<u32> = (0..3_000).map(|token| 300 + token * 11 % 4_000).collect();
    let mut cluster = Cluster::start(ClusterOptions {
        decode: 2,
        ..ClusterOptions::default()
    });
    cluster.allow("a node was lost");
    let mut api = client::connect(&cluster).await;
    let mut answers = Vec::new();
    for kill in [true, false] {
        let mut stream = begun(&mut api, &prompt).await;
        if kill {
            let asked = Instant::now();
            let at_work = loop {
                let holds =
                    |index: &usize| total(&cluster.node(Role::Decode, *index).metrics(), "baton_handoffs") > 0.0;
                if let Some(index) = (0..2).find(holds) {
                    break index;
                }
                assert!(asked.elapsed() < NOTICED, "no decode node has reserved blocks");
            };
            cluster.node(Role::Decode, at_work).kill();
        }
        let (ids, attempts) = rest_of(&mut stream).await;
        assert_eq!(attempts, 1 + u32::from(kill));
        answers.push(ids);
    }
    assert!(answers[0].len() == 5 && answers[0] == answers[1], "{answers:?}");
    cluster.assert_idle(LEASE);
}

/// One prefill node of two dies, or both: then the decode node runs the prompt itself.
#[tokio::test(flavor = "multi_thread")]
async fn prefill_killed_while_the_prompt_is_computed() {
    let mut cluster = Cluster::start(ClusterOptions {
        prefill: 2,
        ..ClusterOptions::default()
    });
    cluster.allow("a node was lost");
    let mut api = client::connect(&cluster).await;
    let prompt: Vec<u32> = (0..3_000).map(|token| 300 + token * 7 % 4_000).collect();
    let mut answers = Vec::new();
    for kill in [&[0][..], &[1], &[]] {
        let mut stream = begun(&mut api, &prompt).await;
        for &index in kill {
            cluster.node(Role::Prefill, index).kill();
        }
        let (ids, attempts) = rest_of(&mut stream).await;
        // With one left there is no doubt which of them was at work.
        assert!(attempts == 2 || kill != [1], "{attempts} attempts");
        answers.push(ids);
    }
    assert!(
        answers.iter().all(|ids| ids.len() == 5 && *ids == answers[2]),
        "{answers:?}"
    );
    cluster.assert_idle(LEASE);
}

#[tokio::test(flavor = "multi_thread")]
async fn decode_stopped_while_tokens_stream() {
    harmed(Role::Decode, 40, 6, "STOP").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefill_node_that_dies_later_changes_nothing() {
    let mut cluster = Cluster::start(ClusterOptions::default());
    let mut api = client::connect(&cluster).await;
    let mut stream = api
        .generate(client::greedy(&[5, 6, 7, 8], 60))
        .await
        .expect("a stream")
        .into_inner();
    for _ in 0..5 {
        client::next(&mut stream).await.expect("no error").expect("an event");
    }
    cluster.allow("a node was lost");
    cluster.node(Role::Prefill, 0).kill();
    while client::next(&mut stream)
        .await
        .expect("the decode node goes on")
        .is_some()
    {}
    cluster.assert_idle(LEASE);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_router_frees_the_nodes() {
    let mut cluster = Cluster::start(ClusterOptions::default());
    cluster.allow("a router was lost");
    let mut api = client::connect(&cluster).await;
    for prompt_tokens in [40, 3_000] {
        let prompt = vec![9; prompt_tokens];
        let mut stream = api
            .generate(client::greedy(&prompt, 4_000))
            .await
            .expect("a stream")
            .into_inner();
        client::next(&mut stream).await.expect("no error").expect("an event");
        if prompt_tokens == 3_000 {
            cluster.router.kill();
            let _ = error_of(&mut stream).await;
        }
    }
    cluster.assert_idle(LEASE);
}
