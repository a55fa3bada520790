//! What a node shows while its model loads: a bar on a terminal, a line in the log otherwise; its parent is told in steps.

use std::{
    io::{IsTerminal, stderr, stdout},
    sync::{Mutex, PoisonError},
};

use baton_engine::{LoadProgress, LoadStage};
use baton_node::announce::Announcer;

use crate::progress::Progress;

/// Percent between two lines for the parent.
const STEP_PERCENT: u8 = 5;

/// The display of one loading.
pub(super) struct Loading {
    /// Nobody at a terminal wants the lines.
    parent: Option<Announcer>,
    shown: Mutex<Option<Shown>>,
}

struct Shown {
    stage: LoadStage,
    announced_percent: u8,
    bar: Option<Progress>,
}

impl Loading {
    pub(super) fn new(announcer: Announcer) -> Self {
        Self {
            parent: Some(announcer).filter(|_| !stdout().is_terminal()),
            shown: Mutex::new(None),
        }
    }

    /// Called on any thread that loads.
    pub(super) fn at(&self, progress: LoadProgress) {
        let LoadProgress { stage, done, total } = progress;
        let percent = percent(done, total);
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let shown = match &mut *shown {
            Some(shown) if shown.stage == stage => {
                if percent >= shown.announced_percent + STEP_PERCENT {
                    shown.announced_percent = percent;
                    self.announce(stage, percent);
                }
                shown
            }
            last => {
                if let Some(bar) = last.take().and_then(|last| last.bar) {
                    bar.done();
                }
                self.announce(stage, percent);
                last.insert(Shown {
                    stage,
                    announced_percent: percent,
                    bar: begin(stage, total),
                })
            }
        };
        if let Some(bar) = &shown.bar {
            bar.at(done);
        }
    }

    fn announce(&self, stage: LoadStage, percent: u8) {
        if let Some(parent) = &self.parent {
            parent.loading(stage.name(), percent);
        }
    }
}

/// A bar that is left goes, however loading ended.
impl Drop for Loading {
    fn drop(&mut self) {
        let shown = self.shown.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(bar) = shown.take().and_then(|shown| shown.bar) {
            bar.done();
        }
    }
}

fn begin(stage: LoadStage, total: u64) -> Option<Progress> {
    if stderr().is_terminal() {
        return Some(Progress::bytes(stage.name(), total));
    }
    tracing::info!(bytes = total, "{}", stage.name());
    None
}

fn percent(done: u64, total: u64) -> u8 {
    (done as f64 / total.max(1) as f64 * 100.0).min(100.0) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percents_stay_within_bounds() {
        for (done, total, expected) in [
            (0, 0, 0),
            (0, 10, 0),
            (1, 3, 33),
            (10, 10, 100),
            (11, 10, 100),
            (u64::MAX, u64::MAX, 100),
        ] {
            assert_eq!(percent(done, total), expected, "{done} of {total}");
        }
    }
}
