//! Closing a push stream from this side.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;

use crate::{Reject, StreamId};

#[derive(Default)]
struct Open {
    last: u64,
    streams: HashMap<StreamId, oneshot::Sender<Reject>>,
}

/// The open push streams, so that the node can close one ([`crate::ReceiverAction::Fence`]). Cheap to clone; all clones are one.
#[derive(Clone, Default)]
pub struct Fences {
    open: Arc<Mutex<Open>>,
}

impl Fences {
    /// Closes the stream from this side and tells the peer why. A stream that is gone is ignored. May be called anywhere; never blocks.
    pub fn fence(&self, stream: StreamId, reject: Reject) {
        if let Some(fence) = self.open().streams.remove(&stream) {
            // A stream that ends by itself right now needs no fence.
            let _ = fence.send(reject);
        }
    }

    /// A new stream, and what resolves when it is fenced.
    pub(super) fn register(&self) -> (StreamId, oneshot::Receiver<Reject>) {
        let (fence, fenced) = oneshot::channel();
        let mut open = self.open();
        open.last += 1;
        let stream = StreamId(open.last);
        open.streams.insert(stream, fence);
        (stream, fenced)
    }

    pub(super) fn forget(&self, stream: StreamId) {
        self.open().streams.remove(&stream);
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
