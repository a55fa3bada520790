//! A fixed team of threads that runs one closure at a time, all together, with barriers inside.
//!
//! Waiting spins briefly, then yields, then sleeps: cheap when every thread has a core, harmless when they share one. A thread that lost its core
//! in the middle of a step needs another's: the system moves it there only once that core is idle, so a waiter must soon sleep.
//!
//! Orders: what a thread writes before a barrier is released by its `arrived.fetch_add`, acquired by the last to arrive, released by `advance` and
//! acquired by `wait`. Items are only counted (relaxed). Whether to wake sleepers is decided by sequentially consistent operations, see [`Gate`].
#![allow(unsafe_code)]

use std::{
    cell::UnsafeCell,
    hint,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{
            AtomicBool, AtomicUsize,
            Ordering::{AcqRel, Acquire, Relaxed, SeqCst},
        },
    },
    thread::{self, JoinHandle},
};

/// How long a thread waits before it sleeps.
#[derive(Clone, Copy, Debug)]
struct Patience {
    /// Spins before yielding.
    spins: usize,
    /// Yields before sleeping.
    yields: usize,
}

/// Within a step: some microseconds, as the others are about to come, then about as long as it takes to sleep and be woken. A thread that
/// has lost its core is away for milliseconds, and may come back on this one.
const WITHIN: Patience = Patience {
    spins: 256,
    yields: 128,
};
/// Between steps: while thread 0 plans the next one. Yields leave the core to whoever needs it.
const BETWEEN: Patience = Patience {
    spins: 256,
    yields: 2048,
};
/// Neither: only tests wait like that.
#[cfg(test)]
const NONE: Patience = Patience { spins: 0, yields: 0 };

/// Where a wake-up could be lost: tests stay here for a while.
#[cfg(not(test))]
fn linger() {}
#[cfg(test)]
use tests::linger;

/// A value on cache lines of its own (two: they are fetched in pairs), so that writing it does not disturb those who read or write its neighbours.
#[derive(Default)]
#[repr(align(128))]
struct Line<T>(T);

/// A counter on which threads wait for a change.
///
/// A waiter that goes to sleep counts itself, then looks at the value for the last time; who changes the value does so, then looks whether anybody
/// sleeps. These four are sequentially consistent, so at least one of the two sees the other: no wake-up is lost. (If both do, the lock makes the
/// one who wakes wait until the other sleeps.)
struct Gate {
    value: Line<AtomicUsize>,
    sleep: Line<Sleep>,
    patience: Patience,
}

/// Untouched, but for reading `sleepers`, while nobody sleeps.
#[derive(Default)]
struct Sleep {
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    changed: Condvar,
}

impl Gate {
    fn new(patience: Patience) -> Self {
        Self {
            value: Line::default(),
            sleep: Line::default(),
            patience,
        }
    }

    /// All that was written before it became this value is visible.
    fn value(&self) -> usize {
        self.value.0.load(Acquire)
    }

    fn advance(&self) {
        self.value.0.fetch_add(1, SeqCst);
        linger();
        let Sleep {
            sleepers,
            lock,
            changed,
        } = &self.sleep.0;
        if sleepers.load(SeqCst) > 0 {
            drop(lock.lock().unwrap_or_else(PoisonError::into_inner));
            changed.notify_all();
        }
    }

    /// Returns once the value is no longer `seen`.
    fn wait(&self, seen: usize) {
        for _ in 0..self.patience.spins {
            if self.value() != seen {
                return;
            }
            hint::spin_loop();
        }
        for _ in 0..self.patience.yields {
            if self.value() != seen {
                return;
            }
            thread::yield_now();
        }
        let Sleep {
            sleepers,
            lock,
            changed,
        } = &self.sleep.0;
        let mut held = lock.lock().unwrap_or_else(PoisonError::into_inner);
        sleepers.fetch_add(1, SeqCst);
        linger();
        while self.value.0.load(SeqCst) == seen {
            linger();
            held = changed.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        sleepers.fetch_sub(1, Relaxed);
    }
}

type Task = dyn Fn(&Member<'_>) + Sync;

/// The running closure; meaningful only between `start`'s advance and the last `running` decrement.
struct TaskCell(UnsafeCell<Option<*const Task>>);

// SAFETY: written by the caller of `Team::run` only while no worker runs; the gate's atomics order the write before the reads.
unsafe impl Sync for TaskCell {}
// SAFETY: the pointer leads to a `Sync` closure.
unsafe impl Send for TaskCell {}

struct Shared {
    threads: usize,
    task: TaskCell,
    /// Advances when a task is there.
    start: Gate,
    stop: AtomicBool,
    /// Workers that have not finished the task.
    running: Line<AtomicUsize>,
    /// Advances when they all have.
    finished: Gate,
    /// Threads at the barrier.
    arrived: Line<AtomicUsize>,
    /// Advances when they all are.
    barrier: Gate,
    /// Next item of the current phase; 0 after every barrier.
    next: Line<AtomicUsize>,
    /// A thread panicked: nobody waits for it.
    broken: AtomicBool,
}

impl Shared {
    fn run_member(&self, index: usize, task: &(dyn Fn(&Member<'_>) + Sync)) {
        let member = Member { shared: self, index };
        if catch_unwind(AssertUnwindSafe(|| task(&member))).is_err() {
            // (The advance releases it.)
            self.broken.store(true, Relaxed);
            self.barrier.advance();
        }
    }

    fn work(&self, index: usize) {
        let mut seen = 0;
        loop {
            self.start.wait(seen);
            seen += 1;
            if self.stop.load(Relaxed) {
                return;
            }
            // SAFETY: the caller of `Team::run` stored a task before it advanced `start`, and keeps the closure alive until `running`
            // is 0.
            if let Some(task) = unsafe { *self.task.0.get() } {
                // SAFETY: as above.
                self.run_member(index, unsafe { &*task });
            }
            if self.running.0.fetch_sub(1, AcqRel) == 1 {
                self.finished.advance();
            }
        }
    }
}

/// A thread panicked in this or an earlier run; the team is of no more use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Broken;

/// The threads. Dropping the team ends them.
pub(super) struct Team {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

/// A thread's place in the running task.
pub(super) struct Member<'a> {
    shared: &'a Shared,
    index: usize,
}

impl Member<'_> {
    /// From 0; 0 is the caller of [`Team::run`].
    pub(super) fn index(&self) -> usize {
        self.index
    }

    /// Threads in the team.
    pub(super) fn threads(&self) -> usize {
        self.shared.threads
    }

    /// Returns when every thread is here: all that they wrote before is visible.
    ///
    /// # Panics
    /// When another thread panicked.
    pub(super) fn barrier(&self) {
        let shared = self.shared;
        if shared.threads == 1 {
            shared.next.0.store(0, Relaxed);
            return;
        }
        // Before it looks whether the team is broken: what breaks it also advances the barrier, so one of the two shows it, now or in `wait`.
        let seen = shared.barrier.value();
        assert!(!shared.broken.load(Relaxed), "another thread of the team panicked");
        if shared.arrived.0.fetch_add(1, AcqRel) + 1 == shared.threads {
            shared.arrived.0.store(0, Relaxed);
            shared.next.0.store(0, Relaxed);
            shared.barrier.advance();
        } else {
            shared.barrier.wait(seen);
            assert!(!shared.broken.load(Relaxed), "another thread of the team panicked");
        }
    }

    /// Next item of this phase, each given out once; the phase ends at the next barrier.
    pub(super) fn next_item(&self) -> usize {
        self.shared.next.0.fetch_add(1, Relaxed)
    }

    /// This thread's part of `0..total`: contiguous, nearly equal.
    pub(super) fn share(&self, total: usize) -> std::ops::Range<usize> {
        let threads = self.shared.threads;
        total * self.index / threads..total * (self.index + 1) / threads
    }
}

impl Team {
    /// Starts `threads - 1` threads: the caller of [`run`](Self::run) is the first.
    pub(super) fn new(threads: usize) -> std::io::Result<Self> {
        Self::with_patience(threads, WITHIN, BETWEEN)
    }

    fn with_patience(threads: usize, within: Patience, between: Patience) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            threads,
            task: TaskCell(UnsafeCell::new(None)),
            start: Gate::new(between),
            stop: AtomicBool::new(false),
            running: Line::default(),
            finished: Gate::new(within),
            arrived: Line::default(),
            barrier: Gate::new(within),
            next: Line::default(),
            broken: AtomicBool::new(false),
        });
        let mut team = Self {
            shared: shared.clone(),
            workers: Vec::with_capacity(threads - 1),
        };
        for index in 1..threads {
            let shared = shared.clone();
            let worker = thread::Builder::new()
                .name(format!("cpu-{index}"))
                .spawn(move || shared.work(index))?;
            team.workers.push(worker);
        }
        Ok(team)
    }

    /// Calls `task` on every thread and returns when all have returned.
    pub(super) fn run(&mut self, task: &(dyn Fn(&Member<'_>) + Sync)) -> Result<(), Broken> {
        let shared = &*self.shared;
        if shared.broken.load(Relaxed) {
            return Err(Broken);
        }
        shared.next.0.store(0, Relaxed);
        let pointer: *const (dyn Fn(&Member<'_>) + Sync) = task;
        // SAFETY: only the lifetime changes. No worker runs now (`&mut self`, and the last run waited for all), so nobody reads the cell; and
        // this function returns only after the last worker has left the closure.
        unsafe {
            *shared.task.0.get() = Some(std::mem::transmute::<*const (dyn Fn(&Member<'_>) + Sync), *const Task>(
                pointer,
            ))
        };
        if self.workers.is_empty() {
            shared.run_member(0, task);
        } else {
            shared.running.0.store(self.workers.len(), Relaxed);
            let seen = shared.finished.value();
            shared.start.advance();
            shared.run_member(0, task);
            shared.finished.wait(seen);
        }
        if shared.broken.load(Relaxed) {
            Err(Broken)
        } else {
            Ok(())
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        self.shared.start.advance();
        for worker in self.workers.drain(..) {
            // A worker's panics are caught where they happen.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests;
