//! A fixed team of threads that runs one closure at a time, all together, with barriers inside.
//!
//! Waiting spins briefly, then yields, then sleeps: cheap when every thread has a core, harmless when they share one. A thread that lost its core
//! in the middle of a step needs another's: the system moves it there only once that core is idle, so a waiter must soon sleep. How long a thread
//! kept others waiting beyond the spins is measured, and one that costs more than it adds stands aside for a while (see [`attendance`]).
//!
//! Orders: what a thread writes before a barrier is released by its `arrived.fetch_add`, acquired by the last to arrive, released by `advance` and
//! acquired by `wait`. Items are only counted (relaxed). Whether to wake sleepers is decided by sequentially consistent operations, see [`Gate`].
#![allow(unsafe_code)]

use std::{
    cell::{Cell, UnsafeCell},
    hint,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{
            AtomicBool, AtomicU64, AtomicUsize,
            Ordering::{AcqRel, Acquire, Relaxed, SeqCst},
        },
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use attendance::Attendance;

mod attendance;

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
/// A waiter whose spins were in vain counts itself, then looks at the value again; who changes the value does so, then looks whether anybody
/// is counted. These four are sequentially consistent, so at least one of the two sees the other: no wake-up is lost. (If both do, the lock makes the
/// one who wakes wait until the other sleeps.)
struct Gate {
    value: Line<AtomicUsize>,
    slow: Line<Slow>,
    patience: Patience,
}

/// Untouched, but for reading `waiters`, while nobody waits for longer than it spins.
#[derive(Default)]
struct Slow {
    waiters: AtomicUsize,
    /// A value, and since when they have waited for it to change.
    since: Mutex<Option<(usize, Instant)>>,
    changed: Condvar,
}

impl Slow {
    fn since(&self) -> MutexGuard<'_, Option<(usize, Instant)>> {
        self.since.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Gate {
    fn new(patience: Patience) -> Self {
        Self {
            value: Line::default(),
            slow: Line::default(),
            patience,
        }
    }

    /// All that was written before it became this value is visible.
    fn value(&self) -> usize {
        self.value.0.load(Acquire)
    }

    /// How long others have waited for the one who is about to advance, beyond their spins.
    fn kept_waiting(&self) -> Duration {
        let slow = &self.slow.0;
        if slow.waiters.load(Relaxed) == 0 {
            return Duration::ZERO;
        }
        let since = slow.since().filter(|&(value, _)| value == self.value());
        since.map_or(Duration::ZERO, |(_, since)| since.elapsed())
    }

    fn advance(&self) {
        self.value.0.fetch_add(1, SeqCst);
        linger();
        let slow = &self.slow.0;
        if slow.waiters.load(SeqCst) > 0 {
            drop(slow.since());
            slow.changed.notify_all();
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
        let slow = &self.slow.0;
        let mut since = slow.since();
        slow.waiters.fetch_add(1, SeqCst);
        linger();
        if self.value.0.load(SeqCst) == seen {
            since.take_if(|(value, _)| *value != seen);
            since.get_or_insert_with(|| (seen, Instant::now()));
        }
        drop(since);
        for _ in 0..self.patience.yields {
            if self.value() != seen {
                break;
            }
            thread::yield_now();
        }
        let mut since = slow.since();
        while self.value.0.load(SeqCst) == seen {
            linger();
            since = slow.changed.wait(since).unwrap_or_else(PoisonError::into_inner);
        }
        slow.waiters.fetch_sub(1, Relaxed);
    }
}

type Task = dyn Fn(&Member<'_>) + Sync;

/// The running closure; meaningful only between the seats' start and the last `running` decrement.
struct TaskCell(UnsafeCell<Option<*const Task>>);

// SAFETY: written by the caller of `Team::run` only while no worker runs; the gate's atomics order the write before the reads.
unsafe impl Sync for TaskCell {}
// SAFETY: the pointer leads to a `Sync` closure.
unsafe impl Send for TaskCell {}

/// What is one thread's.
struct Seat {
    /// Advances when a task is there for it; never thread 0's.
    start: Gate,
    /// Its index in that task.
    index: AtomicUsize,
    /// Nanoseconds of the running task for which others waited for it.
    waited: Line<AtomicU64>,
}

impl Seat {
    fn new(between: Patience) -> Self {
        Self {
            start: Gate::new(between),
            index: AtomicUsize::new(0),
            waited: Line::default(),
        }
    }

    /// The thread has come to where others may have waited for it.
    fn note_late(&self, gate: &Gate) {
        let waited = gate.kept_waiting();
        if !waited.is_zero() {
            let nanos = u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX);
            self.waited.0.fetch_add(nanos, Relaxed);
        }
    }
}

struct Shared {
    /// Of every thread, whether it takes part or not.
    seats: Vec<Seat>,
    /// Threads that take part in the task.
    present: AtomicUsize,
    task: TaskCell,
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
    fn run_member(&self, seat: &Seat, task: &(dyn Fn(&Member<'_>) + Sync)) {
        let member = Member {
            shared: self,
            seat,
            index: seat.index.load(Relaxed),
            threads: self.present.load(Relaxed),
            met: Cell::new(0),
        };
        if catch_unwind(AssertUnwindSafe(|| task(&member))).is_err() {
            // (The advance releases it.)
            self.broken.store(true, Relaxed);
            self.barrier.advance();
        }
    }

    fn work(&self, seat: &Seat) {
        let mut seen = 0;
        loop {
            seat.start.wait(seen);
            seen += 1;
            if self.stop.load(Relaxed) {
                return;
            }
            // SAFETY: the caller of `Team::run` stored a task before it advanced `start`, and keeps the closure alive until `running`
            // is 0.
            if let Some(task) = unsafe { *self.task.0.get() } {
                // SAFETY: as above.
                self.run_member(seat, unsafe { &*task });
            }
            // (After the decrement the caller might not see it.)
            seat.note_late(&self.finished);
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
    attendance: Attendance,
    /// When the last task was over.
    idle_since: Instant,
}

/// A thread's place in the running task.
pub(super) struct Member<'a> {
    shared: &'a Shared,
    seat: &'a Seat,
    index: usize,
    threads: usize,
    /// Barriers passed.
    met: Cell<usize>,
}

impl Member<'_> {
    /// From 0; 0 is the caller of [`Team::run`].
    pub(super) fn index(&self) -> usize {
        self.index
    }

    /// Threads that run the task: the team's, or fewer.
    pub(super) fn threads(&self) -> usize {
        self.threads
    }

    /// Returns when every thread is here: all that they wrote before is visible.
    ///
    /// # Panics
    /// When another thread panicked.
    pub(super) fn barrier(&self) {
        let shared = self.shared;
        self.met.set(self.met.get() + 1);
        if self.threads == 1 {
            shared.next.0.store(0, Relaxed);
            return;
        }
        // Before it looks whether the team is broken: what breaks it also advances the barrier, so one of the two shows it, now or in `wait`.
        let seen = shared.barrier.value();
        assert!(!shared.broken.load(Relaxed), "another thread of the team panicked");
        if shared.arrived.0.fetch_add(1, AcqRel) + 1 == self.threads {
            self.seat.note_late(&shared.barrier);
            shared.arrived.0.store(0, Relaxed);
            shared.next.0.store(0, Relaxed);
            shared.barrier.advance();
        } else {
            shared.barrier.wait(seen);
            assert!(!shared.broken.load(Relaxed), "another thread of the team panicked");
        }
    }

    /// Barriers that this thread has passed since the task began.
    pub(super) fn met(&self) -> usize {
        self.met.get()
    }

    /// Next item of this phase, each given out once; the phase ends at the next barrier.
    pub(super) fn next_item(&self) -> usize {
        self.shared.next.0.fetch_add(1, Relaxed)
    }

    /// This thread's part of `0..total`: contiguous, nearly equal.
    pub(super) fn share(&self, total: usize) -> std::ops::Range<usize> {
        total * self.index / self.threads..total * (self.index + 1) / self.threads
    }
}

impl Team {
    /// Starts `threads - 1` threads: the caller of [`run`](Self::run) is the first.
    pub(super) fn new(threads: usize) -> std::io::Result<Self> {
        Self::with_patience(threads, WITHIN, BETWEEN)
    }

    fn with_patience(threads: usize, within: Patience, between: Patience) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            seats: (0..threads).map(|_| Seat::new(between)).collect(),
            present: AtomicUsize::new(threads),
            task: TaskCell(UnsafeCell::new(None)),
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
            attendance: Attendance::new(threads),
            idle_since: Instant::now(),
        };
        for index in 1..threads {
            let shared = shared.clone();
            let worker = thread::Builder::new()
                .name(format!("cpu-{index}"))
                .spawn(move || shared.work(&shared.seats[index]))?;
            team.workers.push(worker);
        }
        Ok(team)
    }

    /// Calls `task` on every thread that is present and returns when all have returned.
    pub(super) fn run(&mut self, task: &(dyn Fn(&Member<'_>) + Sync)) -> Result<(), Broken> {
        let shared = &*self.shared;
        if shared.broken.load(Relaxed) {
            return Err(Broken);
        }
        let started = Instant::now();
        self.attendance.pass(started - self.idle_since);
        let mut present = 0;
        for thread in self.attendance.present() {
            shared.seats[thread].index.store(present, Relaxed);
            present += 1;
        }
        shared.present.store(present, Relaxed);
        shared.next.0.store(0, Relaxed);
        let pointer: *const (dyn Fn(&Member<'_>) + Sync) = task;
        // SAFETY: only the lifetime changes. No worker runs now (`&mut self`, and the last run waited for all), so nobody reads the cell; and
        // this function returns only after the last worker has left the closure.
        unsafe {
            *shared.task.0.get() = Some(std::mem::transmute::<*const (dyn Fn(&Member<'_>) + Sync), *const Task>(
                pointer,
            ))
        };
        shared.running.0.store(present - 1, Relaxed);
        let seen = shared.finished.value();
        for thread in self.attendance.present().filter(|&thread| thread != 0) {
            shared.seats[thread].start.advance();
        }
        shared.run_member(&shared.seats[0], task);
        if present > 1 {
            shared.finished.wait(seen);
        }
        self.idle_since = Instant::now();
        let step = self.idle_since - started;
        self.attendance.judge(step, |thread| {
            Duration::from_nanos(shared.seats[thread].waited.0.swap(0, Relaxed))
        });
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
        for seat in &self.shared.seats {
            seat.start.advance();
        }
        for worker in self.workers.drain(..) {
            // A worker's panics are caught where they happen.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests;
