//! What a step plan must keep to. Checked before anything is computed, so that a defective plan cannot harm the engine.

use baton_scheduler::{Span, StepPlan};

use crate::StepError;

/// The bounds of the engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct PlanLimits {
    /// Rows of a step at most.
    pub(super) max_rows: usize,
    /// Spans of a step at most.
    pub(super) max_sequences: usize,
    /// Token ids are below it.
    pub(super) vocabulary: usize,
    /// Positions are below it.
    pub(super) context_length: usize,
    /// Block ids are below it.
    pub(super) blocks: usize,
    /// Tokens of a block.
    pub(super) block_tokens: usize,
}

impl PlanLimits {
    /// [`StepError::Plan`] says which bound is broken.
    pub(super) fn check(&self, plan: &StepPlan) -> Result<(), StepError> {
        let refuse = |what: String| Err(StepError::Plan(what));
        if plan.rows() > self.max_rows {
            return refuse(format!("{} rows where {} fit", plan.rows(), self.max_rows));
        }
        if plan.spans.len() > self.max_sequences {
            return refuse(format!(
                "{} sequences where {} fit",
                plan.spans.len(),
                self.max_sequences
            ));
        }
        if let Some(token) = plan.tokens.iter().find(|&&token| token as usize >= self.vocabulary) {
            return refuse(format!("token {token} of a vocabulary of {}", self.vocabulary));
        }
        if let Some(block) = plan.tables.iter().find(|block| block.0 as usize >= self.blocks) {
            return refuse(format!("block {} of {}", block.0, self.blocks));
        }
        let mut row = 0;
        for span in &plan.spans {
            self.check_span(plan, span, row)?;
            row = span.rows.end;
        }
        if row != plan.rows() {
            return refuse(format!("{row} rows in spans and {} tokens", plan.rows()));
        }
        Ok(())
    }

    fn check_span(&self, plan: &StepPlan, span: &Span, first_row: usize) -> Result<(), StepError> {
        let refuse = |what: String| Err(StepError::Plan(format!("sequence {}: {what}", span.sequence.0)));
        if span.rows.start != first_row || span.rows.is_empty() || span.rows.end > plan.rows() {
            return refuse(format!("rows {:?} where rows from {first_row} are expected", span.rows));
        }
        match span.context.checked_add(span.rows.len()) {
            Some(end) if end <= self.context_length => {}
            _ => {
                return refuse(format!(
                    "positions up to {} + {} of {}",
                    span.context,
                    span.rows.len(),
                    self.context_length
                ));
            }
        }
        let blocks = span.end().div_ceil(self.block_tokens);
        if span.table.start > span.table.end || span.table.end > plan.tables.len() || span.table.len() < blocks {
            return refuse(format!("table {:?} where {blocks} blocks are needed", span.table));
        }
        Ok(())
    }
}
