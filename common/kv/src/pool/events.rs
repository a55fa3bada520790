//! Events between two reads: numbered, bounded, the oldest dropped first.

use std::collections::VecDeque;

use crate::{KvEvent, KvEventKind};

pub(super) struct EventQueue {
    queue: VecDeque<KvEvent>,
    capacity: usize,
    /// Of the latest event; 0 before the first.
    sequence: u64,
}

impl EventQueue {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            queue: VecDeque::new(),
            capacity,
            sequence: 0,
        }
    }

    /// Numbers an event and keeps it; on overflow the oldest goes, which leaves a gap at the front.
    pub(super) fn push(&mut self, kind: KvEventKind) {
        self.sequence += 1;
        self.queue.push_back(KvEvent {
            sequence: self.sequence,
            kind,
        });
        if self.queue.len() > self.capacity {
            self.queue.pop_front();
        }
    }

    pub(super) fn take(&mut self, events: &mut Vec<KvEvent>) {
        events.extend(self.queue.drain(..));
    }

    pub(super) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Whether it is within its bound and ends, without gaps, at the latest event.
    pub(super) fn is_consistent(&self) -> bool {
        let numbers = self.queue.iter().rev().map(|event| event.sequence);
        self.queue.len() <= self.capacity && numbers.eq((0..=self.sequence).rev().take(self.queue.len()))
    }
}
