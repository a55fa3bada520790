//! What guards post, and what wakes the engine thread.
//!
//! A guard's `Drop` may run anywhere: on a runtime thread, in the middle of a flush. So it only posts what it gives up here; whoever locks the
//! core next takes it in first. The queue is bounded by the guards that exist: each posts once.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use baton_kv::BlockId;
use baton_scheduler::SequenceId;

/// What a guard gave up.
#[derive(Debug)]
pub(crate) enum Posted {
    /// A stream was dropped: its sequence or reservation is cancelled.
    Closed(SequenceId),
    /// Blocks that were being read are given back, one hold each.
    Release(Vec<BlockId>),
}

#[derive(Default)]
struct State {
    posted: Vec<Posted>,
    woken: bool,
    stopped: bool,
}

/// Shared by the core, the engine thread and every guard.
#[derive(Default)]
pub(crate) struct Mailbox {
    state: Mutex<State>,
    wake: Condvar,
}

impl Mailbox {
    /// Posts, and wakes the engine thread.
    pub(crate) fn post(&self, posted: Posted) {
        self.state().posted.push(posted);
        self.wake.notify_one();
    }

    /// Moves what was posted to the end of `into`.
    pub(crate) fn take(&self, into: &mut Vec<Posted>) {
        into.append(&mut self.state().posted);
    }

    /// There is something to plan.
    pub(crate) fn wake(&self) {
        self.state().woken = true;
        self.wake.notify_one();
    }

    /// The engine thread shall end.
    pub(crate) fn stop(&self) {
        self.state().stopped = true;
        self.wake.notify_one();
    }

    /// Whether the engine thread shall end.
    pub(crate) fn is_stopped(&self) -> bool {
        self.state().stopped
    }

    /// Sleeps until something is posted, [`Mailbox::wake`] or [`Mailbox::stop`].
    pub(crate) fn wait(&self) {
        let mut state = self
            .wake
            .wait_while(self.state(), |state| {
                !state.woken && !state.stopped && state.posted.is_empty()
            })
            .unwrap_or_else(PoisonError::into_inner);
        state.woken = false;
    }

    /// Nothing panics while this lock is held; were it so, the queue would still be whole.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
