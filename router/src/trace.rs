//! The request's root span.

use axum::http::HeaderMap;
use baton_node::telemetry;
use tracing::{Span, field::Empty};

/// The span of one request, child of the W3C trace context in `headers` where there is one.
/// (`tonic::metadata::MetadataMap::as_ref` gives the headers of a gRPC request.)
pub fn request_span(headers: &HeaderMap) -> Span {
    let span = new_span();
    telemetry::set_parent_http(&span, headers);
    span
}

/// The span of a request's further choice, within the request's.
pub(crate) fn choice_span(request: &Span, choice: u32) -> Span {
    tracing::info_span!(parent: request, "choice", choice, prefill_node = Empty, decode_node = Empty)
}

/// The span of a request whose edge made none.
pub(crate) fn new_span() -> Span {
    tracing::info_span!(
        "request",
        request_id = Empty,
        prompt_tokens = Empty,
        completion_tokens = Empty,
        prefill_node = Empty,
        decode_node = Empty,
        outcome = Empty,
    )
}
