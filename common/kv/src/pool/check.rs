//! The invariants of the table, all of them.

use super::{Owner, Pool, PoolCounts};
use crate::BlockId;

impl Pool {
    /// Checks every invariant of the table; the error says which is broken. For tests and the idle check.
    pub fn check(&self) -> Result<(), String> {
        self.check_counts()?;
        self.check_free()?;
        self.check_cached()?;
        self.check_names()?;
        require(self.events.is_consistent(), || {
            "events: not numbered to the latest".into()
        })
    }

    /// Whether nobody but the prefix cache has a block: free + cached = total.
    pub fn is_idle(&self) -> bool {
        self.counts.free + self.counts.cached == self.counts.total
    }

    fn blocks(&self) -> impl Iterator<Item = BlockId> {
        (0..self.rows.len() as u32).map(BlockId)
    }

    fn check_counts(&self) -> Result<(), String> {
        let mut counts = PoolCounts {
            total: self.rows.len(),
            ..PoolCounts::default()
        };
        for row in &self.rows {
            *counts.of(row.owner) += 1;
        }
        require(counts == self.counts, || {
            format!("counts: the table has {counts:?}, the sums say {:?}", self.counts)
        })
    }

    fn check_free(&self) -> Result<(), String> {
        require(self.free.is_consistent(), || {
            "free runs: indexes differ or runs touch".into()
        })?;
        let listed = self
            .free
            .runs()
            .flat_map(|(start, length)| start..start + length)
            .map(BlockId);
        let owned = self.blocks().filter(|&block| self.owner(block) == Owner::Free);
        require(listed.eq(owned), || "free runs: not exactly the free blocks".into())
    }

    fn check_cached(&self) -> Result<(), String> {
        let mut listed: Vec<_> = self.lru.iter().collect();
        listed.sort_unstable();
        let owned = self.blocks().filter(|&block| self.owner(block) == Owner::Cached);
        require(listed.into_iter().eq(owned), || {
            "lru: not exactly the cached blocks".into()
        })
    }

    fn check_names(&self) -> Result<(), String> {
        let mut named_blocks = 0;
        for block in self.blocks() {
            let row = self.row(block);
            let may_be_named = match row.owner {
                Owner::Sequence { refs } => {
                    require(refs > 0, || format!("{block:?} is held by nobody"))?;
                    true
                }
                Owner::Cached => {
                    require(row.named.is_some(), || format!("{block:?} is cached without a name"))?;
                    true
                }
                Owner::Free | Owner::Granted(_) | Owner::Quarantined(_) => false,
            };
            let Some(named) = row.named else { continue };
            named_blocks += 1;
            require(may_be_named, || format!("{block:?} is {:?} and named", row.owner))?;
            require(self.names.get(&named.name) == Some(&block), || {
                format!("{block:?} cannot be found under its name")
            })?;
            require(named.parent.child(self.tokens_of(block)) == named.name, || {
                format!("{block:?} is not called what its tokens say")
            })?;
        }
        require(named_blocks == self.names.len(), || {
            "names: one leads to a block without it".into()
        })
    }
}

fn require(holds: bool, broken: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(broken()) }
}
