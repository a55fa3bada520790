//! KV blocks: what they are called, who owns them, where their bytes lie.
//!
//! Pure: no I/O, no clock, no task, no randomness of its own. Drivers draw epochs and ids and say what time it is. The one exception makes, checks and maps
//! the file of memory that a shared pool lies in ([`MemoryFile`], [`ForeignMemory`]).
//!
//! **Architecture invariants**
//! - Ownership of a block is a field of [`Pool`]'s table; no guard's lifetime owns a block.
//! - A granted block leaves only through [`Pool::drained`]; nothing else frees it.
//! - When nothing runs, free + cached = total ([`Pool::check`]).
//! - A [`BlockName`] names one run of tokens under one [`KvIdentity`] and one salt, and tokens are compared on a hit, too.
//!
//! Deliberately absent: tiers other than the pool's own memory, networking, and any knowledge of models.

mod checksum;
mod event;
mod file;
mod id;
mod identity;
mod layout;
mod lease;
mod memory;
mod name;
mod pool;
mod time;

pub use checksum::{CHECKED, Checksum, ChecksumState};
pub use event::{KvEvent, KvEventKind};
pub use file::{ForeignMemory, ForeignMemoryError, MemoryFile, SHMEM_ENABLED, shared_huge_pages};
pub use id::{Attempt, BlockId, Epoch, Generation, HandoffId, NodeId, RequestId, TokenId};
pub use identity::{IdentityBuilder, KvIdentity};
pub use layout::{KvDtype, KvLayout};
pub use lease::Lease;
pub use memory::{KvMemory, KvMemoryError, SharedPool};
pub use name::{BlockName, Salt, name_blocks};
pub use pool::{GrantedSlot, NamedBlock, OutOfBlocks, Owner, Pool, PoolCounts, PrefixHit};
pub use time::Time;
