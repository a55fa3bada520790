//! Registry, health, reflection, and the calls beside Generate.

use baton_node::status;
use baton_proto::{
    node::v1::{self as pb, node_report::Report, registry_client::RegistryClient, router_notice::Notice},
    v1 as api,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use super::harness::{IDENTITY, Router, hello, ids, load, report, router, soon, text};

type Announced = (
    mpsc::Sender<pb::NodeReport>,
    Result<Streaming<pb::RouterNotice>, Status>,
);

async fn announce(router: &Router, first: pb::NodeReport) -> Announced {
    let (reports, receiver) = mpsc::channel(16);
    reports.try_send(first).expect("there is room");
    let mut client = RegistryClient::new(router.channel.clone());
    let notices = soon("an answer", client.announce(ReceiverStream::new(receiver))).await;
    (reports, notices.map(tonic::Response::into_inner))
}

fn changed(change: impl FnOnce(&mut pb::Hello)) -> pb::NodeReport {
    let Some(Report::Hello(mut node)) = hello("node-x", pb::Role::Decode, "127.0.0.1:1").report else {
        panic!("a hello");
    };
    change(&mut node);
    report(Report::Hello(node))
}

#[tokio::test]
async fn nodes_that_do_not_fit_are_refused() {
    let router = router().await;
    let _decode = router.decode_node("decode-0").await;
    for (first, code, reason) in [
        (load(pb::Phase::Ready, 1), Code::InvalidArgument, "INVALID_FIELD"),
        (changed(|hello| hello.role = 0), Code::InvalidArgument, "INVALID_FIELD"),
        (
            changed(|hello| hello.epoch = vec![1; 3]),
            Code::InvalidArgument,
            "INVALID_FIELD",
        ),
        (
            changed(|hello| hello.layout = None),
            Code::InvalidArgument,
            "INVALID_FIELD",
        ),
        (
            changed(|hello| hello.address = "nowhere".to_owned()),
            Code::InvalidArgument,
            "MALFORMED",
        ),
        (
            changed(|hello| hello.node_id.clear()),
            Code::InvalidArgument,
            "MALFORMED",
        ),
        (
            changed(|hello| hello.kv_identity = vec![8; 32]),
            Code::FailedPrecondition,
            "IDENTITY_MISMATCH",
        ),
        (
            changed(|hello| hello.model = "other".to_owned()),
            Code::FailedPrecondition,
            "MODEL_MISMATCH",
        ),
        (
            changed(|hello| hello.vocabulary = 3),
            Code::FailedPrecondition,
            "MODEL_MISMATCH",
        ),
        (
            changed(|hello| hello.protocol_min = 9),
            Code::FailedPrecondition,
            "PROTOCOL_MISMATCH",
        ),
        (
            changed(|hello| hello.layout.as_mut().expect("set").block_tokens = 16),
            Code::FailedPrecondition,
            "LAYOUT_MISMATCH",
        ),
    ] {
        let (_reports, notices) = announce(&router, first).await;
        let status = notices.map(|_| ()).expect_err(reason);
        assert_eq!(
            (status.code(), status::reason(&status).as_deref()),
            (code, Some(reason)),
            "{status:?}"
        );
    }
    assert_eq!(router.cluster.look(|admission| admission.members().iter().count()), 1);
}

#[tokio::test]
async fn the_newer_of_two_announcements_lives() {
    let router = router().await;
    let (_older, notices) = announce(&router, changed(|_| {})).await;
    let mut older = notices.expect("taken");
    assert!(matches!(soon("a welcome", older.message()).await, Ok(Some(_))));
    let (reports, notices) = announce(&router, changed(|hello| hello.epoch = vec![4; 16])).await;
    let mut newer = notices.expect("taken");
    let status = soon("the end of the older", older.message())
        .await
        .expect_err("replaced");
    assert_eq!(status::reason(&status).as_deref(), Some("REPLACED"));
    assert!(matches!(soon("a welcome", newer.message()).await, Ok(Some(_))));
    assert_eq!(router.cluster.look(|admission| admission.members().iter().count()), 1);
    // Its stream is its membership.
    drop((reports, newer));
    router
        .knows("no members", |admission| admission.members().iter().count() == 0)
        .await;
}

#[tokio::test]
async fn lost_events_are_asked_for() {
    let router = router().await;
    let (reports, notices) = announce(&router, changed(|_| {})).await;
    let mut notices = notices.expect("taken");
    assert!(matches!(soon("a welcome", notices.message()).await, Ok(Some(_))));
    let name = |i: u8| vec![i; 32];
    let snapshot = |sequence, names: &[u8]| {
        let blocks = names.iter().map(|i| pb::NamedBlock {
            name: name(*i),
            parent: name(0),
        });
        report(Report::Snapshot(pb::KvSnapshot {
            epoch: vec![3; 16],
            sequence,
            blocks: blocks.collect(),
            first: true,
            last: true,
        }))
    };
    let stored = |first_sequence, i| {
        let kind = pb::kv_event::Kind::Stored(pb::NamedBlock {
            name: name(i),
            parent: name(0),
        });
        let events = vec![pb::KvEvent { kind: Some(kind) }];
        report(Report::Events(pb::KvEvents {
            epoch: vec![3; 16],
            first_sequence,
            events,
        }))
    };
    let entries = |count| move |admission: &crate::core::admission::Admission| admission.index().entries() == count;
    reports.send(snapshot(0, &[1])).await.expect("taken");
    reports.send(stored(1, 2)).await.expect("taken");
    router.knows("two blocks", entries(2)).await;
    reports.send(stored(3, 4)).await.expect("taken");
    let notice = soon("a notice", notices.message()).await.expect("open").expect("open");
    assert!(matches!(notice.notice, Some(Notice::SnapshotWanted(_))), "{notice:?}");
    reports.send(snapshot(3, &[1, 2, 3, 4])).await.expect("taken");
    router.knows("four blocks", entries(4)).await;
}

#[tokio::test]
async fn health_follows_the_decode_nodes() {
    let router = router().await;
    let mut health = HealthClient::new(router.channel.clone());
    let request = HealthCheckRequest {
        service: crate::grpc::GENERATION.to_owned(),
    };
    let mut watch = health.watch(request).await.expect("health is served").into_inner();
    let mut next = async || {
        soon("a status", watch.message())
            .await
            .expect("open")
            .expect("open")
            .status()
    };
    // Before the reporter's first word the service may be unknown.
    let mut status = next().await;
    while status == ServingStatus::ServiceUnknown {
        status = next().await;
    }
    assert_eq!(status, ServingStatus::NotServing);
    assert_eq!(ready(&router).await, 503);
    let _prefill = router.prefill_node("prefill-0").await;
    let mut decode = router.decode_node("decode-0").await;
    assert_eq!(next().await, ServingStatus::Serving);
    assert_eq!(ready(&router).await, 200);
    decode.kill();
    assert_eq!(next().await, ServingStatus::NotServing);
    assert_eq!(ready(&router).await, 503);
}

async fn http_get(router: &Router, path: &str) -> String {
    let mut stream = TcpStream::connect(router.http).await.expect("HTTP listens");
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("written");
    let mut response = String::new();
    soon("a response", stream.read_to_string(&mut response))
        .await
        .expect("read");
    response
}

async fn ready(router: &Router) -> u16 {
    let response = http_get(router, "/ready").await;
    response
        .split(' ')
        .nth(1)
        .and_then(|code| code.parse().ok())
        .expect("a status")
}

#[tokio::test]
async fn metrics_tell_of_nodes_and_outcomes() {
    let router = router().await;
    let refused = router.generate(super::harness::prompt("Hello")).await;
    assert!(refused.is_err());
    let _decode = router.decode_node("decode-0").await;
    let metrics = http_get(&router, "/metrics").await;
    for line in [
        r#"baton_requests_total{outcome="NO_NODES"} 1"#,
        r#"baton_nodes{role="decode",phase="ready"} 1"#,
        r#"baton_nodes{role="prefill",phase="ready"} 0"#,
        "baton_queue_length 0",
        "baton_prefix_index_bytes 0",
        "baton_requests_in_flight 0",
        "baton_request_seconds_count 1",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line} in\n{metrics}");
    }
}

#[tokio::test]
async fn reflection_shows_what_is_public() {
    let router = router().await;
    let mut client = ServerReflectionClient::new(router.channel.clone());
    let ask = |message_request| ServerReflectionRequest {
        host: String::new(),
        message_request: Some(message_request),
    };
    let requests = tokio_stream::iter([
        ask(MessageRequest::ListServices(String::new())),
        ask(MessageRequest::FileContainingSymbol("baton.v1.Generation".to_owned())),
        ask(MessageRequest::FileContainingSymbol(
            "baton.node.v1.Registry".to_owned(),
        )),
    ]);
    let mut answers = client
        .server_reflection_info(requests)
        .await
        .expect("served")
        .into_inner();
    let mut next = async || soon("an answer", answers.message()).await;
    let Ok(Some(list)) = next().await else { panic!("a list") };
    let Some(MessageResponse::ListServicesResponse(list)) = list.message_response else {
        panic!("a list")
    };
    let mut services: Vec<String> = list.service.into_iter().map(|service| service.name).collect();
    services.sort();
    assert_eq!(
        services,
        [
            "baton.v1.Generation",
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection"
        ]
    );
    let found = next().await.expect("open").expect("an answer").message_response;
    assert!(
        matches!(found, Some(MessageResponse::FileDescriptorResponse(_))),
        "{found:?}"
    );
    match next().await {
        Err(status) => assert_eq!(status.code(), Code::NotFound),
        Ok(Some(answer)) => assert!(matches!(
            answer.message_response,
            Some(MessageResponse::ErrorResponse(_))
        )),
        Ok(None) => panic!("an answer was due"),
    }
}

#[tokio::test]
async fn text_and_tokens_and_models() {
    let router = router().await;
    let mut client = router.client();
    let input = Some(api::tokenize_request::Input::Text("Hello wörld".to_owned()));
    let tokens = client
        .tokenize(api::TokenizeRequest {
            model: text().name,
            input,
        })
        .await
        .expect("tokenises")
        .into_inner()
        .ids;
    assert_eq!(tokens, ids("Hello wörld"));
    let detokenize = |ids| api::DetokenizeRequest {
        model: String::new(),
        ids,
    };
    let back = client
        .detokenize(detokenize(tokens))
        .await
        .expect("detokenises")
        .into_inner()
        .text;
    assert_eq!(back, "Hello wörld");
    let status = client
        .detokenize(detokenize(vec![u32::MAX]))
        .await
        .expect_err("no such id");
    assert_eq!(
        (status.code(), status::field(&status).as_deref()),
        (Code::InvalidArgument, Some("ids"))
    );
    let chat = api::Chat {
        messages: vec![api::Message {
            role: "user".to_owned(),
            content: "Hi".to_owned(),
        }],
    };
    let input = Some(api::tokenize_request::Input::Chat(chat));
    let tokens = client
        .tokenize(api::TokenizeRequest {
            model: String::new(),
            input,
        })
        .await
        .expect("tokenises")
        .into_inner()
        .ids;
    assert!(tokens.len() > ids("Hi").len());

    let models = async |client: &mut api::generation_client::GenerationClient<_>| {
        client
            .list_models(api::ListModelsRequest {})
            .await
            .expect("listed")
            .into_inner()
            .models
    };
    let before = models(&mut client).await;
    assert_eq!((before.len(), before[0].kv_identity.as_str()), (1, ""));
    let _decode = router.decode_node("decode-0").await;
    let after = models(&mut client).await;
    let identity: String = IDENTITY.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(
        (
            after[0].id.clone(),
            after[0].kv_identity.clone(),
            after[0].context_length
        ),
        (text().name, identity, 2_048)
    );
}

/// As `GenerateRequest`, but its text need not be UTF-8.
#[derive(Clone, PartialEq, prost::Message)]
struct Bytes {
    #[prost(bytes = "vec", tag = "2")]
    text: Vec<u8>,
}

#[tokio::test]
async fn messages_that_cannot_be_read_are_the_clients_fault() {
    let router = router().await;
    let _decode = router.decode_node("decode-0").await;
    for (text, reason) in [
        (vec![0xff; 8], "MALFORMED"),
        (vec![b'x'; crate::limits::GRPC_REQUEST_BYTES], "BODY_TOO_LARGE"),
    ] {
        let mut client = tonic::client::Grpc::new(router.channel.clone());
        client.ready().await.expect("it is");
        let codec = tonic_prost::ProstCodec::<Bytes, api::GenerateEvent>::default();
        let path = "/baton.v1.Generation/Generate".parse().expect("a path");
        let answer = client.server_streaming(tonic::Request::new(Bytes { text }), path, codec);
        let status = soon("an answer", answer).await.map(|_| ()).expect_err(reason);
        assert_eq!(
            (status.code(), status::reason(&status).as_deref()),
            (Code::InvalidArgument, Some(reason)),
            "{status:?}"
        );
    }
}
