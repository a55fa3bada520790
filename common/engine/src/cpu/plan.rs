//! What the operations need of a step's plan, checked and laid out once per step.

use std::ops::Range;

use baton_scheduler::StepPlan;

use super::builder::CpuConfig;
use crate::StepError;

/// Query heads times rows that share one conversion of a KV tile: their accumulators stay in the first-level cache.
pub(super) const QUERIES: usize = 32;

/// Consecutive rows of one span, attended to together.
#[derive(Clone, Copy, Debug)]
pub(super) struct RowTile {
    pub(super) span: usize,
    /// First row of the step.
    pub(super) row: usize,
    pub(super) rows: usize,
    /// Position of the first row.
    pub(super) position: usize,
}

/// Where a row's token stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct RowPlace {
    pub(super) span: usize,
    pub(super) position: usize,
}

/// Checked indices of a step; allocations are kept from step to step.
#[derive(Default)]
pub(super) struct Places {
    pub(super) rows: Vec<RowPlace>,
    pub(super) tiles: Vec<RowTile>,
    /// Last row of each sampling span, and the span.
    pub(super) sampling: Vec<(usize, usize)>,
    /// Per block of the pool, the last step that wrote to it.
    written: Vec<u64>,
    step: u64,
}

fn refuse<T>(problem: String) -> Result<T, StepError> {
    Err(StepError::Plan(problem))
}

impl Places {
    /// Checks every index of `plan` against the backend's bounds, and fills the tables.
    pub(super) fn fill(&mut self, plan: &StepPlan, config: &CpuConfig, vocabulary: usize) -> Result<(), StepError> {
        self.rows.clear();
        self.tiles.clear();
        self.sampling.clear();
        self.written.resize(config.blocks, 0);
        self.step += 1;
        if plan.rows() > config.max_rows {
            return refuse(format!("{} rows where {} are the most", plan.rows(), config.max_rows));
        }
        if let Some(token) = plan.tokens.iter().find(|&&token| token as usize >= vocabulary) {
            return refuse(format!("token {token} where the vocabulary has {vocabulary}"));
        }
        if let Some(block) = plan.tables.iter().find(|block| block.0 as usize >= config.blocks) {
            return refuse(format!("block {} where the pool has {}", block.0, config.blocks));
        }
        for (index, span) in plan.spans.iter().enumerate() {
            let Range { start, end } = span.rows;
            if start != self.rows.len() || end <= start || end > plan.rows() {
                return refuse(format!("span {index} has rows {start}..{end} of {}", plan.rows()));
            }
            let Some(tokens) = span
                .context
                .checked_add(end - start)
                .filter(|&tokens| tokens <= config.max_context)
            else {
                return refuse(format!(
                    "span {index} goes beyond the context of {} tokens",
                    config.max_context
                ));
            };
            let table = &span.table;
            if table.start > table.end || table.end > plan.tables.len() {
                return refuse(format!("span {index} has table {table:?} of {}", plan.tables.len()));
            }
            if table.len() < config.layout.blocks_for(tokens) {
                return refuse(format!("span {index} has {} blocks for {tokens} tokens", table.len()));
            }
            // One place has one writer: otherwise two threads might write it at once.
            for block in &plan.table(span)[span.context / config.layout.block_tokens..config.layout.blocks_for(tokens)]
            {
                let written = &mut self.written[block.0 as usize];
                if std::mem::replace(written, self.step) == self.step {
                    return refuse(format!("block {} would be written twice", block.0));
                }
            }
            let group = config.shape.heads / config.shape.kv_heads;
            let rows_per_tile = (QUERIES / group).max(1);
            for first in span.rows.clone().step_by(rows_per_tile) {
                let position = span.context + (first - start);
                self.tiles.push(RowTile {
                    span: index,
                    row: first,
                    rows: rows_per_tile.min(end - first),
                    position,
                });
            }
            self.rows
                .extend((span.context..tokens).map(|position| RowPlace { span: index, position }));
            if span.sample.is_some() {
                self.sampling.push((end - 1, index));
            }
        }
        if self.rows.len() != plan.rows() {
            return refuse(format!("{} rows belong to no span", plan.rows() - self.rows.len()));
        }
        if self.sampling.len() > config.max_sampling_rows {
            return refuse(format!(
                "{} spans sample where {} are the most",
                self.sampling.len(),
                config.max_sampling_rows
            ));
        }
        Ok(())
    }
}
