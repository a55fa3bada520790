//! What a pool tells the routers about its named blocks.

use crate::BlockName;

/// One change, numbered within an epoch. A gap in `sequence` means: ask for a snapshot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KvEvent {
    /// From 1, without gaps, within one epoch.
    pub sequence: u64,
    /// What happened.
    pub kind: KvEventKind,
}

/// What happened to named blocks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum KvEventKind {
    /// A full block can now be found under `name`.
    Stored {
        /// Its chained name.
        name: BlockName,
        /// The name before it in the chain (the root for a first block).
        parent: BlockName,
    },
    /// The block can no longer be found.
    Removed {
        /// Its chained name.
        name: BlockName,
    },
    /// Nothing can be found any more.
    Cleared,
}
