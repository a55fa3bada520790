//! Bad input gets a typed error, and every process lives.

use baton_proto::v1::generate_request::Input;
use baton_proto::v1::{Chat, GenerateRequest, Message, Output, Sampling, Stopping, TokenIds};
use baton_tests::{Cluster, ClusterOptions, client, http};
use serde_json::{Value, json};
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// The stable reason and the field at fault.
fn details(status: &Status) -> (String, Option<String>) {
    let details = status.get_error_details();
    let reason = details.error_info().map(|info| info.reason.clone()).unwrap_or_default();
    let field = details
        .bad_request()
        .and_then(|bad| bad.field_violations.first())
        .map(|violation| violation.field.clone());
    (reason, field)
}

fn with(change: impl FnOnce(&mut GenerateRequest)) -> GenerateRequest {
    let mut request = client::greedy(&[1, 2, 3], 4);
    change(&mut request);
    request
}

fn sampling(change: impl FnOnce(&mut Sampling)) -> GenerateRequest {
    with(|request| change(request.sampling.insert(Sampling::default())))
}

fn stopping(change: impl FnOnce(&mut Stopping)) -> GenerateRequest {
    with(|request| change(request.stopping.insert(Stopping::default())))
}

#[tokio::test(flavor = "multi_thread")]
async fn over_grpc() {
    let mut cluster = Cluster::start(ClusterOptions::default());
    let mut api = client::connect(&cluster).await;
    let tokens = |ids: Vec<u32>| with(|request| request.input = Some(Input::Tokens(TokenIds { ids })));
    let chat = |role: &str| {
        let message = Message {
            role: role.to_owned(),
            content: "x".to_owned(),
        };
        with(|request| {
            request.input = Some(Input::Chat(Chat {
                messages: vec![message],
            }))
        })
    };
    let cases = [
        ("no input", with(|request| request.input = None), Code::InvalidArgument),
        ("no tokens", tokens(vec![]), Code::InvalidArgument),
        (
            "empty text",
            with(|request| request.input = Some(Input::Text(String::new()))),
            Code::InvalidArgument,
        ),
        (
            "empty chat",
            with(|request| request.input = Some(Input::Chat(Chat::default()))),
            Code::InvalidArgument,
        ),
        ("unknown role", chat("king"), Code::InvalidArgument),
        (
            "a token beyond the vocabulary",
            tokens(vec![49_152]),
            Code::InvalidArgument,
        ),
        (
            "a prompt as long as the context",
            tokens(vec![5; 8_192]),
            Code::InvalidArgument,
        ),
        (
            "a prompt far beyond the context",
            tokens(vec![5; 200_000]),
            Code::InvalidArgument,
        ),
        (
            "text far beyond the context",
            with(|request| request.input = Some(Input::Text("word ".repeat(60_000)))),
            Code::InvalidArgument,
        ),
        (
            "unknown model",
            with(|request| request.model = "gpt-5".to_owned()),
            Code::NotFound,
        ),
        (
            "negative temperature",
            sampling(|sampling| sampling.temperature = Some(-0.1)),
            Code::InvalidArgument,
        ),
        (
            "NaN temperature",
            sampling(|sampling| sampling.temperature = Some(f32::NAN)),
            Code::InvalidArgument,
        ),
        (
            "infinite temperature",
            sampling(|sampling| sampling.temperature = Some(f32::INFINITY)),
            Code::InvalidArgument,
        ),
        (
            "top_p 0",
            sampling(|sampling| sampling.top_p = Some(0.0)),
            Code::InvalidArgument,
        ),
        (
            "top_p over 1",
            sampling(|sampling| sampling.top_p = Some(1.5)),
            Code::InvalidArgument,
        ),
        (
            "min_p over 1",
            sampling(|sampling| sampling.min_p = Some(1.1)),
            Code::InvalidArgument,
        ),
        (
            "n 17",
            sampling(|sampling| sampling.n = Some(17)),
            Code::InvalidArgument,
        ),
        ("n 0", sampling(|sampling| sampling.n = Some(0)), Code::InvalidArgument),
        (
            "max_tokens 0",
            stopping(|stopping| stopping.max_tokens = Some(0)),
            Code::InvalidArgument,
        ),
        (
            "17 stop strings",
            stopping(|stopping| stopping.stop = vec!["x".to_owned(); 17]),
            Code::InvalidArgument,
        ),
        (
            "an empty stop string",
            stopping(|stopping| stopping.stop = vec![String::new()]),
            Code::InvalidArgument,
        ),
        (
            "a stop string of 257 characters",
            stopping(|stopping| stopping.stop = vec!["é".repeat(257)]),
            Code::InvalidArgument,
        ),
        (
            "a stop id beyond the vocabulary",
            stopping(|stopping| stopping.stop_token_ids = vec![50_000]),
            Code::InvalidArgument,
        ),
        (
            "21 alternatives",
            with(|request| {
                request.output = Some(Output {
                    logprobs: Some(true),
                    top_logprobs: Some(21),
                })
            }),
            Code::InvalidArgument,
        ),
        (
            "alternatives without log-probabilities",
            with(|request| {
                request.output = Some(Output {
                    logprobs: None,
                    top_logprobs: Some(5),
                })
            }),
            Code::InvalidArgument,
        ),
        (
            "a repetition penalty of 0",
            sampling(|sampling| sampling.repetition_penalty = Some(0.0)),
            Code::InvalidArgument,
        ),
        (
            "a presence penalty that is no number",
            sampling(|sampling| sampling.presence_penalty = Some(f32::NAN)),
            Code::InvalidArgument,
        ),
        (
            "a frequency penalty of 2.5",
            sampling(|sampling| sampling.frequency_penalty = Some(2.5)),
            Code::InvalidArgument,
        ),
        (
            "a bias of 101",
            sampling(|sampling| sampling.logit_bias = [(1, 101.0)].into()),
            Code::InvalidArgument,
        ),
        (
            "a bias of a token beyond the vocabulary",
            sampling(|sampling| sampling.logit_bias = [(50_000, 1.0)].into()),
            Code::InvalidArgument,
        ),
        (
            "1025 biases",
            sampling(|sampling| sampling.logit_bias = (0..1_025).map(|id| (id, 1.0)).collect()),
            Code::InvalidArgument,
        ),
    ];
    for (what, request, code) in cases {
        let error = client::run(&mut api, request).await.expect_err(what);
        assert_eq!(error.code(), code, "{what}: {error:?}");
        let (reason, _) = details(&error);
        assert!(
            !reason.is_empty() && reason.chars().all(|c| c.is_ascii_uppercase() || c == '_'),
            "{what}: reason {reason:?}"
        );
    }
    let error = client::run(&mut api, sampling(|sampling| sampling.temperature = Some(-1.0)))
        .await
        .expect_err("refused");
    assert_eq!(details(&error).1.as_deref(), Some("sampling.temperature"));
    // And it still answers.
    let answer = client::run(&mut api, client::greedy(&[1, 2, 3], 4))
        .await
        .expect("an answer");
    assert_eq!(answer.ids.len(), 4);
    cluster.assert_idle(std::time::Duration::from_secs(15));
}

#[tokio::test(flavor = "multi_thread")]
async fn over_http() {
    let mut cluster = Cluster::start(ClusterOptions::default());
    let at = cluster.router.http;
    let messages = json!([{ "role": "user", "content": "hi" }]);
    let chat = |extra: Value| {
        let mut body = json!({ "messages": messages, "max_tokens": 3 });
        body.as_object_mut()
            .expect("object")
            .extend(extra.as_object().expect("object").clone());
        body.to_string().into_bytes()
    };
    let nested = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000)).into_bytes();
    let long = json!({ "prompt": vec![5; 8_192], "max_tokens": 1 })
        .to_string()
        .into_bytes();
    let cases: Vec<(&str, &str, Vec<u8>, u16, &str)> = vec![
        ("not JSON", "/v1/chat/completions", b"{".to_vec(), 400, "MALFORMED"),
        (
            "not an object",
            "/v1/chat/completions",
            b"[]".to_vec(),
            400,
            "MALFORMED",
        ),
        ("nothing", "/v1/chat/completions", Vec::new(), 400, "MALFORMED"),
        (
            "invalid UTF-8",
            "/v1/chat/completions",
            b"{\"messages\": \"\xff\xfe\"}".to_vec(),
            400,
            "MALFORMED",
        ),
        ("deep nesting", "/v1/chat/completions", nested, 400, "MALFORMED"),
        (
            "a lone surrogate",
            "/v1/chat/completions",
            br#"{"messages":[{"role":"user","content":"\ud800"}]}"#.to_vec(),
            400,
            "MALFORMED",
        ),
        (
            "a body over its limit",
            "/v1/chat/completions",
            vec![b' '; 64 << 20],
            413,
            "BODY_TOO_LARGE",
        ),
        (
            "an unknown field",
            "/v1/chat/completions",
            chat(json!({ "frobnicate": 1 })),
            400,
            "UNKNOWN_FIELD",
        ),
        (
            "tools",
            "/v1/chat/completions",
            chat(json!({ "tools": [{ "type": "function" }] })),
            400,
            "NOT_BUILT",
        ),
        (
            "negative temperature",
            "/v1/chat/completions",
            chat(json!({ "temperature": -1 })),
            400,
            "INVALID_FIELD",
        ),
        (
            "a temperature beyond f32",
            "/v1/chat/completions",
            chat(json!({ "temperature": 1e300 })),
            400,
            "INVALID_FIELD",
        ),
        (
            "unknown model",
            "/v1/chat/completions",
            chat(json!({ "model": "gpt-5" })),
            404,
            "UNKNOWN_MODEL",
        ),
        (
            "no messages",
            "/v1/chat/completions",
            json!({ "messages": [] }).to_string().into_bytes(),
            400,
            "INVALID_FIELD",
        ),
        (
            "an empty prompt",
            "/v1/completions",
            json!({ "prompt": "" }).to_string().into_bytes(),
            400,
            "EMPTY_PROMPT",
        ),
        ("beyond the context", "/v1/completions", long, 400, "CONTEXT_LENGTH"),
        ("no such path", "/v1/embeddings", b"{}".to_vec(), 404, "NO_ROUTE"),
        ("wrong method", "/v1/models", b"{}".to_vec(), 405, "METHOD_NOT_ALLOWED"),
    ];
    for (what, path, body, status, code) in cases {
        for stream in [false, true] {
            let mut body = body.clone();
            if stream && body.ends_with(b"}") && body.starts_with(b"{\"") {
                body.truncate(body.len() - 1);
                body.extend_from_slice(b",\"stream\":true}");
            }
            let response = http::post(at, path, body);
            assert_eq!(response.status, status, "{what}: {}", response.body);
            assert_eq!(response.json()["error"]["code"], code, "{what}");
        }
    }
    // Not HTTP at all.
    let _ = http::try_send(at, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03");
    let answer = http::post(at, "/v1/chat/completions", chat(json!({})));
    assert_eq!(answer.status, 200, "it still answers: {}", answer.body);
    assert_eq!(answer.json()["usage"]["completion_tokens"], 3);
    cluster.assert_idle(std::time::Duration::from_secs(15));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_nodes_a_request_is_refused_at_once() {
    let cluster = Cluster::start(ClusterOptions {
        prefill: 0,
        decode: 0,
        ..ClusterOptions::default()
    });
    let mut api = client::connect(&cluster).await;
    let error = client::run(&mut api, client::greedy(&[1], 1))
        .await
        .expect_err("refused");
    assert_eq!(
        (error.code(), details(&error).0.as_str()),
        (Code::Unavailable, "NO_NODES")
    );
    assert!(
        error.get_error_details().retry_info().is_some(),
        "a retry helps, and it says when"
    );
    assert_eq!(http::get(cluster.router.http, "/ready").status, 503);
    assert_eq!(http::get(cluster.router.http, "/health").status, 200);
    let response = http::post(cluster.router.http, "/v1/completions", r#"{"prompt":"x"}"#);
    assert_eq!(
        (response.status, &response.json()["error"]["code"]),
        (503, &json!("NO_NODES"))
    );
    assert!(response.head.to_ascii_lowercase().contains("retry-after:"));
}
