//! How the node role tells a push what has been computed. Bounded by the prompt: only the latest progress is kept, and one hold per chunk.

use std::{
    any::Any,
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use baton_kv::BlockId;
use tokio::sync::Notify;

use crate::FirstToken;

/// Keeps blocks readable until it is dropped: a guard of the worker's whose drop posts their release. The push keeps every hold until it has
/// ended and its last read has ended, even when the push's future was dropped.
pub type Hold = Arc<dyn Any + Send + Sync>;

/// What happened since the push last looked.
#[derive(Default)]
pub(super) struct Progress {
    /// The latest: positions computed, and the table.
    pub(super) computed: Option<(usize, Vec<BlockId>)>,
    /// The latest within a step: positions, layers computed of them, and the table.
    pub(super) layers: Option<(usize, usize, Vec<BlockId>)>,
    /// All new ones.
    pub(super) holds: Vec<Hold>,
    pub(super) first: Option<FirstToken>,
    /// The push has ended: nothing is kept any more.
    ended: bool,
}

#[derive(Default)]
struct Shared {
    progress: Mutex<Progress>,
    changed: Notify,
}

impl Shared {
    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Progress)) {
        let mut progress = self.progress();
        if !progress.ended {
            change(&mut progress);
            self.changed.notify_one();
        }
    }
}

/// The node role's end. Never blocks; may be used from the engine's thread. The push waits for it until its lease or deadline ends.
pub struct PushFeed {
    shared: Arc<Shared>,
}

/// The push's end, for [`crate::grpc::PushJob`].
pub struct PushInput {
    shared: Arc<Shared>,
}

/// A feed and its other end.
pub fn push_feed() -> (PushFeed, PushInput) {
    let shared = Arc::new(Shared::default());
    (PushFeed { shared: shared.clone() }, PushInput { shared })
}

impl PushFeed {
    /// Positions `0..tokens` of the prompt are in the pool, in the blocks of `table` (the sequence's whole table, blocks that the decode node holds
    /// included). `hold` keeps them readable. After the push has ended, `hold` is dropped at once.
    pub fn computed(&self, tokens: usize, table: &[BlockId], hold: Hold) {
        self.shared.change(|progress| {
            progress.computed = Some((tokens, table.to_vec()));
            progress.holds.push(hold);
        });
    }

    /// The first `layers` layers of positions `0..tokens` are in the pool, while the step goes on that computes the others. `hold` as for
    /// [`PushFeed::computed`], with the first call that tells of a block.
    pub fn computed_layers(&self, tokens: usize, layers: usize, table: &[BlockId], hold: Option<Hold>) {
        self.shared.change(|progress| {
            progress.layers = Some((tokens, layers, table.to_vec()));
            progress.holds.extend(hold);
        });
    }

    /// The first token was drawn. The prompt must be complete.
    pub fn first_token(&self, first: FirstToken) {
        self.shared.change(|progress| progress.first = Some(first));
    }
}

impl PushInput {
    /// Waits until [`PushInput::take`] has something new. Cancel-safe.
    pub(super) async fn changed(&self) {
        self.shared.changed.notified().await;
    }

    /// Takes what is new.
    pub(super) fn take(&self) -> Progress {
        mem::take(&mut *self.shared.progress())
    }
}

impl Drop for PushInput {
    fn drop(&mut self) {
        // Holds are dropped outside of the lock: what they post may take others.
        let kept = mem::replace(
            &mut *self.shared.progress(),
            Progress {
                ended: true,
                ..Progress::default()
            },
        );
        drop(kept);
    }
}
