//! `GET /v1/models` and `GET /v1/models/{id}`.

use std::time::UNIX_EPOCH;

use axum::{
    Json,
    extract::{Path, State},
};
use serde_json::{Value, json};

use super::error::{ApiError, Endpoint, excerpt};
use crate::{Front, GenerateError, Model};

pub(super) async fn list(State(front): State<Front>) -> Json<Value> {
    Json(json!({ "object": "list", "data": front.models().iter().map(model).collect::<Vec<_>>() }))
}

pub(super) async fn retrieve(State(front): State<Front>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let models = front.models();
    models
        .iter()
        .find(|model| model.id == id)
        .map(|found| Json(model(found)))
        .ok_or_else(|| {
            let served = models
                .iter()
                .map(|model| model.id.as_str())
                .collect::<Vec<_>>()
                .join(", ");
            ApiError::from_generate(
                &GenerateError::UnknownModel {
                    model: excerpt(&id),
                    served,
                },
                Endpoint::Chat,
            )
        })
}

fn model(model: &Model) -> Value {
    json!({
        "id": model.id,
        "object": "model",
        "created": model.created.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
        "owned_by": "baton",
        "max_model_len": model.context_length,
        "kv_identity": model.kv_identity.map(|identity| identity.to_string()),
    })
}
