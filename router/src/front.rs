//! The front handle: what the edges call.

use std::sync::Arc;

use baton_kv::TokenId;

use crate::{
    error::GenerateError,
    request::{AnswerStream, GenerateRequest, Input, Model},
};

/// The router as its edges see it. Cheap to clone.
#[derive(Clone)]
pub struct Front {
    _inner: Arc<()>,
}

#[allow(unused_variables, clippy::todo, clippy::unused_async)]
impl Front {
    /// Validates and tokenises the request, and admits it to the queue. Every error found until then is returned here, at once (bad input, unknown model, shed, no
    /// nodes); a later one is the stream's last item. The first item is `Started`.
    ///
    /// Cancel-safe: dropping the future, or the stream, cancels the request.
    pub async fn generate(&self, request: GenerateRequest) -> Result<AnswerStream, GenerateError> {
        todo!()
    }

    /// The ids of a prompt, as `generate` would see them.
    pub async fn tokenize(&self, model: Option<&str>, input: Input) -> Result<Vec<TokenId>, GenerateError> {
        todo!()
    }

    /// The text of ids.
    pub async fn detokenize(&self, model: Option<&str>, ids: Vec<TokenId>) -> Result<String, GenerateError> {
        todo!()
    }

    /// The text of one id alone, and its bytes (which may be no whole character): for lists of log-probabilities.
    pub fn token_bytes(&self, id: TokenId) -> Vec<u8> {
        todo!()
    }

    /// The models that can be asked: one per router.
    pub fn models(&self) -> Vec<Model> {
        todo!()
    }

    /// Whether a request could be served now: at least one decode node is ready, and this router is not draining.
    pub fn ready(&self) -> bool {
        todo!()
    }
}
