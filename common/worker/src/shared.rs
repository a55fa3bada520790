//! The core behind its lock, and everything that follows each turn under it.

use std::sync::{Arc, Mutex, MutexGuard};

use baton_kv::{KvEvent, KvMemory, Pool, Time};
use baton_node::clock;
use baton_transfer::{
    Receiver, ReceiverAction,
    grpc::{Fences, ReceiverPort},
};
use tokio::sync::{Notify, broadcast, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    Load, WorkerMetrics,
    core::Core,
    last_chunks::LastChunks,
    limits,
    mailbox::{Mailbox, Posted},
};

/// What the handle, the engine thread and the handoff service share.
pub struct Shared {
    core: Mutex<Core>,
    pub(crate) mailbox: Arc<Mailbox>,
    pub(crate) memory: Arc<dyn KvMemory>,
    pub(crate) metrics: WorkerMetrics,
    pub(crate) fences: Fences,
    pub(crate) last_chunks: LastChunks,
    load: watch::Sender<Load>,
    kv_events: broadcast::Sender<Arc<[KvEvent]>>,
    /// An earlier deadline than the timer's has come up.
    deadline_moved: Notify,
    /// Cancelled when the engine is gone.
    pub(crate) lost: CancellationToken,
    /// Cancelled when the engine's thread has ended.
    pub(crate) ended: CancellationToken,
}

impl Shared {
    pub(crate) fn new(
        core: Core,
        mailbox: Arc<Mailbox>,
        memory: Arc<dyn KvMemory>,
        metrics: WorkerMetrics,
        fences: Fences,
        last_chunks: LastChunks,
    ) -> Self {
        let load = watch::Sender::new(core.load());
        Self {
            core: Mutex::new(core),
            mailbox,
            memory,
            metrics,
            fences,
            last_chunks,
            load,
            kv_events: broadcast::Sender::new(limits::KV_EVENT_BATCHES),
            deadline_moved: Notify::new(),
            lost: CancellationToken::new(),
            ended: CancellationToken::new(),
        }
    }

    /// One turn under the lock from outside of the engine's thread, which is woken if there may be something to run.
    pub(crate) fn with<R>(&self, act: impl FnOnce(&mut Core, Time) -> R) -> R {
        let (result, runnable) = self.turn(act);
        if runnable {
            self.mailbox.wake();
        }
        result
    }

    /// One turn under the lock: takes in what guards gave up, calls `act`, and carries out what follows. Says whether there may be something to run.
    pub(crate) fn turn<R>(&self, act: impl FnOnce(&mut Core, Time) -> R) -> (R, bool) {
        let mut core = self.lock();
        let now = clock::now();
        let deadline = core.receiver.next_deadline();
        let mut posted: Vec<Posted> = Vec::new();
        self.mailbox.take(&mut posted);
        core.take_posted(&mut posted, now);
        let result = act(&mut core, now);
        core.settle(now);
        let load = core.load();
        self.publish(&mut core, &load);
        if core.is_lost() {
            self.lost.cancel();
        }
        let next = core.receiver.next_deadline();
        if next.is_some_and(|next| deadline.is_none_or(|deadline| next < deadline)) {
            self.deadline_moved.notify_one();
        }
        (result, core.take_runnable(&load))
    }

    /// A panic under the lock may have left the tables broken: the node is lost then, like one whose device is.
    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(|poisoned| {
            let mut core = poisoned.into_inner();
            if !core.is_lost() {
                tracing::error!("a panic has left the node's tables in doubt: it stops");
                core.lose();
            }
            core
        })
    }

    fn publish(&self, core: &mut Core, load: &Load) {
        let mut events = Vec::new();
        core.pool.take_events(&mut events);
        if !events.is_empty() {
            // Fails when no router listens; a later one starts with a snapshot.
            let _ = self.kv_events.send(events.into());
        }
        self.metrics.pool(&load.pool, core.block_bytes());
        self.metrics.scheduler(&load.scheduler);
        self.metrics.handoffs(load.handoffs, load.streams);
        self.load.send_if_modified(|published| {
            let changed = published != load;
            *published = *load;
            changed
        });
    }

    pub(crate) fn watch_load(&self) -> watch::Receiver<Load> {
        self.load.subscribe()
    }

    /// A snapshot, and every event after it.
    pub(crate) fn kv_snapshot(&self) -> (u64, Vec<baton_kv::NamedBlock>, broadcast::Receiver<Arc<[KvEvent]>>) {
        self.with(|core, _| {
            // Events of this very turn are in the snapshot, too; their numbers say so.
            let events = self.kv_events.subscribe();
            let (sequence, blocks) = core.pool.snapshot();
            (sequence, blocks, events)
        })
    }

    /// Ends leases and handoffs when their time has come. Sleeps as long as there are none; runs until dropped.
    pub(crate) async fn keep_time(&self) {
        loop {
            let deadline = self.with(|core, _| core.receiver.next_deadline());
            let passed = async {
                match deadline {
                    Some(deadline) => {
                        let earliest = tokio::time::Instant::now() + limits::TICK_MIN;
                        tokio::time::sleep_until(clock::instant(deadline).max(earliest)).await;
                    }
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = passed => self.with(|core, now| core.tick(now)),
                () = self.deadline_moved.notified() => {}
            }
        }
    }
}

impl ReceiverPort for Shared {
    fn memory(&self) -> &Arc<dyn KvMemory> {
        &self.memory
    }

    fn locked<R>(&self, step: impl FnOnce(&mut Receiver, &mut Pool, Time, &mut Vec<ReceiverAction>) -> R) -> R {
        self.with(|core, now| {
            let Core {
                receiver,
                pool,
                actions,
                ..
            } = core;
            step(receiver, pool, now, actions)
        })
    }
}
