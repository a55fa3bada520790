use baton_kv::{Epoch, KvDtype, KvLayout, NodeId};

use super::*;
use crate::core::{
    member::{Hello, Load, Phase},
    members::Expected,
    prefix_index::KvReport,
};

const IDENTITY: KvIdentity = KvIdentity([7; 32]);

fn hello(node: &str, role: Role) -> Hello {
    Hello {
        node: NodeId(node.to_owned()),
        role,
        epoch: Epoch(1),
        address: "127.0.0.1:1".to_owned(),
        model: "m".to_owned(),
        identity: IDENTITY,
        layout: KvLayout {
            layers: 1,
            heads: 1,
            head_dim: 2,
            block_tokens: 4,
            dtype: KvDtype::Bf16,
        },
        blocks: 100,
        context_length: 1_000,
        vocabulary: 10,
        protocol_min: 1,
        protocol_max: 1,
    }
}

fn load(queued_prefill_tokens: u64, available_blocks: u64) -> Load {
    Load {
        phase: Phase::Ready,
        waiting: 0,
        running: 0,
        queued_prefill_tokens,
        available_blocks,
        prefill_tokens_per_s: 0.0,
    }
}

struct Cluster {
    members: Members,
    index: PrefixIndex,
    ids: Vec<MemberId>,
}

/// `(role, queued tokens, available blocks)` of each node; the member with number i is `ids[i]`.
fn cluster(nodes: &[(Role, u64, u64)]) -> Cluster {
    let expected = Expected {
        model: "m".to_owned(),
        vocabulary: 10,
        versions: 1..=2,
    };
    let mut cluster = Cluster {
        members: Members::new(expected),
        index: PrefixIndex::new(1 << 20),
        ids: Vec::new(),
    };
    for (i, (role, queued, available)) in nodes.iter().enumerate() {
        let joined = cluster.members.join(hello(&format!("n{i}"), *role)).expect("joins");
        let member = cluster.members.get_mut(joined.member).expect("a member");
        member.report(load(*queued, *available));
        cluster.index.join(joined.member, Epoch(1));
        cluster.ids.push(joined.member);
    }
    cluster
}

fn needs(prompt_tokens: usize) -> Needs {
    let names = (0..prompt_tokens / 4).map(|i| BlockName([i as u8; 32])).collect();
    Needs {
        prompt_tokens,
        names,
        identity: IDENTITY,
        beside: None,
    }
}

fn hold(cluster: &mut Cluster, node: usize, blocks: u8) {
    let report = KvReport::Snapshot {
        epoch: Epoch(1),
        sequence: 0,
        names: (0..blocks).map(|i| BlockName([i; 32])).collect(),
        first: true,
        last: true,
    };
    assert!(!cluster.index.report(cluster.ids[node], report));
}

fn best(cluster: &Cluster, prompt_tokens: usize, local_prefill_tokens: usize) -> Option<Path> {
    let config = PlacementConfig { local_prefill_tokens };
    let found = candidates(&needs(prompt_tokens), &cluster.members, &cluster.index, &config);
    found.first().map(|candidate| candidate.path)
}

use Role::{Decode, Prefill};

#[test]
fn takes_the_least_loaded_of_each_side() {
    let cluster = cluster(&[(Prefill, 500, 50), (Prefill, 10, 50), (Decode, 0, 20), (Decode, 0, 80)]);
    let (prefill, decode) = (cluster.ids[1], cluster.ids[3]);
    assert_eq!(best(&cluster, 16, 0), Some(Path::Handoff { prefill, decode }));
}

#[test]
fn a_held_prefix_outweighs_a_shorter_queue() {
    let mut cluster = cluster(&[(Prefill, 20, 50), (Prefill, 10, 50), (Decode, 0, 80)]);
    hold(&mut cluster, 0, 4);
    let (prefill, decode) = (cluster.ids[0], cluster.ids[2]);
    assert_eq!(best(&cluster, 18, 0), Some(Path::Handoff { prefill, decode }));
    // At most all tokens but the last are found.
    let config = PlacementConfig {
        local_prefill_tokens: 0,
    };
    let found = candidates(&needs(16), &cluster.members, &cluster.index, &config);
    assert_eq!((found[0].held_tokens, found[0].uncached_tokens), (15, 1));
}

#[test]
fn local_without_prefill_nodes_or_when_little_is_left() {
    let alone = cluster(&[(Decode, 0, 80)]);
    assert_eq!(best(&alone, 16, 0), Some(Path::Local { decode: alone.ids[0] }));

    let mut both = cluster(&[(Prefill, 0, 50), (Decode, 0, 80), (Decode, 0, 80)]);
    let (prefill, decode) = (both.ids[0], both.ids[2]);
    hold(&mut both, 2, 3);
    assert_eq!(best(&both, 16, 3), Some(Path::Handoff { prefill, decode }));
    assert_eq!(best(&both, 16, 4), Some(Path::Local { decode }));
}

#[test]
fn beside_another_choice_if_there_is_room_and_anywhere_else_if_not() {
    let mut nodes = cluster(&[(Prefill, 0, 50), (Decode, 0, 80), (Decode, 0, 1), (Decode, 0, 80)]);
    let (prefill, other, decode) = (nodes.ids[0], nodes.ids[1], nodes.ids[2]);
    hold(&mut nodes, 1, 4);
    let mut needs = needs(18);
    needs.beside = Some(decode);
    let found = |nodes: &Cluster| {
        let config = PlacementConfig {
            local_prefill_tokens: 8,
        };
        let found = candidates(&needs, &nodes.members, &nodes.index, &config);
        found.into_iter().map(|candidate| candidate.path).collect::<Vec<_>>()
    };
    // It needs one block there, the others are in use; a handoff to it would be as good as any.
    assert_eq!(
        found(&nodes)[..2],
        [Path::Local { decode }, Path::Local { decode: other }]
    );
    let member = nodes.members.get_mut(decode).expect("a member");
    member.report(load(0, 0));
    assert_eq!(found(&nodes)[0], Path::Local { decode: other });
    nodes.members.leave(other);
    let decode = nodes.ids[3];
    assert_eq!(found(&nodes)[0], Path::Handoff { prefill, decode });
}

#[test]
fn waits_for_credits() {
    // No room for 16 + 1 tokens in 4 blocks.
    assert_eq!(best(&cluster(&[(Decode, 0, 4)]), 16, 0), None);
    assert!(best(&cluster(&[(Decode, 0, 5)]), 16, 0).is_some());
    // A prefill node with a full queue is waited for, not gone round.
    assert_eq!(best(&cluster(&[(Prefill, 2_048, 50), (Decode, 0, 80)]), 16, 0), None);
    // But an idle one takes any prompt that fits it.
    let mut idle = cluster(&[(Prefill, 0, 50), (Decode, 0, 80)]);
    assert!(best(&idle, 300, 0).is_some());
    idle.members.get_mut(idle.ids[0]).expect("a member").refused();
    assert_eq!(best(&idle, 16, 0), None);
}

#[test]
fn a_prefill_node_that_is_too_small_is_none() {
    let mut members = cluster(&[(Decode, 0, 80)]).members;
    let mut small = hello("small", Prefill);
    small.blocks = 2;
    let joined = members.join(small).expect("joins");
    members.get_mut(joined.member).expect("a member").report(load(0, 2));
    let config = PlacementConfig {
        local_prefill_tokens: 0,
    };
    let found = candidates(&needs(16), &members, &PrefixIndex::new(0), &config);
    assert!(matches!(found[0].path, Path::Local { .. }), "{found:?}");
}

#[test]
fn equals_take_turns() {
    let mut cluster = cluster(&[(Prefill, 0, 50), (Prefill, 0, 50), (Decode, 0, 80), (Decode, 0, 80)]);
    let mut seen = Vec::new();
    for _ in 0..4 {
        let Some(Path::Handoff { prefill, decode }) = best(&cluster, 4, 0) else {
            panic!("a handoff");
        };
        seen.push((prefill, decode));
        for member in [prefill, decode] {
            let credit = cluster.members.take(member, 0, 0).expect("a member");
            cluster.members.give_back(credit);
        }
    }
    let (a, b) = ((cluster.ids[0], cluster.ids[2]), (cluster.ids[1], cluster.ids[3]));
    assert_eq!(seen, [a, b, a, b]);
}

#[test]
fn says_what_can_never_be_placed() {
    let cluster = cluster(&[(Prefill, 0, 50), (Decode, 0, 0)]);
    assert_eq!(possible(&needs(399), &cluster.members), Possible::Yes);
    let too_large = Possible::TooLarge {
        needed: 101,
        largest: 100,
    };
    assert_eq!(possible(&needs(400), &cluster.members), too_large);
    let mut foreign = needs(4);
    foreign.identity = KvIdentity([8; 32]);
    assert_eq!(possible(&foreign, &cluster.members), Possible::NoNodes);
    assert!(
        candidates(
            &foreign,
            &cluster.members,
            &cluster.index,
            &PlacementConfig {
                local_prefill_tokens: 0
            }
        )
        .is_empty()
    );
}

/// One more node, which speaks `versions`.
fn join(cluster: &mut Cluster, name: &str, role: Role, versions: (u32, u32), available_blocks: u64) -> MemberId {
    let hello = Hello {
        protocol_min: versions.0,
        protocol_max: versions.1,
        ..hello(name, role)
    };
    let member = cluster.members.join(hello).expect("the router takes it").member;
    let joined = cluster.members.get_mut(member).expect("a member");
    joined.report(load(0, available_blocks));
    cluster.index.join(member, Epoch(1));
    member
}

#[test]
fn nodes_whose_versions_do_not_meet_are_never_paired() {
    let mut cluster = cluster(&[]);
    let prefill = join(&mut cluster, "p2", Prefill, (2, 3), 50);
    let old = join(&mut cluster, "d1", Decode, (1, 1), 50);
    // Nobody to hand over to: the decode node runs prompts itself, rather than that they wait.
    assert_eq!(best(&cluster, 16, 0), Some(Path::Local { decode: old }));
    assert_eq!(cluster.members.apart(prefill), [NodeId("d1".to_owned())]);
    // Fuller, and the only one that fits.
    let decode = join(&mut cluster, "d2", Decode, (1, 2), 20);
    assert_eq!(best(&cluster, 16, 0), Some(Path::Handoff { prefill, decode }));
    assert_eq!(cluster.members.apart(decode), []);
}
