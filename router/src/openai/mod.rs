//! The OpenAI HTTP API over [`Front`]: `/v1/chat/completions`, `/v1/completions`, `/v1/models`.
//!
//! A field that is unknown, or known and not built yet, is a typed 400 that names it; none is ignored. (`user` is a label of the
//! client's own and changes nothing, as with OpenAI.) Further fields that Baton takes: `top_k`, `min_p`, `ignore_eos`, `stop_token_ids`.
//! The last chunk of each choice in a stream, and every whole answer, carry an object `baton` with the seed, the stage timings and the nodes that served it: the
//! choice, or the first one of a whole answer.

mod answer;
mod body;
mod chat;
mod completions;
mod error;
mod fields;
mod models;

use axum::{
    Router,
    response::{IntoResponse, Response},
    routing,
};

use crate::{Front, GenerateError};
use error::{ApiError, Endpoint};

/// Routes under `/v1`; the probes and metrics are added by the caller.
pub(crate) fn routes(front: Front) -> Router {
    Router::new()
        .route("/v1/chat/completions", routing::post(chat::create))
        .route("/v1/completions", routing::post(completions::create))
        .route("/v1/models", routing::get(models::list))
        .route("/v1/models/{id}", routing::get(models::retrieve))
        .fallback(|| async { ApiError::no_route() })
        .method_not_allowed_fallback(|| async { ApiError::method_not_allowed() })
        .with_state(front)
}

/// The answer when every connection is taken.
pub(crate) async fn overloaded() -> Response {
    ApiError::from_generate(&GenerateError::Overloaded, Endpoint::Chat).into_response()
}

#[cfg(test)]
mod tests;
