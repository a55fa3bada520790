//! Other nodes' pools, as the decode node's service uses them.

use std::{sync::Arc, time::Duration};

use baton_kv::{Epoch, KvLayout};
use baton_proto::node::v1 as pb;
use tokio::{sync::Semaphore, time::timeout};

use crate::{
    limits,
    shm::{Mapping, Mappings, ShmError},
};

/// The pools to copy from, and the threads that may copy at once, of all streams.
#[derive(Clone)]
pub(super) struct Pools {
    pub(super) mappings: Mappings,
    pub(super) copiers: Arc<Semaphore>,
}

impl Pools {
    pub(super) fn new(mappings: Mappings) -> Self {
        Self {
            mappings,
            copiers: Arc::new(Semaphore::new(limits::SHM_COPIES)),
        }
    }

    /// Maps what `owner` offers, and keeps it. Returns the bytes per second at which it can be copied. Cancel-safe: nothing is kept, though a probe that
    /// has begun ends.
    pub(super) async fn admit(&self, owner: Epoch, offer: &pb::SharedPool, layout: &KvLayout) -> Result<f64, ShmError> {
        let mapping = Mapping::fetch(self.mappings.directory(), offer, layout).await?;
        let probe = async {
            // Beside no more copies than there may be.
            let turn = self.copiers.clone().acquire_owned().await.ok()?;
            let probe = move || {
                let bytes_per_s = mapping.copy_rate();
                drop(turn);
                (mapping, bytes_per_s)
            };
            tokio::task::spawn_blocking(probe).await.ok()
        };
        let (mapping, bytes_per_s) = timeout(Duration::from_millis(limits::SHM_PROBE_MS), probe)
            .await
            .ok()
            .flatten()
            .ok_or(ShmError::Timeout)?;
        self.mappings.insert(owner, mapping);
        Ok(bytes_per_s)
    }
}
