//! What a step plan must keep to, whatever engine runs it. Checked before anything is computed, so that a defective plan cannot harm the engine.

use baton_scheduler::{Sample, Span, StepPlan, TOP_LOGPROBS_MAX};

use crate::StepError;

/// The bounds of the engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct PlanLimits {
    /// Rows of a step at most.
    pub(crate) max_rows: usize,
    /// Spans of a step at most.
    pub(crate) max_spans: usize,
    /// Spans that sample at most.
    pub(crate) max_sampling_spans: usize,
    /// Token ids are below it.
    pub(crate) vocabulary: usize,
    /// Positions are below it.
    pub(crate) context_length: usize,
    /// Block ids are below it.
    pub(crate) blocks: usize,
    /// Tokens of a block.
    pub(crate) block_tokens: usize,
}

/// Checks one plan after another; its table is kept from step to step.
pub(crate) struct PlanCheck {
    pub(crate) limits: PlanLimits,
    /// Per block of the pool, the last step that wrote to it.
    written: Vec<u64>,
    step: u64,
}

impl PlanCheck {
    pub(crate) fn new(limits: PlanLimits) -> Self {
        Self {
            limits,
            written: vec![0; limits.blocks],
            step: 0,
        }
    }

    /// [`StepError::Plan`] says which bound is broken.
    pub(crate) fn check(&mut self, plan: &StepPlan) -> Result<(), StepError> {
        self.limits.check(plan)?;
        self.step += 1;
        // One place has one writer: otherwise two threads might write it at once.
        let block_tokens = self.limits.block_tokens;
        for span in &plan.spans {
            for block in &plan.table(span)[span.context / block_tokens..span.end().div_ceil(block_tokens)] {
                let written = &mut self.written[block.0 as usize];
                if std::mem::replace(written, self.step) == self.step {
                    return refuse(format!("block {} would be written twice", block.0));
                }
            }
        }
        Ok(())
    }
}

fn refuse<T>(what: String) -> Result<T, StepError> {
    Err(StepError::Plan(what))
}

impl PlanLimits {
    fn check(&self, plan: &StepPlan) -> Result<(), StepError> {
        let bounds = [
            ("rows", plan.rows(), self.max_rows),
            ("sequences", plan.spans.len(), self.max_spans),
            (
                "sampling sequences",
                plan.sampling_spans().count(),
                self.max_sampling_spans,
            ),
        ];
        if let Some((what, has, most)) = bounds.into_iter().find(|&(_, has, most)| has > most) {
            return refuse(format!("{has} {what} where {most} fit"));
        }
        if let Some(token) = plan.tokens.iter().find(|&&token| token as usize >= self.vocabulary) {
            return refuse(format!("token {token} of a vocabulary of {}", self.vocabulary));
        }
        if let Some(token) = plan.history.iter().find(|&&token| token as usize >= self.vocabulary) {
            return refuse(format!(
                "token {token} in a history, of a vocabulary of {}",
                self.vocabulary
            ));
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
        let refuse = |what: String| refuse(format!("sequence {}: {what}", span.sequence.0));
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
        match &span.sample {
            Some(sample) => self
                .check_sample(plan, sample)
                .or_else(|what| refuse(format!("its sample's {what}"))),
            None => Ok(()),
        }
    }

    fn check_sample(&self, plan: &StepPlan, sample: &Sample) -> Result<(), String> {
        let (history, params) = (&sample.history, &sample.params);
        if history.start > history.end || history.end > plan.history.len() {
            return Err(format!("history {history:?} of {}", plan.history.len()));
        }
        if params.penalises() && history.len() < sample.index as usize {
            return Err(format!(
                "history has {} of {} output tokens",
                history.len(),
                sample.index
            ));
        }
        if let Some((token, _)) = params
            .logit_bias
            .iter()
            .find(|(token, _)| *token as usize >= self.vocabulary)
        {
            return Err(format!("bias of token {token}, of a vocabulary of {}", self.vocabulary));
        }
        if params.top_logprobs as usize > TOP_LOGPROBS_MAX {
            return Err(format!(
                "{} alternatives where {TOP_LOGPROBS_MAX} fit",
                params.top_logprobs
            ));
        }
        Ok(())
    }
}
