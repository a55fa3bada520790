use baton_kv::TokenId;
use proptest::prelude::*;

use super::*;
use crate::core::member::MemberId;

const CONFIG: LifeConfig = LifeConfig {
    reserve_ms: 5_000,
    closing_ms: 500,
    replace_ms: 3_000,
    max_attempts: 3,
    max_losses: 2,
    vocabulary: 100,
};
const QUEUE_MS: u64 = 30_000;
const DEADLINE_MS: u64 = 60_000;

fn at(ms: u64) -> Time {
    Time(ms * 1_000)
}

fn place(member: u64) -> Place {
    Place {
        member: MemberId(member),
        node: NodeId(format!("node-{member}")),
    }
}

fn handoff() -> Event {
    Event::Granted(Placement {
        prefill: Some(place(1)),
        decode: place(2),
    })
}

fn local() -> Event {
    Event::Granted(Placement {
        prefill: None,
        decode: place(2),
    })
}

fn tokens(index: u32, ids: &[TokenId]) -> Event {
    attempt_tokens(1, index, ids)
}

fn attempt_tokens(attempt: u32, index: u32, ids: &[TokenId]) -> Event {
    Event::Tokens {
        attempt: Attempt(attempt),
        index,
        tokens: ids.iter().map(|&id| token(id)).collect(),
    }
}

fn token(id: TokenId) -> Token {
    Token {
        id,
        logprob: -0.5,
        alternatives: vec![(id, -0.5)],
    }
}

fn done(ended: Option<EndReason>) -> Event {
    Event::PrefillDone {
        first: token(7),
        ended,
        prefill_ms: 20.0,
        transfer_ms: 3.0,
        kv_bytes: 4_096,
        kv_blocks: 2,
        travelled: None,
    }
}

fn verified() -> Event {
    Event::Verified {
        kv_bytes: 4_096,
        kv_blocks: 2,
    }
}

fn decode_ended(reason: EndReason) -> Event {
    Event::DecodeEnded {
        reason,
        prefill_ms: 0.0,
        first_step_ms: 1.5,
    }
}

fn started() -> Event {
    Event::PrefillStarted {
        queue_ms: 2.0,
        cached_tokens: 32,
    }
}

fn failed(code: &str) -> LegError {
    LegError::Failed {
        code: code.to_owned(),
        message: "no".to_owned(),
        retryable: true,
    }
}

/// A life, and what it did.
struct Run {
    life: Life,
    now: u64,
    actions: Vec<Action>,
}

impl Run {
    fn new(max_new_tokens: u32) -> Self {
        Self {
            life: Life::new(CONFIG, at(0), at(QUEUE_MS), at(DEADLINE_MS), max_new_tokens),
            now: 0,
            actions: Vec::new(),
        }
    }

    /// 10 ms between events.
    fn step(&mut self, event: Event) -> &mut Self {
        self.now += 10;
        self.life.step(event, at(self.now), &mut self.actions);
        self
    }

    fn steps(max_new_tokens: u32, events: impl IntoIterator<Item = Event>) -> Self {
        let mut run = Self::new(max_new_tokens);
        for event in events {
            run.step(event);
        }
        run
    }

    fn sleep(&mut self) -> &mut Self {
        self.now = self.life.wake_at().0 / 1_000;
        self.life.step(Event::Tick, at(self.now), &mut self.actions);
        self
    }

    fn ids(&self) -> Vec<TokenId> {
        let ids = self.actions.iter().filter_map(|action| match action {
            Action::Deliver { tokens, .. } => Some(tokens.iter().map(|token| token.id)),
            _ => None,
        });
        ids.flatten().collect()
    }

    fn end(&self) -> Option<Result<EndReason, &'static str>> {
        self.actions.iter().find_map(|action| match action {
            Action::End(outcome) => Some(outcome.clone().map_err(|error| error.code())),
            _ => None,
        })
    }

    fn closed(&self) -> Vec<Leg> {
        let closed = self.actions.iter().filter_map(|action| match action {
            Action::Close(leg) => Some(*leg),
            _ => None,
        });
        closed.collect()
    }
}

#[test]
fn a_handoff_from_end_to_end() {
    let mut run = Run::steps(8, [handoff(), Event::Ticket { lease_ms: 9_000 }, started(), verified()]);
    run.step(done(None)).step(tokens(0, &[7])).step(tokens(1, &[8, 9]));
    run.step(decode_ended(EndReason::Length));
    assert_eq!(run.ids(), [7, 8, 9]);
    assert_eq!(run.end(), Some(Ok(EndReason::Length)));
    assert_eq!(run.closed(), [Leg::Prefill, Leg::Decode]);
    let record = run.life.record();
    assert_eq!(
        (
            record.router_queue_ms,
            record.node_queue_ms,
            record.prefill_ms,
            record.transfer_ms,
            record.first_step_ms
        ),
        (10.0, 2.0, 20.0, 3.0, 1.5)
    );
    assert_eq!(
        (record.cached_tokens, record.kv_bytes, record.kv_blocks, record.attempts),
        (32, 4_096, 2, 1)
    );
}

#[test]
fn a_local_run() {
    let admitted = Event::Admitted {
        cached_tokens: 5,
        queue_ms: 4.0,
    };
    let run = Run::steps(
        8,
        [
            local(),
            admitted,
            tokens(0, &[1]),
            tokens(1, &[2]),
            decode_ended(EndReason::Stop),
        ],
    );
    assert_eq!((run.ids(), run.end()), (vec![1, 2], Some(Ok(EndReason::Stop))));
    assert_eq!(run.life.record().prefill_node, None);
    assert_eq!(run.life.record().cached_tokens, 5);
}

#[test]
fn a_first_token_that_ends_the_answer() {
    let run = Run::steps(
        1,
        [
            handoff(),
            Event::Ticket { lease_ms: 9_000 },
            started(),
            done(Some(EndReason::Length)),
        ],
    );
    assert_eq!((run.ids(), run.end()), (vec![7], Some(Ok(EndReason::Length))));
    assert_eq!(run.closed(), [Leg::Decode, Leg::Prefill]);
    assert_eq!(run.life.record().decode_node, None);
}

#[test]
fn an_answer_is_one_though_the_decode_leg_says_first_that_nothing_came() {
    let mut run = Run::steps(8, [handoff(), Event::Ticket { lease_ms: 9_000 }, started()]);
    run.step(Event::DecodeFailed(failed("PEER_LOST")));
    assert_eq!(run.end(), None);
    run.step(done(Some(EndReason::Stop)));
    assert_eq!((run.ids(), run.end()), (vec![7], Some(Ok(EndReason::Stop))));
    assert_eq!(run.closed(), [Leg::Decode, Leg::Prefill]);
    // Without an answer in it, the prefill leg's word changes nothing.
    let mut run = Run::steps(8, [handoff(), Event::Ticket { lease_ms: 9_000 }, started()]);
    run.step(Event::DecodeFailed(failed("PEER_LOST")))
        .step(done(None))
        .sleep();
    assert!(run.ids().is_empty() && run.life.queued());
}

#[test]
fn the_prefill_legs_last_word_is_waited_for_but_not_long() {
    let events = || {
        [
            handoff(),
            Event::Ticket { lease_ms: 9_000 },
            verified(),
            tokens(0, &[7]),
            decode_ended(EndReason::Stop),
        ]
    };
    let mut run = Run::steps(8, events());
    assert_eq!(run.end(), None);
    run.step(done(None));
    assert_eq!(
        (run.end(), run.life.record().prefill_ms),
        (Some(Ok(EndReason::Stop)), 20.0)
    );

    for last in [Event::PrefillFailed(LegError::Lost), Event::ClientGone] {
        let mut run = Run::steps(8, events());
        run.step(last);
        assert_eq!((run.end(), run.closed().len()), (Some(Ok(EndReason::Stop)), 2));
    }
    let mut run = Run::steps(8, events());
    let before = run.now;
    run.sleep();
    assert_eq!(
        (run.now - before, run.end()),
        (CONFIG.closing_ms, Some(Ok(EndReason::Stop)))
    );
}

#[test]
fn the_router_renews_until_the_prefill_node_starts() {
    let mut run = Run::steps(8, [handoff(), Event::Ticket { lease_ms: 9_000 }]);
    run.sleep().sleep();
    assert_eq!(run.actions.iter().filter(|action| **action == Action::Renew).count(), 2);
    assert_eq!(run.now, 20 + 2 * 3_000);
    run.step(started());
    assert_eq!(run.life.wake_at(), at(DEADLINE_MS));
}

#[test]
fn each_state_has_a_deadline() {
    let ticket = || Event::Ticket { lease_ms: 200_000 };
    for (events, code, ms) in [
        (vec![], "QUEUE_TIMEOUT", QUEUE_MS),
        (
            vec![handoff()],
            "RESERVE_TIMEOUT",
            10 + CONFIG.reserve_ms + CONFIG.replace_ms,
        ),
        (vec![local()], "DEADLINE_EXCEEDED", DEADLINE_MS),
        (vec![handoff(), ticket()], "DEADLINE_EXCEEDED", DEADLINE_MS),
        (vec![handoff(), ticket(), verified()], "DEADLINE_EXCEEDED", DEADLINE_MS),
    ] {
        let mut run = Run::steps(8, events.clone());
        run.sleep();
        if run.life.queued() {
            run.sleep();
        }
        let Some(Action::End(Err(error))) = run.actions.last() else {
            panic!("{events:?} must end");
        };
        let found = match error {
            GenerateError::NodeFailed { code, .. } => code.as_str(),
            other => other.code(),
        };
        assert_eq!((found, run.now), (code, ms), "{events:?}");
    }
}

#[test]
fn a_node_lost_while_tokens_leave_ends_the_request() {
    let ticket = || Event::Ticket { lease_ms: 9_000 };
    for last in [LegError::Lost, LegError::Refused] {
        let mut run = Run::steps(8, [handoff(), ticket(), verified(), tokens(0, &[1])]);
        run.step(Event::DecodeFailed(last));
        assert_eq!((run.end(), run.closed().len()), (Some(Err("NODE_LOST")), 2));
    }
    // Once decoding, the prefill node may die.
    let run = Run::steps(
        8,
        [
            handoff(),
            ticket(),
            verified(),
            Event::PrefillFailed(LegError::Lost),
            tokens(0, &[1]),
            decode_ended(EndReason::Stop),
        ],
    );
    assert_eq!(run.end(), Some(Ok(EndReason::Stop)));
}

#[test]
fn what_fails_before_a_token_left_is_dispatched_anew_without_the_node_at_fault() {
    let prefill = |error| Event::PrefillFailed(error);
    let decode = |error| Event::DecodeFailed(error);
    let check = |at: &[Event], failures: &[Event], waits: bool, by: u64| {
        let mut run = Run::steps(8, [handoff(), Event::Ticket { lease_ms: 9_000 }]);
        at.iter().chain(failures).for_each(|event| {
            run.step(event.clone());
        });
        if waits {
            assert!(!run.life.queued(), "{failures:?}");
            run.sleep();
        }
        assert!(run.life.queued(), "{failures:?}");
        let expected = Action::Requeue { by: MemberId(by) };
        assert_eq!(run.actions.last(), Some(&expected), "{failures:?}");
        assert_eq!(run.closed().len(), 2);
        // Whatever the attempt that is over still says changes nothing.
        run.step(handoff())
            .step(Event::Ticket { lease_ms: 9_000 })
            .step(attempt_tokens(1, 0, &[9]));
        run.step(verified())
            .step(attempt_tokens(2, 0, &[5]))
            .step(decode_ended(EndReason::Stop));
        run.step(done(None));
        assert_eq!((run.ids(), run.end()), (vec![5], Some(Ok(EndReason::Stop))));
    };
    let checksum = || failed("HANDOFF_REJECTED");
    check(&[], &[prefill(LegError::Lost)], false, 1);
    check(&[], &[decode(LegError::Lost)], false, 2);
    check(&[verified()], &[decode(LegError::Lost)], false, 2);
    // One leg suffers from the other's loss, and may be the first to say so.
    check(&[], &[decode(failed("ABORTED")), prefill(LegError::Lost)], false, 1);
    check(&[], &[prefill(failed("PEER_LOST")), decode(LegError::Lost)], false, 2);
    // A decode node that waits for KV fails by its sender.
    check(&[started()], &[prefill(checksum()), decode(checksum())], false, 1);
    check(&[started()], &[decode(failed("LEASE_ENDED"))], true, 1);
    check(&[], &[prefill(checksum())], true, 1);
    // What fails for its own reasons, or cannot be reached, is at fault itself.
    check(&[], &[decode(failed("NODE_REFUSED"))], true, 2);
    check(&[verified()], &[decode(failed("PEER_LOST"))], true, 2);
    check(&[], &[prefill(failed("PEER_UNREACHABLE"))], true, 2);
}

#[test]
fn what_kills_its_nodes_is_stopped() {
    let ticket = || Event::Ticket { lease_ms: 9_000 };
    for death in [LegError::Lost, failed("ENGINE_LOST")] {
        let mut run = Run::new(8);
        for _ in 0..CONFIG.max_losses {
            assert_eq!(run.end(), None);
            run.step(handoff())
                .step(ticket())
                .step(Event::PrefillFailed(death.clone()));
            run.step(Event::DecodeFailed(failed("PEER_LOST")));
        }
        assert!(matches!(run.end(), Some(Err("NODE_LOST" | "NODE_FAILED"))), "{death:?}");
    }
}

#[test]
fn a_failure_is_told_though_a_later_attempt_finds_no_room() {
    let mut run = Run::steps(8, [local(), Event::DecodeFailed(failed("NODE_REFUSED"))]);
    for _ in 1..CONFIG.max_attempts {
        run.step(local()).step(Event::DecodeFailed(LegError::Refused));
    }
    assert_eq!(run.end(), Some(Err("NODE_FAILED")));
}

#[test]
fn what_fails_again_and_again_ends_the_request() {
    let mut run = Run::new(8);
    for _ in 0..CONFIG.max_attempts {
        assert_eq!(run.end(), None);
        run.step(handoff()).step(Event::Ticket { lease_ms: 9_000 });
        run.step(Event::PrefillFailed(failed("HANDOFF_REJECTED")));
        run.step(Event::DecodeFailed(failed("HANDOFF_REJECTED")));
    }
    assert_eq!(run.end(), Some(Err("NODE_FAILED")));
    // Nobody takes its place: the failure is told, not the wait.
    let mut run = Run::steps(8, [local(), Event::DecodeFailed(failed("ENGINE"))]);
    assert!(run.life.queued());
    run.sleep();
    assert_eq!(run.end(), Some(Err("NODE_FAILED")));
}

#[test]
fn a_leg_that_gives_up_is_reported_after_a_moment() {
    let hopeless = LegError::Failed {
        code: "ENGINE".to_owned(),
        message: "no".to_owned(),
        retryable: false,
    };
    let mut run = Run::steps(
        8,
        [
            handoff(),
            Event::Ticket { lease_ms: 9_000 },
            Event::PrefillFailed(hopeless),
        ],
    );
    assert_eq!(run.end(), None);
    // While failing no token passes.
    run.step(verified()).step(tokens(0, &[1]));
    run.sleep();
    assert_eq!(
        (run.ids().len(), run.end(), run.closed().len()),
        (0, Some(Err("NODE_FAILED")), 2)
    );
}

#[test]
fn a_node_without_room_sends_the_request_back_to_the_queue() {
    let mut run = Run::steps(8, [handoff(), Event::DecodeFailed(LegError::Refused)]);
    assert!(run.life.queued() && run.actions.contains(&Action::Requeue { by: MemberId(2) }));
    run.step(handoff()).step(Event::Ticket { lease_ms: 9_000 });
    run.step(Event::PrefillFailed(LegError::Refused));
    assert!(run.life.queued() && run.actions.contains(&Action::Requeue { by: MemberId(1) }));
    assert_eq!(run.closed(), [Leg::Decode, Leg::Decode, Leg::Prefill]);
    // A token of the attempt that is over.
    run.step(local()).step(Event::Admitted {
        cached_tokens: 0,
        queue_ms: 0.0,
    });
    run.step(attempt_tokens(2, 0, &[9])).step(attempt_tokens(3, 0, &[5]));
    assert_eq!(run.ids(), [5]);

    let mut full = Run::new(8);
    for _ in 0..CONFIG.max_attempts {
        full.step(local()).step(Event::DecodeFailed(LegError::Refused));
    }
    assert_eq!(full.end(), Some(Err("NODES_FULL")));
}

#[test]
fn a_node_lost_before_it_began_sends_the_request_back_to_the_queue() {
    for placed in [handoff(), local()] {
        let mut run = Run::new(8);
        for attempt in 1..=CONFIG.max_attempts {
            run.step(placed.clone()).step(Event::DecodeFailed(LegError::Lost));
            assert_eq!(run.life.queued(), attempt < CONFIG.max_attempts);
        }
        assert_eq!(run.end(), Some(Err("NODE_LOST")));

        // Nobody takes its place.
        let mut run = Run::steps(8, [placed, Event::DecodeFailed(LegError::Lost)]);
        let lost = run.now;
        run.sleep();
        assert_eq!((run.now - lost, run.end()), (CONFIG.replace_ms, Some(Err("NODE_LOST"))));
    }
}

#[test]
fn each_wait_has_its_time() {
    let mut run = Run::new(8);
    run.now = QUEUE_MS - 30;
    run.step(local()).step(Event::DecodeFailed(LegError::Refused));
    assert_eq!(run.life.wake_at(), at(run.now + QUEUE_MS));
    run.now += QUEUE_MS - 20;
    run.step(local()).step(Event::DecodeFailed(LegError::Refused));
    assert_eq!(run.life.wake_at(), at(DEADLINE_MS));
}

#[test]
fn the_node_at_fault_is_named() {
    let ticket = || Event::Ticket { lease_ms: 9_000 };
    let mut first = done(Some(EndReason::Length));
    if let Event::PrefillDone { first, .. } = &mut first {
        first.id = 100;
    }
    for (bad, node) in [(first, 1), (tokens(0, &[1]), 2)] {
        let run = Run::steps(8, [handoff(), ticket(), bad]);
        let Some(Action::End(Err(GenerateError::NodeFailed { node: named, .. }))) = run.actions.last() else {
            panic!("a node is at fault");
        };
        assert_eq!(*named, place(node).node);
    }
}

#[test]
fn a_dispatch_counts_as_taken_once_the_node_has_it() {
    let mut run = Run::steps(8, [handoff(), Event::Opened(Leg::Decode), Event::Opened(Leg::Prefill)]);
    run.step(Event::Ticket { lease_ms: 9_000 })
        .step(Event::Opened(Leg::Prefill));
    let acknowledged = run.actions.iter().filter_map(|action| match action {
        Action::Acknowledged(leg) => Some(*leg),
        _ => None,
    });
    assert_eq!(acknowledged.collect::<Vec<_>>(), [Leg::Decode, Leg::Prefill]);
}

#[test]
fn tokens_are_checked() {
    let begin = || [handoff(), Event::Ticket { lease_ms: 9_000 }, verified()];
    // Repeats are dropped.
    let run = Run::steps(
        8,
        begin()
            .into_iter()
            .chain([tokens(0, &[1, 2]), tokens(0, &[1]), tokens(1, &[2, 3])]),
    );
    assert_eq!((run.ids(), run.end()), (vec![1, 2, 3], None));
    for bad in [
        tokens(1, &[1]),
        tokens(0, &[100]),
        tokens(0, &[1, 2, 3]),
        Event::Tokens {
            attempt: Attempt(1),
            index: 0,
            tokens: vec![Token {
                alternatives: vec![(100, -1.0)],
                ..token(1)
            }],
        },
        decode_ended(EndReason::Stop),
        verified(),
    ] {
        let run = Run::steps(2, begin().into_iter().chain([bad.clone()]));
        assert_eq!((run.ids().len(), run.end()), (0, Some(Err("NODE_FAILED"))), "{bad:?}");
    }
    // Not before the KV is verified.
    let run = Run::steps(8, [handoff(), Event::Ticket { lease_ms: 9_000 }, tokens(0, &[1])]);
    assert_eq!((run.ids().len(), run.end()), (0, Some(Err("NODE_FAILED"))));
}

#[test]
fn a_stop_string_closes_both_legs() {
    let mut run = Run::steps(
        8,
        [
            handoff(),
            Event::Ticket { lease_ms: 9_000 },
            verified(),
            done(None),
            tokens(0, &[1]),
        ],
    );
    run.step(Event::StopMatched);
    assert_eq!(
        (run.end(), run.closed()),
        (Some(Ok(EndReason::Stop)), vec![Leg::Prefill, Leg::Decode])
    );
}

fn event() -> impl Strategy<Value = Event> {
    let leg_error = prop_oneof![Just(LegError::Refused), Just(LegError::Lost), Just(failed("X"))];
    prop_oneof![
        3 => Just(handoff()),
        2 => Just(local()),
        1 => Just(Event::Refused(GenerateError::NoNodes)),
        4 => (1..10_000_u64).prop_map(|lease_ms| Event::Ticket { lease_ms }),
        2 => Just(Event::Admitted { cached_tokens: 1, queue_ms: 1.0 }),
        4 => Just(verified()),
        12 => (1..4_u32, 0..6_u32, prop::collection::vec(0..110_u32, 0..4)).prop_map(|(a, i, ids)| attempt_tokens(a, i, &ids)),
        2 => Just(decode_ended(EndReason::Length)),
        1 => leg_error.clone().prop_map(Event::DecodeFailed),
        3 => Just(started()),
        2 => Just(done(None)),
        1 => Just(done(Some(EndReason::Stop))),
        1 => leg_error.prop_map(Event::PrefillFailed),
        3 => prop_oneof![Just(Event::Opened(Leg::Decode)), Just(Event::Opened(Leg::Prefill))],
        1 => Just(Event::StopMatched),
        1 => Just(Event::ClientGone),
        1 => Just(Event::RouterStopped),
        4 => Just(Event::Tick),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// Whatever the nodes, the client and the clock do: indices go up by one, no more tokens than asked for, legs are opened closed and closed open, the
    /// request ends once, within its deadline, with both legs closed, and nothing follows.
    #[test]
    fn ends_once_and_in_order(events in prop::collection::vec((event(), 0..4_000_u64), 0..60), max_new_tokens in 1..6_u32) {
        let mut life = Life::new(CONFIG, at(0), at(QUEUE_MS), at(DEADLINE_MS), max_new_tokens);
        let mut now = 0;
        let mut all = Vec::new();
        let mut open = std::collections::HashSet::new();
        let (mut next, mut ends) = (0, 0);
        let ticks = std::iter::repeat_n((Event::Tick, u64::MAX), DEADLINE_MS as usize / 10 + 10);
        for (event, pause) in events.into_iter().chain(ticks) {
            now = if pause == u64::MAX { now.max(life.wake_at().0.div_ceil(1_000)) } else { now + pause };
            let before = all.len();
            life.step(event, at(now), &mut all);
            prop_assert!(life.wake_at() <= at(DEADLINE_MS));
            for action in &all[before..] {
                prop_assert_eq!(ends, 0, "after the end: {:?}", action);
                match action {
                    Action::OpenDecode { .. } => prop_assert!(open.insert(Leg::Decode)),
                    Action::RunPrefill { .. } => prop_assert!(open.contains(&Leg::Decode) && open.insert(Leg::Prefill)),
                    Action::Close(leg) => prop_assert!(open.remove(leg)),
                    Action::Renew => prop_assert!(open.contains(&Leg::Decode)),
                    Action::Requeue { .. } => prop_assert!(open.is_empty() && next == 0),
                    Action::Deliver { index, tokens } => {
                        prop_assert_eq!(*index, next);
                        next += tokens.len() as u32;
                        prop_assert!(next <= max_new_tokens);
                    }
                    Action::End(outcome) => {
                        ends += 1;
                        prop_assert!(open.is_empty());
                        prop_assert!(outcome.is_err() || next > 0);
                    }
                    Action::Acknowledged(_) | Action::Settled(_) | Action::Travelled { .. } => {}
                }
            }
        }
        prop_assert_eq!(ends, 1);
        prop_assert!(life.ended());
    }
}
