//! Long prompts, short prompts and those that decode, beside each other.

use proptest::prelude::*;

use super::fake::{BLOCK_TOKENS, Node};
use super::{super::*, ROOMY, prompt, sequence, spans};

#[test]
fn a_quarter_is_kept_for_short_prompts() {
    let config = SchedulerConfig {
        token_budget: 16,
        chunk_tokens: 16,
        ..ROOMY
    };
    let mut node = Node::new(config, 64);
    node.submit(sequence(0, 40, 1)).unwrap();
    node.plan();
    assert_eq!(spans(&node), [(0, 0, 16, None)], "nobody else is there");
    node.submit(sequence(1, 33, 1)).unwrap();
    node.submit(sequence(2, 3, 1)).unwrap();
    node.submit(sequence(3, 3, 1)).unwrap();
    node.complete();
    let steps = [
        // No short prompt is at the queue's head: the quarter goes to a long one.
        vec![(0, 16, 13, None), (1, 0, 3, None)],
        vec![(0, 29, 11, Some(0)), (1, 3, 2, None), (2, 0, 3, Some(0))],
        vec![(1, 5, 13, None), (3, 0, 3, Some(0))],
        // What ends takes all.
        vec![(1, 18, 15, Some(0))],
    ];
    for expected in steps {
        node.plan();
        assert_eq!(spans(&node), expected);
        node.complete();
    }
}

#[test]
fn the_oldest_goes_on_though_what_is_handed_over_fills_every_step() {
    let config = SchedulerConfig {
        max_running: 2,
        token_budget: 4,
        ..ROOMY
    };
    let mut node = Node::new(config, 64);
    node.submit(sequence(0, 9, 1)).unwrap();
    node.plan();
    node.complete();
    for id in 1..4 {
        let table = node.receive(&prompt(id, 2)).unwrap();
        let new = NewSequence {
            output: vec![1],
            start: Start::Handed { table },
            ..sequence(id, 2, 9)
        };
        node.submit(new).unwrap();
    }
    node.plan();
    assert_eq!(spans(&node), [(1, 2, 1, Some(1)), (0, 4, 3, None)]);
}

#[test]
fn one_of_two_equal_prompts_takes_over_what_the_other_has_computed() {
    let config = SchedulerConfig {
        token_budget: 16,
        chunk_tokens: 9,
        ..ROOMY
    };
    let mut node = Node::new(config, 64);
    for id in 0..2 {
        let new = NewSequence {
            prompt: prompt(0, 20),
            ..sequence(id, 1, 3)
        };
        node.submit(new).unwrap();
    }
    node.plan();
    assert_eq!(spans(&node), [(0, 0, 9, None), (1, 0, 7, None)]);
    node.complete();
    // Four blocks are whole; the other's own half of the fourth is given up for it.
    node.plan();
    assert_eq!(spans(&node), [(0, 9, 9, None), (1, 8, 7, None)]);
    node.complete();
    node.run(8);
    assert!(node.pool.is_idle());
    let counts = node.pool.counts();
    assert_eq!(counts.cached, 10 + 1, "of both, each full block once");
}

proptest! {
    /// A short prompt has its first token as soon as those before it in the queue have come in, one a step, whatever else runs: but for the
    /// steps in which one before it ends.
    #[test]
    fn a_short_prompt_waits_for_no_long_one(
        spare in 8usize..40,
        chunk_tokens in 4usize..48,
        decodes in 0usize..4,
        long in prop::collection::vec(60usize..90, 1..4),
        queued in 0usize..3,
        short in 1usize..10,
    ) {
        let config = SchedulerConfig {
            token_budget: 8 + spare,
            chunk_tokens,
            max_running: 12,
            max_waiting: 12,
            max_context: 160,
            block_tokens: BLOCK_TOKENS,
        };
        // It fits the quarter of the rows that those who decode leave (those before it may decode soon, too).
        prop_assume!(short <= chunk_tokens.min((config.token_budget - decodes - long.len() - queued) / 4));
        let mut node = Node::new(config, 1_000);
        let mut next = 0;
        let mut submit = |node: &mut Node, len, new| {
            node.submit(sequence(next, len, new)).unwrap();
            next += 1;
            next - 1
        };
        for _ in 0..decodes {
            submit(&mut node, 1, 60);
        }
        for len in long {
            submit(&mut node, len, 60);
            node.plan();
            node.complete();
        }
        for _ in 0..queued {
            submit(&mut node, 80, 60);
        }
        let before = node.scheduler.load().waiting;
        let id = submit(&mut node, short, 2);
        let mut steps = before + 1;
        while steps > 0 {
            node.plan();
            let ends = spans(&node).iter().any(|&(of, _, rows, drawn)| of < id && rows > 1 && drawn.is_some());
            steps -= usize::from(!ends);
            node.complete();
        }
        let drew = |event: &SequenceEvent| matches!(event, SequenceEvent::Token { id: of, .. } if of.0 == id);
        prop_assert!(node.events.iter().any(drew));
    }
}
