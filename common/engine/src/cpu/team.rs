//! A fixed team of threads that runs one closure at a time, all together, with barriers inside.
//!
//! Waiting spins briefly, then yields, then sleeps: cheap when every thread has a core, harmless when they share one.
#![allow(unsafe_code)]

use std::{
    cell::UnsafeCell,
    hint,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
};

/// Spins before yielding: some microseconds.
const SPINS: usize = 256;
/// Yields before sleeping: about a millisecond of an idle core.
const YIELDS: usize = 2048;

/// A counter on which threads wait for a change.
#[derive(Default)]
struct Gate {
    value: AtomicUsize,
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    changed: Condvar,
}

impl Gate {
    fn value(&self) -> usize {
        self.value.load(SeqCst)
    }

    fn advance(&self) {
        self.value.fetch_add(1, SeqCst);
        // A waiter counts itself before it looks at the value for the last time, so one of the two sees the other.
        if self.sleepers.load(SeqCst) > 0 {
            let _held = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.changed.notify_all();
        }
    }

    /// Returns once the value is no longer `seen`.
    fn wait(&self, seen: usize) {
        for _ in 0..SPINS {
            if self.value() != seen {
                return;
            }
            hint::spin_loop();
        }
        for _ in 0..YIELDS {
            if self.value() != seen {
                return;
            }
            thread::yield_now();
        }
        let mut held = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleepers.fetch_add(1, SeqCst);
        while self.value() == seen {
            held = self.changed.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, SeqCst);
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
    start: Gate,
    stop: AtomicBool,
    /// Workers that have not finished the task.
    running: AtomicUsize,
    finished: Gate,
    arrived: AtomicUsize,
    barrier: Gate,
    /// Next item of the current phase; 0 after every barrier.
    next: AtomicUsize,
    /// A thread panicked: nobody waits for it.
    broken: AtomicBool,
}

impl Shared {
    fn run_member(&self, index: usize, task: &(dyn Fn(&Member<'_>) + Sync)) {
        let member = Member { shared: self, index };
        if catch_unwind(AssertUnwindSafe(|| task(&member))).is_err() {
            self.broken.store(true, SeqCst);
            self.barrier.advance();
        }
    }

    fn work(&self, index: usize) {
        let mut seen = 0;
        loop {
            self.start.wait(seen);
            seen += 1;
            if self.stop.load(SeqCst) {
                return;
            }
            // SAFETY: the caller of `Team::run` stored a task before it advanced `start`, and keeps the closure alive until `running`
            // is 0.
            if let Some(task) = unsafe { *self.task.0.get() } {
                // SAFETY: as above.
                self.run_member(index, unsafe { &*task });
            }
            self.running.fetch_sub(1, SeqCst);
            self.finished.advance();
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
            shared.next.store(0, SeqCst);
            return;
        }
        let seen = shared.barrier.value();
        assert!(!shared.broken.load(SeqCst), "another thread of the team panicked");
        if shared.arrived.fetch_add(1, SeqCst) + 1 == shared.threads {
            shared.arrived.store(0, SeqCst);
            shared.next.store(0, SeqCst);
            shared.barrier.advance();
        } else {
            shared.barrier.wait(seen);
            assert!(!shared.broken.load(SeqCst), "another thread of the team panicked");
        }
    }

    /// Next item of this phase, each given out once; the phase ends at the next barrier.
    pub(super) fn next_item(&self) -> usize {
        self.shared.next.fetch_add(1, SeqCst)
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
        let shared = Arc::new(Shared {
            threads,
            task: TaskCell(UnsafeCell::new(None)),
            start: Gate::default(),
            stop: AtomicBool::new(false),
            running: AtomicUsize::new(0),
            finished: Gate::default(),
            arrived: AtomicUsize::new(0),
            barrier: Gate::default(),
            next: AtomicUsize::new(0),
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
        if shared.broken.load(SeqCst) {
            return Err(Broken);
        }
        shared.next.store(0, SeqCst);
        let pointer: *const (dyn Fn(&Member<'_>) + Sync) = task;
        // SAFETY: only the lifetime changes. No worker runs now (`&mut self`, and the last run waited for all), so nobody reads the cell; and
        // this function returns only after the last worker has left the closure.
        unsafe {
            *shared.task.0.get() = Some(std::mem::transmute::<*const (dyn Fn(&Member<'_>) + Sync), *const Task>(
                pointer,
            ))
        };
        shared.running.store(self.workers.len(), SeqCst);
        shared.start.advance();
        shared.run_member(0, task);
        loop {
            let seen = shared.finished.value();
            if shared.running.load(SeqCst) == 0 {
                break;
            }
            shared.finished.wait(seen);
        }
        if shared.broken.load(SeqCst) {
            Err(Broken)
        } else {
            Ok(())
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        self.shared.start.advance();
        for worker in self.workers.drain(..) {
            // A worker's panics are caught where they happen.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests;
