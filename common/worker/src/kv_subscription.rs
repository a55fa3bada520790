//! A pool's KV events as one router's stream needs them: a snapshot first, then events without gaps, and a snapshot again where some were lost.

use std::sync::Arc;

use baton_kv::{KvEvent, NamedBlock};
use tokio::sync::broadcast::{self, error::RecvError};

use crate::Shared;

/// What to tell the router next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum KvChange {
    /// Everything that can be found.
    Snapshot {
        /// Of the last event included.
        sequence: u64,
        /// Parents first.
        blocks: Vec<NamedBlock>,
    },
    /// What happened since, numbered without gaps.
    Events(Vec<KvEvent>),
}

/// One reader of a pool's KV events.
pub struct KvSubscription {
    shared: Arc<Shared>,
    events: Option<broadcast::Receiver<Arc<[KvEvent]>>>,
    /// Of the last event told.
    told: u64,
}

impl KvSubscription {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            events: None,
            told: 0,
        }
    }

    /// The next change starts afresh, with a snapshot.
    pub fn want_snapshot(&mut self) {
        self.events = None;
    }

    /// The next change. Cancel-safe.
    pub async fn next(&mut self) -> KvChange {
        loop {
            let Some(events) = &mut self.events else {
                let (sequence, blocks, events) = self.shared.kv_snapshot();
                (self.events, self.told) = (Some(events), sequence);
                return KvChange::Snapshot { sequence, blocks };
            };
            match events.recv().await {
                Ok(batch) => {
                    // Those that the snapshot included are told already.
                    let fresh: Vec<KvEvent> = batch
                        .iter()
                        .filter(|event| event.sequence > self.told)
                        .cloned()
                        .collect();
                    let (Some(first), Some(last)) = (fresh.first(), fresh.last()) else {
                        continue;
                    };
                    if first.sequence != self.told + 1 || last.sequence - first.sequence != fresh.len() as u64 - 1 {
                        self.want_snapshot();
                        continue;
                    }
                    self.told = last.sequence;
                    return KvChange::Events(fresh);
                }
                // The sender lives as long as `shared`: it has only left this reader behind.
                Err(RecvError::Lagged(_) | RecvError::Closed) => self.want_snapshot(),
            }
        }
    }
}
