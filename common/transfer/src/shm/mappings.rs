//! The pools that a decode node has mapped, by their owners' lives.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use baton_kv::Epoch;
use tokio::net::UnixStream;
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};

use super::{Directory, Mapping};
use crate::limits;

/// At most [`limits::MAX_MAPPINGS`]; the least recently used goes first. One goes by itself when its owner closes the socket (it died, or is leaving). A copy under
/// way keeps its mapping.
#[derive(Clone)]
pub struct Mappings {
    directory: Directory,
    table: Arc<Mutex<VecDeque<Entry>>>,
    tasks: TaskTracker,
    shutdown: CancellationToken,
}

struct Entry {
    owner: Epoch,
    mapping: Arc<Mapping>,
    /// Ends the task that watches the owner.
    _watch: DropGuard,
}

impl Mappings {
    /// Empty; owners are met in `directory`, and watched on `tasks` until `shutdown` is cancelled.
    pub fn new(directory: Directory, tasks: TaskTracker, shutdown: CancellationToken) -> Self {
        Self {
            directory,
            table: Arc::default(),
            tasks,
            shutdown,
        }
    }

    /// Where owners are met.
    pub(crate) fn directory(&self) -> &Directory {
        &self.directory
    }

    /// Keeps `owner`'s pool, instead of the one that it offered before.
    pub fn insert(&self, owner: Epoch, mapping: Mapping) {
        let mapping = Arc::new(mapping);
        let ended = self.shutdown.child_token();
        let entry = Entry {
            owner,
            mapping: mapping.clone(),
            _watch: ended.clone().drop_guard(),
        };
        let replaced = {
            let mut table = self.locked();
            let known = table.iter().position(|entry| entry.owner == owner);
            let full = (table.len() >= limits::MAX_MAPPINGS).then_some(0);
            let replaced = known.or(full).and_then(|at| table.remove(at));
            table.push_back(entry);
            replaced
        };
        // Unmapped outside of the lock.
        drop(replaced);
        let (this, peer) = (self.clone(), mapping.peer.clone());
        self.tasks.spawn(async move {
            tokio::select! {
                () = ended.cancelled() => {}
                () = gone(&peer) => this.remove(&mapping),
            }
        });
    }

    /// Forgets all of them.
    #[cfg(test)]
    pub(crate) fn clear(&self) {
        let all = std::mem::take(&mut *self.locked());
        drop(all);
    }

    /// Number of pools.
    pub fn len(&self) -> usize {
        self.locked().len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn remove(&self, mapping: &Arc<Mapping>) {
        let removed = {
            let mut table = self.locked();
            let at = table.iter().position(|entry| Arc::ptr_eq(&entry.mapping, mapping));
            at.and_then(|at| table.remove(at))
        };
        drop(removed);
    }

    /// `owner`'s pool, if it is mapped.
    pub fn get(&self, owner: Epoch) -> Option<Arc<Mapping>> {
        let mut table = self.locked();
        let at = table.iter().position(|entry| entry.owner == owner)?;
        let entry = table.remove(at)?;
        let mapping = entry.mapping.clone();
        table.push_back(entry);
        Some(mapping)
    }

    fn locked(&self) -> MutexGuard<'_, VecDeque<Entry>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Resolves when the owner has closed its end.
async fn gone(peer: &UnixStream) {
    loop {
        if peer.readable().await.is_err() {
            return;
        }
        match peer.try_read(&mut [0]) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // It has nothing more to say.
            _ => return,
        }
    }
}
