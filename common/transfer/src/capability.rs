//! The right to push, as a secret.

use std::fmt;

/// 32 random bytes, drawn by the driver for each reservation: whoever shows them may push.
#[derive(Clone)]
pub struct Capability([u8; 32]);

impl Capability {
    /// From random bytes.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// From the wire; `None` when not exactly 32 bytes.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        Some(Self(bytes.try_into().ok()?))
    }

    /// For the wire.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Whether both are the same, in time that does not depend on where they differ.
    pub fn matches(&self, other: &Self) -> bool {
        let difference = self
            .0
            .iter()
            .zip(&other.0)
            .fold(0u8, |acc, (a, b)| std::hint::black_box(acc | (a ^ b)));
        std::hint::black_box(difference) == 0
    }
}

impl PartialEq for Capability {
    fn eq(&self, other: &Self) -> bool {
        self.matches(other)
    }
}

impl Eq for Capability {}

impl fmt::Debug for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Capability(…)")
    }
}
