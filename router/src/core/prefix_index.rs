//! Which node holds which named blocks: a hint for placement, never a promise. Nodes compare tokens themselves.
//!
//! Memory has a hard cap: at the cap the entry goes that was used the longest ago, on whichever node. An entry is used when it is stored, and when a request is sent to
//! where it is held.

use std::collections::{BTreeMap, HashMap};

use baton_kv::{BlockName, Epoch, KvEvent, KvEventKind};

use super::member::MemberId;

/// The first half of a name, which tells as many apart as will ever be: a hint needs no more.
type Key = [u8; 16];

/// When an entry was used last: counts all uses. Unique.
type Use = u64;

/// Bytes that one entry can cost. In the table by key, which is 7/8 full at most and is not shrunk before it is a quarter of that: up to 32/7 buckets, of a key, a use
/// and a control byte each. In the tree by use: a fifth of a leaf of 288 bytes, and its share of the nodes above.
pub(crate) const ENTRY_BYTES: usize = (size_of::<Key>() + size_of::<Use>() + 1) * 32 / 7 + 2 + 80;

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
    entries: HashMap<Key, Use>,
    by_use: BTreeMap<Use, Key>,
}

impl Holder {
    fn new(epoch: Epoch) -> Self {
        Self {
            epoch,
            stream: Stream::Waiting,
            entries: HashMap::new(),
            by_use: BTreeMap::new(),
        }
    }

    fn holds(&self, name: &BlockName) -> bool {
        self.entries.contains_key(&key(name))
    }

    fn put(&mut self, key: Key, at: Use) {
        if let Some(old) = self.entries.insert(key, at) {
            self.by_use.remove(&old);
        }
        self.by_use.insert(at, key);
    }

    fn remove(&mut self, key: &Key) {
        let Some(at) = self.entries.remove(key) else {
            return;
        };
        self.by_use.remove(&at);
        // Keeps the bytes of a table that shrank within what its entries are counted for.
        if self.entries.capacity() > 64 && self.entries.len() < self.entries.capacity() / 4 {
            self.entries.shrink_to(self.entries.len() * 2);
        }
    }

    fn clear(&mut self) {
        self.entries = HashMap::new();
        self.by_use = BTreeMap::new();
    }

    fn oldest(&self) -> Option<(Use, Key)> {
        self.by_use.first_key_value().map(|(at, key)| (*at, *key))
    }

    /// Back to waiting; true if it was not already.
    fn lost(&mut self) -> bool {
        let was = std::mem::replace(&mut self.stream, Stream::Waiting);
        was != Stream::Waiting
    }
}

fn key(name: &BlockName) -> Key {
    let mut key = Key::default();
    key.copy_from_slice(&name.0[..size_of::<Key>()]);
    key
}

/// Names → holders.
#[derive(Debug)]
pub struct PrefixIndex {
    holders: HashMap<MemberId, Holder>,
    entries: usize,
    max_entries: usize,
    uses: Use,
    evicted: u64,
}

impl PrefixIndex {
    /// Empty; never more than `max_bytes`.
    pub fn new(max_bytes: usize) -> Self {
        Self {
            holders: HashMap::new(),
            entries: 0,
            max_entries: max_bytes / ENTRY_BYTES,
            uses: 0,
            evicted: 0,
        }
    }

    /// A member whose stream must start with a snapshot.
    pub fn join(&mut self, member: MemberId, epoch: Epoch) {
        self.leave(member);
        self.holders.insert(member, Holder::new(epoch));
    }

    /// Forgets a member and its blocks.
    pub fn leave(&mut self, member: MemberId) {
        if let Some(holder) = self.holders.remove(&member) {
            self.entries -= holder.entries.len();
        }
    }

    /// Takes in a report. True when events were lost and a snapshot must be asked for; said once per loss.
    #[must_use]
    pub fn report(&mut self, member: MemberId, report: KvReport) -> bool {
        let Some(holder) = self.holders.get_mut(&member) else {
            return false;
        };
        match report {
            KvReport::Snapshot { epoch, .. } | KvReport::Events { epoch, .. } if epoch != holder.epoch => false,
            KvReport::Snapshot {
                sequence,
                names,
                first,
                last,
                ..
            } => {
                if first {
                    self.entries -= holder.entries.len();
                    holder.clear();
                } else if holder.stream != (Stream::Filling { sequence }) {
                    return holder.lost();
                }
                holder.stream = if last {
                    Stream::Live {
                        next: sequence.saturating_add(1),
                    }
                } else {
                    Stream::Filling { sequence }
                };
                for name in names {
                    self.put(member, &name);
                }
                false
            }
            KvReport::Events { events, .. } => events.into_iter().any(|event| self.event(member, event)),
        }
    }

    /// True if events before it were lost.
    fn event(&mut self, member: MemberId, event: KvEvent) -> bool {
        let Some(holder) = self.holders.get_mut(&member) else {
            return false;
        };
        let Stream::Live { next } = holder.stream else {
            return false;
        };
        if event.sequence < next {
            return false;
        }
        if event.sequence > next {
            return holder.lost();
        }
        holder.stream = Stream::Live {
            next: next.saturating_add(1),
        };
        let before = holder.entries.len();
        match event.kind {
            KvEventKind::Stored { name, .. } => {
                self.put(member, &name);
                return false;
            }
            KvEventKind::Removed { name } => holder.remove(&key(&name)),
            KvEventKind::Cleared => holder.clear(),
        }
        self.entries -= before - holder.entries.len();
        false
    }

    /// Uses a member's entry, which may be new; evicts the oldest of all if that is one too many.
    fn put(&mut self, member: MemberId, name: &BlockName) {
        let Some(holder) = self.holders.get_mut(&member) else {
            return;
        };
        let before = holder.entries.len();
        self.uses += 1;
        holder.put(key(name), self.uses);
        self.entries += holder.entries.len() - before;
        if self.entries > self.max_entries {
            self.evict();
        }
    }

    fn evict(&mut self) {
        let oldest = self
            .holders
            .values_mut()
            .filter_map(|holder| Some((holder.oldest()?, holder)));
        if let Some(((_, key), holder)) = oldest.min_by_key(|(oldest, _)| *oldest) {
            holder.remove(&key);
            self.entries -= 1;
            self.evicted += 1;
        }
    }

    /// A request goes to `member`: what it holds of `names` is kept the longest from now on, the first of them longer than those that are worth nothing without it.
    pub fn used(&mut self, member: MemberId, names: &[BlockName]) {
        for name in names[..self.held(member, names)].iter().rev() {
            self.put(member, name);
        }
    }

    /// How many of `names`, from the first, `member` holds.
    pub fn held(&self, member: MemberId, names: &[BlockName]) -> usize {
        let Some(holder) = self.holders.get(&member) else {
            return 0;
        };
        names.iter().take_while(|name| holder.holds(name)).count()
    }

    /// (name, holder) pairs.
    pub fn entries(&self) -> usize {
        self.entries
    }

    /// Bytes, counted as the entries' worst case; never over the cap.
    pub fn bytes(&self) -> usize {
        self.entries * ENTRY_BYTES
    }

    /// Entries that went because the cap was reached.
    pub fn evicted(&self) -> u64 {
        self.evicted
    }
}

#[cfg(test)]
mod tests;
