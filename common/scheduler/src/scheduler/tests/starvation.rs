//! Nobody starves, whatever else arrives, is cancelled or preempted, for ever.
//!
//! The bound. T: tokens of the longest context; B: its blocks; N: most sequences that run at once. Let o be the oldest sequence that is here.
//! - While o waits it is the queue's head, and nobody comes in before it. (By handoff only if blocks and a slot are left for o: see
//!   [`Load::may_reserve`].) In each step one of those that run does a row, and loses it only by leaving; so without newcomers all of them are gone
//!   after N T steps. With newcomers there were blocks and a slot, and o lacked only rows: then a prompt ended in this step, for it took
//!   what is kept for those that do; that happens N times at most. Together: 2 N T + N steps.
//! - While o runs it does a row in each step and is never preempted: T steps. It stands only when the pool is out and all that run beside it are
//!   prefills, for those cannot be preempted: then one of them does a row, nobody comes in, and o stands for N T steps at most, for
//!   each of its B blocks.
//!
//! Each sequence is the oldest once all before it have ended.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::super::*;
use super::fake::{BLOCK_TOKENS, Node, blocks_for, root, undisturbed};

const MAX_CONTEXT: usize = 8;
const MAX_WAITING: usize = 2;

/// What arrives again and again.
#[derive(Clone, Debug)]
struct Arrival {
    prompt: usize,
    new: usize,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Kind {
    Decode,
    Prefill,
    Handed,
}

fn arrival(kinds: &'static [Kind]) -> impl Strategy<Value = Arrival> {
    (1..MAX_CONTEXT, 1..MAX_CONTEXT, prop::sample::select(kinds)).prop_map(|(prompt, new, kind)| Arrival {
        prompt,
        new: new.min(MAX_CONTEXT - prompt),
        kind,
    })
}

struct Load {
    node: Node,
    /// By id: the step by whose end it must have ended.
    live: BTreeMap<u64, usize>,
    step: usize,
    next: u64,
    prefills: bool,
}

impl Load {
    /// Steps within which the oldest sequence ends.
    fn bound(&self) -> usize {
        let n = self.node.config.max_running + MAX_WAITING;
        let stands = if self.prefills {
            blocks_for(MAX_CONTEXT) * n * MAX_CONTEXT
        } else {
            0
        };
        2 * n * MAX_CONTEXT + n + MAX_CONTEXT + stands
    }

    /// As a node promises blocks to handoffs: never those, nor the slot, that the queue's head waits for.
    fn may_reserve(&self, prompt: usize) -> bool {
        let (load, counts) = (self.node.scheduler.load(), self.node.pool.counts());
        let slots = match load.waiting {
            0 => load.running < self.node.config.max_running + MAX_WAITING,
            _ => load.running + 1 < self.node.config.max_running,
        };
        slots && blocks_for(prompt) + self.node.scheduler.head_blocks() <= counts.free + counts.cached
    }

    fn submit(&mut self, arrival: &Arrival) {
        let (id, prompt) = (
            self.next,
            (0..arrival.prompt as u32)
                .map(|at| at + self.next as u32 % 3)
                .collect::<Vec<_>>(),
        );
        let mut new = NewSequence {
            id: SequenceId(id),
            root: root(),
            output: vec![],
            max_new_tokens: arrival.new,
            stop_ids: vec![],
            sampling: SamplingParams::greedy(),
            role: if arrival.kind == Kind::Prefill {
                Role::Prefill
            } else {
                Role::Decode
            },
            start: Start::Compute,
            prompt,
        };
        if arrival.kind == Kind::Handed {
            if !self.may_reserve(arrival.prompt) {
                return;
            }
            new.output = undisturbed(&new.prompt, 1, &[]);
            let table = self.node.receive(&new.prompt).expect("counted");
            new.start = Start::Handed { table };
        }
        if self.node.submit(new).is_ok() {
            self.live.insert(id, 0);
            self.live.insert(id, self.step + self.live.len() * self.bound());
            self.next += 1;
        }
    }

    fn run_step(&mut self) {
        if self.node.plan() {
            self.node.complete();
        }
        self.step += 1;
        for event in std::mem::take(&mut self.node.events) {
            if let SequenceEvent::Finished { id, .. } = event {
                self.live.remove(&id.0);
                self.node.release(id.0);
            }
        }
        for (id, deadline) in &self.live {
            assert!(self.step < *deadline, "{id} starves");
        }
    }
}

/// Keeps the queue full for longer than anybody may stay.
fn check(kinds: &'static [Kind], cases: u32) {
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(cases));
    let arrivals = prop::collection::vec(arrival(kinds), 1..40);
    let config = (1..4usize, 0..4usize, 1..9usize).prop_map(|(max_running, spare, chunk_tokens)| SchedulerConfig {
        token_budget: max_running + 4 + spare,
        chunk_tokens,
        max_running,
        max_waiting: MAX_WAITING,
        max_context: MAX_CONTEXT,
        block_tokens: BLOCK_TOKENS,
    });
    let blocks = blocks_for(MAX_CONTEXT)..3 * blocks_for(MAX_CONTEXT);
    let cancels = prop::option::of(2..9usize);
    let input = (config, blocks, arrivals, 1..4usize, cancels);
    let result = runner.run(&input, |(config, blocks, arrivals, rate, cancels)| {
        let (node, prefills) = (Node::new(config, blocks), kinds.contains(&Kind::Prefill));
        let mut load = Load {
            node,
            live: BTreeMap::new(),
            step: 0,
            next: 0,
            prefills,
        };
        let mut arrivals = arrivals.iter().cycle();
        // The longest bound, and as long again.
        let most = config.max_running + 2 * MAX_WAITING;
        for step in 0..load.bound() * most * 2 {
            for _ in 0..rate {
                load.submit(arrivals.next().expect("endless"));
            }
            if cancels.is_some_and(|every| step % every == 0)
                && let Some(id) = load.live.keys().nth(step % load.live.len().max(1))
            {
                load.node.cancel(*id);
            }
            load.run_step();
        }
        prop_assert!(load.next > 40, "nothing came");
        Ok(())
    });
    result.unwrap();
}

#[test]
fn what_decodes_here_ends_within_the_bound() {
    check(&[Kind::Decode, Kind::Decode, Kind::Handed], 48);
}

#[test]
fn beside_prefills_it_does_too() {
    check(&[Kind::Decode, Kind::Prefill, Kind::Handed], 24);
}
