//! Requests that are not answered, or not to their end.

use std::time::Duration;

use baton_node::{Phase, status};
use baton_proto::{node::v1 as pb, v1 as api};
use futures_util::FutureExt;
use tonic::{Code, Request};

use super::harness::{config, ids, load, prompt, router, router_with, soon, stopping, text};

#[tokio::test]
async fn without_nodes_there_is_no_waiting() {
    let router = router().await;
    let status = router
        .generate(prompt("Hello"))
        .await
        .map(|_| ())
        .expect_err("no nodes");
    assert_eq!(
        (status.code(), status::reason(&status).as_deref()),
        (Code::Unavailable, Some("NO_NODES"))
    );
    assert!(status::retry_after(&status).is_some());
}

#[tokio::test]
async fn a_decode_node_that_dies_ends_the_request_once_and_cancels_the_other_leg() {
    let router = router().await;
    let mut prefill = router.prefill_node("prefill-0").await;
    let mut decode = router.decode_node("decode-0").await;
    let mut answer = router.generate(prompt("Hello")).await.expect("admitted");
    answer.started().await;
    let open = decode.call().await;
    open.ticket(&decode.address).await;
    let run = prefill.call().await;
    open.verified().await;
    open.tokens(0, &ids("!")).await;
    assert_eq!(answer.delta().await.text, "!");
    decode.kill();
    let status = answer.failure().await;
    assert_eq!(
        (status.code(), status::reason(&status).as_deref()),
        (Code::Unavailable, Some("NODE_LOST"))
    );
    assert_eq!(status::metadata(&status, "node").as_deref(), Some("decode-0"));
    run.closed().await;
    router.is_idle().await;
    // Its membership went with it.
    router.knows("one node less", |admission| !admission.ready()).await;
}

#[tokio::test]
async fn another_prefill_node_takes_the_place_of_one_that_dies() {
    let router = router().await;
    let mut first = router.prefill_node("prefill-0").await;
    let mut decode = router.decode_node("decode-0").await;
    let mut answer = router.generate(prompt("Hello")).await.expect("admitted");
    answer.started().await;
    let open = decode.call().await;
    open.ticket(&decode.address).await;
    let run = first.call().await;
    run.started().await;
    let mut second = router.prefill_node("prefill-1").await;
    // As a decode node does whose peer goes away; the router hears of it first.
    open.fail(status::unavailable(
        "PEER_LOST",
        "the push broke",
        Duration::from_secs(1),
    ))
    .await;
    first.kill();
    open.closed().await;
    // Blocks are reserved anew.
    let open = decode.call().await;
    open.ticket(&decode.address).await;
    second.call().await.done(7, pb::EndReason::Unspecified).await;
    open.verified().await;
    open.tokens(0, &ids("!")).await;
    assert_eq!(answer.delta().await.text, "!");
    open.ended(pb::EndReason::Length).await;
    let served = answer.finish().await.finished.served.expect("it says who served it");
    assert_eq!((served.prefill_node.as_str(), served.attempts), ("prefill-1", 2));
    router.is_idle().await;
}

#[tokio::test]
async fn a_client_that_leaves_cancels_both_legs() {
    let router = router().await;
    let mut prefill = router.prefill_node("prefill-0").await;
    let mut decode = router.decode_node("decode-0").await;
    let mut answer = router.generate(prompt("Hello")).await.expect("admitted");
    answer.started().await;
    let open = decode.call().await;
    open.ticket(&decode.address).await;
    let run = prefill.call().await;
    drop(answer);
    open.closed().await;
    run.closed().await;
    router.is_idle().await;
}

#[tokio::test]
async fn a_client_that_leaves_while_its_prompt_is_tokenised_is_counted() {
    let router = router().await;
    let _decode = router.decode_node("decode-0").await;
    let lifecycle = baton_node::Lifecycle::new();
    let mut registry = baton_node::metrics::registry("router", &lifecycle);
    let metrics = crate::metrics::RouterMetrics::register(&mut registry, router.cluster.clone());
    let config = config(router.grpc, router.http);
    let front = crate::Front::new(config, text(), router.cluster.clone(), metrics, lifecycle);
    let request = crate::GenerateRequest::new(crate::Input::Text("one ".repeat(1_500)));
    // Polled once: the tokeniser has begun.
    let left = front.generate(request).now_or_never();
    assert!(left.is_none());
    let mut shown = String::new();
    prometheus_client::encoding::text::encode(&mut shown, &registry).expect("encodes");
    assert!(
        shown.contains(r#"baton_requests_total{outcome="CANCELLED"} 1"#),
        "{shown}"
    );
}

#[tokio::test]
async fn a_client_that_leaves_the_queue_makes_room() {
    let router = router_with(|config| config.admission.max_queue = 1).await;
    let decode = router.decode_node("decode-0").await;
    decode.report(load(pb::Phase::Ready, 0)).await;
    let full = |admission: &crate::core::admission::Admission| {
        admission.members().iter().all(|member| member.available_blocks() == 0)
    };
    router.knows("a full node", full).await;
    let waiting = router.generate(prompt("Hello")).await.expect("it waits");
    let status = router
        .generate(prompt("Hello"))
        .await
        .map(|_| ())
        .expect_err("the queue is full");
    assert_eq!(
        (status.code(), status::reason(&status).as_deref()),
        (Code::ResourceExhausted, Some("QUEUE_FULL"))
    );
    assert!(status::retry_after(&status).is_some_and(|after| after >= Duration::from_secs(1)));
    drop(waiting);
    router.is_idle().await;
    let mut next = router.generate(prompt("Hello")).await.expect("there is room");
    next.started().await;
}

#[tokio::test]
async fn nobody_waits_for_ever() {
    let router = router_with(|config| config.queue_timeout = Duration::from_millis(50)).await;
    let decode = router.decode_node("decode-0").await;
    decode.report(load(pb::Phase::Ready, 0)).await;
    let full = |admission: &crate::core::admission::Admission| {
        admission.members().iter().all(|member| member.available_blocks() == 0)
    };
    router.knows("a full node", full).await;
    let status = router
        .generate(prompt("Hello"))
        .await
        .expect("it waits")
        .failure()
        .await;
    assert_eq!(
        (status.code(), status::reason(&status).as_deref()),
        (Code::ResourceExhausted, Some("QUEUE_TIMEOUT"))
    );
    router.is_idle().await;
}

#[tokio::test]
async fn the_clients_deadline_holds_and_reaches_the_nodes() {
    let router = router().await;
    let mut decode = router.decode_node("decode-0").await;
    let mut request = Request::new(prompt("Hello"));
    request.set_timeout(Duration::from_millis(500));
    let mut events = router.client().generate(request).await.expect("admitted").into_inner();
    let open = decode.call().await;
    assert!(
        (1..=500).contains(&open.work().0.deadline_ms),
        "{}",
        open.work().0.deadline_ms
    );
    open.admitted().await;
    assert!(matches!(soon("Started", events.message()).await, Ok(Some(_))));
    let status = soon("the deadline", events.message()).await.expect_err("it passes");
    assert_eq!(
        (status.code(), status::reason(&status).as_deref()),
        (Code::DeadlineExceeded, Some("DEADLINE_EXCEEDED"))
    );
    open.closed().await;
    router.is_idle().await;
}

#[tokio::test]
async fn a_router_that_drains_takes_nothing_new_and_ends_what_it_has() {
    let router = router().await;
    let mut decode = router.decode_node("decode-0").await;
    let mut answer = router.generate(prompt("Hello")).await.expect("admitted");
    let open = decode.call().await;
    router.lifecycle.set(Phase::Draining);
    let status = router
        .generate(prompt("Hello"))
        .await
        .map(|_| ())
        .expect_err("it drains");
    assert_eq!(
        (status.code(), status::reason(&status).as_deref()),
        (Code::Unavailable, Some("DRAINING"))
    );
    open.admitted().await;
    open.tokens(0, &ids("!")).await;
    open.ended(pb::EndReason::Length).await;
    answer.started().await;
    assert_eq!(answer.finish().await.text, "!");
    soon("the router's end", router.lifecycle.stopped()).await;
}

#[tokio::test]
async fn bad_input_names_its_field() {
    let router = router().await;
    let _decode = router.decode_node("decode-0").await;
    let tokens = |ids: Vec<u32>| api::GenerateRequest {
        input: Some(api::generate_request::Input::Tokens(api::TokenIds { ids })),
        ..api::GenerateRequest::default()
    };
    let chat = |role: &str| api::GenerateRequest {
        input: Some(api::generate_request::Input::Chat(api::Chat {
            messages: vec![api::Message {
                role: role.to_owned(),
                content: "hi".to_owned(),
            }],
        })),
        ..api::GenerateRequest::default()
    };
    let sampling = |sampling: api::Sampling| api::GenerateRequest {
        sampling: Some(sampling),
        ..prompt("Hello")
    };
    let stop = |stop: api::Stopping| stopping(prompt("Hello"), stop);
    let none = api::Sampling::default;
    let open = api::Stopping::default;
    for (request, code, reason, field) in [
        (prompt(""), Code::InvalidArgument, "EMPTY_PROMPT", "text"),
        (tokens(vec![]), Code::InvalidArgument, "EMPTY_PROMPT", "tokens"),
        (
            tokens(vec![u32::MAX]),
            Code::InvalidArgument,
            "TOKEN_OUT_OF_VOCABULARY",
            "tokens",
        ),
        (
            tokens(vec![1; 2_048]),
            Code::InvalidArgument,
            "CONTEXT_LENGTH",
            "tokens",
        ),
        (
            prompt(&"word ".repeat(3_000)),
            Code::InvalidArgument,
            "CONTEXT_LENGTH",
            "text",
        ),
        (
            prompt(&"x".repeat(2 << 20)),
            Code::InvalidArgument,
            "INPUT_TOO_LARGE",
            "text",
        ),
        (chat("king"), Code::InvalidArgument, "INVALID_FIELD", "chat"),
        (
            api::GenerateRequest {
                model: "other".to_owned(),
                ..prompt("Hello")
            },
            Code::NotFound,
            "UNKNOWN_MODEL",
            "model",
        ),
        (
            sampling(api::Sampling {
                temperature: Some(-0.1),
                ..none()
            }),
            Code::InvalidArgument,
            "INVALID_FIELD",
            "sampling.temperature",
        ),
        (
            sampling(api::Sampling {
                temperature: Some(f32::NAN),
                ..none()
            }),
            Code::InvalidArgument,
            "INVALID_FIELD",
            "sampling.temperature",
        ),
        (
            sampling(api::Sampling {
                temperature: Some(2.1),
                ..none()
            }),
            Code::InvalidArgument,
            "INVALID_FIELD",
            "sampling.temperature",
        ),
        (
            sampling(api::Sampling {
                top_p: Some(0.0),
                ..none()
            }),
            Code::InvalidArgument,
            "INVALID_FIELD",
            "sampling.top_p",
        ),
        (
            sampling(api::Sampling {
                top_p: Some(f32::NAN),
                ..none()
            }),
            Code::InvalidArgument,
            "INVALID_FIELD",
            "sampling.top_p",
        ),
        (
            sampling(api::Sampling {
                min_p: Some(1.5),
                ..none()
            }),
            Code::InvalidArgument,
            "INVALID_FIELD",
            "sampling.min_p",
        ),
        (
            sampling(api::Sampling { n: Some(17), ..none() }),
            Code::InvalidArgument,
            "INVALID_FIELD",
            "sampling.n",
        ),
        (
            stop(api::Stopping {
                max_tokens: Some(0),
                ..open()
            }),
            Code::InvalidArgument,
            "INVALID_FIELD",
            "stopping.max_tokens",
        ),
        (
            stop(api::Stopping {
                stop: vec!["x".to_owned(); 17],
                ..open()
            }),
            Code::InvalidArgument,
            "INVALID_FIELD",
            "stopping.stop",
        ),
        (
            stop(api::Stopping {
                stop: vec!["é".repeat(257)],
                ..open()
            }),
            Code::InvalidArgument,
            "INVALID_FIELD",
            "stopping.stop",
        ),
        (
            stop(api::Stopping {
                stop: vec![String::new()],
                ..open()
            }),
            Code::InvalidArgument,
            "INVALID_FIELD",
            "stopping.stop",
        ),
        (
            stop(api::Stopping {
                stop_token_ids: vec![u32::MAX],
                ..open()
            }),
            Code::InvalidArgument,
            "TOKEN_OUT_OF_VOCABULARY",
            "stopping.stop_token_ids",
        ),
        (
            stop(api::Stopping {
                stop_token_ids: vec![1; 65],
                ..open()
            }),
            Code::InvalidArgument,
            "INVALID_FIELD",
            "stopping.stop_token_ids",
        ),
    ] {
        let status = router.generate(request).await.map(|_| ()).expect_err(reason);
        let found = (status.code(), status::reason(&status), status::field(&status));
        assert_eq!(
            found,
            (code, Some(reason.to_owned()), Some(field.to_owned())),
            "{status:?}"
        );
    }
    router.is_idle().await;
}
