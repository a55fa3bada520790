//! Which node holds which named blocks: a hint for placement, never a promise. Nodes compare tokens themselves.
//!
//! Memory has a hard cap: at the cap, blocks that are stored are not added (the index keeps the older, and lengthens again as nodes evict).

use std::collections::{HashMap, HashSet};

use baton_kv::{BlockName, Epoch, KvEvent, KvEventKind};

use super::member::MemberId;

/// Bytes that one entry can cost: a table is 7/8 full at most and is not shrunk before it is a quarter of that, so it has up to 32/7 buckets per entry, of a
/// name and a control byte each.
const ENTRY_BYTES: usize = (size_of::<BlockName>() + 1) * 32 / 7 + 2;

/// What a node's stream says about its blocks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum KvReport {
    /// A part of a snapshot.
    Snapshot {
        /// Of the node that sends it.
        epoch: Epoch,
        /// Of the last event included.
        sequence: u64,
        /// Names of blocks.
        names: Vec<BlockName>,
        /// The first part.
        first: bool,
        /// The last part.
        last: bool,
    },
    /// Events without gaps among themselves.
    Events {
        /// Of the node that sends them.
        epoch: Epoch,
        /// In order.
        events: Vec<KvEvent>,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stream {
    /// A snapshot must come first.
    Waiting,
    /// Some parts of a snapshot have come.
    Filling { sequence: u64 },
    /// In step.
    Live { next: u64 },
}

#[derive(Debug)]
struct Holder {
    epoch: Epoch,
    stream: Stream,
    names: HashSet<BlockName>,
}

impl Holder {
    fn remove(&mut self, name: &BlockName) {
        self.names.remove(name);
        // Keeps the bytes of a table that shrank within what its entries are counted for.
        if self.names.capacity() > 64 && self.names.len() < self.names.capacity() / 4 {
            self.names.shrink_to(self.names.len() * 2);
        }
    }
}

/// Names → holders.
#[derive(Debug)]
pub struct PrefixIndex {
    holders: HashMap<MemberId, Holder>,
    entries: usize,
    max_entries: usize,
    dropped: u64,
}

impl PrefixIndex {
    /// Empty; never more than `max_bytes`.
    pub fn new(max_bytes: usize) -> Self {
        Self {
            holders: HashMap::new(),
            entries: 0,
            max_entries: max_bytes / ENTRY_BYTES,
            dropped: 0,
        }
    }

    /// A member whose stream must start with a snapshot.
    pub fn join(&mut self, member: MemberId, epoch: Epoch) {
        let holder = Holder {
            epoch,
            stream: Stream::Waiting,
            names: HashSet::new(),
        };
        if let Some(old) = self.holders.insert(member, holder) {
            self.entries -= old.names.len();
        }
    }

    /// Forgets a member and its blocks.
    pub fn leave(&mut self, member: MemberId) {
        if let Some(holder) = self.holders.remove(&member) {
            self.entries -= holder.names.len();
        }
    }

    /// Takes in a report. True when events were lost and a snapshot must be asked for; said once per loss.
    #[must_use]
    pub fn report(&mut self, member: MemberId, report: KvReport) -> bool {
        let Some(holder) = self.holders.get_mut(&member) else {
            return false;
        };
        let before = holder.names.len();
        let room = self.max_entries - (self.entries - before);
        let (wanted, dropped) = match report {
            KvReport::Snapshot { epoch, .. } | KvReport::Events { epoch, .. } if epoch != holder.epoch => (false, 0),
            KvReport::Snapshot {
                sequence,
                names,
                first,
                last,
                ..
            } => holder.snapshot(sequence, names, first, last, room),
            KvReport::Events { events, .. } => holder.events(events, room),
        };
        self.entries = self.entries - before + holder.names.len();
        self.dropped += dropped;
        wanted
    }

    /// How many of `names`, from the first, `member` holds.
    pub fn held(&self, member: MemberId, names: &[BlockName]) -> usize {
        let Some(holder) = self.holders.get(&member) else {
            return 0;
        };
        names.iter().take_while(|name| holder.names.contains(name)).count()
    }

    /// (name, holder) pairs.
    pub fn entries(&self) -> usize {
        self.entries
    }

    /// Bytes, counted as the entries' worst case; never over the cap.
    pub fn bytes(&self) -> usize {
        self.entries * ENTRY_BYTES
    }

    /// Stored blocks that were not added because the cap was reached.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }
}

impl Holder {
    fn snapshot(&mut self, sequence: u64, names: Vec<BlockName>, first: bool, last: bool, room: usize) -> (bool, u64) {
        if first {
            self.names = HashSet::new();
        } else if self.stream != (Stream::Filling { sequence }) {
            return (self.lost(), 0);
        }
        let dropped = names.into_iter().map(|name| self.add(name, room)).sum();
        self.stream = if last {
            Stream::Live {
                next: sequence.saturating_add(1),
            }
        } else {
            Stream::Filling { sequence }
        };
        (false, dropped)
    }

    fn events(&mut self, events: Vec<KvEvent>, room: usize) -> (bool, u64) {
        let mut dropped = 0;
        for event in events {
            let Stream::Live { next } = self.stream else {
                return (false, dropped);
            };
            if event.sequence < next {
                continue;
            }
            if event.sequence > next {
                return (self.lost(), dropped);
            }
            match event.kind {
                KvEventKind::Stored { name, .. } => dropped += self.add(name, room),
                KvEventKind::Removed { name } => self.remove(&name),
                KvEventKind::Cleared => self.names = HashSet::new(),
            }
            self.stream = Stream::Live {
                next: next.saturating_add(1),
            };
        }
        (false, dropped)
    }

    /// 1 if it was dropped for want of room.
    fn add(&mut self, name: BlockName, room: usize) -> u64 {
        if self.names.len() >= room && !self.names.contains(&name) {
            return 1;
        }
        self.names.insert(name);
        0
    }

    /// Back to waiting; true if it was not already.
    fn lost(&mut self) -> bool {
        let was = std::mem::replace(&mut self.stream, Stream::Waiting);
        was != Stream::Waiting
    }
}

#[cfg(test)]
mod tests;
