use std::collections::HashSet;

use baton_kv::{BlockName, Epoch, KvDtype, KvIdentity, KvLayout, NodeId};
use proptest::prelude::*;

use super::*;
use crate::core::member::Phase;

const IDENTITY: KvIdentity = KvIdentity([7; 32]);

fn hello(node: &str, role: Role, epoch: u128) -> Hello {
    Hello {
        node: NodeId(node.to_owned()),
        role,
        epoch: Epoch(epoch),
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
        blocks: 20,
        context_length: 1_000,
        vocabulary: 10,
        protocol_min: 1,
        protocol_max: 2,
    }
}

fn load(phase: Phase, available_blocks: u64) -> Load {
    Load {
        phase,
        waiting: 0,
        running: 0,
        queued_prefill_tokens: 0,
        available_blocks,
        prefill_tokens_per_s: 0.0,
    }
}

struct Run {
    admission: Admission,
    now: u64,
    actions: Vec<Action>,
}

impl Run {
    fn new(max_queue: usize) -> Self {
        let config = AdmissionConfig {
            max_queue,
            prefix_index_bytes: 1 << 20,
            placement: PlacementConfig {
                local_prefill_tokens: 0,
            },
        };
        let expected = Expected {
            model: "m".to_owned(),
            vocabulary: 10,
            versions: 1..=2,
        };
        Self {
            admission: Admission::new(config, expected),
            now: 0,
            actions: Vec::new(),
        }
    }

    fn join(&mut self, node: &str, role: Role, epoch: u128) -> Result<Joined, JoinError> {
        self.admission.join(hello(node, role, epoch))
    }

    /// A member that is ready, with this many blocks to be had.
    fn node(&mut self, node: &str, role: Role, available: u64) -> MemberId {
        let member = self.join(node, role, 1).expect("joins").member;
        self.load(member, Phase::Ready, available);
        member
    }

    fn load(&mut self, member: MemberId, phase: Phase, available: u64) {
        let load = load(phase, available);
        self.step(Event::Load { member, load });
    }

    fn step(&mut self, event: Event) {
        self.admission.step(event, Time(self.now), &mut self.actions);
    }

    fn submit(&mut self, id: u128, prompt_tokens: usize) {
        self.submit_several(id, Vec::new(), prompt_tokens);
    }

    fn submit_several(&mut self, id: u128, others: Vec<RequestId>, prompt_tokens: usize) {
        let needs = Needs {
            prompt_tokens,
            names: (0..prompt_tokens / 4).map(|i| BlockName([i as u8; 32])).collect(),
            identity: IDENTITY,
            beside: None,
        };
        let deadline = Time(self.now).after_ms(30_000);
        self.step(Event::Submit {
            request: RequestId(id),
            others,
            needs,
            deadline,
        });
    }

    fn granted(&self) -> Vec<u128> {
        let granted = self.actions.iter().filter_map(|action| match action {
            Action::Granted { request, .. } => Some(request.0),
            _ => None,
        });
        granted.collect()
    }

    fn refusals(&self) -> Vec<(u128, Refusal)> {
        let refused = self.actions.iter().filter_map(|action| match action {
            Action::Refused { request, refusal } => Some((request.0, *refusal)),
            _ => None,
        });
        refused.collect()
    }
}

fn id(request: u128) -> RequestId {
    RequestId(request)
}

#[test]
fn without_nodes_a_request_is_refused_at_once() {
    let mut run = Run::new(4);
    run.submit(1, 8);
    let member = run.join("d", Role::Decode, 1).expect("joins").member;
    run.submit(2, 8);
    run.load(member, Phase::Starting, 20);
    run.submit(3, 8);
    run.load(member, Phase::Ready, 20);
    run.submit(4, 8);
    run.load(member, Phase::Draining, 20);
    run.submit(5, 8);
    assert_eq!(run.refusals(), [1, 2, 3, 5].map(|request| (request, Refusal::NoNodes)));
    assert_eq!(run.granted(), [4]);
}

#[test]
fn first_come_first_served_within_credits() {
    let mut run = Run::new(2);
    let member = run.node("d", Role::Decode, 6);
    // 3 blocks each: 8 tokens and the one after.
    for request in 1..=5 {
        run.submit(request, 8);
    }
    assert_eq!(run.granted(), [1, 2]);
    assert_eq!(run.refusals(), [(5, Refusal::QueueFull { limit: 2, retry_ms: 0 })]);
    run.step(Event::Done { request: id(4) });
    run.submit(6, 8);
    run.step(Event::Done { request: id(1) });
    assert_eq!(run.granted(), [1, 2, 3]);
    run.step(Event::Done { request: id(2) });
    assert_eq!(run.granted(), [1, 2, 3, 6]);
    // A report shows what the node has acknowledged, and the credit no longer counts.
    for request in [3, 6] {
        run.step(Event::Acknowledged {
            request: id(request),
            leg: Leg::Decode,
        });
    }
    run.load(member, Phase::Ready, 3);
    run.submit(7, 8);
    assert_eq!(run.granted(), [1, 2, 3, 6, 7]);
}

#[test]
fn a_request_larger_than_every_node_is_refused() {
    let mut run = Run::new(4);
    run.node("d", Role::Decode, 0);
    run.submit(1, 79);
    run.submit(2, 80);
    assert_eq!(
        run.refusals(),
        [(
            2,
            Refusal::TooLarge {
                needed: 21,
                largest: 20
            }
        )]
    );
    assert_eq!(run.admission.waiting(), 1);
}

#[test]
fn those_who_wait_wait_on_when_a_node_blinks() {
    let mut run = Run::new(4);
    let member = run.node("d", Role::Decode, 0);
    run.submit(1, 8);
    run.step(Event::Leave { member });
    run.submit(2, 8);
    // It comes back, is replaced before its first report, and has room at last.
    run.join("d", Role::Decode, 2).expect("joins");
    let member = run.join("d", Role::Decode, 2).expect("joins").member;
    run.submit(3, 8);
    assert_eq!(run.admission.waiting(), 1);
    run.load(member, Phase::Ready, 20);
    assert_eq!(run.granted(), [1]);
    assert_eq!(run.refusals(), [2, 3].map(|request| (request, Refusal::NoNodes)));
}

#[test]
fn small_ones_pass_a_large_one_but_not_for_ever() {
    let mut run = Run::new(200);
    run.node("d", Role::Decode, 8);
    // Six blocks of eight, and then eight more.
    run.submit(1, 20);
    run.submit(2, 28);
    run.submit(3, 1);
    assert_eq!(run.granted(), [1, 3]);
    let mut last = 3;
    for request in 4..200 {
        run.submit(request, 1);
        run.step(Event::Done { request: id(last) });
        if run.granted().last() == Some(&request) {
            last = request;
        }
    }
    // One after the other has passed it: now it is its turn.
    assert_eq!(run.granted().len(), 1 + PASSES as usize);
    run.step(Event::Done { request: id(last) });
    run.step(Event::Done { request: id(1) });
    assert_eq!(run.granted()[1 + PASSES as usize], 2);

    // Not more than a few are looked at.
    let mut run = Run::new(200);
    run.node("d", Role::Decode, 8);
    run.submit(1, 20);
    for large in 2..2 + LOOKS as u128 {
        run.submit(large, 28);
    }
    run.submit(100, 1);
    assert_eq!(run.granted(), [1]);
}

#[test]
fn a_node_that_refused_gets_nothing_until_it_reports() {
    let mut run = Run::new(4);
    let member = run.node("d", Role::Decode, 6);
    run.submit(1, 8);
    run.submit(2, 8);
    run.submit(3, 8);
    run.step(Event::Requeue {
        request: id(2),
        by: member,
    });
    assert_eq!(run.granted(), [1, 2]);
    run.load(member, Phase::Ready, 6);
    // Requeued in front. One's credit is still out: it has not been acknowledged.
    assert_eq!(run.granted(), [1, 2, 2]);
    run.step(Event::Done { request: id(1) });
    assert_eq!(run.granted(), [1, 2, 2, 3]);
}

#[test]
fn whoever_would_wait_too_long_is_shed_at_once() {
    let mut run = Run::new(10);
    let member = run.node("d", Role::Decode, 3);
    run.submit(1, 8);
    run.submit(2, 8);
    run.now += 20_000_000;
    run.step(Event::Done { request: id(1) });
    assert_eq!(run.granted(), [1, 2]);
    run.submit(3, 8);
    run.submit(4, 8);
    // Ten seconds and more per place by now: the third in line would wait over thirty.
    run.now += 60_000_000;
    run.load(member, Phase::Ready, 0);
    run.step(Event::Done { request: id(2) });
    run.load(member, Phase::Ready, 3);
    run.submit(5, 8);
    run.submit(6, 8);
    run.submit(7, 8);
    run.submit(8, 8);
    let refusals = run.refusals();
    assert!(!refusals.is_empty());
    for (_, refusal) in refusals {
        assert!(
            matches!(refusal, Refusal::WouldWaitTooLong { retry_ms } if retry_ms > 30_000),
            "{refusal:?}"
        );
    }
}

#[test]
fn a_hello_is_checked() {
    let mut run = Run::new(1);
    let mut check = |change: fn(&mut Hello), code: &str| {
        let mut hello = hello("x", Role::Decode, 9);
        change(&mut hello);
        let error = run.admission.join(hello);
        assert_eq!(error.map_err(|error| error.code()), Err(code));
    };
    check(|hello| hello.node.0.clear(), "MALFORMED");
    check(|hello| hello.node.0 = "a b".to_owned(), "MALFORMED");
    check(|hello| hello.node.0 = "n".repeat(129), "MALFORMED");
    check(|hello| hello.address.clear(), "MALFORMED");
    check(|hello| hello.layout.block_tokens = 0, "MALFORMED");
    check(|hello| hello.blocks = 0, "MALFORMED");
    check(
        |hello| (hello.protocol_min, hello.protocol_max) = (3, 4),
        "PROTOCOL_MISMATCH",
    );
    check(|hello| hello.model = "other".to_owned(), "MODEL_MISMATCH");
    check(|hello| hello.vocabulary = 11, "MODEL_MISMATCH");

    let first = run.join("d", Role::Decode, 1).expect("joins").member;
    let mut other = hello("e", Role::Decode, 1);
    other.identity = KvIdentity([8; 32]);
    assert_eq!(
        run.admission.join(other.clone()).map_err(|e| e.code()),
        Err("IDENTITY_MISMATCH")
    );
    let mut layout = hello("e", Role::Decode, 1);
    layout.layout.block_tokens = 8;
    assert_eq!(run.admission.join(layout).map_err(|e| e.code()), Err("LAYOUT_MISMATCH"));
    // The same node again, in another life: the older is gone.
    let again = run.join("d", Role::Decode, 2).expect("joins");
    assert_eq!(again.replaced, Some(first));
    assert_eq!(run.admission.members().iter().count(), 1);
    // The last one may come back as something else.
    other.node = NodeId("d".to_owned());
    assert!(run.admission.join(other).is_ok());
}

#[test]
fn further_choices_follow_the_first_in_front_of_all_and_beside_it() {
    let mut run = Run::new(4);
    let decode = run.node("d", Role::Decode, 6);
    // 3 blocks each: 8 tokens and the one after.
    run.submit_several(1, vec![id(2), id(3)], 8);
    run.submit(4, 8);
    run.submit(5, 8);
    assert_eq!(run.granted(), [1, 4]);
    // Two are held and one waits: there is room for one more, not for two.
    run.submit_several(6, vec![id(7)], 8);
    assert_eq!(run.refusals(), [(6, Refusal::QueueFull { limit: 4, retry_ms: 0 })]);
    assert_eq!((run.admission.waiting(), run.admission.requests()), (1, 5));
    run.node("p", Role::Prefill, 20);
    run.step(Event::Begun { request: id(1) });
    run.step(Event::Begun { request: id(1) });
    assert_eq!((run.admission.waiting(), run.admission.requests()), (3, 5));
    for request in [1, 4] {
        run.step(Event::Acknowledged {
            request: id(request),
            leg: Leg::Decode,
        });
    }
    // One block for each: the prompt's own two are in use there. They need no prefill node.
    run.load(decode, Phase::Ready, 2);
    assert_eq!(run.granted(), [1, 4, 2, 3]);
    let beside = run.actions.iter().filter_map(|action| match action {
        Action::Granted { request, candidate } if [2, 3].contains(&request.0) => Some(candidate),
        _ => None,
    });
    for candidate in beside {
        assert_eq!(candidate.path, Path::Local { decode });
        assert_eq!((candidate.decode_blocks, candidate.uncached_tokens), (1, 1));
    }
}

#[test]
fn choices_whose_first_has_failed_are_forgotten_one_by_one() {
    let mut run = Run::new(4);
    run.node("d", Role::Decode, 6);
    run.submit_several(1, vec![id(2), id(3)], 8);
    run.step(Event::Done { request: id(1) });
    run.step(Event::Begun { request: id(1) });
    assert_eq!((run.granted(), run.admission.requests()), (vec![1], 2));
    for request in [2, 3] {
        run.step(Event::Done { request: id(request) });
    }
    assert_eq!(run.admission.requests(), 0);
    run.submit_several(4, vec![id(5), id(6), id(7)], 8);
    assert_eq!(run.granted(), [1, 4]);
}

/// Of the property below.
const MAX_QUEUE: usize = 5;

#[derive(Clone, Debug)]
enum Op {
    Submit(usize, u128),
    Begin(usize),
    Cancel(usize),
    Requeue(usize),
    Acknowledge(usize, bool),
    Settle(usize, bool),
    Join(u8, bool),
    Leave(usize),
    Load(usize, u64, u8),
    Wait(u64),
}

fn op() -> impl Strategy<Value = Op> {
    let one = 0..1_000_usize;
    prop_oneof![
        8 => (1..100_usize, 0..4_u128).prop_map(|(tokens, others)| Op::Submit(tokens, others)),
        5 => one.clone().prop_map(Op::Begin),
        5 => one.clone().prop_map(Op::Cancel),
        2 => one.clone().prop_map(Op::Requeue),
        5 => (one.clone(), any::<bool>()).prop_map(|(i, leg)| Op::Acknowledge(i, leg)),
        3 => (one.clone(), any::<bool>()).prop_map(|(i, leg)| Op::Settle(i, leg)),
        2 => (0..5_u8, any::<bool>()).prop_map(|(i, role)| Op::Join(i, role)),
        1 => one.clone().prop_map(Op::Leave),
        8 => (one, 0..21_u64, 0..8_u8).prop_map(|(i, blocks, phase)| Op::Load(i, blocks, phase)),
        2 => (0..5_000_u64).prop_map(Op::Wait),
    ]
}

fn leg(prefill: bool) -> Leg {
    if prefill { Leg::Prefill } else { Leg::Decode }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Whatever comes: each wait is answered at most once, the queue keeps its bound, only members get requests and only within what they have
    /// left, choices are held until their first has begun, and when all requests are done every credit is back.
    #[test]
    fn credits_come_back(ops in prop::collection::vec(op(), 0..200)) {
        let mut run = Run::new(MAX_QUEUE);
        let (mut waiting, mut running, mut members) = (Vec::new(), Vec::new(), Vec::new());
        // With the first choice of each.
        let mut held: Vec<(u128, u128)> = Vec::new();
        let mut next = 0_u128;
        for op in ops {
            run.actions.clear();
            let mut replaced = None;
            match op {
                Op::Submit(tokens, others) => {
                    let first = next + 1;
                    next = first + others;
                    waiting.push(first);
                    let before = waiting.len() - 1 + held.len();
                    run.submit_several(first, (first + 1..=next).map(RequestId).collect(), tokens);
                    if run.refusals().is_empty() {
                        prop_assert!(before + 1 + others as usize <= MAX_QUEUE);
                        held.extend((first + 1..=next).map(|other| (first, other)));
                    }
                }
                Op::Begin(i) => if let Some(request) = pick(&running, i) {
                    waiting.extend(held.iter().filter(|(first, _)| *first == request).map(|(_, other)| *other));
                    held.retain(|(first, _)| *first != request);
                    run.step(Event::Begun { request: id(request) });
                },
                Op::Cancel(i) => {
                    let others = held.iter().map(|(_, other)| *other);
                    let all: Vec<u128> = waiting.iter().chain(&running).copied().chain(others).collect();
                    if let Some(request) = pick(&all, i) {
                        held.retain(|(_, other)| *other != request);
                        waiting.retain(|other| *other != request);
                        running.retain(|other| *other != request);
                        run.step(Event::Done { request: id(request) });
                    }
                }
                Op::Requeue(i) => if let (Some(request), Some(by)) = (pick(&running, i), pick(&members, i)) {
                    running.retain(|other| *other != request);
                    waiting.push(request);
                    run.step(Event::Requeue { request: id(request), by });
                },
                Op::Acknowledge(i, prefill) => if let Some(request) = pick(&running, i) {
                    run.step(Event::Acknowledged { request: id(request), leg: leg(prefill) });
                },
                Op::Settle(i, prefill) => if let Some(request) = pick(&running, i) {
                    run.step(Event::Settled { request: id(request), leg: leg(prefill) });
                },
                Op::Join(i, prefill) => {
                    let role = if prefill { Role::Prefill } else { Role::Decode };
                    let joined = run.join(&format!("n{i}"), role, next).expect("joins");
                    replaced = joined.replaced;
                    members.push(joined.member);
                }
                Op::Leave(i) => if let Some(member) = pick(&members, i) {
                    replaced = Some(member);
                    run.step(Event::Leave { member });
                },
                Op::Load(i, blocks, phase) => if let Some(member) = pick(&members, i) {
                    let phase = if phase == 0 { Phase::Draining } else { Phase::Ready };
                    run.load(member, phase, blocks);
                },
                Op::Wait(ms) => run.now += ms * 1_000,
            }
            members.retain(|member| Some(*member) != replaced);
            for action in &run.actions {
                match action {
                    Action::Granted { request, candidate } => {
                        let before = waiting.len();
                        waiting.retain(|other| *other != request.0);
                        prop_assert_eq!(waiting.len(), before - 1);
                        running.push(request.0);
                        let (prefill, decode) = match candidate.path {
                            Path::Local { decode } => (None, decode),
                            Path::Handoff { prefill, decode } => (Some(prefill), decode),
                        };
                        prop_assert!(members.contains(&decode));
                        prop_assert!(prefill.is_none_or(|prefill| members.contains(&prefill)));
                    }
                    Action::Refused { request, .. } => {
                        let before = waiting.len();
                        waiting.retain(|other| *other != request.0);
                        prop_assert_eq!(waiting.len(), before - 1);
                    }
                    Action::SnapshotWanted { .. } => prop_assert!(false, "no KV reports were sent"),
                }
            }
            prop_assert_eq!(run.admission.waiting(), waiting.len());
            prop_assert_eq!(run.admission.requests(), waiting.len() + running.len() + held.len());
            let distinct: HashSet<u128> = waiting.iter().chain(&running).copied().collect();
            prop_assert_eq!(distinct.len(), waiting.len() + running.len());
        }
        for request in waiting.into_iter().chain(running).chain(held.into_iter().map(|(_, other)| other)) {
            run.step(Event::Done { request: id(request) });
            // What is granted by it is done, too, in its turn or here.
        }
        prop_assert_eq!(run.admission.requests(), 0);
        for member in run.admission.members().iter() {
            prop_assert!(member.settled(), "{member:?}");
        }
    }
}

fn pick<T: Copy>(from: &[T], i: usize) -> Option<T> {
    (!from.is_empty()).then(|| from[i % from.len()])
}
