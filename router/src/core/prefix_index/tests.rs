use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

const MEMBER: MemberId = MemberId(1);
const EPOCH: Epoch = Epoch(5);

fn name(i: u8) -> BlockName {
    BlockName([i; 32])
}

fn stored(sequence: u64, i: u8) -> KvEvent {
    let kind = KvEventKind::Stored {
        name: name(i),
        parent: name(0),
    };
    KvEvent { sequence, kind }
}

fn removed(sequence: u64, i: u8) -> KvEvent {
    let kind = KvEventKind::Removed { name: name(i) };
    KvEvent { sequence, kind }
}

fn snapshot(sequence: u64, names: &[u8]) -> KvReport {
    KvReport::Snapshot {
        epoch: EPOCH,
        sequence,
        names: names.iter().map(|i| name(*i)).collect(),
        first: true,
        last: true,
    }
}

fn events(events: Vec<KvEvent>) -> KvReport {
    KvReport::Events { epoch: EPOCH, events }
}

fn index(max_entries: usize) -> PrefixIndex {
    let mut index = PrefixIndex::new(max_entries * ENTRY_BYTES);
    index.join(MEMBER, EPOCH);
    index
}

fn held(index: &PrefixIndex) -> usize {
    index.held(MEMBER, &[name(1), name(2), name(3)])
}

#[test]
fn follows_a_stream() {
    let mut index = index(10);
    assert!(!index.report(MEMBER, snapshot(4, &[1])));
    assert!(!index.report(MEMBER, events(vec![stored(5, 2), stored(6, 3)])));
    assert_eq!(held(&index), 3);
    assert!(!index.report(MEMBER, events(vec![removed(7, 2)])));
    assert_eq!(held(&index), 1);
    // Seen already: nothing changes.
    assert!(!index.report(MEMBER, events(vec![stored(5, 2), stored(6, 3)])));
    assert_eq!((held(&index), index.entries()), (1, 2));
    let cleared = KvEvent {
        sequence: 8,
        kind: KvEventKind::Cleared,
    };
    assert!(!index.report(MEMBER, events(vec![cleared])));
    assert_eq!((held(&index), index.entries(), index.bytes()), (0, 0, 0));
}

#[test]
fn a_gap_asks_for_a_snapshot_once() {
    let mut index = index(10);
    assert!(!index.report(MEMBER, snapshot(0, &[1])));
    assert!(index.report(MEMBER, events(vec![stored(2, 2)])));
    assert!(!index.report(MEMBER, events(vec![stored(3, 3)])));
    assert_eq!(held(&index), 1);
    assert!(!index.report(MEMBER, snapshot(3, &[1, 2, 3])));
    assert!(!index.report(MEMBER, events(vec![removed(4, 3)])));
    assert_eq!(held(&index), 2);
}

#[test]
fn snapshots_come_in_parts() {
    let part = |sequence, i, first, last| KvReport::Snapshot {
        epoch: EPOCH,
        sequence,
        names: vec![name(i)],
        first,
        last,
    };
    let mut index = index(10);
    assert!(!index.report(MEMBER, part(9, 1, true, false)));
    assert!(!index.report(MEMBER, part(9, 2, false, false)));
    assert!(!index.report(MEMBER, part(9, 3, false, true)));
    assert_eq!(held(&index), 3);
    assert!(!index.report(MEMBER, events(vec![removed(10, 3)])));
    assert_eq!(held(&index), 2);
    // A part of another snapshot is a gap.
    assert!(!index.report(MEMBER, part(11, 1, true, false)));
    assert!(index.report(MEMBER, part(12, 2, false, true)));
}

#[test]
fn other_epochs_and_members_change_nothing() {
    let mut index = index(10);
    assert!(!index.report(MEMBER, snapshot(0, &[1])));
    let foreign = KvReport::Events {
        epoch: Epoch(6),
        events: vec![stored(1, 2)],
    };
    assert!(!index.report(MEMBER, foreign));
    assert!(!index.report(MemberId(2), events(vec![stored(1, 2)])));
    assert_eq!((held(&index), index.entries()), (1, 1));
    index.leave(MEMBER);
    assert_eq!((held(&index), index.entries()), (0, 0));
}

#[test]
fn the_cap_is_hard_and_the_least_recently_used_goes_first() {
    let mut index = index(2);
    assert!(!index.report(MEMBER, snapshot(0, &[1, 2, 3])));
    let holds = |index: &PrefixIndex, i| index.held(MEMBER, &[name(i)]) == 1;
    let held = |index: &PrefixIndex| (1..=4).filter(|i| holds(index, *i)).collect::<Vec<u8>>();
    assert_eq!((held(&index), index.entries(), index.evicted()), (vec![2, 3], 2, 1));
    // Stored once more, and used by a request.
    assert!(!index.report(MEMBER, events(vec![stored(1, 2), stored(2, 4)])));
    assert_eq!((held(&index), index.evicted()), (vec![2, 4], 2));
    index.used(MEMBER, &[name(2), name(3), name(4)]);
    assert!(!index.report(MEMBER, events(vec![stored(3, 1)])));
    assert_eq!((held(&index), index.evicted()), (vec![1, 2], 3));
    // It stays in step all the same: what has gone may be removed, and stored again.
    assert!(!index.report(MEMBER, events(vec![removed(4, 4), removed(5, 1), stored(6, 4)])));
    assert_eq!((held(&index), index.entries(), index.evicted()), (vec![2, 4], 2, 3));
    // Of another member it goes, too; and of a prefix the end before the start.
    index.used(MEMBER, &[name(2), name(4)]);
    index.join(MemberId(2), EPOCH);
    assert!(!index.report(MemberId(2), snapshot(0, &[9])));
    assert_eq!((held(&index), index.held(MemberId(2), &[name(9)])), (vec![2], 1));
    index.leave(MEMBER);
    assert_eq!((index.entries(), index.evicted()), (1, 4));
}

#[derive(Clone, Debug)]
enum Op {
    Join(u8),
    Leave(u8),
    Snapshot(u8, Vec<u8>),
    Stored(u8, u8),
    Removed(u8, u8),
    Cleared(u8),
    Used(u8, Vec<u8>),
    Lose(u8),
}

fn op() -> impl Strategy<Value = Op> {
    let member = 0..3_u8;
    let block = 0..40_u8;
    let blocks = prop::collection::vec(block.clone(), 0..20);
    prop_oneof![
        1 => member.clone().prop_map(Op::Join),
        1 => member.clone().prop_map(Op::Leave),
        2 => (member.clone(), blocks.clone()).prop_map(|(m, b)| Op::Snapshot(m, b)),
        16 => (member.clone(), block.clone()).prop_map(|(m, b)| Op::Stored(m, b)),
        4 => (member.clone(), block).prop_map(|(m, b)| Op::Removed(m, b)),
        1 => member.clone().prop_map(Op::Cleared),
        8 => (member.clone(), blocks).prop_map(|(m, b)| Op::Used(m, b)),
        1 => member.prop_map(Op::Lose),
    ]
}

/// What the index must be: (member, block), the least recently used first.
struct Model {
    entries: Vec<(u8, u8)>,
    max: usize,
    evicted: u64,
}

impl Model {
    fn put(&mut self, m: u8, b: u8) {
        self.remove(m, b);
        self.entries.push((m, b));
        if self.entries.len() > self.max {
            self.entries.remove(0);
            self.evicted += 1;
        }
    }

    fn remove(&mut self, m: u8, b: u8) {
        self.entries.retain(|entry| *entry != (m, b));
    }

    fn clear(&mut self, m: u8) {
        self.entries.retain(|(of, _)| *of != m);
    }

    fn used(&mut self, m: u8, blocks: &[u8]) {
        let held = blocks.iter().take_while(|b| self.entries.contains(&(m, **b))).count();
        for b in blocks[..held].iter().rev() {
            self.put(m, *b);
        }
    }
}

proptest! {
    /// Whatever the streams do, the index holds what a plain list of all that was stored and not removed, cut to the most recently used, would hold; so the cap
    /// holds, and what the index says to be held was stored and not removed since.
    #[test]
    fn it_is_the_most_recently_used_of_what_the_streams_said(ops in prop::collection::vec(op(), 0..200), max in 0_usize..60) {
        let mut index = PrefixIndex::new(max * ENTRY_BYTES);
        let mut model = Model { entries: Vec::new(), max, evicted: 0 };
        // The sequence number of each member's last event, and all that it holds, known or not.
        let mut truth: HashMap<u8, (u64, BTreeSet<u8>)> = HashMap::new();
        for op in ops {
            let live = |m: u8| {
                let holder = index.holders.get(&MemberId(m.into()));
                holder.is_some_and(|holder| matches!(holder.stream, Stream::Live { .. }))
            };
            match op {
                Op::Join(m) => {
                    index.join(MemberId(m.into()), EPOCH);
                    truth.insert(m, (0, BTreeSet::new()));
                    model.clear(m);
                }
                Op::Leave(m) => {
                    index.leave(MemberId(m.into()));
                    truth.remove(&m);
                    model.clear(m);
                }
                Op::Snapshot(m, blocks) => if let Some((sequence, set)) = truth.get_mut(&m) {
                    *set = blocks.iter().copied().collect();
                    let wanted = index.report(MemberId(m.into()), snapshot(*sequence, &blocks));
                    prop_assert!(!wanted);
                    model.clear(m);
                    for b in blocks {
                        model.put(m, b);
                    }
                },
                Op::Stored(m, b) => if let Some((sequence, set)) = truth.get_mut(&m) {
                    if live(m) {
                        model.put(m, b);
                    }
                    *sequence += 1;
                    set.insert(b);
                    prop_assert!(!index.report(MemberId(m.into()), events(vec![stored(*sequence, b)])));
                },
                Op::Removed(m, b) => if let Some((sequence, set)) = truth.get_mut(&m) {
                    if live(m) {
                        model.remove(m, b);
                    }
                    *sequence += 1;
                    set.remove(&b);
                    prop_assert!(!index.report(MemberId(m.into()), events(vec![removed(*sequence, b)])));
                },
                Op::Cleared(m) => if let Some((sequence, set)) = truth.get_mut(&m) {
                    if live(m) {
                        model.clear(m);
                    }
                    *sequence += 1;
                    set.clear();
                    let cleared = KvEvent { sequence: *sequence, kind: KvEventKind::Cleared };
                    prop_assert!(!index.report(MemberId(m.into()), events(vec![cleared])));
                },
                Op::Used(m, blocks) => {
                    let names: Vec<BlockName> = blocks.iter().map(|b| name(*b)).collect();
                    index.used(MemberId(m.into()), &names);
                    model.used(m, &blocks);
                }
                // An event that never arrives; and the snapshot that heals it.
                Op::Lose(m) => if let Some((sequence, set)) = truth.get_mut(&m) {
                    let was_live = live(m);
                    *sequence += 2;
                    let lost = index.report(MemberId(m.into()), events(vec![stored(*sequence, 99)]));
                    prop_assert_eq!(lost, was_live);
                    let all: Vec<u8> = set.iter().copied().collect();
                    if lost {
                        prop_assert!(!index.report(MemberId(m.into()), snapshot(*sequence, &all)));
                        model.clear(m);
                        for b in all {
                            model.put(m, b);
                        }
                    }
                },
            }
            let mut found = Vec::new();
            for (member, holder) in &index.holders {
                prop_assert_eq!(holder.entries.len(), holder.by_use.len());
                prop_assert!(holder.entries.capacity() <= 4 * max.max(index.entries()) + 64);
                for (at, key) in &holder.by_use {
                    prop_assert_eq!(holder.entries.get(key), Some(at));
                    found.push((*at, (member.0 as u8, key[0])));
                }
            }
            found.sort_unstable();
            let found: Vec<(u8, u8)> = found.into_iter().map(|(_, entry)| entry).collect();
            prop_assert_eq!(&found, &model.entries);
            prop_assert_eq!((index.entries(), index.evicted()), (model.entries.len(), model.evicted));
        }
    }
}
