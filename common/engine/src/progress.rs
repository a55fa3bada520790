//! How far loading is.

use std::sync::{Mutex, PoisonError};

/// How far loading is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LoadProgress {
    /// What is being done.
    pub stage: LoadStage,
    /// Bytes done in this stage.
    pub done: u64,
    /// Bytes of this stage.
    pub total: u64,
}

/// What loading does, in this order. A start that finds its panels in the cache does not pack; one that knows the file's digest does not hash.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LoadStage {
    /// Reading all weights for the identity.
    Hashing,
    /// Reading and verifying the panels of an earlier start.
    ReadingCache,
    /// Repacking the weights for the kernels.
    Packing,
    /// Writing the panels for the next start.
    WritingCache,
}

impl LoadStage {
    /// For logs and displays.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hashing => "hashing the weights",
            Self::ReadingCache => "reading the packed weights",
            Self::Packing => "packing the weights",
            Self::WritingCache => "keeping the packed weights",
        }
    }
}

/// Whom to tell: called often, on any thread that loads, with `done` rising from 0 to `total` in each stage that succeeds.
pub(crate) type Report<'a> = &'a (dyn Fn(LoadProgress) + Sync);

/// One stage, which several threads work on.
pub(crate) struct StageProgress<'a> {
    stage: LoadStage,
    total: u64,
    done: Mutex<u64>,
    report: Report<'a>,
}

impl<'a> StageProgress<'a> {
    pub(crate) fn begin(stage: LoadStage, total: u64, report: Report<'a>) -> Self {
        report(LoadProgress { stage, done: 0, total });
        Self {
            stage,
            total,
            done: Mutex::new(0),
            report,
        }
    }

    /// `bytes` more are done.
    pub(crate) fn add(&self, bytes: usize) {
        // Reported under the lock, so that it rises.
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        *done += bytes as u64;
        (self.report)(LoadProgress {
            stage: self.stage,
            done: *done,
            total: self.total,
        });
    }
}
