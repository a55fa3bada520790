//! The OpenAI HTTP API over [`Front`].

use crate::Front;

/// Routes under `/v1`; the probes and metrics are added by the caller.
pub(crate) fn routes(_front: Front) -> axum::Router {
    axum::Router::new()
}
