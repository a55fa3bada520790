//! Logs and traces.
//!
//! Logs go to stderr. Every span gets a W3C trace context, which travels on all of our calls ([`inject`], [`set_parent`]), whether spans are exported or not; they are
//! exported when an OTLP endpoint is configured.

use std::{sync::OnceLock, time::Duration};

use opentelemetry::{
    Context, KeyValue,
    propagation::{Extractor, Injector, TextMapPropagator},
    trace::{TraceContextExt, TracerProvider as _},
};
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::{
    Resource,
    propagation::TraceContextPropagator,
    trace::{Sampler, SdkTracerProvider},
};
use tonic::{codegen::http, metadata::MetadataMap};
use tracing::{Span, level_filters::LevelFilter};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::{EnvFilter, Layer, filter::Targets, layer::SubscriberExt, util::SubscriberInitExt};

use crate::limits;

/// How log lines look.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line, for collectors.
    Json,
}

/// Flags about logs and traces that every command has.
#[derive(Clone, PartialEq, Eq, Debug, Default, clap::Args)]
pub struct TelemetryArgs {
    /// What to log: a level (error, warn, info, debug, trace), or levels by crate as in info,baton_router=debug [default: info for servers, warn for clients]
    #[arg(
        long = "log",
        env = "BATON_LOG",
        value_name = "FILTER",
        global = true,
        help_heading = "Logs and traces"
    )]
    pub filter: Option<String>,
    /// How to log: text to read it yourself, json for a log collector
    #[arg(
        long,
        env = "BATON_LOG_FORMAT",
        value_name = "FORMAT",
        default_value = "text",
        global = true,
        help_heading = "Logs and traces"
    )]
    pub log_format: LogFormat,
    /// Where to send traces (OTLP over gRPC), as in http://127.0.0.1:4317; without it none are sent
    #[arg(
        long = "otlp",
        env = "OTEL_EXPORTER_OTLP_ENDPOINT",
        value_name = "URL",
        global = true,
        help_heading = "Logs and traces"
    )]
    pub otlp_endpoint: Option<String>,
}

/// What [`init`] needs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TelemetryConfig {
    /// `service.name`, e.g. `baton-router`.
    pub service: String,
    /// `service.instance.id`: the node id.
    pub instance: String,
    /// Where spans go; `None`: nowhere.
    pub otlp_endpoint: Option<String>,
    /// How log lines look.
    pub log_format: LogFormat,
    /// Which are written (syntax of `EnvFilter`).
    pub filter: String,
}

/// Why telemetry cannot start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter's syntax.
    #[error("--log {filter:?}: {source}")]
    Filter {
        /// As given.
        filter: String,
        /// What is wrong with it.
        source: tracing_subscriber::filter::ParseError,
    },
    /// The endpoint.
    #[error("--otlp {endpoint:?}: {source}")]
    Exporter {
        /// As given.
        endpoint: String,
        /// What is wrong with it.
        source: opentelemetry_otlp::ExporterBuildError,
    },
    /// This process has a subscriber already.
    #[error("logs and traces are set up already")]
    Twice,
}

/// Sends what is left when dropped, within [`limits::TELEMETRY_FLUSH`].
///
/// Drop it outside of the async runtime's threads while the runtime still lives: sending needs it.
#[must_use]
#[derive(Debug)]
pub struct TelemetryGuard {
    provider: Option<SdkTracerProvider>,
}

impl TelemetryGuard {
    /// Sends what is left, within `bound`. Blocks.
    pub fn shutdown(mut self, bound: Duration) {
        self.flush(bound);
    }

    fn flush(&mut self, bound: Duration) {
        if let Some(provider) = self.provider.take()
            && let Err(error) = provider.shutdown_with_timeout(bound)
        {
            tracing::warn!(%error, "the last spans were not sent");
        }
    }
}

impl Drop for TelemetryGuard {
    fn drop(&mut self) {
        self.flush(limits::TELEMETRY_FLUSH);
    }
}

/// Sets up logs and traces for this process, once. With an OTLP endpoint it must run inside a tokio runtime.
pub fn init(config: &TelemetryConfig) -> Result<TelemetryGuard, TelemetryError> {
    let filter = EnvFilter::builder()
        .parse(&config.filter)
        .map_err(|source| TelemetryError::Filter {
            filter: config.filter.clone(),
            source,
        })?;
    let provider = provider(config)?;
    let spans = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer("baton"))
        .with_filter(our_spans());
    let logs = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let registry = tracing_subscriber::registry().with(spans);
    match config.log_format {
        LogFormat::Text => registry
            .with(logs.with_ansi(is_terminal()).with_filter(filter))
            .try_init(),
        LogFormat::Json => registry
            .with(logs.json().flatten_event(true).with_filter(filter))
            .try_init(),
    }
    .map_err(|_| TelemetryError::Twice)?;
    Ok(TelemetryGuard {
        provider: Some(provider),
    })
}

fn is_terminal() -> bool {
    std::io::IsTerminal::is_terminal(&std::io::stderr())
}

/// Spans of Baton's own crates; those of libraries are noise in a request's trace.
fn our_spans() -> Targets {
    Targets::new().with_target("baton", LevelFilter::INFO)
}

fn provider(config: &TelemetryConfig) -> Result<SdkTracerProvider, TelemetryError> {
    let resource = Resource::builder()
        .with_service_name(config.service.clone())
        .with_attribute(KeyValue::new("service.instance.id", config.instance.clone()))
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .build();
    let builder = SdkTracerProvider::builder().with_resource(resource);
    let Some(endpoint) = &config.otlp_endpoint else {
        // Spans have ids, which travel with the caller's decision to record them; ours is not to.
        let sampler = Sampler::ParentBased(Box::new(Sampler::AlwaysOff));
        return Ok(builder.with_sampler(sampler).build());
    };
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .build()
        .map_err(|source| TelemetryError::Exporter {
            endpoint: endpoint.clone(),
            source,
        })?;
    Ok(builder.with_batch_exporter(exporter).build())
}

fn propagator() -> &'static TraceContextPropagator {
    static PROPAGATOR: OnceLock<TraceContextPropagator> = OnceLock::new();
    PROPAGATOR.get_or_init(TraceContextPropagator::new)
}

struct HeadersMut<'a>(&'a mut http::HeaderMap);

impl Injector for HeadersMut<'_> {
    fn set(&mut self, key: &str, value: String) {
        let name = http::HeaderName::from_bytes(key.as_bytes());
        if let (Ok(name), Ok(value)) = (name, http::HeaderValue::from_str(&value)) {
            self.0.insert(name, value);
        }
    }
}

struct Headers<'a>(&'a http::HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}

/// Writes the current span's trace context into a call's metadata.
pub fn inject(metadata: &mut MetadataMap) {
    inject_span(&Span::current(), metadata.as_mut());
}

/// `message` as a request that carries the current span's trace context.
pub fn request<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    inject(request.metadata_mut());
    request
}

/// Writes the trace context of `span` into HTTP headers.
pub fn inject_span(span: &Span, headers: &mut http::HeaderMap) {
    propagator().inject_context(&span.context(), &mut HeadersMut(headers));
}

/// Makes `span`, not entered yet, a child of the caller whose context is in `metadata`, if there is one.
pub fn set_parent(span: &Span, metadata: &MetadataMap) {
    set_parent_http(span, metadata.as_ref());
}

/// As [`set_parent`], from HTTP headers (`axum::http::HeaderMap` is this type).
pub fn set_parent_http(span: &Span, headers: &http::HeaderMap) {
    let parent = propagator().extract_with_context(&Context::new(), &Headers(headers));
    if parent.span().span_context().is_valid() {
        // Fails when no subscriber wants the span: then there is no trace to continue.
        let _ = span.set_parent(parent);
    }
}

#[cfg(test)]
mod tests;
