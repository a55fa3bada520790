//! Names: a block's chained prefix hash.
//!
//! `root = blake3("baton.kv.root.v1" ‖ kv_identity ‖ salt)`, `name = blake3("baton.kv.block.v1" ‖ parent ‖ tokens as u32 LE)`.
//! Only full blocks have names.

use std::fmt;

use crate::{KvIdentity, TokenId};

/// Keyed blake3(cluster secret, authenticated tenant): separates tenants' names. Never chosen by the client.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Salt(pub [u8; 32]);

impl Salt {
    /// Derives a tenant's salt from the cluster's secret.
    pub fn derive(cluster_secret: &[u8; 32], tenant: &str) -> Self {
        Self(*blake3::keyed_hash(cluster_secret, tenant.as_bytes()).as_bytes())
    }
}

/// A full block's chained name, or the root from which a chain starts.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockName(pub [u8; 32]);

impl BlockName {
    /// The parent of every first block under this identity and salt.
    pub fn root(identity: &KvIdentity, salt: &Salt) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"baton.kv.root.v1");
        hasher.update(&identity.0);
        hasher.update(&salt.0);
        Self(*hasher.finalize().as_bytes())
    }

    /// The name of the block that follows `self` and holds `tokens` (a whole block of them).
    pub fn child(&self, tokens: &[TokenId]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"baton.kv.block.v1");
        hasher.update(&self.0);
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        Self(*hasher.finalize().as_bytes())
    }

    /// From the wire; `None` when not exactly 32 bytes.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        Some(Self(bytes.try_into().ok()?))
    }
}

/// Names of the full blocks of `tokens`, in order; the incomplete tail has none.
pub fn name_blocks(root: BlockName, tokens: &[TokenId], block_tokens: usize) -> Vec<BlockName> {
    let mut parent = root;
    tokens
        .chunks_exact(block_tokens)
        .map(|chunk| {
            parent = parent.child(chunk);
            parent
        })
        .collect()
}

impl fmt::Display for BlockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..6].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for BlockName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockName({self})")
    }
}

impl fmt::Debug for Salt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Salt(…)")
    }
}
