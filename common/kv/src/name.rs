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

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> BlockName {
        BlockName::root(&KvIdentity([1; 32]), &Salt([2; 32]))
    }

    #[test]
    fn names_are_what_the_module_says() {
        let hash = |parts: &[&[u8]]| BlockName(*blake3::hash(&parts.concat()).as_bytes());
        assert_eq!(root(), hash(&[b"baton.kv.root.v1", &[1; 32], &[2; 32]]));
        let first = hash(&[b"baton.kv.block.v1", &root().0, &[5, 0, 0, 0, 0, 1, 0, 0]]);
        let second = hash(&[b"baton.kv.block.v1", &first.0, &[7, 0, 0, 0, 8, 0, 0, 0]]);
        assert_eq!(name_blocks(root(), &[5, 256, 7, 8, 9], 2), [first, second]);
    }

    #[test]
    fn identity_salt_and_every_earlier_token_are_in_a_name() {
        let last = |root, tokens: &[TokenId]| *name_blocks(root, tokens, 2).last().unwrap();
        let base = last(root(), &[1, 2, 3, 4]);
        let other_identity = BlockName::root(&KvIdentity([3; 32]), &Salt([2; 32]));
        let other_salt = BlockName::root(&KvIdentity([1; 32]), &Salt::derive(&[0; 32], "tenant"));
        assert_ne!(base, last(other_identity, &[1, 2, 3, 4]));
        assert_ne!(base, last(other_salt, &[1, 2, 3, 4]));
        assert_ne!(base, last(root(), &[9, 2, 3, 4]));
        assert_ne!(base, last(root(), &[1, 2, 4, 3]));
        assert_eq!(name_blocks(root(), &[1], 2), []);
    }

    #[test]
    fn a_salt_depends_on_secret_and_tenant() {
        let salt = Salt::derive(&[1; 32], "a");
        assert_eq!(salt, Salt::derive(&[1; 32], "a"));
        assert!(salt != Salt::derive(&[2; 32], "a") && salt != Salt::derive(&[1; 32], "b"));
        assert_eq!(format!("{salt:?}"), "Salt(…)");
    }
}
