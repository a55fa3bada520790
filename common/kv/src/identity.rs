//! What must be equal for KV bytes to mean the same on two nodes.

use std::fmt;

/// Digest of the weights, RoPE, KV dtype and lossiness, and numerics class. Prefix hits, pairing and replay need it equal.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KvIdentity(pub [u8; 32]);

/// Collects `(field, value)` pairs, length-prefixed, in the order given.
pub struct IdentityBuilder {
    hasher: blake3::Hasher,
}

impl IdentityBuilder {
    /// An empty identity, of this version.
    pub fn new() -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"baton.kv.identity.v1");
        Self { hasher }
    }

    /// Adds one field. Order matters.
    #[must_use]
    pub fn field(mut self, name: &str, value: &[u8]) -> Self {
        for part in [name.as_bytes(), value] {
            self.hasher.update(&(part.len() as u64).to_le_bytes());
            self.hasher.update(part);
        }
        self
    }

    /// The digest.
    pub fn finish(self) -> KvIdentity {
        KvIdentity(*self.hasher.finalize().as_bytes())
    }
}

impl Default for IdentityBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl KvIdentity {
    /// From the wire; `None` when not exactly 32 bytes.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        Some(Self(bytes.try_into().ok()?))
    }
}

impl fmt::Display for KvIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..6].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KvIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KvIdentity({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_field_counts_and_none_runs_into_the_next() {
        let digest = |fields: &[(&str, &str)]| {
            let add = |builder: IdentityBuilder, field: &(&str, &str)| builder.field(field.0, field.1.as_bytes());
            fields.iter().fold(IdentityBuilder::new(), add).finish()
        };
        let base = digest(&[("dtype", "bf16"), ("tile", "32")]);
        assert_eq!(base, digest(&[("dtype", "bf16"), ("tile", "32")]));
        for other in [
            &[("dtype", "bf16"), ("tile", "33")][..],
            &[("dtype", "bf16"), ("tiles", "32")],
            &[("tile", "32"), ("dtype", "bf16")],
            &[("dtype", "bf16t"), ("ile", "32")],
            &[("dtype", "bf16")],
            &[],
        ] {
            assert_ne!(base, digest(other), "{other:?}");
        }
    }
}
