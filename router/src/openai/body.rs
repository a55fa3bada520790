//! Reads a body as a JSON object; every refusal is a typed error.

use axum::extract::{FromRequest, Request};
use tokio::time::Instant;

use super::{
    error::{ApiError, Endpoint},
    fields::Fields,
};
use crate::{Front, GenerateError, intake::IntakeError, limits};

/// The fields of a request's body.
pub(super) struct Body(pub(super) Fields);

impl FromRequest<Front> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, front: &Front) -> Result<Self, ApiError> {
        let (intake, deadline) = (front.intake(), Instant::now() + limits::RECEIVE);
        let whole = intake
            .whole(request.into_body(), limits::MAX_HTTP_BODY_BYTES, deadline)
            .await;
        let (bytes, _charge) = whole.map_err(refused)?;
        match intake.parse(bytes).await {
            Ok(serde_json::Value::Object(map)) => Ok(Self(Fields::new(map))),
            Ok(_) => Err(ApiError::malformed("the body must be a JSON object".to_owned())),
            Err(error) => Err(ApiError::malformed(format!("the body is not JSON: {error}"))),
        }
    }
}

fn refused(error: IntakeError) -> ApiError {
    match error {
        IntakeError::Full => ApiError::from_generate(&GenerateError::Overloaded, Endpoint::Chat),
        IntakeError::Slow => ApiError::body_too_slow(),
        IntakeError::TooLarge(limit) => ApiError::body_too_large(limit),
        IntakeError::Broken(error) => ApiError::malformed(format!("the body could not be read: {error}")),
    }
}
