//! Which blocks are given up when the pool is full: what nobody has used for longest, and never what is in use.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::super::*;
use super::fake::{BLOCK_TOKENS, Node, blocks_for, root, undisturbed};

const BLOCKS: usize = 9;

/// What a naive pool would hold: a named block is the prefix that it ends.
#[derive(Default)]
struct Model {
    /// Least recently used first.
    cached: Vec<Vec<TokenId>>,
    /// With its uses.
    held: BTreeMap<Vec<TokenId>, usize>,
    /// In use, and cannot be found: tails, and blocks that another of the same tokens stands for.
    nameless: usize,
}

/// One sequence's blocks in the model: their prefixes, `None` for the nameless.
type Table = Vec<Option<Vec<TokenId>>>;

impl Model {
    fn free(&self) -> usize {
        BLOCKS - self.cached.len() - self.held.len() - self.nameless
    }

    fn hold(&mut self, prefix: &[TokenId]) {
        self.cached.retain(|cached| cached != prefix);
        *self.held.entry(prefix.to_vec()).or_default() += 1;
    }

    fn release(&mut self, table: Table) {
        for prefix in table.into_iter().rev() {
            let Some(prefix) = prefix else {
                self.nameless -= 1;
                continue;
            };
            *self.held.get_mut(&prefix).unwrap() -= 1;
            if self.held[&prefix] == 0 {
                self.held.remove(&prefix);
                self.cached.push(prefix);
            }
        }
    }

    /// Takes blocks for a prompt; returns how many were found, and its table, if it fits.
    fn run(&mut self, prompt: &[TokenId]) -> Option<(usize, Table)> {
        let prefix = |at: usize| &prompt[..(at + 1) * BLOCK_TOKENS];
        let known = |model: &Self, at| {
            model.held.contains_key(prefix(at)) || model.cached.iter().any(|cached| cached == prefix(at))
        };
        let found = (0..(prompt.len() - 1) / BLOCK_TOKENS)
            .take_while(|&at| known(self, at))
            .count();
        (0..found).for_each(|at| self.hold(prefix(at)));
        let mut table: Table = (0..found).map(|at| Some(prefix(at).to_vec())).collect();
        let missing = blocks_for(prompt.len()) - found;
        if missing > self.free() + self.cached.len() {
            self.release(table);
            return None;
        }
        let evicted = missing.saturating_sub(self.free());
        self.cached.drain(..evicted);
        for at in found..found + missing {
            let full = (at + 1) * BLOCK_TOKENS <= prompt.len();
            if full && !known(self, at) {
                self.hold(prefix(at));
                table.push(Some(prefix(at).to_vec()));
            } else {
                self.nameless += 1;
                table.push(None);
            }
        }
        Some((found, table))
    }
}

#[derive(Clone, Debug)]
enum Op {
    /// A prompt is computed; a prefill keeps its blocks until it is released.
    Run {
        prompt: Vec<TokenId>,
        role: Role,
    },
    Release(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let prompt = prop::collection::vec(0..2u32, 1..9);
    let role = prop::sample::select(vec![Role::Decode, Role::Decode, Role::Prefill]);
    prop_oneof![
        4 => (prompt, role).prop_map(|(prompt, role)| Op::Run { prompt, role }),
        1 => any::<usize>().prop_map(Op::Release),
    ]
}

fn run(ops: Vec<Op>) {
    let config = SchedulerConfig {
        token_budget: 16,
        chunk_tokens: 16,
        max_running: 4,
        max_waiting: 4,
        max_context: 16,
        block_tokens: BLOCK_TOKENS,
    };
    let (mut node, mut model) = (Node::new(config, BLOCKS), Model::default());
    let mut kept: Vec<(u64, Table)> = Vec::new();
    for (id, op) in (0..).zip(ops) {
        match op {
            Op::Run { prompt, role } => {
                let new = NewSequence {
                    id: SequenceId(id),
                    root: root(),
                    prompt: prompt.clone(),
                    output: vec![],
                    max_new_tokens: 1,
                    stop_ids: vec![],
                    sampling: SamplingParams::greedy(),
                    role,
                    start: Start::Compute,
                };
                node.submit(new).unwrap();
                let expected = model.run(&prompt);
                assert_eq!(node.plan(), expected.is_some());
                let Some((found, table)) = expected else {
                    node.cancel(id);
                    node.events.clear();
                    continue;
                };
                assert_eq!(node.plan.spans[0].context, found * BLOCK_TOKENS, "{prompt:?}");
                node.complete();
                let token = undisturbed(&prompt, 1, &[])[0];
                let drew = |event: &SequenceEvent| matches!(event, SequenceEvent::Token { token: drawn, .. } if *drawn == token);
                assert!(node.events.iter().any(drew));
                node.events.clear();
                match role {
                    Role::Decode => model.release(table),
                    Role::Prefill => kept.push((id, table)),
                }
            }
            Op::Release(index) if !kept.is_empty() => {
                let (id, table) = kept.remove(index % kept.len());
                node.release(id);
                model.release(table);
            }
            Op::Release(_) => {}
        }
        let counts = node.pool.counts();
        assert_eq!((counts.free, counts.cached), (model.free(), model.cached.len()));
        node.pool.check().unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn the_least_recently_used_goes_first(ops in prop::collection::vec(op(), 1..120)) {
        run(ops);
    }
}
