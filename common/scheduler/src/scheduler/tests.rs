mod eviction;
mod fairness;
mod fake;
mod random;
mod starvation;

use baton_kv::Owner;
use fake::{BLOCK_TOKENS, Node, root, undisturbed};

use super::*;

const ROOMY: SchedulerConfig = SchedulerConfig {
    token_budget: 16,
    chunk_tokens: 8,
    max_running: 8,
    max_waiting: 8,
    max_context: 64,
    block_tokens: BLOCK_TOKENS,
};

/// A prompt of `len` tokens that shares no block with another sequence's.
fn prompt(id: u64, len: usize) -> Vec<TokenId> {
    (0..len as u32)
        .map(|position| 10 + id as u32 * 100 + position)
        .collect()
}

fn sequence(id: u64, len: usize, max_new_tokens: usize) -> NewSequence {
    NewSequence {
        id: SequenceId(id),
        root: root(),
        prompt: prompt(id, len),
        output: vec![],
        max_new_tokens,
        stop_ids: vec![],
        sampling: SamplingParams::greedy(),
        role: Role::Decode,
        start: Start::Compute,
    }
}

fn tokens_of(events: &[SequenceEvent], of: u64) -> Vec<TokenId> {
    let tokens = events.iter().filter_map(|event| match event {
        SequenceEvent::Token { id, token, .. } if id.0 == of => Some(*token),
        _ => None,
    });
    tokens.collect()
}

fn reasons_of(events: &[SequenceEvent], of: u64) -> Vec<FinishReason> {
    let reasons = events.iter().filter_map(|event| match event {
        SequenceEvent::Finished { id, reason } if id.0 == of => Some(*reason),
        _ => None,
    });
    reasons.collect()
}

/// Which sequences ended, in order.
fn ends(node: &Node) -> Vec<u64> {
    let ends = node.events.iter().filter_map(|event| match event {
        SequenceEvent::Finished { id, .. } => Some(id.0),
        _ => None,
    });
    ends.collect()
}

/// (sequence, context, rows, output index sampled) of each span.
fn spans(node: &Node) -> Vec<(u64, usize, usize, Option<u32>)> {
    let spans = node.plan.spans.iter();
    spans
        .map(|span| {
            let index = span.sample.as_ref().map(|sample| sample.index);
            (span.sequence.0, span.context, span.rows.len(), index)
        })
        .collect()
}

#[test]
fn decode_rows_come_first_then_chunks_by_arrival_within_the_budget() {
    let config = SchedulerConfig {
        token_budget: 8,
        chunk_tokens: 5,
        ..ROOMY
    };
    let mut node = Node::new(config, 64);
    node.submit(sequence(0, 3, 9)).unwrap();
    node.submit(sequence(1, 12, 9)).unwrap();
    node.submit(sequence(2, 4, 9)).unwrap();
    let steps = [
        vec![(0, 0, 3, Some(0)), (1, 0, 5, None)],
        vec![(0, 3, 1, Some(1)), (1, 5, 5, None), (2, 0, 2, None)],
        vec![(0, 4, 1, Some(2)), (1, 10, 2, Some(0)), (2, 2, 2, Some(0))],
        vec![(0, 5, 1, Some(3)), (1, 12, 1, Some(1)), (2, 4, 1, Some(1))],
    ];
    for expected in steps {
        assert!(node.plan());
        assert_eq!(spans(&node), expected);
        node.complete();
    }
    node.run(16);
    for id in 0..3 {
        let prompt = prompt(id, [3, 12, 4][id as usize]);
        assert_eq!(tokens_of(&node.events, id), undisturbed(&prompt, 9, &[]));
        assert_eq!(reasons_of(&node.events, id), [FinishReason::Length]);
    }
    assert!(node.pool.is_idle());
}

#[test]
fn no_more_than_max_running_run() {
    let config = SchedulerConfig {
        max_running: 2,
        ..ROOMY
    };
    let mut node = Node::new(config, 64);
    for id in 0..3 {
        node.submit(sequence(id, 2, 2)).unwrap();
    }
    node.plan();
    assert_eq!(spans(&node), [(0, 0, 2, Some(0)), (1, 0, 2, Some(0))]);
    let load = node.scheduler.load();
    assert_eq!((load.waiting, load.running, load.queued_prefill_tokens), (1, 2, 6));
    node.complete();
    node.plan();
    assert_eq!(spans(&node), [(0, 2, 1, Some(1)), (1, 2, 1, Some(1))]);
    node.complete();
    node.plan();
    assert_eq!(spans(&node), [(2, 0, 2, Some(0))]);
}

#[test]
fn what_can_never_run_is_refused() {
    fn check(len: usize, max_new_tokens: usize, role: Role, expected: Result<(), SubmitError>) {
        let config = SchedulerConfig {
            max_context: 12,
            max_waiting: 1,
            ..ROOMY
        };
        let mut node = Node::new(config, 4);
        let new = NewSequence {
            role,
            ..sequence(0, len, max_new_tokens)
        };
        assert_eq!(node.submit(new), expected, "{len} + {max_new_tokens}");
        if expected.is_ok() {
            let full = Err(SubmitError::QueueFull { limit: 1 });
            assert_eq!(node.submit(sequence(1, 1, 1)), full);
            node.run(32);
            assert_eq!(reasons_of(&node.events, 0), [FinishReason::Length]);
            assert_eq!(node.submit(sequence(2, 1, 1)), Ok(()));
        }
    }
    let too_long = |needed, limit| Err(SubmitError::TooLong { needed, limit });
    check(0, 1, Role::Decode, Err(SubmitError::EmptyPrompt));
    check(4, 9, Role::Decode, too_long(13, 12));
    check(4, usize::MAX, Role::Decode, too_long(usize::MAX, 12));
    // The last token's KV is never needed.
    check(4, 5, Role::Decode, Ok(()));
    check(4, 6, Role::Decode, too_long(9, 8));
    check(8, 1, Role::Decode, Ok(()));
    // Only the prompt is computed here.
    check(8, 4, Role::Prefill, Ok(()));
    check(9, 3, Role::Prefill, too_long(9, 8));
}

#[test]
fn a_prefix_is_found_up_to_the_last_token_but_one() {
    fn check(len: usize, cached: usize) {
        let mut node = Node::new(ROOMY, 64);
        node.submit(sequence(0, 6, 1)).unwrap();
        node.run(8);
        node.events.clear();
        let new = NewSequence {
            id: SequenceId(1),
            prompt: prompt(0, len),
            ..sequence(1, 1, 3)
        };
        node.submit(new).unwrap();
        node.plan();
        let SequenceEvent::Started {
            cached_tokens, table, ..
        } = &node.events[0]
        else {
            panic!("{:?}", node.events);
        };
        assert_eq!((*cached_tokens, table.len()), (cached, cached / BLOCK_TOKENS));
        assert_eq!(spans(&node), [(1, cached, len - cached, Some(0))]);
        node.complete();
        node.run(8);
        assert_eq!(tokens_of(&node.events, 1), undisturbed(&prompt(0, len), 3, &[]));
    }
    check(1, 0);
    check(5, 4);
    check(6, 4);
    check(7, 6);
}

#[test]
fn blocks_filled_by_decode_are_found_too() {
    let mut node = Node::new(ROOMY, 64);
    node.submit(sequence(0, 3, 6)).unwrap();
    node.run(16);
    let mut conversation = prompt(0, 3);
    conversation.extend(tokens_of(&node.events, 0));
    conversation.push(7);
    node.events.clear();
    let new = NewSequence {
        prompt: conversation,
        ..sequence(1, 1, 1)
    };
    node.submit(new).unwrap();
    node.plan();
    // 3 + 6 - 1 tokens were in the pool.
    assert_eq!(spans(&node), [(1, 8, 2, Some(0))]);
}

#[test]
fn the_newest_is_preempted_and_goes_on_where_it_was() {
    // Each needs 4 blocks at its end, and there are 6.
    let mut node = Node::new(ROOMY, 6);
    for id in 0..2 {
        node.submit(sequence(id, 3, 6)).unwrap();
    }
    node.run(32);
    assert_eq!(node.scheduler.load().preemptions, 1);
    let preempted: Vec<_> = node
        .events
        .iter()
        .filter(|event| matches!(event, SequenceEvent::Preempted { .. }))
        .collect();
    assert_eq!(preempted, [&SequenceEvent::Preempted { id: SequenceId(1) }]);
    let started = node
        .events
        .iter()
        .filter(|event| matches!(event, SequenceEvent::Started { .. }));
    assert_eq!(started.count(), 2);
    for id in 0..2 {
        assert_eq!(tokens_of(&node.events, id), undisturbed(&prompt(id, 3), 6, &[]));
        assert_eq!(reasons_of(&node.events, id), [FinishReason::Length]);
    }
    assert!(node.pool.is_idle());
}

#[test]
fn the_preempted_goes_before_those_that_waited() {
    let mut node = Node::new(ROOMY, 6);
    for id in 0..2 {
        node.submit(sequence(id, 3, 6)).unwrap();
    }
    node.plan();
    node.submit(sequence(2, 9, 1)).unwrap();
    while node.scheduler.load().preemptions == 0 {
        node.complete();
        assert!(node.plan());
    }
    // All of both prompts is to be computed, as far as it is not found again.
    let load = node.scheduler.load();
    assert_eq!((load.waiting, load.running, load.queued_prefill_tokens), (2, 1, 3 + 9));
    node.complete();
    node.run(32);
    assert_eq!(ends(&node), [0, 1, 2]);
}

#[test]
fn the_preempted_wait_by_arrival_whichever_step_it_was() {
    let mut node = Node::new(ROOMY, 8);
    for id in 0..2 {
        node.submit(sequence(id, 3, 12)).unwrap();
    }
    let run_until_preempted = |node: &mut Node, preemptions| {
        while node.scheduler.load().preemptions < preemptions {
            assert!(node.plan());
            node.complete();
        }
    };
    run_until_preempted(&mut node, 1);
    assert_eq!(node.scheduler.head_blocks(), 6, "9 tokens, and more to come");
    // Handed over, it runs at once though it came last; and then it is preempted, too.
    let table = node.receive(&prompt(2, 5)).unwrap();
    let new = NewSequence {
        output: vec![1],
        start: Start::Handed { table },
        ..sequence(2, 5, 8)
    };
    node.submit(new).unwrap();
    run_until_preempted(&mut node, 2);
    assert_eq!(node.scheduler.load().waiting, 2);
    node.run(64);
    assert_eq!(ends(&node), [0, 1, 2]);
}

#[test]
fn a_sequence_that_will_grow_comes_in_with_a_block_to_spare() {
    fn check(max_new_tokens: usize, admitted: bool) {
        let mut node = Node::new(ROOMY, 4);
        let elsewhere = node.squeeze(2);
        node.submit(sequence(0, 4, max_new_tokens)).unwrap();
        assert_eq!(node.plan(), admitted, "{max_new_tokens}");
        if !admitted {
            node.pool.release(&elsewhere);
            assert!(node.plan());
        }
    }
    check(1, true);
    check(2, false);
}

#[test]
fn the_oldest_waits_for_blocks_that_are_held_elsewhere() {
    let mut node = Node::new(ROOMY, 4);
    node.submit(sequence(0, 2, 6)).unwrap();
    node.plan();
    node.complete();
    let elsewhere = node.squeeze(3);
    assert!(!node.plan());
    assert_eq!(node.scheduler.load().running, 1);
    node.pool.release(&elsewhere);
    node.run(16);
    assert_eq!(tokens_of(&node.events, 0), undisturbed(&prompt(0, 2), 6, &[]));
    assert_eq!(node.scheduler.load().preemptions, 0);
}

#[test]
fn a_queue_waits_for_its_head() {
    let mut node = Node::new(ROOMY, 6);
    node.submit(sequence(0, 6, 4)).unwrap();
    node.submit(sequence(1, 8, 2)).unwrap();
    node.submit(sequence(2, 1, 1)).unwrap();
    node.plan();
    assert_eq!(spans(&node), [(0, 0, 6, Some(0))]);
    node.complete();
    node.run(16);
    // The last, though small, runs only once the one before it has come in.
    assert_eq!(ends(&node), [0, 2, 1]);
}

#[test]
fn a_handed_sequence_computes_only_what_follows_the_prompt() {
    let mut node = Node::new(ROOMY, 16);
    let prompt = prompt(0, 5);
    let expected = undisturbed(&prompt, 4, &[]);
    let table = node.receive(&prompt).unwrap();
    let new = NewSequence {
        output: expected[..1].to_vec(),
        start: Start::Handed { table },
        ..sequence(0, 5, 4)
    };
    node.submit(new).unwrap();
    node.plan();
    assert_eq!(spans(&node), [(0, 5, 1, Some(1))]);
    node.complete();
    node.run(8);
    assert_eq!(tokens_of(&node.events, 0), expected[1..]);
    assert!(matches!(node.events[0], SequenceEvent::Token { index: 1, .. }));
    assert!(node.pool.is_idle());
}

#[test]
fn a_replay_computes_all_and_draws_only_what_is_missing() {
    let mut node = Node::new(ROOMY, 16);
    let expected = undisturbed(&prompt(0, 4), 5, &[]);
    let new = NewSequence {
        output: expected[..3].to_vec(),
        ..sequence(0, 4, 5)
    };
    node.submit(new).unwrap();
    node.plan();
    assert_eq!(spans(&node), [(0, 0, 7, Some(3))]);
    node.complete();
    node.run(8);
    assert_eq!(tokens_of(&node.events, 0), expected[3..]);
}

#[test]
fn what_had_ended_already_ends_at_once() {
    fn check(output: &[TokenId], reason: FinishReason) {
        let mut node = Node::new(ROOMY, 16);
        let table = node.receive(&prompt(0, 4)).unwrap();
        let new = NewSequence {
            output: output.to_vec(),
            stop_ids: vec![3],
            start: Start::Handed { table },
            ..sequence(0, 4, 2)
        };
        node.submit(new).unwrap();
        assert!(!node.plan());
        let id = SequenceId(0);
        assert_eq!(node.events, [SequenceEvent::Finished { id, reason }]);
        assert!(node.pool.is_idle());
    }
    check(&[3], FinishReason::Stop);
    check(&[1, 2], FinishReason::Length);
    check(&[1, 3], FinishReason::Stop);
}

#[test]
fn a_prefill_holds_its_blocks_until_released() {
    let mut node = Node::new(ROOMY, 16);
    let new = NewSequence {
        role: Role::Prefill,
        ..sequence(0, 11, 9)
    };
    node.submit(new).unwrap();
    node.run(8);
    let kinds = node.events.iter().map(|event| match event {
        SequenceEvent::Started { cached_tokens, .. } => ("started", *cached_tokens),
        SequenceEvent::Computed { computed, .. } => ("computed", *computed),
        SequenceEvent::Token { index, .. } => ("token", *index as usize),
        SequenceEvent::Finished { .. } => ("finished", 0),
        SequenceEvent::Preempted { .. } => ("preempted", 0),
    });
    let kinds: Vec<_> = kinds.collect();
    let expected = [
        ("started", 0),
        ("computed", 8),
        ("computed", 11),
        ("token", 0),
        ("finished", 0),
    ];
    assert_eq!(kinds, expected);
    assert_eq!(node.pool.counts().held, 6);
    node.events.clear();
    node.cancel(0);
    assert_eq!(node.events, []);
    assert!(node.pool.is_idle());
    node.release(0);
    assert!(node.pool.is_idle());
}

#[test]
fn a_cancel_during_a_step_gives_back_when_it_completes() {
    for role in [Role::Decode, Role::Prefill] {
        check_cancel_during_a_step(role);
    }
}

fn check_cancel_during_a_step(role: Role) {
    let mut node = Node::new(ROOMY, 16);
    let new = NewSequence {
        role,
        ..sequence(0, 5, 5)
    };
    node.submit(new).unwrap();
    node.plan();
    node.cancel(0);
    node.cancel(0);
    assert_eq!(reasons_of(&node.events, 0), []);
    let used = node.plan.tables.clone();
    assert!(
        used.iter()
            .all(|&block| node.pool.owner(block) == Owner::Sequence { refs: 1 })
    );
    node.complete();
    assert_eq!(reasons_of(&node.events, 0), [FinishReason::Cancelled]);
    assert_eq!(tokens_of(&node.events, 0), []);
    assert!(node.pool.is_idle());
    node.cancel(0);
    assert_eq!(reasons_of(&node.events, 0), [FinishReason::Cancelled]);
}

#[test]
fn a_cancel_outside_the_step_gives_back_at_once() {
    let config = SchedulerConfig {
        max_running: 1,
        ..ROOMY
    };
    let mut node = Node::new(config, 16);
    node.submit(sequence(0, 5, 5)).unwrap();
    node.plan();
    node.submit(sequence(1, 5, 5)).unwrap();
    let table = node.receive(&prompt(2, 4)).unwrap();
    let new = NewSequence {
        output: vec![1],
        start: Start::Handed { table: table.clone() },
        ..sequence(2, 4, 5)
    };
    node.submit(new).unwrap();
    node.cancel(1);
    node.cancel(2);
    assert_eq!(reasons_of(&node.events, 1), [FinishReason::Cancelled]);
    assert_eq!(reasons_of(&node.events, 2), [FinishReason::Cancelled]);
    assert!(table.iter().all(|&block| node.pool.owner(block) == Owner::Cached));
    node.complete();
    node.run(16);
    assert_eq!(tokens_of(&node.events, 0), undisturbed(&prompt(0, 5), 5, &[]));
}

#[test]
fn a_failed_step_ends_its_sequences_and_names_nothing() {
    let config = SchedulerConfig {
        token_budget: 8,
        ..ROOMY
    };
    let mut node = Node::new(config, 16);
    node.submit(sequence(0, 8, 5)).unwrap();
    node.submit(sequence(1, 2, 2)).unwrap();
    node.plan();
    node.fail();
    assert_eq!(reasons_of(&node.events, 0), [FinishReason::Cancelled]);
    assert_eq!(node.pool.counts().free, 16);
    assert_eq!(node.pool.snapshot().1, []);
    node.run(8);
    assert_eq!(reasons_of(&node.events, 1), [FinishReason::Length]);
}
