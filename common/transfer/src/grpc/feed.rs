//! How the node role tells a push what has been computed. Bounded by the prompt: only the latest progress is kept, and one hold per chunk.

use std::{any::Any, sync::Arc};

use baton_kv::{BlockId, TokenId};

/// Keeps blocks readable until it is dropped: a guard of the worker's whose drop posts their release. The push keeps every hold until it has
/// ended and its last read has ended, even when the push's future was dropped.
pub type Hold = Arc<dyn Any + Send + Sync>;

/// The node role's end. Never blocks; may be used from the engine's thread. Dropping it before `first_token` abandons the push.
pub struct PushFeed {
    _private: (),
}

/// The push's end, for [`crate::grpc::PushJob`].
pub struct PushInput {
    _private: (),
}

/// A feed and its other end.
pub fn push_feed() -> (PushFeed, PushInput) {
    (PushFeed { _private: () }, PushInput { _private: () })
}

#[allow(unused_variables, clippy::todo)]
impl PushFeed {
    /// Positions `0..tokens` of the prompt are in the pool, in the blocks of `table` (the sequence's whole table). `hold` keeps them readable.
    pub fn computed(&self, tokens: usize, table: &[BlockId], hold: Hold) {
        todo!()
    }

    /// The first token was drawn. The prompt must be complete.
    pub fn first_token(&self, token: TokenId, logprob: f32) {
        todo!()
    }
}
