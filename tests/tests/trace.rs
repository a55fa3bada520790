//! One trace per request, across the three processes, over OTLP.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_tests::{Cluster, ClusterOptions, client, http};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::{Request, Response, Status};

/// A collector: keeps every span with the name of its service.
#[derive(Clone)]
struct Collector {
    spans: Arc<Mutex<Vec<(String, Span)>>>,
    count: watch::Sender<usize>,
}

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut spans = self.spans.lock().expect("spans");
        for resource in request.into_inner().resource_spans {
            let attributes = resource
                .resource
                .map(|resource| resource.attributes)
                .unwrap_or_default();
            let service = attributes
                .into_iter()
                .find(|pair| pair.key == "service.name")
                .and_then(|pair| pair.value?.value);
            let Some(Value::StringValue(service)) = service else {
                continue;
            };
            for scope in resource.scope_spans {
                spans.extend(scope.spans.into_iter().map(|span| (service.clone(), span)));
            }
        }
        self.count.send_replace(spans.len());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_trace_crosses_the_three_processes() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let endpoint = format!("http://{}", listener.local_addr().expect("address"));
    let (count, mut counted) = watch::channel(0);
    let collector = Collector {
        spans: Arc::default(),
        count,
    };
    let spans = Arc::clone(&collector.spans);
    let server = tonic::transport::Server::builder()
        .add_service(TraceServiceServer::new(collector))
        .serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener));
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(server);

    let env = vec![
        ("OTEL_EXPORTER_OTLP_ENDPOINT".to_owned(), endpoint),
        ("OTEL_BSP_SCHEDULE_DELAY".to_owned(), "200".to_owned()),
    ];
    let cluster = Cluster::start(ClusterOptions {
        env,
        ..ClusterOptions::default()
    });
    // The client's own trace goes on in the cluster.
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let mut request = tonic::Request::new(client::greedy(&[1, 2, 3, 4], 4));
    let parent = format!("00-{trace}-00f067aa0ba902b7-01").parse().expect("ascii");
    request.metadata_mut().insert("traceparent", parent);
    let mut stream = client::connect(&cluster)
        .await
        .generate(request)
        .await
        .expect("a stream")
        .into_inner();
    while client::next(&mut stream).await.expect("no error").is_some() {}
    // And over HTTP the router starts a trace of its own.
    let answer = http::post(
        cluster.router.http,
        "/v1/completions",
        r#"{"prompt":"one two","max_tokens":2}"#,
    );
    assert_eq!(answer.status, 200);
    let request_id = answer.json()["baton"]["request_id"]
        .as_str()
        .expect("request id")
        .to_owned();

    let complete = |spans: &[(String, Span)]| {
        let mut services: BTreeMap<Vec<u8>, BTreeSet<&str>> = BTreeMap::new();
        for (service, span) in spans {
            services.entry(span.trace_id.clone()).or_default().insert(service);
        }
        services.values().filter(|names| names.len() == 3).count() == 2
    };
    let all = async {
        while !complete(&spans.lock().expect("spans")) {
            counted.changed().await.expect("the collector lives");
        }
    };
    if tokio::time::timeout(Duration::from_secs(30), all).await.is_err() {
        let seen: Vec<_> = spans
            .lock()
            .expect("spans")
            .iter()
            .map(|(service, span)| (service.clone(), span.name.clone()))
            .collect();
        panic!("no two traces across three services; seen: {seen:?}");
    }

    let spans = spans.lock().expect("spans");
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let own: Vec<_> = spans.iter().filter(|(_, span)| hex(&span.trace_id) == trace).collect();
    assert!(own.len() >= 3, "the client's trace went on");
    // Within a trace every parent is there, apart from the client's own span.
    for (service, span) in spans.iter() {
        let parent = hex(&span.parent_span_id);
        let known = spans.iter().any(|(_, other)| other.span_id == span.parent_span_id);
        assert!(
            parent.is_empty() || parent == "00f067aa0ba902b7" || known,
            "{service} {}: parent {parent} is missing",
            span.name
        );
    }
    let has_id = |span: &Span| {
        span.attributes.iter().any(|pair| {
            let value = pair.value.as_ref().and_then(|value| value.value.as_ref());
            pair.key == "request_id" && matches!(value, Some(Value::StringValue(id)) if *id == request_id)
        })
    };
    let services: BTreeSet<_> = spans
        .iter()
        .filter(|(_, span)| has_id(span))
        .map(|(service, _)| service.as_str())
        .collect();
    assert_eq!(
        services.len(),
        3,
        "the request's id is on a span of each process: {services:?}"
    );
}
