//! Random arrivals, cancels, failures and shortages of blocks: the answers are those of an undisturbed run.

use std::collections::BTreeMap;

use baton_kv::BlockId;
use proptest::prelude::*;

use super::super::*;
use super::fake::{BLOCK_TOKENS, Node, VOCABULARY, blocks_for, root, undisturbed};

const BLOCKS: usize = 10;

#[derive(Clone, Debug)]
struct Request {
    prompt: Vec<TokenId>,
    max_new_tokens: usize,
    stops: bool,
    role: Role,
    /// Output tokens that are known already, at most.
    replayed: usize,
    handed: bool,
    sampling: SamplingParams,
}

/// No penalty, one that counts the output, or one that counts all.
fn sampling() -> impl Strategy<Value = SamplingParams> {
    let with = |repetition_penalty, presence_penalty| SamplingParams {
        repetition_penalty,
        presence_penalty,
        ..SamplingParams::greedy()
    };
    prop_oneof![Just(with(1.0, 0.0)), Just(with(1.0, 0.5)), Just(with(1.5, 0.5))]
}

#[derive(Clone, Debug)]
enum Op {
    Submit(Request),
    Cancel(usize),
    Release(usize),
    Plan,
    Complete,
    Fail,
    Squeeze(usize),
    Relax,
}

fn request() -> impl Strategy<Value = Request> {
    let prompt = prop::collection::vec(0..2u32, 0..12);
    let role = prop_oneof![4 => Just(Role::Decode), 1 => Just(Role::Prefill)];
    let replayed = prop_oneof![3 => Just(0usize), 1 => 0..6usize];
    (
        prompt,
        1..12usize,
        any::<bool>(),
        role,
        replayed,
        prop::bool::weighted(0.25),
        sampling(),
    )
        .prop_map(
            |(prompt, max_new_tokens, stops, role, replayed, handed, sampling)| Request {
                prompt,
                max_new_tokens,
                stops,
                role,
                replayed,
                handed,
                sampling,
            },
        )
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => request().prop_map(Op::Submit),
        2 => any::<usize>().prop_map(Op::Cancel),
        2 => any::<usize>().prop_map(Op::Release),
        10 => Just(Op::Plan),
        10 => Just(Op::Complete),
        1 => Just(Op::Fail),
        1 => (1..6usize).prop_map(Op::Squeeze),
        1 => Just(Op::Relax),
    ]
}

fn config() -> impl Strategy<Value = SchedulerConfig> {
    (1..10usize, 1..6usize, 1..5usize).prop_map(|(token_budget, chunk_tokens, max_running)| SchedulerConfig {
        token_budget,
        chunk_tokens,
        max_running,
        max_waiting: 4,
        max_context: 18,
        block_tokens: BLOCK_TOKENS,
    })
}

/// What is known of a sequence that was taken.
struct Client {
    prompt: Vec<TokenId>,
    role: Role,
    /// All that it may draw.
    expected: Vec<TokenId>,
    /// Output index that comes next.
    next: usize,
    may_start: bool,
    /// Or its step failed.
    cancelled: bool,
    ends: FinishReason,
    finished: Option<FinishReason>,
}

struct Run {
    node: Node,
    clients: BTreeMap<u64, Client>,
    squeezed: Vec<Vec<BlockId>>,
}

impl Run {
    fn apply(&mut self, op: Op) {
        match op {
            Op::Submit(request) => self.submit(request),
            Op::Cancel(index) => {
                if let Some(id) = self.pick(index) {
                    let client = self.clients.get_mut(&id).unwrap();
                    client.cancelled |= client.finished.is_none();
                    self.node.cancel(id);
                }
            }
            Op::Release(index) => {
                if let Some(id) = self.pick(index) {
                    self.release(id);
                }
            }
            Op::Plan if !self.node.running => {
                self.node.plan();
            }
            Op::Complete if self.node.running => self.node.complete(),
            Op::Fail if self.node.running => {
                for span in &self.node.plan.spans {
                    self.clients.get_mut(&span.sequence.0).unwrap().cancelled = true;
                }
                self.node.fail();
            }
            Op::Plan | Op::Complete | Op::Fail => {}
            Op::Squeeze(count) => {
                let blocks = self.node.squeeze(count);
                self.squeezed.push(blocks);
            }
            Op::Relax => self.relax(),
        }
        self.take_events();
        self.node.pool.check().unwrap();
    }

    fn pick(&self, index: usize) -> Option<u64> {
        // Mostly those that are still here.
        let here: Vec<_> = self
            .clients
            .iter()
            .filter(|(_, client)| client.finished.is_none())
            .map(|(id, _)| *id)
            .collect();
        let all: Vec<_> = self.clients.keys().copied().collect();
        let from = if index.is_multiple_of(3) || here.is_empty() {
            all
        } else {
            here
        };
        (!from.is_empty()).then(|| from[index / 3 % from.len()])
    }

    /// What was cancelled needs no release.
    fn release(&mut self, id: u64) {
        if self.clients[&id].finished != Some(FinishReason::Cancelled) {
            self.node.release(id);
        }
    }

    fn relax(&mut self) {
        for blocks in self.squeezed.drain(..) {
            self.node.pool.release(&blocks);
        }
    }

    fn submit(&mut self, request: Request) {
        let id = self.clients.len() as u64;
        let prompt = request.prompt;
        let stop_ids = if request.stops { vec![VOCABULARY - 1] } else { vec![] };
        let full = undisturbed(&prompt, request.max_new_tokens, &stop_ids);
        let mut replayed = request.replayed.min(full.len());
        let mut role = request.role;
        let mut start = Start::Compute;
        if request.handed && !prompt.is_empty() {
            let Some(table) = self.node.receive(&prompt) else {
                return;
            };
            start = Start::Handed { table };
            replayed = replayed.max(1);
            role = Role::Decode;
        }
        let table = match &start {
            Start::Compute => vec![],
            Start::Handed { table } => table.clone(),
        };
        let new = NewSequence {
            id: SequenceId(id),
            root: root(),
            prompt: prompt.clone(),
            output: full[..replayed].to_vec(),
            max_new_tokens: request.max_new_tokens,
            stop_ids: stop_ids.clone(),
            sampling: request.sampling,
            role,
            start,
        };
        let too_long = prompt.len() + request.max_new_tokens > self.node.config.max_context;
        match self.node.submit(new) {
            Ok(()) => assert!(!prompt.is_empty() && !too_long),
            Err(error) => {
                match error {
                    SubmitError::EmptyPrompt => assert!(prompt.is_empty()),
                    SubmitError::TooLong { needed, limit } => assert!(too_long && needed > limit),
                    SubmitError::QueueFull { limit } => assert!(table.is_empty() && limit == 4),
                }
                self.node.pool.release(&table);
                return;
            }
        }
        let stopped = full.last().is_some_and(|token| stop_ids.contains(token));
        let once = role == Role::Prefill && replayed + 1 < full.len();
        let expected = if once { full[..replayed + 1].to_vec() } else { full };
        let client = Client {
            prompt,
            role,
            expected,
            next: replayed,
            may_start: table.is_empty(),
            cancelled: false,
            ends: if stopped && !once {
                FinishReason::Stop
            } else {
                FinishReason::Length
            },
            finished: None,
        };
        self.clients.insert(id, client);
    }

    fn take_events(&mut self) {
        for event in std::mem::take(&mut self.node.events) {
            let (SequenceEvent::Started { id, .. }
            | SequenceEvent::Computed { id, .. }
            | SequenceEvent::Token { id, .. }
            | SequenceEvent::Finished { id, .. }
            | SequenceEvent::Preempted { id }) = event;
            let client = self.clients.get_mut(&id.0).unwrap();
            assert_eq!(client.finished, None, "{event:?} after the end");
            match event {
                SequenceEvent::Started {
                    cached_tokens, table, ..
                } => {
                    assert!(std::mem::take(&mut client.may_start));
                    assert!(cached_tokens <= client.prompt.len());
                    assert_eq!(self.node.read(&table, cached_tokens), client.prompt[..cached_tokens]);
                }
                SequenceEvent::Computed { computed, table, .. } => {
                    assert!(!client.may_start);
                    assert_eq!(table.len(), blocks_for(computed));
                    // (What ended in this step may have been given back, but nobody has written there yet.)
                    assert_eq!(self.node.read(&table, computed), client.prompt[..computed]);
                }
                SequenceEvent::Token {
                    index,
                    token,
                    alternatives,
                    ..
                } => {
                    assert_eq!(alternatives, [(token, -1.0)]);
                    assert!(!client.may_start);
                    assert_eq!(index as usize, client.next, "no gap, no repeat");
                    assert_eq!(token, client.expected[client.next]);
                    client.next += 1;
                }
                SequenceEvent::Finished { reason, .. } => {
                    client.finished = Some(reason);
                    if client.cancelled {
                        assert_eq!(reason, FinishReason::Cancelled);
                    } else {
                        assert_eq!((client.next, reason), (client.expected.len(), client.ends));
                    }
                }
                SequenceEvent::Preempted { .. } => assert_eq!(client.role, Role::Decode),
            }
        }
    }

    /// Nothing disturbs any more: everything comes to its end.
    fn settle(&mut self) {
        self.relax();
        self.take_events();
        let rows: usize = self
            .clients
            .values()
            .map(|client| client.prompt.len() + client.expected.len())
            .sum();
        let count = self.clients.len();
        let unfinished = |run: &Self| run.clients.values().any(|client| client.finished.is_none());
        // Only the oldest is sure to move in each step, and the others may have to start again each time that one ends.
        for _ in 0..(rows + 1) * (count + 1) {
            (0..count as u64).for_each(|id| self.release(id));
            if !self.node.running && !self.node.plan() {
                // Those that had ended at submission are told in the same call.
                self.take_events();
                assert!(!unfinished(self), "nothing runs, and not all have ended");
                break;
            }
            self.node.complete();
            self.take_events();
            self.node.pool.check().unwrap();
        }
        assert!(!unfinished(self), "not all have ended");
        (0..count as u64).for_each(|id| self.release(id));
        assert!(self.node.pool.is_idle(), "{:?}", self.node.pool.counts());
        let load = self.node.scheduler.load();
        assert_eq!((load.waiting, load.running, load.queued_prefill_tokens), (0, 0, 0));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_024))]
    #[test]
    fn every_answer_is_that_of_an_undisturbed_run(config in config(), ops in prop::collection::vec(op(), 1..120)) {
        let mut run = Run { node: Node::new(config, BLOCKS), clients: BTreeMap::new(), squeezed: Vec::new() };
        for op in ops {
            run.apply(op);
        }
        run.settle();
    }
}
