use opentelemetry_sdk::trace::{InMemorySpanExporter, InMemorySpanExporterBuilder};
use tracing::subscriber::DefaultGuard;

use super::*;

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CALLER: &str = "b7ad6b7169203331";

/// A subscriber for this thread, like the one that `init` sets up for the process.
fn subscribe(provider: &SdkTracerProvider) -> DefaultGuard {
    let spans = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer("baton"))
        .with_filter(our_spans());
    tracing_subscriber::registry().with(spans).set_default()
}

fn recording() -> (SdkTracerProvider, InMemorySpanExporter) {
    let exporter = InMemorySpanExporterBuilder::new().build();
    (
        SdkTracerProvider::builder()
            .with_simple_exporter(exporter.clone())
            .build(),
        exporter,
    )
}

fn config() -> TelemetryConfig {
    TelemetryConfig {
        service: "baton-test".into(),
        instance: "test-0".into(),
        otlp_endpoint: None,
        log_format: LogFormat::Text,
        filter: "info".into(),
    }
}

/// The trace id of `span`, 32 hex digits; `None` outside of any trace.
fn trace_id(span: &Span) -> Option<String> {
    let context = span.context();
    let context = context.span().span_context().clone();
    context.is_valid().then(|| context.trace_id().to_string())
}

fn traceparent(metadata: &MetadataMap) -> Vec<String> {
    let value = metadata
        .get("traceparent")
        .expect("a trace context")
        .to_str()
        .expect("ascii");
    value.split('-').map(str::to_owned).collect()
}

#[test]
fn a_trace_goes_through_a_process() {
    let (provider, exported) = recording();
    let _default = subscribe(&provider);

    let mut incoming = MetadataMap::new();
    incoming.insert("traceparent", format!("00-{TRACE}-{CALLER}-01").parse().expect("ascii"));
    let span = tracing::info_span!("served");
    set_parent(&span, &incoming);
    assert_eq!(trace_id(&span).as_deref(), Some(TRACE));
    let outgoing = span.in_scope(|| request(()).metadata().clone());
    let parts = traceparent(&outgoing);
    assert_eq!((parts[1].as_str(), parts[3].as_str()), (TRACE, "01"));
    assert_ne!(parts[2], CALLER, "the callee's parent is our span, not our caller's");

    drop(span);
    let spans = exported.get_finished_spans().expect("exported");
    assert_eq!(spans.len(), 1);
    assert_eq!(spans[0].parent_span_id.to_string(), CALLER);
    assert_eq!(spans[0].span_context.span_id().to_string(), parts[2]);
}

#[test]
fn without_an_exporter_the_trace_still_travels() {
    let provider = provider(&config()).expect("no endpoint to fail on");
    let _default = subscribe(&provider);
    let span = tracing::info_span!("served");
    let mut headers = http::HeaderMap::new();
    headers.insert("traceparent", format!("00-{TRACE}-{CALLER}-01").parse().expect("ascii"));
    set_parent_http(&span, &headers);
    let mut outgoing = http::HeaderMap::new();
    inject_span(&span, &mut outgoing);
    let value = outgoing["traceparent"].to_str().expect("ascii");
    assert!(value.contains(TRACE) && value.ends_with("-01"), "{value}");

    // And one begins here when the caller brought none.
    let first = tracing::info_span!("first");
    set_parent(&first, &MetadataMap::new());
    assert!(trace_id(&first).is_some_and(|id| id != TRACE));
}

#[test]
fn malformed_contexts_are_ignored() {
    let (provider, _) = recording();
    let _default = subscribe(&provider);
    for bad in [
        "",
        "00",
        "00-zz-b7ad6b7169203331-01",
        "00-00000000000000000000000000000000-0000000000000000-01",
    ] {
        let mut incoming = MetadataMap::new();
        incoming.insert("traceparent", bad.parse().expect("ascii"));
        let span = tracing::info_span!("served");
        set_parent(&span, &incoming);
        assert!(
            trace_id(&span).is_some_and(|id| id != TRACE && id.chars().any(|c| c != '0')),
            "{bad:?}"
        );
    }
}

#[test]
fn without_a_subscriber_nothing_is_sent_and_nothing_fails() {
    let span = Span::none();
    let mut metadata = MetadataMap::new();
    metadata.insert("traceparent", format!("00-{TRACE}-{CALLER}-01").parse().expect("ascii"));
    set_parent(&span, &metadata);
    let mut outgoing = MetadataMap::new();
    inject(&mut outgoing);
    assert!(outgoing.get("traceparent").is_none());
    assert_eq!(trace_id(&span), None);
}

#[test]
fn a_bad_filter_or_endpoint_names_its_flag() {
    let error = init(&TelemetryConfig {
        filter: "baton=loud".into(),
        ..config()
    })
    .expect_err("no such level");
    assert!(error.to_string().contains("--log"), "{error}");
    let error = init(&TelemetryConfig {
        otlp_endpoint: Some("not a url".into()),
        ..config()
    })
    .expect_err("no such endpoint");
    assert!(error.to_string().contains("--otlp"), "{error}");
}
