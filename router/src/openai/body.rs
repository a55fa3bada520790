//! Reads a body as a JSON object; every refusal is a typed error.

use axum::{
    extract::{FromRequest, Request, rejection::BytesRejection},
    http::StatusCode,
};
use bytes::Bytes;
use tokio::time::timeout;

use super::{error::ApiError, fields::Fields};
use crate::limits;

/// The fields of a request's body.
pub(super) struct Body(pub(super) Fields);

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let bytes = timeout(limits::HTTP_READ, Bytes::from_request(request, state)).await;
        let bytes = bytes.map_err(|_| ApiError::body_too_slow())?.map_err(refused)?;
        match serde_json::from_slice(&bytes) {
            Ok(serde_json::Value::Object(map)) => Ok(Self(Fields::new(map))),
            Ok(_) => Err(ApiError::malformed("the body must be a JSON object".to_owned())),
            Err(error) => Err(ApiError::malformed(format!("the body is not JSON: {error}"))),
        }
    }
}

fn refused(rejection: BytesRejection) -> ApiError {
    if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
        ApiError::body_too_large(limits::MAX_HTTP_BODY_BYTES)
    } else {
        ApiError::malformed(format!("the body could not be read: {rejection}"))
    }
}
