//! An engine whose every token depends on all tokens of its sequence, as they lie in the blocks of its table, so that a wrong table, context
//! or block changes the answer; and a node around it.

use std::collections::BTreeSet;

use baton_kv::{BlockId, BlockName, HandoffId, KvIdentity, Owner, Pool, Salt, TokenId};

use super::super::*;
use crate::{Alternatives, Sampled, Span, StepOutput, StepPlan};

pub(super) const BLOCK_TOKENS: usize = 2;
pub(super) const VOCABULARY: u32 = 5;
/// What lies in a block that nobody has written.
const GARBAGE: TokenId = 99;

pub(super) fn root() -> BlockName {
    BlockName::root(&KvIdentity([1; 32]), &Salt([2; 32]))
}

pub(super) fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_TOKENS)
}

/// The token that follows `tokens`.
pub(super) fn next_token(tokens: &[TokenId]) -> TokenId {
    let hash = tokens.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &token| {
        (hash ^ u64::from(token + 1)).wrapping_mul(0x0100_0000_01b3)
    });
    ((hash >> 32) % u64::from(VOCABULARY)) as TokenId
}

/// The whole output of a sequence that runs undisturbed.
pub(super) fn undisturbed(prompt: &[TokenId], max_new_tokens: usize, stop_ids: &[TokenId]) -> Vec<TokenId> {
    let mut tokens = prompt.to_vec();
    while tokens.len() < prompt.len() + max_new_tokens {
        tokens.push(next_token(&tokens));
        if stop_ids.contains(tokens.last().unwrap()) {
            break;
        }
    }
    tokens.split_off(prompt.len())
}

/// One node: pool, block contents, scheduler, and the step under way.
pub(super) struct Node {
    pub(super) config: SchedulerConfig,
    pub(super) pool: Pool,
    pub(super) scheduler: Scheduler,
    pub(super) plan: StepPlan,
    pub(super) running: bool,
    /// Since they were last taken.
    pub(super) events: Vec<SequenceEvent>,
    /// Who drew a token in the last step.
    drew: Vec<SequenceId>,
    /// `[block][token]`.
    memory: Vec<TokenId>,
    next_handoff: u64,
}

impl Node {
    pub(super) fn new(config: SchedulerConfig, blocks: usize) -> Self {
        Self {
            config,
            pool: Pool::new(blocks, BLOCK_TOKENS),
            scheduler: Scheduler::new(config),
            plan: StepPlan::default(),
            running: false,
            events: Vec::new(),
            drew: Vec::new(),
            memory: vec![GARBAGE; blocks * BLOCK_TOKENS],
            next_handoff: 0,
        }
    }

    pub(super) fn submit(&mut self, sequence: NewSequence) -> Result<(), SubmitError> {
        self.scheduler.submit(sequence, &self.pool)
    }

    pub(super) fn cancel(&mut self, id: u64) {
        self.scheduler.cancel(SequenceId(id), &mut self.pool, &mut self.events);
    }

    pub(super) fn release(&mut self, id: u64) {
        self.scheduler.release(SequenceId(id), &mut self.pool);
    }

    /// A handoff fills blocks with `prompt`, as far as there is room.
    pub(super) fn receive(&mut self, prompt: &[TokenId]) -> Option<Vec<BlockId>> {
        self.next_handoff += 1;
        let handoff = HandoffId(self.next_handoff);
        let slots = self.pool.grant(handoff, blocks_for(prompt.len())).ok()?;
        self.pool.accept(handoff, &slots);
        let table: Vec<_> = slots.iter().map(|slot| slot.block).collect();
        for (position, &token) in prompt.iter().enumerate() {
            *self.cell(&table, position) = token;
        }
        let mut parent = root();
        for (&block, tokens) in table.iter().zip(prompt.chunks_exact(BLOCK_TOKENS)) {
            parent = self.pool.name(block, parent, tokens);
        }
        Some(table)
    }

    /// Takes blocks as handoffs do that never come to anything, and writes into them.
    pub(super) fn squeeze(&mut self, count: usize) -> Vec<BlockId> {
        let blocks = self.pool.allocate(count).unwrap_or_default();
        for position in 0..blocks.len() * BLOCK_TOKENS {
            *self.cell(&blocks, position) = GARBAGE;
        }
        blocks
    }

    /// Plans a step and checks it.
    pub(super) fn plan(&mut self) -> bool {
        assert!(!self.running);
        let before = self.scheduler.running.iter().map(|sequence| sequence.arrival).collect();
        let preemptions = self.scheduler.preemptions;
        self.running = self.scheduler.plan(&mut self.pool, &mut self.plan, &mut self.events);
        self.check_plan();
        self.check_turns(&before, self.scheduler.preemptions > preemptions);
        self.drew.clear();
        self.running
    }

    /// Computes the planned step and takes its result in.
    pub(super) fn complete(&mut self) {
        assert!(std::mem::take(&mut self.running));
        self.check_held();
        let output = self.compute();
        self.drew = self.plan.sampling_spans().map(|span| span.sequence).collect();
        self.scheduler.complete(&output, &mut self.pool, &mut self.events);
    }

    pub(super) fn fail(&mut self) {
        assert!(std::mem::take(&mut self.running));
        self.check_held();
        self.scheduler.failed(&mut self.pool, &mut self.events);
    }

    /// Runs until there is nothing to run; the number of steps is bounded. Finished prefills are released as they come.
    pub(super) fn run(&mut self, max_steps: usize) {
        for _ in 0..max_steps {
            if !self.plan() {
                return;
            }
            self.complete();
        }
        panic!("still running after {max_steps} steps");
    }

    pub(super) fn read(&self, table: &[BlockId], tokens: usize) -> Vec<TokenId> {
        let at = |position: usize| table[position / BLOCK_TOKENS].0 as usize * BLOCK_TOKENS + position % BLOCK_TOKENS;
        (0..tokens).map(|position| self.memory[at(position)]).collect()
    }

    fn cell(&mut self, table: &[BlockId], position: usize) -> &mut TokenId {
        &mut self.memory[table[position / BLOCK_TOKENS].0 as usize * BLOCK_TOKENS + position % BLOCK_TOKENS]
    }

    fn compute(&mut self) -> StepOutput {
        let plan = std::mem::take(&mut self.plan);
        for span in &plan.spans {
            for (offset, row) in span.rows.clone().enumerate() {
                *self.cell(plan.table(span), span.context + offset) = plan.tokens[row];
            }
        }
        let sampled = plan.sampling_spans().map(|span| {
            let tokens = self.read(plan.table(span), span.end());
            check_history(&plan, span, &tokens);
            let token = next_token(&tokens);
            let mut alternatives = Alternatives::NONE;
            alternatives.push(token, -1.0);
            Sampled {
                sequence: span.sequence,
                token,
                logprob: -1.0,
                alternatives,
            }
        });
        let output = StepOutput {
            sampled: sampled.collect(),
        };
        self.plan = plan;
        output
    }

    fn check_plan(&self) {
        let plan = &self.plan;
        assert_eq!(self.running, !plan.spans.is_empty());
        assert!(plan.rows() <= self.config.token_budget && plan.spans.len() <= self.config.max_running);
        let (mut row, mut entry, mut long) = (0, 0, false);
        let mut written = Vec::new();
        for (at, span) in plan.spans.iter().enumerate() {
            assert_eq!((span.rows.start, span.table.start), (row, entry));
            (row, entry) = (span.rows.end, span.table.end);
            assert!((1..=self.config.chunk_tokens).contains(&span.rows.len()));
            assert_eq!(span.table.len(), blocks_for(span.end()));
            assert!(span.end() <= self.config.max_context);
            assert!(plan.spans[..at].iter().all(|other| other.sequence != span.sequence));
            // Who drew a token in the last step comes before all chunks.
            long |= span.rows.len() > 1;
            assert!(
                !(long && self.drew.contains(&span.sequence)),
                "a decode row after a chunk"
            );
            written.extend(&plan.table(span)[span.context / BLOCK_TOKENS..]);
        }
        assert_eq!((row, entry), (plan.tokens.len(), plan.tables.len()));
        for (at, &block) in written.iter().enumerate() {
            assert_eq!(
                self.pool.owner(block),
                Owner::Sequence { refs: 1 },
                "written, but shared"
            );
            assert!(!written[..at].contains(&block), "written by two");
        }
        self.check_held();
    }

    /// Who is in the step, and who is not, by arrival. `before` ran before it was planned.
    fn check_turns(&self, before: &BTreeSet<u64>, preempted: bool) {
        let Scheduler { running, waiting, .. } = &self.scheduler;
        let counts = self.pool.counts();
        let out_of_blocks = preempted || counts.free + counts.cached == 0;
        assert!(running.is_sorted_by_key(|sequence| sequence.arrival));
        assert!(waiting.iter().is_sorted_by_key(|sequence| sequence.arrival));

        // The oldest moves on, and loses nothing.
        if let Some(oldest) = running.first() {
            assert!(oldest.rows > 0 || counts.free + counts.cached == 0, "the oldest stands");
        }
        if let Some(oldest) = before.first() {
            assert!(
                running.iter().any(|sequence| sequence.arrival == *oldest),
                "the oldest was preempted"
            );
        }
        // Prompts do not block decodes: if one has no row, others that decode (and perhaps the oldest) have all that there are.
        let decodes = || running.iter().filter(|sequence| sequence.remaining() == 1);
        let first = usize::from(running.first().is_some_and(|oldest| oldest.remaining() > 1));
        let served = decodes().filter(|sequence| sequence.rows == 1).count() + first;
        let idle = decodes().find(|sequence| sequence.rows == 0);
        if let Some(idle) = idle
            && !out_of_blocks
        {
            assert!(
                served >= self.config.max_running.min(self.config.token_budget),
                "a decode without a row"
            );
            // The oldest of them come first.
            assert!(decodes().all(|sequence| sequence.rows == 0 || sequence.arrival <= idle.arrival));
        }
        // Who came in came before all who wait; who was preempted came after all who go on, but those that had their rows already.
        for sequence in running.iter().filter(|sequence| !before.contains(&sequence.arrival)) {
            assert!(
                waiting.front().is_none_or(|head| head.arrival > sequence.arrival),
                "overtaken"
            );
            assert!(running.len() <= self.config.max_running, "one too many came in");
        }
        for victim in waiting.iter().filter(|sequence| before.contains(&sequence.arrival)) {
            let later = running
                .iter()
                .filter(|other| other.arrival > victim.arrival && other.role == Role::Decode);
            assert!({ later }.all(|other| other.rows > 0), "preempted before a later one");
            assert!(victim.table.is_empty() && victim.role == Role::Decode);
        }
        // No row is left while somebody has room in its table for it.
        let left = self.plan.rows() < self.config.token_budget && self.plan.spans.len() < self.config.max_running;
        let more = |sequence: &Sequence| {
            let wanted = sequence.remaining().min(self.config.chunk_tokens);
            sequence.rows < wanted && blocks_for(sequence.context + wanted) <= sequence.table.len()
        };
        assert!(
            !left || !running.iter().any(more),
            "rows are left, and somebody lacks them"
        );
    }

    /// What the step uses is held.
    fn check_held(&self) {
        for &block in &self.plan.tables {
            assert!(matches!(self.pool.owner(block), Owner::Sequence { .. }), "{block:?}");
        }
    }
}

/// The penalties of a span that draws count its tokens, which are `tokens` by what lies in its blocks.
fn check_history(plan: &StepPlan, span: &Span, tokens: &[TokenId]) {
    let sample = span.sample.as_ref().expect("it draws");
    let history = plan.history(sample);
    let output = sample.index as usize;
    if sample.params.repetition_penalty != 1.0 {
        assert_eq!(history, tokens, "prompt and output");
    } else if sample.params.presence_penalty != 0.0 {
        assert_eq!(history, &tokens[tokens.len() - output..], "the output alone");
    } else {
        assert!(history.is_empty(), "nothing counts");
    }
}
