//! One step as pure data: what an engine computes, and what it gives back.

use std::ops::Range;

use baton_kv::{BlockId, TokenId};

use crate::{Sample, Sampled};

/// One sequence on one node (unique within the process).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct SequenceId(pub u64);

/// One sequence's share of a step: `rows.len()` tokens at positions `context..context + rows.len()`.
#[derive(Clone, PartialEq, Debug)]
pub struct Span {
    /// Whose.
    pub sequence: SequenceId,
    /// Range into [`StepPlan::tokens`].
    pub rows: Range<usize>,
    /// Tokens whose KV is in the pool before this step; the position of the first row.
    pub context: usize,
    /// Range into [`StepPlan::tables`]: the blocks that hold positions `0..context + rows.len()`, in order.
    pub table: Range<usize>,
    /// Whether the last row's logits are wanted, and what for.
    pub sample: Option<Sample>,
}

impl Span {
    /// Tokens in the pool after this step.
    pub fn end(&self) -> usize {
        self.context + self.rows.len()
    }
}

/// What one step computes. Reused from step to step; [`StepPlan::clear`] keeps the allocations.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct StepPlan {
    /// Token of each row, spans one after another.
    pub tokens: Vec<TokenId>,
    /// One per sequence, in order of rows; decode spans (one row) before prefill spans.
    pub spans: Vec<Span>,
    /// Block tables, one after another.
    pub tables: Vec<BlockId>,
    /// What [`Sample::history`] refers to: tokens of sequences with penalties, one sequence after another.
    pub history: Vec<TokenId>,
}

impl StepPlan {
    /// Empties it.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.spans.clear();
        self.tables.clear();
        self.history.clear();
    }

    /// Rows to compute.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// The spans that sample, in order.
    pub fn sampling_spans(&self) -> impl Iterator<Item = &Span> {
        self.spans.iter().filter(|span| span.sample.is_some())
    }

    /// The tokens that a sample's penalties count.
    pub fn history(&self, sample: &Sample) -> &[TokenId] {
        &self.history[sample.history.clone()]
    }

    /// The block table of a span.
    pub fn table(&self, span: &Span) -> &[BlockId] {
        &self.tables[span.table.clone()]
    }
}

/// What a step gives back: one entry per sampling span, in order. Reused from step to step.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct StepOutput {
    /// The drawn tokens.
    pub sampled: Vec<Sampled>,
}
