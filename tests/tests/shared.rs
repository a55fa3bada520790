//! Nodes of one host find each other's memory, and go on over gRPC where they cannot.

mod reference;

use std::time::{Duration, Instant};

use baton_tests::{Cluster, ClusterOptions, Role, client, leak};
use reference::Reference;
use tokio::task::JoinSet;

const LIMIT: Duration = Duration::from_secs(30);

const STORY: &str =
    "The ferryman asked each of them what they carried, and wrote nothing down, and forgot nothing either. ";

fn args(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// A cluster, and what it must answer to prompts that nobody holds.
struct Bench {
    cluster: Cluster,
    reference: Reference,
    prompts: usize,
}

impl Bench {
    fn start(prefill: &str, decode: &str) -> Self {
        Self {
            cluster: Cluster::start(ClusterOptions {
                prefill_args: args(prefill),
                decode_args: args(decode),
                ..ClusterOptions::default()
            }),
            reference: Reference::open(),
            prompts: 0,
        }
    }

    /// A request whose answer is right.
    async fn right(&mut self) {
        self.prompts += 1;
        let text = format!("{} said: {}", self.prompts, STORY.repeat(6));
        let prompt = self.reference.prompt(&text, 100);
        let expected = self.reference.run(&prompt, 6, None);
        let mut api = client::connect(&self.cluster).await;
        let answer = client::run(&mut api, client::greedy(&prompt, 6))
            .await
            .expect("an answer");
        assert_eq!(answer.ids, expected.ids);
    }

    /// Requests whose answers are right, until the KV of one travels over shared memory: a busy machine may need more than one try to map it.
    async fn until_shared(&mut self) {
        let by = Instant::now() + LIMIT;
        let pushes = |text: &str| leak::samples(text, "baton_handoff_pushes_total", "transport");
        while !pushes(&self.cluster.node(Role::Prefill, 0).metrics()).contains_key("shm") {
            assert!(Instant::now() < by, "the two never share memory");
            self.right().await;
        }
        self.cluster.assert_idle(LIMIT);
    }

    /// Requests whose answers are right, and whose KV all travels over `transport`.
    async fn travels(&mut self, transport: &str, requests: usize) {
        let pushes = |text: &str| leak::samples(text, "baton_handoff_pushes_total", "transport");
        let before = pushes(&self.cluster.node(Role::Prefill, 0).metrics());
        for _ in 0..requests {
            self.right().await;
        }
        let mut expected = before;
        *expected.entry(transport.to_owned()).or_default() += requests as f64;
        self.cluster
            .node(Role::Prefill, 0)
            .wait_metrics(&format!("{expected:?}"), LIMIT, |text| pushes(text) == expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_of_one_host_share_memory_by_themselves_and_again_after_either_has_died() {
    let mut bench = Bench::start("", "");
    bench.until_shared().await;
    bench.travels("shm", 2).await;
    let rates = leak::samples(
        &bench.cluster.node(Role::Prefill, 0).metrics(),
        "baton_handoff_probe_bytes_per_second",
        "transport",
    );
    assert!(rates["shm"] > rates["grpc"] && rates["grpc"] > 0.0, "{rates:?}");
    assert_eq!(bench.cluster.offers(), 1);
    for role in [Role::Decode, Role::Prefill] {
        bench.cluster.allow("a node was lost");
        bench.cluster.restart(role, 0);
        if role == Role::Prefill {
            bench.until_shared().await;
        }
        bench.travels("shm", 2).await;
        assert_eq!(bench.cluster.offers(), 1);
    }
    // One that leaves takes its offer with it.
    bench.cluster.node(Role::Prefill, 0).signal("TERM");
    assert!(bench.cluster.node(Role::Prefill, 0).wait_exit(LIMIT).success());
    assert_eq!(bench.cluster.offers(), 0);
}

/// The prefill node dies while some of the prompt has been copied from its pool, and the rest is still to be computed: the decode node runs the prompt itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_prefill_node_killed_in_the_middle_of_a_push_changes_no_token() {
    let mut bench = Bench::start("--chunk-tokens 32", "");
    bench.until_shared().await;
    bench.cluster.allow("a node was lost");
    let prompt = bench.reference.prompt(&STORY.repeat(60), 1_000);
    let expected = bench.reference.run(&prompt, 5, None);
    let computed = |text: &str| leak::samples(text, "baton_tokens_total", "kind")["prompt_computed"];
    let before = computed(&bench.cluster.node(Role::Prefill, 0).metrics());

    let mut api = client::connect(&bench.cluster).await;
    let mut answers = JoinSet::new();
    answers.spawn(async move { client::run(&mut api, client::greedy(&prompt, 5)).await });
    bench
        .cluster
        .node(Role::Decode, 0)
        .wait_metrics("a push", LIMIT, |text| leak::total(text, "baton_handoff_streams") > 0.0);
    // What one chunk computed is pushed while the next ones are.
    bench
        .cluster
        .node(Role::Prefill, 0)
        .wait_metrics("some chunks", LIMIT, |text| computed(text) >= before + 128.0);
    bench.cluster.node(Role::Prefill, 0).kill();

    let answer = answers.join_next().await.expect("one").expect("it ends");
    let answer = answer.expect("an answer");
    assert_eq!(answer.ids, expected.ids);
    // That is: it was not too late.
    assert_eq!(answer.finished.served.expect("it says who served it").attempts, 2);
    bench.cluster.assert_idle(LIMIT);
    // The dead node's socket stays until the next one starts, which has its own.
    assert_eq!(bench.cluster.offers(), 1);
    bench.cluster.restart(Role::Prefill, 0);
    assert_eq!(bench.cluster.offers(), 1);
    bench.until_shared().await;
    bench.travels("shm", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_must_not_or_cannot_share_memory_go_on_over_grpc() {
    let elsewhere = tempfile::tempdir().expect("a directory");
    let elsewhere = format!("--shm-dir {}", elsewhere.path().display());
    for (prefill, decode, offers) in [("--transport grpc", "", 0), ("", elsewhere.as_str(), 1)] {
        let mut bench = Bench::start(prefill, decode);
        bench.travels("grpc", 2).await;
        assert_eq!(bench.cluster.offers(), offers);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn shared_memory_that_is_required_and_cannot_be_had_is_named() {
    let elsewhere = tempfile::tempdir().expect("a directory");
    let decode = format!("--shm-dir {}", elsewhere.path().display());
    let mut bench = Bench::start("--transport shm", &decode);
    let prompt = bench.reference.prompt(&STORY.repeat(3), 40);
    let mut api = client::connect(&bench.cluster).await;
    let error = client::run(&mut api, client::greedy(&prompt, 4))
        .await
        .expect_err("no way for its KV");
    let message = error.message();
    assert!(
        message.contains("TRANSPORT_UNAVAILABLE") && message.contains("SHM_ELSEWHERE"),
        "{error:?}"
    );
    bench.cluster.assert_idle(LIMIT);
}
