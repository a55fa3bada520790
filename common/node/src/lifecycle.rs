//! The life of one process.

use std::{fmt, future::Future, sync::Arc, time::Duration};

use tokio::{sync::watch, task::JoinHandle, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::limits;

/// Where a process is in its life. It only moves forward.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum Phase {
    /// It loads, listens, connects. Alive, not ready.
    #[default]
    Starting,
    /// It takes requests.
    Ready,
    /// It finishes the requests it has, and takes no new ones.
    Draining,
    /// Everything has ended or been told to.
    Stopped,
}

impl Phase {
    /// Lower case, as in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Stopped => "stopped",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How a drain ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Drained {
    /// Every request and every task ended within its bound.
    Clean,
    /// Some had to be left behind: requests that the bound cut off, tasks that did not end when told to.
    Cut {
        /// Requests that still ran when the bound passed.
        requests: usize,
        /// Tasks that still ran at the very end.
        tasks: usize,
    },
}

/// Handle to the life of this process; clones are the same life.
///
/// Two kinds of task: **requests** ([`Lifecycle::requests`]), which a drain waits for, and the other **tasks** ([`Lifecycle::tasks`]: listeners, streams to
/// routers, reporters), which run until [`Lifecycle::shutdown_token`] is cancelled and therefore still serve while requests finish.
#[derive(Clone, Debug)]
pub struct Lifecycle {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    phase: watch::Sender<Phase>,
    requests: TaskTracker,
    tasks: TaskTracker,
    shutdown: CancellationToken,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self::new()
    }
}

impl Lifecycle {
    /// A process in [`Phase::Starting`].
    pub fn new() -> Self {
        Self {
            inner: Arc::new(Inner {
                phase: watch::Sender::new(Phase::Starting),
                requests: TaskTracker::new(),
                tasks: TaskTracker::new(),
                shutdown: CancellationToken::new(),
            }),
        }
    }

    /// The phase now.
    pub fn phase(&self) -> Phase {
        *self.inner.phase.borrow()
    }

    /// Moves forward to `phase`. Says whether it moved: a step back (ready while draining) changes nothing.
    pub fn set(&self, phase: Phase) -> bool {
        let moved = self.inner.phase.send_if_modified(|now| {
            let forward = phase > *now;
            if forward {
                *now = phase;
            }
            forward
        });
        if moved {
            tracing::info!(phase = phase.as_str(), "phase");
            if phase == Phase::Stopped {
                self.inner.shutdown.cancel();
            }
        }
        moved
    }

    /// Sees every later phase.
    pub fn watch(&self) -> watch::Receiver<Phase> {
        self.inner.phase.subscribe()
    }

    /// Resolves when new requests are no longer taken. Cancel-safe.
    pub async fn draining(&self) {
        self.reached(Phase::Draining).await;
    }

    /// Resolves when the process has stopped. Cancel-safe.
    pub async fn stopped(&self) {
        self.reached(Phase::Stopped).await;
    }

    async fn reached(&self, phase: Phase) {
        // Fails only when the sender is gone, and `self` holds it.
        let _ = self.watch().wait_for(|now| *now >= phase).await;
    }

    /// Work that a drain waits for. A request that is not a task of its own holds a `requests().token()`.
    pub fn requests(&self) -> &TaskTracker {
        &self.inner.requests
    }

    /// Everything else: runs until the shutdown token is cancelled.
    pub fn tasks(&self) -> &TaskTracker {
        &self.inner.tasks
    }

    /// Spawns onto [`Lifecycle::tasks`]. The task must end when the shutdown token is cancelled.
    pub fn spawn<F>(&self, task: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        self.inner.tasks.spawn(task)
    }

    /// Cancelled when everything must end now: after the drain, or with [`Phase::Stopped`].
    pub fn shutdown_token(&self) -> CancellationToken {
        self.inner.shutdown.clone()
    }

    /// Ends the process's work: Draining; waits up to `bound` for the requests; cancels the shutdown token; waits up to
    /// [`limits::STOP_TIMEOUT`] for the tasks and the requests that were cut off; Stopped.
    ///
    /// Must not run on a task of [`Lifecycle::tasks`] or [`Lifecycle::requests`]: it would wait for itself.
    pub async fn drain(&self, bound: Duration) -> Drained {
        self.set(Phase::Draining);
        self.inner.requests.close();
        // (Not `Instant::now() + bound`: a bound may be longer than instants reach.)
        let in_time = timeout(bound, self.inner.requests.wait()).await.is_ok();
        let cut = if in_time { 0 } else { self.inner.requests.len() };
        if cut > 0 {
            tracing::warn!(
                requests = cut,
                bound_s = bound.as_secs_f64(),
                "the drain's bound has passed: requests are cut off"
            );
        }
        self.inner.shutdown.cancel();
        self.inner.tasks.close();
        let all = async {
            self.inner.requests.wait().await;
            self.inner.tasks.wait().await;
        };
        let ended = timeout(limits::STOP_TIMEOUT, all).await.is_ok();
        let left = if ended {
            0
        } else {
            self.inner.tasks.len() + self.inner.requests.len()
        };
        if left > 0 {
            tracing::error!(tasks = left, "tasks did not end when told to");
        }
        self.set(Phase::Stopped);
        if cut == 0 && left == 0 {
            Drained::Clean
        } else {
            Drained::Cut {
                requests: cut,
                tasks: left,
            }
        }
    }
}

#[cfg(test)]
mod tests;
