//! Work that is done before the team exists.

use std::{
    sync::{Mutex, PoisonError},
    thread,
};

/// Does `work` on each item, on `threads` threads, this one included. They take the items in order; a panic of one is the caller's.
pub(crate) fn for_each<T>(items: impl IntoIterator<Item = T, IntoIter: Send>, threads: usize, work: impl Fn(T) + Sync) {
    let items = Mutex::new(items.into_iter());
    let next = || items.lock().unwrap_or_else(PoisonError::into_inner).next();
    let run = || {
        while let Some(item) = next() {
            work(item);
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads {
            // Where the system has no more threads, those that there are do the work.
            if thread::Builder::new().spawn_scoped(scope, run).is_err() {
                break;
            }
        }
        run();
    });
}
