//! Every limit of the router, with its reason.

use std::time::Duration;

/// Retry time for a client where no node can serve: a restarted node announces itself within this.
pub(crate) const UNAVAILABLE_RETRY: Duration = Duration::from_secs(1);

/// Bytes of prompt text that are tokenised: far above any context (4 bytes per token would be 1 Mi tokens), so that a request's cost is bounded.
pub(crate) const MAX_INPUT_BYTES: usize = 4 << 20;

/// Messages of one chat.
pub(crate) const MAX_MESSAGES: usize = 4_096;

/// Stop strings of one request: each is searched for at every token.
pub(crate) const MAX_STOPS: usize = 16;

/// Characters of one stop string: text that may begin one is held back.
pub(crate) const MAX_STOP_CHARS: usize = 256;

/// Further stop ids of one request: nodes compare each token with each.
pub(crate) const MAX_STOP_IDS: usize = 64;

/// Events that wait for a slow client before its nodes are no longer read.
pub(crate) const ANSWER_EVENTS: usize = 64;
