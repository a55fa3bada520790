//! What a node's pushes have read and not sent yet, bounded over all of them.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes that may be read ahead of the network; clones share them. Whoever waits longest is served first.
#[derive(Clone)]
pub(super) struct ReadAhead {
    bytes: Arc<Semaphore>,
    total: usize,
}

/// A part of it.
pub(super) struct Share {
    _permit: OwnedSemaphorePermit,
}

impl ReadAhead {
    pub(super) fn new(total: usize) -> Self {
        Self {
            bytes: Arc::new(Semaphore::new(total)),
            total,
        }
    }

    /// Waits for `bytes`, or for all there are if that is less. Cancel-safe. (`None` never happens: nobody closes it.)
    pub(super) async fn take(&self, bytes: usize) -> Option<Share> {
        let bytes = u32::try_from(bytes.min(self.total)).ok()?;
        let _permit = self.bytes.clone().acquire_many_owned(bytes).await.ok()?;
        Some(Share { _permit })
    }

    /// Bytes that nobody has.
    #[cfg(test)]
    pub(super) fn left(&self) -> usize {
        self.bytes.available_permits()
    }
}

impl Share {
    /// `data`, which gives the share back when the last slice of it is dropped.
    pub(super) fn keep(self: Arc<Self>, data: Vec<u8>) -> Bytes {
        Bytes::from_owner(Kept { data, _share: self })
    }
}

struct Kept {
    data: Vec<u8>,
    _share: Arc<Share>,
}

impl AsRef<[u8]> for Kept {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}
