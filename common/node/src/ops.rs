//! `/health`, `/ready` and `/metrics`.
//!
//! Liveness says only that the process answers: it never depends on load, on peers or on the phase, so that a busy or draining process is not killed. Readiness is 200 in
//! [`Phase::Ready`] and 503 otherwise.

use std::sync::Arc;

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::net::TcpListener;

use crate::{
    Lifecycle, Phase, files,
    http::{self, Served},
    limits,
    metrics::Metrics,
};

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Clone)]
struct Ops {
    lifecycle: Lifecycle,
    metrics: Metrics,
    also: Arc<dyn Fn() -> bool + Send + Sync>,
}

/// The three routes, to merge into another app or to serve alone.
pub fn routes(lifecycle: Lifecycle, metrics: Metrics) -> Router {
    routes_when(lifecycle, metrics, || true)
}

/// The three routes; `/ready` is 200 only if `also` holds, too, when it is asked, and says `waiting` until then.
pub fn routes_when(lifecycle: Lifecycle, metrics: Metrics, also: impl Fn() -> bool + Send + Sync + 'static) -> Router {
    let also = Arc::new(also);
    Router::new()
        .route("/health", get(async || "ok\n"))
        .route("/ready", get(ready))
        .route("/metrics", get(scrape))
        .with_state(Ops {
            lifecycle,
            metrics,
            also,
        })
}

/// Serves the three routes on `listener` until the shutdown token is cancelled. Spawn it on [`Lifecycle::spawn`].
pub async fn serve(listener: TcpListener, lifecycle: Lifecycle, metrics: Metrics) {
    let stop = lifecycle.shutdown_token();
    let routes = routes(lifecycle, metrics);
    let served = Served {
        probes: routes.clone(),
        routes,
        connections: files::connections(limits::OPS_CONNECTIONS, files::raise_limit()),
        read_bound: limits::OPS_HEADERS,
    };
    http::serve(listener, served, stop).await;
}

async fn ready(State(ops): State<Ops>) -> (StatusCode, String) {
    let phase = ops.lifecycle.phase();
    match phase {
        Phase::Ready if (ops.also)() => (StatusCode::OK, format!("{phase}\n")),
        Phase::Ready => (StatusCode::SERVICE_UNAVAILABLE, "waiting\n".to_owned()),
        _ => (StatusCode::SERVICE_UNAVAILABLE, format!("{phase}\n")),
    }
}

async fn scrape(State(ops): State<Ops>) -> Response {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &ops.metrics) {
        Ok(()) => ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "metrics could not be encoded");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

#[cfg(test)]
mod tests;
