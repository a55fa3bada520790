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
fn the_cap_is_hard() {
    let mut index = index(2);
    assert!(!index.report(MEMBER, snapshot(0, &[1, 2, 3])));
    assert_eq!((held(&index), index.entries(), index.dropped()), (2, 2, 1));
    assert!(!index.report(MEMBER, events(vec![removed(1, 1), stored(2, 3)])));
    assert_eq!((index.entries(), index.dropped()), (2, 1));
    // It stays in step all the same.
    assert!(!index.report(MEMBER, events(vec![stored(3, 1), removed(4, 2), stored(5, 1)])));
    assert_eq!((held(&index), index.dropped()), (1, 2));
}

#[derive(Clone, Debug)]
enum Op {
    Join(u8),
    Leave(u8),
    Snapshot(u8, Vec<u8>),
    Stored(u8, u8),
    Removed(u8, u8),
    Lose(u8),
}

fn op() -> impl Strategy<Value = Op> {
    let member = 0..3_u8;
    let block = 0..40_u8;
    prop_oneof![
        1 => member.clone().prop_map(Op::Join),
        1 => member.clone().prop_map(Op::Leave),
        2 => (member.clone(), prop::collection::vec(block.clone(), 0..20)).prop_map(|(m, b)| Op::Snapshot(m, b)),
        8 => (member.clone(), block.clone()).prop_map(|(m, b)| Op::Stored(m, b)),
        4 => (member.clone(), block).prop_map(|(m, b)| Op::Removed(m, b)),
        1 => member.prop_map(Op::Lose),
    ]
}

proptest! {
    /// Whatever the streams do: the cap holds, the count is right, and what the index says to be held was stored and not removed since.
    #[test]
    fn never_over_the_cap_and_never_wrong(ops in prop::collection::vec(op(), 0..200), max in 0_usize..60) {
        let mut index = PrefixIndex::new(max * ENTRY_BYTES);
        let mut truth: HashMap<u8, (u64, BTreeSet<u8>)> = HashMap::new();
        for op in ops {
            match op {
                Op::Join(m) => {
                    index.join(MemberId(m.into()), EPOCH);
                    truth.insert(m, (0, BTreeSet::new()));
                }
                Op::Leave(m) => {
                    index.leave(MemberId(m.into()));
                    truth.remove(&m);
                }
                Op::Snapshot(m, blocks) => if let Some((sequence, set)) = truth.get_mut(&m) {
                    *set = blocks.iter().copied().collect();
                    let wanted = index.report(MemberId(m.into()), snapshot(*sequence, &blocks));
                    prop_assert!(!wanted);
                },
                Op::Stored(m, b) => if let Some((sequence, set)) = truth.get_mut(&m) {
                    *sequence += 1;
                    set.insert(b);
                    let _ = index.report(MemberId(m.into()), events(vec![stored(*sequence, b)]));
                },
                Op::Removed(m, b) => if let Some((sequence, set)) = truth.get_mut(&m) {
                    *sequence += 1;
                    set.remove(&b);
                    let _ = index.report(MemberId(m.into()), events(vec![removed(*sequence, b)]));
                },
                // An event that never arrives; and the snapshot that heals it.
                Op::Lose(m) => if let Some((sequence, set)) = truth.get_mut(&m) {
                    *sequence += 2;
                    let lost = index.report(MemberId(m.into()), events(vec![stored(*sequence, 99)]));
                    let all: Vec<u8> = set.iter().copied().collect();
                    if lost {
                        prop_assert!(!index.report(MemberId(m.into()), snapshot(*sequence, &all)));
                    }
                },
            }
            prop_assert!(index.entries() <= max);
            let counted: usize = index.holders.values().map(|holder| holder.names.len()).sum();
            prop_assert_eq!(index.entries(), counted);
            let capacity: usize = index.holders.values().map(|holder| holder.names.capacity()).sum();
            prop_assert!(capacity <= 4 * max.max(index.entries()) + 3 * 64);
            for (m, (_, set)) in &truth {
                let holder = &index.holders[&MemberId((*m).into())];
                if matches!(holder.stream, Stream::Live { .. }) {
                    prop_assert!(holder.names.iter().all(|n| set.contains(&n.0[0])));
                }
            }
        }
    }
}
