//! What the operations need of a step's plan, laid out once per step.

use std::ops::Range;

use baton_scheduler::StepPlan;

use super::{
    attention::{PARTITION, STEP_QUERIES},
    builder::CpuConfig,
};

/// Query heads times rows that share a KV tile: it and their accumulators stay in the first-level cache.
pub(super) const QUERIES: usize = 4 * STEP_QUERIES;

/// Consecutive rows of one span, attended to together.
#[derive(Clone, Debug)]
pub(super) struct RowTile {
    pub(super) span: usize,
    /// First row of the step.
    pub(super) row: usize,
    pub(super) rows: usize,
    /// Position of the first row.
    pub(super) position: usize,
    /// Of the context: those that any of the rows sees.
    pub(super) partitions: Range<usize>,
    /// Partitions of the tiles before it.
    pub(super) first_partition: usize,
}

/// Where a row's token stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct RowPlace {
    pub(super) span: usize,
    pub(super) position: usize,
}

/// Indices of a step; allocations are kept from step to step.
#[derive(Default)]
pub(super) struct Places {
    pub(super) rows: Vec<RowPlace>,
    pub(super) tiles: Vec<RowTile>,
    /// Of all tiles together.
    pub(super) partitions: usize,
    /// Last row of each sampling span, and the span.
    pub(super) sampling: Vec<(usize, usize)>,
}

impl Places {
    /// Fills the tables from a plan that [`PlanCheck`](crate::plan_check::PlanCheck) has passed.
    pub(super) fn fill(&mut self, plan: &StepPlan, config: &CpuConfig) {
        self.rows.clear();
        self.tiles.clear();
        self.sampling.clear();
        self.partitions = 0;
        for (index, span) in plan.spans.iter().enumerate() {
            let Range { start, end } = span.rows;
            let group = config.shape.heads / config.shape.kv_heads;
            // Of a piece: a group, or a part of it.
            let heads = group.div_ceil(group.div_ceil(STEP_QUERIES));
            let rows_per_tile = QUERIES / heads;
            for first in span.rows.clone().step_by(rows_per_tile) {
                let position = span.context + (first - start);
                let rows = rows_per_tile.min(end - first);
                let seen = config.shape.first_seen(position)..position + rows;
                let partitions = seen.start / PARTITION..seen.end.div_ceil(PARTITION);
                let first_partition = self.partitions;
                self.partitions += partitions.len();
                self.tiles.push(RowTile {
                    span: index,
                    row: first,
                    rows,
                    position,
                    partitions,
                    first_partition,
                });
            }
            self.rows
                .extend((span.context..span.end()).map(|position| RowPlace { span: index, position }));
            if span.sample.is_some() {
                self.sampling.push((end - 1, index));
            }
        }
    }

    /// The `index`-th partition of all tiles: its tile, and its number within the context.
    pub(super) fn partition(&self, index: usize) -> Option<(usize, usize)> {
        let tile = self
            .tiles
            .partition_point(|tile| tile.first_partition <= index)
            .checked_sub(1)?;
        let partitions = &self.tiles[tile].partitions;
        let partition = partitions.start + index - self.tiles[tile].first_partition;
        (partition < partitions.end).then_some((tile, partition))
    }
}
